"""Each fused operation alone, beside the same of PyTorch, torch.compile and other packages, and the floor that the
device's memory or its matrix units set; and the backends of attention.

python scripts/benchmark.py kernels
python scripts/benchmark.py attention

Times are the device's own: without the gaps between launches, which a training step hides behind its GEMMs.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from benchmark_decode import copy_bandwidth, report

from lit_gpt.config import Config
from lit_gpt.kernels import attention as reference_attention
from lit_gpt.kernels import cross_entropy, rmsnorm, rope, swiglu
from lit_gpt.kernels.attention import NAMES, load, usable

EPS = 1e-5


def kernels(n_tokens: int = 16384, model: str = "tiny_LLaMA_1b", json: Path | None = None) -> None:
    """Each fused operation, forward and backward, beside PyTorch, torch.compile, and Liger, flash-attn and quack where
    they are installed, and the share that it reaches of the floor: of the copy's bandwidth for the bytes that it must
    move, or of a large product's rate for its products; GB is what forward and backward need at their peak.

    Args:
        n_tokens: tokens in a call.
        model: whose sizes are taken.
        json: write the rows to this file as well.
    """
    device = needs_gpu("kernels")
    c = Config.from_name(model)
    N, C, W, V = n_tokens, c.n_embd, c.intermediate_size, c.padded_vocab_size
    T = min(c.block_size, N)

    def randn(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, device=device) * scale).bfloat16()

    bandwidth, rate = copy_bandwidth(device), product_rate(device)
    print(f"device copy: {bandwidth / 1e12:.2f} TB/s, product of 8192 x 8192 in bf16: {rate / 1e12:.0f} TFLOP/s")

    x, delta, qkv, weight = randn(1, N, C), randn(1, N, C), randn(N // T, T, c.qkv_size), torch.ones(C, device=device)
    w_gate, w_up, w_down = randn(W, C, scale=0.02), randn(W, C, scale=0.02), randn(C, W, scale=0.02)
    hidden, head, targets = randn(N, C, scale=0.05), randn(V, C, scale=0.05), torch.randint(V, (N,), device=device)
    element = x.element_size() / bandwidth  # seconds to move one
    gemm = 2 * N * C / rate  # seconds for one column of a weight, in one of the three products of a step
    # inputs, floors of the forward and of the backward in seconds
    operations = {
        "rms_norm": ((x, weight), 2 * N * C * element, 3 * N * C * element),
        "add + rms_norm": ((x, delta, weight), 4 * N * C * element, 4 * N * C * element),
        "split + rope": ((qkv,), 2 * qkv.numel() * element, 2 * qkv.numel() * element),
        "swiglu": ((randn(1, N, 2 * W),), 3 * N * W * element, 6 * N * W * element),
        "swiglu mlp": ((x, w_gate, w_up, w_down), 3 * W * gemm, 6 * W * gemm),
        "linear cross-entropy": ((hidden, head, targets), V * gemm, 2 * V * gemm),
    }
    by: dict[str, dict[str, Callable]] = {}
    for add in (ours_and_torchs, ligers, flash_attns, quacks):
        try:
            for operation, functions in add(c, T, device).items():
                by.setdefault(operation, {}).update(functions)
        except ImportError as e:
            print(f"{add.__name__} are not installed: {e}")

    rows = []
    for operation, (inputs, *floors) in operations.items():
        functions = by[operation]
        functions.setdefault("compile", torch.compile(functions["torch"]))
        for name, function in functions.items():
            tensors = [t.detach().requires_grad_(t.is_floating_point()) for t in inputs]
            row = {"operation": operation, "by": name}
            try:
                grads = [torch.randn_like(o) if o.dim() else None for o in as_tuple(function(*tensors))]
                forward, both = forward_and_both_s(function, tensors, grads)
                memory = extra_memory(function, tensors, grads)
            except Exception as e:  # a foreign package may refuse a shape; the others still count
                rows.append(row | {"forward us": f"{type(e).__name__}: {e}"[:80]})
                continue
            # Losses differ in which of the two computes the gradients, so of them only the sum can be compared.
            if operation != "linear cross-entropy":
                row |= {"forward us": round(1e6 * forward, 1), "backward us": round(1e6 * (both - forward), 1)}
                row["forward % of floor"] = round(100 * floors[0] / forward, 1)
                row["backward % of floor"] = round(100 * floors[1] / (both - forward), 1)
            row |= {"both us": round(1e6 * both, 1), "both % of floor": round(100 * sum(floors) / both, 1)}
            row["GB"] = round(memory / 1e9, 2)
            rows.append(row)
            print(row, flush=True)
    report(rows, json)


# --- whose ------------------------------------------------------------------------------------------------------------


def norms_and_rope(
    norms: ModuleType, rotary: ModuleType, c: Config, T: int, device: torch.device
) -> dict[str, Callable]:
    """The operations that these modules have under the names of ours."""
    cos, sin = rope.rope_tables(c, T, device)
    return {
        "rms_norm": lambda x, w: norms.rms_norm(x, w, EPS),
        "add + rms_norm": lambda x, d, w: norms.add_rms_norm(x, d, w, EPS),
        "split + rope": lambda qkv: rotary.split_rope(qkv, cos, sin, c.n_query_groups, c.head_size),
    }


def ours_and_torchs(c: Config, T: int, device: torch.device) -> dict[str, dict[str, Callable]]:
    from lit_gpt.kernels import fused

    def swiglu_with(forward: Callable, backward: Callable) -> Callable:
        """The backward gives the output again too, as a step does, whose next gradient needs it."""

        class Swiglu(torch.autograd.Function):
            @staticmethod
            def forward(ctx, gate_up):
                ctx.save_for_backward(gate_up)
                return forward(gate_up)

            @staticmethod
            def backward(ctx, dh):
                return backward(*ctx.saved_tensors, dh)[0]

        return Swiglu.apply

    def plain(gate_up: torch.Tensor) -> torch.Tensor:
        return swiglu.swiglu(*gate_up.chunk(2, -1))

    def plain_backward(gate_up: torch.Tensor, dh: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h, pull_back = torch.func.vjp(plain, gate_up)
        return pull_back(dh)[0], h

    def all_logits(hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(F.linear(hidden, head).float(), targets, reduction="sum")

    ours, torchs = norms_and_rope(fused, fused, c, T, device), norms_and_rope(rmsnorm, rope, c, T, device)
    operations = {name: {"ours": ours[name], "torch": torchs[name]} for name in ours}
    operations["swiglu"] = {
        "ours": swiglu_with(fused.swiglu, fused.swiglu_backward),
        "torch": swiglu_with(plain, plain_backward),
        "compile": swiglu_with(torch.compile(plain), torch.compile(plain_backward)),
    }
    operations["swiglu mlp"] = {"ours": fused.swiglu_mlp, "torch": swiglu.swiglu_mlp}
    operations["linear cross-entropy"] = {
        "ours": fused.linear_cross_entropy,
        "torch": cross_entropy.linear_cross_entropy,
        "compile, all logits": torch.compile(all_logits),
    }
    return operations


def ligers(c: Config, T: int, device: torch.device) -> dict[str, dict[str, Callable]]:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as Loss
    from liger_kernel.ops.rope import LigerRopeFunction
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction
    from liger_kernel.transformers.functional import liger_fused_add_rms_norm, liger_rms_norm

    cos, sin = (torch.cat((t, t), -1)[None].bfloat16() for t in rope.rope_tables(c, T, device))
    H, G, D = c.n_head, c.n_query_groups, c.head_size

    def split_rope(qkv):
        q, k, v = qkv.split((H * D, G * D, G * D), -1)
        q, k, v = (t.view(*t.shape[:2], -1, D).transpose(1, 2) for t in (q, k, v))
        return *LigerRopeFunction.apply(q, k, cos, sin), v

    def swiglu_mlp(x, w_gate, w_up, w_down):
        return F.linear(LigerSiLUMulFunction.apply(F.linear(x, w_gate), F.linear(x, w_up)), w_down)

    return {
        "rms_norm": {"Liger": lambda x, w: liger_rms_norm(x, w, EPS)},
        "add + rms_norm": {"Liger": lambda x, d, w: liger_fused_add_rms_norm(x, d, w, EPS)},
        "split + rope": {"Liger": split_rope},
        "swiglu": {"Liger, output not again": lambda gate_up: LigerSiLUMulFunction.apply(*gate_up.chunk(2, -1))},
        "swiglu mlp": {"Liger": swiglu_mlp},
        "linear cross-entropy": {"Liger": lambda h, w, t: Loss.apply(h, w, t, None, None, -100, 0.0, 0.0, "sum")[0]},
    }


def flash_attns(c: Config, T: int, device: torch.device) -> dict[str, dict[str, Callable]]:
    from flash_attn.ops.activations import swiglu

    from lit_gpt.kernels import flash_attn_ops as ops

    return {name: {"flash-attn": f} for name, f in norms_and_rope(ops, ops, c, T, device).items()} | {
        "swiglu": {"flash-attn, output not again": lambda gate_up: swiglu(*gate_up.chunk(2, -1))},
        "swiglu mlp": {"flash-attn": ops.swiglu_mlp},
        "linear cross-entropy": {"flash-attn": ops.linear_cross_entropy},
    }


def quacks(c: Config, T: int, device: torch.device) -> dict[str, dict[str, Callable]]:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy
    from quack.rmsnorm import rmsnorm
    from quack.rotary import apply_rotary_emb

    from lit_gpt.kernels import quack_mlp

    cos, sin = rope.rope_tables(c, T, device)
    H, G, D = c.n_head, c.n_query_groups, c.head_size

    def split_rope(qkv):
        q, k, v = (t.unflatten(-1, (-1, D)) for t in qkv.split((H * D, G * D, G * D), -1))
        return apply_rotary_emb(q, cos, sin), apply_rotary_emb(k, cos, sin), v

    return {
        "rms_norm": {"quack": lambda x, w: rmsnorm(x, w, eps=EPS)},
        "add + rms_norm": {"quack": lambda x, d, w: rmsnorm(d, w, residual=x, eps=EPS, prenorm=True)},
        "split + rope": {"quack": split_rope},
        "swiglu mlp": {"ours in quack's GEMMs": quack_mlp.swiglu_mlp},
        "linear cross-entropy": {
            "quack": lambda h, w, t: chunked_linear_cross_entropy(h, w, t, reduction="sum", tuned=False)
        },
    }


# --- attention --------------------------------------------------------------------------------------------------------


def attention(json: Path | None = None) -> None:
    """Every backend that works here, forward + backward, causal and of four documents a row, 4 key/value heads, in µs
    per token and layer.

    Args:
        json: write the rows to this file as well.
    """
    device = needs_gpu("attention")
    rows = []
    for T, H, D in ((2048, 32, 64), (2048, 16, 128), (4096, 32, 64), (4096, 20, 128)):
        shapes = ((32768 // T, T, H, D), (32768 // T, T, 4, D), (32768 // T, T, 4, D))
        q, k, v = (torch.randn(s, device=device, dtype=torch.bfloat16, requires_grad=True) for s in shapes)
        grad = torch.randn_like(q)
        cu_seqlens = torch.arange(0, 32768 + 1, T // 4, device=device, dtype=torch.int32)
        exact = reference_attention(q[:1].float(), k[:1].float(), v[:1].float())
        for name in NAMES:
            problem = usable(name, device, torch.bfloat16, (H, 4, D))
            if problem or name in ("math", "torch"):
                if problem:
                    print(f"{name}, T {T}, {H} x {D}: {problem}")
                continue
            backend = load(name)
            forward, both = forward_and_both_s(backend, (q, k, v), (grad,))
            of_documents = partial(backend, mask=None, cu_seqlens=cu_seqlens)
            _, documents = forward_and_both_s(of_documents, (q, k, v), (grad,))
            error = (backend(q, k, v)[:1] - exact).norm() / exact.norm()
            numbers = {
                "forward": forward * 1e6 / 32768,
                "forward + backward": both * 1e6 / 32768,
                "documents": documents * 1e6 / 32768,
                "error": error.item(),
            }
            row = {"T": T, "heads": f"{H} x {D}", "backend": name}
            rows.append(row | {k: float(f"{n:.3g}") for k, n in numbers.items()})
            print(rows[-1], flush=True)
    report(rows, json)


# --- measuring --------------------------------------------------------------------------------------------------------


def needs_gpu(what: str) -> torch.device:
    if not torch.cuda.is_available():
        raise ValueError(f"{what} needs a GPU, and PyTorch sees none")
    return torch.device("cuda")


def forward_and_both_s(function: Callable, inputs: tuple, grads: tuple) -> tuple[float, float]:
    """Seconds of the forward, and of forward and backward."""
    needs = [t for t in inputs if t.requires_grad]
    both = device_s(lambda: torch.autograd.grad(as_tuple(function(*inputs)), needs, grads))
    return device_s(lambda: function(*inputs)), both


def extra_memory(function: Callable, inputs: tuple, grads: tuple) -> int:
    """Bytes that forward and backward need at their peak beside the inputs, gradients of the inputs included."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.autograd.grad(as_tuple(function(*inputs)), [t for t in inputs if t.requires_grad], grads)
    return torch.cuda.max_memory_allocated() - before


def device_s(function: Callable, n: int = 10) -> float:
    """Seconds that the device's kernels take in a call, mean of n."""
    for _ in range(3):
        function()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as prof:
        for _ in range(n):
            function()
        torch.cuda.synchronize()
    return sum(e.device_time_total for e in prof.key_averages()) / n / 1e6


def product_rate(device: torch.device) -> float:
    """FLOP/s of a large bf16 product."""
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / device_s(lambda: a @ b)


def as_tuple(outputs: torch.Tensor | tuple) -> tuple:
    return outputs if isinstance(outputs, tuple) else (outputs,)
