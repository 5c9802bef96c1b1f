"""A sharded checkpoint of a run as a single file.

    python scripts/consolidate_checkpoint.py --checkpoint_dir out/tinyllama --out_dir out/tinyllama/single

Writes lit_config.json and lit_model.safetensors, fp32, which every other script and --init_from read; reads them again
and compares, bit by bit. With --optimizer true also lit_optimizer.safetensors: Adam's moments, by parameter.
"""

from pathlib import Path

from lit_gpt import checkpoint
from lit_gpt.cli import one_line_errors, parse
from lit_gpt.hf_tokenizer import copy_tokenizer
from lit_gpt.pretrained import open_pretrained, write_lit
from lit_gpt.weights import whole_folder


def main(checkpoint_dir: Path, out_dir: Path, optimizer: bool = False, overwrite: bool = False) -> None:
    """Write the model of a run's checkpoint to one file.

    Args:
        checkpoint_dir: A run, of which the newest checkpoint is taken, or a step-... folder of it.
        out_dir: Appears when all of it is written and verified, with the run's tokenizer, if it has one.
        optimizer: Also write Adam's moments.
        overwrite: Replace out_dir if it exists.
    """
    found = open_pretrained(checkpoint_dir)
    with whole_folder(out_dir, overwrite) as folder:
        write_lit(found, folder)
        if found.tokenizer is not None:
            copy_tokenizer(found.tokenizer, folder)
        if optimizer:
            from safetensors.torch import save_file

            moments = checkpoint.load_tensors(found.path, "optimizer.state.")
            save_file(moments, folder / "lit_optimizer.safetensors")
    print(f"{found.path} -> {out_dir}")


if __name__ == "__main__":
    with one_line_errors():
        parse(main)
