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

import json
import os
import struct
from dataclasses import asdict, dataclass, field, fields
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
        return Manifest(**values, extra=extra)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a manifest of packed data: {error}") from error
