"""Raw text files to documents: JSON lines and plain text (also .zst and .gz), parquet, Arrow.

A file is read in units of about 8 MB of text, so that many processes can share one huge file and one process can take
many small ones. `open_source(path).read(k, fields)` returns the documents of unit k. Which documents a unit holds
depends on the file alone, so units put together in order are the file, whoever read them.

Nothing is skipped in silence: what cannot be read is in `Unit.bad`, with its line and the reason.
"""

import io
import json
import math
import operator
import os
import re
import textwrap
import zlib
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

UNIT = 8 << 20
"""Bytes of text that are read, encoded and handed on together"""
MAX_DOCUMENT = 64 << 20
"""Bytes of the longest line, or text file, that is read; encoding takes up to 50 bytes of memory for each of them"""
READ = 1 << 16
"""Bytes read from a file at once, and half of what is decompressed at once: what fits into a processor's cache is
decompressed 1.5 times as fast as what does not"""

TEXT_SUFFIXES = (".jsonl", ".ndjson", ".json", ".txt")
TABLE_SUFFIXES = (".parquet", ".arrow")
COMPRESSIONS = (".zst", ".gz")
COMPRESSION_RATIO = 3.5
"""Of prose; only used to guess how many units a file has"""
ANY_TEXT = [f"**/*{suffix}{end}" for suffix in TEXT_SUFFIXES for end in ("", *COMPRESSIONS)] + [
    f"**/*{suffix}" for suffix in TABLE_SUFFIXES
]
"""Glob patterns of all files that can be read"""
NOT_TEXT = ("dataset_info.json", "dataset_dict.json", "state.json")
"""What the `datasets` library lays beside its Arrow files"""


@dataclass(frozen=True)
class Filter:
    """Keep the documents whose metadata at `key` (dots go into nested objects) equal `value`, or differ from it."""

    key: str
    equal: bool
    value: str

    @classmethod
    def parse(cls, text: str) -> "Filter":
        """From `key=value` or `key!=value`. Raises: ValueError when it is neither."""
        key, separator, value = text.partition("!=") if "!=" in text else text.partition("=")
        if not separator or not key:
            raise ValueError(f"--filter {text!r}: write key=value to keep, or key!=value to leave out")
        return cls(key, separator == "=", value)

    def __str__(self) -> str:
        return f"{self.key}{'=' if self.equal else '!='}{self.value}"


@dataclass(frozen=True)
class Fields:
    """What is taken of each record. Keys may be dotted (`meta.redpajama_set_name`); a record without one is bad."""

    text: str = "text"
    filters: tuple[Filter, ...] = ()
    subset: str | None = None
    """Metadata by which documents are counted in the summary"""

    def keys(self) -> list[str]:
        """The text's key, then one for each filter, then the subset's."""
        return [self.text, *(f.key for f in self.filters), *([self.subset] if self.subset else [])]


@dataclass
class Unit:
    """The documents of one unit of a file, in order."""

    texts: list[str] = field(default_factory=list)
    subsets: list[str] = field(default_factory=list)
    """Value of `Fields.subset` of each text; empty when none was asked for"""
    dropped: Counter = field(default_factory=Counter)
    """Documents that a filter left out, by what they are: the filter's opposite"""
    bad: list[tuple[int | None, str]] = field(default_factory=list)
    """(line or table row counted from 0 at the unit's beginning, what is wrong); None: the file cannot be read on"""
    rows: int = 0
    """Lines or table rows of the unit, blank and bad ones included"""
    last: bool = True
    """There is no unit after this one"""
    progress: float = 1.0
    """How much of the file has been read at the end of the unit, 0 to 1"""

    def add(self, row: int, values: tuple, fields: Fields) -> None:
        """Take in one record, given as the values of `fields.keys()`, or note why not."""
        text, subset = values[0], values[-1]
        for condition, value in zip(fields.filters, values[1:], strict=False):
            if (_as_text(value) == condition.value) != condition.equal:
                self.dropped[str(replace(condition, equal=not condition.equal))] += 1
                return
        if not isinstance(text, str):
            self.bad.append((row, f"{fields.text!r} is of type {type(text).__name__}, not text"))
        elif len(text) > MAX_DOCUMENT:
            self.bad.append((row, f"a document of {len(text):,} characters; at most {MAX_DOCUMENT:,} are read"))
        else:
            self.texts.append(text)
            if fields.subset:
                self.subsets.append(_as_text(subset))


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def find_files(source_path: str | Path, patterns: list[str]) -> list[Path]:
    """All files below `source_path` that match one of the glob `patterns`, sorted by path; a file stands for itself.
    Folders may be symbolic links.

    Raises: FileNotFoundError when the folder is missing, or holds no such file.
    """
    source_path = Path(source_path)
    if source_path.is_file():
        return [source_path]
    if not source_path.exists():
        raise FileNotFoundError(f"--source_path {source_path}: no such folder")
    wanted = re.compile("|".join(re.escape(p).replace(r"\*\*/", "(.+/)?").replace(r"\*", "[^/]*") for p in patterns))
    found = (path for path in _files_below(source_path) if wanted.fullmatch(path.relative_to(source_path).as_posix()))
    files = sorted(path for path in found if path.name not in NOT_TEXT)
    if not files:
        raise FileNotFoundError(f"--source_path {source_path}: no file in it matches {' or '.join(patterns)}")
    return files


def _files_below(folder: Path, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """Path.glob's ** passes over linked folders without a word. `above`: on the way here; links can go in circles."""
    real = folder.resolve()
    for path in folder.iterdir() if real not in above else ():
        if path.is_dir():
            yield from _files_below(path, (*above, real))
        else:
            yield path


def open_source(path: str | Path) -> "JsonLines | Parquet | Arrow | PlainText":
    """The reader for a file, by its name. Raises: ValueError for a kind that is not known."""
    path = Path(path)
    name = path.name.lower()
    kind = Path(name.removesuffix(".zst").removesuffix(".gz")).suffix
    if kind in (".jsonl", ".ndjson", ".json"):
        return JsonLines(path)
    if kind == ".txt":
        return PlainText(path)
    if kind in (".parquet", ".arrow") and name.endswith(kind):
        return {".parquet": Parquet, ".arrow": Arrow}[kind](path)
    known = ", ".join([*TABLE_SUFFIXES, *TEXT_SUFFIXES])
    raise ValueError(f"{path}: this kind of file is not known; known are {known}, the text files also as .zst or .gz")


# --- bytes and lines -------------------------------------------------------------------------------------------------


class UnreadableFile(Exception):
    """The rest of a file cannot be read; the message says why."""


class _ByteStream:
    """The decompressed bytes of a file, forwards, in chunks."""

    def __init__(self, path: Path, start: int = 0) -> None:
        self.path = path
        self.file = open(path, "rb", buffering=0)
        self.size = os.fstat(self.file.fileno()).st_size
        self.consumed = self.file.seek(start)
        """How far the file itself has been read"""

    def __iter__(self) -> Iterator[bytes]:
        """Raises: UnreadableFile when the file is empty, or its compressed data are damaged or end too early."""
        if self.size == 0:
            raise UnreadableFile("the file is empty")
        compression = self.path.suffix.lower()
        decompressor = None
        while raw := self.file.read(READ):
            self.consumed += len(raw)
            if compression not in COMPRESSIONS:
                yield raw
                continue
            while raw:
                decompressor = decompressor or _decompressor(compression)
                try:
                    text = decompressor.decompress(raw)
                except Exception as error:  # zlib.error or ZstdError
                    raise UnreadableFile(f"damaged {compression} data: {error}") from error
                raw = b""
                if decompressor.eof:  # another frame may follow
                    raw, decompressor = decompressor.unused_data, None
                if text:
                    yield text
        if decompressor is not None:
            raise UnreadableFile(f"the {compression} data end too early: the file was cut short")


def _decompressor(compression: str):
    if compression == ".gz":
        return zlib.decompressobj(wbits=31)
    import zstandard

    return zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj(write_size=2 * READ)


class _LineStream:
    """Lines of a file, forwards, addressed by where in the text they begin."""

    def __init__(self, path: Path, start: int = 0) -> None:
        """`start` > 0 begins with the first line that begins there or later (not for compressed files)."""
        self.bytes = _ByteStream(path, max(start - 1, 0))
        self.offset = max(start - 1, 0)
        """Where the next line begins"""
        self.error: str | None = None
        """Why the lines end before the file does"""
        self._chunks = iter(self.bytes)
        self._rest = b""
        self._ended = False
        self.take(start)

    def take(self, limit: int) -> list[bytes]:
        """All lines that begin before `limit`, whole; in parts, which are not joined to spare a copy."""
        wanted = limit - self.offset
        if wanted <= 0:
            return []
        parts, size, chunk = [], 0, self._rest
        # The last line to take is the one that holds byte limit - 1; it ends at the first newline from there on.
        while not (cut := chunk.find(b"\n", max(wanted - 1 - size, 0)) + 1):
            parts.append(chunk)
            size += len(chunk)
            if size > wanted + MAX_DOCUMENT:
                self._ended, self.error = True, f"a line of more than {MAX_DOCUMENT:,} bytes"
            if not (chunk := self._next_chunk()):
                break
        parts.append(chunk[:cut])
        self._rest = chunk[cut:]
        self.offset += size + cut
        if self.error:  # what was read of the last line is none
            while parts and not (cut := parts[-1].rfind(b"\n") + 1):
                parts.pop()
            parts[-1:] = [part[:cut] for part in parts[-1:]]
        return parts

    def skip(self, limit: int) -> None:
        """Leave out all lines that begin before `limit`."""
        while self.offset + len(self._rest) < limit and not self._ended:
            self.offset += len(self._rest)
            self._rest = self._next_chunk()
        self.take(limit)

    def is_exhausted(self) -> bool:
        """Whether no line follows; reads ahead to find out."""
        self._rest = self._rest or self._next_chunk()
        return not self._rest

    def _next_chunk(self) -> bytes:
        if self._ended:
            return b""
        try:
            chunk = next(self._chunks, b"")
        except (UnreadableFile, OSError) as error:
            chunk, self.error = b"", getattr(error, "strerror", None) or str(error)
        self._ended = not chunk
        return chunk


def _lines(parts: list[bytes]) -> Iterator[bytes]:
    """The lines of a text in parts."""
    begun = []
    for part in parts:
        for line in io.BytesIO(part):
            if line[-1] != 10:  # it goes on in the next part
                begun.append(line)
            elif begun:
                yield b"".join([*begun, line])
                begun = []
            else:
                yield line
    if begun:
        yield b"".join(begun)


# --- kinds of files --------------------------------------------------------------------------------------------------
# Each has `units()`, about how many units there are (the length of compressed text is known at its end only), and
# `read(index, fields)`, for which going on forwards is cheap: a source remembers where the last unit ended. A unit past
# the end is empty.


class JsonLines:
    """One JSON object a line. Unit k holds the lines that begin in bytes [k * UNIT, (k + 1) * UNIT) of the text."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.compressed = path.suffix.lower() in COMPRESSIONS
        self._lines: _LineStream | None = None
        self._next = 0
        self._units = math.inf  # until the last one has been seen

    def units(self) -> int:
        size = self.path.stat().st_size * (COMPRESSION_RATIO if self.compressed else 1)
        return max(1, math.ceil(size / UNIT))

    def read(self, index: int, fields: Fields) -> Unit:
        return parse_block(self.block(index), fields)

    def block(self, index: int) -> "Block":
        """The text of unit `index`."""
        if index >= self._units:
            return Block()
        try:
            if self._lines is None or index < self._next or (index > self._next and not self.compressed):
                self._lines = _LineStream(self.path, 0 if self.compressed else index * UNIT)
        except OSError as error:
            return Block(error=error.strerror)
        lines, self._next = self._lines, index + 1
        lines.skip(index * UNIT)
        block = Block(lines.take((index + 1) * UNIT), last=lines.is_exhausted())
        if block.last:
            self._lines, self._units = None, index + 1
            block.error = lines.error
        block.progress = lines.bytes.consumed / max(lines.bytes.size, 1)
        return block


@dataclass
class Block:
    """Whole lines of a JSON-lines file, one unit of it, not yet parsed."""

    parts: list[bytes] = field(default_factory=list)
    """The text, cut anywhere"""
    last: bool = True
    """As in Unit"""
    progress: float = 1.0
    """As in Unit"""
    error: str | None = None
    """Why the file cannot be read on"""


def parse_block(block: Block, fields: Fields) -> Unit:
    """The documents of a block."""
    unit = Unit(last=block.last, progress=block.progress)
    _parse(_lines(block.parts), unit, fields)
    if block.error:
        unit.bad.append((None, block.error))
    return unit


def _parse(lines: Iterable[bytes], unit: Unit, fields: Fields) -> None:
    import msgspec

    record_type, get = _record_type(fields)
    decode = msgspec.json.Decoder(record_type).decode
    for row, line in enumerate(lines):
        unit.rows += 1
        try:
            record = decode(line)
        except (ValueError, RecursionError):
            if line.strip():
                _parse_carefully(row, line.removesuffix(b"\n"), unit, fields, record_type, get)
            continue
        unit.add(row, get(record), fields)


def _parse_carefully(row: int, line: bytes, unit: Unit, fields: Fields, record_type: type, get: Callable) -> None:
    """Python's own parser takes what the fast one does not (NaN, a byte order mark), and says better what is wrong."""
    import msgspec

    record = None
    try:
        record = json.loads(line.decode("utf-8-sig", "surrogateescape"))
        # What is broken outside of the fields that are asked for does no harm, here as in the fast parser.
        values = get(msgspec.convert(record, record_type))
        json.dumps(values, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        try:
            line.decode()
            unit.bad.append((row, "a lone surrogate (half of a \\ud83d\\ude00 pair) is not Unicode text"))
        except UnicodeDecodeError as error:
            unit.bad.append((row, str(error)))
    except (ValueError, RecursionError) as error:
        missing = isinstance(record, dict) and _missing(fields, record)
        unit.bad.append((row, missing or str(error)))
    else:
        unit.add(row, values, fields)


def _missing(fields: Fields, names: Collection[str]) -> str | None:
    """What to say when one of the fields is not among the names that a record, or a table, has."""
    missing = next((key for key in fields.keys() if key.split(".")[0] not in names), None)
    if missing is None:
        return None
    there = textwrap.shorten(", ".join(map(repr, names)), 200, placeholder=" ...") or "none"
    hint = " (name the text's with prepare_dataset.py --text_key)" if missing == fields.text else ""
    return f"no field {missing!r}; there are {there}{hint}"


def _record_type(fields: Fields) -> tuple[type, Callable[[Any], tuple]]:
    """A msgspec type with nothing but `fields`, so that the rest is not even built, and how to get their values."""
    import msgspec

    tree: dict = {}
    attributes: dict[str, str] = {}  # any text can be a key in JSON, so attributes are called f0, f1, ...
    paths = []
    for key in fields.keys():
        node, names = tree, key.split(".")
        for name in names:
            attributes.setdefault(name, f"f{len(attributes)}")
            node = node.setdefault(name, {})
        paths.append(".".join(attributes[name] for name in names))

    def build(node: dict, path: str) -> type:
        if not node:
            return str if path == paths[0] else Any
        members = [
            (attributes[name], build(child, f"{path}.{attributes[name]}".lstrip("."))) for name, child in node.items()
        ]
        return msgspec.defstruct("Record", members, rename={attributes[name]: name for name in node})

    get = operator.attrgetter(*paths)
    return build(tree, ""), get if len(paths) > 1 else lambda record: (get(record),)


class _Table:
    """One document a row. Units have equally many rows; only the columns that are needed are read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = None
        self._rows: Iterator[tuple] | None = None
        self._next = 0

    def units(self) -> int:
        import pyarrow

        try:
            self._file = self._file or self._open()
        except (OSError, ValueError, pyarrow.ArrowException):
            return 1  # read() says what is wrong
        return max(1, math.ceil(self._file.num_rows / self._rows_per_unit()))

    def read(self, index: int, fields: Fields) -> Unit:
        import pyarrow

        unit = Unit()
        try:
            self._file = self._file or self._open()
            rows, size = self._file.num_rows, self._rows_per_unit()
            if self._rows is None or index != self._next:
                self._rows = self._read_from(index * size, fields)
            for row in range(min(size, rows - index * size)):
                if (values := next(self._rows, None)) is None:
                    raise UnreadableFile("there are fewer rows than the file says")
                if error := next((value for value in values if isinstance(value, ValueError)), None):
                    unit.bad.append((row, str(error)))
                else:
                    unit.add(row, values, fields)
                unit.rows += 1
        except (OSError, ValueError, pyarrow.ArrowException, UnreadableFile) as error:
            self._file = self._rows = None
            unit.bad.append((None, getattr(error, "strerror", None) or str(error).splitlines()[0]))
            return unit
        self._next = index + 1
        unit.progress = min(1.0, (index + 1) * size / max(rows, 1))
        unit.last = (index + 1) * size >= rows
        if unit.last:
            self._file = self._rows = None
        return unit

    def _rows_per_unit(self) -> int:
        return max(1, self._file.num_rows * UNIT // max(self._file.text_bytes, UNIT))

    def _read_from(self, start: int, fields: Fields) -> Iterator[tuple]:
        """The values of `fields.keys()` row by row from row `start`, a value that is damaged as a ValueError."""
        import pyarrow

        keys = fields.keys()
        if missing := _missing(fields, self._file.columns):
            raise UnreadableFile(missing)
        # Small batches keep the memory small when a file is one huge row group.
        for batch in self._file.batches(start, keys, max(1, min(self._rows_per_unit() // 8, 4096))):
            table = pyarrow.Table.from_batches([batch])
            yield from zip(*(_column(table, key) for key in keys), strict=True)


class Parquet(_Table):
    """A parquet file."""

    def _open(self) -> "_ParquetFile":
        return _ParquetFile(self.path)


class Arrow(_Table):
    """An Arrow file of the `datasets` library: what `save_to_disk` writes and `load_dataset` caches."""

    def _open(self) -> "_ArrowFile":
        return _ArrowFile(self.path)


class _ParquetFile:
    def __init__(self, path: Path) -> None:
        import pyarrow.parquet

        self.file = pyarrow.parquet.ParquetFile(path, pre_buffer=False)
        groups = [self.file.metadata.row_group(i) for i in range(self.file.metadata.num_row_groups)]
        self.num_rows = self.file.metadata.num_rows
        self.text_bytes = sum(group.total_byte_size for group in groups)
        self.columns = self.file.schema_arrow.names
        self.group_starts = [0, *accumulate(group.num_rows for group in groups)]

    def batches(self, start: int, columns: list[str], rows: int) -> Iterator[Any]:
        first = max(0, bisect_right(self.group_starts, start) - 1)
        row, groups = self.group_starts[first], list(range(first, len(self.group_starts) - 1))
        for batch in self.file.iter_batches(rows, row_groups=groups, columns=columns, use_threads=False):
            yield batch.slice(max(0, start - row))
            row += len(batch)


class _ArrowFile:
    def __init__(self, path: Path) -> None:
        import pyarrow

        memory = pyarrow.memory_map(str(path))  # nothing is read before it is needed
        try:
            self.table = pyarrow.ipc.open_stream(memory).read_all()
        except pyarrow.ArrowInvalid:
            self.table = pyarrow.ipc.open_file(memory).read_all()
        self.num_rows, self.text_bytes, self.columns = self.table.num_rows, self.table.nbytes, self.table.column_names

    def batches(self, start: int, columns: list[str], rows: int) -> Iterator[Any]:
        names = list(dict.fromkeys(key.split(".")[0] for key in columns))
        yield from self.table.slice(start).select(names).to_batches(rows)


def _column(table: Any, key: str) -> list:
    import pyarrow.compute

    name, *inside = key.split(".")
    column = table[name]
    if inside:
        try:
            column = pyarrow.compute.struct_field(column, inside)
        except pyarrow.ArrowException as error:
            raise UnreadableFile(f"no column {key!r}: {error}") from error
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return [_scalar(value) for value in column]


def _scalar(value: Any) -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError as error:
        return error  # a ValueError, which Unit.add reports with its row


class PlainText:
    """A file that is one document. Longer ones are to be cut by who knows where a document ends."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def units(self) -> int:
        return 1

    def read(self, index: int, fields: Fields) -> Unit:
        unit = Unit(rows=1)
        if fields.filters or fields.subset:
            unit.bad.append((None, f"plain text has no metadata {' or '.join(fields.keys()[1:])}"))
            return unit
        if index:
            return Unit()
        parts, size = [], 0
        try:
            for chunk in _ByteStream(self.path):
                parts.append(chunk)
                size += len(chunk)
                if size > MAX_DOCUMENT:
                    raise UnreadableFile(
                        f"a text of more than {MAX_DOCUMENT:,} bytes is one document; cut it into several"
                    )
            unit.add(0, (b"".join(parts).decode("utf-8-sig"),), fields)
        except (UnreadableFile, OSError, UnicodeDecodeError) as error:
            unit.bad.append((None, getattr(error, "strerror", None) or str(error)))
        return unit
