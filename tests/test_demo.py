"""The README's first command, with a handful of steps."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lit_gpt.metrics import read_metrics

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_raw_text_becomes_a_model_that_transformers_loads(tmp_path):
    flags = dict(data_dir=tmp_path / "data", out_dir=tmp_path / "out", max_steps=6, code_bytes=500_000)
    command = [sys.executable, ROOT / "scripts" / "demo.py"]
    command += [str(word) for flag, value in flags.items() for word in (f"--{flag}", value)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "validation loss" in done.stdout and "resumed model, optimizer, RNG and data position" in done.stdout

    run_dir = tmp_path / "out" / "demo"
    assert (run_dir / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert [int(r["step"]) for r in read_metrics(run_dir / "metrics.csv") if "val_loss" in r][-1] == 6
    assert json.loads((run_dir / "hf" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    # The demo generated text with the converted model; prompts come back with their continuation.
    assert "--- 'Return the '\nReturn the " in done.stdout
