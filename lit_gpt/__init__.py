"""TinyLlama's library: configuration, model, kernels, packed data, checkpoints, decoding."""

from lit_gpt.config import MODELS, Config

__all__ = ["MODELS", "Config"]
