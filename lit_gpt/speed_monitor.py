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
