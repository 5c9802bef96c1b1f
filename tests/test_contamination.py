"""Runs of tokens that questions and data share, against a search that is slow and plain."""

import json

import numpy as np
import pytest
from packed_data import write_source
from tiny import run_script, train_sentencepiece

from lit_gpt.contamination import Grams, rolling_hashes
from lit_gpt.tokenizer import Tokenizer


@pytest.mark.parametrize("n", [1, 3, 13])
def test_runs_are_found_as_a_plain_search_finds_them(n):
    rng = np.random.default_rng(n)
    data = rng.integers(0, 40, 5000)
    questions = [rng.integers(0, 40, rng.integers(0, 60)) for _ in range(50)]
    for i in range(0, 50, 5):  # some are in the data, wholly or in part
        questions[i] = data[i * 50 : i * 50 + 30].copy()
        questions[i][15 + i % 7 :] = 39 - questions[i][15 + i % 7 :]
    seen = {tuple(data[i : i + n]) for i in range(len(data) - n + 1)}
    grams = Grams(questions, n)
    for start in range(0, len(data), 700):
        grams.mark(data[start : start + 700 + n - 1].astype(np.uint16))
    runs = [[tuple(q[i : i + n]) for i in range(len(q) - n + 1)] for q in questions]
    assert grams.counts.tolist() == [len(r) for r in runs]
    assert grams.found.tolist() == [sum(run in seen for run in r) for r in runs]
    assert 0 < (grams.found > 0).sum()


def test_hashes_of_similar_runs_differ():
    """Permutations, shifts and neighbours: what polynomials of small numbers confuse."""
    rng = np.random.default_rng(0)
    runs = {tuple(rng.permutation(13)) for _ in range(400)} | {tuple([i] * 13) for i in range(400)}
    runs |= {(*[0] * 6, i, *[0] * 5, j) for i in range(30) for j in range(30)}
    hashes = {int(rolling_hashes(np.array(run), 13)[0]) for run in runs}
    assert len(hashes) == len(runs)


def test_the_script_counts_questions_that_stand_in_the_shards(tmp_path, capsys):
    pytest.importorskip("lm_eval")
    train_sentencepiece(tmp_path / "tok" / "tokenizer.model")
    tokenizer = Tokenizer(tmp_path / "tok")
    text = "Which of these {} is it that the model reads in the file?"
    questions = [{"q": text.format(w), "a": ["a token", "nothing"]} for w in ("shards", "returns", "tokenizers")]
    (tmp_path / "tasks").mkdir()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "q.jsonl").write_text("".join(json.dumps(q | {"y": 0}) + "\n" for q in questions))
    task = dict(
        task="ask", dataset_path="json", dataset_kwargs={"data_files": {"test": "data/q.jsonl"}}, test_split="test",
        output_type="multiple_choice", doc_to_text="{{q}}", doc_to_choice="{{a}}", doc_to_target="{{y}}",
    )  # fmt: skip
    (tmp_path / "tasks" / "ask.yaml").write_text(json.dumps(task))
    filler = np.random.default_rng(0).integers(3, 512, 3000)
    copied = tokenizer.encode(questions[1]["q"] + " a token", bos=False, eos=False)
    data = np.concatenate([filler[:1000], copied, filler[1000:]])
    write_source(tmp_path / "shards", "train", data, [1500], tokenizer=tokenizer.describe())
    flags = ("--data_dir", tmp_path / "shards", "--tokenizer_path", tmp_path / "tok", "--tasks_dir", tmp_path / "tasks")
    assert run_script("check_contamination.py", *flags, "--tasks", "ask", "--out", tmp_path / "out.json") == 0
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["tasks"]["ask"]["copied"] == 1 and found["tokens"] == len(data)
    assert max(found["questions"], key=lambda q: q["met"])["doc_id"] == 1
    assert list(found["places_by_shard"]) == ["train_0000000000.bin"] and "questions met" in capsys.readouterr().out
    # Shards of another tokenizer are refused, and a folder without any.
    write_source(tmp_path / "other", "train", data, [1500])
    message = run_script("check_contamination.py", *("--data_dir", tmp_path / "other"), *flags[2:])
    assert "is not the tokenizer that made" in message
    assert "holds no shards" in run_script("check_contamination.py", *("--data_dir", tmp_path / "tok"), *flags[2:])
