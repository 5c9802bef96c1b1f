"""What turns gradients into a better model: parameter groups, the learning rate, the optimizer, what it leaves out."""

import math
import statistics
from collections import deque
from typing import Literal

import torch
from torch.nn.utils import get_total_norm


def param_groups(model: torch.nn.Module, weight_decay: float) -> list[dict]:
    """Decay matrices and embeddings, not the vectors (norms, biases). `model` is whatever has parameters()."""
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
    progress = max(0.0, (step - start) / max(1, last - start))
    height = 1 - progress if schedule == "wsd" else 0.5 * (1 + math.cos(math.pi * progress))
    return min_lr + height * (learning_rate - min_lr)


def init_adam(optimizer: torch.optim.AdamW) -> None:
    """Make the moments now, zero, as the first step would: for a checkpoint to be read into, and host memory to be
    reserved for them."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            if not optimizer.state[p]:
                count = torch.zeros((), dtype=torch.float32, device=p.device if group["fused"] else "cpu")
                optimizer.state[p] = {
                    "step": count,
                    "exp_avg": torch.zeros_like(p),
                    "exp_avg_sq": torch.zeros_like(p),
                }


def clip_and_step(
    optimizer: torch.optim.Optimizer,
    max_norm: float,
    loss: torch.Tensor | None = None,
    limits: tuple[float, float] = (math.inf, math.inf),
) -> torch.Tensor:
    """Step with the whole gradient scaled down to norm max_norm where it is longer; the norm before that, a scalar.

    The scaling happens inside the fused kernel of AdamW(fused=True), so clipping costs one pass that reads the
    gradients, and nothing waits for the device. A step whose loss or gradient norm is not finite, or above `limits`,
    changes neither parameters nor moments; optimizer.found_inf, a scalar on the device, is 1 then.

    Args:
        loss: of the step, the same on all ranks.
        limits: of loss and norm.
    """
    norm = get_total_norm([p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None])
    if hasattr(norm, "full_tensor"):  # of sharded gradients
        norm = norm.full_tensor()
    good = norm.isfinite() & (norm <= limits[1])
    if loss is not None:
        good &= loss.isfinite() & (loss <= limits[0])
    # What torch.amp.GradScaler hands to fused optimizers: gradients are divided by grad_scale, unless found_inf is 1.
    optimizer.grad_scale = (norm / max_norm).clamp(min=1.0).float()
    optimizer.found_inf = (~good).float()
    optimizer.step()
    return norm


class SpikeGuard:
    """Tells a spike: a loss or gradient norm more than 6 standard deviations above the mean of the last 128 steps that
    were taken (the rule of OLMo 2's training code, arXiv:2501.00656). Before 64 steps there is no limit."""

    SIGMAS, WINDOW = 6.0, 128

    def __init__(self, history: list[list[float]] | None = None) -> None:
        self.history = deque(history or [], maxlen=self.WINDOW)
        """[loss, gradient norm] of each step; goes into checkpoints."""

    def limits(self) -> tuple[float, float]:
        """Largest loss and norm that are none."""
        if len(self.history) < self.WINDOW // 2:
            return math.inf, math.inf
        return tuple(statistics.fmean(x) + self.SIGMAS * statistics.pstdev(x) for x in zip(*self.history, strict=True))

    def add(self, loss: float, norm: float) -> None:
        self.history.append([loss, norm])
