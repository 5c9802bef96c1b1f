"""A thousand broken files end in exact ids or a named line, never in a traceback, a hang or a silent skip.

What is right is decided by a second, plain reading: Python's json, one line at a time, and the reference tokenizer.
"""

import gzip
import json
import random
import re
import zlib
from pathlib import Path

import numpy as np
import pytest
import zstandard

from lit_gpt.prepare import PrepareArgs, prepare
from lit_gpt.shards import HEADER_SIZE, read_header
from lit_gpt.text_sources import ANY_TEXT, Fields, Filter, open_source
from lit_gpt.tokenizer import SEPARATOR, Tokenizer

pytestmark = pytest.mark.usefixtures("tokenizer_cache")
FILES = 1000
FIELDS = Fields("text", (Filter.parse("meta.set!=no"),), "meta.set")
PIECES = [
    *("<s>", "</s>", "<unk>", "▁", "▁▁", "<0x0A>", "你好世界", "こんにちは", "😀👩\u200d👧", "é", "e\u0301", "\u00a0"),
    *("\ufeff", " " * 70, "\t" * 40, "\n" * 30, "\r\n", " ", "\x00", "\x7f", "\\", '"', "/", "\U0010ffff"),
    *("def f(x):", "the fox", "12345", SEPARATOR),
]  # fmt: skip


def random_line(r: random.Random) -> bytes:
    text = "".join(r.choices(PIECES, k=r.choice([0, 1, 3, 30, 200])))
    record = {"text": text, "meta": {"set": r.choice(["a", "b", "no"]), "n": r.random()}}
    if r.random() < 0.3:  # keys in another order, and one that is not asked for
        record = {"id": r.randrange(100), "meta": record["meta"], "text": text}
    return json.dumps(record, ensure_ascii=r.random() < 0.5).encode()


def mutate_line(line: bytes, r: random.Random) -> bytes:
    """One line made wrong, or strange, or left as it is after all."""
    record = json.loads(line)
    place, end = r.randrange(len(line)), r.randrange(len(line))
    return r.choice(
        [
            lambda: line[:place],
            lambda: line[:place] + bytes([r.randrange(256)]) + line[place + 1 :],
            lambda: line[:place] + b"\xff\xfe\xc3" + line[place:],
            lambda: line[:place] + b"\x00" * r.randrange(1, 50) + line[place:],
            lambda: line[: min(place, end)] + line[max(place, end) :],
            lambda: line[:place] + line,
            lambda: line + line,
            lambda: line + b",",
            lambda: b"[" + line + b"]",
            lambda: b"\xef\xbb\xbf" + line,
            lambda: line + b"\r",
            lambda: b" \t" + line + b"  ",
            lambda: b"",
            lambda: b"   ",
            lambda: json.dumps({"meta": record["meta"]}).encode(),
            lambda: json.dumps({"text": record["text"]}).encode(),
            lambda: json.dumps({"text": record["text"], "meta": None}).encode(),
            lambda: json.dumps({"text": record["text"], "meta": {"set": r.choice([None, 1, [1], {"no": 1}])}}).encode(),
            lambda: json.dumps({"text": r.choice([None, 1, 2.5, True, [], {}, ["a"]]), "meta": {"set": "a"}}).encode(),
            lambda: json.dumps(record | {"x": float("nan"), "y": 10**400}).encode(),
            lambda: line.replace(b'"text": "', b'"text": "\\ud83d', 1),
            lambda: line.replace(b'"text": "', b'"text": "\\ud83d\\ude00\\u0000', 1),
            lambda: line.replace(b'"text": "', b'"text": "\\x', 1),
            lambda: line.replace(b'"meta"', b'"text": "first", "meta"', 1),
            lambda: line.replace(b'"meta"', b'"deep": ' + b"[" * 3000 + b"]" * 3000 + b', "meta"', 1),
            lambda: line.replace(b": ", b":").replace(b", ", b","),
            lambda: r.randbytes(r.randrange(200)).replace(b"\n", b""),
        ]
    )()


def read_plainly(content: bytes) -> tuple[list[str], int, list[int]]:
    """Texts of a decompressed file, how many are left out, and the numbers of its bad lines."""
    texts, dropped, bad = [], 0, []
    for number, line in enumerate(content.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode("utf-8-sig", "surrogateescape"))  # broken bytes elsewhere do no harm
            text, name = record["text"], record["meta"]["set"]
            (text + json.dumps(name, ensure_ascii=False)).encode()
        except (ValueError, KeyError, TypeError, RecursionError):
            bad.append(number)
            continue
        dropped += name == "no"
        texts += [text] * (name != "no")
    return texts, dropped, bad


def decompress_plainly(content: bytes, suffix: str) -> bytes | None:
    """All frames at once, or None where a byte of it is wrong."""
    result = b""
    try:
        while content:
            frame = zlib.decompressobj(31) if suffix == ".gz" else zstandard.ZstdDecompressor().decompressobj()
            result += frame.decompress(content)
            if not frame.eof:
                return None
            content = frame.unused_data
    except (zlib.error, zstandard.ZstdError):
        return None
    return result


def write_files(folder: Path, seed: int) -> None:
    r = random.Random(seed)
    for n in range(FILES):
        lines = [random_line(r) for _ in range(r.randrange(1, 9))]
        lines = [mutate_line(line, r) if r.random() < 0.4 else line for line in lines]
        content = b"\n".join(lines) + b"\n" * r.randrange(2)
        suffix = r.choice(["", ".zst", ".zst", ".gz"])
        if suffix:
            content = gzip.compress(content, 1) if suffix == ".gz" else zstandard.compress(content, 1)
            damage = r.random()
            if damage < 0.15:
                content = content[: r.randrange(len(content))]
            elif damage < 0.3:
                place = r.randrange(len(content))
                content = content[:place] + r.randbytes(r.randrange(1, 4)) + content[place + 1 :]
            elif damage < 0.4:
                content += r.choice([content, b"rubbish after the end", b"\x00" * 9])
        (folder / f"{n:04d}.jsonl{suffix}").write_bytes(content)


def fuzz(tokenizer_path: Path, folder: Path, seed: int) -> None:
    source = folder / "source"
    source.mkdir()
    write_files(source, seed)
    args = PrepareArgs(source, tokenizer_path, folder / "out", chunk_size=10_000, processes=2, on_error="skip")
    manifest = prepare(args, "fuzz", ANY_TEXT, FIELDS)
    shards = sorted((folder / "out").glob("*.bin"))
    stream = np.concatenate([np.fromfile(s, read_header(s).dtype, offset=HEADER_SIZE) for s in shards])
    found = np.split(stream, np.cumsum([entry["tokens"] for entry in manifest.sources])[:-1])

    tokenizer = Tokenizer(tokenizer_path)
    kinds = {"exact": 0, "bad lines": 0, "unreadable": 0}
    for entry, ids in zip(manifest.sources, found, strict=True):
        path = source / entry["path"]
        content = path.read_bytes() or None
        skipped = [s for s in manifest.skipped if s["path"] == entry["path"]]
        assert all(s["why"] for s in skipped)
        if path.suffix in (".zst", ".gz"):
            content = decompress_plainly(content, path.suffix) if content else None
        if content is None:
            assert skipped[-1]["line"] is None, path  # damaged or empty: named as a file
            kinds["unreadable"] += 1
            continue
        texts, _, bad = read_plainly(content)
        assert [s["line"] for s in skipped] == bad, path
        assert ids.tolist() == [i for text in texts for i in tokenizer.encode(text, bos=True, eos=True)], path
        kinds["bad lines" if bad else "exact"] += 1
    assert min(kinds.values()) > FILES / 20, kinds

    # By default the first of them stops the run, in one line.
    for entry in manifest.skipped[:: max(1, len(manifest.skipped) // 5)]:
        args = PrepareArgs(source / entry["path"], tokenizer_path, folder / "one", processes=1, overwrite=True)
        first = next(s for s in manifest.skipped if s["path"] == entry["path"])
        where = entry["path"] + (f", line {first['line']}:" if first["line"] else "")
        with pytest.raises(ValueError, match=re.escape(where)):
            prepare(args, "one", ANY_TEXT, FIELDS)


def test_a_thousand_broken_files(tmp_path, small_tokenizer):
    fuzz(small_tokenizer, tmp_path, seed=1)


@pytest.mark.shared
def test_another_thousand_with_the_llama2_tokenizer(tmp_path, shared_data):
    fuzz(shared_data / "tokenizer" / "llama2", tmp_path, seed=2)


def test_broken_parquet_files_are_read_or_named(tmp_path):
    import pyarrow
    import pyarrow.parquet

    r = random.Random(3)
    texts = ["".join(r.choices(PIECES, k=40)) for _ in range(200)]
    table = pyarrow.table({"stars": [None] * 200, "text": texts})
    pyarrow.parquet.write_table(table, tmp_path / "whole.parquet", row_group_size=60)
    whole, outcomes = (tmp_path / "whole.parquet").read_bytes(), {True: 0, False: 0}
    for n in range(150):
        content = bytearray(whole)
        if n % 3 == 0:
            content = content[: r.randrange(len(content))]
        else:  # somewhere in it, or in the footer
            for _ in range(r.randrange(1, 6)):
                content[r.randrange(len(content)) if n % 3 == 1 else -r.randrange(1, 900)] = r.randrange(256)
        (tmp_path / "x.parquet").write_bytes(content)
        source = open_source(tmp_path / "x.parquet")
        assert source.units() > 0
        unit = source.read(0, Fields())
        outcomes[bool(unit.bad)] += 1
        assert unit.bad or len(unit.texts) == 200
        assert all(why for _, why in unit.bad)
    assert min(outcomes.values()) > 10


@pytest.fixture
def small_tokenizer(tmp_path) -> Path:
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the fox def f(x): 12345 " * 3] * 20), model_prefix=str(tmp_path / "tokenizer"),
        model_type="bpe", vocab_size=320, byte_fallback=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, allow_whitespace_only_pieces=True, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    return tmp_path / "tokenizer.model"
