import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_gpt.mix import Mix, permute


def key(value: int, size: int) -> np.ndarray:
    return np.full(size, value, dtype=np.uint64)


@given(n=st.integers(1, 3000), k=st.integers(0, 2**64 - 1))
def test_permute_is_a_permutation(n, k):
    assert set(permute(np.arange(n), n, key(k, n)).tolist()) == set(range(n))


@pytest.mark.parametrize("n", [1, 5 * 10**8, 2**31 + 11, 2**40 + 1, 2**52 + 3])
def test_permute_works_for_any_size_in_constant_memory(n):
    place = np.unique(np.random.default_rng(0).integers(0, n, 10_000))
    result = permute(place, n, key(7, len(place)))
    assert len(np.unique(result)) == len(place) and 0 <= result.min() and result.max() < n
    if n > 10**6:
        np.testing.assert_allclose(result.mean() / n, 0.5, atol=0.02)


def test_permutations_look_random():
    """Over many keys each place goes to each position equally often, and so do pairs of neighbours."""
    n, keys = 7, np.arange(42_000, dtype=np.uint64)
    position = np.stack([permute(np.full(len(keys), place), n, keys) for place in range(n)])
    for row in position:
        counts = np.bincount(row, minlength=n)
        assert ((counts - 6000) ** 2 / 6000).sum() < 30  # chi-square, 6 degrees of freedom: p = 4e-5
    for a in range(n - 1):
        pairs = np.bincount(position[a] * n + position[a + 1], minlength=n * n).reshape(n, n)
        assert (np.diag(pairs) == 0).all()
        assert ((pairs[~np.eye(n, dtype=bool)] - 1000) ** 2 / 1000).sum() < 100  # 41 degrees of freedom: p = 1e-6


def test_neighbours_come_from_different_documents_as_often_as_in_a_true_shuffle():
    """Sequences of one document are `documents` apart at most; count the neighbours in a batch that share one."""
    n, per_document = 200_000, 100
    neighbours = []
    for seed in range(10):
        document = permute(np.arange(n), n, key(seed, n)) // per_document
        true_document = np.random.default_rng(seed).permutation(n) // per_document
        neighbours.append([(d[1:] == d[:-1]).sum() for d in (document, true_document)])
    ours, true = np.sum(neighbours, axis=0)
    expected = 10 * n * (per_document - 1) / n  # 990
    assert abs(ours - expected) < 5 * expected**0.5 and abs(true - expected) < 5 * expected**0.5


weights = st.dictionaries(st.sampled_from("abcdef"), st.floats(1e-6, 10), min_size=1)


@given(weights=weights, start=st.integers(0, 10**12))
def test_the_mix_is_near_its_weights_everywhere(weights, start):
    mix = Mix(weights, dict.fromkeys(weights), "stop")
    source, k = mix.locate(np.arange(start, start + 500))
    before, total = mix.drawn_before(start), sum(weights.values())
    for s, name in enumerate(mix.names):
        share = weights[name] / total
        assert abs(before[name] - share * start) <= 2 + len(weights) * start * 2**-29
        # each source's sequences come in turn, none left out
        np.testing.assert_array_equal(k[source == s], before[name] + np.arange((source == s).sum()))
        assert abs((source == s).sum() - share * 500) <= 3
    assert mix.drawn_before(start + 500) == {n: before[n] + int((source == s).sum()) for s, n in enumerate(mix.names)}


def test_the_recipes_mix_over_a_million_draws():
    weights = {"train_slim": 0.693584, "train_star": 0.306416}
    source, _ = Mix(weights, dict.fromkeys(weights), "stop").locate(np.arange(10**6))
    assert np.bincount(source).tolist() == [693_584, 306_416]


@given(
    limits=st.dictionaries(st.sampled_from("abcd"), st.integers(0, 300), min_size=1),
    data=st.data(),
)
def test_limits(limits, data):
    weights = {name: data.draw(st.floats(0.01, 10)) for name in limits}
    stop, on = Mix(weights, limits, "stop"), Mix(weights, limits, "renormalise")
    assert on.end == sum(limits.values()) and stop.end <= on.end
    source, k = on.locate(np.arange(on.end))
    for s, name in enumerate(on.names):
        assert k[source == s].tolist() == list(range(limits[name]))
    assert stop.drawn_before(stop.end) == on.drawn_before(stop.end)  # the same order up to there
    # the draw after the end of "stop" is the first that a source cannot give
    endless = Mix(weights, dict.fromkeys(limits), "stop")
    after = endless.drawn_before(stop.end + 1)
    assert any(after[name] > limits[name] for name in limits)
    assert all(count <= limits[name] for name, count in endless.drawn_before(stop.end).items())


def test_the_rest_keep_their_ratios():
    mix = Mix({"a": 1, "b": 2, "c": 1}, {"a": 10, "b": None, "c": None}, "renormalise")
    assert mix.end is None and mix.drawn_before(40) == {"a": 10, "b": 20, "c": 10}
    assert mix.drawn_before(340) == {"a": 10, "b": 220, "c": 110}


@settings(max_examples=50)
@given(stages=st.lists(st.tuples(weights, st.integers(0, 1000)), min_size=1, max_size=4))
def test_a_changed_mix_goes_on_in_every_source(stages):
    """Whatever mixes follow each other, each source gives 0, 1, 2, ... and counts survive JSON."""
    seen: dict[str, list[int]] = {}
    start, drawn = 0, {}
    for stage, length in stages:
        mix = Mix(stage, dict.fromkeys(stage), "stop", start, drawn)
        mix = Mix(**json.loads(json.dumps(mix.state_dict())))
        source, k = mix.locate(np.arange(start, start + length))
        for s, number in zip(source, k, strict=True):
            seen.setdefault(mix.names[s], []).append(int(number))
        start += length
        drawn = mix.drawn_before(start)
    assert all(numbers == list(range(len(numbers))) for numbers in seen.values())
    assert {name: count for name, count in drawn.items() if count} == {name: len(n) for name, n in seen.items()}


def test_a_mix_does_not_reach_back():
    with pytest.raises(ValueError, match="sequence 4 was drawn before this mix began, at 5"):
        Mix({"a": 1}, {"a": None}, "stop", start=5, drawn={"a": 5}).locate(np.array([7, 4]))


def test_equal_mixes():
    mix = Mix({"a": 7, "b": 3}, {"a": None, "b": None}, "stop", start=5, drawn={"a": 4, "b": 1})
    assert mix.same_order(Mix({"b": 0.3, "a": 0.7}, {"a": None, "b": None}, "stop"))
    assert not mix.same_order(Mix({"a": 7, "b": 4}, {"a": None, "b": None}, "stop"))
    assert not mix.same_order(Mix({"a": 7, "b": 3}, {"a": 9, "b": None}, "stop"))
    assert not mix.same_order(Mix({"a": 7, "c": 3}, {"a": None, "c": None}, "stop"))
