"""Decoding in Triton: a step of one or a few tokens costs the reading of the weights once, and little else.

Imported only where these are selected, since it needs triton. Forward only. Six launches a layer: what stands between
two matrix products is done by their kernels, at the beginning (the norm) or at the end (SwiGLU, the residual addition).
With programmatic dependent launch (Hopper and later) a kernel reads its first weights while the one before still runs.

B batch, T new tokens of each row, M = B·T rows of a step, K inputs, N outputs of a matrix, S cache length, H query
heads, G key/value heads, D head size.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from lit_gpt.kernels.attention import cached_attention as reference

MAX_ROWS = 16
"""Rows of a step up to which these products are memory-bound and faster than a library's GEMM."""


# --- matrix products of a few rows -----------------------------------------------------------------------------------


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None = None,
    *,
    norm: torch.Tensor | None = None,
    eps: float = 0.0,
    add_to: torch.Tensor | None = None,
) -> torch.Tensor:
    """x @ weightᵀ for up to MAX_ROWS rows.

    Args:
        x: (M, K), contiguous.
        weight: (N, K) in x's dtype, or int8, then times `scale` (N,) fp32.
        norm: (K,) weight of an RMSNorm of x that comes first.
        add_to: (M, N): the product is added to it, in place.

    Returns:
        (M, N) in x's dtype, or add_to.
    """
    y = torch.empty(x.size(0), weight.size(0), dtype=x.dtype, device=x.device) if add_to is None else add_to
    _launch_linear(x, weight, scale, weight, scale, norm, eps, y, gated=False, add=add_to is not None)
    return y


def swiglu(
    x: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    gate_scale: torch.Tensor | None = None,
    up_scale: torch.Tensor | None = None,
    *,
    norm: torch.Tensor | None = None,
    eps: float = 0.0,
) -> torch.Tensor:
    """silu(x @ gateᵀ) · (x @ upᵀ) for up to MAX_ROWS rows; as `linear`."""
    y = torch.empty(x.size(0), gate.size(0), dtype=x.dtype, device=x.device)
    _launch_linear(x, gate, gate_scale, up, up_scale, norm, eps, y, gated=True, add=False)
    return y


def _launch_linear(x, weight, scale, up, up_scale, norm, eps, y, gated: bool, add: bool) -> None:
    (M, K), N = x.shape, weight.size(0)
    assert M <= MAX_ROWS and x.is_contiguous() and weight.is_contiguous() and y.is_contiguous()
    pdl = has_pdl(x.device)
    launch = {"launch_pdl": True} if pdl else {}
    if M > 1 and norm is not None:  # a program of the product would norm all rows again
        normed = torch.empty_like(x)
        _rms_norm[(M,)](x, norm, normed, K, eps, PDL=pdl, BLOCK=triton.next_power_of_2(K), num_warps=4, **launch)
        x, norm = normed, None
    block_n, block_k, warps, stages = _tile(M, N, gated, add, scale is not None)
    kernel = _linear_one_row if M == 1 else _linear_few_rows
    kernel[(triton.cdiv(N, block_n),)](
        x,
        x if norm is None else norm,
        weight,
        weight if scale is None else scale,
        up,
        up if up_scale is None else up_scale,
        y,
        M,
        N,
        eps,
        K=K,
        NORM=norm is not None,
        GATED=gated,
        ADD=add,
        INT8=scale is not None,
        PDL=pdl,
        BLOCK_N=block_n,
        BLOCK_K=min(block_k, triton.next_power_of_2(K)),
        num_warps=warps,
        num_stages=stages,
        **launch,
    )


def _tile(M: int, N: int, gated: bool, add: bool, int8: bool) -> tuple[int, int, int, int]:
    """(BLOCK_N, BLOCK_K, warps, stages): the fastest of those tried on an H100 with the shapes of TinyLlama-1.1B."""
    if M > 1:
        return (32, 256, 4, 3) if int8 else (16, 256, 2, 4) if add else (64, 128, 4, 4)
    if gated and int8:
        return 2, 1024, 2, 1
    return (4, 1024, 4, 1) if gated or N > 8192 else (8, 2048, 8, 1)


def has_pdl(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@triton.jit
def _linear_one_row(
    x, norm, weight, scale, up, up_scale, y, M, N, eps,
    K: tl.constexpr, NORM: tl.constexpr, GATED: tl.constexpr, ADD: tl.constexpr, INT8: tl.constexpr,
    PDL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_N outputs. 1 / rms of x is a factor of the whole product, so x is read once, with the weights."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    rows = n.to(tl.int64)[:, None] * K + k[None, :]
    inside = (n < N)[:, None] & (k < K)[None, :]
    # The first tile of weights does not depend on the kernel before: it is read while that one ends.
    w = tl.load(weight + rows, inside, other=0.0)
    if GATED:
        u = tl.load(up + rows, inside, other=0.0)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    total = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    up_total = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    squares = tl.zeros((BLOCK_K,), tl.float32)
    for start in tl.static_range(0, K, BLOCK_K):
        a = tl.load(x + start + k, start + k < K, other=0.0).to(tl.float32)
        if NORM:
            squares += a * a
            a *= tl.load(norm + start + k, start + k < K, other=0.0).to(tl.float32)
        if start > 0:
            inside = (n < N)[:, None] & (start + k < K)[None, :]
            w = tl.load(weight + rows + start, inside, other=0.0)
            if GATED:
                u = tl.load(up + rows + start, inside, other=0.0)
        total += w.to(tl.float32) * a[None, :]
        if GATED:
            up_total += u.to(tl.float32) * a[None, :]
    r = 1.0
    if NORM:
        r = tl.rsqrt(tl.sum(squares, 0) / K + eps)
    out = tl.sum(total, 1) * r
    if INT8:
        out *= tl.load(scale + n, n < N, other=0.0)
    if GATED:
        out_up = tl.sum(up_total, 1) * r
        if INT8:
            out_up *= tl.load(up_scale + n, n < N, other=0.0)
        out = out * tl.sigmoid(out) * out_up
    if ADD:
        out += tl.load(y + n, n < N, other=0.0).to(tl.float32)
    tl.store(y + n, out.to(y.dtype.element_ty), n < N)


@triton.jit
def _linear_few_rows(
    x, norm, weight, scale, up, up_scale, y, M, N, eps,
    K: tl.constexpr, NORM: tl.constexpr, GATED: tl.constexpr, ADD: tl.constexpr, INT8: tl.constexpr,
    PDL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_N outputs of up to 16 rows, by the matrix units: weights (BLOCK_N, K) times x (K, 16)."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, 16)
    k = tl.arange(0, BLOCK_K)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    total = tl.zeros((BLOCK_N, 16), tl.float32)
    up_total = tl.zeros((BLOCK_N, 16), tl.float32)
    rows = n.to(tl.int64)[:, None] * K
    for start in range(0, K, BLOCK_K):
        c = start + k
        inside = (n < N)[:, None] & (c < K)[None, :]
        w = tl.load(weight + rows + c[None, :], inside, other=0.0)
        a = tl.load(x + m[:, None] * K + c[None, :], (m < M)[:, None] & (c < K)[None, :], other=0.0)
        a = tl.trans(a)
        total = tl.dot(w.to(a.dtype), a, total, input_precision="ieee")
        if GATED:
            u = tl.load(up + rows + c[None, :], inside, other=0.0)
            up_total = tl.dot(u.to(a.dtype), a, up_total, input_precision="ieee")
    if INT8:
        total *= tl.load(scale + n, n < N, other=0.0)[:, None]
    if GATED:
        if INT8:
            up_total *= tl.load(up_scale + n, n < N, other=0.0)[:, None]
        total = total * tl.sigmoid(total) * up_total
    where = y + m[None, :] * N + n[:, None]
    inside = (n < N)[:, None] & (m < M)[None, :]
    if ADD:
        total += tl.load(where, inside, other=0.0).to(tl.float32)
    tl.store(where, total.to(y.dtype.element_ty), inside)


@triton.jit
def _rms_norm(x, weight, y, K, eps, PDL: tl.constexpr, BLOCK: tl.constexpr):
    k = tl.arange(0, BLOCK)
    row = tl.program_id(0).to(tl.int64) * K
    w = tl.load(weight + k, k < K, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    a = tl.load(x + row + k, k < K, other=0.0).to(tl.float32)
    a *= tl.rsqrt(tl.sum(a * a, 0) / K + eps) * w
    tl.store(y + row + k, a.to(y.dtype.element_ty), k < K)


# --- attention over the cache ----------------------------------------------------------------------------------------


def cached_attention(
    qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, cache, n_query_groups: int, head_size: int
) -> torch.Tensor:
    """As kernels.attention.cached_attention, in two launches."""
    if head_size < 16 or head_size & (head_size - 1):
        return reference(qkv, cos, sin, cache, n_query_groups, head_size)
    B, T, width = qkv.shape
    G, D, S = n_query_groups, head_size, cache.k.size(1)
    H = width // D - 2 * G
    queries = H // G
    qkv, positions = qkv.contiguous(), cache.positions
    table_rows = cos.numel() // cos.size(-1)  # T, or B·T
    q = torch.empty(B, T, H, D, dtype=qkv.dtype, device=qkv.device)
    pdl = has_pdl(qkv.device)
    launch = {"launch_pdl": True} if pdl else {}
    row_stride = 0 if positions.dim() == 1 else T
    _rope_into_cache[(B * T, G)](
        qkv, cos.contiguous(), sin.contiguous(), positions, q, cache.k, cache.v, T, S, row_stride, table_rows, G,
        QUERIES=queries, D=D, HALF=cos.size(-1), SLOTS=triton.next_power_of_2(queries + 2), PDL=pdl,
        num_warps=2, **launch,
    )  # fmt: skip

    padded_queries = triton.next_power_of_2(queries)
    block_t = max(1, (16 if T * padded_queries <= 16 else 64) // padded_queries)
    while block_t * padded_queries < 16:
        block_t *= 2
    tiles = triton.cdiv(T, block_t)
    rows = block_t * padded_queries
    splits = _splits(B * G * tiles, rows, S)
    out = torch.empty_like(q)
    partial = torch.empty((B * G * tiles, splits, rows, D + 2) if splits > 1 else 1, device=q.device)
    _attend[(B * G, tiles, splits)](
        q, cache.k, cache.v, positions, out, partial, cache.arrivals, T, S, row_stride, G, D**-0.5,
        QUERIES=queries, PADDED=padded_queries, D=D, BLOCK_T=block_t, BLOCK_S=64, SPLITS=splits,
        PDL=pdl, num_warps=4, num_stages=2, **launch,
    )  # fmt: skip
    return out


def _splits(programs: int, rows: int, S: int) -> int:
    """In how many parts to read a cache of S, so that `programs` fill the GPU; joining many rows costs more."""
    most, each = (16, 64) if rows == 16 else (8, 256)
    return max(1, min(132 // programs, triton.cdiv(S, each), most))


@triton.jit
def _rope_into_cache(
    qkv, cos, sin, positions, q, k_cache, v_cache, T, S, row_stride, table_rows, G,
    QUERIES: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, SLOTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One group of one token: queries rotated to q, the key rotated and the value as it is to their place in the cache.
    Slots are the group's heads in the fused projection: queries, key, value."""
    row = tl.program_id(0)
    group = tl.program_id(1)
    b, t = row // T, row % T
    slot = tl.arange(0, SLOTS)[:, None]
    d = tl.arange(0, D)[None, :]
    inside = slot < QUERIES + 2
    rotates = (slot <= QUERIES) & (d < 2 * HALF)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    table = (row % table_rows) * HALF + d % HALF
    c = tl.load(cos + table, d < 2 * HALF, other=1.0)
    s = tl.load(sin + table, d < 2 * HALF, other=0.0)
    s = tl.where(d < HALF, -s, s)
    source = qkv + row.to(tl.int64) * G * (QUERIES + 2) * D + (group * (QUERIES + 2) + slot) * D
    partner = tl.where(d < HALF, d + HALF, d - HALF)
    a = tl.load(source + d, inside, other=0.0).to(tl.float32)
    p = tl.load(source + partner, rotates, other=0.0).to(tl.float32)
    a = tl.where(rotates, a * c + p * s, a).to(q.dtype.element_ty)
    tl.store(q + (row.to(tl.int64) * G + group) * QUERIES * D + slot * D + d, a, slot < QUERIES)
    position = tl.load(positions + b * row_stride + t)
    where = ((b.to(tl.int64) * S + position) * G + group) * D + d + slot * 0
    tl.store(k_cache + where, a, slot == QUERIES)
    tl.store(v_cache + where, a, slot == QUERIES + 1)


@triton.jit
def _attend(
    q, k_cache, v_cache, positions, out, partial, arrivals, T, S, row_stride, G, scale,
    QUERIES: tl.constexpr, PADDED: tl.constexpr, D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
    SPLITS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A tile of tokens of one row of the batch, all queries of one group together: its keys and values are read once.

    Online softmax over blocks of the cache up to the last token's position (Dao et al. 2022, arXiv:2205.14135). Where
    SPLITS programs share a tile, each takes every SPLITS-th block, and the one that finishes last joins their results.
    """
    ROWS: tl.constexpr = BLOCK_T * PADDED
    b = tl.program_id(0) // G
    group = tl.program_id(0) % G
    split = tl.program_id(2)
    r = tl.arange(0, ROWS)
    t = tl.program_id(1) * BLOCK_T + r // PADDED
    h = r % PADDED
    d = tl.arange(0, D)
    inside = (t < T) & (h < QUERIES)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    position = tl.load(positions + b * row_stride + t, t < T, other=-1).to(tl.int32)
    end = tl.max(position, 0) + 1
    row = ((b.to(tl.int64) * T + t) * G + group) * QUERIES + h
    heads = row[:, None] * D + d[None, :]
    queries = tl.load(q + heads, inside[:, None], other=0.0)

    base = b.to(tl.int64) * S * G * D + group * D
    largest = tl.full((ROWS,), -1e30, tl.float32)  # finite: -inf - -inf would be NaN in rows that see nothing here
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, D), tl.float32)
    for start in range(split * BLOCK_S, end, SPLITS * BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        where = base + s[:, None] * (G * D) + d[None, :]
        keys = tl.load(k_cache + where, (s < end)[:, None], other=0.0)
        values = tl.load(v_cache + where, (s < end)[:, None], other=0.0)
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * (scale * 1.4426950408889634)
        scores = tl.where(s[None, :] <= position[:, None], scores, -1e30)
        new = tl.maximum(largest, tl.max(scores, 1))
        p = tl.where(s[None, :] <= position[:, None], tl.exp2(scores - new[:, None]), 0.0)
        shrink = tl.exp2(largest - new)
        total = total * shrink + tl.sum(p, 1)
        acc = tl.dot(p.to(values.dtype), values, acc * shrink[:, None], input_precision="ieee")
        largest = new

    if SPLITS == 1:
        tl.store(out + heads, (acc / tl.maximum(total, 1e-30)[:, None]).to(out.dtype.element_ty), inside[:, None])
    else:
        tile = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
        mine = partial + ((tile * SPLITS + split) * ROWS + r) * (D + 2)
        tl.store(mine[:, None] + d[None, :], acc)
        tl.store(mine + D, largest)
        tl.store(mine + D + 1, total)
        tl.debug_barrier()  # the stores of all threads come before the one that counts them
        if tl.atomic_add(arrivals + tile, 1, sem="acq_rel") == SPLITS - 1:
            tl.debug_barrier()
            largest = tl.full((ROWS,), -1e30, tl.float32)
            total = tl.zeros((ROWS,), tl.float32)
            acc = tl.zeros((ROWS, D), tl.float32)
            for i in range(SPLITS):
                other = partial + ((tile * SPLITS + i) * ROWS + r) * (D + 2)
                # From L2: this multiprocessor may hold older lines.
                m = tl.load(other + D, cache_modifier=".cg")
                n = tl.load(other + D + 1, cache_modifier=".cg")
                a = tl.load(other[:, None] + d[None, :], cache_modifier=".cg")
                new = tl.maximum(largest, m)
                before, now = tl.exp2(largest - new), tl.exp2(m - new)
                total = total * before + n * now
                acc = acc * before[:, None] + a * now[:, None]
                largest = new
            tl.store(out + heads, (acc / tl.maximum(total, 1e-30)[:, None]).to(out.dtype.element_ty), inside[:, None])
            tl.store(arrivals + tile, 0)  # for the next launch
