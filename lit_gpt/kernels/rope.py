"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), in the rotate-half form of GPT-NeoX and Llama.

B batch, T positions, H query heads, G key/value heads, D head size, R elements of a head that rotate.
"""

import math

import torch

from lit_gpt.config import Config


def rope_tables(config: Config, n_positions: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of position · frequency, each (n_positions, R / 2), always fp32: in bf16, positions beyond 256 would
    collide. With dynamic scaling n_positions is the length that the frequencies are for."""
    theta, amplitude = frequencies(config, n_positions, device)
    angles = torch.outer(torch.arange(n_positions, device=device, dtype=torch.float32), theta)
    return angles.cos() * amplitude, angles.sin() * amplitude


def frequencies(c: Config, length: int, device: torch.device) -> tuple[torch.Tensor, float]:
    """The angle from one position to the next, (R / 2,), and what cos and sin are multiplied by.

    Scalings, by which a model goes on beyond the `original` length that it was trained on, `factor` times as far:
        linear: all angles / factor (position interpolation, Chen et al. 2023, arXiv:2306.15595).
        dynamic: a larger base for sequences longer than `original`, by as much as this one is longer ("NTK-aware" and
            "dynamic NTK" scaling, both first published on reddit.com/r/LocalLLaMA, 2023; Peng et al., appendix A).
        yarn: interpolates what turns less than once in `original` positions, leaves what turns 32 times, and goes
            linearly from one to the other in between; attention is sharpened (Peng et al. 2023, arXiv:2309.00071).
        llama3: the same idea between 1 and 4 turns, linear in the number of turns (Llama 3.1's code).
    """
    n, base, factor, original = c.rope_n_elem, c.rope_base, c.rope_factor, c.rope_original_size
    if c.rope_scaling == "dynamic":
        base *= (factor * max(length, original) / original - (factor - 1)) ** (n / (n - 2))
    theta = 1.0 / base ** (torch.arange(0, n, 2, device=device, dtype=torch.float32) / n)
    if c.rope_scaling == "linear":
        return theta / factor, 1.0
    if c.rope_scaling == "yarn":

        def element(turns: float) -> float:
            """Which of the n elements turns so often in the original length."""
            return n * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

        low, high = max(math.floor(element(32)), 0), min(math.ceil(element(1)), n - 1)
        slow = ((torch.arange(n // 2, device=device) - low) / max(high - low, 0.001)).clamp(0, 1)
        return theta / factor * slow + theta * (1 - slow), 0.1 * math.log(factor) + 1
    if c.rope_scaling == "llama3":
        turns = original * theta / (2 * math.pi)
        fast = ((turns - 1) / (4 - 1)).clamp(0, 1)
        return theta / factor * (1 - fast) + theta * fast, 1.0
    return theta, 1.0


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
