"""A checkpoint of any kind -> a Hugging Face folder, whole: weights, configuration, tokenizer, card; verified.

written = write_hf_folder(Path("out/tinyllama"), Path("out/hf"))
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from lit_gpt.config import Config
from lit_gpt.hf import export
from lit_gpt.hf_tokenizer import export_tokenizer, starts_with_bos
from lit_gpt.model_card import model_card, n_parameters
from lit_gpt.pretrained import Pretrained, difference_from_transformers, open_pretrained, refuse_other_tokenizer
from lit_gpt.tokenizer import Tokenizer
from lit_gpt.weights import whole_folder

LOGITS_TOLERANCE = 1e-5  # relative to the largest logit; fp32 sums in another order give about 1e-6


@dataclass(frozen=True)
class Written:
    source: Path
    """The checkpoint that was taken."""
    config: Config
    parameters: int
    n_bytes: int
    """Of the weights' files."""
    difference: float | None
    """Of our logits from transformers', relative to the largest; None where transformers is not installed."""
    tokenizer: Path | None


def write_hf_folder(
    checkpoint_dir: Path,
    out_dir: Path,
    *,
    tokenizer_path: Path | None = None,
    model_name: str | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5_000_000_000,
    rope_scaling: str = "none",
    rope_factor: float = 1.0,
    overwrite: bool = False,
    card: Callable[[Pretrained], str] | None = None,
) -> Written:
    """Write a folder that AutoModelForCausalLM and AutoTokenizer load as it is.

    Args:
        checkpoint_dir: what lit_gpt.pretrained opens.
        out_dir: appears when all of it is written and verified.
        tokenizer_path: default: the one that is kept with the checkpoint.
        dtype: of the weights; None: what the checkpoint holds.
        card: makes the text of README.md; default: lit_gpt.model_card's.

    Raises:
        ValueError, OSError: what cannot be read or written, or a check that failed; out_dir is then as it was.
    """
    found = open_pretrained(checkpoint_dir, model_name).stretched(rope_scaling, rope_factor)
    tokenizer_path = tokenizer_path or found.tokenizer
    if tokenizer_path is not None:
        refuse_other_tokenizer(found, Tokenizer(tokenizer_path))
    with whole_folder(out_dir, overwrite) as folder:
        special_ids = {}
        if tokenizer_path is not None:
            add_bos = "bos" in found.delimiters if found.delimiters else starts_with_bos(tokenizer_path)
            length = found.config.block_size
            special_ids = export_tokenizer(tokenizer_path, folder, add_bos=add_bos, max_length=length)
        export(
            found.config,
            found.weights,
            folder,
            dtype=dtype,
            max_shard_bytes=max_shard_bytes,
            special_ids=special_ids,
        )
        text = card(found) if card else model_card(found, found.config.name or out_dir.name)
        (folder / "README.md").write_text(text, encoding="utf-8")
        size = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
        source, config, parameters = found.path, found.config, n_parameters(found.config)
        del found  # the check below holds a model of its own
        difference = difference_from_transformers(folder)
        if difference is not None and not difference <= LOGITS_TOLERANCE:
            raise ValueError(
                f"{out_dir} was not written: its logits differ from transformers' by {difference:.1e} of the largest"
            )
    return Written(source, config, parameters, size, difference, tokenizer_path)
