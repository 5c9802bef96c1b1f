"""How well a model predicts the same tokens when it reads them in longer and longer sequences.

    rows = perplexity_by_length(model, tokens, [2048, 4096, 8192])      # 1, 2 and 4 times the block size

A model of long contexts gets better with length, because its tokens have more before them; one that was trained on
shorter sequences gets worse beyond them, unless its rotation is slowed down (lit_gpt/kernels/rope.py).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from lit_gpt.config import ROPE_SCALINGS, Config
from lit_gpt.model import GPT


@dataclass(frozen=True)
class Row:
    length: int
    """Tokens that a sequence holds."""
    rope_scaling: str
    """Of the model while it was measured."""
    loss: float
    """Mean over all targets, in nats."""
    perplexity: float
    targets: int
    """Tokens that were predicted: nearly the same ones at each length."""


@torch.inference_mode()
def perplexity_by_length(
    model: GPT, tokens: torch.Tensor, lengths: Sequence[int], rope_scalings: Sequence[str] | None = None
) -> list[Row]:
    """Perplexity of `tokens` cut into sequences of each length, by each scaling.

    Args:
        model: its block_size is what it was trained on; a length beyond it is length / block_size as long, which is the
            rope_factor of the scalings.
        tokens: (N,) ids, delimiters included; what does not fill the longest sequence is left out.
        lengths: in tokens; each sequence predicts as many, from one token before the first.
        rope_scalings: of lit_gpt.config.ROPE_SCALINGS; "none" is the model as it is. Default: "none", and where the
            model is not stretched already, the other four.

    Returns:
        Rows by length, then scaling. Up to block_size there is one, "none": nothing is scaled.

    Raises:
        ValueError: fewer tokens than one sequence of the longest length, or a scaling for a model that has one.
    """
    config, longest, device = model.config, max(lengths), model.lm_head.weight.device
    if rope_scalings is None:
        rope_scalings = ROPE_SCALINGS if config.rope_scaling == "none" else ("none",)
    n = (len(tokens) - 1) // longest * longest
    if n <= 0:
        raise ValueError(f"{len(tokens)} tokens of text are too few: sequences of {longest} tokens need {longest + 1}")
    tokens = tokens.to(device, torch.long)
    rows = []
    for length in sorted(lengths):
        for scaling in rope_scalings if length > config.block_size else ("none",):
            longer = with_config(model, longer_config(config, length, scaling))
            loss = 0.0
            for start in range(0, n - length + 1, length):
                ids = tokens[None, start : start + length + 1]
                loss += longer(ids[:, :-1], ids[:, 1:]).item()
            targets = n // length * length
            rows.append(Row(length, scaling, loss / targets, math.exp(loss / targets), targets))
    return rows


def longer_config(config: Config, length: int, rope_scaling: str = "none") -> Config:
    """`config` for sequences of `length` tokens: scaled, or with "none" as it is, positions going on as they began."""
    if length <= config.block_size:
        return config
    if rope_scaling == "none":
        return replace(config, block_size=length)
    return config.stretched(rope_scaling, length / config.block_size)


def with_config(model: GPT, config: Config) -> GPT:
    """A model of `config`, which differs in its rotation alone, around the same parameters."""
    with torch.device("meta"):
        other = GPT(config, model.kernels)
    other.load_state_dict(model.state_dict(), assign=True)
    return other.eval()
