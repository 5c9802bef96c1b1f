"""Conversations out of files, and into rows where they do not see each other."""

import gzip
import json

import pytest
import torch
from test_chat_template import folders  # noqa: F401  a fixture
from tiny import TINY

from lit_gpt import Config
from lit_gpt.chat_data import best_fit, load_conversations, pack_conversations
from lit_gpt.chat_template import ChatTemplate
from lit_gpt.kernels import IGNORE_INDEX
from lit_gpt.model import GPT
from lit_gpt.tokenizer import Tokenizer

EXCHANGE = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
SYSTEM = [{"role": "system", "content": "S"}]


def message(id, parent, role, text, rank=None):
    return {"message_id": id, "parent_id": parent, "role": role, "text": text, "rank": rank, "message_tree_id": "1"}


FLAT = [
    message("1", None, "prompter", "Hi"),
    message("2", "1", "assistant", "Worse", 1),
    message("3", "1", "assistant", "Hello", 0),
]
TREE = {"message_tree_id": "1", "prompt": {**FLAT[0], "replies": [{**FLAT[1], "replies": []}, FLAT[2]]}}
FILES = {
    "messages": [{"messages": SYSTEM + EXCHANGE}],
    "sharegpt": [{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}],
    "alpaca": [{"instruction": "Hi", "input": "", "output": "Hello"}],
    "dolly": [{"instruction": "Hi", "context": "", "response": "Hello", "category": "qa"}],
    "guanaco": [{"text": "### Human: Hi### Assistant: Hello"}],
    "oasst1": [TREE],
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".json"])
def test_formats_are_found_by_their_keys(tmp_path, name, suffix):
    path, rows = tmp_path / f"data{suffix}", FILES[name]
    text = json.dumps(rows) if suffix == ".json" else "\n".join(map(json.dumps, rows)) + "\n\n"
    path.write_bytes(gzip.compress(text.encode()) if suffix.endswith(".gz") else text.encode())
    found, conversations = load_conversations(path)
    assert found == name
    assert conversations == [SYSTEM + EXCHANGE if name == "messages" else EXCHANGE]
    assert load_conversations(path, name) == (found, conversations)


def test_oasst1_as_the_hub_has_it_and_parquet(tmp_path):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(FLAT), tmp_path / "x.parquet")
    assert load_conversations(tmp_path / "x.parquet") == ("oasst1", [EXCHANGE])


def test_an_input_or_context_goes_with_the_question(tmp_path):
    (tmp_path / "x.jsonl").write_text(json.dumps({"instruction": "Sum up", "context": "a b", "response": "c"}))
    assert load_conversations(tmp_path / "x.jsonl")[1][0][0]["content"] == "Sum up\n\na b"


@pytest.mark.shared
def test_the_same_conversations_in_two_formats(shared_data):
    formats, conversations = zip(
        *(load_conversations(shared_data / "sft" / f"oasst_guanaco{x}_train.jsonl") for x in ("", "_messages")),
        strict=True,
    )
    assert formats == ("guanaco", "messages") and len(conversations[0]) == 700
    strip = lambda c: [{**m, "content": m["content"].strip()} for m in c]  # noqa: E731
    assert list(map(strip, conversations[0])) == list(map(strip, conversations[1]))


@pytest.mark.parametrize(
    "name, text, problem",
    [
        (
            "x.jsonl",
            '{"prompt": "a", "answer": "b"}',
            "line 1: no known format .* Expected are messages: messages; sharegpt",
        ),
        ("x.jsonl", '{"text": "### Human: a### Assistant: b"}\n{"text": ', "x.jsonl, line 2: not JSON"),
        ("x.jsonl", '{"text": "### Human: a"}\n{"txt": "b"}', "x.jsonl, line 2: not a row of guanaco, which has text"),
        ("x.jsonl", '{"text": "plain"}', "x.jsonl, line 1: no '### Human:'"),
        ("x.jsonl", '{"messages": [{"role": "user", "content": null}]}', "line 1: not a row of messages"),
        (
            "x.jsonl",
            '{"messages": [{"role": "user", "content": "\\ud800"}]}',
            "line 1: character 0 is a lone",
        ),
        ("x.json", "[1]", "row 1: a JSON object is expected, not int"),
        ("x.json", "{", "x.json is not JSON"),
        ("x.jsonl", "\n", "x.jsonl is empty"),
        ("x.txt", "a", "are read from .json, .jsonl, .jsonl.gz and .parquet"),
    ],
)
def test_other_files_are_refused_by_line(tmp_path, name, text, problem):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=problem):
        load_conversations(tmp_path / name)


def test_a_missing_file_and_an_unknown_format(tmp_path):
    with pytest.raises(FileNotFoundError, match="x.jsonl"):
        load_conversations(tmp_path / "x.jsonl")
    with pytest.raises(ValueError, match="--format vicuna: choose one of messages"):
        load_conversations(tmp_path / "x.jsonl", "vicuna")


# --- rows -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def template(folders) -> ChatTemplate:  # noqa: F811
    return ChatTemplate.named("zephyr", Tokenizer(folders["sentencepiece"]))


def turns(*contents: str) -> list[dict]:
    return [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]


def test_what_cannot_be_trained_on_is_counted_and_replies_stay_whole(template):
    conversations = [
        turns("Hi", "Hello"),
        turns("Hi", "Hello", "And?"),  # the last question teaches nothing
        turns("Hi", "Hello", "And?", "so on " * 100),  # truncated to the first exchange
        turns("Hi", "so on " * 100),
        turns("Hi"),
        [],
        turns("Hi", " \n"),
        turns("Hi", "", "And?", "Yes"),
        [{"role": "user", "content": "a"}, *turns("b", "c")],
        [{"role": "tool", "content": "a"}, *turns("b", "c")],
    ]
    rows, report = pack_conversations(conversations, template, 64)
    assert (report.read, report.kept, report.truncated) == (10, 3, 1)
    assert report.dropped == {
        "without a reply": 2,
        "with an empty message": 2,
        "whose roles do not alternate": 2,
        "whose first reply ends beyond 64 tokens": 1,
    }
    alone = template.encode(conversations[0])
    assert [ids.tolist() for ids in rows.ids] == [alone.ids[: alone.ends[-1]]] * 3
    assert report.trained == 3 * sum(alone.trained) and report.tokens == 3 * alone.ends[-1]
    assert "3 of 10 conversations, 1 of them truncated" in str(report) and "2 without a reply" in str(report)


def test_exactly_the_block_fits(template):
    n = template.encode(turns("Hi", "Hello")).ends[0]
    for block_size, kept in ((n - 1, 1), (n - 2, 0)):  # the last token is only a target
        assert pack_conversations([turns("Hi", "Hello")], template, block_size)[1].kept == kept


def test_rows_are_full_and_hold_everything_once():
    lengths = torch.randint(1, 60, (500,), generator=torch.Generator().manual_seed(0)).tolist()
    bins = best_fit(lengths, 100)
    assert sorted(i for b in bins for i in b) == list(range(500))
    assert max(sum(lengths[i] for i in b) for b in bins) <= 100
    assert len(bins) <= 1.02 * sum(lengths) / 100
    assert best_fit([], 10) == []


def test_packed_conversations_are_what_they_are_alone(template):
    conversations = [turns("Hi", "Hello there"), turns("a b", "c", "d", "e f g"), turns("x", "y z"), turns("1", "2")]
    rows, report = pack_conversations(conversations, template, 96)
    assert len(rows) < len(conversations)
    model = GPT(Config(**{**TINY, "block_size": 96}))
    model.init_weights(0)
    batch = rows.batch([*range(len(rows)), None])
    packed = model(batch.idx, batch.targets, cu_seqlens=batch.cu_seqlens, reduction="none")
    alone = torch.zeros(())
    for ids, trained in zip(rows.ids, rows.trained, strict=True):
        targets = ids[1:].long().masked_fill(~trained[1:], IGNORE_INDEX)
        alone = alone + model(ids[None, :-1].long(), targets[None])
    torch.testing.assert_close(packed.sum(), alone)
    assert (batch.targets != IGNORE_INDEX).sum() == report.trained
    assert sum(rows.targets) == report.trained and sum(rows.tokens) == report.tokens - report.kept
    assert (packed[-1] == 0).all()

    # The head does without the tokens that are not trained on, and nothing changes; not even where none is.
    packed.sum().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    assert len(batch.trained) == report.trained
    loss = model(batch.idx, batch.targets, cu_seqlens=batch.cu_seqlens, logits_at=batch.trained)
    loss.backward()
    torch.testing.assert_close(loss, packed.sum().detach())
    torch.testing.assert_close([p.grad for p in model.parameters()], grads)
    model.zero_grad()
    padding = rows.batch([None])
    loss = model(padding.idx, padding.targets, cu_seqlens=padding.cu_seqlens, logits_at=padding.trained)
    loss.backward()
    assert loss == 0 and all(p.grad is not None and (p.grad == 0).all() for p in model.parameters())

    # An edit of one conversation changes nothing in another that lies behind it in the same row.
    row, begin = next((r, int(b)) for r, b in enumerate(batch.cu_seqlens[1:2] - 1))
    edited = batch.idx.clone()
    edited[0, : begin + 1] = 7
    other = model(edited, batch.targets, cu_seqlens=batch.cu_seqlens, reduction="none")
    torch.testing.assert_close(other[0, begin + 1 :], packed[0, begin + 1 :])
    assert len(rows.rows[0]) > 1 and not torch.equal(other[0, : begin + 1], packed[0, : begin + 1])
