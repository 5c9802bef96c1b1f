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

MAX_ROWS = 8
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


def _launch_linear(x, weight, scale, up, up_scale, norm, eps, y, gated: bool, add: bool, tile=None) -> None:
    (M, K), N = x.shape, weight.size(0)
    assert M <= MAX_ROWS and x.is_contiguous() and weight.is_contiguous() and y.is_contiguous()
    rows = 1 if M == 1 else max(4, triton.next_power_of_2(M))  # fewer values, fewer compilations
    block_n, block_k, warps = tile or _tile(rows, N, gated, scale is not None)
    pdl = has_pdl(x.device)
    _linear[(triton.cdiv(N, block_n),)](
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
        ROWS=rows,
        NORM=norm is not None,
        GATED=gated,
        ADD=add,
        INT8=scale is not None,
        PDL=pdl,
        ASM=scale is not None and x.is_cuda,
        BLOCK_N=block_n,
        BLOCK_K=min(block_k, triton.next_power_of_2(K)),
        num_warps=warps,
        num_stages=1,
        **({"launch_pdl": True} if pdl else {}),
    )


def _tile(rows: int, N: int, gated: bool, int8: bool) -> tuple[int, int, int]:
    """(BLOCK_N, BLOCK_K, warps), by measurement on an H100."""
    if rows > 1:
        return 4, 1024, 4
    if gated and int8:
        return 2, 1024, 2
    return (4, 1024, 4) if gated or N > 8192 else (8, 2048, 8)


def has_pdl(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@triton.jit
def _linear(
    x, norm, weight, scale, up, up_scale, y, M, N, eps,
    K: tl.constexpr, ROWS: tl.constexpr, NORM: tl.constexpr, GATED: tl.constexpr, ADD: tl.constexpr,
    INT8: tl.constexpr, PDL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """BLOCK_N outputs of up to ROWS rows. 1 / rms of a row is a factor of all its outputs, so x is read once, with the
    weights. Plain multiplication and addition: the matrix units would wait for memory no less, and need 16 rows."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    i = tl.arange(0, ROWS)[:, None]
    m = tl.arange(0, ROWS)[None, :]
    rows = n.to(tl.int64)[:, None] * K + k[None, :]
    inside = (n < N)[:, None] & (k < K)[None, :]
    # The first tile of weights does not depend on the kernel before: it is read while that one finishes.
    w = tl.load(weight + rows, inside, other=0.0)
    if GATED:
        u = tl.load(up + rows, inside, other=0.0)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    products = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)  # of a single row, to be summed once, at the end
    up_products = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    total = tl.zeros((BLOCK_N, ROWS), tl.float32)
    up_total = tl.zeros((BLOCK_N, ROWS), tl.float32)
    squares = tl.zeros((ROWS,), tl.float32)
    for start in tl.static_range(0, K, BLOCK_K):
        if start > 0:
            inside = (n < N)[:, None] & (start + k < K)[None, :]
            w = tl.load(weight + rows + start, inside, other=0.0)
            if GATED:
                u = tl.load(up + rows + start, inside, other=0.0)
        w32 = _int8_to_fp32(w) if ASM else w.to(tl.float32)
        if GATED:
            u32 = _int8_to_fp32(u) if ASM else u.to(tl.float32)
        inside = (i < M) & (start + k < K)[None, :]
        a = tl.load(x + i * K + start + k[None, :], inside, other=0.0).to(tl.float32)  # (ROWS, BLOCK_K)
        if NORM:
            g = tl.load(norm + start + k, start + k < K, other=0.0).to(tl.float32)
            squares += tl.sum(a * a, 1)
            a *= g[None, :]
        if ROWS == 1:
            products += w32 * a
            if GATED:
                up_products += u32 * a
        else:
            total += tl.sum(w32[:, None, :] * a[None, :, :], 2)
            if GATED:
                up_total += tl.sum(u32[:, None, :] * a[None, :, :], 2)
    if ROWS == 1:
        total += tl.sum(products, 1)[:, None]
        up_total += tl.sum(up_products, 1)[:, None]
    if NORM:
        r = tl.rsqrt(squares / K + eps)[None, :]
        total *= r
        up_total *= r
    if INT8:
        total *= tl.load(scale + n, n < N, other=0.0)[:, None]
    if GATED:
        if INT8:
            up_total *= tl.load(up_scale + n, n < N, other=0.0)[:, None]
        total = total * tl.sigmoid(total) * up_total
    where = y + m * N + n[:, None]
    inside = (n < N)[:, None] & (m < M)
    if ADD:
        total += tl.load(where, inside, other=0.0).to(tl.float32)
    tl.store(where, total.to(y.dtype.element_ty), inside)


@triton.jit
def _int8_to_fp32(w):
    """Four at a time, without the converter's quarter rate: 2²³ + 128 + w is a float whose last byte is w + 128."""
    return tl.inline_asm_elementwise(
        """
        {
        .reg .b32 bytes;
        xor.b32 bytes, $4, 0x80808080;
        prmt.b32 $0, bytes, 0x4B000000, 0x7540;
        prmt.b32 $1, bytes, 0x4B000000, 0x7541;
        prmt.b32 $2, bytes, 0x4B000000, 0x7542;
        prmt.b32 $3, bytes, 0x4B000000, 0x7543;
        sub.f32 $0, $0, 0f4B000080;
        sub.f32 $1, $1, 0f4B000080;
        sub.f32 $2, $2, 0f4B000080;
        sub.f32 $3, $3, 0f4B000080;
        }
        """,
        "=f,=f,=f,=f,r",
        [w],
        dtype=tl.float32,
        is_pure=True,
        pack=4,
    )


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
    splits = _splits(B * G * tiles, S)
    out = torch.empty_like(q)
    rows = block_t * padded_queries
    partial = torch.empty((B * G * tiles, splits, rows, D + 2) if splits > 1 else 1, device=q.device)
    _attend[(B * G, tiles, splits)](
        q, cache.k, cache.v, positions, out, partial, cache.arrivals, T, S, row_stride, G, D**-0.5,
        QUERIES=queries, PADDED=padded_queries, D=D, BLOCK_T=block_t, BLOCK_S=ATTEND[0], SPLITS=splits,
        PDL=pdl, num_warps=ATTEND[1], num_stages=ATTEND[2], **launch,
    )  # fmt: skip
    return out


ATTEND = (64, 4, 2)


def _splits(programs: int, S: int) -> int:
    """In how many parts to read a cache of S, so that `programs` fill the GPU."""
    return max(1, min(132 // programs, triton.cdiv(S, 128), 16))


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
