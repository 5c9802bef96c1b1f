"""Decoding in Triton: a step of one or a few tokens costs the reading of the weights once, and little else.

Imported only where these are selected, since it needs triton. Forward only. Five launches a layer: what stands between
two matrix products is done by their kernels, at the beginning (the norm) or at the end (SwiGLU, the residual addition),
and attention's kernel rotates and writes the cache. With programmatic dependent launch (Hopper and later) a kernel
reads its first weights while the one before still runs.

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
LARGE_BYTES = 166_144
"""Of shared memory: what a program of cached_attention takes that reads much at once, 512 slots of 32 elements in fp32,
its largest case. (Of 64 in bf16 it takes 81,920.)"""


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
    int8 = scale is not None
    pdl = has_pdl(x.device)
    one_row = M == 1 and not (gated and int8)  # to turn int8 into numbers takes time, too
    if one_row:
        kernel, tile = _linear_one_row, _tile_one_row(N, K, gated, int8)
        outputs = tile["BLOCK_N"]
    else:
        kernel, tile = _linear_few_rows, _tile_few_rows(N, K, gated, add, int8)
        outputs = 8
    kernel[(triton.cdiv(N, outputs),)](
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
        INT8=int8,
        PDL=pdl,
        **tile,
        **({} if one_row else {"TALL": M > 8}),
        **({"launch_pdl": True} if pdl else {}),
    )


def _tile_one_row(N: int, K: int, gated: bool, int8: bool) -> dict[str, int]:
    """The fastest of those tried on an H100 with the shapes of TinyLlama-1.1B."""
    shape = "gated" if gated else "head" if N > 8192 else "down" if K > 4096 else "square"
    BLOCK_N, BLOCK_K, num_warps = (ONE_ROW_INT8 if int8 else ONE_ROW)[shape]
    return dict(BLOCK_N=BLOCK_N, BLOCK_K=min(BLOCK_K, triton.next_power_of_2(K)), num_warps=num_warps, num_stages=1)


ONE_ROW = {"gated": (4, 1024, 4), "head": (4, 1024, 4), "down": (8, 2048, 8), "square": (8, 2048, 8)}
ONE_ROW_INT8 = {"head": (4, 1024, 4), "down": (8, 2048, 8), "square": (8, 2048, 8)}


def _tile_few_rows(N: int, K: int, gated: bool, add: bool, int8: bool) -> dict[str, int]:
    """As _tile_one_row, on an H200. Small programs, many on each multiprocessor, read fastest."""
    # Inputs at a time, and the warps that share them.
    step, warps = (512, 2) if gated or N > 8192 else (2048, 8 if K > 4096 else 4) if add else (1024, 2)
    while step > 256 and K % step and (not add or step >= 2 * K):  # what lies beyond K is masked, and read for nothing
        step //= 2
    blocks = step // (64 if int8 else 32)
    slices = min(blocks, warps if K > 4096 or (gated and not int8) else 2 * warps)
    return dict(SLICES=slices, BLOCKS=blocks // slices, num_warps=min(warps, slices), num_stages=1)


def has_pdl(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@triton.jit
def _linear_one_row(
    x, norm, weight, scale, up, up_scale, y, M, N, eps,
    K: tl.constexpr, NORM: tl.constexpr, GATED: tl.constexpr, ADD: tl.constexpr, INT8: tl.constexpr,
    PDL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_N outputs; of int8 not GATED ones. 1 / rms of x is a factor of the whole product, so x is read once, with
    the weights."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    rows = n.to(tl.int64)[:, None] * K + k[None, :]
    inside = (n < N)[:, None] & (k < K)[None, :]
    # The first tile of weights does not depend on the kernel before: it is read while that one ends.
    w = tl.load(weight + rows, inside, other=0.0)
    if GATED:
        u = tl.load(up + rows, inside, other=0.0)
    # int8 leaves registers for the rest, for which all would wait at the end; in bf16 that was 3% slower.
    if INT8:
        w_scale = tl.load(scale + n, n < N, other=0.0)
        if NORM:
            g = tl.load(norm + k, k < K, other=0.0)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    if ADD and INT8:
        residual = tl.load(y + n, n < N, other=0.0)
    total = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    up_total = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    squares = tl.zeros((BLOCK_K,), tl.float32)
    for start in tl.static_range(0, K, BLOCK_K):
        a = tl.load(x + start + k, start + k < K, other=0.0).to(tl.float32)
        if NORM:
            squares += a * a
            if start > 0 or not INT8:
                g = tl.load(norm + start + k, start + k < K, other=0.0)
            a *= g.to(tl.float32)
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
        out *= w_scale
    if GATED:
        out_up = tl.sum(up_total, 1) * r
        out = out * tl.sigmoid(out) * out_up
    if ADD:
        if not INT8:
            residual = tl.load(y + n, n < N, other=0.0)
        out += residual.to(tl.float32)
    tl.store(y + n, out.to(y.dtype.element_ty), n < N)


@triton.jit
def _linear_few_rows(
    x, norm, weight, scale, up, up_scale, y, M, N, eps,
    K: tl.constexpr, NORM: tl.constexpr, GATED: tl.constexpr, ADD: tl.constexpr, INT8: tl.constexpr,
    PDL: tl.constexpr, TALL: tl.constexpr, SLICES: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """8 outputs of up to 16 rows, by the matrix units: x (16, K) times weights (K, 8).

    K is cut into SLICES, spread over the warps, whose products are added at the end. Each thread loads 16 bytes of a
    row, 4 threads beside each other, and these bytes are its operands as they are: the order of the inputs within a
    product is free, if x and the weights have the same. So nothing passes through shared memory, and a program's
    weights are all on their way before the kernel ahead has ended.
    """
    L: tl.constexpr = 16 if INT8 else 8  # elements that a thread loads together
    STEP: tl.constexpr = SLICES * BLOCKS * 4 * L
    i = tl.arange(0, 8)
    n = tl.program_id(0) * 8 + i
    # (8, SLICES, BLOCKS, 4 L): in this order of dimensions the compiler gives a warp 8 rows of 4 L elements.
    k = tl.arange(0, SLICES)[None, :, None, None] * (BLOCKS * 4 * L)
    k += tl.arange(0, BLOCKS)[None, None, :, None] * (4 * L) + tl.arange(0, 4 * L)[None, None, None, :]
    # Rows that are too many read the last one again, and are not stored.
    first = weight + tl.minimum(n, N - 1).to(tl.int64)[:, None, None, None] * K + k
    if GATED:
        second = up + tl.minimum(n, N - 1).to(tl.int64)[:, None, None, None] * K + k
    # The first weights do not depend on the kernel before: they are read while that one ends.
    w = _load(first, k, 0, K, STEP)
    if GATED:
        u = _load(second, k, 0, K, STEP)
    if NORM:
        norms = tl.broadcast_to(norm + k, (8, SLICES, BLOCKS, 4 * L))
        g = _load(norms, k, 0, K, STEP)
    if INT8:
        w_scale = tl.load(scale + n, n < N, other=0.0)[None, :]
        if GATED:
            u_scale = tl.load(up_scale + n, n < N, other=0.0)[None, :]
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    lower = x + tl.minimum(i, M - 1)[:, None, None, None] * K + k
    upper = x + tl.minimum(i + 8, M - 1)[:, None, None, None] * K + k
    total = tl.zeros((SLICES, 16, 8), tl.float32)
    second_total = tl.zeros((SLICES, 16, 8), tl.float32)
    squares = tl.zeros((SLICES, 16, 8), tl.float32)
    upper_squares = tl.zeros((SLICES, 16, 8), tl.float32)
    for start in tl.static_range(0, K, STEP):
        a = _load(lower + start, k, start, K, STEP)
        b = _load(upper + start, k, start, K, STEP) if TALL else tl.zeros_like(a)
        if start > 0:
            w = _load(first + start, k, start, K, STEP)
            if GATED:
                u = _load(second + start, k, start, K, STEP)
        if NORM:
            if start > 0:
                g = _load(norms + start, k, start, K, STEP)
            # Of x xᵀ the diagonal: the matrix units are idle anyway.
            xs = _both(a, b, SLICES, BLOCKS, L)
            squares = tl.dot(xs, _operand(a, SLICES, BLOCKS, L), squares, input_precision="ieee")
            if TALL:
                upper_squares = tl.dot(xs, _operand(b, SLICES, BLOCKS, L), upper_squares, input_precision="ieee")
            a *= g.to(a.dtype)
            if TALL:
                b *= g.to(a.dtype)
        xs = _both(a, b, SLICES, BLOCKS, L)
        total = tl.dot(xs, _operand(w, SLICES, BLOCKS, L).to(a.dtype), total, input_precision="ieee")
        if GATED:
            second_total = tl.dot(xs, _operand(u, SLICES, BLOCKS, L).to(a.dtype), second_total, input_precision="ieee")

    m = tl.arange(0, 16)
    out = tl.sum(total, 0)  # (16, 8)
    if GATED:
        second_out = tl.sum(second_total, 0)
    if NORM:
        diagonal = tl.where(m[:, None] == i[None, :], tl.sum(squares, 0), 0.0)
        if TALL:
            diagonal += tl.where(m[:, None] == i[None, :] + 8, tl.sum(upper_squares, 0), 0.0)
        r = tl.rsqrt(tl.sum(diagonal, 1) / K + eps)[:, None]
        out *= r
        if GATED:
            second_out *= r
    if INT8:
        out *= w_scale
        if GATED:
            second_out *= u_scale
    if GATED:
        out = out * tl.sigmoid(out) * second_out
    where = y + m[:, None] * N + n[None, :]
    inside = (m < M)[:, None] & (n < N)[None, :]
    if ADD:
        out += tl.load(where, inside, other=0.0).to(tl.float32)
    tl.store(where, out.to(y.dtype.element_ty), inside)


@triton.jit
def _load(where, k, start: tl.constexpr, K: tl.constexpr, STEP: tl.constexpr):
    """Elements start + k of rows of K, zeros beyond."""
    if start + STEP <= K:
        return tl.load(where)
    return tl.load(where, start + k < K, other=0.0)


@triton.jit
def _in_order(a, SLICES: tl.constexpr, BLOCKS: tl.constexpr, L: tl.constexpr):
    """(8, SLICES, BLOCKS, 4 L) as loaded, to (SLICES, 8, BLOCKS · 4 L) as the matrix units count: they take 4 elements
    from each of 4 threads at a time."""
    a = tl.reshape(a, (8, SLICES, BLOCKS, 4, L // 4, 4))
    return tl.reshape(tl.permute(a, (1, 0, 2, 4, 3, 5)), (SLICES, 8, BLOCKS * 4 * L))


@triton.jit
def _operand(a, SLICES: tl.constexpr, BLOCKS: tl.constexpr, L: tl.constexpr):
    return tl.permute(_in_order(a, SLICES, BLOCKS, L), (0, 2, 1))


@triton.jit
def _both(a, b, SLICES: tl.constexpr, BLOCKS: tl.constexpr, L: tl.constexpr):
    """Rows 0 to 7 and 8 to 15: (SLICES, 16, BLOCKS · 4 L)."""
    both = tl.join(_in_order(a, SLICES, BLOCKS, L), _in_order(b, SLICES, BLOCKS, L))
    return tl.reshape(tl.permute(both, (0, 3, 1, 2)), (SLICES, 16, BLOCKS * 4 * L))


# --- before the first layer ------------------------------------------------------------------------------------------


def begin(
    idx: torch.Tensor, position: torch.Tensor, ahead: int, embedding: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """What the layers need of the tokens, in one launch.

    Args:
        idx: (B, T) int64; their first ones are at position + ahead, (B,) int64.
        embedding: (V, C).
        cos, sin: (positions, n) fp32, the rotary tables.

    Returns:
        (B·T, C) embeddings; (B, T) int64 positions; (B, T, n) cos and sin there.
    """
    B, T = idx.shape
    n, device = cos.size(1), idx.device
    x = torch.empty(B * T, embedding.size(1), dtype=embedding.dtype, device=device)
    positions = torch.empty(B, T, dtype=torch.int64, device=device)
    cos_here, sin_here = (torch.empty(B, T, n, dtype=cos.dtype, device=device) for _ in range(2))
    assert all(t.is_contiguous() for t in (idx, position, embedding, cos, sin))
    pdl = has_pdl(device)
    _begin[(B * T,)](
        idx, position, embedding, cos, sin, x, positions, cos_here, sin_here, ahead, T, C=x.size(1), HALF=n, PDL=pdl,
        BLOCK=triton.next_power_of_2(max(x.size(1), n)), num_warps=4, **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
    return x, positions, cos_here, sin_here


@triton.jit
def _begin(
    idx, position, embedding, cos, sin, x, positions, cos_here, sin_here, ahead, T,
    C: tl.constexpr, HALF: tl.constexpr, PDL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    at = tl.load(position + row // T) + ahead + row % T
    tl.store(positions + row, at)
    tl.store(x + row * C + i, tl.load(embedding + tl.load(idx + row) * C + i, i < C), i < C)
    tl.store(cos_here + row * HALF + i, tl.load(cos + at * HALF + i, i < HALF), i < HALF)
    tl.store(sin_here + row * HALF + i, tl.load(sin + at * HALF + i, i < HALF), i < HALF)


# --- attention over the cache ----------------------------------------------------------------------------------------


def cached_attention(
    qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, cache, n_query_groups: int, head_size: int
) -> torch.Tensor:
    """As kernels.attention.cached_attention, in one launch, or in two for more tokens than fit in a tile."""
    if head_size < 16 or head_size & (head_size - 1):
        return reference(qkv, cos, sin, cache, n_query_groups, head_size)
    B, T, width = qkv.shape
    G, D, S = n_query_groups, head_size, cache.k.size(1)
    H = width // D - 2 * G
    queries = H // G
    qkv, positions = qkv.contiguous(), cache.positions
    pdl = has_pdl(qkv.device)
    launch = {"launch_pdl": True} if pdl else {}
    row_stride = 0 if positions.dim() == 1 else T
    # The tables have T rows, or B·T.
    tables = (cos.contiguous(), sin.contiguous(), cos.numel() // cos.size(-1))
    padded_queries = triton.next_power_of_2(queries)
    block_t = max(1, min(64, max(16, triton.next_power_of_2(T * padded_queries))) // padded_queries)
    tiles = triton.cdiv(T, block_t)
    alone = tiles == 1 and T <= 16  # all new tokens are in one tile, whose programs can rotate and write them
    q = qkv
    if not alone:
        q = torch.empty(B, T, H, D, dtype=qkv.dtype, device=qkv.device)
        _rope_into_cache[(B * T, G)](
            qkv, *tables, positions, q, cache.k, cache.v, T, S, row_stride, G,
            QUERIES=queries, D=D, HALF=cos.size(-1), SLOTS=triton.next_power_of_2(queries + 2), PDL=pdl,
            num_warps=2, **launch,
        )  # fmt: skip
    rows = block_t * padded_queries
    fits = 2 * D * qkv.element_size() <= 256 and _shared_memory(qkv.device) >= LARGE_BYTES
    large = fits and alone and B * G <= 132
    block_s, splits, warps = _tile_attend(B * G * tiles, rows, S, large)
    out = torch.empty(B, T, H, D, dtype=qkv.dtype, device=qkv.device)
    partial = torch.empty((B * G * tiles, splits, rows, D + 2) if splits > 1 else 1, device=qkv.device)
    _attend[(B * G, tiles, splits)](
        q, *tables, cache.k, cache.v, positions, out, partial, cache.arrivals, T, S, row_stride, G, D**-0.5,
        QUERIES=queries, PADDED=padded_queries, D=D, HALF=cos.size(-1), ALONE=alone, BLOCK_T=block_t, BLOCK_S=block_s,
        SPLITS=splits, PDL=pdl, num_warps=warps, num_stages=2, **launch,
    )  # fmt: skip
    return out


def _tile_attend(programs: int, rows: int, S: int, large: bool) -> tuple[int, int, int]:
    """Slots of the cache to read at a time, in how many parts to read all S, so that `programs` fill the GPU, and the
    warps of each. By measurement on an H100; joining many rows costs more.

    Args:
        large: a program can have a multiprocessor to itself. What it reads at once is on its way before the kernel
            ahead has ended, and what one program reads needs no joining.
    """
    few = 1 if rows > 32 and S <= 512 else 8
    if large:
        block_s, warps, most = {16: (512, 8, 16), 32: (128, 4, 8)}.get(rows, (128, 8, few))
    else:
        block_s, warps, most = (64, 4, 16 if rows == 16 else few)
    return block_s, max(1, min(132 // programs, triton.cdiv(S, block_s), most)), warps


def _shared_memory(device: torch.device) -> int:
    """Bytes that a program can have."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin if device.type == "cuda" else 0


@triton.jit
def _rotated(source, table, inside, cos, sin, D: tl.constexpr, HALF: tl.constexpr):
    """Heads of D elements at source (R, 1), rotated by the rows table (R, 1) of the tables: (R, D) fp32. Elements
    beyond 2 · HALF stay as they are."""
    d = tl.arange(0, D)[None, :]
    rotates = inside & (d < 2 * HALF)
    c = tl.load(cos + table * HALF + d % HALF, rotates, other=1.0)
    s = tl.load(sin + table * HALF + d % HALF, rotates, other=0.0)
    s = tl.where(d < HALF, -s, s)
    partner = tl.where(d < HALF, d + HALF, d - HALF)
    a = tl.load(source + d, inside, other=0.0).to(tl.float32)
    return a * c + tl.load(source + partner, rotates, other=0.0).to(tl.float32) * s


@triton.jit
def _rope_into_cache(
    qkv, cos, sin, table_rows, positions, q, k_cache, v_cache, T, S, row_stride, G,
    QUERIES: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, SLOTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One group of one token: queries rotated to q, the key rotated and the value as it is to their place in the cache.
    Slots are the group's heads in the fused projection: queries, key, value."""
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    b, t = row // T, row % T
    slot = tl.arange(0, SLOTS)[:, None]
    d = tl.arange(0, D)[None, :]
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    source = qkv + (row * G + group) * (QUERIES + 2) * D + slot * D
    a = _rotated(source, row % table_rows + slot * 0, slot <= QUERIES, cos, sin, D, HALF).to(q.dtype.element_ty)
    tl.store(q + (row * G + group) * QUERIES * D + slot * D + d, a, slot < QUERIES)
    where = ((b * S + tl.load(positions + b * row_stride + t)) * G + group) * D + d + slot * 0
    tl.store(k_cache + where, a, slot == QUERIES)
    value = slot == QUERIES + 1
    tl.store(v_cache + where, tl.load(source + d, value, other=0.0), value)


@triton.jit
def _see(queries, keys, values, s, end, position, scale, largest, total, acc):
    """Online softmax: the next block of the cache, slots s (BLOCK_S,) of which those below `end` hold something."""
    scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * (scale * 1.4426950408889634)
    seen = (s[None, :] <= position[:, None]) & (s < end)[None, :]
    scores = tl.where(seen, scores, -1e30)
    new = tl.maximum(largest, tl.max(scores, 1))
    p = tl.where(seen, tl.exp2(scores - new[:, None]), 0.0)
    shrink = tl.exp2(largest - new)
    total = total * shrink + tl.sum(p, 1)
    acc = tl.dot(p.to(values.dtype), values, acc * shrink[:, None], input_precision="ieee")
    return new, total, acc


@triton.jit
def _attend(
    q, cos, sin, table_rows, k_cache, v_cache, positions, out, partial, arrivals, T, S, row_stride, G, scale,
    QUERIES: tl.constexpr, PADDED: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, ALONE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, SPLITS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A tile of tokens of one row of the batch, all queries of one group together: its keys and values are read once.

    Online softmax over blocks of the cache up to the last token's position (Dao et al. 2022, arXiv:2205.14135). Where
    SPLITS programs share a tile, each takes every SPLITS-th block, and the one that finishes last joins their results.

    ALONE: q is the fused projection, not rotated yet, and its own keys and values are still to be written to the cache:
    the tile holds all new tokens, and the first of its programs sees to that.
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
    base = b.to(tl.int64) * S * G * D + group * D
    s = split * BLOCK_S + tl.arange(0, BLOCK_S)
    if ALONE:
        # What is in the cache already was written, and the positions too, before the kernel ahead began: the first keys
        # and values are read while that one ends.
        end = tl.load(positions + b * row_stride).to(tl.int32)
        where = base + s[:, None] * (G * D) + d[None, :]
        keys = tl.load(k_cache + where, (s < end)[:, None], other=0.0)
        values = tl.load(v_cache + where, (s < end)[:, None], other=0.0)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    position = tl.load(positions + b * row_stride + t, t < T, other=-1).to(tl.int32)
    row = ((b.to(tl.int64) * T + t) * G + group) * QUERIES + h
    heads = row[:, None] * D + d[None, :]
    largest = tl.full((ROWS,), -1e30, tl.float32)  # finite: -inf - -inf would be NaN in rows that see nothing here
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, D), tl.float32)
    if ALONE:
        token = b * T + t
        source = q + (token.to(tl.int64) * G + group) * (QUERIES + 2) * D + h * D
        dtype = out.dtype.element_ty
        queries = _rotated(source[:, None], (token % table_rows)[:, None], inside[:, None], cos, sin, D, HALF).to(dtype)
        j = tl.arange(0, 16)[:, None]
        own = b * T + j
        source = q + (own.to(tl.int64) * G + group) * (QUERIES + 2) * D + QUERIES * D
        own_keys = _rotated(source, own % table_rows, j < T, cos, sin, D, HALF).to(dtype)
        own_values = tl.load(source + D + d[None, :], j < T, other=0.0)
        place = base + tl.load(positions + b * row_stride + j, j < T, other=0) * (G * D) + d[None, :]
        tl.store(k_cache + place, own_keys, (j < T) & (split == 0))
        tl.store(v_cache + place, own_values, (j < T) & (split == 0))
        visible = (tl.trans(j) <= t[:, None]) & (tl.trans(j) < T) & (split == 0)
        own_scores = tl.dot(queries, tl.trans(own_keys), input_precision="ieee") * (scale * 1.4426950408889634)
        own_scores = tl.where(visible, own_scores, -1e30)
        largest = tl.maximum(largest, tl.max(own_scores, 1))
        own_p = tl.where(visible, tl.exp2(own_scores - largest[:, None]), 0.0)
        total = tl.sum(own_p, 1)
        acc = tl.dot(own_p.to(dtype), own_values, acc, input_precision="ieee")
        largest, total, acc = _see(queries, keys, values, s, end, position, scale, largest, total, acc)
    else:
        end = tl.max(position, 0) + 1
        queries = tl.load(q + heads, inside[:, None], other=0.0)
    for start in range((split + SPLITS * ALONE) * BLOCK_S, end, SPLITS * BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        where = base + s[:, None] * (G * D) + d[None, :]
        keys = tl.load(k_cache + where, (s < end)[:, None], other=0.0)
        values = tl.load(v_cache + where, (s < end)[:, None], other=0.0)
        largest, total, acc = _see(queries, keys, values, s, end, position, scale, largest, total, acc)

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
            for i in tl.static_range(SPLITS):  # unrolled, so that all are on their way at once
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


# --- choosing tokens -------------------------------------------------------------------------------------------------


def draw(
    logits: torch.Tensor, temperature: float, noise: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """An id for each row, in one launch.

    Args:
        logits: (R, V), each row contiguous.
        temperature: 0 takes the largest; more draws from softmax(logits / temperature).
        noise: (R, V) exponentially distributed, to draw with: of V clocks of rates p the first to ring is i with
            probability p_i. None: the largest is taken at any temperature.

    Returns:
        (R,) int64 ids; (R,) fp32 log of the sum of exp(logits / temperature), undefined for temperature 0.
    """
    ids = torch.empty(logits.size(0), dtype=torch.int64, device=logits.device)
    log_sum = torch.empty(logits.size(0), dtype=torch.float32, device=logits.device)
    if temperature == 0:
        _launch_draw(logits, None, 1.0, ids)
    else:
        _launch_draw(logits, noise, 1 / temperature, ids, log_sum=log_sum)
    return ids, log_sum


def move(
    logits: torch.Tensor,
    noise: torch.Tensor | None,
    inverse_temperature: torch.Tensor,
    token: torch.Tensor,
    position: torch.Tensor,
) -> None:
    """Draw into token (R,), as `draw` does, and raise position (R,).

    Args:
        inverse_temperature: (1,) fp32: a graph reads it anew each time.
    """
    _launch_draw(logits, noise, inverse_temperature, token, position=position)


def _launch_draw(logits, noise, inverse_temperature, ids, position=None, log_sum=None) -> None:
    R, V = logits.shape
    assert logits.stride(1) == 1 and (noise is None or noise.is_contiguous())
    pdl = has_pdl(logits.device)
    _draw[(R,)](
        logits, logits if noise is None else noise, ids, ids if position is None else position,
        logits if log_sum is None else log_sum, logits.stride(0), inverse_temperature, V=V, SUM=log_sum is not None,
        MOVE=position is not None, NOISE=noise is not None, PDL=pdl,
        BLOCK=min(8192, triton.next_power_of_2(V)), num_warps=32, **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip


def accept(
    p: torch.Tensor,
    p_log_sum: torch.Tensor,
    p_largest: torch.Tensor,
    q: torch.Tensor | None,
    q_log_sum: torch.Tensor | None,
    guesses: torch.Tensor,
    temperature: float,
    uniform: torch.Tensor,
    noise: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As speculative.accept, from logits, in one launch.

    Args:
        p: (B, k + 1, V) logits of the target, and with them as `draw` gives them p_log_sum, and for temperature 0
            p_largest, (B, k + 1).
        q: (B, k, V) logits of the draft, with q_log_sum; None: it was sure of its guesses.
        guesses, uniform, noise: (B, k), (B, k) and (B, V) as there.
    """
    B, k = guesses.shape
    V = p.size(2)
    assert guesses.stride(1) == 1 and p.stride(2) == 1 and (q is None or (q.stride(2) == 1 and q.size(2) == V))
    kept, token = (torch.empty(B, dtype=torch.int64, device=p.device) for _ in range(2))
    pdl = has_pdl(p.device)
    _accept[(B,)](
        p, p_log_sum, p_largest, p if q is None else q, p_log_sum if q is None else q_log_sum, guesses, uniform, noise,
        kept, token, k, guesses.stride(0), *p.stride()[:2], *((0, 0) if q is None else q.stride()[:2]),
        1 / (temperature or 1), V=V, GREEDY=temperature == 0, SURE=q is None, GUESSES=16, PDL=pdl,
        BLOCK=min(8192, triton.next_power_of_2(V)), num_warps=32, **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
    return kept, token


def settle(
    idx: torch.Tensor,
    kept: torch.Tensor,
    token: torch.Tensor,
    before: torch.Tensor,
    last: torch.Tensor,
    position: torch.Tensor,
) -> torch.Tensor:
    """The end of a pass of speculative decoding, in one launch: move the last two tokens of each row and the position
    of the last, (B,) int64, behind what stays.

    Args:
        idx: (B, k + 1) int64, `last` and the guesses, of which `kept` (B,) stay, followed by `token` (B,).

    Returns:
        (B, k + 2) int64: kept, the guesses, token.
    """
    (B, T), pdl = idx.shape, has_pdl(idx.device)
    result = torch.empty(B, T + 1, dtype=torch.int64, device=idx.device)
    assert idx.is_contiguous()
    launch = {"launch_pdl": True} if pdl else {}
    _settle[(B,)](idx, kept, token, before, last, position, result, T, PDL=pdl, BLOCK=16, num_warps=1, **launch)
    return result


@triton.jit
def _settle(idx, kept, token, before, last, position, result, T, PDL: tl.constexpr, BLOCK: tl.constexpr):
    b = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, BLOCK)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    n, new = tl.load(kept + b), tl.load(token + b)
    tl.store(result + b * (T + 1) + j, tl.where(j == 0, n, tl.load(idx + b * T + j, j < T, other=0)), j < T)
    tl.store(result + b * (T + 1) + T, new)
    tl.store(before + b, tl.load(idx + b * T + n))
    tl.store(last + b, new)  # after idx was read, which without guesses is `last` itself
    tl.store(position + b, tl.load(position + b) + n + 1)


@triton.jit
def _draw(
    logits, noise, ids, position, log_sum, stride, inverse_temperature,
    V: tl.constexpr, SUM: tl.constexpr, MOVE: tl.constexpr, NOISE: tl.constexpr, PDL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """argmax of p / noise as that of log p - log noise; so p needs no normalising first."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    factor = tl.load(inverse_temperature) if MOVE else inverse_temperature
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    best = tl.full((BLOCK,), -float("inf"), tl.float32)
    where = i
    largest = best
    for start in tl.static_range(0, V, BLOCK):  # unrolled, so that many loads are on their way at once
        inside = start + i < V
        score = tl.load(logits + row * stride + start + i, inside, other=-float("inf")).to(tl.float32)
        score *= factor
        if SUM:
            largest = tl.maximum(largest, score)
        if NOISE:
            score -= tl.log(tl.load(noise + row * V + start + i, inside, other=1.0))
        where = tl.where(score > best, start + i, where)
        best = tl.maximum(best, score)
    tl.store(ids + row, _first_largest(best, where, V).to(tl.int64))
    if MOVE:
        tl.store(position + row, tl.load(position + row) + 1)
    if SUM:
        m = tl.max(largest, 0)
        total = tl.zeros((BLOCK,), tl.float32)
        for start in tl.static_range(0, V, BLOCK):
            score = tl.load(logits + row * stride + start + i, start + i < V, other=-float("inf")).to(tl.float32)
            total += tl.exp(score * factor - m)
        tl.store(log_sum + row, m + tl.log(tl.sum(total, 0)))


@triton.jit
def _first_largest(values, where, V):
    return tl.min(tl.where(values == tl.max(values, 0), where, V), 0)


@triton.jit
def _accept(
    p, p_log_sum, p_largest, q, q_log_sum, guesses, uniform, noise, kept_out, token_out,
    k, guesses_row, p_batch, p_row, q_batch, q_row, inverse_temperature,
    V: tl.constexpr, GREEDY: tl.constexpr, SURE: tl.constexpr, GUESSES: tl.constexpr, PDL: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, GUESSES)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    guess = tl.load(guesses + b * guesses_row + j, j < k, other=0)
    if GREEDY:
        fits = guess == tl.load(p_largest + b * (k + 1) + j, j < k, other=0)
    else:
        at = tl.load(p + b * p_batch + j * p_row + guess, j < k, other=0.0).to(tl.float32)
        p_guess = tl.exp(at * inverse_temperature - tl.load(p_log_sum + b * (k + 1) + j, j < k, other=0.0))
        q_guess = tl.full((GUESSES,), 1.0, tl.float32)
        if not SURE:
            at = tl.load(q + b * q_batch + j * q_row + guess, j < k, other=0.0).to(tl.float32)
            q_guess = tl.exp(at * inverse_temperature - tl.load(q_log_sum + b * k + j, j < k, other=0.0))
        fits = tl.load(uniform + b * k + j, j < k, other=0.0) * q_guess < p_guess
    kept = tl.min(tl.where(fits, k, tl.minimum(j, k)), 0)
    tl.store(kept_out + b, kept.to(tl.int64))
    if GREEDY:
        tl.store(token_out + b, tl.load(p_largest + b * (k + 1) + kept))
    else:
        i = tl.arange(0, BLOCK)
        best = tl.full((BLOCK,), -1.0, tl.float32)
        where = i
        log_sum = tl.load(p_log_sum + b * (k + 1) + kept)
        wrong = kept < k
        if SURE:
            taken = tl.load(guesses + b * guesses_row + kept, wrong, other=-1)
        else:
            q_log = tl.load(q_log_sum + b * k + kept, wrong, other=0.0)
        for start in tl.static_range(0, V, BLOCK):
            inside = start + i < V
            mine = tl.load(p + b * p_batch + kept * p_row + start + i, inside, other=-float("inf")).to(tl.float32)
            rest = tl.exp(mine * inverse_temperature - log_sum)
            if SURE:
                rest = tl.where(start + i == taken, 0.0, rest)
            else:
                inside_q = inside & wrong
                his = tl.load(q + b * q_batch + kept * q_row + start + i, inside_q, other=-float("inf")).to(tl.float32)
                rest = tl.maximum(rest - tl.exp(his * inverse_temperature - q_log), 0.0)
            score = rest / tl.load(noise + b * V + start + i, inside, other=1.0)
            where = tl.where(score > best, start + i, where)
            best = tl.maximum(best, score)
        tl.store(token_out + b, _first_largest(best, where, V).to(tl.int64))
