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
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from benchmark_decode import decode, report
from benchmark_kernels import attention, kernels, needs_gpu
from benchmark_prepare import prepare
from benchmark_scaling import scaling

from lit_gpt.cli import one_line_errors
from lit_gpt.config import Config
from lit_gpt.kernels import Kernels, select_kernels
from lit_gpt.model import GPT
from lit_gpt.optim import clip_and_step, init_adam, param_groups
from lit_gpt.speed_monitor import GPUS, flops_per_token, largest_micro_batch, memory_plan, peak_flops

# And what pip calls them, in the order in which they are timed: Liger's functions stay in transformers once there.
PEERS = {"litgpt": "litgpt", "autocast": "", "torchao-fp8": "torchao", "hf": "transformers", "hf-liger": "liger-kernel"}
PRECISIONS = ("bf16", "fp8", "fp32")

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
    compile_blocks: bool = False,
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
        compile_blocks: torch.compile each block of ours around its kernels, which stay as they are.
        memory_limit_gb: let PyTorch have this much of the card's memory, in units of 1e9 bytes.
        profile: print where the device's time goes, by kernel.
        json: write the rows to this file as well.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = Config.from_name(model)
    kernels, precision, peer, micro_batch_size = (
        value if isinstance(value, list) else [value] for value in (kernels, precision, peer, micro_batch_size)
    )
    check_step(config, peer, precision, (*micro_batch_size, accumulation, steps))
    if memory_limit_gb is not None or profile:
        needs_gpu("--profile" if profile else "--memory_limit_gb")
    if memory_limit_gb is not None:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(memory_limit_gb * 1e9 / total)
    rows, problems = [], []
    ours = [(name, p) for p in precision for name in kernels]
    for name, precision in [*ours, *((name, "") for name in PEERS if name in peer)]:
        for size in micro_batch_size:
            row = {"model": model, "kernels": name, "precision": precision, "tokens": size * config.block_size}
            row["accumulation"] = accumulation
            t0 = time.perf_counter() if rows else T0
            try:
                if name in PEERS:
                    network, loss_of = build_peer(name, config, device)
                else:
                    network, loss_of = build_ours(name, config, device, precision, recompute, compile_blocks)
                row |= time_step(network, loss_of, config, size, accumulation, steps, device, profile, t0)
            except torch.OutOfMemoryError:
                row |= {"tokens/s": "out of memory"}
            except (ImportError, ValueError) as e:  # the other rows still count
                install = f": pip install {PEERS[name]}" if name in PEERS and isinstance(e, ImportError) else ""
                problems.append(f"{name}: {e}{install}")
                row |= {"tokens/s": "failed"}
            network = loss_of = None
            gc.collect()
            torch.compiler.reset()
            if device.type == "cuda":
                torch.cuda.empty_cache()
            rows.append(row)
            print(row, flush=True)
    report(rows, json)
    if problems:
        raise ValueError("; ".join(dict.fromkeys(problems)))


def check_step(config: Config, peer: list[str], precision: list[str], at_least_one: tuple[int, ...]) -> None:
    """Raises ValueError for what cannot be timed, before anything is."""
    for flag, values, known in (("peer", peer, PEERS), ("precision", precision, PRECISIONS)):
        for name in values:
            if name not in known:
                raise ValueError(f"--{flag} {name}: known are {', '.join(known)}")
    if "litgpt" in peer and config.name != "tiny_LLaMA_1b":
        raise ValueError(f"--peer litgpt: of its models only tiny_LLaMA_1b is known to equal ours, not {config.name}")
    if config.family != "llama" and {"hf", "hf-liger"} & {*peer}:
        raise ValueError(f"--peer hf and hf-liger are Llama models, {config.name} is not")
    if min(at_least_one) < 1:
        raise ValueError("--micro_batch_size, --accumulation and --steps must be at least 1")


def build_ours(
    kernels: str, config: Config, device: torch.device, precision: str, recompute: bool, compile_blocks: bool
) -> tuple[torch.nn.Module, Callable]:
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    heads = (config.n_head, config.n_query_groups, config.head_size)
    selected = select_kernels(kernels, device=device, dtype=dtype, heads=heads, fp8=precision == "fp8")
    print(selected.table(), flush=True)
    if compile_blocks and not selected.compile_blocks:
        # Traced, their addresses and .grad would break the graph in the middle of them.
        functions = {f.name: getattr(selected, f.name) for f in fields(Kernels)}
        opaque = {name: torch.compiler.disable(f) for name, f in functions.items() if callable(f)}
        selected = replace(selected, **opaque)
    with device:
        model = GPT(config, selected)
    model.init_weights(1)
    model.recompute = recompute
    if precision == "fp8":
        model.train_in_fp8()
    if precision != "fp32":
        model.compute_in(torch.bfloat16)
    if selected.compile_blocks or compile_blocks:
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


# --- memory ----------------------------------------------------------------------------------------------------------


def plan(model: str = "tiny_LLaMA_1b", micro_batch_size: int = 8, recompute: bool = False) -> None:
    """What a bf16 training step on one GPU keeps in memory, and the largest micro-batch for some cards.

    Args:
        model: a preset of lit_gpt/config.py.
        micro_batch_size: sequences of the model's block_size.
        recompute: compute each block's activations again in the backward.
    """
    config = Config.from_name(model)
    if micro_batch_size < 1:
        raise ValueError("--micro_batch_size must be at least 1")
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


if __name__ == "__main__":
    from jsonargparse import auto_cli

    with one_line_errors():
        auto_cli([step, scaling, kernels, attention, decode, plan, prepare], as_positional=False)
