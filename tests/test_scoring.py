"""Log-likelihoods of packed groups against the model fed one pair at a time."""

import random

import pytest
import torch
from tiny import TINY, random_weights

from lit_gpt import Config
from lit_gpt.kernels import Kernels
from lit_gpt.model import GPT
from lit_gpt.scoring import group, pack, score


def tiny_model(**overrides) -> GPT:
    config = Config(name="tiny", **{**TINY, **overrides})
    model = GPT(config)
    model.load_state_dict(random_weights(config))
    return model.eval().requires_grad_(False)


def one_by_one(model: GPT, context, continuation) -> tuple[float, bool]:
    ids = torch.tensor([[*context, *continuation]])
    log_p = model(ids[:, :-1])[0, len(context) - 1 :, : model.config.vocab_size].double().log_softmax(-1)
    target = ids[0, len(context) :, None]
    return log_p.gather(1, target).sum().item(), bool((log_p.argmax(-1) == target[:, 0]).all())


def questions(n: int, seed: int = 0, longest: int = 64) -> list:
    """Choices behind one context, single tokens, contexts that begin others, the same pair twice."""
    rng = random.Random(seed)

    def some(n):
        return [rng.randrange(512) for _ in range(n)]

    pairs = []
    examples = some(12)
    for _ in range(n):
        context = some(rng.randint(1, 20)) if rng.random() < 0.7 else examples + some(rng.randint(1, 8))
        pairs += [(context, some(rng.choice((1, 1, 5, 12)))) for _ in range(rng.choice((1, 2, 4)))]
    pairs += [pairs[0], (pairs[1][0] + pairs[1][1], some(2)), (some(1), some(longest))]
    return pairs


@pytest.mark.parametrize("overrides", [{}, dict(family="gptneox", n_query_groups=4), dict(vocab_size=500)])
def test_packs_give_what_each_pair_gives_alone(overrides):
    model = tiny_model(**overrides)
    pairs = [
        ([i % model.config.vocab_size for i in a], [i % model.config.vocab_size for i in b]) for a, b in questions(40)
    ]
    # Make some answers the ones that greedy decoding writes, so that both outcomes occur.
    for i in range(0, 20, 2):
        context, target = pairs[i][0], model(torch.tensor([pairs[i][0]]))[0, -1, : model.config.vocab_size].argmax()
        pairs[i] = (context, [target.item()])
    found = {i: (log_p, greedy) for part in score(model, pairs, pack_tokens=256) for i, log_p, greedy in part}
    assert sorted(found) == list(range(len(pairs)))
    for i, pair in enumerate(pairs):
        log_p, greedy = one_by_one(model, *pair)
        assert found[i] == (pytest.approx(log_p, abs=2e-4), greedy), (i, pair)
    assert {greedy for _, greedy in found.values()} == {True, False}
    assert model.transformer.h[0].attn.kernels == Kernels()  # the model is as it was


def test_shared_beginnings_are_computed_once():
    context, shots = [7] * 70, [5] * 600
    choices = [(context, [i] * 25) for i in range(4)]
    (only,), _ = group(choices, 4096)
    assert only.tokens == 70 + 4 * 24  # the last token of a text is predicted, not read
    # Four one-token answers to a hundred questions behind the same examples: one input each, and the examples once.
    exam = [(shots + [i] + [9] * 60, [choice]) for i in range(10, 110) for choice in range(4)]
    groups, asked = group(exam, 4096)
    assert sum(g.tokens for g in groups) == len(groups) * 600 + 100 * 61 and len(groups) == 2
    assert sorted(q.index for qs in asked for q in qs) == list(range(400))
    # Nothing in common: nothing joined.
    groups, _ = group([([i], [1, 2, 3]) for i in range(5)], 4096)
    assert [g.tokens for g in groups] == [3] * 5


def test_packs_are_full_and_hold_every_group_once():
    rng = random.Random(1)
    groups, _ = group([([rng.randrange(512) for _ in range(rng.randint(1, 300))], [1]) for _ in range(400)], 1024)
    packs = pack(groups, 1024)
    assert sorted(g for members in packs for g in members) == list(range(len(groups)))
    sizes = [sum(groups[g].tokens for g in members) for members in packs]
    assert max(sizes) <= 1024 and sum(sizes) / (1024 * len(packs)) > 0.97


def test_memory_that_does_not_suffice_halves_the_packs(monkeypatch):
    import lit_gpt.scoring as scoring

    model, pairs = tiny_model(), questions(30)
    want = {i: log_p for part in score(model, pairs) for i, log_p, _ in part}
    forward, sizes = scoring._forward, []

    def short_of_memory(model, groups, asked):
        sizes.append(sum(g.tokens for g in groups))
        if sizes[-1] > 200:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(model, groups, asked)

    monkeypatch.setattr(scoring, "_forward", short_of_memory)
    found = {i: log_p for part in score(model, pairs) for i, log_p, _ in part}
    assert found == pytest.approx(want, abs=1e-4) and max(sizes) > 400


def test_pairs_that_cannot_be_scored_are_named():
    model = tiny_model()
    with pytest.raises(ValueError, match="pair 1: the context"):
        list(score(model, [([1], [2]), ([], [2])]))
    with pytest.raises(ValueError, match="pair 0 has 66 tokens; the model takes 64"):
        list(score(model, [([1] * 60, [2] * 6)]))


@pytest.mark.gpu
def test_flash_attention_over_shared_prefixes_equals_the_masked_product():
    from lit_gpt.kernels.shared_prefix import SharedPrefixAttention

    device = torch.device("cuda")
    prefixes, continuations = [70, 600, 3, 130, 41], [[25, 1, 30], [61] * 8, [2, 5]]
    n = sum(prefixes) + sum(map(sum, continuations))
    q, k, v = (torch.randn(1, n, heads, 64, device=device) for heads in (8, 2, 2))
    attention = SharedPrefixAttention(prefixes, continuations, device)
    want = attention(q, k, v)
    got = attention(*(x.bfloat16() for x in (q, k, v)))
    torch.testing.assert_close(got.float(), want, atol=0.02, rtol=0.02)
