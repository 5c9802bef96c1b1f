"""Small models and tokenizers for tests."""

import io
import runpy
import sys
from pathlib import Path
from unittest import mock

import torch

from lit_gpt import Config
from lit_gpt.hf import shapes
from lit_gpt.pretrained import Pretrained, write_lit

ROOT = Path(__file__).parent.parent
TINY = dict(n_layer=2, n_embd=64, n_head=4, n_query_groups=2, intermediate_size=96, block_size=64, vocab_size=512)
DYNAMIC = dict(rope_scaling="dynamic", rope_factor=4.0, rope_original_size=12)
"""For TINY: frequencies that depend on the length of a text beyond 12 tokens."""


def random_weights(config: Config, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, torch.Tensor]:
    """Values all over, norms and biases too, so that exchanging any two tensors changes the logits."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes(config).items():
        spread = 0.5 if len(shape) == 1 else 2 * shape[1] ** -0.5
        weights[name] = (torch.randn(shape, generator=generator) * spread + (len(shape) == 1)).to(dtype)
    return weights


def train_sentencepiece(path: Path, **options) -> Path:
    """A byte-fallback BPE model like Llama's, trained on this project's own sources."""
    import sentencepiece

    text = [line for file in sorted((ROOT / "lit_gpt").glob("*.py")) for line in file.read_text().splitlines()]
    model = io.BytesIO()
    llama = dict(
        model_type="bpe",
        vocab_size=512,
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(text), model_writer=model, **{**llama, **options})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.getvalue())
    return path


def write_lit_folder(folder: Path, tokenizer: bool = True, dtype: torch.dtype = torch.float32, **overrides) -> Config:
    """A folder in our format, with random weights and a tokenizer."""
    config = Config(name="tiny", **{**TINY, **overrides})
    folder.mkdir(parents=True, exist_ok=True)
    write_lit(Pretrained(folder, config, random_weights(config, dtype)), folder)
    if tokenizer:
        train_sentencepiece(folder / "tokenizer.model")
    return config


def run_script(name: str, *flags: object) -> int | str:
    """scripts/{name} with these flags, in this process. Returns its exit code, or the line that it died with."""
    argv = [name, *map(str, flags)]
    with mock.patch.object(sys, "argv", argv):
        try:
            runpy.run_path(str(ROOT / "scripts" / name), run_name="__main__")
        except SystemExit as e:
            return e.code
    return 0
