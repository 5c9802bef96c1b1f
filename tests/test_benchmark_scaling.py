"""scripts/benchmark_scaling.py with two ranks: what fails is told, costs nobody minutes, and leaves the other rows."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Python runs a file of this name at every start. The second case of a rank fails, the third on rank 1 alone.
SITE = """
import os
if "RANK" in os.environ:
    from lit_gpt import config, model
    small = dict(n_layer=1, n_embd=32, n_head=2, n_query_groups=1, intermediate_size=32, block_size=16, vocab_size=64)
    config.MODELS["tiny_LLaMA_120M"] = small
    real, cases = model.GPT.init_weights, []

    def init_weights(self, seed):
        cases.append(0)
        if len(cases) == 2 or (len(cases) == 3 and os.environ["RANK"] == "1"):
            raise RuntimeError("out of memory, say")
        real(self, seed)

    model.GPT.init_weights = init_weights
"""


@pytest.mark.slow
def test_a_rank_that_fails_alone_ends_the_run_and_failed_rows_the_program(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(SITE)
    env = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    flags = ["--devices", "[2]", "--model", "[tiny_LLaMA_120M]", "--sharding", "[ddp, fsdp, optimizer]"]
    flags += ["--micro_batch_tokens", "16", "--accumulation", "1", "--steps", "1", "--json", tmp_path / "rows.json"]
    command = [sys.executable, ROOT / "scripts" / "benchmark.py", "scaling", *flags]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200)
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [(row["sharding"], row.get("problem")) for row in rows] == [
        ("ddp", None),
        ("fsdp", "out of memory, say"),
        ("optimizer", "out of memory, say (rank 1 alone)"),
    ]
    assert rows[0]["tokens/s/GPU"] > 0 and all(str(row) in done.stdout for row in rows)
    assert done.returncode == 1
    assert done.stderr.endswith("error: 1 of 3 cases were measured; the first problem: out of memory, say\n"), (
        done.stderr
    )
