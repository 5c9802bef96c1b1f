"""Compile the CuTe kernels of a training step side by side, before the first of them is called.

flash-attn-4 and quack-kernels compile a kernel when it is first called, 3 to 8 s each, one after the other half a
minute; they keep it on the disk and look there first. They also compile for tensors that do not exist ("fake"): once
a machine, child processes that never touch the GPU make one such call each, and the real calls find all on the disk.

Nothing depends on it: what goes wrong here, goes wrong or well at the real call.
"""

import fcntl
import hashlib
import importlib.metadata
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Collection
from getpass import getuser
from pathlib import Path

import torch

from lit_gpt.kernels.attention import load

PACKAGES = {"fa4": "flash-attn-4", "quack": "quack-kernels"}
NO_GPU = {"QUACK_ARCH": "sm_90a", "FLASH_ATTENTION_ARCH": "sm_90a"}  # tells what they would ask the GPU
LONGEST_S = 120  # after which a child is given up


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
        try:
            codes = _run(_calls(versions, heads, device))
        except Exception:  # whatever a foreign package raises, it will again where it is used
            return
        if not any(codes):
            done.touch()


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


def _run(calls: list[Callable[[], None]]) -> list[int]:
    """Each in a process of its own; their exit codes."""
    fork = multiprocessing.get_context("fork")  # what has been imported, seconds of it, is there
    children = [fork.Process(target=_compile, args=(call,), daemon=True) for call in calls]
    for child in children:
        child.start()
    end = time.monotonic() + LONGEST_S
    for child in children:
        child.join(max(0.0, end - time.monotonic()))
        if child.exitcode is None:
            child.kill()
            child.join()
    return [child.exitcode for child in children]


def _compile(call: Callable[[], None]) -> None:
    os.environ |= NO_GPU
    torch.cuda.is_available = lambda: False  # or fake tensors would ask CUDA, which refuses to serve a fork
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    from quack.cache import compile_only_mode  # in which all new tensors are fake, flash-attn-4's too

    with compile_only_mode():
        call()
