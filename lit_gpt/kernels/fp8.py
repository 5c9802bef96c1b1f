"""Training a block's matrix products in fp8 (Micikevicius et al. 2022, arXiv:2209.05433), at twice bf16's rate.

An operand is a matrix in fp8 and one fp32 scale: x ≈ scale · fp8(x / scale). Hopper's tensor cores take fp8 only where
both operands are contiguous along the dimension that is summed over, and a linear layer sums over inputs, outputs and
tokens:

    y = x wᵀ     dx = dy w     dw = dyᵀ x

so x, w and dy are needed in rows and in columns. What produces them writes both in one pass: gradients and activations
the kernels that compute them anyway (norm, SwiGLU, rotary embedding), weights one kernel once an optimizer step.

- Weights, activations and gradients are e4m3, but the gradients of queries, keys and values e5m2: in one matrix, the
  first two are 1e-3 to 1e-5 of the third until attention has formed, e4m3 would flush them to zero, and it never would.
- Products accumulate in fp32. The tensor cores' own accumulator would make a step 1% faster, and drops bits: it shrinks
  the gradient of a weight, a sum over thousands of tokens, by several percent.
- Residual stream, norms, attention, embedding, head and loss stay in bf16 or fp32, and so do parameters and their
  gradients: a checkpoint is the same.
- A scale comes from earlier passes, so that nothing is read twice: the largest element seen, decaying, with room for it
  to grow. The first pass, which has seen nothing, computes what it quantises twice.
- What leaves the range saturates and is counted; a block where that happens often goes on in bf16.

N tokens, C inputs, O outputs, I width of the MLP, H query heads, G key/value heads, D head size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from lit_gpt.kernels import fused

LARGEST = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}
# The largest element may grow this much from one pass to the next. It does, in gradients, at the beginning of a run;
# room costs only the smallest numbers, of which e5m2 has plenty.
HEADROOM = {torch.float8_e4m3fn: 4.0, torch.float8_e5m2: 64.0}
# Of the largest element seen, a pass. A first step's gradients are hundreds of times the next ones', which lie below
# the range of e4m3 until those are forgotten: in 9 passes; with 0.95 in 125. Saturation costs little, flushing all.
DECAY = 0.5
# What a block quantises in each pass; gradients begin with d_.
SITES = ("qkv_in", "d_qkv", "proj_in", "d_proj", "mlp_in", "d_gate_up", "h", "d_mlp")
# A block goes back to bf16 if one of its tensors saturated in more than this share of so many passes.
TOLERATED, WATCHED = 0.1, 100


# --- scales ----------------------------------------------------------------------------------------------------------


class Fp8:
    """The scales of a model's blocks. Gives each block its own part of them as `block.fp8`.

    Args:
        blocks: of one model, on their device.
        grad_dtype: of the gradients of activations other than d_qkv.

    Raises:
        ValueError: this device or model cannot.
    """

    def __init__(self, blocks: Sequence[torch.nn.Module], grad_dtype: torch.dtype = torch.float8_e4m3fn) -> None:
        if problem := unusable(blocks[0]):
            raise ValueError(f"fp8 {problem}; --precision bf16 works everywhere")
        self.blocks = blocks
        dtypes = {site: grad_dtype if site.startswith("d_") else torch.float8_e4m3fn for site in SITES}
        dtypes = [*(dtypes | {"d_qkv": torch.float8_e5m2}).values()] * len(blocks)
        device = next(blocks[0].parameters()).device
        self.largest = torch.tensor([LARGEST[dtype] for dtype in dtypes], device=device)
        self.target = torch.tensor([LARGEST[dtype] / HEADROOM[dtype] for dtype in dtypes], device=device)
        self.amax = torch.zeros_like(self.largest)  # in the pass that is under way
        self.seen = torch.zeros_like(self.largest)  # in those before
        self.scale = spaced(torch.ones_like(self.largest))
        self.saturated = torch.zeros_like(self.largest)  # passes, since they were last counted
        self.nonfinite = torch.zeros_like(self.largest)
        self.first_pass, self.pending = True, False
        self.watched, self.watched_saturated = 0, [0.0] * len(dtypes)
        for i, block in enumerate(blocks):
            block.fp8 = BlockFp8(*(Site(self, j, dtypes[j]) for j in range(i * len(SITES), (i + 1) * len(SITES))))

    def matrices(self) -> list[tuple[torch.nn.Parameter, ...]]:
        """The weights that are quantised; those of one tuple are one operand."""
        groups = []
        for block in self.blocks:
            if block.fp8 is not None:
                attn, mlp = block.attn, block.mlp
                groups += [
                    (attn.attn.weight,),
                    (attn.proj.weight,),
                    (mlp.fc_1.weight, mlp.fc_2.weight),
                    (mlp.proj.weight,),
                ]
        return groups

    @torch.no_grad()
    def quantise_weights(self) -> None:
        """Quantise all weights, which have changed."""
        groups = self.matrices()
        if not groups:  # all blocks went on in bf16
            return
        largest = iter(torch._foreach_norm([source(w) for group in groups for w in group], float("inf")))
        largest = torch.stack([torch.stack([next(largest) for _ in group]).max() for group in groups])
        for group, scale in zip(groups, spaced(scale_for(largest.float(), LARGEST[WEIGHT])), strict=True):
            old = getattr(group[0], "in_fp8", None)
            group[0].in_fp8 = quantise_weight(group, scale[:1], old)
            if old is None:
                group[0].in_fp8.check()

    def begin(self) -> None:
        """Call it before each forward that is trained on."""
        self._learn()
        self.pending = True

    @torch.no_grad()
    def _learn(self) -> None:
        """New scales from what the last pass saw, on all ranks the same."""
        if not self.pending:
            return
        self.pending = self.first_pass = False
        if dist.is_initialized():
            dist.all_reduce(self.amax, dist.ReduceOp.MAX)
        finite = self.amax.isfinite()
        self.nonfinite += ~finite
        self.saturated += finite & (self.amax > self.scale[:, 0] * self.largest)
        self.watched += 1
        self.seen = torch.maximum(self.amax.where(finite, 0.0), DECAY * self.seen)
        self.scale = spaced(scale_for(self.seen, self.target))  # a new tensor: a backward under way has its own
        self.amax.zero_()

    def check(self) -> tuple[int, int, list[str]]:
        """Since the last call: how often a tensor saturated and how often one was not finite, and a line for each block
        that goes on in bf16. Waits for the device; call it on all ranks."""
        saturated, nonfinite = torch.stack((self.saturated, self.nonfinite)).tolist()
        self.saturated.zero_()
        self.nonfinite.zero_()
        self.watched_saturated = [a + b for a, b in zip(self.watched_saturated, saturated, strict=True)]
        lines = []
        if self.watched >= WATCHED:
            for i, block in enumerate(self.blocks):
                counts = dict(zip(SITES, self.watched_saturated[i * len(SITES) :], strict=False))
                worst = max(counts, key=counts.get)
                if block.fp8 is not None and counts[worst] > TOLERATED * self.watched:
                    self.leave(i)
                    lines.append(
                        f"block {i}: {worst} left the range of fp8 in {counts[worst]:.0f} of {self.watched} passes; "
                        f"from here on the block computes in bf16"
                    )
            self.watched, self.watched_saturated = 0, [0.0] * len(saturated)
        return int(sum(saturated)), int(sum(nonfinite)), lines

    def leave(self, i: int) -> None:
        """Let block i compute in bf16."""
        for weight in self.blocks[i].parameters():
            if hasattr(weight, "in_fp8"):
                del weight.in_fp8
        self.blocks[i].fp8 = None

    def state_dict(self) -> dict:
        """As JSON. Call it on all ranks."""
        self._learn()
        return {"seen": self.seen.tolist(), "bf16_blocks": [i for i, b in enumerate(self.blocks) if b.fp8 is None]}

    def load_state_dict(self, state: dict) -> None:
        self.seen.copy_(torch.tensor(state["seen"]))
        self.scale = spaced(scale_for(self.seen, self.target))
        self.first_pass = False
        for i in state["bf16_blocks"]:
            self.leave(i)


def unusable(block: torch.nn.Module) -> str:
    """Why this block cannot compute in fp8; "" if it can."""
    if block.parallel_residual:
        return "is for Llama's family of models (RMSNorm, SwiGLU, no biases)"
    weights = {name: p for name, p in block.named_parameters() if p.dim() == 2}
    for name, weight in weights.items():
        if weight.size(0) % 16 or weight.size(1) % 16:
            return f"needs sizes that are multiples of 16, and {name} is {tuple(weight.shape)}"
    device = weight.device
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        return f"needs compute capability 8.9 (RTX 40, L40S, H100 or newer), which {torch.cuda.get_device_name()} lacks"
    if device.type != "cuda" and not triton.knobs.runtime.interpret:
        return "needs a CUDA GPU"
    return ""


def scale_for(largest_element: torch.Tensor, target: torch.Tensor | float) -> torch.Tensor:
    """What makes `target` of the largest element, 1 where all are 0."""
    return torch.where(largest_element > 0, largest_element / target, 1.0)


def spaced(scales: torch.Tensor) -> torch.Tensor:
    """(n,) -> (n, 4): cuBLAS wants each scale at a multiple of 16 bytes."""
    return scales[:, None].repeat(1, 4)


@dataclass
class Site:
    """A tensor that is quantised in every pass."""

    state: Fp8
    index: int
    dtype: torch.dtype

    @property
    def scale(self) -> torch.Tensor:
        return self.state.scale[self.index, :1]

    @property
    def amax(self) -> torch.Tensor:
        return self.state.amax[self.index : self.index + 1]

    def launch(self, kernel: Callable[[], None], out: "Operand | None" = None) -> None:
        """Run a kernel that quantises this tensor with its scale, to `out` if that has both layouts. The first time
        twice, to find the scale, and then checked."""
        kernel()
        if self.state.first_pass:
            amax = self.amax.where(self.amax.isfinite(), 0.0)
            self.scale.copy_(scale_for(amax, LARGEST[self.dtype] / HEADROOM[self.dtype]))
            kernel()
            if out is not None:
                out.check()


# --- operands and products -------------------------------------------------------------------------------------------

WEIGHT = torch.float8_e4m3fn


class Operand(NamedTuple):
    """A matrix (N, C) in fp8: `rows` (N, C) and `columns` (C, N), each contiguous, times `scale` (1,)."""

    rows: torch.Tensor
    columns: torch.Tensor
    scale: torch.Tensor

    def check(self) -> None:
        """Raises RuntimeError if the layouts differ: compilers are young where fp8 is concerned (see _rounded)."""
        if not torch.equal(self.rows.view(torch.uint8).T, self.columns.view(torch.uint8)):
            raise RuntimeError(
                f"the fp8 kernels are miscompiled by triton {triton.__version__} for this GPU: try another version, or "
                f"--precision bf16"
            )


def source(weight: torch.Tensor) -> torch.Tensor:
    """What a weight is quantised from: the parameter, or where its values are elsewhere, the copy of them."""
    copy = getattr(weight, "compute", None)
    return weight.detach() if copy is None else copy


def quantise_weight(group: Sequence[torch.Tensor], scale: torch.Tensor, out: Operand | None = None) -> Operand:
    """Weights (O, C), one below the other."""
    if out is None:
        shape = sum(w.size(0) for w in group), group[0].size(1)
        out = Operand(*(torch.empty(s, dtype=WEIGHT, device=scale.device) for s in (shape, shape[::-1])), scale)
    unused = torch.empty_like(scale)
    begin = 0
    for weight in group:
        part = slice(begin, begin := begin + weight.size(0))
        launch_quantise(source(weight), out.rows[part], out.columns[:, part], scale, unused)
    return out._replace(scale=scale)


@torch.no_grad()
def operand(*group: torch.nn.Parameter) -> Operand:
    """Weights in fp8: made once an optimizer step, or, with FSDP, whose weights come and go, here."""
    if hasattr(group[0], "in_fp8"):
        return group[0].in_fp8
    largest = torch.stack(torch._foreach_norm([source(w) for w in group], float("inf"))).max()
    return quantise_weight(group, scale_for(largest.float(), LARGEST[WEIGHT]).view(1))


def product(
    a: torch.Tensor, a_scale: torch.Tensor, b: torch.Tensor, b_scale: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """a @ bᵀ of a (M, K) and b (N, K), in dtype."""
    if a.is_cuda:
        return torch._scaled_mm(a, b.T, a_scale, b_scale, out_dtype=dtype, use_fast_accum=False)
    return (a.float() @ b.float().T * (a_scale * b_scale)).to(dtype)


def weight_grads(
    dy_columns: torch.Tensor,
    dy_scale: torch.Tensor,
    x_columns: torch.Tensor,
    x_scale: torch.Tensor,
    *weights: torch.Tensor,
) -> Sequence[torch.Tensor | None]:
    """As linear.weight_grads."""
    rows = [w.size(0) for w in weights]
    in_place = hasattr(weights[0], "compute")
    dtype = torch.float32 if in_place else weights[0].dtype
    parts = product(dy_columns, dy_scale, x_columns, x_scale, dtype).split(rows)
    if not in_place:
        return parts
    if weights[0].grad is None:
        for weight, part in zip(weights, parts, strict=True):
            weight.grad = part
    else:
        torch._foreach_add_([w.grad for w in weights], parts)
    return [None] * len(weights)


# --- a block ---------------------------------------------------------------------------------------------------------


@dataclass
class BlockFp8:
    """The three parts of a block beside attention. Residual stream and its change go in as (x, delta), as in Block."""

    qkv_in: Site
    d_qkv: Site
    proj_in: Site
    d_proj: Site
    mlp_in: Site
    d_gate_up: Site
    h: Site
    d_mlp: Site

    def norm_qkv(
        self,
        x: torch.Tensor,
        delta: torch.Tensor | None,
        norm: torch.nn.Module,
        weight: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        n_query_groups: int,
        head_size: int,
    ) -> tuple[torch.Tensor, ...]:
        """x + delta (B, T, C), and of its norm the projection's rotated q (B, T, H, D), k (B, T, G, D), and v."""
        total, *qkv = _NormQKV.apply(self, x, delta, norm.weight, weight, cos, sin, norm.eps, n_query_groups, head_size)
        return x if total is None else total, *qkv

    def linear(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """x @ weightᵀ."""
        return _Linear.apply(self, x, weight)

    def norm_mlp(
        self,
        x: torch.Tensor,
        delta: torch.Tensor,
        norm: torch.nn.Module,
        w_gate: torch.Tensor,
        w_up: torch.Tensor,
        w_down: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x + delta, and of its norm swiglu_mlp."""
        return _NormMLP.apply(self, x, delta, norm.weight, w_gate, w_up, w_down, norm.eps)


class _NormQKV(torch.autograd.Function):
    @staticmethod
    def forward(ctx, fp8, x, delta, norm_weight, w, cos, sin, eps, G, D):
        total, y = norm(x, delta, norm_weight, eps, fp8.qkv_in)
        weight = operand(w)
        B, T, _ = x.shape
        qkv = product(y.rows, y.scale, weight.rows, weight.scale, x.dtype).view(B, T, -1)
        heads = (w.size(0) // D - 2 * G, G, G)
        q, k, v = (torch.empty(B, T, n, D, dtype=x.dtype, device=x.device) for n in heads)
        fused._launch_split_rope(qkv, q, k, v, cos, sin, backward=False)
        ctx.save_for_backward(total, norm_weight, y.columns, cos, sin)
        ctx.fp8, ctx.w, ctx.eps, ctx.scale, ctx.add = fp8, w, eps, y.scale, delta is not None
        ctx.set_materialize_grads(False)
        return total if ctx.add else None, q, k, v

    @staticmethod
    @once_differentiable
    def backward(ctx, d_total, dq, dk, dv):
        total, norm_weight, y_columns, cos, sin = ctx.saved_tensors
        d = rope_backward(dq, dk, dv, cos, sin, ctx.fp8.d_qkv)
        weight = operand(ctx.w)
        dy = product(d.rows, d.scale, weight.columns, weight.scale, total.dtype)
        (dw,) = weight_grads(d.columns, d.scale, y_columns, ctx.scale, ctx.w)
        dx, d_norm = fused.norm_backward(total, norm_weight, dy, d_total, ctx.eps)
        return None, dx, dx if ctx.add else None, d_norm, dw, None, None, None, None, None


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, fp8, x, w):
        x8, weight = quantise(x, fp8.proj_in), operand(w)
        ctx.save_for_backward(x8.columns)
        ctx.fp8, ctx.w, ctx.scale = fp8, w, x8.scale
        return product(x8.rows, x8.scale, weight.rows, weight.scale, x.dtype).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (x_columns,) = ctx.saved_tensors
        d, weight = quantise(dy, ctx.fp8.d_proj), operand(ctx.w)
        dx = product(d.rows, d.scale, weight.columns, weight.scale, dy.dtype).view(*dy.shape[:-1], -1)
        (dw,) = weight_grads(d.columns, d.scale, x_columns, ctx.scale, ctx.w)
        return None, dx, dw


class _NormMLP(torch.autograd.Function):
    """Of gate, up and SwiGLU's output the third is computed again in the backward, then in columns."""

    @staticmethod
    def forward(ctx, fp8, x, delta, norm_weight, w_gate, w_up, w_down, eps):
        total, y = norm(x, delta, norm_weight, eps, fp8.mlp_in)
        weight = operand(w_gate, w_up)
        gate_up = product(y.rows, y.scale, weight.rows, weight.scale, x.dtype)
        h, h_scale = swiglu(gate_up, fp8.h)
        weight = operand(w_down)
        delta = product(h, h_scale, weight.rows, weight.scale, x.dtype).view(x.shape)
        ctx.save_for_backward(total, norm_weight, y.columns, gate_up)
        ctx.fp8, ctx.weights, ctx.eps, ctx.scales = fp8, (w_gate, w_up, w_down), eps, (y.scale, h_scale)
        return total, delta

    @staticmethod
    @once_differentiable
    def backward(ctx, d_total, dy):
        total, norm_weight, y_columns, gate_up = ctx.saved_tensors
        w_gate, w_up, w_down = ctx.weights
        y_scale, h_scale = ctx.scales
        d, weight = quantise(dy, ctx.fp8.d_mlp), operand(w_down)
        dh = product(d.rows, d.scale, weight.columns, weight.scale, dy.dtype)
        d_gate_up, h_columns = swiglu_backward(gate_up, dh, h_scale, ctx.fp8.d_gate_up)
        (d_down,) = weight_grads(d.columns, d.scale, h_columns, h_scale, w_down)
        del d, dh, h_columns
        d, weight = d_gate_up, operand(w_gate, w_up)
        dy = product(d.rows, d.scale, weight.columns, weight.scale, dy.dtype)
        d_gate, d_up = weight_grads(d.columns, d.scale, y_columns, y_scale, w_gate, w_up)
        del d, d_gate_up
        dx, d_norm = fused.norm_backward(total, norm_weight, dy, d_total, ctx.eps)
        return None, dx, dx, d_norm, d_gate, d_up, d_down, None


# --- what quantises --------------------------------------------------------------------------------------------------


def empty_operand(N: int, C: int, site: Site) -> Operand:
    if N % 16:
        raise ValueError(f"fp8 needs a multiple of 16 tokens in a micro-batch, not {N}")
    device = site.state.scale.device
    return Operand(*(torch.empty(s, dtype=site.dtype, device=device) for s in ((N, C), (C, N))), site.scale)


def quantise(x: torch.Tensor, site: Site) -> Operand:
    """x (..., C)."""
    x = x.flatten(0, -2).contiguous()
    out = empty_operand(*x.shape, site)
    site.launch(lambda: launch_quantise(x, out.rows, out.columns, out.scale, site.amax), out)
    return out


def launch_quantise(x, rows, columns, scale, amax) -> None:
    N, C = x.shape
    block_n, block_c = 64, 128
    _quantise[(triton.cdiv(C, block_c), triton.cdiv(N, block_n))](
        x,
        rows,
        columns,
        scale,
        amax.view(torch.int32),
        N,
        C,
        columns.stride(0),
        E5M2=rows.dtype == torch.float8_e5m2,
        BLOCK_N=block_n,
        BLOCK_C=block_c,
    )


def norm(
    x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float, site: Site
) -> tuple[torch.Tensor, Operand]:
    """x + delta (..., C), and its RMSNorm. A program has one row, so columns take a pass of their own, over bytes."""
    x = x.contiguous()
    C = x.size(-1)
    total = x if delta is None else torch.empty_like(x)
    out = empty_operand(x.numel() // C, C, site)
    block = triton.next_power_of_2(C)
    site.launch(
        lambda: _add_rms_norm[(len(out.rows),)](
            x,
            x if delta is None else delta.contiguous(),
            weight,
            total,
            out.rows,
            out.scale,
            site.amax.view(torch.int32),
            C,
            eps,
            ADD=delta is not None,
            BLOCK=block,
            num_warps=fused._warps(block),
        )
    )
    launch_quantise(out.rows, out.rows, out.columns, out.scale, out.scale)
    return total, out


def swiglu(gate_up: torch.Tensor, site: Site) -> tuple[torch.Tensor, torch.Tensor]:
    """silu(gate) · up of gate and up side by side, (N, 2 I) -> (N, I), in rows alone, and its scale."""
    N, width = len(gate_up), gate_up.size(1) // 2
    h = torch.empty(N, width, dtype=site.dtype, device=gate_up.device)
    scale = site.scale
    block_n, block_c = 8, 512
    site.launch(
        lambda: _swiglu[(triton.cdiv(width, block_c), triton.cdiv(N, block_n))](
            gate_up, h, scale, site.amax.view(torch.int32), N, width, BLOCK_N=block_n, BLOCK_C=block_c
        )
    )
    return h, scale


def swiglu_backward(
    gate_up: torch.Tensor, dh: torch.Tensor, h_scale: torch.Tensor, site: Site
) -> tuple[Operand, torch.Tensor]:
    """The gradient of gate_up (N, 2 I), given that of SwiGLU's output (N, I); and that output again, in columns."""
    N, width = dh.shape
    out = empty_operand(N, 2 * width, site)
    h_columns = torch.empty(width, N, dtype=torch.float8_e4m3fn, device=dh.device)
    block_n, block_c = 64, 64
    site.launch(
        lambda: _swiglu_backward[(triton.cdiv(width, block_c), triton.cdiv(N, block_n))](
            gate_up,
            dh,
            out.rows,
            out.columns,
            h_columns,
            out.scale,
            site.amax.view(torch.int32),
            h_scale,
            N,
            width,
            E5M2=site.dtype == torch.float8_e5m2,
            BLOCK_N=block_n,
            BLOCK_C=block_c,
            num_warps=8,
        ),
        out,
    )
    return out, h_columns


def rope_backward(
    dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, site: Site
) -> Operand:
    """The gradient of the fused projection (N, (H + 2 G) D), given those of q, k and v: split_rope's backward."""
    dq, dk, dv, cos, sin = (t.contiguous() for t in (dq, dk, dv, cos, sin))
    B, T, H, D = dq.shape
    G = dk.size(2)
    out = empty_operand(B * T, (H + 2 * G) * D, site)
    block_n = 32
    site.launch(
        lambda: _rope_backward[(triton.cdiv(B * T, block_n), G)](
            dq,
            dk,
            dv,
            cos,
            sin,
            out.rows,
            out.columns,
            out.scale,
            site.amax.view(torch.int32),
            B * T,
            cos.numel() // cos.size(-1),  # rows of the tables: T, or B T
            G,
            D,
            QUERIES=H // G,
            HALF=cos.size(-1),
            E5M2=site.dtype == torch.float8_e5m2,
            BLOCK_N=block_n,
            BLOCK_D=triton.next_power_of_2(D),
        ),
        out,
    )
    return out


# --- kernels ---------------------------------------------------------------------------------------------------------


@triton.jit
def _to_fp8(x, inverse_scale, E5M2: tl.constexpr):
    """x / scale, saturated; what is not a number stays so."""
    dtype: tl.constexpr = tl.float8e5 if E5M2 else tl.float8e4nv
    largest: tl.constexpr = 57344.0 if E5M2 else 448.0
    return tl.clamp(x * inverse_scale, -largest, largest, propagate_nan=tl.PropagateNan.ALL).to(dtype)


@triton.jit
def _rounded(x):
    """x in bf16's precision. What a tile's transposition moves through shared memory is then bf16, and the conversion
    to fp8 follows on either side. With fp8 itself moved, ptxas (as of triton 3.6) loses bytes of the conversion."""
    return x.to(tl.bfloat16).to(tl.float32)


@triton.jit
def _record(amax, x):
    """Raise amax to max |x|, as bits: integers in the order of the floats; above them infinity and, above that, what is
    not a number. Reads amax first, since atomics on one address wait for each other."""
    bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    top = tl.max(bits.reshape(bits.numel), 0)
    if top > tl.load(amax):
        tl.atomic_max(amax, top, sem="relaxed")


@triton.jit
def _quantise(
    x, rows, columns, scale, amax, N, C, stride, E5M2: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr
):
    """x (N, C) to rows (N, C) and columns (C, N), whose rows are a stride apart. x already in fp8 goes to columns."""
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (n < N)[:, None] & (c < C)[None, :]
    at = n.to(tl.int64)[:, None] * C + c[None, :]
    a = tl.load(x + at, inside, other=0.0)
    if x.dtype.element_ty.primitive_bitwidth > 8:
        a = _rounded(a.to(tl.float32))
        _record(amax, a)
        q = _to_fp8(a, 1 / tl.load(scale), E5M2)
        tl.store(rows + at, q, inside)
    else:
        q = a
    tl.store(columns + c.to(tl.int64)[:, None] * stride + n[None, :], tl.trans(q), tl.trans(inside))


@triton.jit
def _add_rms_norm(x, delta, weight, total, rows, scale, amax, C, eps, ADD: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * C
    c = tl.arange(0, BLOCK)
    inside = c < C
    a = tl.load(x + row + c, inside, other=0.0).to(tl.float32)
    if ADD:
        a += tl.load(delta + row + c, inside, other=0.0).to(tl.float32)
        rounded = a.to(total.dtype.element_ty)
        tl.store(total + row + c, rounded, inside)
        a = rounded.to(tl.float32)  # the norm is of what the next layers see
    r = tl.rsqrt(tl.sum(a * a, 0) / C + eps)
    y = a * r * tl.load(weight + c, inside, other=0.0).to(tl.float32)
    tl.store(rows + row + c, _to_fp8(y, 1 / tl.load(scale), False), inside)
    _record(amax, y)


@triton.jit
def _swiglu(gate_up, h, scale, amax, N, width, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (n < N)[:, None] & (c < width)[None, :]
    row = n.to(tl.int64)[:, None] * width
    gate = tl.load(gate_up + 2 * row + c[None, :], inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + 2 * row + width + c[None, :], inside, other=0.0).to(tl.float32)
    y = _rounded(gate * tl.sigmoid(gate) * up)  # as in the backward
    tl.store(h + row + c[None, :], _to_fp8(y, 1 / tl.load(scale), False), inside)
    _record(amax, y)


@triton.jit
def _swiglu_backward(
    gate_up, dh, rows, columns, h_columns, scale, amax, h_scale, N, width,
    E5M2: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (n < N)[:, None] & (c < width)[None, :]
    row = n.to(tl.int64)[:, None] * width
    left = 2 * row + c[None, :]
    column = c.to(tl.int64)[:, None] * N + n[None, :]
    gate = tl.load(gate_up + left, inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + left + width, inside, other=0.0).to(tl.float32)
    g = tl.load(dh + row + c[None, :], inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    h = _to_fp8(_rounded(silu * up), 1 / tl.load(h_scale), False)
    tl.store(h_columns + column, tl.trans(h), tl.trans(inside))
    inverse = 1 / tl.load(scale)
    d_up = _rounded(g * silu)
    d_gate = _rounded(g * up * (sigmoid + silu * (1 - sigmoid)))
    _record(amax, tl.maximum(tl.abs(d_gate), tl.abs(d_up), propagate_nan=tl.PropagateNan.ALL))
    q = _to_fp8(d_gate, inverse, E5M2)
    tl.store(rows + left, q, inside)
    tl.store(columns + column, tl.trans(q), tl.trans(inside))
    q = _to_fp8(d_up, inverse, E5M2)
    tl.store(rows + left + width, q, inside)
    tl.store(columns + width.to(tl.int64) * N + column, tl.trans(q), tl.trans(inside))


@triton.jit
def _rope_backward(
    dq, dk, dv, cos, sin, rows, columns, scale, amax, N, table_rows, G, D,
    QUERIES: tl.constexpr, HALF: tl.constexpr, E5M2: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """As fused._split_rope backwards: a tile of tokens of one group, head by head, its value last."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    group = tl.program_id(1)
    d = tl.arange(0, BLOCK_D)
    inside = (n < N)[:, None] & (d < D)[None, :]
    rotates = inside & (d < 2 * HALF)[None, :]
    table = (n % table_rows)[:, None] * HALF + (d % HALF)[None, :]
    co = tl.load(cos + table, rotates, other=1.0)
    si = tl.load(sin + table, rotates, other=0.0)
    si = tl.where((d < HALF)[None, :], si, -si)
    partner = tl.where(d < HALF, d + HALF, d - HALF)[None, :]
    inverse = 1 / tl.load(scale)
    row = n.to(tl.int64)[:, None]
    top = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for j in range(QUERIES + 2):
        if j < QUERIES:
            head = dq + (row * (G * QUERIES) + group * QUERIES + j) * D
        elif j == QUERIES:
            head = dk + (row * G + group) * D
        else:
            head = dv + (row * G + group) * D
        a = tl.load(head + d[None, :], inside, other=0.0).to(tl.float32)
        if j <= QUERIES:
            a = a * co + tl.load(head + partner, rotates, other=0.0).to(tl.float32) * si
        a = _rounded(a)
        top = tl.maximum(top, tl.abs(a), propagate_nan=tl.PropagateNan.ALL)
        q = _to_fp8(a, inverse, E5M2)
        feature = (group * (QUERIES + 2) + j) * D + d
        tl.store(rows + row * (G * (QUERIES + 2) * D) + feature[None, :], q, inside)
        tl.store(columns + feature.to(tl.int64)[:, None] * N + n[None, :], tl.trans(q), tl.trans(inside))
    _record(amax, top)
