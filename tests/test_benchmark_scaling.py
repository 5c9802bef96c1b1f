"""scripts/benchmark_scaling.py with two ranks: what fails is told, costs nobody minutes, and leaves the other rows."""

import json
import runpy
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
def test_a_rank_that_fails_alone_ends_the_run_and_failed_rows_the_program(tmp_path, monkeypatch, capsys):
    (tmp_path / "sitecustomize.py").write_text(SITE)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    scaling = runpy.run_path(str(ROOT / "scripts" / "benchmark_scaling.py"))["scaling"]
    with pytest.raises(ValueError, match="^1 of 3 cases were measured; the first problem: out of memory, say$"):
        scaling(
            devices=[2],
            model=["tiny_LLaMA_120M"],
            sharding=["ddp", "fsdp", "optimizer"],
            micro_batch_tokens=16,
            accumulation=1,
            steps=1,
            json=tmp_path / "rows.json",
        )
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [(row["sharding"], row.get("problem")) for row in rows] == [
        ("ddp", None),
        ("fsdp", "out of memory, say"),
        ("optimizer", "out of memory, say (rank 1 alone)"),
    ]
    printed = capsys.readouterr().out
    assert rows[0]["tokens/s/GPU"] > 0 and all(str(row) in printed for row in rows)


@pytest.mark.parametrize(
    "flags, message",
    [
        (dict(model=["tiny"]), "unknown model 'tiny'"),
        (dict(sharding=["optimizer/2", "half"]), "--sharding half is none of"),
        (dict(devices=[0]), r"--devices \[0\]: this machine has"),
    ],
)
def test_mistakes_are_named_before_anything_starts(flags, message):
    with pytest.raises(ValueError, match=message):
        runpy.run_path(str(ROOT / "scripts" / "benchmark_scaling.py"))["scaling"](**flags)
