"""The elementwise operations of a step in Triton, each with its backward: one pass over the bytes it cannot avoid.

Imported only where these are selected, since it needs triton. Signatures and meaning are those of the references in
rmsnorm.py, rope.py, swiglu.py and cross_entropy.py; arithmetic is fp32, storage the inputs' dtype. What the backward
can recompute from what it reads anyway is not stored: the norms' 1/rms, SwiGLU's output, the logits.

N rows (tokens), C width, I width of the MLP, V rows of the head, H query heads, G key/value heads, D head size.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from lit_gpt.kernels import cross_entropy as reference
from lit_gpt.kernels.cross_entropy import IGNORE_INDEX
from lit_gpt.kernels.linear import add_mm_fp32_, as_one, compute, mm_fp32, weight_grads

# --- RMSNorm, with the residual addition before it -------------------------------------------------------------------


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return _AddRMSNorm.apply(x, None, weight, eps)[1]


def add_rms_norm(
    x: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return _AddRMSNorm.apply(x, delta, weight, eps)


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, delta, weight, eps):
        x = x.contiguous()
        total = x if delta is None else torch.empty_like(x)
        y = torch.empty_like(x)
        C = x.size(-1)
        block = triton.next_power_of_2(C)
        _add_rms_norm_forward[(x.numel() // C,)](
            x,
            x if delta is None else delta.contiguous(),
            weight,
            total,
            y,
            C,
            eps,
            ADD=delta is not None,
            BLOCK=block,
            num_warps=_warps(block),
        )
        ctx.save_for_backward(total, weight)
        ctx.eps, ctx.add = eps, delta is not None
        ctx.set_materialize_grads(False)
        return None if delta is None else total, y

    @staticmethod
    @once_differentiable
    def backward(ctx, d_total, dy):
        total, weight = ctx.saved_tensors
        if dy is None:  # the sum alone was used
            return d_total, d_total, None, None
        dx, d_weight = norm_backward(total, weight, dy, d_total, ctx.eps)
        return dx, dx if ctx.add else None, d_weight, None


def norm_backward(
    total: torch.Tensor, weight: torch.Tensor, dy: torch.Tensor, d_total: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of total (..., C) and of weight, given those of the norm's output and, if any, of total itself."""
    C = total.size(-1)
    n_rows = total.numel() // C
    block = triton.next_power_of_2(C)
    # Each program walks over many rows and sums their gradient of the weight in registers.
    programs = min(n_rows, 4 * _multiprocessors(total.device))
    dx = torch.empty_like(total)
    parts = torch.empty(programs, C, dtype=torch.float32, device=total.device)
    _add_rms_norm_backward[(programs,)](
        total,
        weight,
        dy.contiguous(),
        dy if d_total is None else d_total.contiguous(),
        dx,
        parts,
        n_rows,
        C,
        eps,
        ADD=d_total is not None,
        BLOCK=block,
        num_warps=_warps(block),
    )
    d_weight = torch.empty_like(weight)
    _sum_rows[(triton.cdiv(C, 16),)](parts, d_weight, C, N=programs, BLOCK_N=64, BLOCK_C=16, num_warps=8)
    return dx, d_weight


@triton.jit
def _add_rms_norm_forward(x, delta, weight, total, y, C, eps, ADD: tl.constexpr, BLOCK: tl.constexpr):
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
    w = tl.load(weight + c, inside, other=0.0).to(tl.float32)
    tl.store(y + row + c, (a * r * w).to(y.dtype.element_ty), inside)


@triton.jit
def _add_rms_norm_backward(
    total, weight, dy, d_total, dx, d_weight, n_rows, C, eps, ADD: tl.constexpr, BLOCK: tl.constexpr
):
    # y = w x̂ with x̂ = r x:  dx = r (w dy - x̂ mean(w dy x̂)),  dw = Σ dy x̂
    c = tl.arange(0, BLOCK)
    w = tl.load(weight + c, c < C, other=0.0).to(tl.float32)
    dw = tl.zeros((BLOCK,), tl.float32)
    i = tl.program_id(0)
    row = i.to(tl.int64) * C + c
    inside = c < C
    a_next = tl.load(total + row, inside, other=0.0)
    g_next = tl.load(dy + row, inside, other=0.0)
    if ADD:
        e_next = tl.load(d_total + row, inside, other=0.0)
    while i < n_rows:
        here, a, g = row, a_next.to(tl.float32), g_next.to(tl.float32)
        if ADD:
            e = e_next.to(tl.float32)
        # The next row is on its way while the sums over this one make all threads wait for each other.
        i += tl.num_programs(0)
        row = i.to(tl.int64) * C + c
        inside = (c < C) & (i < n_rows)
        a_next = tl.load(total + row, inside, other=0.0)
        g_next = tl.load(dy + row, inside, other=0.0)
        if ADD:
            e_next = tl.load(d_total + row, inside, other=0.0)
        # Of the row as it was read, so that neither sum waits for the other: mean(w dy x̂) = r mean(w dy x).
        squares = tl.sum(a * a, 0)
        products = tl.sum(g * w * a, 0)
        r = tl.rsqrt(squares / C + eps)
        dw += g * (a * r)
        d = r * (g * w - a * (r * r * products / C))
        if ADD:
            d += e
        tl.store(dx + here, d.to(dx.dtype.element_ty), c < C)
    tl.store(d_weight + tl.program_id(0) * C + c, dw, c < C)


@triton.jit
def _sum_rows(parts, out, C, N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """(N, C) -> (C,): few columns a program, since there are few rows."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for begin in range(0, N, BLOCK_N):
        n = begin + tl.arange(0, BLOCK_N)
        total += tl.load(parts + n[:, None] * C + c[None, :], (n < N)[:, None] & (c < C)[None, :], other=0.0)
    tl.store(out + c, tl.sum(total, 0).to(out.dtype.element_ty), c < C)


# --- rotary embedding, with the split of the fused projection --------------------------------------------------------


def split_rope(
    qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, n_query_groups: int, head_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _SplitRope.apply(qkv, cos, sin, n_query_groups, head_size)


class _SplitRope(torch.autograd.Function):
    """Not in place: q, k and v leave for tensors of their own in the same pass, so that nothing is moved twice, and qkv
    is free after it."""

    @staticmethod
    def forward(ctx, qkv, cos, sin, G, D):
        B, T, width = qkv.shape
        H = width // D - 2 * G
        q, k, v = (torch.empty(B, T, heads, D, dtype=qkv.dtype, device=qkv.device) for heads in (H, G, G))
        _launch_split_rope(qkv.contiguous(), q, k, v, cos, sin, backward=False)
        ctx.save_for_backward(cos, sin)
        return q, k, v

    @staticmethod
    @once_differentiable
    def backward(ctx, dq, dk, dv):
        cos, sin = ctx.saved_tensors
        B, T, H, D = dq.shape
        dqkv = torch.empty(B, T, (H + 2 * dk.size(2)) * D, dtype=dq.dtype, device=dq.device)
        _launch_split_rope(dqkv, dq.contiguous(), dk.contiguous(), dv.contiguous(), cos, sin, backward=True)
        return dqkv, None, None, None, None


def _launch_split_rope(qkv, q, k, v, cos, sin, backward: bool) -> None:
    B, T, H, D = q.shape
    G, half = k.size(2), cos.size(-1)
    slots = H // G + 2
    n_heads = B * T * G * slots
    block = min(128, triton.next_power_of_2(n_heads))
    _split_rope[(triton.cdiv(n_heads, block),)](
        qkv,
        q,
        k,
        v,
        cos.contiguous(),
        sin.contiguous(),
        n_heads,
        cos.numel() // half,  # rows of the tables: T, or B T
        G=G,
        D=D,
        QUERIES=H // G,
        HALF=half,
        BACKWARD=backward,
        BLOCK_N=block,
        BLOCK_H=triton.next_power_of_2(half),
        REST=triton.next_power_of_2(D - 2 * half) if D > 2 * half else 0,
    )


@triton.jit
def _split_rope(
    qkv, q, k, v, cos, sin, n_heads, table_rows,
    G: tl.constexpr, D: tl.constexpr, QUERIES: tl.constexpr, HALF: tl.constexpr, BACKWARD: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Some heads of the fused projection, one after the other: queries, a key, a value, the next group's queries, ...
    Queries and keys are rotated, values moved. The backward goes the other way, and rotates by the negative angle."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    group = (n // (QUERIES + 2)).to(tl.int64)  # of all tokens
    slot = n % (QUERIES + 2)
    d = tl.arange(0, BLOCK_H)[None, :]
    inside = (n < n_heads)[:, None] & (d < HALF)
    rotates = inside & (slot <= QUERIES)[:, None]
    angle = ((group // G) % table_rows)[:, None] * HALF + d
    c = tl.load(cos + angle, rotates, other=1.0)
    s = tl.load(sin + angle, rotates, other=0.0)
    if BACKWARD:
        s = -s
    fused = qkv + n.to(tl.int64)[:, None] * D
    queries = q + (group * QUERIES + slot) * D
    split = tl.where(slot < QUERIES, queries, tl.where(slot == QUERIES, k + group * D, v + group * D))[:, None]
    source = split if BACKWARD else fused
    target = fused if BACKWARD else split
    x = tl.load(source + d, inside, other=0.0).to(tl.float32)
    y = tl.load(source + HALF + d, inside, other=0.0).to(tl.float32)
    tl.store(target + d, (x * c - y * s).to(qkv.dtype.element_ty), inside)
    tl.store(target + HALF + d, (y * c + x * s).to(qkv.dtype.element_ty), inside)
    if REST > 0:
        d = 2 * HALF + tl.arange(0, REST)[None, :]
        inside = (n < n_heads)[:, None] & (d < D)
        tl.store(target + d, tl.load(source + d, inside, other=0.0), inside)


# --- SwiGLU and its MLP ----------------------------------------------------------------------------------------------


def swiglu_mlp(x: torch.Tensor, w_gate: torch.Tensor, w_up: torch.Tensor, w_down: torch.Tensor) -> torch.Tensor:
    return _SwigluMLP.apply(x, w_gate, w_up, w_down)


class _SwigluMLP(torch.autograd.Function):
    """One GEMM for gate and up; of the three activations (N, I), the third is computed again in the backward."""

    @staticmethod
    def forward(ctx, x, w_gate, w_up, w_down):
        stacked, width = as_one(compute(w_gate), compute(w_up)), w_gate.size(0)
        if stacked is not None:
            gate_up = F.linear(x, stacked)  # (..., 2 I)
        else:
            gate_up = torch.empty(*x.shape[:-1], 2 * width, dtype=x.dtype, device=x.device)
            gate, up = gate_up.flatten(0, -2).split(width, dim=-1)
            torch.mm(x.flatten(0, -2), compute(w_gate).T, out=gate)
            torch.mm(x.flatten(0, -2), compute(w_up).T, out=up)
        ctx.save_for_backward(x, gate_up)
        ctx.weights = w_gate, w_up, w_down
        return F.linear(swiglu(gate_up), compute(w_down))

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, gate_up = ctx.saved_tensors
        w_gate, w_up, w_down = ctx.weights
        d_gate_up, h = swiglu_backward(gate_up, dy @ compute(w_down))
        (d_down,) = weight_grads(dy, h, w_down)
        stacked = as_one(compute(w_gate), compute(w_up))
        if stacked is not None:
            dx = d_gate_up @ stacked
        else:
            d_gate, d_up = d_gate_up.flatten(0, -2).split(w_gate.size(0), dim=-1)
            dx = (d_gate @ compute(w_gate)).addmm_(d_up, compute(w_up)).view_as(x)
        return dx, *weight_grads(d_gate_up, x, w_gate, w_up), d_down


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) · up of gate and up side by side: (..., 2 I) -> (..., I)."""
    width = gate_up.size(-1) // 2
    h = torch.empty(*gate_up.shape[:-1], width, dtype=gate_up.dtype, device=gate_up.device)
    # 64-bit places, where they are not needed, and 4 warps each cost a percent.
    _launch_swiglu(_swiglu_forward, h, gate_up, h, LONG=gate_up.numel() >= 2**31, num_warps=8)
    return h


def swiglu_backward(gate_up: torch.Tensor, dh: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient of gate_up (..., 2 I), given that of the output (..., I), and the output, computed again."""
    d_gate_up, h = torch.empty_like(gate_up), torch.empty_like(dh)
    _launch_swiglu(_swiglu_backward, h, gate_up, dh, d_gate_up, h, num_warps=4)
    return d_gate_up, h


def _launch_swiglu(kernel, like: torch.Tensor, *tensors: torch.Tensor, **options) -> None:
    kernel[(triton.cdiv(like.numel(), 1024),)](*tensors, like.numel(), WIDTH=like.size(-1), BLOCK=1024, **options)


@triton.jit
def _swiglu_forward(gate_up, h, n, WIDTH: tl.constexpr, BLOCK: tl.constexpr, LONG: tl.constexpr):
    block = tl.program_id(0)
    if LONG:
        block = block.to(tl.int64)
    i = block * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    left = i + i // WIDTH * WIDTH
    gate = tl.load(gate_up + left, inside).to(tl.float32)
    up = tl.load(gate_up + left + WIDTH, inside).to(tl.float32)
    tl.store(h + i, (gate * tl.sigmoid(gate) * up).to(h.dtype.element_ty), inside)


@triton.jit
def _swiglu_backward(gate_up, dh, d_gate_up, h, n, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    left = i + i // WIDTH * WIDTH
    right = left + WIDTH
    gate = tl.load(gate_up + left, inside).to(tl.float32)
    up = tl.load(gate_up + right, inside).to(tl.float32)
    g = tl.load(dh + i, inside).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    tl.store(h + i, (silu * up).to(h.dtype.element_ty), inside)
    tl.store(d_gate_up + right, (g * silu).to(h.dtype.element_ty), inside)
    tl.store(d_gate_up + left, (g * up * (sigmoid + silu * (1 - sigmoid))).to(h.dtype.element_ty), inside)


# --- the head and its loss -------------------------------------------------------------------------------------------


def linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, reduction: str = "sum", z_loss: float = 0.0
) -> torch.Tensor:
    trains = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    if trains and reduction == "none":  # a weight for each token is not known before the backward
        return reference.linear_cross_entropy(hidden, weight, targets, reduction, z_loss)
    if trains:
        return _LinearCrossEntropy.apply(hidden, weight, targets, z_loss)
    loss = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
    for logits, _, out, t in _chunks(hidden, weight, loss, targets):
        _softmax_grad(logits, t, out, z_loss, with_grad=False)
        del logits
    return loss.sum() if reduction == "sum" else loss


class _LinearCrossEntropy(torch.autograd.Function):
    """The gradients of a sum are known up to a factor as soon as the logits are, so the forward computes them chunk by
    chunk, writing the logits' over the logits, and nothing is computed twice."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, z_loss):
        loss = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        d_hidden = torch.empty_like(hidden)
        d_weight = None
        begin = 0
        for logits, h, out, t in _chunks(hidden, weight, loss, targets):
            _softmax_grad(logits, t, out, z_loss, with_grad=True)
            torch.mm(logits, compute(weight), out=d_hidden[begin : begin + len(h)])
            if weight.requires_grad and d_weight is None:
                d_weight = mm_fp32(logits.T, h)
            elif weight.requires_grad:
                add_mm_fp32_(d_weight, logits.T, h)
            begin += len(h)
            del logits  # before the next chunk's are made
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.weight = weight
        return loss.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, d_loss):
        d_hidden, d_weight = ctx.saved_tensors
        # By a vector of one element: a scalar's fp32 would be rounded to bf16 first, and every gradient be off by it.
        d_hidden = torch.mul(d_hidden, d_loss.view(1), out=torch.empty_like(d_hidden))
        weight = ctx.weight
        if d_weight is None:
            return d_hidden, None, None, None
        if hasattr(weight, "compute") and weight.grad is not None:
            weight.grad.addcmul_(d_weight, d_loss)
            return d_hidden, None, None, None
        return d_hidden, torch.mul(d_weight, d_loss, out=torch.empty_like(weight)), None, None


def _chunks(hidden, weight, loss, targets):
    size = reference.CHUNK
    for h, out, t in zip(hidden.split(size), loss.split(size), targets.contiguous().split(size), strict=True):
        if len(h):
            yield h @ compute(weight).T, h, out, t


def _softmax_grad(logits, targets, loss, z_loss: float, with_grad: bool) -> None:
    n, V = logits.shape
    block = min(16384, triton.next_power_of_2(V))
    _cross_entropy[(n,)](
        logits, targets, loss, V, z_loss, IGNORE=IGNORE_INDEX, GRAD=with_grad, BLOCK=block, num_warps=_warps(block)
    )


@triton.jit
def _cross_entropy(
    logits, targets, loss, V: tl.constexpr, z_loss, IGNORE: tl.constexpr, GRAD: tl.constexpr, BLOCK: tl.constexpr
):
    """The loss of a row, and over its logits their gradient. The second pass reads what the L2 cache still holds."""
    n = tl.program_id(0).to(tl.int64)
    row = logits + n * V
    c = tl.arange(0, BLOCK)
    target = tl.load(targets + n)
    if target == IGNORE:
        tl.store(loss + n, 0.0)
        if GRAD:
            for begin in range(0, V, BLOCK):
                tl.store(row + begin + c, tl.zeros((BLOCK,), logits.dtype.element_ty), begin + c < V)
        return
    # Here, since the reductions' barriers precede the overwriting. A target outside of [0, V) makes the row NaN.
    at_target = tl.load(row + target, (target >= 0) & (target < V), other=float("nan")).to(tl.float32)
    top = float("-inf")
    total = 0.0
    for begin in range(0, V, BLOCK):
        x = tl.load(row + begin + c, begin + c < V, other=float("-inf")).to(tl.float32)
        new = tl.maximum(top, tl.max(x, 0))
        total = total * tl.exp(top - new) + tl.sum(tl.exp(x - new), 0)
        top = new
    lse = top + tl.log(total)
    tl.store(loss + n, lse - at_target + z_loss * lse * lse)
    if GRAD:
        factor = 1 + 2 * z_loss * lse + 0 * at_target
        for begin in range(0, V, BLOCK):
            x = tl.load(row + begin + c, begin + c < V, other=float("-inf")).to(tl.float32)
            grad = tl.exp(x - lse) * factor - tl.where(begin + c == target, 1.0, 0.0)
            tl.store(row + begin + c, grad.to(logits.dtype.element_ty), begin + c < V)


def _warps(block: int) -> int:
    """16 elements a thread, and more in long rows."""
    return min(16, max(1, block // 512))


def _multiprocessors(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 132 if device.type == "meta" else 2  # an H100's, for which precompile.py compiles without one
