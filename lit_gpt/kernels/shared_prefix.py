"""Attention where several continuations of one prefix see it, but not each other: the prefix is computed once.

N tokens, H query heads, G key/value heads, D head size.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F


class SharedPrefixAttention:
    """A stand-in for `attention` over tokens laid end to end: all prefixes, then the continuations of the first, those
    of the second, ... Prefixes that nothing continues come last among the prefixes.

    A token sees its own piece, causally, and a continuation all of its prefix. On a GPU in half precision that is two
    calls of flash attention, one for the pieces and one for what continuations see of prefixes, merged by their
    log-sum-exp: softmax over a union of keys is the average of the softmaxes over its parts, weighted by the sums of
    their exponentials (Juravsky et al. 2024, arXiv:2402.05099). Elsewhere it is one masked product per prefix.
    """

    def __init__(self, prefixes: Sequence[int], continuations: Sequence[Sequence[int]], device: torch.device) -> None:
        """
        Args:
            prefixes: tokens of each prefix, 1 or more.
            continuations: tokens of each continuation, 1 or more, of the first prefixes; shorter than `prefixes`
                where the last have none.
        """
        pieces = [*prefixes, *(length for group in continuations for length in group)]
        self.n_prefix = sum(prefixes)
        self.prefix_ends = [*accumulate(prefixes, initial=0)]
        self.group_ends = [*accumulate(map(sum, continuations), initial=self.n_prefix)]
        self.continuations = continuations
        self.longest = (max(pieces), max(map(sum, continuations), default=0), max(prefixes))
        self.device = device
        if device.type == "cuda":
            n = len(continuations)
            boundaries = ([*accumulate(pieces, initial=0)], [end - self.n_prefix for end in self.group_ends])
            boundaries += (self.prefix_ends[: n + 1],)
            self.cu_pieces, self.cu_groups, self.cu_shared = (
                torch.tensor(b, dtype=torch.int32).pin_memory().to(device, non_blocking=True) for b in boundaries
            )
        self._masks: list[torch.Tensor] = []

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """q (B, T, H, D), k and v (B, T, G, D) with B·T = N, rows being of no significance -> (B, T, H, D)."""
        assert mask is None and cu_seqlens is None, "the pieces are what is seen"
        shape = q.shape
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        flash = q.is_cuda and q.dtype in (torch.float16, torch.bfloat16)
        return (self._flash(q, k, v) if flash else self._masked(q, k, v)).view(shape)

    def _flash(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        longest_piece, longest_group, longest_prefix = self.longest
        out, lse = _varlen(q, k, v, self.cu_pieces, self.cu_pieces, longest_piece, longest_piece, causal=True)
        if not self.continuations:
            return out
        n = self.n_prefix
        cross = (self.cu_groups, self.cu_shared, longest_group, longest_prefix)
        seen, seen_lse = _varlen(q[n:], k[:n], v[:n], *cross, causal=False)
        weight = torch.sigmoid(seen_lse - lse[:, n:]).T[..., None].to(out.dtype)  # (N - n, H, 1) of the prefix
        out[n:].lerp_(seen, weight)
        return out

    def _masked(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(q)
        gqa = q.size(1) != k.size(1)
        masks = self._masks or [None] * (len(self.prefix_ends) - 1)
        for i, (start, end) in enumerate(zip(self.prefix_ends, self.prefix_ends[1:], strict=False)):
            here = [slice(start, end)]
            if i < len(self.continuations):
                here.append(slice(self.group_ends[i], self.group_ends[i + 1]))
                if masks[i] is None:
                    masks[i] = self._mask(end - start, self.continuations[i])
            # (N, H, D) -> (1, H, n, D)
            q_, k_, v_ = (torch.cat([x[s] for s in here]).transpose(0, 1)[None] for x in (q, k, v))
            y = F.scaled_dot_product_attention(q_, k_, v_, masks[i], is_causal=masks[i] is None, enable_gqa=gqa)
            y = y[0].transpose(0, 1)
            for s, part in zip(here, y.split([s.stop - s.start for s in here]), strict=True):
                out[s] = part
        self._masks = masks
        return out

    def _mask(self, prefix: int, continuations: Sequence[int]) -> torch.Tensor:
        """(n, n) for a prefix and its continuations end to end: True where a token may look."""
        piece = torch.tensor([0] * prefix + [i for i, n in enumerate(continuations, 1) for _ in range(n)])
        mask = (piece[:, None] == piece) | (piece == 0)
        return (mask & torch.ones_like(mask).tril()).to(self.device)


def _varlen(q, k, v, cu_q, cu_k, longest_q: int, longest_k: int, causal: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """PyTorch's own flash attention over sequences laid end to end: (N, H, D), and the log-sum-exp (H, N), fp32.

    torch.nn.attention.varlen wraps the same, but refuses grouped queries in one version and transposes the log-sum-exp
    in another.
    """
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, cu_q, cu_k, longest_q, longest_k, 0.0, causal, return_debug_mask=False
    )
    return out, lse
