"""Packed shards: the on-disk format of token data, its manifest, and a token stream read from them.

A shard `{prefix}_{n:010d}.bin` is a 24-byte header and then the tokens, little-endian:

    offset  0   7 bytes   magic "LITPKDS"
    offset  7   uint64    format version, 1
    offset 15   uint8     dtype code, see DTYPE_CODES (uint16 below 65,500 ids, else int32)
    offset 16   uint64    number of tokens in this file

This is the format of lit-gpt and TinyLlama, so shards made with those load as they are. The one difference is in what
is promised: here the last shard of a stream states its true token count and nothing is padded.

All shards of one prefix in one folder, in the order of their sorted file names, are ONE stream of tokens. Beside them
lies `{prefix}.manifest.json` (`Manifest`): which tokenizer and delimiters made the tokens, how many there are, and a
checksum for every file.
"""

import hashlib
import json
import os
import re
import struct
import warnings
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np

HEADER_SIZE = 24
HEADER = struct.Struct("<7sQBQ")
MAGIC = b"LITPKDS"
VERSION = 1
DTYPE_CODES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f4", 7: "<f8", 8: "<u2"}


def token_dtype(vocab_size: int) -> np.dtype:
    """The dtype that shards of a vocabulary of this size are written with (the original's rule)."""
    return np.dtype("<u2") if vocab_size < 65_500 else np.dtype("<i4")


# --- one shard -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ShardHeader:
    dtype: np.dtype
    tokens: int
    """Number of tokens in the file (the original's `chunk_size`)."""


def write_shard(path: str | Path, tokens: np.ndarray) -> None:
    """Write `tokens` (1-d, dtype one of DTYPE_CODES) as one shard that either exists whole or not at all."""
    codes = {np.dtype(dtype): code for code, dtype in DTYPE_CODES.items()}
    if tokens.ndim != 1 or tokens.dtype not in codes:
        raise ValueError(f"{path}: a shard holds a 1-d array of one of {sorted(map(str, codes))}, not {tokens.dtype}")
    header = HEADER.pack(MAGIC, VERSION, codes[tokens.dtype], len(tokens))
    _write_atomically(Path(path), header, np.ascontiguousarray(tokens))


def read_header(path: str | Path) -> ShardHeader:
    """Read and check the header of a local shard against the file's length.

    Raises: ValueError naming the file: too short, other magic, version or dtype, or a length that the header belies.
    """
    with open(path, "rb", buffering=0) as file:
        return parse_header(file.read(HEADER_SIZE), os.fstat(file.fileno()).st_size, path)


def parse_header(header: bytes, file_size: int, path: str | Path) -> ShardHeader:
    """Check the first 24 bytes of a shard of `file_size` bytes; `path` is for the error message."""
    if len(header) < HEADER_SIZE:
        raise ValueError(f"{path}: broken shard: {file_size} bytes, shorter than the {HEADER_SIZE}-byte header")
    magic, version, code, tokens = HEADER.unpack(header)
    if magic != MAGIC:
        raise ValueError(f"{path}: not a packed shard: it begins with {magic!r}, not {MAGIC!r}")
    if version != VERSION:
        raise ValueError(f"{path}: shard format version {version}; this reader knows version {VERSION}")
    if code not in DTYPE_CODES or np.dtype(DTYPE_CODES[code]).kind == "f":
        raise ValueError(f"{path}: broken shard header: dtype code {code} is no integer type (uint16 is 8, int32 is 4)")
    dtype = np.dtype(DTYPE_CODES[code])
    if (expected := HEADER_SIZE + tokens * dtype.itemsize) != file_size:
        raise ValueError(
            f"{path}: broken shard: the header promises {tokens:,} tokens of {dtype.name} = {expected:,} bytes, "
            f"the file has {file_size:,} (cut short, or written over?)"
        )
    return ShardHeader(dtype, tokens)


def file_checksum(path: str | Path) -> str:
    """xxh3_64 of a whole file, as hex: what the manifest records for each shard."""
    import xxhash

    digest = xxhash.xxh3_64()
    with open(path, "rb", buffering=0) as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


def _write_atomically(path: Path, *parts: bytes | np.ndarray) -> None:
    """Write under a temporary name, flush to the disk, rename: a reader (or a power cut) never meets half a file."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        for part in parts:
            file.write(part)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


# --- the manifest ----------------------------------------------------------------------------------------------------


@dataclass
class Manifest:
    """What the shards of one prefix are: `{prefix}.manifest.json`. Keys not known here are kept in `extra`."""

    prefix: str
    tokenizer: dict
    """name, sha256, vocab_size, bos_id, eos_id"""
    delimiters: str
    """What surrounds each document: bos+eos | eos | bos | none"""
    dtype: str
    """uint16 or int32"""
    chunk_size: int
    """Tokens in each shard but the last"""
    complete: bool = False
    """False while the data are being prepared"""
    tokens: int = 0
    documents: int = 0
    text_bytes: int = 0
    """UTF-8 bytes of the documents' text, for bits per byte"""
    shards: list[dict] = field(default_factory=list)
    """file, tokens, documents (those that start in it), xxh3_64 of the file"""
    sources: list[dict] = field(default_factory=list)
    """path, bytes, documents, tokens of each input file"""
    dropped: dict = field(default_factory=dict)
    """Documents left out on purpose, by reason"""
    skipped: list[dict] = field(default_factory=list)
    """path, line, why of each input that could not be read"""
    versions: dict = field(default_factory=dict)
    extra: dict = field(default_factory=dict)


def write_manifest(directory: str | Path, manifest: Manifest) -> None:
    """Write `{directory}/{manifest.prefix}.manifest.json`, atomically."""
    content = asdict(manifest)
    content = {"format": "lit-packed", "version": VERSION} | content.pop("extra") | content
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    _write_atomically(Path(directory) / f"{manifest.prefix}.manifest.json", text.encode())


def read_manifest(directory: str | Path, prefix: str) -> Manifest | None:
    """The manifest of exactly this prefix in a local folder; None when there is none.

    Raises: ValueError naming the file if it is not a manifest.
    """
    path = Path(directory) / f"{prefix}.manifest.json"
    return parse_manifest(path.read_bytes(), path) if path.exists() else None


def parse_manifest(content: bytes, path: str | Path) -> Manifest:
    """A manifest from its JSON text; `path` is for the error message."""
    try:
        values = json.loads(content)
        if (kind := values.pop("format", None)) != "lit-packed" or values.pop("version", None) != VERSION:
            raise ValueError(f"format {kind!r} is not 'lit-packed' version {VERSION}")
        known = {f.name for f in fields(Manifest)} - {"extra"}
        extra = {key: values.pop(key) for key in values.keys() - known}
        if not all({"file", "tokens"} <= shard.keys() for shard in values.get("shards", [])):
            raise ValueError("each of its shards needs a file and its tokens")
        return Manifest(**values, extra=extra)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a manifest of packed data: {error}") from error


# --- a folder of shards, on a local disk (or NFS) or behind a URL ---------------------------------------------------


class LocalFolder:
    """Files of one folder, read with pread through a bounded number of open files.

    pread and not a memory map: mapped pages count as the process's own memory, which would grow with the data.
    """

    MAX_OPEN = 64

    def __init__(self, path: str | Path):
        self.path = str(path)
        self._open: dict[str, int] = {}  # name -> file descriptor, least recently used first

    def names(self) -> list[str]:
        if not os.path.isdir(self.path):
            raise FileNotFoundError(f"{self.path}: no such folder of packed data")
        return sorted(os.listdir(self.path))

    def headers(self, names: list[str]) -> list[ShardHeader]:
        return [read_header(f"{self.path}/{name}") for name in names]

    def read_file(self, name: str) -> bytes:
        return Path(self.path, name).read_bytes()

    def read_ranges(self, ranges: list[tuple[str, int, int]]) -> list[bytes]:
        """The bytes [start, stop) of each (name, start, stop); fewer where the file ends before `stop`."""
        return [os.pread(self._descriptor(name), stop - start, start) for name, start, stop in ranges]

    def _descriptor(self, name: str) -> int:
        descriptor = self._open.pop(name, None)
        if descriptor is None:
            descriptor = os.open(f"{self.path}/{name}", os.O_RDONLY)
            if len(self._open) >= self.MAX_OPEN:
                os.close(self._open.pop(next(iter(self._open))))
        self._open[name] = descriptor  # now the most recently used
        return descriptor

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_open": {}}  # descriptors mean nothing in another process

    def __del__(self):
        for descriptor in self._open.values():
            os.close(descriptor)


class RemoteFolder:
    """Files below an fsspec URL (s3://, gs://, ...), read by ranges, many at once.

    A shuffled order reads a few KiB here and there, so whichever files were cached last would never be the ones needed
    next. So no eviction: the first shards, in order, that fit into `cache_bytes` are kept on the local disk when they
    are first touched, and all others are read by ranges. Which ones these are needs no word between processes.
    """

    def __init__(self, url: str, cache_dir: str | Path | None = None, cache_bytes: int = 0):
        self.path = url.rstrip("/")
        self._cache_dir = cache_dir
        self._cache_left = cache_bytes if cache_dir else 0
        self._cached: dict[str, str] = {}  # name -> file name in the cache
        self._cache = LocalFolder(cache_dir or "")

    @property
    def _fs(self):
        # Asked for anew each time: fsspec keeps one per process and thread, and none may cross a fork.
        try:
            import fsspec

            return fsspec.url_to_fs(self.path)[0]
        except ImportError as error:
            raise ValueError(f"{self.path}: {error} (object stores need `pip install fsspec s3fs`, or gcsfs)") from None

    def _listing(self) -> dict[str, dict]:
        try:
            return {info["name"].rsplit("/", 1)[-1]: info for info in self._fs.ls(self.path, detail=True)}
        except FileNotFoundError:
            raise FileNotFoundError(f"{self.path}: no such folder of packed data") from None

    def names(self) -> list[str]:
        return sorted(self._listing())

    def headers(self, names: list[str]) -> list[ShardHeader]:
        """Also settles which of these shards are to be cached."""
        listing = self._listing()
        for name in names:
            if (size := listing[name]["size"]) > self._cache_left:
                break
            self._cache_left -= size
            # The listing's details (size, ETag, time) are in the name, so that a changed file is fetched again.
            state = hashlib.sha256(repr(sorted(listing[name].items(), key=str)).encode()).hexdigest()[:16]
            self._cached[name] = f"{state}-{name}"
        raw = self._cat([(name, 0, min(HEADER_SIZE, listing[name]["size"])) for name in names])
        return [parse_header(r, listing[n]["size"], f"{self.path}/{n}") for n, r in zip(names, raw, strict=True)]

    def read_file(self, name: str) -> bytes:
        return self._fs.cat_file(f"{self.path}/{name}")

    def read_ranges(self, ranges: list[tuple[str, int, int]]) -> list[bytes]:
        """As LocalFolder.read_ranges."""
        self._fill_cache({name for name, _, _ in ranges if name in self._cached})
        remote = iter(self._cat([r for r in ranges if r[0] not in self._cached]))
        return [
            self._cache.read_ranges([(self._cached[name], start, stop)])[0] if name in self._cached else next(remote)
            for name, start, stop in ranges
        ]

    def _cat(self, ranges: list[tuple[str, int, int]]) -> list[bytes]:
        if not ranges:
            return []
        names, starts, stops = zip(*ranges, strict=True)
        paths = [f"{self.path}/{name}" for name in names]
        return self._fs.cat_ranges(paths, list(starts), list(stops), on_error="raise")

    def _fill_cache(self, names: set[str]) -> None:
        targets = {name: os.path.join(self._cache.path, self._cached[name]) for name in names}
        missing = {name: target for name, target in targets.items() if not os.path.exists(target)}
        if missing:
            os.makedirs(self._cache.path, exist_ok=True)
            temporary = [f"{target}.{os.getpid()}.tmp" for target in missing.values()]
            self._fs.get([f"{self.path}/{name}" for name in missing], temporary)
            for source, target in zip(temporary, missing.values(), strict=True):
                os.replace(source, target)


# --- a stream of tokens ----------------------------------------------------------------------------------------------


class TokenStream:
    """All shards of one prefix in one folder as one array of tokens, read at any place in constant memory.

    Opening it validates every shard's header, and the files against the manifests. The shards of `prefix` are the
    files `{prefix}*.bin`, so that "train_slim" finds `train_slimpajama_*`. Reading refuses ids outside [0, vocab_size).

    Raises: FileNotFoundError when the folder or the prefix's shards do not exist; ValueError for shards or manifests
    that are broken, unfinished, made for a larger vocabulary, or in disagreement. A prefix without a manifest is
    accepted with a warning.
    """

    def __init__(
        self,
        directory: str | Path,
        prefix: str,
        *,
        vocab_size: int,
        cache_dir: str | Path | None = None,
        cache_bytes: int = 0,
    ):
        remote = "://" in str(directory)
        self.folder = RemoteFolder(str(directory), cache_dir, cache_bytes) if remote else LocalFolder(directory)
        self.prefix = prefix
        self.vocab_size = vocab_size
        present = self.folder.names()
        names = [name for name in present if name.startswith(prefix) and name.endswith(".bin")]
        if not names:
            known = sorted({re.sub(r"_\d+\.bin$", "", name) for name in present if name.endswith(".bin")})
            raise FileNotFoundError(
                f"{self.folder.path}: no shards {prefix}*.bin; "
                + (f"the prefixes here are {', '.join(known)}" if known else "there are no .bin files in this folder")
            )
        headers = self.folder.headers(names)
        self.manifests = [
            self._manifest(name) for name in present if name.startswith(prefix) and name.endswith(".manifest.json")
        ]
        self._check_manifests(dict(zip(names, headers, strict=True)))
        # Plain arrays: an index of 500,000 shards (1T tokens) is 30 MB, and a forked worker shares it untouched.
        self.names = np.array([name.encode() for name in names])
        self.dtypes = np.array([header.dtype.str.encode() for header in headers])
        self.starts = np.concatenate([[0], np.cumsum([header.tokens for header in headers], dtype=np.int64)])
        # What the manifests say of single files was needed for the checks alone; verify() reads it again.
        self.manifests = [replace(manifest, shards=[], sources=[], skipped=[]) for manifest in self.manifests]

    @property
    def tokens(self) -> int:
        return int(self.starts[-1])

    def locate(self, token: int) -> tuple[str, int]:
        """(path of the shard, index in it) of one token of the stream."""
        shard = int(np.searchsorted(self.starts, token, side="right")) - 1
        return f"{self.folder.path}/{self.names[shard].decode()}", token - int(self.starts[shard])

    def read(self, starts: np.ndarray, length: int, fill: int) -> np.ndarray:
        """The tokens [start, start + length) for each start: int64 (len(starts), length), `fill` past the end."""
        rows = np.full((len(starts), length), fill, dtype=np.int64)
        pieces, ranges = [], []  # one for each shard that a row touches
        first_shards = np.searchsorted(self.starts, starts, side="right") - 1
        for row, (start, shard) in enumerate(zip(starts.tolist(), first_shards.tolist(), strict=True)):
            stop = min(start + length, self.tokens)
            position = start
            while position < stop:
                shard_start, shard_stop = self.starts[shard : shard + 2].tolist()
                end = min(stop, shard_stop)
                if end > position:  # not an empty shard
                    dtype = np.dtype(self.dtypes[shard].decode())
                    begin = HEADER_SIZE + (position - shard_start) * dtype.itemsize
                    ranges.append((self.names[shard].decode(), begin, begin + (end - position) * dtype.itemsize))
                    pieces.append((row, position - start, end - position, dtype))
                position, shard = end, shard + 1
        for (row, column, count, dtype), span, raw in zip(pieces, ranges, self.folder.read_ranges(ranges), strict=True):
            rows[row, column : column + count] = self._decode(raw, dtype, *span)
        return rows

    def verify(self) -> None:
        """Read everything: checksums against the manifests, every id against the vocabulary. With a progress bar.

        Raises: ValueError naming the first shard that is not what it should be.
        """
        import xxhash
        from tqdm import tqdm

        checksums: dict[str, str] = {}
        for name in self.folder.names():
            if name.startswith(self.prefix) and name.endswith(".manifest.json"):
                checksums |= {shard["file"]: shard.get("xxh3_64") for shard in self._manifest(name).shards}
        names = [name.decode() for name in self.names]
        for shard, name in enumerate(tqdm(names, desc=f"verify {self.prefix}", unit="shard")):
            dtype = np.dtype(self.dtypes[shard].decode())
            size = HEADER_SIZE + int(self.starts[shard + 1] - self.starts[shard]) * dtype.itemsize
            digest = xxhash.xxh3_64(self.folder.read_ranges([(name, 0, HEADER_SIZE)])[0])
            for begin in range(HEADER_SIZE, size, 1 << 22):
                span = (name, begin, min(size, begin + (1 << 22)))
                raw = self.folder.read_ranges([span])[0]
                self._decode(raw, dtype, *span)
                digest.update(raw)
            if (expected := checksums.get(name)) and digest.hexdigest() != expected:
                raise ValueError(
                    f"{self.folder.path}/{name}: checksum {digest.hexdigest()} is not the manifest's {expected}: "
                    f"the file changed after it was prepared; copy or prepare it again"
                )

    def _decode(self, raw: bytes, dtype: np.dtype, name: str, begin: int, end: int) -> np.ndarray:
        if len(raw) != end - begin:
            raise ValueError(f"{self.folder.path}/{name}: cut short since it was opened (no byte {begin + len(raw):,})")
        tokens = np.frombuffer(raw, dtype)
        if tokens.max() >= self.vocab_size or tokens.min() < 0:
            bad = int(np.argmax((tokens >= self.vocab_size) | (tokens < 0)))
            raise ValueError(
                f"{self.folder.path}/{name}: token {(begin - HEADER_SIZE) // dtype.itemsize + bad:,} is id "
                f"{tokens[bad]}, outside the model's vocabulary [0, {self.vocab_size}): the shard was made with "
                f"another tokenizer, or it is damaged"
            )
        return tokens

    def _manifest(self, name: str) -> Manifest:
        return parse_manifest(self.folder.read_file(name), f"{self.folder.path}/{name}")

    def _check_manifests(self, headers: dict[str, ShardHeader]) -> None:
        unlisted = dict(headers)
        for manifest in self.manifests:
            path = f"{self.folder.path}/{manifest.prefix}.manifest.json"
            if not manifest.complete:
                raise ValueError(f"{path}: the preparation did not finish; run the same prepare command again")
            if (made_for := manifest.tokenizer.get("vocab_size", 0)) > self.vocab_size:
                raise ValueError(
                    f"{path}: made with a tokenizer of {made_for} ids, more than the model's {self.vocab_size}"
                )
            listed = {shard["file"]: shard["tokens"] for shard in manifest.shards}
            own = re.compile(re.escape(manifest.prefix) + r"_\d{10}\.bin")
            problems = [f"{name} is missing" for name in listed if name not in headers]
            for name, header in headers.items():
                if name in listed and header.tokens != listed[name]:
                    problems.append(f"{name} has {header.tokens:,} tokens, not {listed[name]:,}")
                elif name in listed and header.dtype.name != manifest.dtype:
                    problems.append(f"{name} is {header.dtype.name}, not {manifest.dtype}")
                elif name not in listed and own.fullmatch(name):
                    problems.append(f"{name} is not listed")
            if problems:
                more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
                raise ValueError(f"{path} disagrees with the files beside it: {'; '.join(problems[:3])}{more}")
            unlisted = {name: header for name, header in unlisted.items() if name not in listed}
        if unlisted:
            warnings.warn(
                f"{self.folder.path}: no manifest for {len(unlisted)} of the {len(headers)} shards {self.prefix}*.bin "
                f"(first: {next(iter(unlisted))}). It cannot be checked that their preparation finished, which "
                f"tokenizer and delimiters made them, whether they end in filler, nor any checksum.",
                stacklevel=2,
            )
