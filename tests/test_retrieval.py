"""Passages out of a folder of documents."""

import json

import pytest
import torch

from lit_gpt.retrieval import Documents, Embedder, Passage, passages, with_passages

pytest.importorskip("bm25s")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "passport.md").write_text("# Passports\n\nA passport is renewed at the town hall.\n\nIt costs 60.\n")
    (tmp_path / "sub" / "cats.txt").write_text("Cats sleep.\n" * 3)
    (tmp_path / "image.png").write_bytes(b"passport" * 9)
    outside = tmp_path.parent / "outside.md"
    outside.write_text("a secret passport")
    (tmp_path / "link.md").symlink_to(outside)
    return tmp_path


def test_the_best_passage_comes_first_with_its_place(folder):
    documents = Documents(folder)
    assert sorted(p.file for p in documents.passages) == ["passport.md", "sub/cats.txt"]
    found = documents.search("Where are passports renewed?")
    assert [p.source for p in found] == ["passport.md:1"] and "town hall" in found[0].text
    assert documents.search("Do CATS sleep?", n=1)[0].source == "sub/cats.txt:1"
    assert documents.search("What is the capital of France?") == []  # "is", "the" and "of" are in every text
    assert documents.search("quantum chromodynamics") == [] == documents.search("?!")


def test_passages_hold_all_words_in_order_and_say_their_line():
    text = "\n\n".join(f"word{i} " * (i % 40) for i in range(200)) + "\n" + "long " * 1000
    found = passages(text, "f", words=50)
    assert " ".join(p.text for p in found).split() == text.split()
    lines = text.splitlines()
    for p in found:
        assert lines[p.line - 1].split()[:1] == p.text.split()[:1]
        assert len(p.text.split()) <= 100
    assert passages("", "f", 50) == passages("\n \n", "f", 50) == []


def test_the_question_carries_them():
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "Q?"}]
    assert with_passages(messages, []) == messages
    asked = with_passages(messages, [Passage("T", "a.md", 3)])
    assert asked[0] == messages[0] and "[1] a.md:3\nT" in asked[1]["content"] and asked[1]["content"].endswith("Q?")
    assert messages[1]["content"] == "Q?"


def test_folders_without_text(tmp_path):
    with pytest.raises(FileNotFoundError, match="no .md, .txt"):
        Documents(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        Documents(tmp_path / "nothing")


@pytest.fixture(scope="module")
def embedding_model(tmp_path_factory):
    """A BERT of a few thousand random weights, which knows six words."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("bert")
    size = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    torch.manual_seed(0)
    transformers.BertModel(transformers.BertConfig(vocab_size=8, max_position_embeddings=16, **size)).save_pretrained(
        folder
    )
    words = "[PAD] [UNK] a b c d e f".split()
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None, "decoder": None,
        "model": {"type": "WordLevel", "vocab": {word: i for i, word in enumerate(words)}, "unk_token": "[UNK]"},
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]", "unk_token": "[UNK]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_texts_become_the_mean_of_their_own_states(embedding_model):
    embed = Embedder(str(embedding_model))
    texts = ["a b c", "f", "c c c c " * 9]  # the last has more tokens than the model's 16 positions
    together = embed(texts)
    for text, vector in zip(texts, together, strict=True):
        torch.testing.assert_close(embed([text])[0], vector)  # what others in a batch are padded to does not matter
    with torch.no_grad():
        states = embed.model(torch.tensor([[2, 3, 4]])).last_hidden_state[0]  # a b c
    torch.testing.assert_close(together[0], torch.nn.functional.normalize(states.mean(0), dim=0))


def test_passages_nearest_to_the_question_come_first(embedding_model, tmp_path):
    for name, text in (("x.md", "a b a b"), ("y.md", "d e f"), ("z.md", "c")):
        (tmp_path / name).write_text(text)
    embed = Embedder(str(embedding_model))
    documents = Documents(tmp_path, embed)
    for question in ("d e f", "a b a b", "c"):  # the same text is nearest
        found = documents.search(question)
        cosines = [float(embed([p.text])[0] @ embed([question])[0]) for p in found]
        assert found[0].text == question and len(found) == 3 and cosines == sorted(cosines, reverse=True)
    assert len(documents.search("b", n=2)) == 2


def test_an_embedding_model_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="--embedding_model .*no model there"):
        Embedder(str(tmp_path))
