"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), in the rotate-half form of GPT-NeoX and Llama.

B batch, T positions, H query heads, G key/value heads, D head size, R elements of a head that rotate.
"""

import torch


def rope_tables(
    n_positions: int, n_elem: int, base: float, condense_ratio: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of position · base^(-2i/n_elem), each (n_positions, n_elem / 2), always fp32: in bf16, positions
    beyond 256 would collide."""
    theta = 1.0 / base ** (torch.arange(0, n_elem, 2, device=device, dtype=torch.float32) / n_elem)
    angles = torch.outer(torch.arange(n_positions, device=device, dtype=torch.float32) / condense_ratio, theta)
    return angles.cos(), angles.sin()


def split_rope(
    qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, n_query_groups: int, head_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Split the fused projection into heads and rotate queries and keys by their positions.

    Args:
        qkv: (B, T, (H + 2G) D); for each group its H / G queries, then its key, then its value.
        cos, sin: (T, R / 2) fp32, or (B, T, R / 2) where sequences of a batch are at different positions.

    Returns:
        q (B, T, H, D), k (B, T, G, D), v (B, T, G, D), in qkv's dtype.
    """
    B, T, _ = qkv.shape
    groups = qkv.view(B, T, n_query_groups, -1, head_size)  # (B, T, G, H/G + 2, D)
    q, k, v = groups.split((groups.size(3) - 2, 1, 1), dim=3)
    # (..., T, R/2) -> (..., T, 1, 1, R/2), to broadcast over groups and heads
    cos, sin = cos[..., None, None, :], sin[..., None, None, :]
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    return q.reshape(B, T, -1, head_size), k.reshape(B, T, -1, head_size), v.reshape(B, T, -1, head_size)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs (x[i], x[i + R/2]) of the first R elements of x (..., D); the rest passes through."""
    half = cos.size(-1)
    x1, x2, rest = x[..., :half].float(), x[..., half : 2 * half].float(), x[..., 2 * half :]
    return torch.cat(((x1 * cos - x2 * sin).to(x.dtype), (x2 * cos + x1 * sin).to(x.dtype), rest), dim=-1)
