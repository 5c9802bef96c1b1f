"""A checkpoint -> one GGUF file, for llama.cpp, ollama, LM Studio, phones and browsers.

    python scripts/convert_gguf.py --checkpoint_dir out/tinyllama --out_file tinyllama-q4_0.gguf --dtype q4_0

The tokenizer and its chat template are inside. The file is read again and each tensor compared within what its format
rounds; then a text is read with both models, and what the rounding costs is printed. K-quants (q4_k_m and the like) are
made by llama.cpp's own llama-quantize.
"""

import importlib.util
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Literal

import torch

from lit_gpt.chat_template import ChatTemplate
from lit_gpt.cli import one_line_errors, parse
from lit_gpt.gguf_file import check_supported, read_gguf, write_gguf
from lit_gpt.hf_tokenizer import starts_with_bos
from lit_gpt.pretrained import Pretrained, load_model, open_pretrained, refuse_other_tokenizer
from lit_gpt.tokenizer import Tokenizer
from lit_gpt.weights import whole_file

TEXT = Path(__file__).parent.parent / "PRETRAIN.md"
OURS = Literal["f32", "f16", "bf16", "q8_0", "q4_0", "q4_1"]
K_QUANTS = Literal["q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k"]


def main(
    checkpoint_dir: Path,
    out_file: Path,
    dtype: OURS | K_QUANTS = "q4_0",
    tokenizer_path: Path | None = None,
    model_name: str | None = None,
    rope_scaling: Literal["none", "linear", "yarn", "llama3"] = "none",
    rope_factor: float = 1.0,
    text: Path = TEXT,
    overwrite: bool = False,
) -> None:
    """Convert a checkpoint to GGUF, verified as it is written.

    Args:
        checkpoint_dir: A run (its latest checkpoint is taken), a step-* checkpoint, a Hugging Face folder, a folder
            that convert_hf_checkpoint.py wrote, or a .pth file of the original TinyLlama.
        out_file: Appears when all of it is written and verified.
        dtype: Of the matrices; f32, f16, bf16, q8_0, q4_0 and q4_1 are written here, q2_k to q6_k need llama.cpp's
            llama-quantize on the PATH.
        tokenizer_path: Folder or file of the tokenizer; default: the one that is kept with the checkpoint.
        model_name: The preset of a .pth file that does not say.
        rope_scaling: Stretch the model's context by one of these; default: as it is.
        rope_factor: How many times longer.
        text: To measure what rounding costs: the first 1,024 tokens of this file.
        overwrite: Replace out_file if it exists.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ImportError("the gguf package is missing: pip install gguf")
    found = open_pretrained(checkpoint_dir, model_name).stretched(rope_scaling, rope_factor)
    check_supported(found.config)
    tokenizer_path = tokenizer_path or found.tokenizer
    if tokenizer_path is None:
        raise ValueError(f"{checkpoint_dir} holds no tokenizer, and a GGUF file needs one: give --tokenizer_path")
    tokenizer = Tokenizer(tokenizer_path)
    refuse_other_tokenizer(found, tokenizer)
    add_bos = "bos" in found.delimiters if found.delimiters else starts_with_bos(tokenizer_path)
    template = ChatTemplate.of_model(tokenizer.path.parent, tokenizer)
    ids = tokenizer.encode(text.read_text(encoding="utf-8"), bos=add_bos, eos=False)
    ids = torch.tensor([ids[: min(1024, found.config.block_size) + 1]])

    what = dict(tokenizer=tokenizer_path, add_bos=add_bos, chat_template=template and template.source)
    if "_k" in dtype:
        quantize_by_llama_cpp(found, out_file, dtype, overwrite, **what)
    else:
        write_gguf(found.config, found.weights, out_file, dtype, overwrite=overwrite, **what)
    n = sum(tensor.numel() for tensor in found.weights.values())
    size = out_file.stat().st_size
    print(f"{out_file}: {n:,} parameters in {size:,} bytes, {8 * size / n:.2f} bits each with all that is inside")
    before = perplexity(found, ids)
    after = perplexity(Pretrained(out_file, found.config, read_gguf(out_file, found.config)), ids)
    print(
        f"perplexity of {text.name}, {ids.size(1) - 1:,} tokens: {before:.4f} before, {after:.4f} as {dtype} "
        f"({after / before - 1:+.2%})"
    )


def quantize_by_llama_cpp(found: Pretrained, out_file: Path, dtype: str, overwrite: bool, **what) -> None:
    """Write a file that loses nothing, and let llama-quantize make out_file of it."""
    tool = shutil.which("llama-quantize")
    if tool is None:
        raise FileNotFoundError(
            f"--dtype {dtype} needs llama.cpp's llama-quantize on the PATH (brew install llama.cpp, or build "
            "github.com/ggml-org/llama.cpp); q8_0, q4_0 and q4_1 need nothing"
        )
    kept = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
    widest = max((tensor.dtype for tensor in found.weights.values()), key=lambda d: d.itemsize)
    with whole_file(out_file, overwrite) as temporary, tempfile.TemporaryDirectory(dir=temporary.parent) as folder:
        exact = Path(folder) / "exact.gguf"
        write_gguf(found.config, found.weights, exact, kept[widest], **what)
        done = subprocess.run([tool, str(exact), str(temporary), dtype.upper()], capture_output=True, text=True)
        if done.returncode or not temporary.is_file():
            last = (done.stderr or done.stdout).strip().splitlines()[-1:]
            raise ValueError(f"{tool} failed with exit code {done.returncode}: {' '.join(last)}")
        read_gguf(temporary, found.config)


@torch.inference_mode()
def perplexity(found: Pretrained, ids: torch.Tensor) -> float:
    """Of ids (1, T + 1), in fp32; one model is in memory at a time."""
    model = load_model(found, dtype=torch.float32)
    loss = model(ids[:, :-1], ids[:, 1:]) / (ids.size(1) - 1)
    return loss.exp().item()


if __name__ == "__main__":
    with one_line_errors():
        parse(main)
