"""How fast training steps and their parts are on this machine, beside other implementations and the hardware's limits.

python scripts/benchmark.py step --kernels '[auto, compile]' --micro_batch_size 16
python scripts/benchmark.py step --peer '[litgpt, hf-liger]' --micro_batch_size 8
python scripts/benchmark.py step --precision '[bf16, fp8]' --peer torchao-fp8
python scripts/benchmark.py scaling --devices '[1, 2]'       # several GPUs against one
python scripts/benchmark.py kernels
python scripts/benchmark.py attention
python scripts/benchmark.py decode --peer '[hf, hf-static]'
python scripts/benchmark.py plan --model tiny_LLaMA_1b      # memory; needs no GPU
python scripts/benchmark.py prepare --source_path SlimPajama --tokenizer_path tokenizer/llama2   # data preparation

Times of steps are medians. Tables go to stdout, and with --json FILE the same as JSON to a file.
"""

# ruff: noqa: E402 (the clock starts before the imports)
import sys
import time

from lit_gpt import precompile

T0 = time.perf_counter()
if __name__ == "__main__" and "step" in sys.argv[1:2]:
    precompile.begin(sys.argv)  # the kernels, while the libraries below are imported

import gc
import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from benchmark_decode import decode
from benchmark_prepare import prepare
from benchmark_scaling import scaling

from lit_gpt.cli import one_line_errors
from lit_gpt.config import Config
from lit_gpt.kernels import attention as reference_attention
from lit_gpt.kernels import select_kernels
from lit_gpt.kernels.attention import NAMES as ATTENTIONS
from lit_gpt.kernels.attention import load, usable
from lit_gpt.model import GPT
from lit_gpt.optim import clip_and_step, init_adam, param_groups
from lit_gpt.speed_monitor import GPUS, flops_per_token, largest_micro_batch, memory_plan, peak_flops

PEERS = ("litgpt", "hf", "hf-liger", "autocast", "torchao-fp8")

# --- a training step -------------------------------------------------------------------------------------------------


def step(
    model: str = "tiny_LLaMA_1b",
    kernels: list[str] | str = "auto",
    micro_batch_size: list[int] | int = 16,
    accumulation: int = 4,
    steps: int = 8,
    precision: list[str] | str = "bf16",
    peer: list[str] | str = [],  # noqa: B006 (jsonargparse reads it)
    recompute: bool = False,
    memory_limit_gb: float | None = None,
    profile: bool = False,
    json: Path | None = None,
) -> None:
    """Tokens/s, MFU, peak memory and time to the end of the first step, the choice of kernels and the building of the
    model included and in the first row the imports, too, on random tokens; every combination is a row.

    Args:
        model: a preset of lit_gpt/config.py.
        kernels: backends, as pretrain/tinyllama.py's --kernels.
        micro_batch_size: sequences of the model's block_size in one forward and backward.
        accumulation: micro-batches in an optimizer step.
        steps: optimizer steps that are timed, after 3 that are not.
        precision: of ours: bf16 or fp8 (over fp32 parameters, moments and gradients), or fp32.
        peer: other implementations of the same model, under torch.compile and bf16 autocast: litgpt, hf (transformers),
            hf-liger (with Liger's kernels, not compiled), autocast (ours, plain, blocks compiled); and torchao-fp8 (as
            autocast, with torchao's tensorwise fp8 in the linear layers, and bf16 parameters and moments).
        recompute: compute each block's activations again in the backward.
        memory_limit_gb: let PyTorch have this much of the card's memory, in units of 1e9 bytes.
        profile: print where the device's time goes, by kernel.
        json: write the rows to this file as well.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = Config.from_name(model)
    if memory_limit_gb is not None:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(memory_limit_gb * 1e9 / total)
    kernels, precision, peer, micro_batch_size = (
        value if isinstance(value, list) else [value] for value in (kernels, precision, peer, micro_batch_size)
    )
    for name in peer:
        if name not in PEERS:
            raise ValueError(f"--peer {name}: known are {', '.join(PEERS)}")
    rows = []
    ours = [(name, p) for p in precision for name in kernels]
    for name, precision in [*ours, *((name, "") for name in peer)]:
        for size in micro_batch_size:
            row = {"model": model, "kernels": name, "precision": precision, "tokens": size * config.block_size}
            row["accumulation"] = accumulation
            t0 = time.perf_counter() if rows else T0
            try:
                if name in PEERS:
                    network, loss_of = build_peer(name, config, device)
                else:
                    network, loss_of = build_ours(name, config, device, precision, recompute)
                row |= time_step(network, loss_of, config, size, accumulation, steps, device, profile, t0)
            except torch.OutOfMemoryError:
                row |= {"tokens/s": "out of memory"}
            network = loss_of = None
            gc.collect()
            torch.compiler.reset()
            if device.type == "cuda":
                torch.cuda.empty_cache()
            rows.append(row)
            print(row, flush=True)
    report(rows, json)


def build_ours(kernels: str, config: Config, device: torch.device, precision: str, recompute: bool):
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    heads = (config.n_head, config.n_query_groups, config.head_size)
    selected = select_kernels(kernels, device=device, dtype=dtype, heads=heads, fp8=precision == "fp8")
    print(selected.table(), flush=True)
    with device:
        model = GPT(config, selected)
    model.init_weights(1)
    model.recompute = recompute
    if precision == "fp8":
        model.train_in_fp8()
    if precision != "fp32":
        model.compute_in(torch.bfloat16)
    if selected.compile_blocks:
        for block in model.transformer.h:
            block.compile()
    return model, model


def build_peer(name: str, config: Config, device: torch.device) -> tuple[torch.nn.Module, Callable]:
    """A model, and the function of (idx, targets) that gives its summed loss."""
    c = config
    if name in ("autocast", "torchao-fp8"):
        heads = (c.n_head, c.n_query_groups, c.head_size)
        with device:
            model = GPT(config, select_kernels("compile", device=device, dtype=torch.bfloat16, heads=heads))
        model.init_weights(1)
        if name == "torchao-fp8":
            from torchao.float8 import Float8LinearConfig, convert_to_float8_training

            model.bfloat16()
            tensorwise = Float8LinearConfig.from_recipe_name("tensorwise")
            convert_to_float8_training(model, config=tensorwise, module_filter_fn=lambda _, name: name != "lm_head")
        for block in model.transformer.h:
            block.compile()
        forward = model
    elif name == "litgpt":
        import litgpt

        with device:
            model = litgpt.GPT(litgpt.Config.from_name("tiny-llama-1.1b", block_size=c.block_size))
        compiled = torch.compile(model)

        def forward(idx, targets):
            return F.cross_entropy(compiled(idx).flatten(0, 1).float(), targets.flatten(), reduction="sum")
    else:
        from transformers import LlamaConfig, LlamaForCausalLM

        from lit_gpt.hf import config_to_hf

        if name == "hf-liger":
            from liger_kernel.transformers import apply_liger_kernel_to_llama

            apply_liger_kernel_to_llama()
        with device:
            model = LlamaForCausalLM(LlamaConfig(**config_to_hf(config), attn_implementation="sdpa"))
        run = model if name == "hf-liger" else torch.compile(model)

        def forward(idx, targets):
            return run(input_ids=idx, labels=idx, shift_labels=targets.contiguous(), use_cache=False).loss * idx.numel()

    def loss_of(idx: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=name != "torchao-fp8"):
            return forward(idx, targets)

    return model, loss_of


def time_step(model, loss_of, config, size, accumulation, steps, device, profile, t0) -> dict:
    optimizer = torch.optim.AdamW(param_groups(model, 0.1), lr=1e-4, betas=(0.9, 0.95), fused=True)
    init_adam(optimizer)  # as training does: what stays lies together in memory
    tokens = torch.randint(config.vocab_size, (accumulation, size, config.block_size + 1), device=device)
    n_tokens = accumulation * size * config.block_size

    def one_step() -> torch.Tensor:
        for batch in tokens:
            (loss_of(batch[:, :-1], batch[:, 1:]) / n_tokens).backward()
        norm = clip_and_step(optimizer, 1.0)
        optimizer.zero_grad()
        return norm

    cuda = device.type == "cuda"
    synchronize = torch.cuda.synchronize if cuda else lambda: None
    one_step()
    synchronize()
    first_s = time.perf_counter() - t0
    one_step()
    one_step()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    elapsed_s = []
    for _ in range(steps):
        synchronize()
        t0 = time.perf_counter()
        norm = one_step()
        synchronize()
        elapsed_s.append(time.perf_counter() - t0)
    assert norm.isfinite()
    speed = n_tokens / sorted(elapsed_s)[len(elapsed_s) // 2]
    peak = peak_flops(device, "bf16")
    if profile:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as prof:
            one_step()
            synchronize()
        kernels = sorted(prof.key_averages(), key=lambda e: -e.device_time_total)
        print(f"{'ns per token':>14} {'calls':>7}  kernel")
        for e in kernels[:45]:
            print(f"{e.device_time_total * 1e3 / n_tokens:>14.1f} {e.count:>7}  {e.key[:110]}")
        print(f"{sum(e.device_time_total for e in kernels) * 1e3 / n_tokens:>14.1f}          all", flush=True)
    return {
        "tokens/s": round(speed),
        "MFU %": round(100 * speed * flops_per_token(config) / peak, 1) if peak else None,
        "peak GB": round(torch.cuda.max_memory_allocated() / 1e9, 1) if cuda else None,
        "first step s": round(first_s, 1),
        "spread %": round(100 * (max(elapsed_s) / min(elapsed_s) - 1), 1),
    }


# --- its parts -------------------------------------------------------------------------------------------------------


def kernels(n_tokens: int = 16384, model: str = "tiny_LLaMA_1b", json: Path | None = None) -> None:
    """Each fused operation, forward and backward, beside PyTorch, torch.compile and Liger (if installed), and the
    share of a device copy's bandwidth that it reaches, for the bytes that it must move; GB is what forward and backward
    need at their peak.

    Args:
        n_tokens: tokens in a call.
        model: whose sizes are taken.
        json: write the rows to this file as well.
    """
    from lit_gpt.kernels import cross_entropy, fused, rmsnorm, rope, swiglu

    device = torch.device("cuda")
    c = Config.from_name(model)
    N, C, W, V = n_tokens, c.n_embd, c.intermediate_size, c.padded_vocab_size
    T = min(c.block_size, N)

    def randn(*shape):
        return torch.randn(*shape, device=device, dtype=torch.bfloat16)

    bandwidth = copy_bandwidth(device)
    print(f"device copy: {bandwidth / 1e12:.2f} TB/s")

    x, delta, qkv = randn(1, N, C), randn(1, N, C), randn(N // T, T, c.qkv_size)
    gate_up, w = randn(1, N, 2 * W), torch.ones(C, device=device)
    cos, sin = rope.rope_tables(c, T, device)
    hidden, head = randn(N, C) * 0.05, randn(V, C) * 0.05
    targets = torch.randint(V, (N,), device=device)

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

    def reference_swiglu(gate_up: torch.Tensor) -> torch.Tensor:
        return swiglu.swiglu(*gate_up.split(W, -1))

    def reference_swiglu_backward(gate_up: torch.Tensor, dh: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h, pull_back = torch.func.vjp(reference_swiglu, gate_up)
        return pull_back(dh)[0], h

    # operation -> inputs, bytes forward, bytes backward, {name: function}
    operations = {
        "add + rms_norm": (
            (x, delta, w),
            8 * N * C,
            8 * N * C,
            {
                "ours": lambda x, d, w: fused.add_rms_norm(x, d, w, 1e-5),
                "torch": lambda x, d, w: rmsnorm.add_rms_norm(x, d, w, 1e-5),
            },
        ),
        "split + rope": (
            (qkv,),
            4 * qkv.numel(),
            4 * qkv.numel(),
            {
                "ours": lambda qkv: fused.split_rope(qkv, cos, sin, c.n_query_groups, c.head_size),
                "torch": lambda qkv: rope.split_rope(qkv, cos, sin, c.n_query_groups, c.head_size),
            },
        ),
        "swiglu": (
            (gate_up,),
            6 * N * W,
            12 * N * W,
            {
                "ours": swiglu_with(fused.swiglu, fused.swiglu_backward),
                "torch": swiglu_with(reference_swiglu, reference_swiglu_backward),
                "compile": swiglu_with(torch.compile(reference_swiglu), torch.compile(reference_swiglu_backward)),
            },
        ),
        "linear cross-entropy": (
            (hidden, head, targets),
            None,
            None,
            {
                "ours": fused.linear_cross_entropy,
                "torch": cross_entropy.linear_cross_entropy,
                "compile, all logits": torch.compile(
                    lambda h, w, t: F.cross_entropy(F.linear(h, w).float(), t, reduction="sum")
                ),
            },
        ),
    }
    try:
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as LigerLoss
        from liger_kernel.ops.rope import LigerRopeFunction
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction
        from liger_kernel.transformers.functional import liger_fused_add_rms_norm

        H, G, D = c.n_head, c.n_query_groups, c.head_size

        def liger_rope(qkv):
            q, k, v = qkv.split((H * D, G * D, G * D), -1)
            q, k, v = (t.view(*t.shape[:2], -1, D).transpose(1, 2) for t in (q, k, v))
            both = torch.cat((cos, cos), -1)[None].to(q.dtype), torch.cat((sin, sin), -1)[None].to(q.dtype)
            return *LigerRopeFunction.apply(q, k, *both), v

        operations["add + rms_norm"][3]["Liger"] = lambda x, d, w: liger_fused_add_rms_norm(x, d, w, 1e-5)
        operations["split + rope"][3]["Liger"] = liger_rope
        operations["swiglu"][3]["Liger, output not again"] = lambda gu: LigerSiLUMulFunction.apply(*gu.split(W, -1))
        operations["linear cross-entropy"][3]["Liger"] = lambda h, w, t: LigerLoss.apply(
            h, w, t, None, None, -100, 0.0, 0.0, "sum"
        )[0]
    except ImportError as e:
        print(f"no Liger: {e}")

    rows = []
    for operation, (inputs, forward_bytes, backward_bytes, functions) in operations.items():
        functions.setdefault("compile", torch.compile(functions["torch"]))
        for name, function in functions.items():
            tensors = [t.detach().requires_grad_(t.is_floating_point()) for t in inputs]
            try:
                outputs = function(*tensors)
                outputs = outputs if isinstance(outputs, tuple) else (outputs,)
                grads = [torch.randn_like(o) if o.dim() else None for o in outputs]
                forward, both = forward_and_both_s(function, tensors, grads)
                memory = extra_memory(function, tensors, grads)
            except Exception as e:  # a foreign package may refuse a shape; the others still count
                rows.append({"operation": operation, "by": name, "forward us": f"{type(e).__name__}: {e}"[:80]})
                continue
            row = {"operation": operation, "by": name}
            if forward_bytes:
                row |= {"forward us": round(1e6 * forward, 1), "backward us": round(1e6 * (both - forward), 1)}
                row["forward % of copy"] = round(100 * forward_bytes / forward / bandwidth, 1)
                row["backward % of copy"] = round(100 * backward_bytes / (both - forward) / bandwidth, 1)
            # Losses differ in which of the two computes the gradients, so of them this alone can be compared.
            row["both us"] = round(1e6 * both, 1)
            row["GB"] = round(memory / 1e9, 2)
            rows.append(row)
            print(row, flush=True)
    report(rows, json)


def attention(json: Path | None = None) -> None:
    """Every backend that works here, forward + backward, causal, 4 key/value heads, in µs per token and layer.

    Args:
        json: write the rows to this file as well.
    """
    device = torch.device("cuda")
    rows = []
    for T, H, D in ((2048, 32, 64), (2048, 16, 128), (4096, 32, 64), (4096, 20, 128)):
        shapes = ((32768 // T, T, H, D), (32768 // T, T, 4, D), (32768 // T, T, 4, D))
        q, k, v = (torch.randn(s, device=device, dtype=torch.bfloat16, requires_grad=True) for s in shapes)
        grad = torch.randn_like(q)
        exact = reference_attention(q[:1].float(), k[:1].float(), v[:1].float())
        for name in ATTENTIONS:
            row = {"T": T, "heads": f"{H} x {D}", "backend": name}
            problem = usable(name, device, torch.bfloat16)
            if problem or name in ("math", "torch"):
                if T == 2048 and H == 32 and problem:
                    print(f"{name}: {problem}")
                continue
            backend = load(name)
            forward, both = forward_and_both_s(backend, (q, k, v), (grad,))
            error = (backend(q, k, v)[:1] - exact).norm() / exact.norm()
            numbers = {
                "forward": forward * 1e6 / 32768,
                "forward + backward": both * 1e6 / 32768,
                "error": error.item(),
            }
            rows.append(row | {k: float(f"{n:.3g}") for k, n in numbers.items()})
            print(rows[-1], flush=True)
    report(rows, json)


def median_s(function: Callable) -> float:
    from triton.testing import do_bench

    return do_bench(function, warmup=20, rep=80, return_mode="median") / 1e3


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
    """Seconds that the device's kernels take in a call, mean of n: without the gaps between launches, which a training
    step hides behind its GEMMs."""
    for _ in range(3):
        function()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as prof:
        for _ in range(n):
            function()
        torch.cuda.synchronize()
    return sum(e.device_time_total for e in prof.key_averages()) / n / 1e6


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written in a second by a large copy."""
    source = torch.empty(2**30, device=device, dtype=torch.int8)
    target = torch.empty_like(source)
    return 2 * source.numel() / median_s(lambda: target.copy_(source))


def as_tuple(outputs: torch.Tensor | tuple) -> tuple:
    return outputs if isinstance(outputs, tuple) else (outputs,)


# --- memory ----------------------------------------------------------------------------------------------------------


def plan(model: str = "tiny_LLaMA_1b", micro_batch_size: int = 8, recompute: bool = False) -> None:
    """What a bf16 training step on one GPU keeps in memory, and the largest micro-batch for some cards.

    Args:
        model: a preset of lit_gpt/config.py.
        micro_batch_size: sequences of the model's block_size.
        recompute: compute each block's activations again in the backward.
    """
    config = Config.from_name(model)
    n_tokens = micro_batch_size * config.block_size
    for part, n_bytes in memory_plan(config, n_tokens, recompute).items():
        print(f"{part:<40}{n_bytes / 1e9:>8.2f} GB")
    print(
        f"{f'total at {n_tokens:,} tokens':<40}{sum(memory_plan(config, n_tokens, recompute).values()) / 1e9:>8.2f} GB"
    )
    for card, gpu in GPUS.items():
        n = largest_micro_batch(config, gpu.memory, recompute) // config.block_size
        again = largest_micro_batch(config, gpu.memory, recompute=True) // config.block_size
        print(f"{card:<16}micro-batch of {n} sequences, {again} with recomputation")


def report(rows: list[dict], path: Path | None) -> None:
    """The rows as a table, and as JSON if there is a path."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns, *([str(row.get(c, "")) for c in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    for line in cells:
        print(" | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)))
    if path is not None:
        path.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    from jsonargparse import auto_cli

    with one_line_errors():
        auto_cli([step, scaling, kernels, attention, decode, plan, prepare], as_positional=False)
