"""How fast a step is, how fast it could be, and what a run takes: FLOPs from the Config, peaks from the data sheets."""

import re
from dataclasses import dataclass

import torch

from lit_gpt.config import Config


def flops_per_token(config: Config) -> float:
    """Of a forward and backward pass, in TinyLlama's convention: 6·N + 12·L·C·T, N without the input embedding.

    6 N is 2 for each weight in the forward and 4 in the backward (Kaplan et al. 2020, arXiv:2001.08361); 12 L C T is
    attention's two matmuls over the whole context, the masked half counted too (Chowdhery et al. 2022,
    arXiv:2204.02311, appendix B). So 24,000 tokens/s of the 1.1B model on an A100 is an MFU of 56%.
    """
    c = config
    mlp = (3 if c.family == "llama" else 2) * c.n_embd * c.intermediate_size
    attention = c.n_embd * c.qkv_size + c.n_head * c.head_size * c.n_embd
    n = c.n_layer * (mlp + attention + 2 * c.n_embd) + c.n_embd + c.padded_vocab_size * c.n_embd
    return 6 * n + 12 * c.n_layer * c.n_head * c.head_size * c.block_size


# Dense TFLOP/s without sparsity, from the vendors' data sheets. Of several that match a name the first counts.
PEAK_TFLOPS: tuple[tuple[str, dict[str, float]], ...] = (
    ("H100 PCIe", {"fp8": 1513, "bf16": 756, "tf32": 378}),
    ("H100 NVL", {"fp8": 1671, "bf16": 835, "tf32": 417}),
    ("H100", {"fp8": 1979, "bf16": 989, "tf32": 494}),
    ("H200", {"fp8": 1979, "bf16": 989, "tf32": 494}),
    ("H800", {"fp8": 1979, "bf16": 989, "tf32": 494}),
    ("B200", {"fp8": 4500, "bf16": 2250, "tf32": 1125}),
    ("A100", {"bf16": 312, "tf32": 156}),
    ("A800", {"bf16": 312, "tf32": 156}),
    ("A10", {"bf16": 125, "tf32": 62.5}),
    ("L40S", {"fp8": 733, "bf16": 362, "tf32": 183}),
    ("L4", {"fp8": 242, "bf16": 121, "tf32": 60}),
    ("RTX 4090", {"fp8": 330, "bf16": 165, "tf32": 82.6}),
    ("RTX 3090", {"bf16": 71, "tf32": 35.6}),
    ("V100", {"fp16": 125}),
)


def peak_flops(device: torch.device, precision: str) -> float | None:
    """FLOP/s that the data sheet promises for "bf16", "tf32", "fp16" or "fp8"; None for devices not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    for pattern, tflops in PEAK_TFLOPS:
        if re.search(rf"\b{pattern}\b", name):
            return tflops[precision] * 1e12 if precision in tflops else None
    return None


def memory_plan(config: Config, n_tokens: int, recompute: bool = False, sharers: int = 1) -> dict[str, float]:
    """Bytes that one GPU holds at the peak of a bf16 step over n_tokens, with the fused kernels, by what they are for.

    fp32 parameters, gradients and two moments are 16 bytes a parameter, the bf16 copy of the matrices 2 more; `sharers`
    GPUs divide parameters and moments among them. Kept for the backward are, in bf16 and per token and layer: the
    residual stream and its norm, twice; q, k, v; attention's output; gate and up. Then what lives for a moment: the
    chunk of logits and the gradient of the head while the loss is computed, or a block's gradients in the backward.
    """
    c = config
    mlp = (3 if c.family == "llama" else 2) * c.n_embd * c.intermediate_size
    block = mlp + c.n_embd * c.qkv_size + c.n_head * c.head_size * c.n_embd
    vocabulary = c.padded_vocab_size * c.n_embd
    n = c.n_layer * block + vocabulary * (1 if c.tie_embeddings else 2)
    kept = 4 * c.n_embd + c.qkv_size + c.n_head * c.head_size + (2 if c.family == "llama" else 1) * c.intermediate_size
    log_sum_exp = 4 * c.n_head
    layer = n_tokens * (2 * kept + log_sum_exp)
    stream = 2 * n_tokens * 2 * c.n_embd  # x and delta at the border of two blocks
    loss = 2 * min(n_tokens, 8192) * c.padded_vocab_size + 4 * vocabulary + 2 * n_tokens * c.n_embd
    backward = 2 * n_tokens * (4 * c.intermediate_size + 2 * c.n_embd) + 4 * vocabulary
    return {
        "parameters, fp32": 4 * n / sharers,
        "parameters, bf16": 2 * n,
        "gradients, fp32": 4 * n,
        "Adam's moments, fp32": 8 * n / sharers,
        "activations": c.n_layer * stream + layer if recompute else c.n_layer * layer,
        "temporary": max(loss, backward),
    }


def largest_micro_batch(config: Config, memory: float, recompute: bool = False) -> int:
    """Tokens of the largest micro-batch, in whole sequences, that fits in 95% of `memory` bytes; 0 if none does."""
    sequences = 0
    while sum(memory_plan(config, (sequences + 1) * config.block_size, recompute).values()) <= 0.95 * memory:
        sequences += 1
    return sequences * config.block_size


# --- a run before it is started --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gpu:
    memory: float
    """Bytes that a process can have."""
    tflops: float
    """Dense bf16, of the data sheet."""
    mfu: float
    """That one of them reaches alone, in the convention of flops_per_token."""
    link: float
    """Bytes a second that a GPU sends, and receives, in a collective inside its node."""


# MFU: H100 and H200 by pretrain/LOG.md (60.9 and 63.0% with tiny_LLaMA_1b); A100 by TinyLlama's 24,000 tokens/s,
# communication included; the others are guesses. Links: H200 by pretrain/LOG.md (6 N bytes to and fro in 15 ms on 2
# GPUs, half of the data sheet); the others likewise half of theirs.
GPUS = {
    "H200": Gpu(150e9, 989, 0.63, 220e9),
    "H100": Gpu(84e9, 989, 0.61, 220e9),
    "A100-80G": Gpu(84e9, 312, 0.57, 150e9),
    "A100-40G": Gpu(42e9, 312, 0.57, 150e9),
    "L40S": Gpu(48e9, 362, 0.45, 20e9),
    "RTX4090": Gpu(24e9, 165, 0.5, 10e9),
    "RTX3090": Gpu(24e9, 71, 0.5, 10e9),
}
PER_NODE = 8


@dataclass(frozen=True)
class RunPlan:
    """What a run will take, by arithmetic: see `plan_run`."""

    gpu: str
    n_gpus: int
    sharding: str
    """optimizer or fsdp, as pretrain/tinyllama.py's."""
    memory: dict[str, float]
    """Bytes on each GPU, by what for."""
    tokens_per_s_per_gpu: float
    communication: float
    """Share of the time in which GPUs wait for each other's data."""
    days: float
    usd: float

    def __str__(self) -> str:
        known, total = GPUS[self.gpu], sum(self.memory.values())
        parts = ", ".join(f"{name} {n_bytes / 1e9:.1f}" for name, n_bytes in self.memory.items())
        fits = "" if total < 0.95 * known.memory else " DOES NOT FIT: smaller --micro_batch_size, or --recompute true"
        return (
            f"plan for {self.n_gpus} x {self.gpu}"
            + (f", --sharding {self.sharding}\n" if self.n_gpus > 1 else "\n")
            + f"memory: {total / 1e9:.1f} of {known.memory / 1e9:.0f} GB ({parts}){fits}\n"
            f"speed: {self.tokens_per_s_per_gpu:,.0f} tokens/s a GPU, {self.n_gpus * self.tokens_per_s_per_gpu:,.0f} "
            f"in all; {self.communication:.1%} of the time is communication\n"
            f"time: {self.days:.1f} days, {24 * self.days * self.n_gpus:,.0f} GPU-hours, ${self.usd:,.0f}"
        )


def plan_run(
    config: Config,
    gpu: str,
    n_gpus: int,
    *,
    tokens: float,
    global_batch_tokens: int,
    micro_batch_size: int,
    recompute: bool = False,
    network: float = 25e9,
    usd_per_hour: float = 2.0,
) -> RunPlan:
    """Sharding, memory, speed, days and cost of `tokens` on n_gpus, PER_NODE in a node.

    An optimizer step computes at the GPU's MFU and then exchanges, nothing hidden: with `optimizer`, fp32 gradients and
    bf16 weights inside a node, and between nodes the sums of a share of the gradients; with `fsdp`, bf16 weights twice
    a micro-batch, hidden behind computing where there is enough of it.

    Args:
        network: bytes a second between nodes, for each GPU.

    Raises:
        ValueError: a GPU that is not in GPUS.
    """
    if gpu not in GPUS:
        raise ValueError(f"no figures for the GPU {gpu!r}; known: {', '.join(GPUS)}")
    known, sharers = GPUS[gpu], min(n_gpus, PER_NODE)
    nodes = -(-n_gpus // PER_NODE)
    n_tokens = micro_batch_size * config.block_size
    memory = memory_plan(config, n_tokens, recompute, sharers)
    n = memory["parameters, bf16"] / 2
    alone = known.mfu * known.tflops * 1e12 / flops_per_token(config) * (0.75 if recompute else 1)
    compute_s = global_batch_tokens / n_gpus / alone
    inside, between = (sharers - 1) / sharers / known.link, (nodes - 1) / nodes / network
    sharding = "optimizer"
    exchange_s = 6 * n * inside + 2 * 4 * n / sharers * between
    if sum(memory.values()) > 0.95 * known.memory and n_gpus > 1:
        sharding = "fsdp"
        block = n / config.n_layer
        for name in ("parameters, fp32", "gradients, fp32", "Adam's moments, fp32"):
            memory[name] = (8 if "moments" in name else 4) * n / n_gpus
        memory["parameters, bf16"] = 2 * 2 * block  # the layer that computes and the one that is on its way
        micro_batches = global_batch_tokens / n_gpus / n_tokens
        volume = (2 * 2 * micro_batches + 4) * n
        exchange_s = volume * (n_gpus - 1) / n_gpus / (known.link if nodes == 1 else network)
        exchange_s = max(0.1 * exchange_s, exchange_s - compute_s)
    step_s = compute_s + exchange_s
    speed = global_batch_tokens / n_gpus / step_s
    days = tokens / (speed * n_gpus) / 86400
    return RunPlan(gpu, n_gpus, sharding, memory, speed, exchange_s / step_s, days, 24 * days * n_gpus * usd_per_hour)


def known_gpu(device: torch.device) -> str | None:
    """The key of GPUS that a device is, if any."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device).replace("GeForce ", "").replace("RTX ", "RTX")
    large = torch.cuda.get_device_properties(device).total_memory > 60e9
    name = re.sub(r"\bA100\b", "A100-80G" if large else "A100-40G", name)
    return next((gpu for gpu in GPUS if re.search(rf"\b{gpu}\b", name)), None)
