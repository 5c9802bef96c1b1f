"""flash-attn's own Triton kernels for all but attention, behind the signatures of the references.

TinyLlama trained with their ancestors, CUDA extensions of flash-attn that are no longer made. Selected by name only:
ours are faster (pretrain/LOG.md). Imported only where they are selected, since they need flash-attn.
"""

import torch
from flash_attn.layers.rotary import apply_rotary_emb
from flash_attn.ops.activations import swiglu
from flash_attn.ops.triton.cross_entropy import cross_entropy_loss
from flash_attn.ops.triton.layer_norm import rms_norm_fn

from lit_gpt.kernels import cross_entropy as reference
from lit_gpt.kernels.cross_entropy import IGNORE_INDEX
from lit_gpt.kernels.linear import linear


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return rms_norm_fn(x, weight, None, eps=eps)


def add_rms_norm(
    x: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    y, total = rms_norm_fn(delta, weight, None, residual=x, eps=eps, prenorm=True)
    return total, y


def split_rope(
    qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, n_query_groups: int, head_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    B, T, _ = qkv.shape
    groups = qkv.view(B, T, n_query_groups, -1, head_size)
    q, k, v = (x.reshape(B, T, -1, head_size) for x in groups.split((groups.size(3) - 2, 1, 1), dim=3))
    return apply_rotary_emb(q, cos, sin), apply_rotary_emb(k, cos, sin), v


def swiglu_mlp(x: torch.Tensor, w_gate: torch.Tensor, w_up: torch.Tensor, w_down: torch.Tensor) -> torch.Tensor:
    return linear(swiglu(linear(x, w_gate), linear(x, w_up)), w_down)


def linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, reduction: str = "sum", z_loss: float = 0.0
) -> torch.Tensor:
    def row_losses(logits: torch.Tensor, targets: torch.Tensor, z_loss: float) -> torch.Tensor:
        loss, _ = cross_entropy_loss(logits, targets, lse_square_scale=z_loss, ignore_index=IGNORE_INDEX)
        return loss

    return reference.linear_cross_entropy(hidden, weight, targets, reduction, z_loss, row_losses)
