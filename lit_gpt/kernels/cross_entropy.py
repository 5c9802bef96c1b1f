"""The head and its loss in one: cross-entropy of hidden @ weightᵀ without ever holding all logits.

N tokens, C width, V rows of the head.
"""

from collections.abc import Callable

import torch
from torch.utils.checkpoint import checkpoint

from lit_gpt.kernels.linear import linear

IGNORE_INDEX = -100  # a target of this value contributes neither loss nor gradient
CHUNK = 8192  # tokens whose logits exist at a time


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor, z_loss: float) -> torch.Tensor:
    """The loss of each row, (N,) fp32, for logits (N, V) in any dtype: the last step of `linear_cross_entropy`."""
    logits, valid = logits.float(), targets != IGNORE_INDEX
    lse = logits.logsumexp(-1)
    loss = lse - logits.gather(-1, targets.where(valid, 0)[:, None])[:, 0] + z_loss * lse.square()
    return loss.where(valid, 0.0)


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    reduction: str = "sum",
    z_loss: float = 0.0,
    row_losses: Callable = cross_entropy,
) -> torch.Tensor:
    """Cross-entropy of targets under softmax(hidden @ weightᵀ), from the hidden states before the head.

    The tokens go through in chunks whose logits are recomputed in the backward, so memory for logits is CHUNK x V.

    Args:
        hidden: (N, C).
        weight: (V, C), the head.
        targets: (N,) int64 in [0, V), or IGNORE_INDEX.
        reduction: "sum" (a scalar) or "none" (N,). There is no mean: see GPT.forward.
        z_loss: adds z_loss · log²(Σ exp(logits)) to each token's loss, which keeps logits from drifting (PaLM,
            arXiv:2204.02311, section 5).
        row_losses: what computes the loss of each row of logits.

    Returns:
        fp32 loss in nats, zero for ignored targets.
    """

    def chunk_loss(h: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        loss = row_losses(linear(h, weight), t, z_loss)
        return loss.sum() if reduction == "sum" else loss

    if len(hidden) == 0:
        return hidden.new_zeros((), dtype=torch.float32) if reduction == "sum" else hidden.new_zeros(0)
    chunks = zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True)
    if torch.is_grad_enabled():
        losses = [checkpoint(chunk_loss, h, t, use_reentrant=False) for h, t in chunks]
    else:
        losses = [chunk_loss(h, t) for h, t in chunks]
    return torch.stack(losses).sum() if reduction == "sum" else torch.cat(losses)
