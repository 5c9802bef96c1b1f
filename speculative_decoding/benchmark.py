"""A model alone against the same model with something that guesses for it: many prompts, mean and spread.

    python speculative_decoding/benchmark.py --target_dir out/tinyllama --draft_dir out/120m --prompts prompts.jsonl

Every prompt is continued by every method in turn, by the same number of tokens, its reading included. Speed-up is the
time of the target alone over that of the method, prompt by prompt. With --transformers the same comparison is made with
transformers' generate and its assistant_model, from Hugging Face folders of the two models.
"""

import statistics
import time
from collections.abc import Callable
from json import dumps, loads
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

from lit_gpt.cli import one_line_errors, parse
from lit_gpt.generate import generate
from lit_gpt.hf_tokenizer import starts_with_bos
from lit_gpt.int8 import quantize_int8
from lit_gpt.kernels import select_kernels
from lit_gpt.pretrained import load_model, open_pretrained, refuse_other_tokenizer, resolve_device
from lit_gpt.report import markdown_of
from lit_gpt.speculative import Speculator, refuse_different_tokenizers
from lit_gpt.tokenizer import Tokenizer

Method = Callable[[list[int]], list[int]]
"""Continues the ids of a prompt."""


def main(
    target_dir: Path,
    prompts: Path,
    draft_dir: Path | None = None,
    max_new_tokens: int = 128,
    prompt_tokens: int = 128,
    num_prompts: int = 40,
    temperatures: list[float] = (0.0, 1.0),
    guesses: int | None = None,
    int8: bool = False,
    transformers: bool = False,
    seed: int = 1337,
    device: str = "auto",
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    json: Path | None = None,
) -> None:
    """Measure what speculative decoding brings.

    Args:
        target_dir: The model whose text is wanted: whatever scripts/generate.py takes.
        prompts: JSON lines with a field "text", or a text file with a prompt on each line.
        draft_dir: A smaller model with the same tokenizer. Without one only n-grams of the text guess.
        max_new_tokens: Tokens to write after each prompt; a document's end does not stop them.
        prompt_tokens: A prompt's first so many tokens are taken.
        num_prompts: Prompts to take from the file.
        temperatures: 0 is greedy.
        guesses: In each pass of the target; default: adaptive.
        int8: Quantise the target's weights.
        transformers: Measure transformers' generate, alone and assisted, as well; both must be Hugging Face folders.
        seed: Of the samples.
        device: cpu or cuda; auto takes a GPU if there is one.
        dtype: Of weights and arithmetic; default: bfloat16 on a GPU, float32 on a CPU.
        json: Write the rows to this file as well.

    Raises:
        ValueError: names every number that makes no sense.
    """
    counts = dict(max_new_tokens=max_new_tokens, prompt_tokens=prompt_tokens, num_prompts=num_prompts)
    if problems := [f"--{flag} {n}: give 1 or more" for flag, n in counts.items() if n < 1]:
        raise ValueError("; ".join(problems))
    device = resolve_device(device)
    dtype = getattr(torch, dtype) if dtype else torch.float32 if device == "cpu" else torch.bfloat16
    found = open_pretrained(target_dir)
    if found.tokenizer is None:
        raise ValueError(f"{target_dir} holds no tokenizer")
    tokenizer = Tokenizer(found.tokenizer)
    refuse_other_tokenizer(found, tokenizer)
    # As training had it: a model that never saw BOS is lost behind one.
    bos = "bos" in found.delimiters if found.delimiters else starts_with_bos(found.tokenizer)
    ids = read_prompts(prompts, tokenizer, prompt_tokens, bos)[: num_prompts + 1]
    if len(ids) < 2:
        raise ValueError(f"{prompts} holds {len(ids)} prompts; give 2 or more: the first warms up")

    c = found.config
    heads = (c.n_head, c.n_query_groups, c.head_size)
    kernels = select_kernels("auto", device=torch.device(device), dtype=dtype, heads=heads, training=False)
    target = load_model(found, kernels, device, dtype)
    if int8:
        quantize_int8(target)
    draft = None
    if draft_dir is not None:
        found_draft = open_pretrained(draft_dir)
        refuse_different_tokenizers(found, found_draft)
        draft = load_model(found_draft, kernels, device, dtype)
    hf = load_transformers(target_dir, draft_dir, device, dtype) if transformers else {}

    rows = []
    for temperature in temperatures:
        generator = torch.Generator(device).manual_seed(seed)
        sampling = dict(temperature=temperature, generator=generator)
        speculators = {"n-grams": Speculator(target, None, guesses)}
        if draft is not None:
            speculators = {"draft model": Speculator(target, draft, guesses), **speculators}
        methods: dict[str, Method] = {
            "target alone": lambda ids, s=sampling: generate(target, [ids], max_new_tokens, **s)[0]
        }
        for name, speculator in speculators.items():
            methods[name] = lambda ids, x=speculator, s=sampling: x.generate([ids], max_new_tokens, **s)[0]
        for name, model_kwargs in hf.items():
            methods[name] = lambda ids, k=model_kwargs, t=temperature: hf_generate(ids, max_new_tokens, t, **k)
        seconds, texts = run(methods, ids, device, f"temperature {temperature}")
        for name in methods:
            base = "transformers alone" if name.startswith("transformers") else "target alone"
            speed = [max_new_tokens / s for s in seconds[name]]
            gain = [a / b for a, b in zip(seconds[base], seconds[name], strict=True)]
            row = {
                "temperature": temperature,
                "method": name,
                "tokens/s": spread(speed, 0),
                "speed-up": spread(gain, 2),
            }
            if name in speculators:
                stats = speculators[name].stats
                row["accepted"] = f"{100 * stats.acceptance_rate:.0f}%"
                row["tokens per pass"] = round(stats.tokens_per_pass, 2)
                pass_ms = {k: round(1e3 * s, 2) for k, s in sorted(speculators[name].pass_s.items())}
                print(f"temperature {temperature}, {name}, by its own account: {stats}")
                print(f"    milliseconds of a pass by its guesses: {pass_ms}")
            if temperature == 0 and name != base:
                same = sum(a == b for a, b in zip(texts[base], texts[name], strict=True))
                row["same text"] = f"{same} of {len(texts[name])}"
            rows.append(row)
    print(markdown_of(rows))
    if json is not None:
        json.write_text(dumps(rows, indent=1))


def read_prompts(path: Path, tokenizer: Tokenizer, n_tokens: int, bos: bool) -> list[list[int]]:
    """The first n_tokens ids of each prompt in the file."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if path.suffix == ".jsonl":
        try:
            lines = [loads(line)["text"] for line in lines]
        except (ValueError, KeyError, TypeError) as e:
            raise ValueError(f'--prompts {path}: not JSON lines with a "text" in each: {e!r}') from e
    return [tokenizer.encode(text, bos=bos, eos=False)[:n_tokens] for text in lines]


def run(
    methods: dict[str, Method], prompts: list[list[int]], device: str, title: str
) -> tuple[dict[str, list[float]], dict[str, list[list[int]]]]:
    """Seconds and texts of each method for each prompt but the first, which compiles and captures what there is."""
    seconds, texts = {name: [] for name in methods}, {name: [] for name in methods}
    for i, prompt in enumerate(tqdm(prompts, title, unit=" prompts")):
        for name, method in methods.items():
            for _ in range(1 if i else 2):
                t0 = time.perf_counter()
                new_ids = method(prompt)
                if device.startswith("cuda"):
                    torch.cuda.synchronize()
                elapsed_s = time.perf_counter() - t0
            if i:
                seconds[name].append(elapsed_s)
                texts[name].append(new_ids)
    return seconds, texts


def load_transformers(target_dir: Path, draft_dir: Path | None, device: str, dtype: torch.dtype) -> dict[str, dict]:
    try:
        from transformers import AutoModelForCausalLM
    except ImportError as e:
        raise ImportError(f"--transformers needs the package: pip install transformers ({e})") from e
    target = AutoModelForCausalLM.from_pretrained(target_dir, dtype=dtype).to(device)
    methods = {"transformers alone": dict(model=target)}
    if draft_dir is not None:
        draft = AutoModelForCausalLM.from_pretrained(draft_dir, dtype=dtype).to(device)
        methods["transformers assisted"] = dict(model=target, assistant_model=draft)
    methods["transformers n-grams"] = dict(model=target, prompt_lookup_num_tokens=10)
    return methods


def hf_generate(ids: list[int], max_new_tokens: int, temperature: float, model, **kwargs) -> list[int]:
    sampling = dict(do_sample=True, temperature=temperature, top_k=0) if temperature else dict(do_sample=False)
    idx = torch.tensor([ids], device=model.device)
    n = dict(max_new_tokens=max_new_tokens, min_new_tokens=max_new_tokens)
    out = model.generate(idx, attention_mask=torch.ones_like(idx), **n, **sampling, **kwargs)
    return out[0, len(ids) :].tolist()


def spread(values: list[float], digits: int) -> str:
    """Mean ± standard deviation over the prompts."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"


if __name__ == "__main__":
    with one_line_errors():
        parse(main)
