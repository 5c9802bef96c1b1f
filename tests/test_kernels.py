"""Each fast kernel against the reference in fp32, forward and backward, on odd shapes; and what selects them.

Without a GPU, Triton's interpreter runs the same kernels on the CPU.
"""

import os
import subprocess
import sys
import textwrap
import types

import pytest
import torch
import torch.nn.functional as F

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported: by the first test that needs it

from lit_gpt import kernels
from lit_gpt.config import Config
from lit_gpt.kernels import (
    IGNORE_INDEX,
    ComputeWeights,
    cross_entropy,
    embedding,
    linear,
    rmsnorm,
    rope,
    select_kernels,
    swiglu,
)
from lit_gpt.kernels.attention import NAMES, attention, document_mask, load, usable
from lit_gpt.model import GPT

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Largest error allowed, relative to the largest element of the fp32 reference.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1.2e-2}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda d: str(d).removeprefix("torch."))


@pytest.fixture
def fused():
    pytest.importorskip("triton", reason="the fused kernels need triton")
    from triton import knobs

    if DEVICE.type == "cpu" and not knobs.runtime.interpret:
        pytest.skip("triton was imported without TRITON_INTERPRET=1")
    from lit_gpt.kernels import fused

    return fused


def randn(*shape, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randn(shape, generator=generator) * scale).to(DEVICE)


def results(function, inputs, dtype, seeds=(11, 12, 13)):
    """Outputs of function(*inputs in dtype), then the gradients of its floating-point inputs for random ones of the
    outputs, which are the same whatever the dtype."""
    inputs = [
        x.to(dtype).detach().requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for x in inputs
    ]
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grads = [randn(*o.shape, seed=s).to(dtype).to(o.dtype) for o, s in zip(outputs, seeds, strict=False)]
    torch.autograd.backward(outputs, grads)
    return [o.detach() for o in outputs] + [x.grad for x in inputs if getattr(x, "requires_grad", False)]


def assert_matches(fast, reference, inputs, dtype):
    """fast in dtype against reference in fp32 on the same (rounded) inputs."""
    rounded = [x.to(dtype).float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs]
    for i, (ours, exact) in enumerate(
        zip(results(fast, inputs, dtype), results(reference, rounded, torch.float32), strict=True)
    ):
        assert ours.shape == exact.shape
        error = (ours.float() - exact).abs().max() / exact.abs().max().clamp(min=1e-6)
        assert error < TOLERANCE[dtype], f"result {i}: error {error:.2e}"


@DTYPES
@pytest.mark.parametrize("shape", [(1, 8), (3, 5, 100), (2, 7, 256)], ids=str)
def test_rms_norm(fused, shape, dtype):
    inputs = [randn(*shape), 1 + 0.3 * randn(shape[-1])]
    assert_matches(lambda x, w: fused.rms_norm(x, w, 1e-5), lambda x, w: rmsnorm.rms_norm(x, w, 1e-5), inputs, dtype)
    inputs.insert(1, randn(*shape, seed=1))
    assert_matches(
        lambda x, d, w: fused.add_rms_norm(x, d, w, 1e-5),
        lambda x, d, w: rmsnorm.add_rms_norm(x, d, w, 1e-5),
        inputs,
        dtype,
    )


def test_rms_norm_alone_of_its_two_outputs_may_be_used(fused):
    x, delta, w = (randn(3, 16, seed=s).requires_grad_() for s in (0, 1, 2))
    fused.add_rms_norm(x, delta, w[0], 1e-5)[1].sum().backward()
    ours = x.grad.clone()
    x.grad = None
    rmsnorm.add_rms_norm(x, delta, w[0], 1e-5)[1].sum().backward()
    torch.testing.assert_close(ours, x.grad)
    x.grad = delta.grad = None
    fused.add_rms_norm(x, delta, w[0], 1e-5)[0].sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x)) and torch.equal(delta.grad, x.grad)


@DTYPES
@pytest.mark.parametrize(
    "B, T, H, G, D, R",
    [(2, 5, 4, 2, 16, 16), (1, 3, 6, 1, 12, 12), (2, 9, 3, 3, 16, 4)],
    ids=["gqa", "mqa, head of 12", "a quarter rotates"],
)
def test_split_rope(fused, B, T, H, G, D, R, dtype):
    cos, sin = rope.rope_tables(Config(head_size=D, rotary_percentage=R / D), T, DEVICE)
    qkv = randn(B, T, (H + 2 * G) * D)
    assert_matches(
        lambda x: fused.split_rope(x, cos, sin, G, D), lambda x: rope.split_rope(x, cos, sin, G, D), [qkv], dtype
    )
    positions = torch.randint(T, (B, T), device=DEVICE)  # rows of the batch at different places
    assert_matches(
        lambda x: fused.split_rope(x, cos[positions], sin[positions], G, D),
        lambda x: rope.split_rope(x, cos[positions], sin[positions], G, D),
        [qkv],
        dtype,
    )


@DTYPES
@pytest.mark.parametrize("shape", [(1, 2), (3, 5, 88), (2, 1500)], ids=str)
def test_swiglu(fused, shape, dtype):
    width = shape[-1] // 2

    class Fast(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return fused.swiglu(x)

        @staticmethod
        def backward(ctx, dy):
            (x,) = ctx.saved_tensors
            dx, h = fused.swiglu_backward(x, dy.contiguous())
            assert torch.equal(h, fused.swiglu(x))
            return dx

    assert_matches(Fast.apply, lambda x: swiglu.swiglu(*x.split(width, -1)), [randn(*shape, scale=2)], dtype)


@pytest.mark.gpu
def test_swiglu_of_more_than_2_to_the_31_elements(fused):
    gate_up = torch.randn(3, 2**30, dtype=torch.bfloat16, device=DEVICE)
    assert torch.equal(fused.swiglu(gate_up)[2], fused.swiglu(gate_up[2]))


@DTYPES
def test_swiglu_mlp(fused, dtype):
    inputs = [randn(2, 7, 24), randn(40, 24), randn(40, 24, seed=1), randn(24, 40)]
    assert_matches(fused.swiglu_mlp, swiglu.swiglu_mlp, inputs, dtype)


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lit_gpt.kernels import fused

SIZES = dict(ADD=True, BLOCK=2048, N=528, G=4, D=80, QUERIES=8, HALF=32, BLOCK_N=64, BLOCK_H=32, REST=16, BLOCK_C=16)
SIZES |= dict(WIDTH=5632, LONG=True, V=32000, IGNORE=-100)
SCALARS = dict(eps="fp32", z_loss="fp32", **dict.fromkeys(("C", "n", "n_rows", "n_heads", "table_rows"), "i32"))
POINTERS = dict.fromkeys(("weight", "d_weight", "cos", "sin", "loss", "parts", "out"), "*fp32") | dict(targets="*i64")
kernels = [k for k in vars(fused).values() if isinstance(k, triton.JITFunction)]
for kernel in kernels:
    for flag in (True, False):
        sizes = {name: {"GRAD": flag, "BACKWARD": flag, **SIZES}.get(name) for name in kernel.arg_names}
        signature = {
            name: "constexpr" if sizes[name] is not None else SCALARS.get(name) or POINTERS.get(name, "*bf16")
            for name in kernel.arg_names
        }
        constants = {name: size for name, size in sizes.items() if size is not None}
        triton.compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", 90, 32))
print(len(kernels), "kernels")
"""


@pytest.mark.slow
def test_every_kernel_compiles_for_a_gpu_that_is_not_here():
    """The interpreter takes any Python; the compiler's language is narrower. It needs no GPU."""
    pytest.importorskip("triton", reason="the fused kernels need triton")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=env)
    assert done.stdout == "7 kernels\n", done.stderr[-2000:]


# --- the loss --------------------------------------------------------------------------------------------------------


def exact_loss(hidden, weight, targets, reduction="sum", z_loss=0.0):
    logits = hidden @ weight.T
    loss = F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="none")
    loss = loss + z_loss * (logits.logsumexp(-1).square() * (targets != IGNORE_INDEX))
    return loss.sum() if reduction == "sum" else loss


@pytest.fixture(params=["reference", "fused"])
def loss_function(request):
    return (
        cross_entropy.linear_cross_entropy
        if request.param == "reference"
        else (request.getfixturevalue("fused").linear_cross_entropy)
    )


@DTYPES
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize("N, C, V", [(1, 8, 3), (13, 16, 97), (5, 8, 20000)], ids=str)
def test_linear_cross_entropy(loss_function, monkeypatch, N, C, V, z_loss, dtype):
    monkeypatch.setattr(cross_entropy, "CHUNK", 5)  # several chunks, and an incomplete one
    targets = torch.randint(V, (N,), device=DEVICE)
    targets[N // 2 :: 4] = IGNORE_INDEX
    if N == 1:
        targets[:] = V - 1
    # Small logits: rounded to bf16, those of 8 would change a probability by more than is allowed.
    inputs = [randn(N, C) / 4, randn(V, C, seed=3), targets, "sum", z_loss]
    assert_matches(loss_function, exact_loss, inputs, dtype)
    with torch.no_grad():
        inputs[3] = "none"
        rounded = [x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs]
        ours, exact = loss_function(*rounded), exact_loss(rounded[0].float(), rounded[1].float(), *rounded[2:])
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, exact, rtol=TOLERANCE[dtype], atol=4 * TOLERANCE[dtype])
        torch.testing.assert_close(ours.sum(), loss_function(*rounded[:3], "sum", z_loss))


def test_per_token_loss_has_a_gradient(loss_function):
    inputs = [randn(6, 8), randn(30, 8), torch.arange(6, device=DEVICE), "none"]
    assert_matches(loss_function, exact_loss, inputs, torch.float32)


@pytest.mark.parametrize("logit", [1e4, -1e4])
def test_extreme_logits_stay_finite(loss_function, logit):
    hidden, weight = torch.full((2, 1), logit, device=DEVICE), torch.tensor([[1.0], [0.5], [0.0]], device=DEVICE)
    inputs = [hidden, weight, torch.tensor([0, 2], device=DEVICE)]
    assert_matches(loss_function, exact_loss, inputs, torch.float32)


def test_targets_may_have_a_stride_and_must_be_rows_of_the_head(fused):
    hidden, weight, targets = randn(4, 8), randn(10, 8), torch.arange(8, device=DEVICE)
    exact = cross_entropy.linear_cross_entropy(hidden, weight, targets[::2], "none")
    torch.testing.assert_close(fused.linear_cross_entropy(hidden, weight, targets[::2], "none"), exact)
    hidden.requires_grad_()
    for wrong in (10, -1, 100_000):  # which the reference refuses
        hidden.grad = None
        loss = fused.linear_cross_entropy(hidden, weight, torch.tensor([0, wrong, 1, 2], device=DEVICE))
        loss.backward()
        assert loss.isnan() and hidden.grad[1].isnan().all() and not hidden.grad[[0, 2, 3]].isnan().any()


def test_a_frozen_head_gets_no_gradient(fused, monkeypatch):
    hidden, weight, targets = randn(13, 8).requires_grad_(), randn(10, 8), torch.arange(13, device=DEVICE) % 10
    monkeypatch.setattr(fused, "mm_fp32", None)  # what would compute it
    fused.linear_cross_entropy(hidden, weight, targets).backward()
    ours, hidden.grad = hidden.grad, None
    cross_entropy.linear_cross_entropy(hidden, weight, targets).backward()
    torch.testing.assert_close(ours, hidden.grad)


def test_a_batch_with_every_label_ignored_gives_zero(loss_function):
    hidden, weight = randn(4, 8).requires_grad_(), randn(10, 8).requires_grad_()
    loss = loss_function(hidden, weight, torch.full((4,), IGNORE_INDEX, device=DEVICE))
    loss.backward()
    assert loss.item() == 0
    assert not hidden.grad.any() and not weight.grad.any()


def test_the_loss_scales_gradients_in_fp32(loss_function):
    """1/3 is 0.2% off in bf16: rounded there, every gradient would be, in the same direction."""
    hidden, weight = randn(256, 64).bfloat16(), randn(50, 64).bfloat16()
    targets = torch.randint(50, (256,), device=DEVICE)
    grads = []
    for factor in (1.0, 1 / 3):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        (loss_function(h, w, targets) * factor).backward()
        grads.append(h.grad.float())
    assert (grads[1].abs().sum() / grads[0].abs().sum() * 3 - 1).abs() < 1e-3


# --- low-precision weights -------------------------------------------------------------------------------------------


class Two(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a = torch.nn.Parameter(randn(6, 8))
        self.b = torch.nn.Parameter(randn(6, 8, seed=1))


def test_compute_weights_follow_the_parameters():
    model = Two()
    copies = ComputeWeights(model, torch.bfloat16)
    copies.refresh()
    assert torch.equal(model.a.compute, model.a.detach().bfloat16())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    x = randn(3, 8).bfloat16()
    linear(x, model.a).sum().backward()
    optimizer.step()
    copies.refresh()
    assert torch.equal(model.a.compute, model.a.detach().bfloat16())
    model.load_state_dict(Two().state_dict())
    copies.refresh()
    assert torch.equal(model.a.compute, model.a.detach().bfloat16())


def test_gradients_accumulate_in_fp32_where_bf16_would_lose_them():
    model = Two()
    ComputeWeights(model, torch.bfloat16).refresh()
    x = torch.zeros(1, 8, device=DEVICE, dtype=torch.bfloat16)
    x[0, 0] = 1
    linear(256 * x, model.a).sum().backward()
    for _ in range(8):
        linear(x, model.a).sum().backward()  # in bf16, 256 + 1 is 256
    assert model.a.grad.dtype == torch.float32
    assert model.a.grad[0, 0].item() == 264


def test_gradients_of_equal_ids_are_summed_in_fp32():
    model = torch.nn.Module()
    model.a = torch.nn.Parameter(torch.zeros(2, 8, device=DEVICE))
    ComputeWeights(model, torch.bfloat16).refresh()
    embedding(torch.zeros(1, 3000, dtype=torch.long, device=DEVICE), model.a).sum().backward()
    assert model.a.grad[0, 0].item() == pytest.approx(3000, rel=4e-3)  # summed in bf16 it is 256


class MLP(torch.nn.Module):
    def __init__(self, C, width):
        super().__init__()
        shapes = ((width, C), (width, C), (C, width))
        self.gate, self.up, self.down = (torch.nn.Parameter(randn(*s, seed=i) / 8) for i, s in enumerate(shapes))


def accumulates_like_fp32(function, mlp, exact):
    """Over three batches: without a gradient, with those of gate and up in one buffer, and in two."""
    ComputeWeights(mlp, torch.bfloat16).refresh()
    for seed in range(3):
        x = randn(2, 7, mlp.gate.size(1), seed=seed).bfloat16()
        function(x, *mlp.parameters()).float().square().sum().backward()
        swiglu.swiglu_mlp(x.float(), *exact.parameters()).square().sum().backward()
        if seed == 1:
            for p in mlp.parameters():
                p.grad = p.grad.clone()
    for (name, ours), reference in zip(mlp.named_parameters(), exact.parameters(), strict=True):
        assert ours.grad.dtype == torch.float32
        error = (ours.grad - reference.grad).norm() / reference.grad.norm()
        assert error < 1.2e-2, f"{name}: {error:.2e}"


def test_the_fused_mlp_over_compute_weights(fused):
    mlp, exact = MLP(24, 40), MLP(24, 40)
    exact.load_state_dict(mlp.state_dict())
    accumulates_like_fp32(fused.swiglu_mlp, mlp, exact)


@pytest.mark.gpu
def test_swiglu_inside_quacks_gemms():
    problem = kernels._usable("quack", DEVICE, torch.bfloat16)
    if problem:
        pytest.skip(problem)
    from lit_gpt.kernels import quack_mlp

    mlp, exact = MLP(256, 640), MLP(256, 640)
    exact.load_state_dict(mlp.state_dict())
    plain = [p.detach().bfloat16().requires_grad_() for p in mlp.parameters()]
    quack_mlp.swiglu_mlp(randn(2, 70, 256).bfloat16(), *plain).float().square().sum().backward()
    swiglu.swiglu_mlp(randn(2, 70, 256), *exact.parameters()).square().sum().backward()
    for ours, reference in zip(plain, exact.parameters(), strict=True):
        assert (ours.grad - reference.grad).norm() / reference.grad.norm() < 1.2e-2
    exact.zero_grad()
    accumulates_like_fp32(quack_mlp.swiglu_mlp, mlp, exact)


# --- attention -------------------------------------------------------------------------------------------------------


def documents(*lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=DEVICE)


def test_documents_see_themselves_only():
    mask = document_mask(documents(2, 3, 1, 4, 0), B=2, T=5)
    expected = torch.zeros(2, 5, 5, dtype=torch.bool)
    for row, begin, end in ((0, 0, 2), (0, 2, 5), (1, 0, 1), (1, 1, 5)):
        expected[row, begin:end, begin:end] = torch.ones(end - begin, end - begin).tril().bool()
    assert torch.equal(mask[:, 0].cpu(), expected)


def test_editing_one_document_leaves_another_alone():
    model = GPT(Config(n_layer=2, n_embd=32, n_head=4, n_query_groups=2, intermediate_size=48, vocab_size=64))
    model.init_weights(1)
    idx = torch.randint(64, (2, 10))
    cu_seqlens = torch.tensor([0, 4, 10, 17, 20, 20, 20], dtype=torch.int32)
    other = idx.clone()
    other[0, :4] = (other[0, :4] + 1) % 64
    positions = torch.tensor([[*range(4), *range(6)], [*range(7), *range(3)]])
    a, b = (model(i, cu_seqlens=cu_seqlens, positions=positions) for i in (idx, other))
    assert torch.equal(a[0, 4:], b[0, 4:]) and torch.equal(a[1], b[1])
    assert not torch.equal(a[0, :4], b[0, :4])
    alone = model(idx[:1, 4:])
    torch.testing.assert_close(a[:1, 4:], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
def test_backends_are_found_where_gradients_are_switched_off():
    with torch.inference_mode():
        assert usable("flash", DEVICE, torch.bfloat16) == ""


@pytest.mark.gpu
def test_auto_is_not_the_reference_here():
    selected = select_kernels("auto", device=DEVICE, dtype=torch.float32, heads=(8, 2, 64))
    backends = {operation: backend for operation, backend, _ in selected.choices}
    assert backends["attention"] != "torch" and backends["rms_norm"] == "triton"


@pytest.mark.gpu
@DTYPES
def test_flash_attns_own_kernels(dtype):
    ops = pytest.importorskip("lit_gpt.kernels.flash_attn_ops", exc_type=ImportError)
    x, delta, weight = randn(3, 5, 96), randn(3, 5, 96, seed=1), 1 + 0.3 * randn(96)
    assert_matches(lambda *a: ops.rms_norm(*a, 1e-5), lambda *a: rmsnorm.rms_norm(*a, 1e-5), [x, weight], dtype)
    both = (lambda *a: ops.add_rms_norm(*a, 1e-5)), (lambda *a: rmsnorm.add_rms_norm(*a, 1e-5))
    assert_matches(*both, [x, delta, weight], dtype)
    cos, sin = rope.rope_tables(Config(head_size=16), 9, DEVICE)
    both = (lambda a: ops.split_rope(a, cos, sin, 2, 16)), (lambda a: rope.split_rope(a, cos, sin, 2, 16))
    assert_matches(*both, [randn(2, 9, 8 * 16)], dtype)
    weights = [randn(40, 96) / 10, randn(40, 96, seed=1) / 10, randn(96, 40) / 10]
    assert_matches(ops.swiglu_mlp, swiglu.swiglu_mlp, [x, *weights], dtype)
    targets = torch.tensor([0, 96, IGNORE_INDEX, 3, 3], device=DEVICE)
    inputs = [randn(5, 16), randn(97, 16), targets, "sum", 1e-2]
    assert_matches(ops.linear_cross_entropy, cross_entropy.linear_cross_entropy, inputs, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("D", [64, 128])
def test_attention_backends(name, D):
    problem = usable(name, DEVICE, torch.bfloat16)
    if problem:
        pytest.skip(problem)
    inputs = [randn(2, 200, 8, D), randn(2, 200, 2, D, seed=1), randn(2, 200, 2, D, seed=2)]
    backend = load(name)
    assert_matches(backend, attention, inputs, torch.bfloat16)
    cu_seqlens = documents(1, 60, 139, 150, 50, 0, 0)
    assert_matches(
        lambda q, k, v: backend(q, k, v, None, cu_seqlens),
        lambda q, k, v: attention(q, k, v, None, cu_seqlens),
        inputs,
        torch.bfloat16,
    )


# --- the whole ------------------------------------------------------------------------------------------------------


SMALL = dict(n_layer=2, n_embd=32, n_head=4, n_query_groups=2, intermediate_size=48, vocab_size=100)


def small(selected=None):
    with DEVICE:
        model = GPT(Config(**SMALL), selected)
    model.init_weights(1)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.0 if p.dim() == 1 else 1.5)  # at birth a model hardly attends
    return model


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("backend", ["torch", "fused"])
def test_a_bf16_step_has_the_gradients_of_fp32(backend, recompute, request):
    selected = None
    if backend == "fused":
        from lit_gpt.kernels import ELEMENTWISE, Kernels

        fused = request.getfixturevalue("fused")
        selected = Kernels(**{op: getattr(fused, op) for op in ELEMENTWISE})
    model, exact = small(selected), small()
    model.compute_in(torch.bfloat16)
    model.recompute = recompute
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        idx, targets = torch.randint(100, (2, 2, 12), generator=generator).to(DEVICE)
        targets[0, :3] = IGNORE_INDEX
        loss, exact_loss = model(idx, targets), exact(idx, targets)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, exact_loss, rtol=5e-3, atol=0)
        (loss / 40).backward()
        (exact_loss / 40).backward()
    for (name, ours), reference in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert ours.dtype == ours.grad.dtype == torch.float32
        error = (ours.grad - reference.grad).norm() / reference.grad.norm()
        assert error < 0.04, f"{name}: {error:.2e}"  # bf16 rounds each of some 20 intermediate results by 0.2%
    assert model(idx).dtype == torch.bfloat16


def test_selection_falls_back_and_says_so():
    selected = select_kernels("auto", device=torch.device("cpu"), dtype=torch.float32)
    assert selected.attention is attention and not selected.compile_blocks
    assert "fa4 needs a CUDA GPU" in selected.table() and "triton needs a CUDA GPU" in selected.table()


@pytest.mark.parametrize(
    "capability, dtype, works, options, attends, rest",
    [
        ((9, 0), "bfloat16", NAMES, {}, "fa4", "quack"),
        ((9, 0), "bfloat16", NAMES, {"fp8": True}, "fa4", "triton"),
        ((9, 0), "bfloat16", NAMES, {"training": False}, "cudnn", "triton"),
        ((9, 0), "bfloat16", ("flash", "fa2", "cudnn", "efficient"), {}, "cudnn", "quack"),
        ((9, 0), "float32", ("efficient",), {}, "efficient", "triton"),
        ((8, 0), "bfloat16", ("flash", "fa2", "efficient"), {}, "fa2", "triton"),
        ((8, 0), "bfloat16", ("flash", "efficient"), {}, "flash", "triton"),
        ((7, 0), "float16", ("efficient",), {}, "efficient", "triton"),
        ((7, 0), "float32", ("efficient",), {}, "efficient", "triton"),
        ((6, 1), "float32", (), {}, "torch", "torch"),
    ],
)
def test_auto_takes_the_fastest_that_works(fused, monkeypatch, capability, dtype, works, options, attends, rest):
    """What measurements said, for an H100, an A100, a V100 and older, pretended ones."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(kernels, "_compile_ahead", lambda *_: None)
    monkeypatch.setattr(kernels._attention, "usable", lambda name, *_: "" if name in (*works, "torch") else "fails")
    monkeypatch.setattr(kernels._attention, "load", lambda name: name)
    quack_mlp = types.SimpleNamespace(calls=lambda _: [], swiglu_mlp="quack")
    monkeypatch.setitem(sys.modules, "lit_gpt.kernels.quack_mlp", quack_mlp)
    monkeypatch.setattr(kernels, "quack_mlp", quack_mlp, raising=False)
    selected = select_kernels("auto", device=torch.device("cuda"), dtype=getattr(torch, dtype), **options)
    chosen = {operation: backend for operation, backend, _ in selected.choices}
    assert chosen["attention"] == selected.attention == attends
    assert chosen["swiglu_mlp"] == rest
    assert chosen["rms_norm"] == ("triton" if rest == "quack" else rest)
    assert (selected.rms_norm is fused.rms_norm) == (rest != "torch")
    assert (selected.swiglu_mlp == "quack") == (rest == "quack")


def test_a_backend_that_was_named_must_work():
    device = torch.device("cpu")
    with pytest.raises(ValueError, match="'fa3'.*Known: .*triton.*fa4"):
        select_kernels("triton+fa3", device=device, dtype=torch.float32)
    with pytest.raises(ValueError, match="'cudnn': needs a CUDA GPU"):
        select_kernels("cudnn", device=device, dtype=torch.float32)
    assert select_kernels("torch", device=device, dtype=torch.float32).attention is attention


@pytest.mark.parametrize("name, command", [("fa2", "pip install flash-attn"), ("xformers", "pip install xformers")])
def test_a_package_that_was_named_and_is_missing_is_an_import_error(monkeypatch, name, command):
    monkeypatch.setitem(sys.modules, {"fa2": "flash_attn", "xformers": "xformers.ops"}[name], None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    with pytest.raises(ImportError, match=f"kernels {name!r}: not installed: {command}"):
        select_kernels(f"{name}+torch", device=torch.device("cuda"), dtype=torch.bfloat16)


XFORMERS = {
    "__init__": "",
    "ops/__init__": "LowerTriangularMask = memory_efficient_attention = None",
    "ops/fmha/__init__": "",
    "ops/fmha/attn_bias": "BlockDiagonalCausalMask = None",
}


@pytest.fixture
def fake_xformers(monkeypatch, tmp_path):
    """Writes the sources of a package called xformers, which lasts as long as the test."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    for name in imported("xformers", "flash_attn"):
        monkeypatch.delitem(sys.modules, name)  # it comes back afterwards

    def write(sources):
        for path, source in sources.items():
            file = tmp_path / f"xformers/{path}.py"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(source)

    yield write
    for name in imported("xformers", "flash_attn"):
        del sys.modules[name]


@pytest.mark.parametrize(
    "sources, why",
    [
        ({"ops/__init__": "raise ImportError('it misses a library')"}, "it misses a library"),
        ({"__init__": "_has_cpp_library = False; __version__ = '1.2'"}, "1.2 is built for another PyTorch or CUDA"),
    ],
)
def test_a_package_that_does_not_work_says_so(fake_xformers, sources, why):
    fake_xformers(XFORMERS | sources)
    with pytest.raises(ValueError, match=f"'xformers': is installed, but does not work here .*{why}"):
        select_kernels("xformers+torch", device=torch.device("cuda"), dtype=torch.bfloat16)


@pytest.mark.parametrize("also_2", [False, True])
def test_xformers_does_not_take_flash_attn_4_for_flash_attn(fake_xformers, tmp_path, also_2):
    (tmp_path / "flash_attn/cute").mkdir(parents=True)
    (tmp_path / "flash_attn/cute/__init__.py").write_text("")
    if also_2:
        (tmp_path / "flash_attn/flash_attn_interface.py").write_text("")
    ops = """
        import importlib.util
        from pathlib import Path
        if importlib.util.find_spec("flash_attn"):
            import flash_attn.flash_attn_interface
            Path(__file__).with_name("took").touch()
        LowerTriangularMask = memory_efficient_attention = None
    """
    fake_xformers(XFORMERS | {"ops/__init__": textwrap.dedent(ops)})
    import flash_attn.cute

    load("xformers")
    assert sys.modules["flash_attn"] is flash_attn
    assert (tmp_path / "xformers/ops/took").exists() is also_2


def imported(*packages: str) -> list[str]:
    return [name for name in sys.modules if name.partition(".")[0] in packages]
