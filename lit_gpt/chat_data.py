"""Files of conversations to packed batches.

    name, conversations = load_conversations(Path("oasst1.trees.jsonl"))         # format found, or given
    rows, report = pack_conversations(conversations, template, block_size=2048)
    batch = rows.batch([0, 1])                                                   # ChatBatch for GPT.forward

B rows of a batch, T tokens in a row.
"""

import gzip
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from lit_gpt.chat_template import ChatTemplate, Encoded, Message, Straddle, check_messages
from lit_gpt.kernels import IGNORE_INDEX
from lit_gpt.tokenizer import check_unicode

# --- files ------------------------------------------------------------------------------------------------------------


def load_conversations(path: Path, format: str | None = None) -> tuple[str, list[list[Message]]]:
    """The format of a .json, .jsonl, .jsonl.gz or .parquet file, and its conversations.

    Args:
        format: one of FORMATS; None finds it from the first row.

    Raises:
        FileNotFoundError: no such file.
        ValueError: naming file and line: not JSON, not one of the formats, or a row that is not like the first.
    """
    if format is not None and format not in FORMATS:
        raise ValueError(f"--format {format}: choose one of {', '.join(FORMATS)}")
    rows = list(_rows(path))
    if not rows:
        raise ValueError(f"{path} is empty")
    if format is None:
        where, first = rows[0]
        format = next((name for name, f in FORMATS.items() if f.keys <= first.keys()), None)
        if format is None:
            known = "; ".join(f"{name}: {', '.join(sorted(f.keys))}" for name, f in FORMATS.items())
            raise ValueError(f"{where}: no known format has the keys {', '.join(first)}. Expected are {known}")
    if format == "oasst1":
        return format, _oasst1_conversations(rows)
    conversations = []
    for where, row in rows:
        try:
            messages = FORMATS[format].read(row)
            for message in messages:
                check_unicode(message["content"])
        except (KeyError, TypeError, AttributeError) as e:
            keys = ", ".join(sorted(FORMATS[format].keys))
            raise ValueError(f"{where}: not a row of {format}, which has {keys}: {type(e).__name__} {e}") from e
        except ValueError as e:
            raise ValueError(f"{where}: {e}") from e
        conversations.append(messages)
    return format, conversations


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where it is, row) for each row of a file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file of conversations: it does not exist")
    if path.suffix == ".parquet":
        import pyarrow.parquet

        rows: Iterable = enumerate(pyarrow.parquet.read_table(path).to_pylist(), start=1)
        unit = "row"
    elif path.name.endswith(".json"):
        rows, unit = [(0, path.read_text(encoding="utf-8"))], "row"
    elif path.name.endswith((".jsonl", ".jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8") as f:
            rows, unit = [(i, line) for i, line in enumerate(f, start=1) if line.strip()], "line"
    else:
        raise ValueError(f"{path}: conversations are read from .json, .jsonl, .jsonl.gz and .parquet files")
    for i, row in rows:
        if isinstance(row, str):
            try:
                row = json.loads(row)
            except ValueError as e:
                raise ValueError(f"{path}, {unit} {i}: not JSON: {e}" if i else f"{path} is not JSON: {e}") from e
        for j, item in enumerate(row if i == 0 and isinstance(row, list) else [row], start=1):
            where = f"{path}, {unit} {i or j}"
            if not isinstance(item, dict):
                raise ValueError(f"{where}: a JSON object is expected, not {type(item).__name__}")
            yield where, item


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not text")
    return value


def _exchange(question: str, context: Any, answer: Any) -> list[Message]:
    question = "\n\n".join(_text(part) for part in (question, context) if part)
    return [{"role": "user", "content": question}, {"role": "assistant", "content": _text(answer)}]


def _messages(row: dict) -> list[Message]:
    return [{"role": _text(m["role"]), "content": _text(m["content"])} for m in row["messages"]]


SHAREGPT_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


def _sharegpt(row: dict) -> list[Message]:
    return [
        {"role": SHAREGPT_ROLES.get(m["from"], _text(m["from"])), "content": _text(m["value"])}
        for m in row["conversations"]
    ]


def _guanaco(row: dict) -> list[Message]:
    parts = re.split(r"\s*### (Human|Assistant):", _text(row["text"]))
    if len(parts) < 3:
        raise ValueError("no '### Human:' or '### Assistant:' in the text")
    roles = {"Human": "user", "Assistant": "assistant"}
    system = [{"role": "system", "content": parts[0]}] if parts[0].strip() else []
    turns = zip(parts[1::2], parts[2::2], strict=True)
    return system + [{"role": roles[who], "content": words.strip()} for who, words in turns]


def _oasst1_conversations(rows: list[tuple[str, dict]]) -> list[list[Message]]:
    """One conversation of each tree: from the prompt always to the best ranked reply, as openassistant-guanaco has it.
    A row is a tree (*.trees.jsonl) or a message that knows its parent (the data set on the hub)."""
    replies: dict[str, list[dict]] = {}
    roots = []
    for where, row in rows:
        try:
            if "prompt" in row:
                roots.append((where, row["prompt"]))
            elif row["parent_id"] is None:
                roots.append((where, row))
            else:
                replies.setdefault(row["parent_id"], []).append(row)
        except KeyError as e:
            raise ValueError(f"{where}: neither a tree with a prompt nor a message: it lacks {e}") from e
    conversations = []
    for where, message in roots:
        messages = []
        try:
            while message:
                content = _text(message["text"])
                check_unicode(content)
                messages.append(
                    {"role": {"prompter": "user"}.get(message["role"], message["role"]), "content": content}
                )
                ranked = message.get("replies") or replies.get(message.get("message_id"), [])
                # Without a rank (unreviewed) they come last, in the file's order.
                message = min(ranked, key=lambda m: m["rank"] if m.get("rank") is not None else np.inf, default=None)
        except (KeyError, TypeError, AttributeError, ValueError) as e:
            raise ValueError(f"{where}: not a tree of messages with text, role and replies: {e}") from e
        conversations.append(messages)
    return conversations


@dataclass(frozen=True)
class Format:
    keys: set[str]
    """That every row has; a format is found by them."""
    read: Callable[[dict], list[Message]]


FORMATS: dict[str, Format] = {
    "messages": Format({"messages"}, _messages),
    "sharegpt": Format({"conversations"}, _sharegpt),
    "dolly": Format(
        {"instruction", "context", "response"}, lambda r: _exchange(r["instruction"], r["context"], r["response"])
    ),
    "alpaca": Format({"instruction", "output"}, lambda r: _exchange(r["instruction"], r.get("input"), r["output"])),
    # Both kinds of its rows have it; see _oasst1_conversations.
    "oasst1": Format({"message_tree_id"}, lambda r: []),
    "guanaco": Format({"text"}, _guanaco),
}

# --- conversations to rows --------------------------------------------------------------------------------------------


@dataclass
class Report:
    """What became of the conversations of a file."""

    read: int = 0
    kept: int = 0
    truncated: int = 0
    """Kept without their last turns, which did not fit; no reply is cut."""
    dropped: Counter = field(default_factory=Counter)
    """Reason -> how many."""
    tokens: int = 0
    """Of those that were kept, the template's included."""
    trained: int = 0
    """Tokens among them that are the assistant's."""
    rows: int = 0
    """Of block_size tokens, into which they were packed."""

    def __str__(self) -> str:
        dropped = "; ".join(f"{n:,} {reason}" for reason, n in sorted(self.dropped.items()))
        return (
            f"{self.kept:,} of {self.read:,} conversations, {self.truncated:,} of them truncated to whole turns; "
            f"dropped: {dropped or 'none'}; {self.tokens:,} tokens, {self.trained:,} of them trained, "
            f"in {self.rows:,} packed rows"
        )


class ChatBatch(NamedTuple):
    """Rows of conversations that do not see each other; what GPT.forward takes."""

    idx: torch.Tensor
    """(B, T) int64"""
    targets: torch.Tensor
    """(B, T) int64: the next token where it is the assistant's, else IGNORE_INDEX"""
    cu_seqlens: torch.Tensor
    """(conversations + 1,) int32: where each begins in the B·T tokens; the padding of a row counts as one"""
    trained: torch.Tensor
    """(N,) int64: which of the B·T tokens have a target, to spare the head the others"""


class PackedRows:
    """Conversations laid into rows of block_size tokens, none cut, in memory."""

    def __init__(self, examples: Sequence[Encoded], block_size: int) -> None:
        self.block_size = block_size
        self.ids = [torch.tensor(e.ids, dtype=torch.int32) for e in examples]
        self.trained = [torch.tensor(e.trained) for e in examples]
        # The last token of a conversation is only a target, so one of block_size + 1 fits.
        self.rows = best_fit([len(ids) - 1 for ids in self.ids], block_size)
        self.tokens = [sum(len(self.ids[e]) - 1 for e in row) for row in self.rows]
        """Of each row, without its padding."""
        self.targets = [sum(int(self.trained[e][1:].sum()) for e in row) for row in self.rows]
        """Of each row, those that are trained on."""

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, indices: Sequence[int | None]) -> ChatBatch:
        """The batch of these rows; None is a row of padding, which evens out a last batch."""
        idx = torch.zeros(len(indices), self.block_size, dtype=torch.int64)
        targets = torch.full_like(idx, IGNORE_INDEX)
        begins = []
        for row, i in enumerate(indices):
            begin = 0
            for ids, trained in ((self.ids[e], self.trained[e]) for e in (() if i is None else self.rows[i])):
                end = begin + len(ids) - 1
                idx[row, begin:end] = ids[:-1]
                targets[row, begin:end] = ids[1:].masked_fill(~trained[1:], IGNORE_INDEX)
                begins.append(row * self.block_size + begin)
                begin = end
            if begin < self.block_size:
                begins.append(row * self.block_size + begin)
        cu_seqlens = torch.tensor([*begins, idx.numel()], dtype=torch.int32)
        trained = (targets.flatten() != IGNORE_INDEX).nonzero()[:, 0]
        if not len(trained):  # padding alone: the loss is 0, and a rank has the same gradients to share as the others
            trained = torch.zeros(1, dtype=torch.int64)
        return ChatBatch(idx, targets, cu_seqlens, trained)


def best_fit(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Indices of `lengths` in bins of `size`, longest first into the fullest bin that has room: within 1.22 of the
    fewest bins (Johnson 1973). Which ones share a bin does not matter, since they do not see each other."""
    with_room: list[list[int]] = [[] for _ in range(size + 1)]  # bins by the room that they have
    bins: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        room = next((r for r in range(lengths[i], size + 1) if with_room[r]), None)
        if room is None:
            room, b = size, len(bins)
            bins.append([])
        else:
            b = with_room[room].pop()
        bins[b].append(i)
        with_room[room - lengths[i]].append(b)
    return bins


def pack_conversations(
    conversations: Sequence[list[Message]], template: ChatTemplate, block_size: int, progress: bool = False
) -> tuple[PackedRows, Report]:
    """Encode and pack. What cannot be trained on is dropped and counted, what is too long loses its last turns.

    Args:
        progress: show a bar.
    """
    from tqdm import tqdm

    report, examples = Report(read=len(conversations)), []
    for messages in tqdm(conversations, "encoding", unit=" conversations", disable=not progress):
        example, reason = _encode(messages, template, block_size)
        if example is None:
            report.dropped[reason] += 1
            continue
        examples.append(example)
        report.truncated += reason == "truncated"
        report.tokens += len(example.ids)
        report.trained += sum(example.trained)
    rows = PackedRows(examples, block_size)
    report.kept, report.rows = len(examples), len(rows)
    return rows, report


def _encode(messages: list[Message], template: ChatTemplate, block_size: int) -> tuple[Encoded | None, str]:
    """The example, or why there is none; "truncated" where it is not the whole conversation."""
    if not any(m["role"] == "assistant" for m in messages):
        return None, "without a reply"
    while messages[-1]["role"] != "assistant":  # nothing is learnt from what follows the last reply
        messages = messages[:-1]
    if any(not m["content"].strip() for m in messages):
        return None, "with an empty message"
    try:
        check_messages(messages)
    except ValueError:
        return None, "whose roles do not alternate"
    try:
        encoded = template.encode(messages)
    except Straddle:
        return None, "where a token lies across the beginning of a reply"
    fitting = [end for end in encoded.ends if end <= block_size + 1]
    if not fitting:
        return None, f"whose first reply ends beyond {block_size:,} tokens"
    end = fitting[-1]
    kept = Encoded(encoded.ids[:end], encoded.trained[:end], fitting)
    return kept, "truncated" if len(fitting) < len(encoded.ends) else ""
