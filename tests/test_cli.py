import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PRETRAIN = ROOT / "pretrain" / "tinyllama.py"


def run(*args: object) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *map(str, args)], capture_output=True, text=True, cwd=ROOT)


def test_help_explains_every_flag_with_its_default():
    out = " ".join(run(PRETRAIN, "--help").stdout.split())
    assert "Tokens in one optimizer step, over all devices and micro-batches. (type: int, default: 2097152)" in out


def test_an_unknown_flag_or_key_is_an_error_that_names_it(tmp_path):
    done = run(PRETRAIN, "--learning_rat", "1")
    assert done.returncode != 0 and "--learning_rat" in done.stderr
    (tmp_path / "c.yaml").write_text("learning_rat: 1\n")
    done = run(PRETRAIN, "--config", tmp_path / "c.yaml")
    assert done.returncode != 0 and "learning_rat" in done.stderr


def test_a_yaml_preset_and_a_flag_after_it(tmp_path):
    (tmp_path / "c.yaml").write_text("learning_rate: 1e-3\nmodel_overrides: {n_layer: 3}\n")
    flags = ("--learning_rate", "2e-3", "--model_overrides.n_head", "4", "--print_config")
    out = run(PRETRAIN, "--config", tmp_path / "c.yaml", *flags).stdout
    assert "learning_rate: 0.002" in out and "n_layer: 3" in out and "n_head: 4" in out


def test_a_users_mistake_is_one_line_and_exit_code_1(tmp_path):
    done = run(PRETRAIN, "--train_data_dir", tmp_path / "nowhere", "--out_dir", tmp_path, "--accelerator", "cpu")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    [line] = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert "nowhere" in line


@pytest.mark.parametrize("args", [[], ["run"], ["fly"]])
def test_lightning_explains_itself(args):
    done = run("-c", f"import sys; sys.argv[1:] = {args}; from lit_gpt.lightning_cli import main; main()")
    assert done.returncode == 1 and "usage: lightning run model" in done.stderr
