"""How fast a step is, and how fast it could be: FLOPs from the Config, peaks from the data sheets."""

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
        if pattern in name:
            return tflops[precision] * 1e12 if precision in tflops else None
    return None


# Memory of some cards that a process can have, in bytes.
CARDS = {"RTX 3090/4090": 24e9, "A100-40G": 42e9, "A100-80G": 84e9, "H100": 84e9}


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
