"""Passages out of a folder of documents."""

import pytest

from lit_gpt.retrieval import Documents, Passage, passages, with_passages

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
