"""Tokens/s of decoding against batch size, prompt and output length, beside transformers' generate and the floor that
the memory's bandwidth sets.

python scripts/benchmark.py decode --batch_size '[1, 8]' --int8 '[false, true]' --peer '[hf, hf-static]'
python scripts/benchmark.py decode --batch_size '[100]' --num_samples 10      # TinyLlama's table: batch 100, n = 10

Weights are random: time does not depend on them. Every row is the median of three runs after one that is not counted.
"""

import gc
import statistics
import time
from collections.abc import Callable
from json import dumps
from pathlib import Path

import torch

from lit_gpt.config import Config
from lit_gpt.generate import decode as decode_tokens
from lit_gpt.int8 import Int8Linear, quantize_int8
from lit_gpt.kernels import select_kernels
from lit_gpt.model import GPT
from lit_gpt.report import markdown_of

PEERS = ("hf", "hf-static")


def decode(
    model: str = "tiny_LLaMA_1b",
    batch_size: list[int] | None = None,
    prompt_length: list[int] | None = None,
    new_tokens: list[int] | None = None,
    num_samples: int = 1,
    int8: list[bool] | None = None,
    temperature: float = 0.0,
    peer: list[str] | None = None,
    kernels: str = "auto",
    json: Path | None = None,
) -> None:
    """Decoding: tokens/s after the first token, time to it, tokens/s in all, and the floor; every combination is a row.

    Args:
        model: a preset of lit_gpt/config.py.
        batch_size: prompts that are continued at once. Default: 1.
        prompt_length: tokens of a prompt. Default: 128.
        new_tokens: tokens that follow each. Default: 128.
        num_samples: continuations of each prompt.
        int8: with weight-only int8 or without. Default: without.
        temperature: 0 is greedy; with more the whole distribution is sampled from.
        peer: hf (transformers' generate as it is), hf-static (with a static cache, which it compiles).
        kernels: backends, as pretrain/tinyllama.py's --kernels.
        json: write the rows to this file as well.
    """
    c = Config.from_name(model)
    batch_size, prompt_length, new_tokens = batch_size or [1], prompt_length or [128], new_tokens or [128]
    check_decode(c, batch_size, prompt_length, new_tokens, num_samples, peer or [])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    bandwidth = copy_bandwidth(device)
    print(f"device copy: {bandwidth / 1e12:.2f} TB/s", flush=True)
    sizes = [(b, p, n) for b in batch_size for p in prompt_length for n in new_tokens]
    rows = []
    for name in [*("ours int8" if q else "ours" for q in ([False] if int8 is None else int8)), *(peer or [])]:
        if name in PEERS:
            run = hf_runner(c, device, dtype, name == "hf-static", num_samples, temperature)
            weight_bytes = matrix_elements(c) * dtype.itemsize
        else:
            network = build(c, kernels, device, dtype)
            if name == "ours int8":
                quantize_int8(network)
            run = runner(network, num_samples, temperature)
            weight_bytes = sum(
                m.weight.numel() * m.weight.element_size()
                for m in network.modules()
                if isinstance(m, (torch.nn.Linear, Int8Linear))
            )
        for b, p, n in sizes:
            B = b * num_samples
            kv_bytes = 2 * c.n_layer * c.n_query_groups * c.head_size * dtype.itemsize * B * (p + n / 2)
            floor = B * bandwidth / (weight_bytes + kv_bytes)
            row = {"by": name, "batch": b, "samples": num_samples, "prompt": p, "new": n}
            try:
                timings = [run(b, p, n) for _ in range(4)][1:]
                first_s, total_s = (statistics.median(t) for t in zip(*timings, strict=True))
                speed = B * (n - 1) / (total_s - first_s)
                row |= {
                    "tokens/s": round(speed),
                    "% of floor": round(100 * speed / floor, 1),
                    "first token ms": round(1e3 * first_s, 1),
                    "tokens/s in all": round(B * n / total_s),
                }
            except torch.OutOfMemoryError:
                row |= {"tokens/s": "out of memory"}
            rows.append(row)
            print(row, flush=True)
        network = run = None
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    report(rows, json)


def check_decode(
    c: Config, batch_size: list[int], prompt_length: list[int], new_tokens: list[int], num_samples: int, peer: list[str]
) -> None:
    """Raise ValueError naming all flags that make no sense. What does not fit the context would end early, and its rate
    be that of tokens that nobody wrote."""
    problems = [f"--peer {name}: known are {', '.join(PEERS)}" for name in peer if name not in PEERS]
    counts = dict(batch_size=batch_size, prompt_length=prompt_length, new_tokens=new_tokens, num_samples=[num_samples])
    problems += [f"--{flag} {n}: give 1 or more" for flag, values in counts.items() for n in values if n < 1]
    problems += [
        f"--prompt_length {p} and --new_tokens {n} exceed the {c.block_size + 1} tokens that {c.name} takes"
        for p in prompt_length
        for n in new_tokens
        if p + n > c.block_size + 1  # the last token is not read
    ]
    if problems:
        raise ValueError("; ".join(problems))


def build(c: Config, kernels: str, device: torch.device, dtype: torch.dtype) -> GPT:
    heads = (c.n_head, c.n_query_groups, c.head_size)
    selected = select_kernels(kernels, device=device, dtype=dtype, heads=heads, training=False)
    with device:
        network = GPT(c, selected)
    network.init_weights(1)
    return network.to(dtype).eval().requires_grad_(False)


def runner(network: GPT, num_samples: int, temperature: float) -> Callable[[int, int, int], tuple[float, float]]:
    """A function of (prompts, their length, new tokens): seconds to the first token of all rows, and to the last."""
    generator = torch.Generator(network.lm_head.weight.device).manual_seed(0)

    def run(b: int, p: int, n: int) -> tuple[float, float]:
        prompts = torch.randint(network.config.vocab_size, (b, p)).tolist()
        settings = dict(temperature=temperature, num_samples=num_samples, generator=generator)
        t0 = time.perf_counter()
        tokens = decode_tokens(network, prompts, max_new_tokens=n, **settings)
        next(tokens)
        first_s = time.perf_counter() - t0
        for _ in tokens:
            pass
        return first_s, time.perf_counter() - t0

    return run


def hf_runner(
    c: Config, device: torch.device, dtype: torch.dtype, static: bool, num_samples: int, temperature: float
) -> Callable[[int, int, int], tuple[float, float]]:
    """As `runner`, for transformers' model of the same shape."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from lit_gpt.hf import config_to_hf

    with device:
        network = LlamaForCausalLM(LlamaConfig(**config_to_hf(c))).to(dtype).eval()
    network.generation_config.eos_token_id = None
    settings = dict(do_sample=True, temperature=temperature, top_k=0) if temperature else dict(do_sample=False)
    settings |= dict(cache_implementation="static") if static else {}
    settings |= dict(num_return_sequences=num_samples) if num_samples > 1 else {}
    if num_samples > 1:  # greedy samples are all the same, and refused
        settings |= dict(do_sample=True, temperature=temperature or 1.0, top_k=0)

    def seconds(idx: torch.Tensor, n: int) -> float:
        t0 = time.perf_counter()
        network.generate(idx, attention_mask=torch.ones_like(idx), max_new_tokens=n, pad_token_id=0, **settings)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - t0

    def run(b: int, p: int, n: int) -> tuple[float, float]:
        idx = torch.randint(c.vocab_size, (b, p), device=device)
        return seconds(idx, 1), seconds(idx, n)

    return run


def matrix_elements(c: Config) -> int:
    """Elements that a decode step reads: all matrices but the embedding."""
    mlp = (3 if c.family == "llama" else 2) * c.n_embd * c.intermediate_size
    attention = c.n_embd * c.qkv_size + c.n_head * c.head_size * c.n_embd
    return c.n_layer * (mlp + attention) + c.padded_vocab_size * c.n_embd


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written in a second by a large copy."""
    source = torch.ones(2**30 if device.type == "cuda" else 2**27, device=device, dtype=torch.int8)
    target = torch.empty_like(source)
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    elapsed_s = []
    for _ in range(6):
        synchronize()
        t0 = time.perf_counter()
        target.copy_(source)
        synchronize()
        elapsed_s.append(time.perf_counter() - t0)
    return 2 * source.numel() / min(elapsed_s)


def report(rows: list[dict], path: Path | None) -> None:
    """The rows as a table, and as JSON if there is a path."""
    print(markdown_of(rows))
    if path is not None:
        path.write_text(dumps(rows, indent=1))
