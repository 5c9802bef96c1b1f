"""Speculative decoding: a draft guesses a few tokens, the target looks at all of them in one pass, and what comes out
is distributed as if the target had been alone (Leviathan et al. 2022, arXiv:2211.17192; Chen et al. 2023,
arXiv:2302.01318).

    speculator = Speculator(target, draft)         # two models with one tokenizer
    speculator = Speculator(target)                # guesses by n-grams of the text itself, no second model
    rows = speculator.generate([prompt_a, prompt_b], 100, temperature=0.8, top_p=0.95)
    print(speculator.stats)

Reading the weights is what a token costs, and a pass over five tokens reads them once. So the gain is the number of
guesses that the target accepts, less the time of guessing.

B batch, k guesses of each row in a pass, V ids.
"""

import statistics
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from lit_gpt.decoder import Decoder, Graph
from lit_gpt.generate import Choice, ContextFull, FusedChoice, check_prompts, check_settings, choice_for, clocks
from lit_gpt.model import GPT
from lit_gpt.pretrained import Pretrained
from lit_gpt.tokenizer import Tokenizer

MAX_GUESSES = 10
ADAPTIVE_GUESSES = (1, 2, 3, 4, 5, 6, 8, 10)
"""What an adaptive draft chooses from; on a GPU each is a graph that is captured and timed first."""
TIMED_GUESSES = (4, 8, 2, 1)
"""Of these, what is tried anywhere else, so that the others' times can be told."""
PLAIN_PASSES = 3
"""Passes without guesses that are made soon, to compare with."""
NGRAM = 3
"""Longest end of a text that is looked for in the text before."""


def refuse_different_tokenizers(target: Pretrained, draft: Pretrained) -> None:
    """Raise ValueError when the two models do not write with the same tokenizer, or it is not known of one."""
    hashes = []
    for found in (target, draft):
        if found.tokenizer is None and found.tokenizer_sha256 is None:
            raise ValueError(f"{found.path} holds no tokenizer: a draft and a target must be known to share one")
        hashes.append(found.tokenizer_sha256 or Tokenizer(found.tokenizer).sha256)
    if hashes[0] != hashes[1]:
        raise ValueError(
            f"{draft.path} (tokenizer sha256 {hashes[1][:12]}..) cannot draft for {target.path} (sha256 "
            f"{hashes[0][:12]}..): their tokenizers differ, so an id of one means something else to the other"
        )


# --- the rule --------------------------------------------------------------------------------------------------------


def accept(
    p: torch.Tensor, q: torch.Tensor, guesses: torch.Tensor, uniform: torch.Tensor, noise: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which guesses stay, and the token after them: together distributed as p, whatever q is.

    Guess x is kept with probability min(1, p(x) / q(x)); at the first that is not, the token is drawn from what p has
    more than q, max(0, p - q), normalised; if all are kept, from p's last (Leviathan et al., theorem in appendix A).

    Args:
        p: (B, k + 1, V), the target's distribution of each guess and of the token after the last.
        q: (B, k, V), the distributions that the guesses were drawn from.
        guesses: (B, k).
        uniform: (B, k) in [0, 1).
        noise: (B, V) exponentially distributed, to draw with.

    Returns:
        (B,) how many guesses stay; (B,) the token after those.
    """
    k = guesses.size(1)
    p_guess = p[:, :k].gather(2, guesses[..., None])[..., 0]  # (B, k)
    q_guess = q.gather(2, guesses[..., None])[..., 0]
    kept = (uniform * q_guess < p_guess).long().cumprod(1).sum(1)  # (B,)
    here = kept[:, None, None].expand(-1, 1, p.size(2))
    q = torch.cat((q, torch.zeros_like(p[:, :1])), 1)  # after the last guess there is nothing to take off
    rest = (p.gather(1, here) - q.gather(1, here)).clamp(min=0)[:, 0]
    return kept, (rest / noise).argmax(-1)


def judge(
    choice: Choice,
    logits: torch.Tensor,
    guesses: torch.Tensor,
    evidence: list | None,
    uniform: torch.Tensor,
    noise: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`accept`, from what the target says and what Choice.draw left of the draft's reasons.

    Args:
        logits: (B, k + 1, V) of the target.
        evidence: of each of the k guesses; None: the draft was sure.
    """
    if isinstance(choice, FusedChoice):
        kernels, temperature = choice.kernels, choice.temperature
        largest, log_sum = (t.view(logits.shape[:2]) for t in kernels.draw(logits.flatten(0, 1), temperature))
        q = (None, None) if evidence is None else (torch.stack(t, 1) for t in zip(*evidence, strict=True))
        return kernels.accept(logits, log_sum, largest, *q, guesses, temperature, uniform, noise)
    p = choice.distribution(logits)
    if evidence is None:
        q = torch.zeros_like(p[:, 1:]).scatter_(2, guesses[..., None], 1.0)
    else:
        q = torch.stack(evidence, 1)
    return accept(p, q, guesses, uniform, noise)


# --- drafts ----------------------------------------------------------------------------------------------------------


class ModelDraft:
    """Guesses of a smaller model, with a cache of its own."""

    def __init__(self, model: GPT, vocab_size: int, batch_size: int, length: int) -> None:
        self.decoder = Decoder(model, batch_size, min(length, model.config.block_size))
        self.vocab_size = vocab_size
        self.known = model.transformer.wte.weight.size(0)

    def start(self, prompts: Sequence[Sequence[int]], copies: int, text_length: int) -> None:
        known = [[min(i, self.known - 1) for i in prompt] for prompt in prompts]
        self.decoder.prefill(known, copies, min(text_length, self.decoder.length))

    def guess(
        self, before: torch.Tensor, last: torch.Tensor, position: torch.Tensor, noise: torch.Tensor, choice: Choice
    ) -> tuple[torch.Tensor, list]:
        """`last` and k guesses of what follows it, (B, k + 1), and the evidence of each guess.

        Args:
            before, last: (B,) the last two tokens. The last but one may be a guess that this model has not read yet.
            position: (B,) of the last.
            noise: (k, B, V) to draw with.
        """
        idx = torch.stack((before, last), 1)
        ids, evidence = [last], []
        for i, clock in enumerate(noise):
            ahead = i if i else -1
            logits = self.decoder.forward(self._known(idx), position, ahead, only_last=True)[:, 0, : self.vocab_size]
            if logits.size(1) < self.vocab_size:  # what it does not know it never guesses
                logits = F.pad(logits, (0, self.vocab_size - logits.size(1)), value=-torch.inf)
            guess, why = choice.draw(logits, clock)
            ids.append(guess)
            evidence.append(why)
            idx = guess[:, None]
        return torch.stack(ids, 1), evidence

    def _known(self, idx: torch.Tensor) -> torch.Tensor:
        """Tables of embeddings are padded to different sizes."""
        return idx if self.known >= self.vocab_size else idx.clamp(max=self.known - 1)

    def read(self, before: torch.Tensor, last: torch.Tensor, position: torch.Tensor) -> None:
        """Catch up with the text, without guessing."""
        self.decoder.step(self._known(torch.stack((before, last), 1)), position - 1)

    def keep(self, position: torch.Tensor, guesses: torch.Tensor, kept: torch.Tensor, token: torch.Tensor) -> None:
        """Its cache holds the guesses; those that were wrong are overwritten."""

    def room(self) -> int:
        """Longest row that it can guess for, guesses included."""
        return self.decoder.length


class NgramDraft:
    """Guesses that the text goes on as it did where it last read like this (prompt lookup decoding)."""

    def __init__(self, batch_size: int, length: int, device: torch.device) -> None:
        self.text = torch.zeros(batch_size, length + MAX_GUESSES + 2, dtype=torch.int64, device=device)

    def start(self, prompts: Sequence[Sequence[int]], copies: int, text_length: int) -> None:
        for i, prompt in enumerate(p for p in prompts for _ in range(copies)):
            self.text[i, : len(prompt)] = torch.as_tensor(prompt)

    def guess(
        self, before: torch.Tensor, last: torch.Tensor, position: torch.Tensor, noise: torch.Tensor, choice: Choice
    ) -> tuple[torch.Tensor, None]:
        """As ModelDraft.guess. There is no evidence: it is sure."""
        text, at = self.text, position[:, None]
        text.scatter_(1, at, last[:, None])
        slots = torch.arange(text.size(1), device=text.device)[None]
        # How many tokens up to each slot equal those up to the end; the longest agreement counts, of several the last.
        same = torch.ones_like(text, dtype=torch.bool)
        agreement = torch.zeros_like(text)
        for n in range(NGRAM):
            same = same & (text.roll(n, 1) == text.gather(1, (at - n).clamp(min=0))) & (slots >= n) & (slots < at)
            agreement += same
        found = (agreement * text.size(1) + slots * (agreement > 0)).argmax(1, keepdim=True)  # (B, 1)
        # Beyond the end the text is taken to repeat itself.
        steps = torch.arange(len(noise), device=text.device)[None] % (at - found).clamp(min=1)
        return torch.cat((last[:, None], text.gather(1, found + 1 + steps)), 1), None

    def read(self, before: torch.Tensor, last: torch.Tensor, position: torch.Tensor) -> None:
        """As ModelDraft.read."""
        self.text.scatter_(1, position[:, None], last[:, None])

    def keep(self, position: torch.Tensor, guesses: torch.Tensor, kept: torch.Tensor, token: torch.Tensor) -> None:
        """Write what stays behind the text: all guesses, then the token over the first that was wrong."""
        k = guesses.size(1)
        self.text.scatter_(1, position[:, None] + 1 + torch.arange(k, device=position.device), guesses)
        self.text.scatter_(1, (position + kept + 1)[:, None], token[:, None])

    def room(self) -> int:
        return self.text.size(1)


# --- passes ----------------------------------------------------------------------------------------------------------


@dataclass
class Stats:
    """What speculation has brought so far, over all calls of a Speculator."""

    guessed: int = 0
    accepted: int = 0
    guessing_passes: int = 0
    row_passes: int = 0
    """All passes of the target, with guesses and without, times the rows that were not done."""
    tokens: int = 0
    """That came out of these, those beyond an EOS included."""
    seconds: float = 0.0
    """Of these, with all that the draft did."""
    plain_token_s: deque[float] = field(default_factory=lambda: deque(maxlen=256))
    """What a token takes the target alone: in the last passes without guesses, less the draft's reading."""

    @property
    def acceptance_rate(self) -> float:
        """Share of the guesses that stayed."""
        return self.accepted / max(1, self.guessed)

    @property
    def tokens_per_pass(self) -> float:
        """Of one row, over all passes; without speculation it is 1."""
        return self.tokens / max(1, self.row_passes)

    @property
    def speedup(self) -> float | None:
        """Tokens/s of all passes over those of the target alone; None while there is nothing to compare."""
        if not self.plain_token_s or not self.seconds:
            return None
        return self.tokens / self.seconds * statistics.median(self.plain_token_s)

    @property
    def does_not_pay(self) -> bool:
        """Whether it is slower than the target alone, by enough passes of both kinds to say so."""
        seen = self.guessing_passes >= 8 and len(self.plain_token_s) >= PLAIN_PASSES
        return seen and self.speedup is not None and self.speedup < 1

    def __str__(self) -> str:
        speedup = f", {self.speedup:.2f} times as fast as without" if self.speedup else ""
        return (
            f"{100 * self.acceptance_rate:.0f}% of {self.guessed} guesses accepted, {self.tokens_per_pass:.2f} tokens "
            f"per pass of the target{speedup}"
        )


class Speculator:
    """A target, and what guesses for it.

    Args:
        target, draft: models with the same tokenizer; without a draft, n-grams of the text guess.
        guesses: in each pass; None: as many as pay, by the acceptance and the times seen so far, and hardly any where
            none does. (Times differ from run to run, and so do samples then, whatever the seed; with a number they are
            the same.)
    """

    def __init__(self, target: GPT, draft: GPT | None = None, guesses: int | None = None) -> None:
        if guesses is not None and not 1 <= guesses <= MAX_GUESSES:
            raise ValueError(f"{guesses} guesses in a pass: give 1 to {MAX_GUESSES}")
        self.target, self.draft, self.guesses = target, draft, guesses
        self.stats = Stats()
        self._passes: _Passes | None = None
        self._kept, self._looked_at = 7.0, 10.0
        """Guesses that stayed, of those before which all did; the older the less they weigh."""
        self.pass_s: dict[int, float] = {}
        """Seconds of a pass, by the number of guesses, with all that the draft does in it."""
        self._begun = 0
        """Passes over all texts; with a fixed number of guesses those of this text."""
        self._cold = set(range(MAX_GUESSES + 1))
        """Numbers of guesses whose next pass is the first of its kind, and slow."""

    def stream(self, prompt: Sequence[int], max_new_tokens: int, *, eos_id: int | None = None, **sampling):
        """The ids that follow a prompt, EOS included, as they are decided; as generate.stream.

        Args:
            sampling: temperature, top_k, top_p, min_p, generator, as for generate.decode.
        """
        rows: list[list[int]] = [[]]
        said = 0
        for _ in self._run([prompt], rows, max_new_tokens, eos_id, 1, **sampling):
            yield from rows[0][said:]
            said = len(rows[0])

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        eos_id: int | None = None,
        num_samples: int = 1,
        **sampling,
    ) -> list[list[int]]:
        """The ids that follow each prompt, EOS included; as generate.generate."""
        rows: list[list[int]] = [[] for _ in range(len(prompts) * num_samples)]
        for _ in self._run(prompts, rows, max_new_tokens, eos_id, num_samples, **sampling):
            pass
        return rows

    def _run(
        self,
        prompts: Sequence[Sequence[int]],
        rows: list[list[int]],
        max_new_tokens: int,
        eos_id: int | None,
        num_samples: int,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        min_p: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> Iterator[None]:
        """Fill the rows, pass after pass.

        Raises:
            ContextFull: as generate.generate does.
            ValueError: as generate.decode does.
        """
        check_settings(temperature, top_k, top_p, max_new_tokens, min_p, num_samples=num_samples)
        check_prompts(self.target, prompts)
        block_size, longest = self.target.config.block_size, max(map(len, prompts))
        n = min(max_new_tokens, block_size - longest + 1)
        settings = (temperature, top_k, top_p, min_p)
        passes = self._passes
        length = min(longest + n + MAX_GUESSES, block_size)
        if passes is None or not passes.fits(len(rows), length, settings):
            self._passes = passes = _Passes(self.target, self.draft, len(rows), length, settings)
            self.pass_s = passes.prepare(ADAPTIVE_GUESSES if self.guesses is None else (self.guesses,))
            self._cold = set(range(MAX_GUESSES + 1)) - self.pass_s.keys()
        lengths = [len(prompt) for prompt in prompts for _ in range(num_samples)]
        # The last token is not read: as the target alone has it, whatever more there is room for.
        first = passes.start(prompts, num_samples, longest + n - 1, generator)
        done = [self._append(row, [token], n, eos_id) for row, token in zip(rows, first, strict=True)]
        yield
        # A GPU begins the next pass while this one is looked at, unless that may leave nothing to do, or no room.
        running: list[tuple[int, Callable]] = []
        if self.guesses is not None:
            self._begun = 0  # a seed must give the same samples again
        try:
            while not all(done):
                active = [r for r, d in enumerate(done) if not d]
                while len(running) < 1 + (passes.device.type == "cuda"):
                    coming = sum(k + 1 for k, _ in running)
                    if coming and n - min(len(rows[r]) for r in active) <= coming:
                        break
                    # Positions up to the last guess must exist; the last token of a row need not be looked at.
                    room = min(length, passes.draft.room()) - max(lengths[r] + len(rows[r]) for r in active) - coming
                    if coming and room < MAX_GUESSES:
                        break
                    k = self._next(self._begun, room)
                    self._begun += 1
                    running.append((k, passes.begin(k, done, room >= 0, generator)))
                k, wait = running.pop(0)
                kept, new, elapsed_s, read_s = wait()
                self._count(k, [kept[r] for r in active], elapsed_s, read_s)
                for r in active:
                    done[r] = self._append(rows[r], new[r][: kept[r]] + new[r][-1:], n, eos_id)
                yield
            if n < max_new_tokens and not all(row[-1] == eos_id for row in rows):
                raise ContextFull(block_size, rows)
        finally:  # also where the text is full, or a stop string ends it
            if self.stats.does_not_pay:
                warnings.warn(f"speculation does not pay here: {self.stats}", stacklevel=3)

    @staticmethod
    def _append(row: list[int], tokens: list[int], n: int, eos_id: int | None) -> bool:
        """Add the tokens up to EOS or to n in all. Returns whether the row is done."""
        for token in tokens:
            row.append(token)
            if token == eos_id or len(row) == n:
                return True
        return False

    def _count(self, k: int, kept: list[int], elapsed_s: float, read_s: float = 0.0) -> None:
        """Take note of a pass: its guesses, how many of each row stayed, its seconds and those of ModelDraft.read."""
        stats = self.stats
        stats.row_passes += len(kept)
        stats.tokens += sum(kept) + len(kept)
        stats.seconds += elapsed_s
        if k == 0:
            stats.plain_token_s.append((elapsed_s - read_s) / len(kept))
        else:
            stats.guessed += k * len(kept)
            stats.accepted += sum(kept)
            stats.guessing_passes += 1
            # Two sums: the mean of each pass's own share would be too small, as long runs would count as one.
            weight = 0.9 ** len(kept)
            self._kept = weight * self._kept + sum(kept)
            self._looked_at = weight * self._looked_at + sum(min(n + 1, k) for n in kept)
        if k in self._cold:
            self._cold.remove(k)
            return
        known = self.pass_s.get(k)
        self.pass_s[k] = elapsed_s if known is None else 0.8 * known + 0.2 * min(elapsed_s, 4 * known)

    def _next(self, i: int, room: int) -> int:
        """Guesses in pass i; now and then none, to compare with, or a number on trial: one that was not timed yet, or,
        where none pays, the one that comes nearest to it."""
        few = 0 not in self.pass_s or len(self.stats.plain_token_s) < PLAIN_PASSES
        if i % 64 == 1 or (self.guesses is None and few and i % 2):
            k = 0
        elif self.guesses is not None:
            k = self.guesses
        elif i % 8 == 0:
            k = next((g for g in TIMED_GUESSES if g <= room and g not in self.pass_s), 0) or self._best(at_least=1)
        else:
            k = self._best()
        return k if k <= room else max(g for g in (0, *ADAPTIVE_GUESSES) if g <= max(0, room))

    def _best(self, at_least: int = 0) -> int:
        """The number of guesses with the most tokens expected in a second.

        A pass with k guesses, each kept with probability a, gives 1 + a + .. + aᵏ tokens; its time is what such passes
        took, or else what the guesses of others seem to have cost.
        """
        seen, kept_rate = self.pass_s, min(self._kept / self._looked_at, 0.98)
        if 0 not in seen or len(seen) < 2:
            return 4
        each = min(max(0.0, seen[k] - seen[0]) / k for k in seen if k)

        def tokens_per_s(k: int) -> float:
            return sum(kept_rate**i for i in range(k + 1)) / seen.get(k, seen[0] + k * each)

        return max((k for k in (0, *ADAPTIVE_GUESSES) if k >= at_least), key=tokens_per_s)


class _Passes:
    """The state on the device, for one batch size and one way to sample: two caches, and the last two tokens of each
    row. On a GPU a whole pass (guesses, the target's look at them, the choice) is one CUDA graph for each k."""

    def __init__(self, target: GPT, draft: GPT | None, batch_size: int, length: int, settings: tuple) -> None:
        self.settings, self.batch_size, self.length = settings, batch_size, length
        self.choice = choice_for(target, *settings)
        self.V = target.config.vocab_size
        self.target = Decoder(target, batch_size, length)
        self.device = self.target.device
        if draft is None:
            self.draft = NgramDraft(batch_size, length, self.device)
        else:
            self.draft = ModelDraft(draft, self.V, batch_size, length)
        self.before, self.last, self.position = (
            torch.ones(batch_size, dtype=torch.int64, device=self.device) for _ in range(3)
        )
        self.noise: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.graphs: dict[int, Graph] = {}

    def fits(self, batch_size: int, length: int, settings: tuple) -> bool:
        return self.batch_size == batch_size and length <= self.length and self.settings == settings

    @torch.inference_mode()
    def start(
        self,
        prompts: Sequence[Sequence[int]],
        copies: int,
        text_length: int,
        generator: torch.Generator | None = None,
    ) -> list[int]:
        """Read the prompts, as Decoder.prefill. Returns the first token of each row."""
        logits = self.target.prefill(prompts, copies, text_length)
        self.last.copy_(self.choice.draw(logits, clocks(logits, self.settings[0], generator))[0])
        room = self.draft.room()
        self.draft.start([p[:room] for p in prompts], copies, text_length)
        self.before.copy_(torch.tensor([prompt[-1] for prompt in prompts for _ in range(copies)]))
        self.position.copy_(torch.tensor([len(prompt) for prompt in prompts for _ in range(copies)]))
        return self.last.tolist()

    @torch.inference_mode()
    def prepare(self, guesses: Sequence[int]) -> dict[int, float]:
        """On a GPU, capture the passes of so many guesses, and of none. Returns the seconds that each takes."""
        pass_s = {}
        room = min(self.length, self.draft.room()) - 2
        for k in (0, *guesses) if self.device.type == "cuda" else ():
            if k > room:
                continue
            self._capture(k)
            begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            for i in range(4):  # the first is on its way to the GPU while the others are launched
                if i == 1:
                    begun.record()
                self.position.fill_(1)
                if k == 0:
                    self.draft.read(self.before, self.last, self.position)
                self.graphs[k]()
            ended.record()
            ended.synchronize()
            self.position.fill_(1)
            pass_s[k] = begun.elapsed_time(ended) / 3e3  # of three passes, in milliseconds
        return pass_s

    def _capture(self, k: int) -> None:
        """The noise for passes of k guesses, and on a GPU the graph."""
        if k in self.noise:
            return
        self.noise[k] = (
            torch.ones(k + 1, self.batch_size, self.V, device=self.device),
            torch.full((self.batch_size, k), 0.5, device=self.device),
        )
        if self.device.type == "cuda":
            state = [t.clone() for t in (self.before, self.last, self.position)]
            self.graphs[k] = Graph(lambda: self._pass(k))
            for mine, was in zip((self.before, self.last, self.position), state, strict=True):
                mine.copy_(was)

    @torch.inference_mode()
    def begin(
        self, k: int, done: list[bool], draft_follows: bool, generator: torch.Generator | None = None
    ) -> Callable[[], tuple[list[int], list[list[int]], float, float]]:
        """Begin a pass. Returns what waits for it, and gives for each row how many guesses stay, and its guesses with
        the token after them last; and the seconds that it took, and those of them in which the draft only read."""
        if any(done):  # they go on, at the beginning of their caches, where there is always room
            stay = torch.tensor([not d for d in done], device=self.device)
            self.position.copy_(self.position * stay + ~stay)
        self._capture(k)
        cuda = self.device.type == "cuda"
        if cuda:
            begun, read, ended = (torch.cuda.Event(enable_timing=True) for _ in range(3))
            begun.record()
        t0 = time.perf_counter()
        if k == 0 and draft_follows:
            self.draft.read(self.before, self.last, self.position)
        if cuda:
            read.record()
        t1 = time.perf_counter()
        exponential, uniform = self.noise[k]
        if self.settings[0] != 0:
            exponential.exponential_(generator=generator)
            uniform.uniform_(generator=generator)
        result = self.graphs[k]() if cuda else self._pass(k)
        t2 = time.perf_counter()
        if cuda:
            result = torch.empty_like(result, device="cpu", pin_memory=True).copy_(result, non_blocking=True)
            ended.record()

        def wait() -> tuple[list[int], list[list[int]], float, float]:
            elapsed_s, read_s = t2 - t0, t1 - t0
            if cuda:
                ended.synchronize()
                elapsed_s, read_s = begun.elapsed_time(ended) / 1e3, begun.elapsed_time(read) / 1e3
            kept, *new = result.T.tolist()
            return kept, [list(row) for row in zip(*new, strict=True)], elapsed_s, read_s

        return wait

    def _pass(self, k: int) -> torch.Tensor:
        """Move on from (before, last, position). Returns (B, k + 2): kept, the guesses, the token after."""
        before, last, position = self.before, self.last, self.position
        exponential, uniform = self.noise[k]
        idx, evidence = last[:, None], None
        if k:
            idx, evidence = self.draft.guess(before, last, position, exponential[:k], self.choice)
        logits = self.target.forward(idx, position)
        if k:
            kept, token = judge(self.choice, logits, idx[:, 1:], evidence, uniform, exponential[k])
        else:
            kept, token = torch.zeros_like(last), self.choice.draw(logits[:, 0], exponential[0])[0]
        self.draft.keep(position, idx[:, 1:], kept, token)
        if isinstance(self.choice, FusedChoice):
            return self.choice.kernels.settle(idx, kept, token, before, last, position)
        result = torch.cat((kept[:, None], idx[:, 1:], token[:, None]), 1)
        before.copy_(idx.gather(1, kept[:, None])[:, 0])
        last.copy_(token)
        position.add_(kept + 1)
        return result
