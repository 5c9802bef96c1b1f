"""What loading costs, measured in a fresh process: `python tests/test_packed_dataset_speed.py --help` for a table."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from packed_data import write_sparse

from lit_gpt.packed_dataset import PackedDataset, PackedLoader
from lit_gpt.shards import write_shard

BLOCK_SIZE = 2048


def write_random(directory: Path, shards: int, tokens: int) -> None:
    generator = np.random.default_rng(0)
    for number in range(shards):
        path = directory / f"train_{number:010d}.bin"
        write_shard(path, generator.integers(0, 32000, tokens).astype(np.uint16))


def measure(directory: Path, start: int, micro_batch_size: int, batches: int) -> dict[str, float]:
    """Resume at global sequence `start` and read some batches, through one worker process."""
    warnings.simplefilter("ignore")
    t0 = time.perf_counter()
    dataset = PackedDataset(directory, {"train": 1.0}, BLOCK_SIZE, seed=1, vocab_size=32000)
    loader = PackedLoader(dataset, micro_batch_size, num_workers=1)
    loader.load_state_dict(loader.state_dict() | {"sequences": start})
    iterator = iter(loader)
    next(iterator)
    first_batch_s = time.perf_counter() - t0
    (worker,) = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()

    def worker_cpu_s() -> float:
        user, system = Path(f"/proc/{worker}/stat").read_text().rsplit(")", 1)[1].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    cpu_s, t1 = worker_cpu_s(), time.perf_counter()
    for _ in range(batches):
        next(iterator)
    cpu_s, wall_s = worker_cpu_s() - cpu_s, time.perf_counter() - t1
    peak_kib = next(line for line in Path(f"/proc/{worker}/status").read_text().splitlines() if "VmHWM" in line)
    tokens = batches * micro_batch_size * BLOCK_SIZE
    return {
        "first_batch_s": first_batch_s,
        "tokens_per_cpu_s": tokens / cpu_s,
        "tokens_per_s": tokens / wall_s,
        "worker_mib": int(peak_kib.split()[1]) / 1024,
    }


def measure_afresh(directory: Path, *arguments: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--directory", str(directory), *map(str, arguments)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads memory and CPU time from /proc")
def test_a_trillion_tokens_in_10_000_shards(tmp_path):
    write_sparse(tmp_path, "train", 10_000, 100_000_000)
    for start in (0, 4 * 10**8):
        result = measure_afresh(tmp_path, start, 8, 500)
        assert result["first_batch_s"] < 2, result  # opening, resuming, starting the worker; headers of all shards
        assert result["worker_mib"] < 300, result
        assert result["tokens_per_cpu_s"] > 2e6, result


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads memory and CPU time from /proc")
def test_random_tokens_in_the_page_cache(tmp_path):
    write_random(tmp_path, 50, 2049 * 1024)
    result = measure_afresh(tmp_path, 0, 8, 500)
    assert result["tokens_per_cpu_s"] > 2e6 and result["worker_mib"] < 300, result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="What loading costs; one line of JSON per measurement.")
    parser.add_argument("--directory", type=Path, help="measure here, with the numbers that follow")
    parser.add_argument("numbers", type=int, nargs="*", help="first sequence, micro-batch size, batches")
    arguments = parser.parse_args()
    if arguments.directory:
        print(json.dumps(measure(arguments.directory, *arguments.numbers)))
        sys.exit()
    with tempfile.TemporaryDirectory() as directory:
        write_sparse(Path(directory), "train", 10_000, 100_000_000)
        for start in (0, 10**6, 4 * 10**8):
            print("1T tokens, 10,000 sparse shards, from sequence", start, measure_afresh(directory, start, 8, 2000))
    with tempfile.TemporaryDirectory() as directory:
        write_random(Path(directory), 250, 2049 * 1024)
        for size in (1, 2, 4, 8, 32):
            print("0.5B random tokens, micro-batch", size, measure_afresh(directory, 0, size, 16_000 // size))
