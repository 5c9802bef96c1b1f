"""Passages of your own documents for a question, by BM25 (Robertson and Zaragoza 2009).

docs = Documents(Path("notes"))
passages = docs.search("How do I renew it?", n=3)
messages = with_passages(messages, passages)        # the last question, preceded by what was found
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lit_gpt.chat_template import Message

SUFFIXES = (".md", ".txt", ".rst", ".py")
MAX_FILE_BYTES = 10_000_000


@dataclass(frozen=True)
class Passage:
    text: str
    file: str
    """Relative to the folder."""
    line: int
    """Where it begins in the file, counted from 1."""

    @property
    def source(self) -> str:
        return f"{self.file}:{self.line}"


class Documents:
    """The text files of a folder, in passages of about `words` words that end at the end of a paragraph if they can.

    Raises:
        FileNotFoundError: no folder there, or no text files in it.
        ImportError: bm25s is not installed.
    """

    def __init__(self, folder: Path, words: int = 120) -> None:
        try:
            import bm25s
        except ImportError as e:
            raise ImportError("searching documents needs bm25s: pip install bm25s") from e
        if not folder.is_dir():
            raise FileNotFoundError(f"--docs {folder}: no such folder")
        self.passages: list[Passage] = []
        for file in sorted(folder.rglob("*")):
            # A link could lead out of the folder.
            if file.suffix.lower() in SUFFIXES and file.is_file() and not file.is_symlink():
                if file.stat().st_size <= MAX_FILE_BYTES:
                    text = file.read_text(encoding="utf-8", errors="replace")
                    self.passages += passages(text, str(file.relative_to(folder)), words)
        if not self.passages:
            raise FileNotFoundError(f"--docs {folder}: no {', '.join(SUFFIXES)} files with text in it")
        self._index = bm25s.BM25()
        self._index.index([terms(f"{p.file} {p.text}") for p in self.passages], show_progress=False)

    def search(self, question: str, n: int = 3) -> list[Passage]:
        """The n passages that match best, the best first; fewer where fewer share a word with the question that is
        more than grammar."""
        from bm25s.stopwords import STOPWORDS_EN

        grammar = {*STOPWORDS_EN, *"what who whom whose which when where why how do doe did can could i you".split()}
        known = [term for term in terms(question) if term in self._index.vocab_dict and term not in grammar]
        if not known:
            return []
        found, scores = self._index.retrieve([known], k=min(n, len(self.passages)), show_progress=False)
        return [self.passages[i] for i, score in zip(found[0], scores[0], strict=True) if score > 0]


def terms(text: str) -> list[str]:
    """Words in lower case, without a plural's s; of other scripts, the runs of letters."""
    return [re.sub(r"(?<=\w\w\w)s$", "", word) for word in re.findall(r"\w+", text.lower())]


def passages(text: str, file: str, words: int) -> list[Passage]:
    """Paragraphs joined until they have `words` words; a longer one is cut at lines, a longer line at words."""
    found: list[Passage] = []
    lines: list[str] = []
    begin = n_words = 0
    for number, line in enumerate([*text.splitlines(), ""], start=1):
        for piece in [" ".join(part) for part in _parts(line.split(), words)] if len(line.split()) > words else [line]:
            full = n_words + len(piece.split()) > 2 * words or (n_words >= words and not piece.strip())
            if full and lines:
                found.append(Passage("\n".join(lines).strip(), file, begin))
                lines, n_words = [], 0
            if piece.strip() or lines:
                begin = begin if lines else number
                lines.append(piece)
                n_words += len(piece.split())
    if n_words:
        found.append(Passage("\n".join(lines).strip(), file, begin))
    return found


def _parts(items: list[str], n: int) -> list[list[str]]:
    return [items[i : i + n] for i in range(0, len(items), n)]


def with_passages(messages: Sequence[Message], found: Sequence[Passage]) -> list[Message]:
    """The conversation with what was found before its last question; as it is where nothing was."""
    if not found:
        return list(messages)
    context = "\n\n".join(f"[{i}] {p.source}\n{p.text}" for i, p in enumerate(found, start=1))
    question = messages[-1]["content"]
    content = f"Answer with the help of these passages, if they say it.\n\n{context}\n\nQuestion: {question}"
    return [*messages[:-1], {"role": "user", "content": content}]
