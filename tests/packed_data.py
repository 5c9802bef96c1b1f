"""Writes small packed data for the tests of shards, mixes and loaders."""

from pathlib import Path

import numpy as np

from lit_gpt.shards import HEADER, MAGIC, Manifest, file_checksum, token_dtype, write_manifest, write_shard

TOKENIZER = {"name": "test", "sha256": "abc", "vocab_size": 32000, "bos_id": 1, "eos_id": 2}


def write_source(
    directory: Path, prefix: str, tokens: np.ndarray, shard_sizes: list[int], manifest: bool = True, **changes
) -> Manifest:
    """Cut `tokens` into shards of the given sizes (the last size repeats); `changes` go into the manifest."""
    directory.mkdir(parents=True, exist_ok=True)
    tokens = np.asarray(tokens).astype(token_dtype(TOKENIZER["vocab_size"]))
    shards, start = [], 0
    while start < len(tokens) or not shards:
        size = shard_sizes[min(len(shards), len(shard_sizes) - 1)]
        path = directory / f"{prefix}_{len(shards):010d}.bin"
        write_shard(path, tokens[start : start + size])
        shards.append({"file": path.name, "tokens": len(tokens[start : start + size]), "xxh3_64": file_checksum(path)})
        start += size
    values = {
        "prefix": prefix,
        "tokenizer": TOKENIZER,
        "delimiters": "bos+eos",
        "dtype": "uint16",
        "chunk_size": shard_sizes[0],
        "complete": True,
        "tokens": len(tokens),
        "shards": shards,
    }
    result = Manifest(**{**values, **changes})
    if manifest:
        write_manifest(directory, result)
    return result


def write_sparse(directory: Path, prefix: str, shards: int, tokens: int) -> None:
    """Shards of zeros that take no room on the disk."""
    for number in range(shards):
        with open(directory / f"{prefix}_{number:010d}.bin", "wb") as file:
            file.write(HEADER.pack(MAGIC, 1, 8, tokens))
            file.truncate(HEADER.size + 2 * tokens)
