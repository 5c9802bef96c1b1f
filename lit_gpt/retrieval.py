"""Passages of your own documents for a question: by their words, or by what an embedding model makes of them.

docs = Documents(Path("notes"))                     # BM25 (Robertson and Zaragoza 2009)
docs = Documents(Path("notes"), Embedder("sentence-transformers/all-MiniLM-L6-v2"))
passages = docs.search("How do I renew it?", n=3)
messages = with_passages(messages, passages)        # the last question, preceded by what was found
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lit_gpt.chat_template import Message
from lit_gpt.hub import local_folder

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

    Args:
        embed: texts -> unit vectors, (N, C); passages are then those nearest to the question. None: by BM25.

    Raises:
        FileNotFoundError: no folder there, or no text files in it.
        ImportError: bm25s is wanted and not installed.
    """

    def __init__(
        self, folder: Path, embed: Callable[[Sequence[str]], torch.Tensor] | None = None, words: int = 120
    ) -> None:
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
        self._embed = embed
        if embed is not None:
            self._vectors = embed([p.text for p in self.passages])  # (N, C)
            return
        try:
            import bm25s
        except ImportError as e:
            raise ImportError("searching documents by words needs bm25s: pip install bm25s") from e
        self._index = bm25s.BM25()
        self._index.index([terms(f"{p.file} {p.text}") for p in self.passages], show_progress=False)

    def search(self, question: str, n: int = 3) -> list[Passage]:
        """The n passages that match best, the best first; by words fewer where fewer share one with the question that
        is more than grammar."""
        if self._embed is not None:
            cosines = self._vectors @ self._embed([question])[0]  # (N,)
            return [self.passages[i] for i in cosines.topk(min(n, len(self.passages))).indices.tolist()]
        from bm25s.stopwords import STOPWORDS_EN

        grammar = {*STOPWORDS_EN, *"what who whom whose which when where why how do doe did can could i you".split()}
        known = [term for term in terms(question) if term in self._index.vocab_dict and term not in grammar]
        if not known:
            return []
        found, scores = self._index.retrieve([known], k=min(n, len(self.passages)), show_progress=False)
        return [self.passages[i] for i, score in zip(found[0], scores[0], strict=True) if score > 0]


class Embedder:
    """Texts as unit vectors: the mean of a model's last hidden states (Reimers and Gurevych 2019, arXiv:1908.10084).

    Args:
        name: a Hugging Face folder or the id of a model on the hub, whose weights are safetensors.

    Raises:
        FileNotFoundError: neither is there.
        ImportError: transformers is not installed.
    """

    def __init__(self, name: str) -> None:
        try:
            from transformers import AutoModel, AutoTokenizer
        except ImportError as e:
            raise ImportError("an embedding model needs transformers: pip install transformers") from e
        folder = local_folder(name)
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"--embedding_model {name}: no model there, {folder / 'config.json'} is missing")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModel.from_pretrained(folder, use_safetensors=True).to(device).eval()

    @torch.inference_mode()
    def __call__(self, texts: Sequence[str]) -> torch.Tensor:
        """(N, C) on the CPU; of a text that is longer than the model's context, the beginning."""
        from tqdm import tqdm

        longest = min(self.tokenizer.model_max_length, self.model.config.max_position_embeddings)
        vectors = []
        for i in tqdm(range(0, len(texts), 32), "embedding passages", unit=" batches", disable=len(texts) <= 32):
            batch = self.tokenizer(
                list(texts[i : i + 32]), padding=True, truncation=True, max_length=longest, return_tensors="pt"
            ).to(self.model.device)
            hidden = self.model(**batch).last_hidden_state  # (B, T, C)
            mask = batch["attention_mask"][..., None]
            mean = (hidden * mask).sum(1) / mask.sum(1)
            vectors.append(torch.nn.functional.normalize(mean.float(), dim=-1).cpu())
        return torch.cat(vectors)


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
