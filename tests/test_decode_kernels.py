"""The decoding kernels against plain PyTorch; without a GPU, in Triton's interpreter."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from lit_gpt import Config
from lit_gpt.generate import probabilities
from lit_gpt.kernels import rmsnorm
from lit_gpt.kernels.attention import cached_attention
from lit_gpt.kernels.rope import rope_tables
from lit_gpt.model import KVCache
from lit_gpt.speculative import accept

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Largest error allowed, relative to the largest element of the fp32 reference.
# (The interpreter multiplies bf16 matrices as if their bits were integers.)
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16 if DEVICE.type == "cuda" else torch.float16: 1.2e-2}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda d: str(d).removeprefix("torch."))


@pytest.fixture
def decode(interpreted):
    from lit_gpt.kernels import decode

    return decode


def randn(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def assert_close(got, want, dtype):
    error = (got.float() - want).abs().max() / want.abs().max()
    assert error < TOLERANCE[dtype], f"{error:.1e}"


@DTYPES
@pytest.mark.parametrize(
    "M, N, K, int8",
    [(1, 37, 100, False), (1, 16, 2100, True), (2, 37, 100, True), (5, 20, 300, False), (16, 20, 64, False)],
)
def test_linear_and_swiglu(decode, M, N, K, int8, dtype):
    x, norm, add_to = randn(M, K, dtype=dtype), 1 + 0.3 * randn(K, dtype=dtype, seed=1), randn(M, N, dtype=dtype)
    weight, up = (randn(N, K, dtype=dtype, seed=s) * K**-0.5 for s in (2, 3))
    exact, exact_up, scale, up_scale = weight.float(), up.float(), None, None
    if int8:
        weight, up = ((100 * w / w.abs().max()).round().to(torch.int8) for w in (weight, up))
        scale, up_scale = 0.01 + randn(N, seed=4).abs() / 100, 0.01 + randn(N, seed=5).abs() / 100
        exact, exact_up = weight.float() * scale[:, None], up.float() * up_scale[:, None]
    x32 = x.float()
    assert_close(decode.linear(x, weight, scale), x32 @ exact.T, dtype)
    normed = rmsnorm.rms_norm(x32, norm.float(), 1e-5)
    got = decode.linear(x, weight, scale, norm=norm, eps=1e-5, add_to=add_to.clone())
    assert_close(got, normed @ exact.T + add_to.float(), dtype)
    got = decode.swiglu(x, weight, up, scale, up_scale, norm=norm, eps=1e-5)
    assert_close(got, F.silu(normed @ exact.T) * (normed @ exact_up.T), dtype)


@pytest.mark.slow
@DTYPES
@pytest.mark.parametrize(
    "B, T, H, G, D, rotary, S, lengths, large",
    [
        (1, 1, 4, 2, 16, 1.0, 300, [0], False),  # the first token of all
        (1, 1, 8, 1, 32, 1.0, 600, [577], False),  # several splits
        (1, 1, 8, 1, 32, 1.0, 600, [577], True),
        (2, 3, 6, 2, 16, 1.0, 40, [0, 30], True),  # rows at different places; 3 queries a group
        (3, 1, 5, 5, 16, 0.25, 200, [7, 150, 64], True),
        (1, 40, 4, 2, 16, 1.0, 80, [30], False),  # a chunk of a prompt behind others
    ],
)
def test_cached_attention(decode, monkeypatch, B, T, H, G, D, rotary, S, lengths, large, dtype):
    """In small parts, and in large ones where a GPU has the memory for them."""
    if large and DEVICE.type == "cuda" and decode._shared_memory(DEVICE) < decode.LARGE_BYTES:
        pytest.skip("large parts do not fit into this GPU")
    if not large or DEVICE.type == "cpu":
        monkeypatch.setattr(decode, "_shared_memory", lambda device: decode.LARGE_BYTES if large else 0)
    c = Config(
        n_layer=1, n_embd=H * D, n_head=H, n_query_groups=G, rotary_percentage=rotary, block_size=S, vocab_size=64
    )
    caches = [KVCache(c, B, S, DEVICE, d) for d in (dtype, torch.float32)]
    for name in ("k", "v"):
        old = randn(*getattr(caches[0], name).shape, dtype=dtype, seed=1)  # also beyond the positions: not to be seen
        for cache in caches:
            getattr(cache, name).copy_(old)
    positions = torch.tensor(lengths, device=DEVICE)[:, None] + torch.arange(T, device=DEVICE)  # (B, T)
    if B == 1:
        positions = positions[0]
    cos, sin = (table[positions] for table in rope_tables(c, S, DEVICE))
    qkv = randn(B, T, c.qkv_size, dtype=dtype)
    for _ in range(2):  # the counters of the splits are as they were
        got = decode.cached_attention(qkv, cos, sin, caches[0].layer(0, positions), G, D)
    want = cached_attention(qkv.float(), cos, sin, caches[1].layer(0, positions), G, D)
    assert_close(got, want, dtype)
    assert_close(caches[0].k, caches[1].k, dtype)
    assert_close(caches[0].v, caches[1].v, dtype)
    assert not caches[0].arrivals.any()


@DTYPES
def test_begin(decode, dtype):
    idx, position = torch.tensor([[3, 0, 8], [5, 5, 1]], device=DEVICE), torch.tensor([2, 7], device=DEVICE)
    embedding, tables = randn(9, 20, dtype=dtype), (randn(12, 4), randn(12, 4, seed=1))
    x, positions, cos, sin = decode.begin(idx, position, 1, embedding, *tables)
    assert positions.tolist() == [[3, 4, 5], [8, 9, 10]]
    assert torch.equal(x, embedding[idx.flatten()])
    assert torch.equal(cos, tables[0][positions]) and torch.equal(sin, tables[1][positions])


def test_draw_equals_the_first_of_the_largest(decode):
    logits = randn(3, 130)[:, :100]  # rows that are not next to each other
    logits[0, 40] = logits[0, 70] = 9
    noise = torch.empty(3, 100, device=DEVICE).exponential_(generator=torch.Generator(DEVICE).manual_seed(0))
    assert decode.draw(logits, 0.0)[0].tolist() == [40, *logits[1:].argmax(1).tolist()]
    ids, log_sum = decode.draw(logits, 0.7, noise)
    assert torch.equal(ids, ((logits / 0.7).softmax(1) / noise).argmax(1))
    assert (log_sum - (logits / 0.7).logsumexp(1)).abs().max() < 1e-5
    token, position = torch.zeros_like(ids), torch.arange(3, device=DEVICE)
    decode.move(logits, noise, torch.tensor([1 / 0.7], device=DEVICE), token, position)
    assert torch.equal(token, ids) and position.tolist() == [1, 2, 3]
    decode.move(logits, None, torch.ones(1, device=DEVICE), token, position)
    assert torch.equal(token, decode.draw(logits, 0.0)[0]) and position.tolist() == [2, 3, 4]


@pytest.mark.parametrize("sure", [True, False], ids=["n-grams", "draft"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_accept_equals_its_reference(decode, temperature, sure):
    B, k, V = 24, 3, 50
    p, q = 2 * randn(B, k + 1, V), 2 * randn(B, k, V)
    q += p[:, :k]
    generator = torch.Generator(DEVICE).manual_seed(0)
    noise = torch.empty(B, V, device=DEVICE).exponential_(generator=generator)
    uniform = torch.rand(B, k, generator=generator, device=DEVICE)
    guesses = torch.randint(V, (B, k), generator=generator, device=DEVICE)
    likeliest = B if temperature == 0 and not sure else 16  # what no draft would guess has no meaning for it
    guesses[:likeliest] = q[:likeliest].argmax(2)
    guesses[:4] = p[:4, :k].argmax(2)
    largest, p_log_sum = (t.view(B, k + 1) for t in decode.draw(p.flatten(0, 1), temperature))
    _, q_log_sum = decode.draw(q.flatten(0, 1), temperature)
    q_given = (None, None) if sure else (q, q_log_sum.view(B, k))
    got = decode.accept(p, p_log_sum, largest, *q_given, guesses, temperature, uniform, noise)
    one_hot = torch.zeros_like(q).scatter_(2, guesses[..., None], 1.0)
    q_distribution = one_hot if sure else probabilities(q, temperature)
    want = accept(probabilities(p, temperature), q_distribution, guesses, uniform, noise)
    assert [t.tolist() for t in got] == [t.tolist() for t in want]
    assert {0, k} <= set(want[0].tolist())


def test_settle(decode):
    idx = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 10]], device=DEVICE)
    kept, token = torch.tensor([0, 2], device=DEVICE), torch.tensor([20, 21], device=DEVICE)
    before, last, position = (torch.tensor(x, device=DEVICE) for x in ([1, 2], [3, 7], [11, 12]))
    result = decode.settle(idx, kept, token, before, last, position)
    assert result.tolist() == [[0, 4, 5, 6, 20], [2, 8, 9, 10, 21]]
    assert [t.tolist() for t in (before, last, position)] == [[3, 9], [20, 21], [12, 15]]
    # Without guesses what it reads, `last`, is what it writes.
    result = decode.settle(last[:, None], torch.zeros_like(kept), token + 10, before, last, position)
    assert result.tolist() == [[0, 30], [0, 31]]
    assert [t.tolist() for t in (before, last, position)] == [[20, 21], [30, 31], [13, 16]]


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lit_gpt.kernels import decode

SIZES = dict(
    PDL=True, K=2048, NORM=True, ADD=True, BLOCK_N=16, BLOCK_K=256, BLOCK=2048, QUERIES=8, PADDED=8, D=64, HALF=32,
    SLOTS=16, BLOCK_T=2, BLOCK_S=64, SLICES=8, BLOCKS=2, C=2048, V=32000, GUESSES=16
)
FLAGS = ("GATED", "INT8", "TALL", "ALONE", "SUM", "MOVE", "NOISE", "GREEDY", "SURE")
INTEGERS = "M N T S G k ahead row_stride table_rows stride guesses_row p_batch p_row q_batch q_row".split()
FLOATS = ("cos", "sin", "cos_here", "sin_here", "partial", "scale", "up_scale", "noise", "uniform", "log_sum")
FLOATS += ("p_log_sum", "q_log_sum")
LONGS = "idx position positions ids guesses p_largest kept_out token_out kept token before last result".split()
TYPES = dict(eps="fp32", inverse_temperature="fp32", arrivals="*i32") | dict.fromkeys(INTEGERS, "i32")
TYPES |= dict.fromkeys(FLOATS, "*fp32") | dict.fromkeys(LONGS, "*i64")
names = "_linear_one_row _linear_few_rows _begin _rope_into_cache _attend _draw _accept _settle".split()
for kernel in (getattr(decode, name) for name in names):
    for flag in (True, False):
        sizes = {**SIZES, **dict.fromkeys(FLAGS, flag), "SPLITS": 1 + 7 * flag}
        types = {**TYPES, "weight": "*i8" if flag else "*bf16", "up": "*i8" if flag else "*bf16"}
        if kernel is decode._attend:
            types["scale"] = "fp32"
        if kernel is decode._draw and flag:
            types["inverse_temperature"] = "*fp32"
        signature = {n: "constexpr" if n in sizes else types.get(n, "*bf16") for n in kernel.arg_names}
        constants = {n: sizes[n] for n in kernel.arg_names if n in sizes}
        triton.compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", 90, 32))
print(len(names), "kernels")
"""


@pytest.mark.long
def test_every_kernel_compiles_for_a_gpu_that_is_not_here():
    """The interpreter takes any Python; the compiler's language is narrower. It needs no GPU."""
    pytest.importorskip("triton", reason="the decoding kernels need triton")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=env)
    assert done.stdout == "8 kernels\n", done.stderr[-2000:]
