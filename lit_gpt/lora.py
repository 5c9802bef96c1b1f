"""LoRA: small trainable matrices beside frozen ones (Hu et al. 2021, arXiv:2106.09685), and QLoRA's 4-bit frozen ones.

    adapters = add_lora(model, rank=16, alpha=32)       # what to train and save; the rest of the model is frozen
    write_adapters(adapters, config, folder, base)      # a folder that peft loads
    weights = merge(config, weights, folder)            # base + adapters as ordinary weights; adapters of peft's, too

C inputs, O outputs, R rank.
"""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn as nn

from lit_gpt.config import Config
from lit_gpt.hf import join_qkv, name_table, split_qkv
from lit_gpt.kernels import linear
from lit_gpt.model import GPT, Linear
from lit_gpt.weights import LazyWeights, open_weights, read_json, write_json, write_safetensors

ADAPTER_CONFIG = "adapter_config.json"
PREFIX = "base_model.model."  # peft's, before transformers' names


class LowRank(nn.Module):
    """x (..., C) -> alpha / R · x Aᵀ Bᵀ (..., O), in fp32 parameters; zero before training."""

    def __init__(self, C: int, O: int, rank: int, alpha: float, device: torch.device) -> None:  # noqa: E741
        super().__init__()
        self.A = nn.Parameter(torch.empty(rank, C, device=device))
        self.B = nn.Parameter(torch.zeros(O, rank, device=device))
        self.rank, self.alpha = rank, alpha

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(linear(x, self.A.to(x.dtype)), (self.B * (self.alpha / self.rank)).to(x.dtype))


class LoRALinear(nn.Module):
    """A frozen linear layer and its adapter."""

    def __init__(self, base: nn.Module, lora: LowRank) -> None:
        super().__init__()
        self.base, self.lora = base, lora

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.lora(x)


class QuantizedLinear(nn.Module):
    """A frozen linear layer in 4-bit NormalFloat with double quantization (Dettmers et al. 2023, arXiv:2305.14314):
    about 4.13 bits a weight, computed with in the dtype of its input."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        from bitsandbytes.functional import quantize_4bit

        packed, self.state = quantize_4bit(weight.contiguous(), quant_type="nf4", compress_statistics=True)
        self.register_buffer("packed", packed, persistent=False)
        self.bias = bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        from bitsandbytes import matmul_4bit

        return matmul_4bit(x, self.packed.t(), quant_state=self.state, bias=self.bias)


def add_lora(
    model: GPT, rank: int, alpha: float, seed: int = 0, quantize_on: torch.device | None = None
) -> nn.ModuleDict:
    """Give every linear layer of the blocks an adapter, and freeze everything else.

    Args:
        model: as load_model made it; changed in place.
        seed: of A, which is random; B is zero, so the model answers as before.
        quantize_on: a device on which the blocks' weights become 4-bit ones, one after the other, so that the whole
            model is never there.

    Returns:
        The adapters by the name of their layer, dots as dashes.

    Raises:
        ImportError: bitsandbytes is missing, where it is needed.
    """
    if quantize_on is not None:
        try:
            import bitsandbytes  # noqa: F401
        except ImportError as e:
            raise ImportError(f"4-bit weights need bitsandbytes: pip install bitsandbytes ({e})") from e
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    adapters = nn.ModuleDict()
    for name, layer in list(model.transformer.h.named_modules()):
        if not isinstance(layer, Linear):
            continue
        O, C = layer.weight.shape  # noqa: E741
        device = quantize_on or layer.weight.device
        lora = LowRank(C, O, rank, alpha, device)
        start = torch.empty(rank, C).uniform_(-1, 1, generator=generator) / math.sqrt(C)  # as peft: kaiming, a = √5
        lora.A.data.copy_(start)
        base: nn.Module = layer
        if quantize_on is not None:
            bias = None if layer.bias is None else layer.bias.to(device)
            base = QuantizedLinear(layer.weight.to(device), bias)
        parent, _, child = name.rpartition(".")
        setattr(model.transformer.h.get_submodule(parent), child, LoRALinear(base, lora))
        adapters[f"transformer.h.{name}".replace(".", "-")] = lora
    if quantize_on is not None:
        model.to(quantize_on)
    return adapters


def write_adapters(adapters: nn.ModuleDict, config: Config, folder: Path, base: str) -> None:
    """Write adapter_config.json and adapter_model.safetensors, as peft's LoRA for the Hugging Face form of the model.

    Where our query, key and value are one matrix and theirs are three, A is written three times and B is cut.

    Args:
        folder: exists.
        base: path or hub id of the model that they belong to.
    """
    table = name_table(config)
    tensors: dict[str, torch.Tensor] = {}
    for name, lora in adapters.items():
        theirs = table[f"{name.replace('-', '.')}.weight"]
        A, B = (p.detach().float().cpu() for p in (lora.A, lora.B))
        parts = split_qkv(B, config) if len(theirs) == 3 else (B,)
        for their, part in zip(theirs, parts, strict=True):
            stem = PREFIX + their.removesuffix(".weight")
            tensors |= {f"{stem}.lora_A.weight": A, f"{stem}.lora_B.weight": part.contiguous()}
    some = next(iter(adapters.values()))
    modules = sorted({name.split(".lora_")[0].rpartition(".")[2] for name in tensors})
    write_json(
        folder / ADAPTER_CONFIG,
        {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "r": some.rank,
            "lora_alpha": some.alpha,
            "lora_dropout": 0.0,
            "target_modules": modules,
            "bias": "none",
            "inference_mode": True,
        },
    )
    layout = {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}
    write_safetensors(folder, layout, tensors.items(), stem="adapter_model")


def merge(config: Config, weights: Mapping[str, torch.Tensor], folder: Path) -> Mapping[str, torch.Tensor]:
    """A model's weights with the adapters in `folder` added, W + alpha / R · B A, in fp32 where there is one.

    Raises:
        FileNotFoundError: no adapters there.
        ValueError: they are not LoRA as it is written above, or not of this model.
    """
    if not (folder / ADAPTER_CONFIG).is_file():
        raise FileNotFoundError(f"{folder} holds no adapters: no {ADAPTER_CONFIG}")
    settings = read_json(folder / ADAPTER_CONFIG)
    plain = {"peft_type": "LORA", "bias": "none", "use_dora": False, "use_rslora": False, "fan_in_fan_out": False}
    empty = dict.fromkeys(("rank_pattern", "alpha_pattern", "modules_to_save", "layer_replication"))
    other = [f"{key} {settings[key]!r}" for key, only in plain.items() if settings.get(key, only) != only]
    other += [f"{key} {settings[key]!r}" for key in empty if settings.get(key)]
    if other:
        raise ValueError(f"{folder / ADAPTER_CONFIG}: only plain LoRA is read, and this has {', '.join(other)}")
    tensors = open_weights(folder / "adapter_model.safetensors")
    scale = settings["lora_alpha"] / settings["r"]
    table = name_table(config)

    updates: dict[str, dict[str, tuple[int, ...]]] = {}
    known = set()
    for ours, theirs in table.items():
        stems = [PREFIX + name.removesuffix(".weight") for name in theirs]
        adapted = {f"{stem}.lora_{part}.weight" for stem in stems for part in "AB"} & set(tensors)
        if adapted:
            known |= adapted
            updates[ours] = dict(zip(stems, theirs.values(), strict=True))
    if unknown := sorted(set(tensors) - known):
        raise ValueError(f"{folder}: {unknown[0]} and {len(unknown) - 1} more do not belong to {config.name!r}")
    for ours, stems in updates.items():
        for stem, shape in stems.items():
            if f"{stem}.lora_A.weight" in tensors:
                A, B = (tensors[f"{stem}.lora_{part}.weight"] for part in "AB")
                if (B.size(0), A.size(1)) != shape or A.size(0) != B.size(1):
                    raise ValueError(f"{folder}: {stem} is for {(B.size(0), A.size(1))}, and {ours} has {shape}")

    def delta(stem: str, shape: tuple[int, ...]) -> torch.Tensor:
        if f"{stem}.lora_A.weight" not in tensors:
            return torch.zeros(shape)
        A, B = (tensors[f"{stem}.lora_{part}.weight"].float() for part in "AB")
        return scale * (B @ A)

    def read(ours: str) -> torch.Tensor:
        if ours not in updates:
            return weights[ours]
        parts = [delta(stem, shape) for stem, shape in updates[ours].items()]
        return weights[ours].float() + (parts[0] if len(parts) == 1 else join_qkv(*parts, config))

    return LazyWeights({ours: lambda ours=ours: read(ours) for ours in table})
