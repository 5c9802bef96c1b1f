"""The decoding kernels against plain PyTorch; without a GPU, in Triton's interpreter."""

import pytest
import torch
import torch.nn.functional as F

from lit_gpt import Config
from lit_gpt.kernels import rmsnorm
from lit_gpt.kernels.attention import cached_attention
from lit_gpt.kernels.rope import rope_tables
from lit_gpt.model import KVCache

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
@pytest.mark.parametrize("M, N, K", [(1, 37, 100), (1, 64, 1500), (2, 37, 100), (5, 64, 300), (8, 20, 64)])
@pytest.mark.parametrize("int8", [False, True], ids=["", "int8"])
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


@DTYPES
@pytest.mark.parametrize(
    "B, T, H, G, D, rotary, S, lengths",
    [
        (1, 1, 4, 2, 16, 1.0, 300, [0]),  # the first token of all
        (1, 1, 8, 1, 32, 1.0, 600, [577]),  # several splits
        (2, 3, 6, 2, 16, 1.0, 40, [0, 30]),  # rows at different places; 3 queries a group
        (3, 1, 5, 5, 16, 0.25, 200, [7, 150, 64]),
        (1, 70, 4, 2, 16, 1.0, 200, [100]),  # a chunk of a prompt behind others
    ],
)
def test_cached_attention(decode, B, T, H, G, D, rotary, S, lengths, dtype):
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
