"""Compile the kernels of a first training step ahead, side by side, while a script still imports its libraries.

    python -m lit_gpt.precompile --model tiny_LLaMA_1b --capability 9.0      # by hand, for an image; needs no GPU

flash-attn-4 and quack-kernels (CuTe) take 3 to 6 s for each kernel, and Triton with its launchers 8 s for all of ours,
one after the other half a minute; all three keep them on the disk and look there first. They also compile for tensors
without data and for a GPU that is not there. So, once a machine, a process that never touches the GPU imports them,
while the script that will train is importing too, and forks a child for each CuTe kernel and one for Triton's, which
call them; the real calls then find all on the disk.

Nothing depends on it: what goes wrong here, goes wrong or well at the real call. Only the standard library is imported
before something is to be compiled.
"""

import argparse
import fcntl
import gc
import hashlib
import importlib.metadata
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from getpass import getuser
from pathlib import Path
from types import ModuleType, SimpleNamespace

from lit_gpt.config import MODELS, Config

PACKAGES = ("torch", "triton", "flash-attn-4", "quack-kernels", "nvidia-cutlass-dsl")
NOT_TRAINING = ("-h", "--help", "--plan", "--print_config")


def begin(argv: list[str]) -> None:
    """Start this program for the model that a training script's command line names, in the background."""
    kernels = re.search(r"^--kernels[=\n](.*)", "\n".join(argv), re.MULTILINE)
    chosen = kernels is not None and "auto" not in kernels[1]  # which are compiled when their turn comes
    if shutil.which("nvidia-smi") is None or chosen or {arg.partition("=")[0] for arg in argv} & {*NOT_TRAINING}:
        return
    quiet = dict(stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    subprocess.Popen([sys.executable, "-m", "lit_gpt.precompile", "--model", model_named(argv)], **quiet)


def model_named(argv: list[str]) -> str:
    """By --model, or `model:` in a YAML file; a guess does no harm."""
    text = "\n".join(argv)
    for arg in argv:
        if arg.endswith(".yaml"):
            with suppress(OSError):
                text += "\n" + Path(arg.partition("=")[2] or arg).read_text()
    found = re.search(r"^(?:--model[=\n]|model:)\s*([\w-]+)", text, re.MULTILINE)
    return found[1] if found and found[1] in MODELS else "tiny_LLaMA_1b"


# --- the program -----------------------------------------------------------------------------------------------------


def main(model: str | None, heads: tuple[int, int, int], capability: str | None) -> None:
    """Of several processes one compiles and the others wait for it."""
    config = Config.from_name(model) if model else None
    if config is not None:
        heads = config.n_head, config.n_query_groups, config.head_size
    sources = b"".join(path.read_bytes() for path in sorted((Path(__file__).parent / "kernels").glob("*.py")))
    state = (sources, sys.version_info[:2], [_version(package) for package in PACKAGES])
    cute, triton = (_cache_dir() / f"precompiled-{_hash(state, what)}" for what in (heads, config))
    cute.parent.mkdir(parents=True, exist_ok=True)
    with open(cute.parent / "precompiled.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        missing = {done for done in (cute, config and triton) if done and not done.exists()}
        if not missing:
            return
        if capability is None:
            ask = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
            asked = subprocess.Popen(ask, stdout=subprocess.PIPE, text=True)  # it may have to wake the GPU first
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        import_torch()
        capability = capability or asked.communicate()[0].split()[0]
        gc.disable()  # it would write to, and so copy, all the memory that forks share
        fork = multiprocessing.get_context("fork")
        jobs = []
        if triton in missing:
            major, minor = map(int, capability.split("."))
            jobs.append((triton, [fork.Process(target=triton_kernels, args=(config, 10 * major + minor))]))
            jobs[0][1][0].start()
        if cute in missing and capability == "9.0" and _version("flash-attn-4"):
            calls, fake = cute_kernels(heads)  # whose imports, seconds of them, the forks have
            jobs.append((cute, [fork.Process(target=call) for call in calls]))
            with fake():
                for child in jobs[-1][1]:
                    child.start()
        elif cute in missing:
            cute.touch()  # nothing to be done here
        for done, children in jobs:
            for child in children:
                child.join()
            if not any(child.exitcode for child in children):
                done.touch()


def import_torch() -> None:
    """Without torch._dynamo, which takes as long again. Of it, tensors without data want the configuration, and quack a
    decorator that keeps functions from being compiled by it; here none is."""
    import torch

    dynamo = ModuleType("torch._dynamo")
    dynamo.__path__ = [str(Path(torch.__file__).parent / "_dynamo")]
    dynamo.disable = lambda function, *_, **__: function
    sys.modules["torch._dynamo"] = torch._dynamo = dynamo


def cute_kernels(heads: tuple[int, int, int]) -> tuple[list[Callable[[], object]], Callable]:
    """A call of each kernel of flash-attn-4 and, if installed, quack that a step calls, the slowest first; what makes
    all new tensors be without data. Imports the packages."""
    os.environ |= {name: "sm_90a" for name in ("QUACK_ARCH", "FLASH_ATTENTION_ARCH", "CUTE_DSL_ARCH")}
    import torch

    from lit_gpt.kernels.attention import load

    load("fa4")
    from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd
    from quack.cache import compile_only_mode

    H, G, D = heads
    device = torch.device("cuda", 0)

    def tensors(*n_heads: int) -> list[torch.Tensor]:
        return [torch.zeros(1, 256, n, D, dtype=torch.bfloat16, device=device) for n in n_heads]

    with compile_only_mode():
        tensors(H)  # imports sympy

    def lse() -> torch.Tensor:
        return torch.zeros(1, H, 256, device=device)

    calls = [
        lambda: _flash_attn_bwd(*tensors(H, G, G, H, H), lse(), causal=True),
        lambda: _flash_attn_fwd(*tensors(H, G, G), causal=True, return_lse=True),
    ]
    with suppress(ImportError):
        from lit_gpt.kernels import quack_mlp

        calls += quack_mlp.calls(device)
    return calls, compile_only_mode


def triton_kernels(config: Config, capability: int) -> None:
    """A micro-batch of two layers on tensors without data, by a driver that launches nothing."""
    import torch
    import triton

    from lit_gpt.kernels import ELEMENTWISE, Kernels, fused
    from lit_gpt.model import GPT

    triton.runtime.driver.set_active(AbsentGPU(capability))
    with torch.device("meta"):
        model = GPT(
            replace(config, n_layer=2, padded_vocab_size=config.padded_vocab_size),
            Kernels(**{operation: getattr(fused, operation) for operation in ELEMENTWISE}),
        )
        model.compute_in(torch.bfloat16)
        idx = torch.zeros(1, config.block_size, dtype=torch.long)
        model(idx, idx).backward()


class AbsentGPU:
    """What Triton asks of its driver: enough to compile kernels, and the C code of their launchers, and no more."""

    def __init__(self, capability: int) -> None:
        from triton.backends.compiler import GPUTarget
        from triton.backends.nvidia.driver import CudaUtils

        self.target = GPUTarget("cuda", capability, 32)
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 1 << 20},
            load_binary=lambda *_: (None, None, 0, 0, 1024),  # no module and function; registers, spills, most threads
        )
        self.launchers = ThreadPoolExecutor()
        self.launchers.submit(CudaUtils)

    def get_current_target(self) -> object:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def launcher_cls(self, src: object, metadata: object) -> Callable:
        from triton.backends.nvidia.driver import CudaLauncher

        self.launchers.submit(CudaLauncher, src, metadata)
        return lambda *_: None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cache_dir() -> Path:
    """quack's, so that both are deleted together."""
    return Path(os.environ.get("QUACK_CACHE_DIR") or Path(tempfile.gettempdir()) / getuser() / "quack_cache")


def _hash(*things: object) -> str:
    return hashlib.sha256(repr(things).encode()).hexdigest()[:16]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=MODELS, help="a preset of lit_gpt/config.py, of which all is compiled; or")
    parser.add_argument("--heads", nargs=3, type=int, help="query, key/value, head size, for CuTe's kernels alone")
    parser.add_argument("--capability", help="of the GPU, as 9.0; default: this machine's")
    arguments = parser.parse_args()
    main(arguments.model, arguments.heads and tuple(arguments.heads), arguments.capability)
