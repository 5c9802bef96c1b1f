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
import ctypes.util
import fcntl
import gc
import hashlib
import importlib.metadata
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from getpass import getuser
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TextIO

from lit_gpt.cli import one_line_errors
from lit_gpt.config import MODELS, Config

CUTE = ("flash-attn-4", "quack-kernels")
PACKAGES = ("torch", "triton", "nvidia-cutlass-dsl", *CUTE)
CACHES = ("HOME", "TRITON_HOME", "TRITON_CACHE_DIR", "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR")
LIMIT = 110  # seconds; select_kernels waits for 120
PR_SET_PDEATHSIG = 1
NOT_TRAINING = ("-h", "--help", "--plan", "--print_config")


def begin(argv: list[str]) -> None:
    """Start this program for the model that a training script's command line names, in the background."""
    text = _as_text(argv)
    kernels, precision, accelerator = (_value(text, name, r".*") for name in ("kernels", "precision", "accelerator"))
    if (
        shutil.which("nvidia-smi") is None
        or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
        or "cpu" in accelerator
        or precision.strip("[]'\" ") == "fp32"
        or (kernels and "auto" not in kernels)  # which are compiled when their turn comes
        or {arg.partition("=")[0] for arg in argv} & {*NOT_TRAINING}
    ):
        return
    quiet = dict(stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with suppress(OSError, ValueError):  # training goes on without
        subprocess.Popen([sys.executable, "-m", "lit_gpt.precompile", "--model", model_named(argv)], **quiet)


def model_named(argv: list[str]) -> str:
    """By --model, or `model:` in a YAML file; a guess does no harm."""
    found = _value(_as_text(argv), "model", r"[\w-]+")
    return found if found in MODELS else "tiny_LLaMA_1b"


def _as_text(argv: list[str]) -> str:
    """A line for each word, and then those of the YAML files among them."""
    text = "\n".join(argv)
    for arg in argv:
        if arg.endswith(".yaml"):
            with suppress(OSError, ValueError):  # it is for the script to complain
                text += "\n" + Path(arg.partition("=")[2] or arg).read_text()
    return text


def _value(text: str, name: str, pattern: str) -> str:
    found = re.search(rf"^(?:--{name}[=\n]|{name}:)[ \t]*({pattern})", text, re.MULTILINE)
    return found[1] if found else ""


# --- the program -----------------------------------------------------------------------------------------------------


def main(model: str | None, heads: tuple[int, int, int] | None, capability: str | None) -> str | None:
    """Of several processes one compiles; the others wait for it, and no longer. Returns: what went wrong, if anything.

    Raises: ValueError when there is no GPU to be asked for its capability.
    """
    config = Config.from_name(model) if model else None
    if config is not None:
        heads = config.n_head, config.n_query_groups, config.head_size
    sources = b"".join(path.read_bytes() for path in sorted((Path(__file__).parent / "kernels").glob("*.py")))
    # Launchers are linked against the driver's library; an image is made without it, and what runs in it has it.
    caches = [*map(os.environ.get, CACHES), ctypes.util.find_library("cuda")]
    state = (sources, sys.version_info[:2], [_version(package) for package in PACKAGES], caches)
    folder = _cache_dir()
    folder.mkdir(parents=True, exist_ok=True)
    cute, triton = (f"precompiled-{_hash(state, what)}" for what in (heads, config))
    with open(folder / f"{cute}.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fcntl.flock(lock, fcntl.LOCK_EX)
            return None  # what the other could not compile, this one would not either
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        gc.disable()  # it would write to, and so copy, all the memory that forks share
        if capability is None:
            asked = _ask_for_capability()
            if not any(folder.glob(f"{triton}-*")):
                import_torch()  # meanwhile: nvidia-smi may have to wake the GPU
            capability = _capability(asked.communicate()[0].partition("\n")[0])
        of_triton, of_cute = (folder / f"{name}-{capability}" for name in (triton, cute))
        jobs: dict[Path, list[multiprocessing.Process]] = {}
        deadline = time.monotonic() + LIMIT

        def start(done: Path, *calls: Callable[[], object]) -> None:
            fork = multiprocessing.get_context("fork")
            jobs[done] = [fork.Process(target=_in_child, args=(lock, call)) for call in calls]
            for child in jobs[done]:
                child.start()

        if config and not of_triton.exists():
            import_torch()
            start(of_triton, partial(triton_kernels, config, int(capability.replace(".", ""))))
        if capability == "9.0" and any(map(_version, CUTE)) and not of_cute.exists():
            import_torch()
            calls, fake = cute_kernels(heads)  # whose imports, seconds of them, the forks have
            with fake():
                start(of_cute, *calls)
        failed = 0
        for done, children in jobs.items():
            here = sum(not succeeded(child, deadline) for child in children)
            if children and not here:
                done.touch()
            failed += here
        return f"{failed} of {sum(map(len, jobs.values()))} processes that compile failed" if failed else None


def _ask_for_capability() -> subprocess.Popen:
    try:
        ask = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        return subprocess.Popen(ask, stdout=subprocess.PIPE, text=True)
    except OSError:
        raise ValueError("there is no nvidia-smi to say which GPU this is: give its --capability, as 9.0") from None


def _capability(text: str) -> str:
    if not re.fullmatch(r"\d+\.\d", text.strip()):
        raise ValueError(f"{text!r} is not the capability of a GPU: give --capability, as 9.0")
    return text.strip()


def _in_child(lock: TextIO, call: Callable[[], object]) -> None:
    """Without its parent, a child neither goes on nor keeps the next start waiting."""
    lock.close()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    call()


def succeeded(child: multiprocessing.Process, deadline: float) -> bool:
    """Waits for it; one that takes longer is killed."""
    child.join(max(0.0, deadline - time.monotonic()))
    if child.is_alive():
        child.kill()
        child.join()
    return child.exitcode == 0


def import_torch() -> None:
    """Without torch._dynamo, which takes as long again. Of it, tensors without data want the configuration, and quack a
    decorator that keeps functions from being compiled by it; here none is."""
    import torch

    if "torch._dynamo" in sys.modules:
        return
    dynamo = ModuleType("torch._dynamo")
    dynamo.__path__ = [str(Path(torch.__file__).parent / "_dynamo")]
    dynamo.disable = lambda function, *_, **__: function
    sys.modules["torch._dynamo"] = torch._dynamo = dynamo


def cute_kernels(heads: tuple[int, int, int]) -> tuple[list[Callable[[], object]], Callable]:
    """A call of each kernel that a step calls of flash-attn-4 and quack, as far as they are installed, the slowest
    first; what makes all new tensors be without data. Imports the packages."""
    os.environ |= {name: "sm_90a" for name in ("QUACK_ARCH", "FLASH_ATTENTION_ARCH", "CUTE_DSL_ARCH")}
    import torch

    from lit_gpt.kernels.attention import load

    if _version("flash-attn-4"):
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

    calls = []
    if _version("flash-attn-4"):
        calls += [
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

    gpu = AbsentGPU(capability)
    triton.runtime.driver.set_active(gpu)
    with torch.device("meta"):
        model = GPT(
            replace(config, n_layer=2, padded_vocab_size=config.padded_vocab_size),
            Kernels(**{operation: getattr(fused, operation) for operation in ELEMENTWISE}),
        )
        model.compute_in(torch.bfloat16)
        idx = torch.zeros(1, config.block_size, dtype=torch.long)
        model(idx, idx).backward()
    for launcher in gpu.launchers:
        launcher.result()


class AbsentGPU:
    """What Triton asks of its driver: enough to compile kernels, and the C code of their launchers, and no more."""

    def __init__(self, capability: int) -> None:
        from triton.backends.compiler import GPUTarget
        from triton.backends.nvidia.driver import CudaUtils, libcuda_dirs

        self.target = GPUTarget("cuda", capability, 32)
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 1 << 20},
            load_binary=lambda *_: (None, None, 0, 0, 1024),  # no module and function; registers, spills, most threads
        )
        self._threads = ThreadPoolExecutor()
        self.launchers: list[Future] = []
        try:
            libcuda_dirs()
        except AssertionError:  # it finds none
            print("There is no libcuda.so.1: launchers are left to the first run", file=sys.stderr)
            self._threads = None
        self._compile(CudaUtils)

    def _compile(self, *call: object) -> None:
        if self._threads:
            self.launchers.append(self._threads.submit(*call))

    def get_current_target(self) -> object:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def launcher_cls(self, src: object, metadata: object) -> Callable:
        from triton.backends.nvidia.driver import CudaLauncher

        self._compile(CudaLauncher, src, metadata)
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


def _major_minor(text: str) -> str:
    try:
        return _capability(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", choices=MODELS, help="a preset of lit_gpt/config.py, of which all is compiled; or")
    what.add_argument("--heads", nargs=3, type=int, help="query, key/value, head size, for CuTe's kernels alone")
    parser.add_argument("--capability", type=_major_minor, help="of the GPU, as 9.0; default: this machine's")
    arguments = parser.parse_args()
    with one_line_errors():
        sys.exit(main(arguments.model, arguments.heads and tuple(arguments.heads), arguments.capability))
