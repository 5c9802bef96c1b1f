"""Processor time from zstd jsonl to shards, ours against one document at a time.

python scripts/benchmark.py prepare --source_path SlimPajama --tokenizer_path tokenizer/llama2
python scripts/benchmark.py prepare ... --peer none --files 1 --processes '[1, 2]'      # both cores on one file

The documents of the source (SlimPajama's layout) are repeated to `--megabytes` of text. Time is user + system time of
the whole process tree, start-up included, so that other work on the machine matters little. What only the first run
with a tokenizer on a machine does, converting it for gigatoken, is done before and printed.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import numpy as np

from lit_gpt.shards import HEADER_SIZE, read_header, write_shard
from lit_gpt.text_sources import Fields, find_files, open_source
from lit_gpt.tokenizer import BatchEncoder, Tokenizer

PATTERN = "train/*/*.jsonl.zst"
CHUNK_SIZE = 2049 * 1024


def prepare(
    source_path: Path,
    tokenizer_path: Path,
    peer: Literal["per-document", "none"] = "per-document",
    processes: int | list[int] = 1,
    megabytes: int = 100,
    files: int = 8,
) -> None:
    """Measure preparation.

    Args:
        source_path: Folder in SlimPajama's layout.
        tokenizer_path: Folder or file of the tokenizer.
        peer: What to compare with: one document at a time, as the original does it, or nothing.
        processes: Of ours, one number or several [in, brackets]; the peer has one.
        megabytes: Text to prepare, at least.
        files: Into how many files to put it.
    """
    t0 = time.process_time()
    BatchEncoder(Tokenizer(tokenizer_path))
    print(f"{tokenizer_path}: {time.process_time() - t0:.1f} s to load, and to convert where that is not cached yet")
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder, "corpus")
        text_bytes = write_corpus(source_path, corpus, megabytes * 1_000_000, files)
        flags = ["--source_path", corpus, "--tokenizer_path", tokenizer_path, "--delimiters=eos"]
        script = Path(__file__).with_name("prepare_slimpajama.py")
        commands = {}
        for number in [processes] if isinstance(processes, int) else processes:
            ours = ["--destination_path", Path(folder, f"ours-{number}"), f"--processes={number}"]
            commands[f"ours, {number} processes"] = [script, *flags, *ours]
        if peer == "per-document":
            commands["per document"] = [__file__, corpus, tokenizer_path, Path(folder, "peer")]
        size = sum(path.stat().st_size for path in sources(corpus))
        print(f"{text_bytes / 1e6:.1f} MB of text in {files} files of {size / 1e6:.1f} MB together", flush=True)
        measured = []
        for name, command in commands.items():
            before, t0 = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
            subprocess.run([sys.executable, *map(str, command)], check=True, stdout=subprocess.DEVNULL)
            after, elapsed = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - t0
            cpu = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
            measured.append((cpu, elapsed))
            print(
                f"{name}: {cpu:.1f} s of processor time, {text_bytes / 1e6 / cpu:.1f} MB/s a core; {elapsed:.1f} s, "
                f"{measured[0][1] / elapsed:.2f} times as fast as the first",
                flush=True,
            )
        if peer == "per-document":
            (mine, _), (theirs, _) = measured[0], measured[-1]
            folders = sorted(path for path in Path(folder).iterdir() if path != corpus)
            same = all(np.array_equal(read_tokens(folders[0]), read_tokens(other)) for other in folders[1:])
            print(f"{theirs / mine:.2f} times less processor time; tokens {'identical' if same else 'DIFFER'}")
            if not same:
                raise ValueError("the tokens differ from the peer's")


def write_corpus(source_path: Path, corpus: Path, size: int, files: int) -> int:
    """Repeat the documents to `size` bytes of text. Returns the bytes that it became."""
    import zstandard

    texts = [text for path in sources(source_path) for text in open_source(path).read(0, Fields()).texts]
    text_bytes = sum(len(text.encode()) for text in texts)
    repeats = -(-size // text_bytes)
    lines = []
    for path in sources(source_path):
        lines += zstandard.ZstdDecompressor().stream_reader(path.read_bytes()).read().splitlines(keepends=True)
    lines *= repeats  # one copy after the other: copies side by side would flatter an encoder that remembers words
    for n in range(files):
        path = corpus / "train" / "chunk1" / f"part_{n:04d}.jsonl.zst"
        path.parent.mkdir(parents=True, exist_ok=True)
        part = b"".join(lines[n * len(lines) // files : (n + 1) * len(lines) // files])
        with open(path, "wb") as file, zstandard.ZstdCompressor().stream_writer(file) as writer:
            writer.write(part)
    return text_bytes * repeats


def sources(folder: Path) -> list[Path]:
    return find_files(folder, [PATTERN])


def prepare_per_document(corpus: Path, tokenizer_path: Path, destination: Path) -> None:
    """The original's way: each row parsed twice, encoded alone, copied into the shard, counted by a progress bar."""
    import zstandard
    from tqdm import tqdm

    tokenizer = Tokenizer(tokenizer_path)
    destination.mkdir()
    dtype = np.uint16 if tokenizer.vocab_size < 65_500 else np.int32
    shard, filled, count = np.empty(CHUNK_SIZE, dtype), 0, 0
    for path in sources(corpus):
        with zstandard.open(path, "rt", encoding="utf-8") as rows:
            for row in tqdm(rows):
                if json.loads(row)["meta"]["redpajama_set_name"] == "RedPajamaGithub":
                    continue
                ids = np.array(tokenizer.encode(json.loads(row)["text"], bos=False, eos=True), dtype=dtype)
                while len(ids):
                    taken = ids[: CHUNK_SIZE - filled]
                    shard[filled : filled + len(taken)] = taken
                    filled, ids = filled + len(taken), ids[len(taken) :]
                    if filled == CHUNK_SIZE:
                        write_shard(destination / f"peer_{count:010d}.bin", shard)
                        filled, count = 0, count + 1
    write_shard(destination / f"peer_{count:010d}.bin", shard[:filled])


def read_tokens(folder: Path) -> np.ndarray:
    shards: Iterable[Path] = sorted(folder.glob("*.bin"))
    return np.concatenate([np.fromfile(path, read_header(path).dtype, offset=HEADER_SIZE) for path in shards])


if __name__ == "__main__":
    prepare_per_document(*map(Path, sys.argv[1:]))
