"""The head and its loss in one: cross-entropy of hidden @ weightᵀ without ever holding all logits.

N tokens, C width, V rows of the head.
"""

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

IGNORE_INDEX = -100  # a target of this value contributes neither loss nor gradient


CHUNK = 4096  # tokens whose logits exist at a time


def linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, reduction: str = "sum"
) -> torch.Tensor:
    """Cross-entropy of targets under softmax(hidden @ weightᵀ), from the hidden states before the head.

    The tokens go through in chunks whose logits are recomputed in the backward, so memory for logits is CHUNK x V.

    Args:
        hidden: (N, C).
        weight: (V, C), the head.
        targets: (N,) int64 in [0, V), or IGNORE_INDEX.
        reduction: "sum" (a scalar) or "none" (N,). There is no mean: see GPT.forward.

    Returns:
        fp32 loss in nats, zero for ignored targets.
    """

    def chunk_loss(h: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy((h @ weight.T).float(), t, reduction=reduction, ignore_index=IGNORE_INDEX)

    losses = [
        checkpoint(chunk_loss, h, t, use_reentrant=False)
        for h, t in zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True)
    ]
    return torch.stack(losses).sum() if reduction == "sum" else torch.cat(losses)
