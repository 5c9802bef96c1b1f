"""Documents to packed shards: read, encode, write, with as many processes as there are cores.

The tokens of all documents, files in sorted order, are one stream; shards are cut from it every `chunk_size` tokens and
the last one holds what remains. The stream, and so every byte of the shards, depends on the input and the tokenizer
alone: not on the number of processes, nor on how often the work was interrupted.

Workers take units (lit_gpt/text_sources.py) and give back tokens; one writer puts them in order, fills shards and keeps
a journal, `{prefix}.journal.jsonl`, of what is safely on the disk. After a kill the same command goes on from there.
The manifest says `complete: false` until everything is written. Files are read by the workers, but a large compressed
one, which cannot be entered in the middle, by the writer, once for all of them.
"""

import fcntl
import importlib.metadata
import json
import mmap
import multiprocessing
import os
import pickle
import platform
import re
import resource
import signal
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lit_gpt.shards import Manifest, file_checksum, read_header, read_manifest, token_dtype, write_manifest, write_shard
from lit_gpt.text_sources import (
    COMPRESSION_RATIO,
    UNIT,
    Block,
    Fields,
    JsonLines,
    Unit,
    find_files,
    open_source,
    parse_block,
)
from lit_gpt.tokenizer import BatchEncoder, Tokenizer

DELIMITERS = {"bos+eos": (True, True), "eos": (False, True), "bos": (True, False), "none": (False, False)}
"""What is put (before, after) every document"""
CHUNK_SIZE = 2049 * 1024
"""Tokens in a shard, as in TinyLlama"""
CHECK_FIRST = 100_000
"""So many characters of the first documents, of all workers together, are encoded by the reference too; all, if there
are fewer"""
CHECK_EVERY = 1000
"""Afterwards one document in so many is encoded by the reference too"""
SLOT = 2 * UNIT
"""Bytes of memory through which a worker gets its text and gives back its tokens. What does not fit takes a pipe"""
TOTALS = ("documents", "tokens", "text_bytes")
NOT_YET = dict.fromkeys(TOTALS, 0) | {"shards": [], "complete": False}
"""What the manifest says of itself while the journal keeps the accounts"""
ANEW = "--overwrite true begins anew, another --destination_path keeps both"


# --- in a worker: text to tokens -------------------------------------------------------------------------------------


@dataclass
class EncodedUnit:
    """The tokens of one unit of one file, delimiters included, and the accounts of it."""

    tokens: np.ndarray
    lengths: np.ndarray
    """Tokens of each document; they add up to len(tokens)"""
    text_bytes: int
    subsets: dict[str, list[int]]
    """name -> [documents, tokens, UTF-8 bytes of text]"""
    dropped: dict[str, int]
    bad: list[tuple[int | None, str]]
    rows: int
    last: bool
    progress: float
    peak_memory: int
    """Bytes, of the process that did it"""


class UnitEncoder:
    """Reads units and encodes them; lives in each worker."""

    def __init__(self, paths: list[Path], fields: Fields, encoder: BatchEncoder, delimiters: str) -> None:
        self.paths, self.fields, self.encoder = paths, fields, encoder
        self.bos, self.eos = DELIMITERS[delimiters]
        encoder.tokenizer.delimiters(bos=self.bos, eos=self.eos)  # one that does not exist is refused before any work
        self.dtype = token_dtype(encoder.tokenizer.vocab_size)
        self._source_index, self._source = -1, None
        self._until_check = 0
        self._to_check = multiprocessing.get_context("fork").Value("q", CHECK_FIRST)  # of all workers

    def __call__(self, task: list[tuple[int, int]] | Block) -> list[EncodedUnit]:
        """Encode the units [(index of the file, index of the unit in it), ...] as one batch, or a unit that is read."""
        if isinstance(task, Block):
            units = [parse_block(task, self.fields)]
        else:
            units = [self._read(*unit) for unit in task]
        texts = [text for unit in units for text in unit.texts]
        self._check(texts)
        ids, lengths, sizes = self.encoder(texts, bos=self.bos, eos=self.eos)
        tokens = ids.view(self.dtype) if ids.itemsize == self.dtype.itemsize else ids.astype(self.dtype)
        results, text, token = [], 0, 0
        for unit in units:
            texts_end = text + len(unit.texts)
            unit_lengths, unit_sizes = lengths[text:texts_end], sizes[text:texts_end]
            tokens_end = token + int(unit_lengths.sum())
            results.append(
                EncodedUnit(
                    tokens=tokens[token:tokens_end],
                    lengths=unit_lengths,
                    text_bytes=int(unit_sizes.sum()),
                    subsets=_by_subset(unit.subsets, unit_lengths, unit_sizes),
                    dropped=dict(unit.dropped),
                    bad=unit.bad,
                    rows=unit.rows,
                    last=unit.last,
                    progress=unit.progress,
                    peak_memory=_peak_memory(),
                )
            )
            text, token = texts_end, tokens_end
        return results

    def _read(self, source_index: int, unit_index: int) -> Unit:
        if source_index != self._source_index:
            self._source_index, self._source = source_index, open_source(self.paths[source_index])
        return self._source.read(unit_index, self.fields)

    def _check(self, texts: list[str]) -> None:
        """Hold some documents against the reference: the first, of CHECK_FIRST characters, and one in CHECK_EVERY."""
        sample = texts[self._until_check :: CHECK_EVERY]
        self._until_check = (self._until_check - len(texts)) % CHECK_EVERY
        with self._to_check.get_lock():
            for text in texts:
                if self._to_check.value <= 0:
                    break
                self._to_check.value -= len(text)
                sample.append(text)
        if (text := self.encoder.disagreement(sample)) is not None:
            raise ValueError(
                f"gigatoken's ids differ from the reference tokenizer's on the document that begins {text[:60]!r}; "
                "start again with --engine reference --overwrite true, which is slow and right"
            )


def _peak_memory() -> int:
    """Of this process, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _by_subset(subsets: list[str], lengths: np.ndarray, sizes: np.ndarray) -> dict[str, list[int]]:
    if not subsets:
        return {}
    names, which = np.unique(np.array(subsets), return_inverse=True)
    counts = (np.bincount(which, weights, len(names)) for weights in (None, lengths, sizes))
    return {str(name): [int(n) for n in row] for name, *row in zip(names, *counts, strict=True)}


_unit_encoder: UnitEncoder | None = None  # of this worker
_slots: list[mmap.mmap] = []  # shared with the writer


def _start_worker(unit_encoder: UnitEncoder, slots: list[mmap.mmap]) -> None:
    global _unit_encoder, _slots
    _unit_encoder, _slots = unit_encoder, slots
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the writer, which ends its workers

    def die_with_writer() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=die_with_writer, daemon=True).start()


def _encode_in_worker(slot: int, message: tuple) -> tuple:
    task = _get(message, memoryview(_slots[slot]))  # text is parsed where it lies
    return _put(_unit_encoder(task), _slots[slot])


def _put(value: Any, slot: mmap.mmap) -> tuple[bytes, list[int]]:
    """A message from which `_get` makes `value` again in another process; what is large in it goes into the slot."""
    ends = [0]

    def place(buffer: pickle.PickleBuffer) -> bool:
        content = buffer.raw()
        if (end := ends[-1] + content.nbytes) > len(slot):
            return True  # the message takes it along
        slot[ends[-1] : end] = content
        ends.append(end)
        return False

    return pickle.dumps(value, 5, buffer_callback=place), ends


def _get(message: tuple[bytes, list[int]], slot: mmap.mmap | memoryview) -> Any:
    pickled, ends = message
    return pickle.loads(pickled, buffers=[slot[start:end] for start, end in pairwise(ends)])


class Workers:
    """Processes that encode; a single one is the writer itself.

    Each task has a slot of memory that its worker shares with the writer, for its text if the writer has read it, and
    for its tokens: through a pipe they take as long as decompressing does.
    """

    def __init__(self, unit_encoder: UnitEncoder, processes: int) -> None:
        self.unit_encoder, self.processes = unit_encoder, processes
        self.window = 2 * processes if processes > 1 else 1
        """So many tasks may be under way"""

    def __enter__(self) -> "Workers":
        if self.processes > 1:
            self._slots = [mmap.mmap(-1, SLOT) for _ in range(self.window)]
            self._free = list(range(self.window))
            # Forked workers inherit the tokenizer as it lies in memory; loading it takes a second or three. The submit
            # makes them start now, while this process has no thread but this one.
            fork = multiprocessing.get_context("fork")
            initargs = (self.unit_encoder, self._slots)
            self._pool = ProcessPoolExecutor(self.processes, fork, _start_worker, initargs)
            self._pool.submit(os.getpid).result()
        return self

    def __exit__(self, *_exception) -> None:
        if self.processes > 1:
            self._pool.shutdown(cancel_futures=True)

    def submit(self, task: list[tuple[int, int]] | Block) -> Callable[[], list[EncodedUnit]]:
        """Begin with a task. Returns: a function that waits for its result, to be called once."""
        if self.processes == 1:
            return partial(self.unit_encoder, task)
        if isinstance(task, Block):
            task = replace(task, parts=[pickle.PickleBuffer(part) for part in task.parts])  # as arrays are to pickle
        number = self._free.pop()
        slot = self._slots[number]
        future = self._pool.submit(_encode_in_worker, number, _put(task, slot))

        def result() -> list[EncodedUnit]:
            units = _get(future.result(), slot)
            self._free.append(number)
            return units

        return result


def _encode_in_order(
    workers: Workers, paths: list[Path], start: tuple[int, int]
) -> Iterator[tuple[int, int, EncodedUnit]]:
    """(file index, unit index, result) of every unit from `start` on, in order, with `window` tasks under way."""
    tasks = _plan(paths, *start, workers.processes)
    under_way: deque[tuple[list, bool, Callable]] = deque()
    finished = start[0] - 1  # the last file that has been read to its end
    while True:
        while len(under_way) < workers.window and (planned := next(tasks, None)):
            units, block, to_end = planned
            under_way.append((units, to_end, workers.submit(block or units)))
        if not under_way:
            return
        units, to_end, result = under_way.popleft()
        for (source, index), encoded in zip(units, result(), strict=True):
            if source <= finished:
                continue  # the file ended before this unit
            yield source, index, encoded
            while to_end and not encoded.last:  # the file goes on beyond what was planned
                index += 1
                (encoded,) = workers.submit([(source, index)])()
                yield source, index, encoded
            if encoded.last:
                finished = source


def _plan(
    paths: list[Path], first: int, first_unit: int, processes: int
) -> Iterator[tuple[list[tuple[int, int]], Block | None, bool]]:
    """Tasks of about UNIT bytes of text from a unit of a file on: one unit of a large file, or several small files.

    Yields: (file index, unit index) of each unit in the task; its text, if it is not for the worker to read;
    whether they end their files, as far as one can tell.
    """
    small_files, size = [], 0
    for source in range(first, len(paths)):
        begin = first_unit if source == first else 0
        file = open_source(paths[source])
        units = max(file.units(), begin + 1)
        file_size = paths[source].stat().st_size * COMPRESSION_RATIO
        if small_files and (units > 1 or size + file_size > UNIT):
            yield small_files, None, True
            small_files, size = [], 0
        if units == 1:
            small_files.append((source, 0))
            size += file_size
        elif units >= processes and isinstance(file, JsonLines) and file.compressed:
            # Each worker would decompress all that comes before its share.
            index, last = begin, False
            while not last:
                block = file.block(index)
                yield [(source, index)], block, False
                index, last = index + 1, block.last
        else:
            for index in range(begin, units):
                yield [(source, index)], None, index + 1 == units
    if small_files:
        yield small_files, None, True


# --- in the writer: tokens to shards ---------------------------------------------------------------------------------


@dataclass
class PrepareArgs:
    """What all prepare scripts ask for; each adds its own."""

    source_path: Path
    """Folder of the raw text."""
    tokenizer_path: Path
    """Folder or file of the tokenizer: tokenizer.model or tokenizer.json."""
    destination_path: Path
    """Folder for the shards."""
    percentage: float = 1.0
    """Fraction of the files to take, from the first on."""
    filenames_subset: list[str] | str | None = None
    """Take only files with this, or one of [these, in, brackets], in their path."""
    chunk_size: int = CHUNK_SIZE
    """Tokens in a shard; the last shard has as many as are left."""
    delimiters: Literal["bos+eos", "eos", "bos", "none"] = "bos+eos"
    """What surrounds each document. TinyLlama was trained with eos alone."""
    processes: int | None = None
    """Worker processes, by default one for each core. The shards do not depend on it."""
    shard_index: int = 0
    """Which part of the files this run takes, from 0: for SLURM arrays and several machines."""
    shard_count: int = 1
    """Number of such parts, of about equal bytes; each makes shards of its own."""
    on_error: Literal["stop", "skip"] = "stop"
    """At a line or file that cannot be read: stop, or leave it out and list it in the manifest."""
    overwrite: bool = False
    """Remove what an earlier run made of the same prefix, and begin anew."""
    dry_run: bool = False
    """Write nothing; say how many files and bytes there are, and about how many tokens, how much time and disk."""
    engine: Literal["auto", "gigatoken", "reference"] = "auto"
    """auto is gigatoken where it agrees with the reference tokenizer, which is ten times slower."""

    def __post_init__(self) -> None:
        """Raises: ValueError naming every flag that is wrong."""
        self.source_path, self.destination_path = Path(self.source_path), Path(self.destination_path)
        if isinstance(self.filenames_subset, str):
            self.filenames_subset = [self.filenames_subset]
        if self.processes is None:  # macOS has no sched_getaffinity
            self.processes = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        rules = [
            (0 < self.percentage <= 1, f"--percentage {self.percentage} is not above 0 and at most 1"),
            (0 < self.chunk_size <= 1 << 30, f"--chunk_size {self.chunk_size} is not between 1 and 2^30"),
            (self.delimiters in DELIMITERS, f"--delimiters {self.delimiters} is not {' or '.join(DELIMITERS)}"),
            (self.processes > 0, f"--processes {self.processes} is not at least 1"),
            (self.shard_count > 0, f"--shard_count {self.shard_count} is not at least 1"),
            (0 <= self.shard_index < self.shard_count, f"--shard_index {self.shard_index} is not below --shard_count"),
            (self.on_error in ("stop", "skip"), f"--on_error {self.on_error} is not stop or skip"),
        ]
        if wrong := [message for holds, message in rules if not holds]:
            raise ValueError("; ".join(wrong))


def select_files(args: PrepareArgs, patterns: list[str]) -> list[Path]:
    """The files below `args.source_path` that this run takes, sorted.

    Raises: FileNotFoundError or ValueError when that is none.
    """
    paths = find_files(args.source_path, patterns)
    if args.filenames_subset:
        paths = [path for path in paths if any(part in str(path) for part in args.filenames_subset)]
        if not paths:
            raise ValueError(f"--filenames_subset {args.filenames_subset}: no file has one of these in its path")
    taken = paths[: int(len(paths) * args.percentage)]
    if not taken:
        raise ValueError(f"--percentage {args.percentage} of {len(paths)} files is none")
    for path in taken:
        open_source(path)  # an unknown kind is refused before any work
    # Part k of n takes the files whose middle byte is in the k-th n-th of all bytes: in order, about equally many.
    ends = list(accumulate(path.stat().st_size for path in taken))
    middles = [end - path.stat().st_size / 2 for end, path in zip(ends, taken, strict=True)]
    share = max(ends[-1], 1) / args.shard_count
    part = [path for path, middle in zip(taken, middles, strict=True) if int(middle / share) == args.shard_index]
    if not part:
        raise ValueError(f"--shard_count {args.shard_count}: part {args.shard_index} of {len(taken)} files has none")
    return part


def prepare(args: PrepareArgs, prefix: str, patterns: list[str], fields: Fields) -> Manifest | None:
    """Make shards `{prefix}_{n:010d}.bin` and `{prefix}.manifest.json` of the files that match `patterns`.

    Goes on where an earlier run with the same arguments ended. Returns the manifest; None after a dry run.
    Raises: FileNotFoundError for missing files; ValueError for input that cannot be read, or a tokenizer, delimiters
    or sources that are not those of the earlier run; ChildProcessError when a worker dies.
    """
    if not prefix or "/" in prefix:
        raise ValueError(f"--prefix {prefix!r}: files in --destination_path begin with it; give it letters, and no /")
    paths = select_files(args, patterns)
    if args.shard_count > 1:
        prefix = f"{prefix}_{args.shard_index:05d}"
    encoder = BatchEncoder(Tokenizer(args.tokenizer_path), args.engine)
    if encoder.why_slow:
        print(f"slow: {encoder.why_slow}; encoding with the reference tokenizer instead")
    unit_encoder = UnitEncoder(paths, fields, encoder, args.delimiters)
    if args.dry_run:
        return estimate(unit_encoder, args.processes)
    manifest = Manifest(
        prefix=prefix,
        tokenizer=encoder.tokenizer.describe(),
        delimiters=args.delimiters,
        dtype=unit_encoder.dtype.name,
        chunk_size=args.chunk_size,
        sources=_identities(paths, args.source_path),
        versions=_versions(encoder.engine),
        extra={"text_key": fields.text, "filters": [str(condition) for condition in fields.filters]},
    )
    with Output(args.destination_path, manifest) as output:
        if args.overwrite:
            output.remove()
        if output.resume():
            print(f"{args.destination_path}: {prefix} is already complete, {output.manifest.tokens:,} tokens")
            return output.manifest
        # Until so large an array has been freed, glibc gives memory back to the system after every batch, and pays for
        # each page that it fetches again: 4 to 12% of the time with Llama 2's tokenizer. Workers inherit the lesson.
        np.empty(31 << 20, np.uint8)
        started = time.perf_counter()
        try:
            with Workers(unit_encoder, args.processes) as workers:
                units = _encode_in_order(workers, paths, output.next[:2])
                peak_memory = _write(units, paths, output, args)
        except BrokenProcessPool as error:
            raise ChildProcessError(
                "a worker process died (killed, or out of memory: then take fewer --processes); "
                "the shards that exist are whole, and the same command goes on after them"
            ) from error
        output.finish()
    _print_summary(output, time.perf_counter() - started, peak_memory, args)
    return output.manifest


def _write(
    units: Iterator[tuple[int, int, EncodedUnit]], paths: list[Path], output: "Output", args: PrepareArgs
) -> int:
    """Hand all units to the output, with a progress bar. Returns the bytes of memory that the largest worker took."""
    from tqdm import tqdm

    sizes = [source["bytes"] for source in output.manifest.sources]
    before = [0, *accumulate(sizes)]
    started, peak_memory, text_bytes, tokens = time.perf_counter(), 0, 0, 0
    with tqdm(total=before[-1], unit="B", unit_scale=True, desc=output.manifest.prefix, smoothing=0.1) as bar:
        for source, index, unit in units:
            if unit.bad and args.on_error == "stop":
                output.stop_at(paths[source], source, unit)
            output.add(source, index, unit)
            bar.update(int(before[source] + unit.progress * sizes[source]) - bar.n)
            peak_memory = max(peak_memory, unit.peak_memory)
            text_bytes, tokens = text_bytes + unit.text_bytes, tokens + len(unit.tokens)
            elapsed = time.perf_counter() - started
            per_core = text_bytes / 1e6 / elapsed / args.processes
            bar.set_postfix_str(
                f"{tokens / elapsed / 1e6:.2f}M tokens/s, {per_core:.1f} MB/s of text a core", refresh=False
            )
    return peak_memory


def _identities(paths: list[Path], source_path: Path) -> list[dict]:
    """What tells a source from another, or from what it was."""
    root = source_path if source_path.is_dir() else source_path.parent
    stats = ((path, path.stat()) for path in paths)
    return [
        {"path": path.relative_to(root).as_posix(), "bytes": s.st_size, "mtime_ns": s.st_mtime_ns} for path, s in stats
    ]


def _versions(engine: str) -> dict[str, str]:
    versions = {"python": platform.python_version(), "engine": engine}
    for package in ("sentencepiece", "tokenizers", "tiktoken", "gigatoken", "zstandard", "msgspec", "pyarrow", "numpy"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


class Output:
    """The shards, the manifest and the journal of one prefix in one folder.

    The journal has a line for each unit whose tokens have all been taken, and one for each shard on the disk, with
    where the next shard begins: (file, unit, tokens of this unit that earlier shards hold). Lines after the last shard
    are about tokens that a kill has lost; `resume` forgets them.
    """

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self.directory, self.manifest = directory, manifest
        self.next: tuple[int, int, int] = (0, 0, 0)
        self.subsets: dict[str, list[int]] = {}
        """name -> [documents, tokens, UTF-8 bytes]"""
        self._rows = [0] * len(manifest.sources)
        self._shard = np.empty(manifest.chunk_size, token_dtype(manifest.tokenizer["vocab_size"]))
        self._filled = 0
        self._documents = 0

    def __enter__(self) -> "Output":
        self.directory.mkdir(parents=True, exist_ok=True)
        self._journal = open(self.directory / f"{self.manifest.prefix}.journal.jsonl", "a+b")
        try:
            fcntl.lockf(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)  # workers do not inherit it
        except OSError:
            raise ValueError(f"{self._journal.name}: another process is preparing this prefix in this folder") from None
        return self

    def __exit__(self, *_exception) -> None:
        if self._journal.seek(0, os.SEEK_END) == 0:
            os.unlink(self._journal.name)
        self._journal.close()

    def remove(self) -> None:
        """Delete what there is of this prefix."""
        self._manifest_path.unlink(missing_ok=True)  # first, since shards without a manifest are refused
        for path in self._shard_files():
            path.unlink()
        self._journal.truncate(0)

    def resume(self) -> bool:
        """Take up what an earlier run left. Returns: whether it was complete.

        Raises: ValueError if the earlier run made shards of other input, or if its shards are gone or changed.
        """
        earlier = read_manifest(self.directory, self.manifest.prefix)
        if earlier is None:
            if files := self._shard_files():
                raise ValueError(f"{files[0]}: there are shards of this prefix without a manifest; {ANEW}")
            self._journal.truncate(0)
        else:
            entries = self._read_journal()
            if earlier.complete or entries or self._shard_files():  # else nothing is there that could differ
                self._compare(earlier)
            for entry in entries:
                self._account(entry)
            for shard in (earlier if earlier.complete else self.manifest).shards:
                path = self.directory / shard["file"]
                if not path.exists() or read_header(path).tokens != shard["tokens"]:
                    raise ValueError(f"{path}: this shard of the earlier run is missing or changed; {ANEW}")
            if earlier.complete:
                self.manifest = earlier
                self._journal.truncate(0)
                return True
        write_manifest(self.directory, replace(self.manifest, **NOT_YET))
        return False

    def _read_journal(self) -> list[dict]:
        """All entries up to the last shard that is on the disk; what comes after is cut off."""
        self._journal.seek(0)
        entries, durable, size, durable_size = [], 0, 0, 0
        for line in self._journal:
            try:
                entries.append(json.loads(line))
            except ValueError:  # torn by a kill
                break
            size += len(line)
            if "shard" in entries[-1]:
                durable, durable_size = len(entries), size
                self.next = tuple(entries[-1]["next"])
        self._journal.truncate(durable_size)
        return entries[:durable]

    def _compare(self, earlier: Manifest) -> None:
        """Raise ValueError naming what differs from the earlier run, if anything does."""
        was, now = earlier, self.manifest
        for name, a, b in (
            ("tokenizer sha256", was.tokenizer["sha256"], now.tokenizer["sha256"]),
            ("delimiters", was.delimiters, now.delimiters),
            ("chunk_size", was.chunk_size, now.chunk_size),
            ("text key", was.extra.get("text_key"), now.extra["text_key"]),
            ("filters", was.extra.get("filters"), now.extra["filters"]),
        ):
            if a != b:
                raise ValueError(f"{self._manifest_path}: begun with {name} {a}, now it is {b}; {ANEW}")
        a_paths, b_paths = ([source["path"] for source in m.sources] for m in (was, now))
        if changed := sorted(set(a_paths) ^ set(b_paths)):
            what = "is gone" if changed[0] in a_paths else "is new"
            raise ValueError(f"{self._manifest_path}: the source {changed[0]} {what} since it was begun; {ANEW}")
        for number, (a, b) in enumerate(zip(was.sources, now.sources, strict=True)):
            mended = a["path"] == was.extra.get("stopped_at") and self.next <= (number, 0, 0)
            if not mended and any(a.get(key) != b[key] for key in ("path", "bytes", "mtime_ns")):
                raise ValueError(
                    f"{self._manifest_path}: the source {a['path']} has changed since it was begun; {ANEW}"
                )

    def stop_at(self, path: Path, source: int, unit: EncodedUnit) -> None:
        """Raise ValueError for the bad input in a unit; its file may be mended without beginning anew."""
        self.manifest.extra["stopped_at"] = self.manifest.sources[source]["path"]
        write_manifest(self.directory, replace(self.manifest, **NOT_YET))
        line, why = unit.bad[0]
        where = "" if line is None else f", line {self._rows[source] + line + 1}"
        more = f" (and {len(unit.bad) - 1} more near it)" if len(unit.bad) > 1 else ""
        raise ValueError(f"{path}{where}: {why}{more}; mend it, or leave out what is unreadable with --on_error skip")

    def add(self, source: int, index: int, unit: EncodedUnit) -> None:
        """Take the next unit of the stream: fill shards with its tokens, and account for it."""
        used = self.next[2] if self.next[:2] == (source, index) else 0
        starts = np.cumsum(unit.lengths) - unit.lengths
        while used < len(unit.tokens):
            taken = unit.tokens[used : used + len(self._shard) - self._filled]
            self._shard[self._filled : self._filled + len(taken)] = taken
            self._documents += int(np.subtract(*np.searchsorted(starts, (used + len(taken), used))))
            self._filled += len(taken)
            used += len(taken)
            if self._filled == len(self._shard):
                self._write_shard((source, index, used))
        path = self.manifest.sources[source]["path"]
        first_row = self._rows[source] + 1
        totals = [len(unit.lengths), len(unit.tokens), unit.text_bytes]
        self._record(
            {
                "unit": [source, index],
                "rows": unit.rows,
                "totals": totals,
                "subsets": unit.subsets or {path.partition("/")[0] if "/" in path else self.manifest.prefix: totals},
                "dropped": unit.dropped,
                "skipped": [
                    {"path": path, "line": first_row + row if row is not None else None, "why": why}
                    for row, why in unit.bad
                ],
            }
        )

    def _write_shard(self, following: tuple[int, int, int]) -> None:
        path = self.directory / f"{self.manifest.prefix}_{len(self.manifest.shards):010d}.bin"
        write_shard(path, self._shard[: self._filled])
        shard = {
            "file": path.name,
            "tokens": self._filled,
            "documents": self._documents,
            "xxh3_64": file_checksum(path),
        }
        self._filled = self._documents = 0
        self._record({"shard": shard, "next": following})
        os.fsync(self._journal.fileno())

    def _record(self, entry: dict) -> None:
        self._account(entry)
        self._journal.write(json.dumps(entry).encode() + b"\n")
        self._journal.flush()

    def _account(self, entry: dict) -> None:
        manifest = self.manifest
        if "shard" in entry:
            manifest.shards.append(entry["shard"])
            return
        source = entry["unit"][0]
        self._rows[source] += entry["rows"]
        for counts in (manifest.__dict__, manifest.sources[source]):
            for key, count in zip(TOTALS, entry["totals"], strict=True):
                counts[key] = counts.get(key, 0) + count
        for name, totals in entry["subsets"].items():
            self.subsets[name] = [a + b for a, b in zip(self.subsets.get(name, (0, 0, 0)), totals, strict=True)]
        manifest.dropped = dict(Counter(manifest.dropped) + Counter(entry["dropped"]))
        manifest.skipped += entry["skipped"]

    def finish(self) -> None:
        """Write the last shard and the manifest that says that all is there.

        Raises: ValueError when there is not a single token; then nothing stays behind.
        """
        if self._filled:
            self._write_shard((len(self._rows), 0, 0))
        if not self.manifest.shards:
            self.remove()
            dropped, skipped = sum(self.manifest.dropped.values()), len(self.manifest.skipped)
            raise ValueError(
                f"{self.manifest.prefix}: the sources hold no document ({dropped:,} left out, {skipped:,} unreadable)"
            )
        self.manifest.extra.pop("stopped_at", None)
        self.manifest.extra["subsets"] = {
            name: dict(zip(TOTALS, t, strict=True)) for name, t in sorted(self.subsets.items())
        }
        self.manifest.complete = True
        write_manifest(self.directory, self.manifest)
        self._journal.truncate(0)

    @property
    def _manifest_path(self) -> Path:
        return self.directory / f"{self.manifest.prefix}.manifest.json"

    def _shard_files(self) -> list[Path]:
        name = re.compile(re.escape(self.manifest.prefix) + r"_\d{10}\.bin(\.tmp)?")
        return sorted(path for path in self.directory.iterdir() if name.fullmatch(path.name))


def _print_summary(output: Output, elapsed: float, peak_memory: int, args: PrepareArgs) -> None:
    manifest = output.manifest
    print(f"{'subset':<32}{'documents':>14}{'tokens':>18}{'bytes a token':>15}")
    for name, (documents, tokens, text_bytes) in [
        *sorted(output.subsets.items()),
        ("total", (manifest.documents, manifest.tokens, manifest.text_bytes)),
    ]:
        print(f"{name:<32}{documents:>14,}{tokens:>18,}{text_bytes / max(tokens, 1):>15.2f}")
    for reason, count in manifest.dropped.items():
        print(f"left out: {count:,} documents with {reason}")
    if manifest.skipped:
        print(f"SKIPPED: {len(manifest.skipped):,} unreadable lines or files, listed in {output._manifest_path}")
    own = _peak_memory()
    print(
        f"{len(manifest.shards)} shards in {elapsed:.1f} s; peak memory {own / 1e6:.0f} MB"
        + (f", each of {args.processes} workers at most {peak_memory / 1e6:.0f} MB" if args.processes > 1 else "")
    )


def estimate(unit_encoder: UnitEncoder, processes: int) -> None:
    """Print what preparing would give and take, judged by the first unit of a few files spread over all."""
    from tqdm import tqdm

    format_sizeof, format_interval = tqdm.format_sizeof, tqdm.format_interval
    sizes = [path.stat().st_size for path in unit_encoder.paths]
    sample = sorted({round(i * (len(sizes) - 1) / 3) for i in range(4)})
    started = time.process_time()
    units = [unit_encoder([(source, 0)])[0] for source in sample]
    elapsed = time.process_time() - started
    read = sum(unit.progress * sizes[source] for source, unit in zip(sample, units, strict=True))
    scale = sum(sizes) / max(read, 1)
    tokens = scale * sum(len(unit.tokens) for unit in units)
    text_bytes = scale * sum(unit.text_bytes for unit in units)
    size, shards = sum(sizes), tokens * unit_encoder.dtype.itemsize
    print(f"{len(sizes):,} files, {format_sizeof(size)}B; judged by {format_sizeof(read)}B of them:")
    print(f"about {format_sizeof(text_bytes)}B of text, {format_sizeof(tokens)} tokens")
    print(f"about {format_sizeof(shards)}B of shards")
    print(f"about {format_interval(scale * elapsed / processes)} (minutes:seconds) with {processes} processes")
    for source, unit in zip(sample, units, strict=True):
        for row, why in unit.bad[:1]:
            print(f"{unit_encoder.paths[source]}{f', line {row + 1}' if row is not None else ''}: {why}")
