"""The operations that decide the speed of a step, each a plain function with interchangeable backends.

    kernels = select_kernels("auto", device=torch.device("cuda"), dtype=torch.bfloat16)
    print(kernels.table())
    model = GPT(config, kernels)

A backend is chosen once, here; it appears neither in Config nor in a parameter's name.
"""

import importlib.util
import subprocess
import sys
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from types import ModuleType

import torch

from lit_gpt.kernels import attention as _attention
from lit_gpt.kernels.attention import attention, cached_attention
from lit_gpt.kernels.cross_entropy import IGNORE_INDEX, linear_cross_entropy
from lit_gpt.kernels.linear import ComputeWeights, embedding, linear
from lit_gpt.kernels.rmsnorm import add_rms_norm, rms_norm
from lit_gpt.kernels.rope import split_rope
from lit_gpt.kernels.swiglu import swiglu_mlp

__all__ = ["IGNORE_INDEX", "ComputeWeights", "Kernels", "embedding", "linear", "select_kernels"]


@dataclass(frozen=True)
class Kernels:
    """One callable per operation; the signatures are those of the references in this folder."""

    attention: Callable = attention
    cached_attention: Callable = cached_attention
    rms_norm: Callable = rms_norm
    add_rms_norm: Callable = add_rms_norm
    split_rope: Callable = split_rope
    swiglu_mlp: Callable = swiglu_mlp
    linear_cross_entropy: Callable = linear_cross_entropy
    decode: ModuleType | None = None
    """Products of a few rows, for decoding: kernels/decode.py where there is Triton."""
    compile_blocks: bool = False
    """The elementwise operations are PyTorch's, to be fused by block.compile()."""
    choices: tuple[tuple[str, str, str], ...] = ()
    """(operation, backend, why), for table()."""

    def table(self) -> str:
        """What runs underneath, and why nothing faster does: a line for the operations that share both."""
        lines: dict[tuple[str, str], list[str]] = {}
        for op, backend, why in self.choices:
            lines.setdefault((backend, why), []).append(op)
        return "\n".join(
            f"  {', '.join(ops)}: {backend}{f' ({why})' if why else ''}" for (backend, why), ops in lines.items()
        )


ELEMENTWISE = ("rms_norm", "add_rms_norm", "split_rope", "swiglu_mlp", "linear_cross_entropy")


def select_kernels(
    name: str = "auto",
    *,
    device: torch.device,
    dtype: torch.dtype,
    heads: tuple[int, int, int] = (4, 2, 64),
    fp8: bool = False,
    training: bool = True,
) -> Kernels:
    """The backends named, or for `auto` the fastest that work on this device and dtype.

    Args:
        name: "auto"; or one for attention (fa4, fa2, cudnn, flash, efficient, xformers, math, torch), one for the rest
            (triton; quack: triton, and SwiGLU inside quack-kernels' GEMMs; flash_attn: flash-attn's Triton kernels;
            torch; compile: torch's, fused by block.compile()), or both joined by a plus, as "triton+cudnn". What is not
            named is chosen as by "auto", except that "torch" alone means the references throughout.
        heads: query heads, key/value heads and head size, for which attention must work. Packages that compile their
            kernels do so here: give the model's own, or they will again at the first step.
        fp8: the model will train in fp8, which has a SwiGLU of its own (kernels/fp8.py): `auto` does without quack.
        training: False leaves out of `auto` what is compiled for half a minute and pays over many steps only.

    Raises:
        ValueError: an unknown name, or a backend that cannot run on this device and dtype.
        ImportError: a backend that was asked for by name is not installed; the message holds the install command.
    """
    rest_names = ("quack", "triton", "flash_attn", "compile", "torch")
    attention_name = rest_name = "auto"
    for part in name.split("+"):
        if part in rest_names and rest_name == "auto":
            rest_name = part
        elif part in _attention.NAMES and attention_name == "auto":
            attention_name = part
        elif part != "auto":
            known = ", ".join(dict.fromkeys(("auto", *rest_names, *_attention.NAMES)))
            raise ValueError(f"unknown kernels {part!r} in {name!r}. Known: {known}; join two by a plus: triton+cudnn")
    if name == "torch":
        attention_name = "torch"

    # By measurement on an H100.
    rest_order = ("quack", "triton", "torch") if training and not fp8 else ("triton", "torch")
    order = ("fa4", "cudnn", "fa2", "flash", "efficient", "torch")[0 if training else 1 :]
    first = [
        order[0] if attention_name == "auto" else attention_name,
        rest_order[0] if rest_name == "auto" else rest_name,
    ]
    if device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0) and dtype == torch.bfloat16:
        _compile_ahead({"fa4", "quack"}.intersection(first), heads, device)
    rest, why_rest = _choose(rest_name, rest_order, lambda n: _usable(n, device, dtype))
    attend, why_attend = _choose(attention_name, order, lambda n: _attention.usable(n, device, dtype, heads))
    functions = {"attention": _attention.load(attend)}
    backends = dict.fromkeys(ELEMENTWISE, rest)
    if rest == "flash_attn":
        from lit_gpt.kernels import flash_attn_ops

        functions |= {op: getattr(flash_attn_ops, op) for op in ELEMENTWISE}
    if rest in ("triton", "quack"):
        from lit_gpt.kernels import decode, fused

        functions |= {op: getattr(fused, op) for op in ELEMENTWISE}
        functions |= {"cached_attention": decode.cached_attention, "decode": decode}
        backends = dict.fromkeys(ELEMENTWISE, "triton")
    if rest == "quack":
        from lit_gpt.kernels import quack_mlp

        functions["swiglu_mlp"] = quack_mlp.swiglu_mlp
        backends["swiglu_mlp"] = "quack"
    choices = (("attention", attend, why_attend), *((op, backend, why_rest) for op, backend in backends.items()))
    return Kernels(**functions, compile_blocks=rest == "compile", choices=choices)


def _compile_ahead(backends: Collection[str], heads: tuple[int, int, int], device: torch.device) -> None:
    """Let the program lit_gpt/precompile.py compile flash-attn-4's and quack's kernels for Hopper side by side, or wait
    for the one that the script has begun; without it each would be compiled where it is first called."""
    if not backends:
        return
    command = [sys.executable, "-m", "lit_gpt.precompile", "--capability", "9.0", "--heads", *map(str, heads)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as program:
        with suppress(Exception):  # imports meanwhile; whatever a foreign package raises here, it will where it is used
            if "fa4" in backends:
                _attention.load("fa4")
            if "quack" in backends:
                import lit_gpt.kernels.quack_mlp  # noqa: F401
            x = torch.ones(16, 16, dtype=torch.bfloat16, device=device)
            torch.mm(x, x)  # cuBLAS reads hundreds of MB at its first product
        try:
            program.wait(120)
        except subprocess.TimeoutExpired:
            program.kill()


def _choose(name: str, fastest_first: tuple[str, ...], why_not: Callable[[str], str]) -> tuple[str, str]:
    """The backend, and why none that is faster: the first that works, or the one named, which must."""
    if name != "auto":
        problem = why_not(name)
        if problem:
            error = ImportError if "not installed" in problem else ValueError
            raise error(f"kernels {name!r}: {problem}")
        return name, "as asked"
    problems = []
    for candidate in fastest_first:
        problem = why_not(candidate)
        if not problem:
            return candidate, "; ".join(problems)
        problems.append(f"{candidate} {problem}")
    raise AssertionError("the last candidate always works")


def _usable(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """Why these elementwise operations cannot run here; "" if they can."""
    if name == "torch":
        return ""
    if device.type != "cuda":
        return "needs a CUDA GPU"
    if importlib.util.find_spec("triton") is None:
        return "not installed: pip install triton"
    if name == "flash_attn":
        try:
            from lit_gpt.kernels import flash_attn_ops  # noqa: F401
        except ImportError as e:
            return f"not installed: {_attention.INSTALL['fa2']} ({e})"
        return ""
    capability = torch.cuda.get_device_capability(device)
    if name != "quack":
        return "" if capability >= (7, 0) else "needs compute capability 7.0"
    if capability[0] != 9 or dtype != torch.bfloat16:
        return "needs a Hopper GPU and bf16"
    try:
        from lit_gpt.kernels.quack_mlp import calls

        for call in calls(device):
            call()
    except ImportError as e:
        return f'not installed: pip install quack-kernels==0.5.0 "nvidia-cutlass-dsl[cu13]==4.5.3" ({e})'
    except Exception as e:  # whatever a foreign package raises, it does not work here
        return f"fails here: {type(e).__name__}: {e}"[:100]
    return ""
