"""Compile the CuTe kernels of a training step side by side, before the first of them is called.

    python -m lit_gpt.kernels.precompile --heads 32 4 64       # by hand, once a machine or image; needs no GPU

flash-attn-4 and quack-kernels compile a kernel when it is first called, 3 to 8 s each, one after the other half a
minute; they keep it on the disk and look there first. They also compile for tensors that do not exist ("fake") and for
a GPU that is not there. So, once a machine, a process that never touches the GPU imports them and forks a child for
each kernel, which makes one such call; the real calls then find all on the disk.

Nothing depends on it: what goes wrong here, goes wrong or well at the real call.
"""

import argparse
import fcntl
import hashlib
import importlib.metadata
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection
from contextlib import suppress
from getpass import getuser
from pathlib import Path

import torch

from lit_gpt.kernels.attention import load

PACKAGES = {"fa4": "flash-attn-4", "quack": "quack-kernels"}
HOPPER = {name: "sm_90a" for name in ("QUACK_ARCH", "FLASH_ATTENTION_ARCH", "CUTE_DSL_ARCH")}
LONGEST_S = 120  # after which it is given up


def precompile(
    backends: Collection[str], heads: tuple[int, int, int], device: torch.device, dtype: torch.dtype
) -> None:
    """Compiles the kernels of those backends, "fa4" and "quack", that a training step calls, unless that has been done
    on this machine. Of several processes one does it and the others wait.

    Args:
        heads: query heads, key/value heads and head size.
    """
    versions = {name: version for name in sorted(PACKAGES.keys() & backends) if (version := _version(PACKAGES[name]))}
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)
    if not versions or not hopper or dtype != torch.bfloat16:
        return
    key = hashlib.sha256(repr((versions, heads, sys.version_info[:2])).encode()).hexdigest()[:16]
    done = _cache_dir() / f"precompiled-{key}"
    done.parent.mkdir(parents=True, exist_ok=True)
    with open(done.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if done.exists():
            return
        command = [sys.executable, "-m", "lit_gpt.kernels.precompile", "--backends", *versions, "--heads"]
        quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        with subprocess.Popen([*command, *map(str, heads)], **quiet) as process:
            with suppress(Exception):  # whatever a foreign package raises, it will again where it is used
                _calls(versions, heads, device)  # imports the packages meanwhile
            try:
                if process.wait(LONGEST_S) == 0:
                    done.touch()
            except subprocess.TimeoutExpired:
                process.kill()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cache_dir() -> Path:
    """quack's, so that both are deleted together."""
    return Path(os.environ.get("QUACK_CACHE_DIR") or Path(tempfile.gettempdir()) / getuser() / "quack_cache")


def _calls(backends: Collection[str], heads: tuple[int, int, int], device: torch.device) -> list[Callable[[], None]]:
    """One of each kernel; imports what they need."""
    calls = []
    if "fa4" in backends:
        load("fa4")
        from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd

        H, G, D = heads

        def tensors(*n_heads: int) -> list[torch.Tensor]:
            return [torch.zeros(1, 256, n, D, dtype=torch.bfloat16, device=device) for n in n_heads]

        def lse() -> torch.Tensor:
            return torch.zeros(1, H, 256, device=device)

        calls += [
            lambda: _flash_attn_fwd(*tensors(H, G, G), causal=True, return_lse=True),
            lambda: _flash_attn_bwd(*tensors(H, G, G, H, H), lse(), causal=True),
        ]
    if "quack" in backends:
        from lit_gpt.kernels import quack_mlp

        calls += quack_mlp.calls(device)
    return calls


def main(backends: Collection[str], heads: tuple[int, int, int]) -> None:
    os.environ |= HOPPER | {"CUDA_VISIBLE_DEVICES": ""}
    calls = _calls(backends, heads, torch.device("cuda", 0))
    from quack.cache import compile_only_mode  # in which all new tensors are fake, flash-attn-4's too

    fork = multiprocessing.get_context("fork")  # what has been imported, seconds of it, is there
    with compile_only_mode():
        children = [fork.Process(target=call, daemon=True) for call in calls]
        for child in children:
            child.start()
        for child in children:
            child.join()
    sys.exit(any(child.exitcode for child in children))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--backends", nargs="+", choices=PACKAGES, default=list(PACKAGES), help="whose kernels")
    parser.add_argument("--heads", nargs=3, type=int, default=(32, 4, 64), help="query, key/value, head size")
    arguments = parser.parse_args()
    main(arguments.backends, tuple(arguments.heads))
