import importlib.util
import os
import signal
import subprocess
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path

import pytest

from lit_gpt.cli import one_line_errors, parse, quiet_imports
from tests.tiny import run_script

ROOT = Path(__file__).parent.parent
PRETRAIN = ROOT / "pretrain" / "tinyllama.py"


@pytest.fixture(scope="module")
def train_args() -> type:
    spec = importlib.util.spec_from_file_location("tinyllama", PRETRAIN)
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault("tinyllama", module)  # where dataclasses look their annotations up
    spec.loader.exec_module(module)
    return module.TrainArgs


def run(*args: object) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *map(str, args)], capture_output=True, text=True, cwd=ROOT)


def test_help_explains_every_flag_with_its_default(train_args, capsys):
    with pytest.raises(SystemExit) as end:
        parse(train_args, ["--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0
    assert "Tokens in one optimizer step, over all devices and micro-batches. (type: int, default: 2097152)" in out


def test_an_unknown_flag_or_key_is_an_error_that_names_it(train_args, tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("learning_rat: 1\n")
    for argv in (["--learning_rat", "1"], ["--config", str(tmp_path / "c.yaml")]):
        with pytest.raises(SystemExit) as end:
            parse(train_args, argv)
        assert end.value.code != 0 and "learning_rat" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--max_step", "60"], "unrecognized arguments: --max_step 60. Did you mean '--max_steps'?"),
        (["--max-steps=60"], "unrecognized arguments: --max-steps=60. Did you mean '--max_steps'?"),
        (["--bogus", "1"], "unrecognized arguments: --bogus 1."),
        (["--config", "c.yaml"], "Option 'learning_rat' is not accepted. Did you mean '--learning_rate'?"),
        (["--config", "d.yaml"], "--config: File does not exist: '{cwd}/d.yaml'."),
        (["--learning_rate", "4e-4x"], "--learning_rate 4e-4x: expected float."),
        (["--max_steps", "1e4"], "--max_steps 1e4: expected int."),
        (["--logger", "csw"], "--logger csw: expected csv or wandb or tensorboard. Did you mean 'csv'?"),
        (["--source_epochs", "x"], "--source_epochs x: expected float or dict[str, float]."),
    ],
)
def test_a_mistake_in_a_flag_is_a_line_with_what_was_meant(train_args, tmp_path, monkeypatch, capsys, argv, says):
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text("learning_rat: 1\n")
    with pytest.raises(SystemExit) as end:
        parse(train_args, argv)
    line = f"error: {says.format(cwd=tmp_path)} --help explains all flags\n"
    assert end.value.code == 2 and capsys.readouterr().err == line


@pytest.mark.parametrize(
    ("words", "tasks"),
    [
        (["--eval_tasks", "commonsense"], ["commonsense"]),
        (["--eval_tasks", "piqa,mmlu"], ["piqa", "mmlu"]),
        (["--eval_tasks=piqa,mmlu"], ["piqa", "mmlu"]),
        (["--eval_tasks", "[piqa, mmlu]"], ["piqa", "mmlu"]),
        (["--eval_tasks", "[]"], []),
        (["--eval_tasks+", "piqa"], ["piqa"]),
    ],
)
def test_a_flag_of_a_list_takes_words(train_args, words, tasks):
    assert parse(train_args, [*words, "--name", "a,b"]).eval_tasks == tasks


def test_lists_of_other_things_than_words():
    def main(runs: list[Path] | None = None, lengths: list[int] = (), tasks: list[str] | str = "commonsense") -> tuple:
        """Lists."""
        return runs, lengths, tasks

    assert parse(main, ["--runs", "out/t", "--lengths", "1,2", "--tasks", "a,b"]) == ([Path("out/t")], [1, 2], "a,b")
    assert parse(main, ["--runs", "null"])[0] is None


def test_a_yaml_preset_and_a_flag_after_it(train_args, tmp_path):
    (tmp_path / "c.yaml").write_text("learning_rate: 1e-3\nmodel_overrides: {n_layer: 3}\n")
    flags = ["--learning_rate", "2e-3", "--model_overrides.n_head", "4", "--global_batch_tokens", "4096"]
    args = parse(train_args, ["--config", str(tmp_path / "c.yaml"), "--train_data_dir", "x", *flags])
    assert args.learning_rate == 0.002 and args.model_overrides == {"n_layer": 3, "n_head": 4}


def test_a_users_mistake_is_one_line_and_exit_code_1(tmp_path):
    done = run(PRETRAIN, "--train_data_dir", tmp_path / "nowhere", "--out_dir", tmp_path, "--accelerator", "cpu")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    [line] = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert "nowhere" in line


@pytest.fixture
def ctrl_c():
    """As in a terminal; a shell that runs the tests in its background has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("script", ["pretrain/tinyllama.py", "sft/finetune.py"])
def test_ctrl_c_while_libraries_are_imported_prints_no_traceback(script, tmp_path, ctrl_c):
    """torch's import, which raises as Ctrl-C would."""
    (tmp_path / "torch.py").write_text("import signal\n\nsignal.raise_signal(signal.SIGINT)\n")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run([sys.executable, ROOT / script], capture_output=True, text=True, env=environment)
    assert done.returncode == -signal.SIGINT and not done.stderr


def test_ctrl_c_afterwards_is_a_word(ctrl_c):
    with pytest.raises(SystemExit) as end:
        quiet_imports()
        with one_line_errors():
            signal.raise_signal(signal.SIGINT)
    assert end.value.code == 130


def test_a_machine_with_slurms_commands_gets_no_advice_about_them(tmp_path, monkeypatch):
    from lightning_fabric import Fabric

    (tmp_path / "srun").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # to be put back
    for silent in (False, True):
        with warnings.catch_warnings(record=True) as seen, one_line_errors() if silent else nullcontext():
            Fabric(accelerator="cpu", devices=1)
        assert any("srun" in str(w.message) for w in seen) != silent


@pytest.mark.parametrize(
    "script, needed",
    [
        ("scripts/generate.py", ["checkpoint_dir"]),
        ("scripts/evaluate.py", ["checkpoint_dir", "out"]),
        ("speculative_decoding/benchmark.py", ["target_dir", "prompts"]),
        ("speculative_decoding/distill.py", ["target_dir", "draft_dir", "train_data_dir", "out_dir"]),
        ("sft/chat.py", ["model"]),
        ("sft/serve.py", ["model"]),
    ],
)
def test_a_device_that_is_not_there_is_named(script, needed, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    flags = [word for name in needed for word in (f"--{name}", "nowhere")]
    flags += ["--train_mix.a", "1"] if "train_data_dir" in needed else []
    for device, message in (("foo", "give cpu, cuda or mps"), ("cuda:1", "PyTorch sees no such device here")):
        assert run_script(f"../{script}", *flags, "--device", device).startswith(f"error: --device {device}: {message}")


@pytest.mark.parametrize("args", [[], ["run"], ["fly"]])
def test_lightning_explains_itself(args):
    done = run("-c", f"import sys; sys.argv[1:] = {args}; from lit_gpt.lightning_cli import main; main()")
    assert done.returncode == 1 and "usage: lightning run model" in done.stderr
