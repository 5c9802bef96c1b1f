"""How likely a model finds one text after another: log-likelihoods of many (context, continuation) pairs at once.

    for i, log_likelihood, is_greedy in score(model, [(context_ids, continuation_ids), ...]):
        ...

Nothing is padded and little is computed twice. Pairs whose inputs begin alike (the choices of a question, questions
behind the same examples) form a group that computes its common prefix once; groups are laid end to end in packs of some
ten thousand tokens; logits are computed where a token is asked about and nowhere else.
"""

import bisect
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist

from lit_gpt.kernels.shared_prefix import SharedPrefixAttention
from lit_gpt.model import GPT

Pair = tuple[Sequence[int], Sequence[int]]
"""Ids of a context, at least one, and of its continuation, at least one."""


@dataclass
class Group:
    """Inputs that share their first `prefix` tokens; an input alone is all prefix."""

    inputs: list[tuple[int, ...]]
    prefix: int

    @property
    def tokens(self) -> int:
        return self.prefix + sum(len(ids) - self.prefix for ids in self.inputs)


@dataclass
class Question:
    """One pair, as rows of a group: logits at input[first : first + len(targets)] say how likely the targets are."""

    index: int
    host: int  # which input of the group; where this pair's input is the beginning of another's, that one
    first: int
    targets: Sequence[int]


@torch.no_grad()  # not inference_mode: the rotary tables made here may serve a training step later
def score(model: GPT, pairs: Sequence[Pair], pack_tokens: int | None = None) -> Iterator[list[tuple[int, float, bool]]]:
    """(index of the pair, log p(continuation | context) in nats, whether greedy decoding would have written it), in
    lists as packs are done; the longest first.

    With torch.distributed, all ranks call this with the same pairs: each computes its share of the packs, and every
    rank as many, so that sharded models stay in step; the lists are of this rank's pairs.

    Args:
        model: in evaluation mode; a pair's tokens but the last must fit its block_size.
        pack_tokens: tokens of one forward pass, more where one text has more; None: 32,768 on a GPU, 2,048 elsewhere,
            halved while memory is short.

    Raises:
        ValueError: an empty context or continuation, or a pair that is too long.
    """
    device = model.lm_head.weight.device
    block_size = model.config.block_size
    longest = 0
    for i, (context, continuation) in enumerate(pairs):
        if not context or not continuation:
            raise ValueError(f"pair {i}: the context and the continuation need a token each")
        n = len(context) + len(continuation)
        if n - 1 > block_size:
            raise ValueError(f"pair {i} has {n:,} tokens; the model takes {block_size:,} and one to predict")
        longest = max(longest, n - 1)
    pack_tokens = max(pack_tokens or (32_768 if device.type == "cuda" else 2_048), longest)
    groups, questions = group(pairs, pack_tokens)
    world_size, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)

    packs = pack(groups, pack_tokens)
    todo = deque((members, True) for members in packs[rank::world_size])
    if len(todo) < -(-len(packs) // world_size):
        smallest = min(range(len(groups)), key=lambda g: groups[g].tokens)
        todo.append(([smallest], False))  # to keep step; nobody asked for the answer
    waiting = None  # the last pack's answer stays on the device while the next pack is prepared
    while todo:
        members, wanted = todo.popleft()
        try:
            answer = _forward(model, [groups[g] for g in members], [questions[g] for g in members])
        except torch.OutOfMemoryError:
            if len(members) == 1:
                raise
            todo.appendleft((members, wanted))
            todo = deque((half, wanted) for members, wanted in todo for half in (members[::2], members[1::2]) if half)
            torch.cuda.empty_cache()
            continue
        if waiting is not None:
            yield _collect(*waiting)
        waiting = answer if wanted else None
    if waiting is not None:
        yield _collect(*waiting)


def group(pairs: Sequence[Pair], pack_tokens: int) -> tuple[list[Group], list[list[Question]]]:
    """Groups of inputs, none of more than pack_tokens, and the questions about each.

    In sorted order, inputs that begin alike are neighbours. A neighbour joins a group when that saves more tokens than
    the group saves without it.
    """
    inputs = [(*context, *continuation[:-1]) for context, continuation in pairs]
    groups: list[Group] = []
    questions: list[list[Question]] = []
    last: tuple[int, ...] = ()
    # From the end backwards: an input comes after those that it is the beginning of.
    for i in sorted(range(len(inputs)), key=inputs.__getitem__, reverse=True):
        ids, targets = inputs[i], pairs[i][1]
        common = _common(ids, last)
        if common < len(ids):  # else it is the beginning of the last one, and nothing new is to be computed
            g = groups[-1] if groups else None
            joined = g and Group([*g.inputs, ids], min(common, g.prefix if len(g.inputs) > 1 else common))
            saved = joined and joined.prefix * (len(joined.inputs) - 1) - g.prefix * (len(g.inputs) - 1)
            if joined and saved > 0 and joined.tokens <= pack_tokens:
                groups[-1] = joined
            else:
                groups.append(Group([ids], len(ids)))
                questions.append([])
            last = ids
        questions[-1].append(Question(i, len(groups[-1].inputs) - 1, len(ids) - len(targets), targets))
    return groups, questions


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many first tokens are the same."""
    return bisect.bisect_left(range(min(len(a), len(b))), True, key=lambda n: a[: n + 1] != b[: n + 1])


def pack(groups: Sequence[Group], pack_tokens: int) -> list[list[int]]:
    """Groups, by index, that together have at most pack_tokens; the largest packs first, so that memory that does not
    suffice shows at once. Best fit, decreasing."""
    room: list[tuple[int, int]] = []  # (free tokens, pack), sorted
    packs: list[list[int]] = []
    for g in sorted(range(len(groups)), key=lambda g: -groups[g].tokens):
        tokens = groups[g].tokens
        at = bisect.bisect_left(room, (tokens, -1))
        if at < len(room):
            free, p = room.pop(at)
        else:
            free, p = pack_tokens, len(packs)
            packs.append([])
        packs[p].append(g)
        bisect.insort(room, (free - tokens, p))
    return packs


def _forward(
    model: GPT, groups: Sequence[Group], questions: Sequence[Sequence[Question]]
) -> tuple[list[Question], torch.Tensor, torch.Tensor]:
    """One pass over groups laid end to end: the questions, and for their targets, one question's after the other's, the
    log-probability (fp32) and whether it is the most likely token. On the device, perhaps not computed yet."""
    # Prefixes first, those that are continued before the others; then continuations (see SharedPrefixAttention).
    order = sorted(range(len(groups)), key=lambda g: len(groups[g].inputs) == 1)
    ids: list[int] = []
    positions: list[int] = []
    starts = []  # row of each group's prefix
    for g in order:
        prefix = groups[g].prefix
        starts.append(len(ids))
        ids += groups[g].inputs[0][:prefix]
        positions += range(prefix)
    T = min(64, model.config.block_size)  # where a batch's rows begin means nothing here; a row must fit the model
    padding = -sum(groups[g].tokens for g in order) % T
    ids += [0] * padding
    positions += [0] * padding

    asked: list[Question] = []
    rows: list[int] = []
    continuations: list[list[int]] = []
    for g, start in zip(order, starts, strict=True):
        prefix, inputs = groups[g].prefix, groups[g].inputs
        begins = []  # what to add to a position behind the prefix for its row
        if len(inputs) > 1:
            continuations.append([len(input) - prefix for input in inputs])
            for input in inputs:
                begins.append(len(ids) - prefix)
                ids += input[prefix:]
                positions += range(prefix, len(input))
        for question in questions[g]:
            asked.append(question)
            for p in range(question.first, question.first + len(question.targets)):
                rows.append(start + p if p < prefix else begins[question.host] + p)

    device = model.lm_head.weight.device
    prefixes = [groups[g].prefix for g in order] + [padding] * (padding > 0)
    targets = [target for question in asked for target in question.targets]
    idx, position, logits_at, target = (_to(device, x) for x in (ids, positions, rows, targets))
    with _attention(model, SharedPrefixAttention(prefixes, continuations, device)):
        logits = model(idx.view(-1, T), positions=position.view(-1, T), logits_at=logits_at)  # (rows, V)
    log_p, greedy = [], []
    for part, of in zip(logits.split(4096), target.split(4096), strict=True):  # fp32 logits are large
        part = part[:, : model.config.vocab_size].float()
        log_p.append(part.gather(1, of[:, None])[:, 0] - part.logsumexp(1))
        greedy.append(part.argmax(1) == of)
    return asked, torch.cat(log_p), torch.cat(greedy)


def _collect(asked: list[Question], log_p: torch.Tensor, greedy: torch.Tensor) -> list[tuple[int, float, bool]]:
    """Wait for a pass, and sum over each question's targets."""
    first = np.cumsum([0, *(len(question.targets) for question in asked)])[:-1]
    sums = np.add.reduceat(log_p.double().cpu().numpy(), first).tolist()
    all_greedy = np.logical_and.reduceat(greedy.cpu().numpy(), first).tolist()
    return [(q.index, log, is_greedy) for q, log, is_greedy in zip(asked, sums, all_greedy, strict=True)]


def _to(device: torch.device, numbers: Sequence[int]) -> torch.Tensor:
    tensor = torch.tensor(numbers)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


@contextmanager
def _attention(model: GPT, attention: SharedPrefixAttention) -> Iterator[None]:
    """The model with another attention, and blocks that torch.compile replaced as they are written."""
    layers = [block.attn for block in model.transformer.h]
    usual = [layer.kernels for layer in layers]
    stance = torch.compiler.set_stance("force_eager") if model.kernels.compile_blocks else nullcontext()
    try:
        for layer in layers:
            layer.kernels = replace(layer.kernels, attention=attention)
        with stance:
            yield
    finally:
        for layer, kernels in zip(layers, usual, strict=True):
            layer.kernels = kernels
