"""Matrix products over fp32 weights in a lower precision, without a cast per micro-batch.

Under autocast every micro-batch casts every weight, and adds its gradient in a pass of its own. Here the fp32
parameters stay what is trained, saved and sharded, and `ComputeWeights` keeps one bf16 copy of them, made again only
when they change: once an optimizer step. The gradient of a weight with such a copy is added to its fp32 .grad by the
very GEMM that computes it.

N tokens, C inputs, O outputs.
"""

import weakref
from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.optim.optimizer import register_optimizer_step_post_hook


class ComputeWeights:
    """A low-precision copy of every matrix of `model`, reachable as `parameter.compute`.

    All copies lie in one buffer, in the order of the parameters: weights that are declared one after the other, as the
    two that feed SwiGLU, can be read as one matrix by one GEMM.
    """

    def __init__(
        self, model: torch.nn.Module, dtype: torch.dtype, without: Collection[torch.nn.Parameter] = ()
    ) -> None:
        """Matrices in `without` get no copy, since they are computed with in fp8, and are cast where they are not."""
        self.matrices = [p for p in model.parameters() if p.dim() == 2]
        without = set(without)
        self.parameters = [p for p in self.matrices if p not in without]
        buffer = torch.empty(sum(p.numel() for p in self.parameters), dtype=dtype, device=self.matrices[0].device)
        copies = buffer.split([p.numel() for p in self.parameters])
        self.copies = [copy.view(p.shape) for copy, p in zip(copies, self.parameters, strict=True)]
        self.versions: list[int] = []  # of the parameters when they were copied
        for p in without:
            p.compute = None
        for p, copy in zip(self.parameters, self.copies, strict=True):
            p.compute = copy
        # Fused optimizers write to parameters without raising their version.
        this = weakref.ref(self)
        register_optimizer_step_post_hook(lambda *_: this() and this().versions.clear())

    @torch.no_grad()
    def refresh(self) -> bool:
        """Copy the parameters again if an optimizer stepped or anything else wrote to them since the last time; whether
        that was so."""
        versions = [p._version for p in self.matrices]
        if versions == self.versions:
            return False
        torch._foreach_copy_(self.copies, self.parameters)
        self.versions = versions
        return True


def compute(weight: torch.Tensor) -> torch.Tensor:
    """The weight as bf16 GEMMs read it: its copy where there is one; of a weight in fp8, a cast."""
    copy = getattr(weight, "compute", weight)
    return weight.detach().bfloat16() if copy is None else copy.detach()


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x @ weightᵀ + bias: x (..., C), weight (O, C) -> (..., O)."""
    if hasattr(weight, "compute"):
        y = _Linear.apply(x, weight)
        return y if bias is None else y + bias.to(y.dtype)
    return F.linear(x, weight, bias)


def embedding(idx: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Rows idx (...) of weight (V, C): (..., C)."""
    if hasattr(weight, "compute"):
        return _Embedding.apply(idx, weight)
    return F.embedding(idx, weight)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x)
        ctx.weight = weight  # itself: a saved tensor may come back as another object, without .compute and .grad
        return F.linear(x, compute(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (x,), weight = ctx.saved_tensors, ctx.weight
        dx = dy @ compute(weight) if ctx.needs_input_grad[0] else None
        (dw,) = weight_grads(dy, x, weight)
        return dx, dw


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, idx, weight):
        ctx.save_for_backward(idx)
        ctx.weight = weight
        return F.embedding(idx, compute(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (idx,) = ctx.saved_tensors
        dy = dy if dy.is_cuda else dy.float()  # a GPU sums over equal ids in fp32 anyway; in bf16 300 would be too many
        dw = torch.ops.aten.embedding_dense_backward(dy, idx, ctx.weight.size(0), -1, False)
        return None, dw.float()


def weight_grads(dy: torch.Tensor, x: torch.Tensor, *weights: torch.Tensor) -> list[torch.Tensor | None]:
    """The gradients dyᵀ @ x of weights that, one below the other, made dy (..., O) from x (..., C).

    Those of weights with a copy are added to weight.grad in fp32 here, and None is returned for autograd.
    """
    dy, x = dy.flatten(0, -2), x.flatten(0, -2)
    rows = [w.size(0) for w in weights]
    if not weights[0].requires_grad:
        return [None] * len(weights)
    if not hasattr(weights[0], "compute"):
        return list((dy.T @ x).split(rows))
    if weights[0].grad is None:
        for w, dw in zip(weights, mm_fp32(dy.T, x).split(rows), strict=True):
            w.grad = dw
    else:
        grads = [w.grad for w in weights]
        joined = as_one(*grads)
        for grad, part in [(joined, dy)] if joined is not None else zip(grads, dy.split(rows, -1), strict=True):
            add_mm_fp32_(grad, part.T, x)
    return [None] * len(weights)


def as_one(*tensors: torch.Tensor) -> torch.Tensor | None:
    """Contiguous matrices as one if they follow each other in one storage, else None."""
    first = tensors[0]
    end = first.storage_offset()
    for t in tensors:
        same = t.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not (same and t.is_contiguous() and t.storage_offset() == end):
            return None
        end += t.numel()
    return first.as_strided((sum(t.size(0) for t in tensors), first.size(1)), first.stride())


def mm_fp32(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b in fp32, of low-precision a and b; fp32 inputs are multiplied as they are."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def add_mm_fp32_(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += a @ b in fp32, in one GEMM."""
    if a.is_cuda and a.dtype != torch.float32:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a.float(), b.float())
