import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from packed_data import TOKENIZER, write_source, write_sparse

from lit_gpt import packed_dataset
from lit_gpt.kernels import IGNORE_INDEX
from lit_gpt.packed_dataset import PackedDataset, PackedLoader, ValidationSet, document_batch
from lit_gpt.shards import TokenStream, write_shard

MIX = {"train_slim": 0.7, "train_star": 0.3}


def dataset(directory, mix=MIX, block_size=10, **options) -> PackedDataset:
    return PackedDataset(directory, mix, block_size, **{"seed": 1, "vocab_size": 32000, **options})


@pytest.fixture
def two_sources(tmp_path):
    """slim is 0, 1, 2, ...; star is 20000, 20001, ...; so a token says where it lies"""
    write_source(tmp_path, "train_slim", np.arange(5007), [400, 33])
    write_source(tmp_path, "train_star", 20000 + np.arange(1001), [128])
    return tmp_path


def take(loader, n: int) -> list[list[int]]:
    """The first tokens of the sequences of each of n batches."""
    return [batch[:, 0].tolist() for batch in itertools.islice(loader, n)]


# --- the order -------------------------------------------------------------------------------------------------------


def test_an_epoch_has_every_token_once_as_a_target(two_sources):
    data = dataset(two_sources, exhaustion="renormalise", max_epochs=1)
    assert data.sequences == {"train_slim": 500, "train_star": 100} and data.end == 600
    tokens = data.tokens(range(data.end))
    assert tokens.dtype == torch.int64 and tokens.shape == (600, 11)
    assert (tokens[:, 1:] == tokens[:, :-1] + 1).all()
    targets = sorted(tokens[:, 1:].flatten().tolist())
    assert targets == [*range(1, 5001), *range(20001, 21001)]
    assert "6 tokens at the end are not used" in data.table() and "0 tokens at the end" in data.table()


def test_no_sequence_is_repeated_within_an_epoch_and_epochs_differ(two_sources):
    data = dataset(two_sources)
    first = data.tokens(range(3000))[:, 0].numpy()
    star = first[first >= 20000]
    epochs = star[: len(star) // 100 * 100].reshape(-1, 100)
    assert len(epochs) == 9
    for epoch in epochs:
        assert len(set(epoch)) == 100
    assert len({tuple(epoch) for epoch in epochs}) == 9
    assert data.accounts(3000) == {
        "train_slim": {"tokens": 21000, "epochs": 2100 / 500},
        "train_star": {"tokens": 9000, "epochs": 9.0},
    }


def test_a_million_draws_of_the_recipe(tmp_path):
    """The mix within 0.1% of its weights; within an epoch each sequence once, and no other order again."""
    for prefix, sequences in (("train_slim", 300_000), ("train_star", 100_000)):
        write_sparse(tmp_path, prefix, 1, 4 * sequences + 1)
    with pytest.warns(UserWarning, match="no manifest"):
        data = dataset(tmp_path, {"train_slim": 0.693584, "train_star": 0.306416}, block_size=4)
    source, start = data.locate(np.arange(10**6))
    np.testing.assert_allclose(np.bincount(source) / 10**6, [0.693584, 0.306416], rtol=1e-3)
    for s, n in enumerate(data.sequences.values()):
        drawn = start[source == s] // 4
        epochs = [drawn[i : i + n] for i in range(0, len(drawn), n)]
        for epoch in epochs:
            assert len(np.unique(epoch)) == len(epoch) and epoch.max() < n
        assert (epochs[0] == epochs[1]).mean() < 1e-3


def test_the_order_depends_on_the_seed_and_not_on_the_spelling_of_the_mix(two_sources):
    order = dataset(two_sources).tokens(range(100))
    same = dataset(str(two_sources), {"train_star": 3, "train_slim": 7}).tokens(range(100))
    assert torch.equal(order, same)
    assert not torch.equal(order, dataset(two_sources, seed=2).tokens(range(100)))


def test_the_order_does_not_depend_on_how_the_stream_is_cut_into_shards(two_sources, tmp_path):
    write_source(tmp_path / "again", "train_slim", np.arange(5007), [5007])
    write_source(tmp_path / "again", "train_star", 20000 + np.arange(1001), [9])
    assert torch.equal(dataset(two_sources).tokens(range(500)), dataset(tmp_path / "again").tokens(range(500)))


def test_the_order_is_pinned(two_sources):
    """A checkpoint of last year must continue in the same order: if this fails, old runs cannot be resumed."""
    first = dataset(two_sources, seed=3407).tokens(range(12))[:, 0].tolist()
    assert first == [270, 20330, 130, 700, 3390, 20170, 820, 520, 20340, 1520, 2500, 20800]


def test_sources_with_weight_zero_are_not_drawn(two_sources):
    tokens = dataset(two_sources, {"train_slim": 0, "train_star": 1}).tokens(range(200))
    assert tokens.min() >= 20000


def test_neighbours_in_a_batch_come_from_different_documents(tmp_path):
    """As often as in a true shuffle. Ids are the document's number; documents are 64 sequences long."""
    documents, length, block_size = 400, 64, 4
    tokens = np.repeat(np.arange(documents), length * block_size)
    write_source(tmp_path, "train", tokens, [8192])
    data = dataset(tmp_path, {"train": 1}, block_size)
    n = data.sequences["train"]
    document = data.tokens(range(10 * n))[:, 0].numpy()
    shared = (document[1:] == document[:-1]).sum()
    expected = 10 * n * (length - 1) / n  # of 10 epochs
    assert abs(shared - expected) < 5 * expected**0.5


# --- ranks, workers, resume -------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_coverage_for_any_shards_ranks_and_micro_batches(tmp_path_factory, data):
    """All ranks together see every sequence of every source once, in lockstep, wherever they stop and go on."""
    directory = tmp_path_factory.mktemp("data")
    block_size = data.draw(st.integers(1, 20), "block_size")
    mix, expected = {}, []
    for number, name in enumerate("abc"[: data.draw(st.integers(1, 3), "sources")]):
        length = data.draw(st.integers(block_size + 1, 300), "tokens")
        sizes = [*data.draw(st.lists(st.integers(1, 150), max_size=4), "shards"), 150]
        write_source(directory, name, 10_000 * number + np.arange(length), sizes)
        mix[name] = data.draw(st.floats(0.01, 1), "weight")
        expected += [10_000 * number + block_size * i for i in range((length - 1) // block_size)]
    options = {"exhaustion": "renormalise", "max_epochs": 1, "seed": data.draw(st.integers(0, 9), "seed")}
    seen, state = [], None
    while True:  # a run of several jobs, each on another number of ranks and killed after some steps
        world_size, size = data.draw(st.integers(1, 5), "ranks"), data.draw(st.integers(1, 7), "micro-batch")
        num_workers = data.draw(st.sampled_from([0, 0, 0, 0, 1, 2]), "workers")
        kill_after = data.draw(st.sampled_from([3, 10, 100]), "kill")
        loaders = [
            PackedLoader(dataset(directory, mix, block_size, **options), size, rank, world_size, num_workers)
            for rank in range(world_size)
        ]
        for loader in loaders:
            if state:
                loader.load_state_dict(state)
        batches = [take(loader, kill_after) for loader in loaders]
        assert len({len(b) for b in batches}) == 1
        states = [loader.state_dict() for loader in loaders]
        assert all(s == states[0] for s in states)
        state = json.loads(json.dumps(states[0]))
        seen += [
            first for step in zip(*batches, strict=True) for batch in step for first in batch if first != IGNORE_INDEX
        ]
        if len(batches[0]) < kill_after:
            break
    assert sorted(seen) == sorted(expected)
    assert seen == dataset(directory, mix, block_size, **options).tokens(range(len(seen)))[:, 0].tolist()


def test_a_reader_killed_while_it_hands_over_a_batch_is_a_line(two_sources, monkeypatch):
    def reset(*_, **__):
        yield from ()
        raise ConnectionResetError(104, "Connection reset by peer")

    def signalled(_):
        raise RuntimeError("DataLoader worker (pid 1) is killed")  # as torch's signal handler does, anywhere

    monkeypatch.setattr(packed_dataset, "DataLoader", reset)
    monkeypatch.setattr(packed_dataset.time, "sleep", signalled)
    with pytest.raises(OSError, match="^rank 0 gets no data: .*Connection reset by peer"):
        next(iter(PackedLoader(dataset(two_sources), 1)))


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_a_resume_on_another_number_of_ranks_goes_on_with_the_same_global_batches(two_sources, num_workers):
    def steps(world_size, micro_batch_size, state, n):
        """n global batches of 24 sequences"""
        loaders = [
            PackedLoader(dataset(two_sources), micro_batch_size, rank, world_size, num_workers)
            for rank in range(world_size)
        ]
        for loader in loaders:
            loader.load_state_dict(state)
        micro_steps = 24 // (world_size * micro_batch_size)
        per_rank = [take(loader, n * micro_steps) for loader in loaders]
        order = [first for step in zip(*per_rank, strict=True) for batch in step for first in batch]
        return [sorted(order[i : i + 24]) for i in range(0, len(order), 24)], loaders[0].state_dict()

    start = PackedLoader(dataset(two_sources), 1).state_dict()
    straight, _ = steps(1, 24, start, 6)
    before, state = steps(4, 3, start, 2)
    assert state["sequences"] == 48
    after, _ = steps(3, 2, json.loads(json.dumps(state)), 4)
    assert before + after == straight


def test_the_state_counts_what_was_taken_and_not_what_workers_read_ahead(two_sources):
    loader = PackedLoader(dataset(two_sources), 4, rank=1, world_size=2, num_workers=2, prefetch=8)
    batches = iter(loader)
    assert loader.state_dict()["sequences"] == 0
    next(batches), next(batches)
    assert loader.state_dict()["sequences"] == 16
    third = next(batches)
    del batches
    resumed = PackedLoader(dataset(two_sources), 4, rank=1, world_size=2, num_workers=0)
    resumed.load_state_dict(loader.state_dict() | {"sequences": 16})
    assert torch.equal(next(iter(resumed)), third)
    assert len(json.dumps(loader.state_dict())) < 500


def test_a_signal_that_comes_before_a_worker_is_ready_for_it_is_ignored_too(two_sources, monkeypatch):
    ready = packed_dataset._outlive_signals

    def signalled(worker: int) -> None:
        os.kill(os.getpid(), signal.SIGUSR1)
        ready(worker)

    monkeypatch.setattr(packed_dataset, "_outlive_signals", signalled)
    expected = take(PackedLoader(dataset(two_sources), 4, num_workers=0), 3)
    assert take(PackedLoader(dataset(two_sources), 4, num_workers=1), 3) == expected


def test_workers_outlive_the_signals_of_a_scheduler(two_sources):
    expected = take(PackedLoader(dataset(two_sources), 4, num_workers=0), 40)
    batches = iter(PackedLoader(dataset(two_sources), 4, num_workers=2))
    seen = [next(batches)[:, 0].tolist()]
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for worker in workers:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            os.kill(worker.pid, number)
    assert seen + take(batches, 39) == expected
    t0 = time.perf_counter()
    del batches
    assert not multiprocessing.active_children() and time.perf_counter() - t0 < 3


def test_loading_leaves_the_global_random_numbers_alone(two_sources):
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    take(PackedLoader(dataset(two_sources), 4), 3)
    assert torch.rand(1) == expected


def test_stop_ends_with_the_first_source(two_sources):
    data = dataset(two_sources, exhaustion="stop", max_epochs={"train_slim": 2, "train_star": 1.5})
    first = np.concatenate(take(PackedLoader(data, 7, num_workers=0), 10**6))
    first = first[first != IGNORE_INDEX]
    assert (first >= 20000).sum() == 150 and len(first) == data.end == 501
    loader = PackedLoader(data, 7, num_workers=0)
    take(loader, 10**6)
    assert loader.state_dict()["sequences"] == data.end and loader.accounts()["train_star"]["epochs"] == 1.5
    assert take(loader, 1) == []  # the end is the end


def test_a_changed_mix_must_be_asked_for_and_repeats_nothing(two_sources):
    old = PackedLoader(dataset(two_sources), 5, num_workers=0)
    before = np.concatenate(take(old, 20))
    state = json.loads(json.dumps(old.state_dict()))
    write_source(two_sources, "train_new", 30000 + np.arange(500), [100])
    cooldown = {"train_star": 0.5, "train_new": 0.5}
    new = PackedLoader(dataset(two_sources, cooldown), 5, num_workers=0)
    with pytest.raises(ValueError, match="0.7.*is now.*train_new.*--resume_mix change"):
        new.load_state_dict(state)
    new.load_state_dict(state, resume_mix="change")
    after = np.concatenate(take(new, 20))
    star = [*before[before >= 20000], *after[(after >= 20000) & (after < 30000)]]
    assert len(star) == 30 + 50 and len(set(star)) == 80  # one epoch, continued
    assert new.accounts()["train_star"]["epochs"] == 0.8 and new.accounts()["train_new"]["tokens"] == 500
    # a second resume keeps the changed mix without being asked, and a third may go back to the first
    again = PackedLoader(dataset(two_sources, cooldown), 5, num_workers=0)
    again.load_state_dict(new.state_dict())
    assert take(again, 3) == take(new, 3)
    back = PackedLoader(dataset(two_sources), 5, num_workers=0)
    back.load_state_dict(new.state_dict(), resume_mix="change")
    slim = np.concatenate(take(back, 60))
    slim = slim[slim < 20000]
    assert not set(slim) & set(before)


def test_resume_change_with_the_same_mix_changes_nothing(two_sources):
    loader = PackedLoader(dataset(two_sources), 5, num_workers=0)
    take(loader, 3)
    other = PackedLoader(dataset(two_sources), 5, num_workers=0)
    other.load_state_dict(loader.state_dict(), resume_mix="change")
    assert other.state_dict() == loader.state_dict() and take(other, 5) == take(loader, 5)


@pytest.mark.parametrize(
    "options, message",
    [({"seed": 2}, "seed was 1 and is now 2"), ({"block_size": 9}, "block_size was 10 and is now 9")],
)
def test_a_resume_with_another_order_is_refused(two_sources, options, message):
    state = PackedLoader(dataset(two_sources), 5).state_dict()
    with pytest.raises(ValueError, match=f"cannot resume: {message}"):
        PackedLoader(dataset(two_sources, **options), 5).load_state_dict(state)


def test_a_resume_on_other_data_or_another_tokenizer_is_refused(two_sources):
    state = PackedLoader(dataset(two_sources), 5).state_dict()
    other = {"tokenizer": TOKENIZER | {"sha256": "def"}}
    write_source(two_sources, "train_slim", np.arange(5007), [400, 33], **other)
    write_source(two_sources, "train_star", 20000 + np.arange(1001), [128], **other)
    with pytest.raises(ValueError, match="tokenizer was abc and is now def"):
        PackedLoader(dataset(two_sources), 5).load_state_dict(state)
    write_source(two_sources, "train_slim", np.arange(5008), [400, 33])
    write_source(two_sources, "train_star", 20000 + np.arange(1001), [128])
    with pytest.raises(ValueError, match="train_slim had 5,007 tokens and now has 5,008"):
        PackedLoader(dataset(two_sources), 5).load_state_dict(state)


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        ({"block_size": 1001}, "train_star has 1,001 tokens, not one sequence of 1,002"),
        ({"block_size": 0}, "block_size is 0"),
        ({"mix": {}}, "not all 0"),
        ({"mix": {"train_star": 1, "train_s": 1}}, r"shards of train_star are also shards of train_s\*"),
        ({"mix": {"train_slim": 0, "train_star": 0}}, "not all 0"),
        ({"mix": {"train_slim": -1, "train_star": 3}}, "0 or more"),
        ({"mix": {"train_slim": float("nan")}}, "0 or more"),
        ({"exhaustion": "panic"}, "not 'panic'"),
        ({"max_epochs": 4}, "max_epochs needs .* stop or renormalise"),
        ({"max_epochs": {"train_slim": 4}, "exhaustion": "stop"}, "above 0 for each of train_slim, train_star"),
        ({"max_epochs": 0, "exhaustion": "stop"}, "above 0"),
    ],
)
def test_arguments_that_cannot_be(two_sources, options, message):
    with pytest.raises(ValueError, match=message):
        dataset(two_sources, **options)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"tokenizer": TOKENIZER | {"sha256": "def"}}, r"differ in their tokenizer \(abc, def\)"),
        ({"delimiters": "eos"}, r"differ in their delimiters \(bos\+eos, eos\)"),
    ],
)
def test_sources_that_were_prepared_differently(two_sources, changes, message):
    write_source(two_sources, "train_star", np.arange(1001), [128], **changes)
    with pytest.raises(ValueError, match=f"train_slim and train_star {message}"):
        dataset(two_sources)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_error_in_a_worker_arrives_as_one_line(two_sources, num_workers):
    data = dataset(two_sources, vocab_size=32000)
    write_shard(two_sources / "train_star_0000000003.bin", np.full(128, 32000, np.uint16))
    with pytest.raises(ValueError, match="train_star_0000000003.bin: token .* is id 32000") as error:
        take(PackedLoader(data, 8, num_workers=num_workers), 1000)
    assert "\n" not in str(error.value)


def test_describe_names_shard_and_token(two_sources):
    data = dataset(two_sources)
    first = int(data[17][0])
    text = data.describe(17)
    name, shard, offset = text[text.index("(") + 1 : -1].replace(": ", ", ").split(", ")
    stream = TokenStream(two_sources, name, vocab_size=32000)
    number = [n.decode() for n in stream.names].index(Path(shard).name)
    assert stream.read(stream.starts[[number]] + int(offset.removeprefix("token ")), 1, fill=0)[0, 0] == first


# --- validation ------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=3),
    block_size=st.integers(1, 12),
    world_size=st.integers(1, 5),
    size=st.integers(1, 5),
)
def test_validation_has_every_target_once_at_any_world_size(tmp_path_factory, lengths, block_size, world_size, size):
    directory, expected = tmp_path_factory.mktemp("data"), []
    for number, length in enumerate(lengths):
        write_source(directory, f"val_{number}", 1000 * number + np.arange(length), [7])
        expected += [1000 * number + i for i in range(1, length)]
    prefixes = [f"val_{number}" for number in range(len(lengths))]
    if not expected:
        with pytest.raises(ValueError, match="nothing to validate on"):
            ValidationSet(directory, prefixes, block_size, vocab_size=32000)
        return
    data = ValidationSet(directory, prefixes, block_size, vocab_size=32000)
    ranks = [list(data.batches(size, rank, world_size)) for rank in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1
    rows = torch.cat([batch for step in zip(*ranks, strict=True) for batch in step])
    assert rows.shape[1] == block_size + 1 and len(rows) - len(data) < world_size * size
    targets = rows[:, 1:]
    assert targets[targets != IGNORE_INDEX].tolist() == expected
    real = targets != IGNORE_INDEX
    assert (rows[:, :-1][real] + 1 == targets[real]).all()  # each with the right input
    assert torch.equal(torch.cat(list(data.batches(size, 0, 1)))[: len(data)], rows[: len(data)])


def test_a_part_of_the_validation_data_is_evenly_spread_and_fixed(two_sources):
    data = ValidationSet(two_sources, ["train_slim"], 10, vocab_size=32000, max_sequences=50)
    first = torch.cat(list(data.batches(8)))[:50, 0].tolist()
    assert first == [100 * i + 10 * (i // 50) for i in range(50)] and len(data) == 50
    assert len(ValidationSet(two_sources, ["train_slim"], 10, vocab_size=32000, max_sequences=10**9)) == 501


@pytest.mark.parametrize("whose", ["the program's", "the data's"])
def test_an_error_ends_the_program_that_has_workers(two_sources, whose):
    """Workers outlive signals, and Python waits for its children at exit."""
    if whose == "the data's":
        write_shard(two_sources / "train_star_0000000001.bin", np.full(128, 32000, np.uint16))
    code = f"""
from lit_gpt.packed_dataset import PackedDataset, PackedLoader

def train():
    data = PackedDataset({str(two_sources)!r}, {{"train_star": 1}}, 10, seed=1, vocab_size=32000)
    batches = iter(PackedLoader(data, 4, num_workers=1))
    for _ in range({1 if whose == "the program's" else 100}):
        next(batches)
    raise RuntimeError("out of memory")

try:
    train()
except (RuntimeError, ValueError) as error:
    print(error)
    raise SystemExit(1)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1, done.stderr
    assert ("out of memory" if whose == "the program's" else "is id 32000") in done.stdout


# --- documents -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "delimiters, row",
    [
        ("bos+eos", [8, 2, 1, 5, 6, 2, 1, 7, 2, 1]),
        ("eos", [8, 2, 5, 6, 9, 2, 7, 2, 9, 9]),
        ("bos", [8, 9, 1, 5, 6, 7, 1, 7, 8, 1]),
    ],
)
def test_documents(tmp_path, delimiters, row):
    write_source(tmp_path, "train", row, [4], delimiters=delimiters)
    batch = next(iter(PackedLoader(dataset(tmp_path, {"train": 1}, 9, document_mask=True, max_documents=5), 1)))
    assert batch.tokens.tolist() == [row]
    starts = {"bos+eos": [0, 2, 6], "eos": [0, 2, 6, 8], "bos": [0, 2, 6]}[delimiters]
    assert batch.cu_seqlens.tolist() == starts + [9] * (6 - len(starts)) and batch.cu_seqlens.dtype == torch.int32
    positions = np.arange(9) - np.array([max(s for s in starts if s <= i) for i in range(9)])
    assert batch.positions.tolist() == [positions.tolist()]
    # nothing is to be learnt from an end of document about the beginning of the next
    assert batch.loss_weights.tolist() == [[float(token != 2) for token in row[:9]]]


def test_documents_of_several_rows_and_padding():
    tokens = torch.tensor([[1, 5, 2, 1], [6, 7, 8, 9], [6, 2, 1, IGNORE_INDEX]])
    batch = document_batch(tokens, 1, 2, max_documents=2)
    assert batch.cu_seqlens.tolist() == [0, 3, 6, 8, 9, 9, 9]
    assert batch.positions.tolist() == [[0, 1, 2], [0, 1, 2], [0, 1, 0]]
    assert batch.loss_weights.tolist() == [[1, 1, 0], [1, 1, 1], [1, 0, 0]]
    with pytest.raises(ValueError, match="4 documents in a micro-batch of 3: raise max_documents above 1"):
        document_batch(tokens, 1, 2, max_documents=1)


def test_documents_need_delimiters(tmp_path):
    write_source(tmp_path, "train", np.arange(50), [20], delimiters="none")
    with pytest.raises(ValueError, match="document_mask needs .* there are none"):
        dataset(tmp_path, {"train": 1}, document_mask=True)
    (tmp_path / "train.manifest.json").unlink()
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="there is no manifest"):
        dataset(tmp_path, {"train": 1}, document_mask=True)
