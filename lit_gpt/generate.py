"""Decoding with a key/value cache: greedy, or sampled from what temperature, top k, top p and min p leave.

    for new_id in stream(model, prompt_ids, 100, eos_id=tokenizer.eos_id):
        ...
    rows = generate(model, [prompt_a, prompt_b], 100, temperature=0.8, top_p=0.95)     # prompts of any lengths

B batch, T tokens, V ids.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from types import ModuleType
from typing import Any, Protocol

import torch

from lit_gpt.decoder import Decoder, borrow
from lit_gpt.model import GPT


class ContextFull(ValueError):
    """The model's block_size was reached before max_new_tokens. `generated` holds what there was until then, and
    `logprobs` its log-probabilities, if they were asked for."""

    def __init__(self, block_size: int, generated: list[list[int]], logprobs: list[list[float]] | None = None) -> None:
        super().__init__(f"the text fills the model's context of {block_size} tokens; no more can be generated")
        self.generated, self.logprobs = generated, logprobs


# --- choosing a token ------------------------------------------------------------------------------------------------


def probabilities(
    logits: torch.Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> torch.Tensor:
    """The distribution that is sampled from, (..., V) fp32 for logits (..., V).

    Args:
        temperature: divides the logits; 0 puts everything on the largest.
        top_k: keep the k most likely ids; None: all.
        top_p: of those, keep the fewest most likely whose probabilities sum to at least p (nucleus sampling, Holtzman
            et al. 2019, arXiv:1904.09751).
        min_p: of those, keep the ones at least min_p times as likely as the likeliest (Nguyen et al. 2024,
            arXiv:2407.01082).
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
    p = logits.softmax(-1)
    if min_p > 0:
        p = p.where(p >= min_p * p.amax(-1, keepdim=True), 0)
        p /= p.sum(-1, keepdim=True)
    return p


class Choice:
    """How tokens are chosen from logits: with any settings, in PyTorch. R rows.

    What `evidence` holds of a drawn token is what speculative decoding must know of the draft's choice.
    """

    def __init__(self, temperature: float, top_k: int | None = None, top_p: float = 1.0, min_p: float = 0.0) -> None:
        self.settings = (temperature, top_k, top_p, min_p)

    def distribution(self, logits: torch.Tensor) -> torch.Tensor:
        return probabilities(logits, *self.settings)

    def draw(self, logits: torch.Tensor, noise: torch.Tensor | None) -> tuple[torch.Tensor, Any]:
        """An id for each row of logits (R, V): (R,) int64, and the evidence.

        Of V exponential clocks of rates p the first to ring is i with probability p_i; unlike torch.multinomial this
        never waits for the GPU.

        Args:
            noise: (R, V) exponentially distributed; None for temperature 0.
        """
        p = self.distribution(logits)
        return (p if noise is None else p / noise).argmax(-1), p


class FusedChoice(Choice):
    """The same for a temperature alone, in one launch of a kernel of kernels/decode.py."""

    def __init__(self, kernels: ModuleType, temperature: float) -> None:
        super().__init__(temperature)
        self.kernels, self.temperature = kernels, temperature

    def draw(self, logits: torch.Tensor, noise: torch.Tensor | None) -> tuple[torch.Tensor, Any]:
        ids, log_sum = self.kernels.draw(logits, self.temperature, noise)
        return ids, (logits, log_sum)


def choice_for(
    model: GPT, temperature: float, top_k: int | None = None, top_p: float = 1.0, min_p: float = 0.0
) -> Choice:
    """The fastest that knows these settings on the model's device."""
    kernels = model.kernels.decode
    if kernels is not None and model.transformer.wte.weight.is_cuda and top_k is None and top_p == 1 and min_p == 0:
        return FusedChoice(kernels, temperature)
    return Choice(temperature, top_k, top_p, min_p)


def clocks(logits: torch.Tensor, temperature: float, generator: torch.Generator | None = None) -> torch.Tensor | None:
    """The noise that Choice.draw wants."""
    if temperature == 0:
        return None
    return torch.empty_like(logits, dtype=torch.float32).exponential_(generator=generator)


def penalise(logits: torch.Tensor, seen: torch.Tensor, penalty: float) -> torch.Tensor:
    """Make the ids of `seen` (B, V) less likely: positive logits (B, V) are divided by the penalty, negative ones
    multiplied (Keskar et al. 2019, arXiv:1909.05858)."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def check_settings(
    temperature: float,
    top_k: int | None,
    top_p: float,
    max_new_tokens: int | None,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    num_samples: int = 1,
) -> None:
    """Raise ValueError naming the setting that makes no sense."""
    if not temperature >= 0:
        raise ValueError(f"temperature {temperature}: give 0 (greedy) or more")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k {top_k}: give 1 or more")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p {top_p}: give more than 0 and at most 1")
    if not 0 <= min_p <= 1:
        raise ValueError(f"min_p {min_p}: give 0 to 1")
    if not repetition_penalty > 0:
        raise ValueError(f"repetition_penalty {repetition_penalty}: give more than 0; 1 changes nothing")
    if max_new_tokens is not None and max_new_tokens < 1:
        raise ValueError(f"max_new_tokens {max_new_tokens}: give 1 or more")
    if num_samples < 1:
        raise ValueError(f"num_samples {num_samples}: give 1 or more")


def check_prompts(model: GPT, prompts: Sequence[Sequence[int]]) -> None:
    """Raise ValueError for an empty prompt, an id that the model does not have, a prompt longer than the context."""
    c = model.config
    longest = max(map(len, prompts), default=0)
    if not all(map(len, prompts)) or not prompts:
        raise ValueError("the prompt is empty: give at least one token, such as the tokenizer's BOS")
    if longest > c.block_size:
        raise ValueError(f"the prompt has {longest} tokens; the model takes {c.block_size}")
    wrong = [i for prompt in prompts for i in prompt if not 0 <= i < c.padded_vocab_size]
    if wrong:
        raise ValueError(f"token id {wrong[0]} in the prompt; the model knows 0 to {c.padded_vocab_size - 1}")


# --- one token after another -----------------------------------------------------------------------------------------


def decode(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    num_samples: int = 1,
    generator: torch.Generator | None = None,
    max_new_tokens: int | None = None,
    logprobs: bool = False,
) -> Iterator[torch.Tensor]:
    """The next token of every row, (B,) int64 on the CPU, again and again.

    Ends after max_new_tokens, or when the longest row fills the model's context; a token may still be predicted from a
    context that is just full.

    Args:
        temperature, top_k, top_p, min_p: as for `probabilities`; by default the likeliest token is taken.
        repetition_penalty: more than 1 makes what the row holds already, its prompt included, less likely.
        num_samples: rows that go on from each prompt, next to each other: B is len(prompts) · num_samples. The prompts
            are read once.
        generator: on the model's device; None: torch's own.
        logprobs: yield pairs: the tokens, and their log-probabilities (B,) by the model alone (temperature 1).

    Raises:
        ValueError: an empty prompt, an id that the model does not have, a prompt longer than the context, or settings
            that make no sense.
    """
    check_settings(temperature, top_k, top_p, max_new_tokens, min_p, repetition_penalty, num_samples)
    check_prompts(model, prompts)
    c, device = model.config, model.transformer.wte.weight.device
    longest = max(map(len, prompts))
    B = len(prompts) * num_samples
    n = c.block_size - longest + 1
    n = n if max_new_tokens is None else min(n, max_new_tokens)
    choice = choice_for(model, temperature, top_k, top_p, min_p)
    seen = None
    if repetition_penalty != 1:
        seen = torch.zeros(len(prompts), c.vocab_size, dtype=torch.bool)
        for row, prompt in zip(seen, prompts, strict=True):
            row[[i for i in prompt if i < c.vocab_size]] = True
        seen = seen.repeat_interleave(num_samples, 0).to(device)

    def choose(logits: torch.Tensor) -> tuple[torch.Tensor, ...]:
        penalised = logits if seen is None else penalise(logits, seen, repetition_penalty)
        token, _ = choice.draw(penalised, clocks(penalised, temperature, generator))
        if seen is not None:
            seen.scatter_(1, token[:, None], True)
        if not logprobs:
            return (token,)
        return token, logits.float().log_softmax(-1).gather(1, token[:, None])[:, 0]

    # One graph makes a step and the choice after it, if nothing else is asked of the logits.
    walks = isinstance(choice, FusedChoice) and seen is None and not logprobs

    def advance(decoder: Decoder, chosen: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        if walks:
            decoder.walk(choice.kernels.move, temperature > 0, generator)
            return (decoder.token,)
        logits = decoder.step(chosen[0][:, None], decoder.position)[:, 0]
        decoder.position.add_(1)
        return choose(logits)

    text_length = longest + n - 1  # the last token is not read
    with borrow(model, B, text_length) as decoder:
        with torch.inference_mode():
            chosen = choose(decoder.prefill(prompts, num_samples, text_length))
            decoder.token.copy_(chosen[0])
            decoder.position.copy_(torch.tensor([len(p) for p in prompts for _ in range(num_samples)]))
            decoder.inverse_temperature.fill_(1 / (temperature or 1))
        for i in range(n):
            with torch.inference_mode():
                arrived = _to_cpu(chosen)
                # A GPU computes the next step while this token is looked at; on a CPU that would only delay it.
                if device.type == "cuda" and i + 1 < n:
                    chosen = advance(decoder, chosen)
            tokens = arrived()
            yield tokens if logprobs else tokens[0]
            if device.type != "cuda" and i + 1 < n:
                with torch.inference_mode():
                    chosen = advance(decoder, chosen)


def _to_cpu(tensors: tuple[torch.Tensor, ...]) -> Callable[[], tuple[torch.Tensor, ...]]:
    """Start copying them, and return what waits for the copies, but not for what the GPU is given meanwhile."""
    if not tensors[0].is_cuda:
        return lambda: tensors
    copies = tuple(torch.empty_like(t, device="cpu", pin_memory=True).copy_(t, non_blocking=True) for t in tensors)
    event = torch.cuda.Event()
    event.record()

    def wait() -> tuple[torch.Tensor, ...]:
        event.synchronize()
        return copies

    return wait


def stream(
    model: GPT, prompt: Sequence[int], max_new_tokens: int, *, eos_id: int | None = None, **sampling
) -> Iterator[int]:
    """The ids that follow a prompt, one by one as they are decided, EOS included.

    Args:
        sampling: temperature (default 0: greedy), top_k, top_p, min_p, repetition_penalty, generator, logprobs, as for
            `decode`. With logprobs pairs are yielded: the id, and its log-probability.

    Raises:
        ContextFull: after as many tokens as the context holds, when neither max_new_tokens nor EOS came first.
    """
    generated: list[int] = []
    logprobs: list[float] | None = [] if sampling.get("logprobs") else None
    for chosen in decode(model, [prompt], max_new_tokens=max_new_tokens, **sampling):
        if logprobs is not None:
            chosen, logprob = chosen
            generated.append(int(chosen))
            logprobs.append(float(logprob))
            yield generated[-1], logprobs[-1]
        else:
            generated.append(int(chosen))
            yield generated[-1]
        if generated[-1] == eos_id:
            return
    if len(generated) < max_new_tokens:
        raise ContextFull(model.config.block_size, [generated], None if logprobs is None else [logprobs])


def generate(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    eos_id: int | None = None,
    **sampling,
) -> list[list[int]]:
    """The ids that follow each prompt, up to its EOS, which is included, or max_new_tokens. As `stream`, for a batch.

    Args:
        sampling: as for `decode`. With logprobs the result is two lists of rows, ids and log-probabilities.

    Raises:
        ContextFull: the longest row filled the context, and a row was not done; it holds all rows so far.
    """
    B = len(prompts) * sampling.get("num_samples", 1)
    rows: list[list[int]] = [[] for _ in range(B)]
    logprobs: list[list[float]] | None = [[] for _ in range(B)] if sampling.get("logprobs") else None
    done = [False] * B
    n = 0
    for n, chosen in enumerate(decode(model, prompts, max_new_tokens=max_new_tokens, **sampling), start=1):  # noqa: B007
        tokens, log_p = (chosen, None) if logprobs is None else chosen
        for i, token in enumerate(tokens.tolist()):
            if not done[i]:
                rows[i].append(token)
                if log_p is not None:
                    logprobs[i].append(log_p[i].item())
                done[i] = token == eos_id
        if all(done):
            break
    if n < max_new_tokens and not all(done):
        raise ContextFull(model.config.block_size, rows, logprobs)
    return rows if logprobs is None else (rows, logprobs)


# --- text ------------------------------------------------------------------------------------------------------------


class TextDecoder(Protocol):
    def decode(self, ids: Sequence[int]) -> str: ...


def stream_text(
    tokenizer: TextDecoder, prompt: Sequence[int], new_ids: Iterable[int], stop: Sequence[str] = ()
) -> Iterator[str]:
    """The text of new_ids as it grows, in pieces that joined give the text that follows the prompt's.

    Args:
        stop: the text ends before the first of these strings; what might become one is held back.
    """
    held = ""
    for piece in _pieces(tokenizer, prompt, new_ids):
        held += piece
        ends = [held.find(s) for s in stop if s in held]
        if ends:
            held = held[: min(ends)]
            break
        keep = max((n for s in stop for n in range(1, len(s)) if held.endswith(s[:n])), default=0)
        if len(held) > keep:
            yield held[: len(held) - keep]
            held = held[len(held) - keep :]
    if held:
        yield held


def _pieces(tokenizer: TextDecoder, prompt: Sequence[int], new_ids: Iterable[int]) -> Iterator[str]:
    """A token is decoded behind the tokens before it, because alone it would lose its leading space; a piece is held
    back while it ends in half a character."""
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
