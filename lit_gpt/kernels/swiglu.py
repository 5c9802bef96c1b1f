"""SwiGLU (Shazeer 2020, arXiv:2002.05202), and the MLP around it."""

import torch
import torch.nn.functional as F

from lit_gpt.kernels.linear import linear


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) · up, elementwise."""
    return F.silu(gate) * up


def swiglu_mlp(x: torch.Tensor, w_gate: torch.Tensor, w_up: torch.Tensor, w_down: torch.Tensor) -> torch.Tensor:
    """(silu(x @ w_gateᵀ) · (x @ w_upᵀ)) @ w_downᵀ for x (..., C), w_gate and w_up (I, C), w_down (C, I)."""
    return linear(swiglu(linear(x, w_gate), linear(x, w_up)), w_down)
