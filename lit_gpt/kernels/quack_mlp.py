"""SwiGLU and its backward inside the GEMMs beside it, with quack-kernels' CuTe GEMMs (Hopper).

Unfused, gate and up are written by one GEMM and read again by the activation, and the gradient of its output is written
by another and read again: 4 I elements a token and layer that need not move. Imported only where it is selected.

N tokens, C width, I width of the MLP.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from quack.gemm_config import GemmConfig
from quack.gemm_interface import gemm_dgated_tuned, gemm_gated_tuned, gemm_tuned
from torch.autograd.function import once_differentiable

from lit_gpt.kernels import fused
from lit_gpt.kernels.linear import as_one, compute, weight_grads

# The fastest of those tried on an H100 at 32,768 tokens of the 1.1B model; quack's own search takes minutes.
GATED = GemmConfig(tile_m=128, tile_n=192, pingpong=True, cluster_m=2, is_dynamic_persistent=False)
DGATED = GemmConfig(tile_m=128, tile_n=160, pingpong=True, cluster_m=2, is_dynamic_persistent=False)
PLAIN = GemmConfig(tile_m=128, tile_n=256, pingpong=False, cluster_m=2, is_dynamic_persistent=False)
WEIGHT_GRAD = GemmConfig(tile_m=256, tile_n=192, pingpong=False, cluster_m=2, is_dynamic_persistent=False)


# --- the GEMMs -------------------------------------------------------------------------------------------------------


def gated(x: torch.Tensor, w: torch.Tensor, gate_up: torch.Tensor, h: torch.Tensor) -> None:
    """gate_up (N, 2 I) and h (N, I) of x (N, C) and w (2 I, C)."""
    gemm_gated_tuned.fn(x, w.T, gate_up, h, config=GATED, concat_layout=("B",))


def gated_backward(
    dy: torch.Tensor, w_down: torch.Tensor, gate_up: torch.Tensor, d_gate_up: torch.Tensor, h: torch.Tensor
) -> None:
    """d_gate_up (N, 2 I), and h (N, I) again, of dy (N, C), w_down (C, I) and gate_up."""
    gemm_dgated_tuned.fn(dy, w_down, gate_up, d_gate_up, h, config=DGATED, dynamic_scheduler=True)


def input_grad(d_gate_up: torch.Tensor, w: torch.Tensor, dx: torch.Tensor) -> None:
    gemm_tuned.fn(d_gate_up, w, dx, config=PLAIN, concat_layout=("B",))


def add_weight_grad(d_gate_up: torch.Tensor, x: torch.Tensor, total: torch.Tensor) -> None:
    """Adds to total (2 I, C)."""
    gemm_tuned.fn(d_gate_up.T, x, total, add_to_output=True, config=WEIGHT_GRAD, concat_layout=("out",))


def calls(device: torch.device) -> list[Callable[[], None]]:
    """One call of each as a step makes it, but of few tokens: to see whether they work here, and to compile them."""
    N, C, width = 256, 128, 256

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    return [
        lambda: gated(empty(N, C), empty(2 * width, C), empty(N, 2 * width), empty(N, width)),
        lambda: gated_backward(empty(N, C), empty(C, width), empty(N, 2 * width), empty(N, 2 * width), empty(N, width)),
        lambda: input_grad(empty(N, 2 * width), empty(2 * width, C), empty(N, C)),
        lambda: add_weight_grad(empty(N, 2 * width), empty(N, C), empty(2 * width, C, dtype=torch.float32)),
    ]


# --- the MLP ---------------------------------------------------------------------------------------------------------


def swiglu_mlp(x: torch.Tensor, w_gate: torch.Tensor, w_up: torch.Tensor, w_down: torch.Tensor) -> torch.Tensor:
    if not torch.is_grad_enabled():  # a token or two at a time do not fill these tiles
        return fused.swiglu_mlp(x, w_gate, w_up, w_down)
    return _SwigluMLP.apply(x, w_gate, w_up, w_down)


class _SwigluMLP(torch.autograd.Function):
    """gate_up (N, 2 I) holds gate and up interleaved, element by element, as one thread of the GEMM has them. The
    weights stay one below the other: `concat_layout` names the operands whose rows the kernel is to take in turns."""

    @staticmethod
    def forward(ctx, x, w_gate, w_up, w_down):
        rows, w = x.flatten(0, -2), _stacked(w_gate, w_up)
        gate_up = rows.new_empty(rows.size(0), w.size(0))
        h = rows.new_empty(rows.size(0), w_gate.size(0))
        gated(rows, w, gate_up, h)
        ctx.save_for_backward(x, gate_up)
        ctx.weights = w_gate, w_up, w_down
        return F.linear(h, compute(w_down)).view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, gate_up = ctx.saved_tensors
        w_gate, w_up, w_down = ctx.weights
        dy, rows = dy.flatten(0, -2).contiguous(), x.flatten(0, -2)
        d_gate_up, h = torch.empty_like(gate_up), rows.new_empty(rows.size(0), w_gate.size(0))
        gated_backward(dy, compute(w_down), gate_up, d_gate_up, h)
        (d_down,) = weight_grads(dy, h, w_down)
        dx = torch.empty_like(rows)
        input_grad(d_gate_up, _stacked(w_gate, w_up), dx)
        return dx.view(x.shape), *_gate_up_grads(d_gate_up, rows, w_gate, w_up), d_down


def _gate_up_grads(d_gate_up, x, w_gate, w_up):
    """As linear.weight_grads, for the interleaved gradient."""
    if not w_gate.requires_grad:
        return None, None
    in_place = hasattr(w_gate, "compute")
    total = as_one(w_gate.grad, w_up.grad) if in_place and w_gate.grad is not None else None
    fresh = total is None
    if fresh:
        dtype = torch.float32 if in_place else x.dtype
        total = torch.zeros(2 * w_gate.size(0), x.size(1), dtype=dtype, device=x.device)
    add_weight_grad(d_gate_up, x, total)
    parts = total.split(w_gate.size(0))
    if not in_place:
        return parts
    if fresh:
        for w, part in zip((w_gate, w_up), parts, strict=True):
            w.grad = part if w.grad is None else w.grad.add_(part)
    return None, None


def _stacked(w_gate: torch.Tensor, w_up: torch.Tensor) -> torch.Tensor:
    copies = compute(w_gate), compute(w_up)
    one = as_one(*copies)
    return torch.cat(copies) if one is None else one
