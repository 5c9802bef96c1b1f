"""What turns gradients into a better model: parameter groups, the learning rate, the optimizer."""

import math
from typing import Literal

import torch
from torch.nn.utils import get_total_norm


def param_groups(model: torch.nn.Module, weight_decay: float) -> list[dict]:
    """Decay matrices and embeddings, not the vectors (norms, biases)."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


def lr_at(
    step: int,
    *,
    max_steps: int,
    warmup_steps: int,
    learning_rate: float,
    min_lr: float,
    schedule: Literal["cosine", "wsd"] = "cosine",
    decay_steps: int = 0,
) -> float:
    """Learning rate of optimizer step `step`, counted from 0: a pure function, so a resume continues it exactly.

    Rises linearly to learning_rate over the first warmup_steps (the first step is above 0), and is exactly min_lr at
    the last step, max_steps - 1, and after it. Between: half a cosine (Loshchilov and Hutter 2017, arXiv:1608.03983)
    or warmup-stable-decay (Hu et al. 2024, arXiv:2404.06395): constant, then linear over the last decay_steps.
    """
    if step < warmup_steps:
        return learning_rate * (step + 1) / warmup_steps
    last = max_steps - 1
    start = last - decay_steps if schedule == "wsd" else warmup_steps
    if step >= last:
        return min_lr
    progress = max(0.0, (step - start) / (last - start))
    height = 1 - progress if schedule == "wsd" else 0.5 * (1 + math.cos(math.pi * progress))
    return min_lr + height * (learning_rate - min_lr)


def clip_and_step(optimizer: torch.optim.Optimizer, max_norm: float) -> torch.Tensor:
    """Step with the whole gradient scaled down to norm max_norm where it is longer; the norm before that, a scalar.

    The scaling happens inside the fused kernel of AdamW(fused=True), so clipping costs one pass that reads the
    gradients, and nothing waits for the device. A gradient that is not finite changes neither parameters nor moments:
    the caller sees it from the norm, when it likes.
    """
    norm = get_total_norm([p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None])
    if hasattr(norm, "full_tensor"):  # of sharded gradients
        norm = norm.full_tensor()
    # What torch.amp.GradScaler hands to fused optimizers: gradients are divided by grad_scale, unless found_inf is 1.
    optimizer.grad_scale = (norm / max_norm).clamp(min=1.0).float()
    optimizer.found_inf = (~norm.isfinite()).float()
    optimizer.step()
    return norm
