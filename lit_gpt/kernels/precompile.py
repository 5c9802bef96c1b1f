"""Compile the CuTe kernels of a training step all at once, before the first of them is called.

    python -m lit_gpt.kernels.precompile --heads 32 4 64       # by hand, once a machine or image; needs no GPU

flash-attn-4 and quack-kernels compile a kernel when it is first called, 2 to 7 s each and one after the other half a
minute, and look on the disk before they do. They also compile for tensors that do not exist ("fake") and for a GPU that
is not there. So a process that never touches the GPU imports them once, and forks a child for each kernel.

Nothing depends on it: what goes wrong here, goes wrong or well at the first call.
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
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from getpass import getuser
from pathlib import Path

import torch

from lit_gpt.kernels.attention import load

HOPPER = {"QUACK_ARCH": "sm_90a", "FLASH_ATTENTION_ARCH": "sm_90a", "CUTE_DSL_ARCH": "sm_90a"}
PACKAGES = {"fa4": "flash-attn-4", "quack": "quack-kernels"}


def precompile(
    backends: Collection[str], heads: tuple[int, int, int], device: torch.device, dtype: torch.dtype
) -> None:
    """Compiles those kernels of these backends, "fa4" and "quack", that training needs, unless that has been done on
    this machine. Of several processes one does it and the others wait.

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
        process = subprocess.Popen([*command, *map(str, heads)], **quiet)
        with suppress(Exception):  # meanwhile; whatever a foreign package raises, it will again where it is used
            load("fa4")
            import lit_gpt.kernels.quack_mlp  # noqa: F401
        if process.wait() == 0:
            done.touch()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cache_dir() -> Path:
    """quack's, so that both are deleted together."""
    return Path(os.environ.get("QUACK_CACHE_DIR") or Path(tempfile.gettempdir()) / getuser() / "quack_cache")


def attention_calls(heads: tuple[int, int, int], device: torch.device) -> list[Callable[[], None]]:
    """The forward and the backward as a training step has them."""
    from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd

    H, G, D = heads
    q, k, v, out, dout = (torch.zeros(1, 256, n, D, dtype=torch.bfloat16, device=device) for n in (H, G, G, H, H))
    lse = torch.zeros(1, H, 256, device=device)
    return [
        lambda: _flash_attn_fwd(q, k, v, causal=True, return_lse=True),
        lambda: _flash_attn_bwd(q, k, v, out, dout, lse, causal=True),
    ]


def main(backends: list[str], heads: tuple[int, int, int]) -> None:
    os.environ |= HOPPER | {"CUDA_VISIBLE_DEVICES": ""}
    load("fa4")
    from quack.cache import compile_only_mode

    from lit_gpt.kernels.quack_mlp import calls as mlp_calls

    def run(call: Callable[[], None], name: str) -> None:
        t0 = time.perf_counter()
        call()
        print(f"{name}: {time.perf_counter() - t0:.1f} s", flush=True)

    device = torch.device("cuda", 0)
    with compile_only_mode():
        calls = {"fa4": lambda: attention_calls(heads, device), "quack": lambda: mlp_calls(device)}
        fork = multiprocessing.get_context("fork")
        children = [
            fork.Process(target=run, args=(call, f"{name} {i}"))
            for name in backends
            for i, call in enumerate(calls[name]())
        ]
        for child in children:
            child.start()
        for child in children:
            child.join()
    sys.exit(max(abs(child.exitcode) for child in children))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--backends", nargs="+", choices=PACKAGES, default=list(PACKAGES), help="whose kernels")
    parser.add_argument("--heads", nargs=3, type=int, default=(32, 4, 64), help="query, key/value, head size")
    arguments = parser.parse_args()
    main(arguments.backends, tuple(arguments.heads))
