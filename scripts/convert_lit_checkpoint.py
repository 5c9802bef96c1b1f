"""Our checkpoint -> a Hugging Face folder that AutoModelForCausalLM and AutoTokenizer load as it is.

    python scripts/convert_lit_checkpoint.py --checkpoint_dir out/tiny_LLaMA_1b --out_dir out/tiny_LLaMA_1b/hf

What was written is read again, mapped back and compared bit by bit, and its logits in fp32 are compared with those of
transformers where that is installed. If anything differs there is an error, exit code 1, and no folder.
"""

from pathlib import Path
from typing import Literal

import torch

from lit_gpt.cli import one_line_errors, parse
from lit_gpt.hf_folder import write_hf_folder
from lit_gpt.weights import parse_bytes


def main(
    checkpoint_dir: Path,
    out_dir: Path,
    tokenizer_path: Path | None = None,
    model_name: str | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    max_shard_size: str = "5GB",
    rope_scaling: Literal["none", "linear", "dynamic", "yarn", "llama3"] = "none",
    rope_factor: float = 1.0,
    overwrite: bool = False,
) -> None:
    """Convert our checkpoint to a Hugging Face folder, verified as it is written.

    Args:
        checkpoint_dir: A run (its latest checkpoint is taken), a step-* checkpoint, a folder that
            convert_hf_checkpoint.py wrote, or a .pth file of the original TinyLlama.
        out_dir: Appears when all of it is written and verified.
        tokenizer_path: Folder or file of the tokenizer; default: the one that is kept with the checkpoint.
        model_name: The preset of a .pth file that does not say.
        dtype: Of the weights; default: what the checkpoint holds, which is float32 for our runs.
        max_shard_size: Largest safetensors file, such as 5GB or 500MB; more are written, with an index, where needed.
        rope_scaling: Stretch the model's context by one of these; default: as it is.
        rope_factor: How many times longer.
        overwrite: Replace out_dir if it exists.
    """
    written = write_hf_folder(
        checkpoint_dir,
        out_dir,
        tokenizer_path=tokenizer_path,
        model_name=model_name,
        dtype=getattr(torch, dtype) if dtype else None,
        max_shard_bytes=parse_bytes(max_shard_size),
        rope_scaling=rope_scaling,
        rope_factor=rope_factor,
        overwrite=overwrite,
    )
    print(f"{written.source}: {written.config.name}")
    print(
        f"{out_dir}: {written.parameters:,} parameters, {written.n_bytes:,} bytes; bit by bit what the checkpoint holds"
    )
    if written.difference is None:
        print("logits not compared: transformers is not installed (pip install transformers)")
    else:
        print(f"logits equal transformers' to {written.difference:.1e} of the largest")
    if written.tokenizer is None:
        print("no tokenizer is known for this checkpoint: give --tokenizer_path to have it written too")


if __name__ == "__main__":
    with one_line_errors():
        parse(main)
