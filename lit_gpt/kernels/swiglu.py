"""SwiGLU (Shazeer 2020, arXiv:2002.05202)."""

import torch
import torch.nn.functional as F


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) · up, elementwise."""
    return F.silu(gate) * up
