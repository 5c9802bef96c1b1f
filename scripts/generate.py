"""Let a model continue a text.

    python scripts/generate.py --checkpoint_dir out/tiny_LLaMA_1b --prompt "Once upon a time"
    python scripts/generate.py --checkpoint_dir out/tiny_LLaMA_1b --prompt "def f(" --draft_dir out/120m      # faster

The text appears as it is written, on stdout; everything else goes to stderr.
"""

import sys
import time
from pathlib import Path
from typing import Literal

import torch

from lit_gpt.cli import one_line_errors, parse
from lit_gpt.generate import ContextFull, check_settings, stream, stream_text
from lit_gpt.hf_tokenizer import starts_with_bos
from lit_gpt.int8 import quantize_int8
from lit_gpt.kernels import select_kernels
from lit_gpt.pretrained import load_model, open_pretrained, refuse_other_tokenizer, resolve_device
from lit_gpt.speculative import Speculator, refuse_different_tokenizers
from lit_gpt.tokenizer import Tokenizer


def main(
    checkpoint_dir: Path,
    prompt: str = "",
    max_new_tokens: int | None = None,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float = 0.95,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    stop: list[str] = (),
    num_samples: int = 1,
    seed: int = 1337,
    draft_dir: Path | None = None,
    prompt_lookup: bool = False,
    guesses: int | None = None,
    int8: bool = False,
    logprobs: bool = False,
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
        max_new_tokens: Stop after so many tokens, or at the end of a document; default: 200, or what the context holds.
        temperature: 0 always takes the most likely token; higher is more varied.
        top_k: Choose among the k most likely tokens only.
        top_p: Choose among the fewest tokens that have this probability together.
        min_p: Choose among the tokens at least so many times as likely as the likeliest.
        repetition_penalty: More than 1 makes what is in the text already less likely.
        stop: Strings that end the text, and are not written, as a list: '["."]', '["\\n\\n", "User:"]'.
        num_samples: Continuations to write.
        seed: Of the choices. The same one gives the same text, with a draft or --prompt_lookup if --guesses is given.
        draft_dir: A smaller model with the same tokenizer, whose guesses make this one faster and change nothing else.
        prompt_lookup: The same with guesses from the text itself: for texts that repeat what they hold.
        guesses: Of the draft or --prompt_lookup in each pass of the model; default: as many as pay, by the clock.
        int8: Round the weights to 8 bits: nearly twice as fast on a GPU, half the memory, a little less exact.
        logprobs: Print each token with its log-probability (by the model alone, temperature 1) to stderr.
        tokenizer_path: Folder or file; default: the one that is kept with the model.
        model_name: The preset of a .pth file that does not say.
        rope_scaling: Stretch the model's context by one of these; default: as it is.
        rope_factor: How many times longer.
        device: cpu, cuda or mps; auto takes a GPU if there is one.
        dtype: Of weights and arithmetic; default: bfloat16 on a GPU, float32 on a CPU.
    """
    n_new = 200 if max_new_tokens is None else max_new_tokens
    check_settings(temperature, top_k, top_p, n_new, min_p, repetition_penalty, num_samples)
    if "" in stop:
        raise ValueError("--stop holds an empty string, which ends every text before its first character: leave it out")
    device = resolve_device(device)
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
    if max_new_tokens is None:
        n_new = max(1, min(n_new, found.config.block_size + 1 - len(prompt_ids)))  # the last one is not read

    if (draft_dir or prompt_lookup) and (logprobs or repetition_penalty != 1):
        raise ValueError("--logprobs and --repetition_penalty do not go together with --draft_dir or --prompt_lookup")
    c = found.config
    heads = (c.n_head, c.n_query_groups, c.head_size)
    kernels = select_kernels("auto", device=torch.device(device), dtype=dtype, heads=heads, training=False)
    model = load_model(found, kernels, device, dtype)
    if int8:
        quantize_int8(model)
    print(f"{found.path}: {c.name}, {device}, {dtype}".replace("torch.", ""), file=sys.stderr)
    speculator = None
    if draft_dir is not None:
        found_draft = open_pretrained(draft_dir)
        refuse_different_tokenizers(found, found_draft)
        speculator = Speculator(model, load_model(found_draft, kernels, device, dtype), guesses)
    elif prompt_lookup:
        speculator = Speculator(model, None, guesses)

    generator = torch.Generator(device).manual_seed(seed)
    sampling = dict(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, generator=generator)
    full = None
    for _ in range(num_samples):
        if speculator is not None:
            new_ids = speculator.stream(prompt_ids, n_new, eos_id=tokenizer.eos_id, **sampling)
        else:
            settings = dict(**sampling, repetition_penalty=repetition_penalty, logprobs=logprobs)
            new_ids = stream(model, prompt_ids, n_new, eos_id=tokenizer.eos_id, **settings)
        t0, n, scored = time.perf_counter(), 0, []

        def counted(ids=new_ids, scored=scored):
            nonlocal n, full
            try:
                for n, new_id in enumerate(ids, start=1):  # noqa: B007
                    if logprobs:
                        scored.append(new_id)
                        new_id = new_id[0]
                    yield new_id
            except ContextFull as e:
                full = e  # which is said when all samples have been written

        print(prompt, end="", flush=True)
        try:
            for piece in stream_text(tokenizer, prompt_ids, counted(), stop):
                print(piece, end="", flush=True)
        finally:
            print()
            new_ids.close()  # where a stop string left it
        elapsed_s = time.perf_counter() - t0
        for new_id, logprob in scored:
            print(f"{logprob:9.4f}  {new_id:>6}  {tokenizer.decode([new_id])!r}", file=sys.stderr)
        print(f"{n} tokens in {elapsed_s:.1f} s, {n / elapsed_s:.1f} tokens/s", file=sys.stderr)
    if speculator is not None:
        print(speculator.stats, file=sys.stderr)
    if full is not None:
        raise full


if __name__ == "__main__":
    with one_line_errors():
        parse(main)
