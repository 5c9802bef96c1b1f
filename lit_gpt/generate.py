"""Decoding with a key/value cache: greedy, or sampled at a temperature from the top k or the top p.

    for new_id in stream(model, prompt_ids, 100, eos_id=tokenizer.eos_id):
        ...
    rows = generate(model, [prompt_a, prompt_b], 100, temperature=0.8, top_p=0.95)     # prompts of any lengths

B batch, T tokens, V ids.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import torch

from lit_gpt.model import GPT, KVCache


class ContextFull(ValueError):
    """The model's block_size was reached before max_new_tokens. `generated` holds what there was until then."""

    def __init__(self, block_size: int, generated: list[list[int]]) -> None:
        super().__init__(f"the text fills the model's context of {block_size} tokens; no more can be generated")
        self.generated = generated


def probabilities(
    logits: torch.Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float = 1.0
) -> torch.Tensor:
    """The distribution that is sampled from, (..., V) fp32 for logits (..., V).

    Args:
        temperature: divides the logits; 0 puts everything on the largest.
        top_k: keep the k most likely ids; None: all.
        top_p: of those, keep the fewest most likely whose probabilities sum to at least p (nucleus sampling, Holtzman
            et al. 2019, arXiv:1904.09751).
    """
    logits = logits.float()
    if temperature == 0:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    logits = logits / temperature
    if top_k is not None and top_k < logits.size(-1):
        smallest_kept = logits.topk(top_k).values[..., -1:]
        logits = logits.masked_fill(logits < smallest_kept, -torch.inf)
    if top_p < 1:
        values, order = logits.sort(dim=-1, descending=True)
        p = values.softmax(-1)
        beyond = p.cumsum(-1) - p >= top_p  # what precedes it is enough already
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), -torch.inf)
    return logits.softmax(-1)


def check_settings(temperature: float, top_k: int | None, top_p: float, max_new_tokens: int | None) -> None:
    """Raise ValueError naming the setting that makes no sense."""
    if not temperature >= 0:
        raise ValueError(f"temperature {temperature}: give 0 (greedy) or more")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k {top_k}: give 1 or more")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p {top_p}: give more than 0 and at most 1")
    if max_new_tokens is not None and max_new_tokens < 1:
        raise ValueError(f"max_new_tokens {max_new_tokens}: give 1 or more")


def decode(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    max_new_tokens: int | None = None,
) -> Iterator[torch.Tensor]:
    """The next token of every prompt, (B,) int64, again and again.

    Ends after max_new_tokens, or when the longest row fills the model's context; a token may still be predicted from a
    context that is just full.

    Args:
        generator: on the model's device; None: torch's own.

    Raises:
        ValueError: an empty prompt, an id that the model does not have, a prompt longer than the context, or settings
            that make no sense.
    """
    check_settings(temperature, top_k, top_p, max_new_tokens)
    c, device = model.config, model.lm_head.weight.device
    lengths = [len(prompt) for prompt in prompts]
    if not lengths or min(lengths) == 0:
        raise ValueError("the prompt is empty: give at least one token, such as the tokenizer's BOS")
    if max(lengths) > c.block_size:
        raise ValueError(f"the prompt has {max(lengths)} tokens; the model takes {c.block_size}")
    wrong = [i for prompt in prompts for i in prompt if not 0 <= i < c.padded_vocab_size]
    if wrong:
        raise ValueError(f"token id {wrong[0]} in the prompt; the model knows 0 to {c.padded_vocab_size - 1}")
    n = c.block_size - max(lengths) + 1
    n = n if max_new_tokens is None else min(n, max_new_tokens)
    cache = KVCache(c, len(prompts), max(lengths) + n - 1, device, model.lm_head.weight.dtype)

    # Shorter prompts are padded on the right. What padding leaves in the cache lies after a row's own position, where
    # the mask does not look, and is overwritten before the row gets there.
    padded = [[*prompt, *[0] * (max(lengths) - len(prompt))] for prompt in prompts]
    idx = torch.tensor(padded, device=device)  # (B, T)
    position = last = torch.tensor(lengths, device=device) - 1  # (B,) of the last token of each row
    positions = torch.arange(idx.size(1), device=device)  # (T,)
    for _ in range(n):
        with torch.inference_mode():
            logits = model(idx, cache=cache, positions=positions)  # (B, T, V), at first; then (B, 1, V)
            logits = logits[torch.arange(len(prompts), device=device), last, : c.vocab_size]  # (B, V) without padding
            if temperature == 0:
                token = logits.argmax(-1)
            else:
                p = probabilities(logits, temperature, top_k, top_p)
                token = torch.multinomial(p, 1, generator=generator)[:, 0]
        yield token
        idx, last = token[:, None], 0
        position = position + 1
        positions = position[:, None]


def stream(
    model: GPT, prompt: Sequence[int], max_new_tokens: int, *, eos_id: int | None = None, **sampling
) -> Iterator[int]:
    """The ids that follow a prompt, one by one as they are decided, EOS included.

    Args:
        sampling: temperature (default 0: greedy), top_k, top_p, generator, as for `decode`.

    Raises:
        ContextFull: after as many tokens as the context holds, when neither max_new_tokens nor EOS came first.
    """
    generated: list[int] = []
    for token in decode(model, [prompt], max_new_tokens=max_new_tokens, **sampling):
        generated.append(int(token))
        yield generated[-1]
        if generated[-1] == eos_id:
            return
    if len(generated) < max_new_tokens:
        raise ContextFull(model.config.block_size, [generated])


def generate(
    model: GPT, prompts: Sequence[Sequence[int]], max_new_tokens: int, *, eos_id: int | None = None, **sampling
) -> list[list[int]]:
    """The ids that follow each prompt, up to its EOS, which is included, or max_new_tokens. As `stream`, for a batch.

    Raises:
        ContextFull: the longest row filled the context, and a row was not done; `generated` holds all rows so far.
    """
    rows: list[list[int]] = [[] for _ in prompts]
    done = [False] * len(rows)
    n = 0
    for n, tokens in enumerate(decode(model, prompts, max_new_tokens=max_new_tokens, **sampling), start=1):  # noqa: B007
        for i, token in enumerate(tokens.tolist()):
            if not done[i]:
                rows[i].append(token)
                done[i] = token == eos_id
        if all(done):
            return rows
    if n < max_new_tokens:
        raise ContextFull(model.config.block_size, rows)
    return rows


class Decoder(Protocol):
    def decode(self, ids: Sequence[int]) -> str: ...


def stream_text(tokenizer: Decoder, prompt: Sequence[int], new_ids: Iterable[int]) -> Iterator[str]:
    """The text of new_ids as it grows, in pieces that joined give the text that follows the prompt's.

    A token is decoded behind the tokens before it, because alone it would lose its leading space; a piece is held back
    while it ends in half a character.
    """
    ids, start = list(prompt), max(0, len(prompt) - 8)  # a few tokens of context give the spaces right
    said = tokenizer.decode(ids[start:]).rstrip("\ufffd")
    for new_id in new_ids:
        ids.append(new_id)
        text = tokenizer.decode(ids[start:])
        if text.endswith("\ufffd"):
            continue
        yield text[len(said) :]
        start = max(start, len(ids) - 8)
        said = tokenizer.decode(ids[start:])
    if text := tokenizer.decode(ids[start:])[len(said) :]:  # ended within a character
        yield text
