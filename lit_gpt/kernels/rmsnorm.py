"""Root-mean-square layer normalisation (Zhang and Sennrich 2019, arXiv:1910.07467)."""

import torch


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / √(mean(x²) + eps) · weight for x (..., C) and weight (C,): fp32 inside, x's dtype outside."""
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)


def add_rms_norm(
    x: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """x + delta, rounded to their dtype, and the norm of that: the two at the beginning of each sublayer."""
    x = x + delta
    return x, rms_norm(x, weight, eps)
