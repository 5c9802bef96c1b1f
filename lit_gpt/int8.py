"""Weight-only int8: half of bf16's bytes, so decoding, which waits for the weights, is nearly twice as fast.

    quantize_int8(model)      # in place; after loading, before decoding

Each row of a matrix (the weights of one output) is divided by its own scale, largest magnitude / 127, and rounded
(absmax quantisation, as LLM.int8() does by row: Dettmers et al. 2022, arXiv:2208.07339). Activations stay as they are.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from lit_gpt.model import GPT, Linear


class Int8Linear(nn.Module):
    """x @ (weight · scale)ᵀ + bias of an int8 weight (O, C) and an fp32 scale (O,)."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        scale = weight.abs().amax(1).clamp(min=1e-12) / 127
        self.register_buffer("weight", (weight / scale[:, None]).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # For more rows than kernels/decode.py takes the product waits for arithmetic, not for the weights.
        if x.dtype == torch.float16:  # whose range sums of 127 · x would leave
            return F.linear(x, (self.weight * self.scale[:, None]).half(), self.bias)
        y = F.linear(x, self.weight.to(x.dtype))
        y *= self.scale  # in place, so that it stays in x's dtype
        return y if self.bias is None else y + self.bias


def quantize_int8(model: GPT) -> GPT:
    """Replace every matrix of the model but the embedding, in place, and return it. It can no longer be trained."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is Linear:
                setattr(module, name, Int8Linear(child))
    return model
