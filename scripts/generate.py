"""Let a model continue a text.

    python scripts/generate.py --checkpoint_dir out/tiny_LLaMA_1b --prompt "Once upon a time"

The text appears as it is written, on stdout; everything else goes to stderr.
"""

import sys
import time
from pathlib import Path
from typing import Literal

import torch

from lit_gpt.cli import one_line_errors, parse
from lit_gpt.generate import stream, stream_text
from lit_gpt.hf_tokenizer import starts_with_bos
from lit_gpt.kernels import select_kernels
from lit_gpt.pretrained import load_model, open_pretrained, refuse_other_tokenizer
from lit_gpt.tokenizer import Tokenizer


def main(
    checkpoint_dir: Path,
    prompt: str = "",
    max_new_tokens: int = 200,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float = 0.95,
    num_samples: int = 1,
    seed: int = 1337,
    tokenizer_path: Path | None = None,
    model_name: str | None = None,
    rope_scaling: Literal["none", "linear", "dynamic", "yarn", "llama3"] = "none",
    rope_factor: float = 1.0,
    device: str = "auto",
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
) -> None:
    """Let a model continue a text.

    Args:
        checkpoint_dir: A run, a step-* checkpoint, a Hugging Face folder, a folder that convert_hf_checkpoint.py wrote,
            or a .pth file of the original TinyLlama.
        prompt: What to continue.
        max_new_tokens: Stop after so many tokens, or at the end of a document.
        temperature: 0 always takes the most likely token; higher is more varied.
        top_k: Choose among the k most likely tokens only.
        top_p: Choose among the fewest tokens that have this probability together.
        num_samples: Continuations to write.
        seed: Of the choices.
        tokenizer_path: Folder or file; default: the one that is kept with the model.
        model_name: The preset of a .pth file that does not say.
        rope_scaling: Stretch the model's context by one of these; default: as it is.
        rope_factor: How many times longer.
        device: cpu, cuda or mps; auto takes a GPU if there is one.
        dtype: Of weights and arithmetic; default: bfloat16 on a GPU, float32 on a CPU.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, dtype) if dtype else torch.float32 if device == "cpu" else torch.bfloat16
    found = open_pretrained(checkpoint_dir, model_name).stretched(rope_scaling, rope_factor)
    tokenizer_path = tokenizer_path or found.tokenizer
    if tokenizer_path is None:
        raise ValueError(f"{checkpoint_dir} holds no tokenizer: give --tokenizer_path")
    tokenizer = Tokenizer(tokenizer_path)
    refuse_other_tokenizer(found, tokenizer)
    # As training had it: a model that always saw BOS first is lost without it, and the other way round.
    bos = "bos" in found.delimiters if found.delimiters else starts_with_bos(tokenizer_path)
    prompt_ids = tokenizer.encode(prompt, bos=bos, eos=False)
    if not prompt_ids:
        raise ValueError("this model's tokenizer has no token to begin with: give --prompt")

    model = load_model(found, select_kernels("auto", device=torch.device(device), dtype=dtype), device, dtype)
    print(f"{found.path}: {found.config.name}, {device}, {dtype}".replace("torch.", ""), file=sys.stderr)
    generator = torch.Generator(device).manual_seed(seed)
    for _ in range(num_samples):
        t0, n = time.perf_counter(), 0
        print(prompt, end="", flush=True)
        new_ids = stream(
            model,
            prompt_ids,
            max_new_tokens,
            eos_id=tokenizer.eos_id,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            generator=generator,
        )

        def counted(ids=new_ids):
            nonlocal n
            for n, new_id in enumerate(ids, start=1):  # noqa: B007
                yield new_id

        try:
            for piece in stream_text(tokenizer, prompt_ids, counted()):
                print(piece, end="", flush=True)
        finally:
            print()
        elapsed_s = time.perf_counter() - t0
        print(f"{n} tokens in {elapsed_s:.1f} s, {n / elapsed_s:.1f} tokens/s", file=sys.stderr)


if __name__ == "__main__":
    with one_line_errors():
        parse(main)
