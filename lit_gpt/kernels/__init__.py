"""The operations that decide the speed of a step, each a plain function with interchangeable backends.

    kernels = select_kernels("auto", device=torch.device("cuda"), dtype=torch.bfloat16)
    print(kernels.table())
    model = GPT(config, kernels)

A backend is chosen once, here; it appears neither in Config nor in a parameter's name.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from lit_gpt.kernels.attention import attention
from lit_gpt.kernels.cross_entropy import IGNORE_INDEX, linear_cross_entropy
from lit_gpt.kernels.rmsnorm import rms_norm
from lit_gpt.kernels.rope import split_rope
from lit_gpt.kernels.swiglu import swiglu

__all__ = ["IGNORE_INDEX", "Kernels", "select_kernels"]


@dataclass(frozen=True)
class Kernels:
    """One callable per operation; the signatures are those of the references in this folder."""

    attention: Callable = attention
    rms_norm: Callable = rms_norm
    split_rope: Callable = split_rope
    swiglu: Callable = swiglu
    linear_cross_entropy: Callable = linear_cross_entropy
    choices: tuple[tuple[str, str, str], ...] = ()
    """(operation, backend, why), for table()."""

    def table(self) -> str:
        """What runs underneath, and why nothing faster does: one line an operation."""
        return "\n".join(f"  {op:<22}{backend:<10}{why}" for op, backend, why in self.choices)


def select_kernels(name: str = "auto", *, device: torch.device, dtype: torch.dtype) -> Kernels:
    """The backends named, or for `auto` the fastest that work on this device and dtype.

    Raises:
        ValueError: an unknown name.
        ImportError: a backend that was asked for by name is not installed; the message holds the install command.
    """
    if name not in ("auto", "torch"):
        raise ValueError(f"unknown kernels {name!r}. Known: auto, torch")
    ops = ("attention", "rms_norm", "split_rope", "swiglu", "linear_cross_entropy")
    return Kernels(choices=tuple((op, "torch", "") for op in ops))
