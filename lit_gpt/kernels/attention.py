"""Causal self-attention. One function, one layout, whatever runs underneath.

B batch, T query positions, S key positions, H query heads, G key/value heads (H a multiple of G), D head size.
"""

import torch
import torch.nn.functional as F


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """softmax(q kᵀ / √D) v, every group of H / G query heads sharing one key/value head.

    Args:
        q: (B, T, H, D).
        k, v: (B, S, G, D).
        mask: True where a query may look, broadcastable to (B, 1, T, S); None: causal, which needs T == S.

    Returns:
        (B, T, H, D).
    """
    assert mask is not None or q.size(1) == k.size(1), (
        "over a cache, give a mask: is_causal is top-left"
    )
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    gqa = q.size(1) != k.size(1)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=gqa)
    return out.transpose(1, 2)
