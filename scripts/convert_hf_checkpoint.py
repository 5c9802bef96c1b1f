"""A Hugging Face folder -> ours: lit_config.json, lit_model.safetensors and the tokenizer's files.

    python scripts/convert_hf_checkpoint.py --checkpoint_dir TinyLlama-1.1B --out_dir checkpoints/TinyLlama-1.1B

Reads safetensors and .bin, in one file or sharded, and the original TinyLlama's .pth. pretrain/tinyllama.py --init_from
and scripts/generate.py take the result.
"""

from pathlib import Path

from lit_gpt.cli import one_line_errors, parse
from lit_gpt.hf_tokenizer import copy_tokenizer
from lit_gpt.pretrained import open_pretrained, write_lit
from lit_gpt.weights import whole_folder


def main(checkpoint_dir: Path, out_dir: Path, model_name: str | None = None, overwrite: bool = False) -> None:
    """Convert a Hugging Face folder, or the original TinyLlama's .pth, to our format.

    Args:
        checkpoint_dir: The folder, or the .pth file.
        out_dir: Appears when all of it is written and verified.
        model_name: The preset of a .pth file that does not say; for a folder, the preset that it must be.
        overwrite: Replace out_dir if it exists.
    """
    found = open_pretrained(checkpoint_dir, model_name)
    with whole_folder(out_dir, overwrite) as folder:
        write_lit(found, folder)
        if found.tokenizer is not None:
            copy_tokenizer(found.tokenizer, folder)
    print(f"{out_dir}: {found.config}")
    if found.tokenizer is None:
        print(f"{checkpoint_dir} holds no tokenizer.model or tokenizer.json: none was copied")


if __name__ == "__main__":
    with one_line_errors():
        parse(main)
