"""The train loop, run for real on the CPU with a model of a few thousand parameters."""

import gzip
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from packed_data import write_source
from processes import free_port, run_ranks
from safetensors.torch import load_file
from tiny import run_script

from lit_gpt import checkpoint
from lit_gpt.metrics import read_metrics
from lit_gpt.model import GPT
from lit_gpt.packed_dataset import PackedDataset
from lit_gpt.pretrained import open_pretrained
from lit_gpt.shards import write_shard

ROOT = Path(__file__).parent.parent
spec = importlib.util.spec_from_file_location("tinyllama", ROOT / "pretrain" / "tinyllama.py")
tinyllama = importlib.util.module_from_spec(spec)
sys.modules["tinyllama"] = tinyllama  # where dataclasses look their annotations up
spec.loader.exec_module(tinyllama)

MODEL = dict(n_layer=2, n_embd=32, n_head=4, n_query_groups=2, intermediate_size=48, block_size=32, vocab_size=128)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    rng = np.random.default_rng(0)
    for prefix, tokens in (("train_slim", 9000), ("train_star", 5000), ("validation", 1000)):
        ids = np.minimum(rng.zipf(1.5, tokens), 127)
        for i, part in enumerate(np.array_split(ids, 3)):
            write_shard(folder / f"{prefix}_{i:010d}.bin", part.astype(np.uint16))
    return folder


@pytest.fixture
def flags(data, tmp_path) -> dict:
    """A run of 8 steps of 16 sequences."""
    return dict(
        train_data_dir=data,
        val_data_dir=data,
        model="tiny_LLaMA_demo",
        model_overrides=MODEL,
        global_batch_tokens=16 * 32,
        micro_batch_size=4,
        max_steps=8,
        warmup_steps=2,
        learning_rate=1e-2,
        min_lr=1e-3,
        eval_interval=3,
        save_interval=3,
        accelerator="cpu",
        num_workers=0,
        out_dir=tmp_path / "out",
        name="run",
    )


def train(flags: dict, **more) -> Path:
    args = tinyllama.TrainArgs(**{**flags, **more})
    handlers = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    try:
        tinyllama.main(args)
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
    return args.out_dir / args.name


def runs(flags: dict, changes: list[dict]) -> None:
    """In each of several processes."""
    for more in changes:
        tinyllama.main(tinyllama.TrainArgs(**{**flags, **more}))


def nan_on_rank_1(flags: dict) -> None:
    forward, calls = GPT.forward, []

    def poisoned(self, idx, targets=None, **kw):
        calls.append(0)
        out = forward(self, idx, targets, **kw)
        return out * float("nan") if os.environ["RANK"] == "1" and len(calls) == 5 else out  # in step 3, of 2 each

    GPT.forward = poisoned
    runs(flags, [dict(save_interval=1, keep_checkpoints=0, max_steps=4)])


def tokenizer(sha256: str) -> dict:
    return {"name": "test", "sha256": sha256, "vocab_size": 128, "bos_id": 1, "eos_id": 2}


def losses(run_dir: Path) -> dict[int, float]:
    return {int(row["step"]): row["loss"] for row in read_metrics(run_dir / "metrics.csv") if "loss" in row}


def command(flags: dict, **more) -> list[str]:
    words = []
    for flag, value in {**flags, **more}.items():
        words += [f"--{flag}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return [str(ROOT / "pretrain" / "tinyllama.py"), *words]


WRITES_SLOWLY = """
import runpy, sys, time
from lit_gpt import checkpoint

def slowly(file):
    print("now it is written", flush=True)
    time.sleep(100)

checkpoint.file_checksum = slowly
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


@pytest.mark.filterwarnings("ignore:.*no manifest")
class TestInOneProcess:
    def test_a_run_learns_validates_saves_and_draws(self, flags, capsys):
        run_dir = train(flags)
        assert "tiny_LLaMA_demo with n_layer 2, n_embd 32, n_head 4," in capsys.readouterr().out
        by_step = losses(run_dir)
        assert list(by_step) == list(range(1, 9))
        assert by_step[8] < by_step[1] - 0.2
        rows = [row for row in read_metrics(run_dir / "metrics.csv") if "val_loss" in row]
        assert [row["step"] for row in rows] == [3, 6, 8]
        assert rows[-1]["val_loss"] < rows[0]["val_loss"]
        assert [d.name for d in checkpoint.steps(run_dir)] == ["step-00000003", "step-00000006", "step-00000008"]
        assert (run_dir / "loss.png").exists()
        assert json.loads((run_dir / "args.json").read_text())["args"]["learning_rate"] == 1e-2
        meta = checkpoint.check(run_dir / "step-00000008")
        assert meta["tokens_seen"] == 8 * 512 and meta["loader"]["sequences"] == 8 * 16

    @pytest.mark.parametrize("stop_at_step", [3, 5])
    def test_an_interrupted_run_equals_a_straight_one_to_the_bit(self, flags, stop_at_step):
        straight = train(flags, name="straight")
        train(flags, stop_at_step=stop_at_step)
        resumed = train(flags, resume=True)
        columns = ("step", "tokens", "loss", "learning_rate", "grad_norm", "val_loss")
        what = [
            [tuple(row.get(c) for c in columns) for row in read_metrics(d / "metrics.csv")] for d in (straight, resumed)
        ]
        stopped = what[1].pop([row[0] for row in what[1]].index(stop_at_step) + 1)  # validation at the stop
        assert stopped[5] is not None
        if stop_at_step % flags["eval_interval"] == 0:
            what[1].insert([row[0] for row in what[1]].index(stop_at_step) + 1, stopped)
        assert what[0] == what[1]
        a, b = (checkpoint.load_weights(d / "step-00000008") for d in (straight, resumed))
        assert all(torch.equal(a[name], b[name]) for name in a)

    def test_the_micro_batch_does_not_matter(self, flags):
        a = losses(train(flags, name="a", micro_batch_size=2))
        b = losses(train(flags, name="b", micro_batch_size=16))
        assert list(a.values()) == pytest.approx(list(b.values()), rel=1e-5)

    def test_validation_counts_every_target_once(self, flags, data):
        run_dir = train(flags, max_steps=2, warmup_steps=1)
        [row] = [row for row in read_metrics(run_dir / "metrics.csv") if "val_loss" in row]
        model = GPT(checkpoint.config(run_dir / "step-00000002"))
        model.load_state_dict(checkpoint.load_weights(run_dir / "step-00000002"))
        stream = [np.fromfile(p, np.uint16, offset=24) for p in sorted(data.glob("validation*.bin"))]
        tokens = torch.from_numpy(np.concatenate(stream).astype(np.int64))
        with torch.no_grad():
            total = 0.0
            for start in range(0, len(tokens) - 1, 32):
                piece = tokens[start : start + 33][None]
                total += model(piece[:, :-1], piece[:, 1:]).item()
        assert row["val_loss"] == pytest.approx(total / (len(tokens) - 1), rel=1e-5)

    def test_z_loss_is_in_the_training_loss_alone(self, flags):
        plain, with_z = (
            read_metrics(
                train(flags, max_steps=1, warmup_steps=1, learning_rate=0.0, min_lr=0.0, **more) / "metrics.csv"
            )
            for more in ({}, dict(z_loss=1e-2, name="z"))
        )
        log_z_squared = (with_z[0]["loss"] - plain[0]["loss"]) / 1e-2
        assert log_z_squared == pytest.approx(plain[0]["loss"] ** 2, rel=0.1)  # before it has learned anything
        assert with_z[-1]["val_loss"] == pytest.approx(plain[-1]["val_loss"], rel=1e-6)

    def test_several_validation_sets_are_reported_apart(self, flags):
        rows = read_metrics(train(flags, val_prefixes=["validation", "train_star"], max_steps=3) / "metrics.csv")
        [row] = [row for row in rows if "val_loss" in row]
        [alone] = [
            row
            for row in read_metrics(
                train(flags, val_prefixes=["train_star"], max_steps=3, name="alone") / "metrics.csv"
            )
            if "val_loss" in row
        ]
        assert row["val_loss/train_star"] == alone["val_loss"] != row["val_loss"]

    def test_a_step_is_profiled_on_request(self, flags):
        run_dir = train(flags, max_steps=2, warmup_steps=1, profile_step=2, val_data_dir=None)
        trace = json.loads(gzip.decompress((run_dir / "trace-step-2-rank-0.json.gz").read_bytes()))
        assert any("backward" in event.get("name", "").lower() for event in trace["traceEvents"])

    def test_a_plan_needs_neither_data_nor_gpus(self, flags, capsys):
        recipe = dict(model="tiny_LLaMA_1b", train_data_dir="nowhere", plan="16xA100-40G")
        assert tinyllama.main(tinyllama.TrainArgs(**recipe)) == 0
        assert "time: 90." in capsys.readouterr().out
        with pytest.raises(ValueError, match="--plan A100 is not a number of GPUs and their type"):
            tinyllama.main(tinyllama.TrainArgs(**{**recipe, "plan": "A100"}))

    def test_a_checkpoint_becomes_a_single_file(self, flags, tmp_path):
        run_dir = train(flags, max_steps=2, warmup_steps=1, val_data_dir=None)
        words = ("--checkpoint_dir", run_dir, "--out_dir", tmp_path / "single", "--optimizer=true")
        assert run_script("consolidate_checkpoint.py", *words) == 0
        assert "--overwrite true" in run_script("consolidate_checkpoint.py", *words)
        weights = checkpoint.load_weights(run_dir / "step-00000002")
        single = open_pretrained(tmp_path / "single").weights
        assert all(torch.equal(weights[name], single[name]) for name in weights)
        moments = load_file(tmp_path / "single" / "lit_optimizer.safetensors")
        assert moments["lm_head.weight.exp_avg"].abs().max() > 0 and moments["lm_head.weight.step"] == 2

    def test_a_spike_stops_or_is_skipped(self, flags, monkeypatch, capsys):
        forward, calls = GPT.forward, []

        def spiking(self, idx, targets=None, **kw):
            calls.append(0)
            out = forward(self, idx, targets, **kw)
            return out * 30 if len(calls) == 70 else out  # in step 70

        monkeypatch.setattr(GPT, "forward", spiking)
        flags = dict(flags, micro_batch_size=16, max_steps=72, save_interval=100, val_data_dir=None)
        with pytest.raises(ValueError, match=r"step 70 .*above the limits of .*with --spike skip"):
            train(flags, spike="stop")
        calls.clear()
        run_dir = train(flags, spike="skip", name="skip")
        assert "step 70" in (out := capsys.readouterr().out) and "skipped" in out
        history = checkpoint.check(run_dir / "step-00000072")["spike_guard"]
        assert len(history) == 71

    def test_a_cooldown_starts_from_any_checkpoint(self, flags):
        first = train(flags, schedule="wsd")
        run_dir = train(
            flags,
            name="cooled",
            resume=str(first / "step-00000003"),
            schedule="wsd",
            max_steps=7,
            decay_steps=4,
        )
        rows = {row["step"]: row for row in read_metrics(run_dir / "metrics.csv") if "loss" in row}
        assert [rows[step]["learning_rate"] for step in (4, 5, 6, 7)] == pytest.approx([7.75e-3, 5.5e-3, 3.25e-3, 1e-3])
        assert rows[4]["loss"] == losses(first)[4]  # the data go on, too

    def test_existing_runs_are_not_overwritten(self, flags):
        train(flags, max_steps=2, warmup_steps=1)
        with pytest.raises(ValueError, match="already holds step-00000002: pass --resume true"):
            train(flags)
        with pytest.raises(ValueError, match="holds no complete checkpoint"):
            train(flags, name="new", resume=True)
        assert losses(train(flags, name="new", resume="auto", max_steps=2, warmup_steps=1))

    def test_a_damaged_checkpoint_is_not_resumed(self, flags):
        run_dir = train(flags, stop_at_step=3)
        file = next((run_dir / "step-00000003").glob("*.distcp"))
        file.write_bytes(file.read_bytes()[:-1])
        with pytest.raises(ValueError, match="step-00000003 is not a complete checkpoint"):
            train(flags, resume=True)

    def test_a_resume_refuses_another_model_or_mix(self, flags):
        train(flags, stop_at_step=2)
        with pytest.raises(ValueError, match="another model: n_layer 2 -> 3"):
            train(flags, resume=True, model_overrides={**MODEL, "n_layer": 3})
        with pytest.raises(ValueError, match="--resume_mix change"):
            train(flags, resume=True, train_mix={"train_slim": 0.5, "train_star": 0.5})

    def test_init_from_takes_the_weights_and_nothing_else(self, flags):
        first = train(flags)
        second = train(flags, name="second", init_from=first / "step-00000008", max_steps=1, warmup_steps=0)
        assert losses(second)[1] < losses(first)[1] - 0.2
        assert checkpoint.check(second / "step-00000001")["loader"]["sequences"] == 16

    @pytest.mark.parametrize(
        "wrong, message",
        [
            (dict(micro_batch_size=3), "--global_batch_tokens 512 is not a multiple of 96"),
            (dict(min_lr=1.0), "--min_lr 1.0 is not between"),
            (dict(warmup_steps=9), "^--warmup_steps 9 is more than the run's 8 steps: .* e.g. --warmup_steps 0"),
            (
                dict(schedule="wsd", max_steps=60, warmup_steps=9, decay_steps=52),
                r"^--warmup_steps 9 \+ --decay_steps 52 is more.* 60 steps.* e.g. --warmup_steps 6 --decay_steps 6$",
            ),
            (dict(max_tokens=512), "give one of --max_tokens, --max_steps and --max_epochs"),
            (dict(model="tiny_llama_1b"), "Did you mean 'tiny_LLaMA_1b'"),
            (dict(model_overrides={**MODEL, "vocab_size": 100}), r"outside the model's vocabulary \[0, 100\)"),
            (dict(train_mix={"train_slime": 1.0}), "no shards train_slime"),
            (dict(micro_batch_size=3, min_lr=1.0), "multiple of 96.*--min_lr"),
            (dict(stop_at_step=0, warmup_steps=-1), "--stop_at_step 0 is not positive; --warmup_steps -1 is negative"),
            (dict(devices="two"), "--devices two is neither auto nor a number"),
        ],
    )
    def test_mistakes_are_named_and_leave_nothing(self, flags, wrong, message):
        with pytest.raises((ValueError, OSError), match=message):
            train(flags, **wrong)
        assert not list(flags["out_dir"].rglob("step-*"))

    def test_a_broken_shard_is_named(self, flags, tmp_path):
        broken = tmp_path / "broken"
        broken.mkdir()
        (broken / "train_slim_0000000000.bin").write_bytes(b"NOTASHARD" * 10)
        with pytest.raises(ValueError, match="train_slim_0000000000.bin"):
            train(flags, train_data_dir=broken, train_mix={"train_slim": 1.0})

    def test_a_run_over_limited_data_ends_with_them(self, flags, capsys):
        run_dir = train(flags, exhaustion="stop", max_steps=1000, save_interval=1000, eval_interval=1000)
        last = max(losses(run_dir))
        loader = checkpoint.check(run_dir / f"step-{last:08d}")["loader"]
        # 281 sequences of train_slim are 0.693584 of the mix: the run ends with the first source that ends.
        assert last == pytest.approx(281 / 0.693584 / 16, abs=1) and loader["sequences"] <= 281 / 0.693584 + 1

    def test_validation_data_of_another_tokenizer_are_refused(self, flags, tmp_path):
        for prefix, sha256 in (("train_x", "aa"), ("validation", "bb")):
            write_source(tmp_path, prefix, np.arange(200) % 100, [200], tokenizer=tokenizer(sha256))
        with pytest.raises(ValueError, match="another tokenizer than"):
            train(flags, train_data_dir=tmp_path, val_data_dir=tmp_path, train_mix={"train_x": 1.0})

    def test_documents_apart_are_what_they_are_alone(self, flags, tmp_path):
        rng = np.random.default_rng(1)
        documents = [np.array([1, *rng.integers(3, 128, n), 2]) for n in rng.integers(3, 60, 40)]
        write_source(tmp_path, "train_x", np.concatenate(documents), [1000], tokenizer=tokenizer("aa"))
        run = dict(train_data_dir=tmp_path, val_data_dir=None, train_mix={"train_x": 1.0}, max_steps=1, warmup_steps=1)
        run_dir = train(flags, **run, document_mask=True, init_from=train(flags, max_steps=3, name="first"))

        model = GPT(checkpoint.config(flags["out_dir"] / "first" / "step-00000003"))
        model.load_state_dict(checkpoint.load_weights(flags["out_dir"] / "first" / "step-00000003"))
        what = dict(seed=3407, vocab_size=128)
        rows = PackedDataset(tmp_path, {"train_x": 1.0}, 32, **what).tokens(range(16))
        total, count = 0.0, 0
        for row in rows:
            for piece in torch.tensor_split(row, (row[:-1] == 2).nonzero().flatten() + 1):  # ends after each </s>
                if len(piece) > 1:
                    total += model(piece[None, :-1], piece[None, 1:]).item()
                    count += len(piece) - 1
        assert losses(run_dir)[1] == pytest.approx(total / count, rel=1e-5)

    def test_horizons(self):
        steps = lambda **horizon: tinyllama.TrainArgs(global_batch_tokens=1000, **horizon).steps(50_000)  # noqa: E731
        assert steps(max_tokens=7000) == steps(max_steps=7) == 7
        assert steps(max_epochs=2) == 100
        assert tinyllama.TrainArgs().steps(1) == 1_430_511

    def test_a_step_that_is_not_finite_stops_or_is_skipped(self, flags, monkeypatch, capsys):
        forward, calls = GPT.forward, []

        def poisoned(self, idx, targets=None, **kw):
            out = forward(self, idx, targets, **kw)
            calls.append(self.training)
            return out * float("nan") if sum(calls) == 6 and self.training else out

        monkeypatch.setattr(GPT, "forward", poisoned)
        flags = dict(flags, micro_batch_size=4, save_interval=1, val_data_dir=None)  # 4 micro-batches: it is in step 2
        with pytest.raises(
            ValueError, match=r"step 2 \(global sequences 16 to 32, from sequence 16 \(train_.*bin.*: loss nan"
        ):
            train(flags)
        assert [d.name for d in checkpoint.steps(flags["out_dir"] / "run")] == ["step-00000001"]

        calls.clear()
        run_dir = train(flags, name="skip", nonfinite="skip")
        assert "step 2 (global sequences 16 to 32," in capsys.readouterr().out
        a, b = (checkpoint.load_weights(run_dir / f"step-0000000{i}") for i in (6, 8))
        assert all(torch.isfinite(p).all() for p in b.values()) and not torch.equal(
            *(w["lm_head.weight"] for w in (a, b))
        )


@pytest.mark.slow
class TestInSeveralProcesses:
    @pytest.mark.filterwarnings("ignore:.*no manifest")
    def test_any_number_of_processes_gives_the_same_losses_and_resumes_any_other(self, flags):
        # Validation is where checkpoints are saved, too; of 4 ranks with micro-batches of 4, two have none for it.
        flags = dict(flags, eval_interval=6, eval_sequences=7)
        one = losses(run_dir := train(flags))
        val_losses = [row["val_loss"] for row in read_metrics(run_dir / "metrics.csv") if "val_loss" in row]
        mixed = dict(name="mixed", resume="auto")
        fsdp, grid = dict(name="fsdp", sharding="fsdp"), dict(name="grid", shard_devices=2)
        run_ranks(2, runs, flags, [dict(name="two"), fsdp, dict(mixed, stop_at_step=2)])
        run_ranks(
            4, runs, flags, [dict(name="four"), grid, dict(mixed, sharding="fsdp", shard_devices=2, stop_at_step=4)]
        )
        train(flags, **mixed, stop_at_step=6)
        run_ranks(2, runs, flags, [mixed])
        for name in ("two", "four", "fsdp", "grid", "mixed"):
            assert losses(flags["out_dir"] / name) == pytest.approx(one, rel=1e-6), name
            rows = read_metrics(flags["out_dir"] / name / "metrics.csv")
            by_step = {row["step"]: row["val_loss"] for row in rows if "val_loss" in row}
            assert [by_step[step] for step in (6, 8)] == pytest.approx(val_losses, rel=1e-6), name

    @pytest.mark.filterwarnings("ignore:.*no manifest")
    def test_what_is_not_finite_on_one_rank_is_left_out_by_all(self, flags):
        flags = dict(flags, val_data_dir=None, nonfinite="skip", name="two")
        run_ranks(2, nan_on_rank_1, flags)
        run_dir = flags["out_dir"] / "two"
        assert [step for step, loss in losses(run_dir).items() if not loss == loss] == [3]
        a, b, c = (checkpoint.load_weights(run_dir / f"step-0000000{i}")["lm_head.weight"] for i in (2, 3, 4))
        assert torch.equal(a, b) and not torch.equal(b, c) and c.isfinite().all()

    @pytest.mark.parametrize(
        "launcher",
        [
            pytest.param("lightning run model --devices=2 --accelerator=cpu --main-port={port} pretrain/tinyllama.py"),
            pytest.param("pretrain/torchrun_2x8.sh", marks=pytest.mark.long),
        ],
    )
    def test_launchers(self, flags, launcher):
        words = launcher.format(port=free_port()).split()
        flags = dict(flags, max_steps=2, warmup_steps=1, val_data_dir="null")
        environment_ = {**environment(), "NODES": "1", "GPUS": "2", "MAIN_PORT": str(free_port()), "RESTARTS": "0"}
        environment_["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        if words[0] == "lightning":  # this project's, whatever else has the name
            code = "import sys; from lit_gpt.lightning_cli import main; sys.argv[0] = 'lightning'; main()"
            words[:1] = [sys.executable, "-c", code]
        out = subprocess.run(
            [*words, *command(flags)[1:]], capture_output=True, text=True, env=environment_, cwd=ROOT, timeout=300
        )
        assert out.returncode == 0, out.stderr[-3000:]
        assert "ranks 0-1 (2 x CPU)" in out.stdout and "2 shards of each: all-gather at" in out.stdout
        assert "on 2 x cpu, fp32; optimizer and fp32 weights shared by 2" in out.stdout
        assert [d.name for d in checkpoint.steps(flags["out_dir"] / "run")] == ["step-00000002"]

    @pytest.mark.parametrize("signum, code", [(signal.SIGUSR1, 85), (signal.SIGINT, 0)])
    def test_a_signal_finishes_the_step_saves_and_ends_well(self, flags, signum, code):
        process = self.started(command(flags, max_steps=100_000, eval_interval=100_000, requeue_exit_code=code))
        time.sleep(0.5)
        process.send_signal(signum)
        rest = process.stdout.read()
        assert process.wait(timeout=60) == code and "interrupted: go on with --resume true" in rest
        assert rest.count("stopping: this step is finished and saved first") == 1
        assert "nats/token" not in rest, "whoever asked may not wait for a validation"
        newest = checkpoint.steps(flags["out_dir"] / "run")[-1]
        assert f"saved {newest}" in rest and checkpoint.check(newest)["step"] >= 1

    def test_a_second_ctrl_c_ends_at_once_also_while_a_checkpoint_is_written(self, flags):
        flags = dict(flags, max_steps=100_000, save_interval=100_000, num_workers=1)
        process = self.started(["-c", WRITES_SLOWLY, *command(flags)])
        process.send_signal(signal.SIGINT)
        assert "now it is written\n" in process.stdout
        process.send_signal(signal.SIGINT)
        assert process.stdout.read() == "interrupted: nothing was saved since the last checkpoint\n"
        assert process.wait(timeout=60) == 130
        assert [d.suffix for d in (flags["out_dir"] / "run").glob("step-*")] == [".tmp"]

    def started(self, words: list[str]) -> subprocess.Popen:
        """A run that has logged a step; what it says goes to its stdout."""
        to = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        process = subprocess.Popen([sys.executable, *words], **to, text=True, env=environment())
        assert any(line.startswith("step") for line in process.stdout)
        return process


def test_a_schedule_releases_steps_while_the_run_goes_on(flags, tmp_path, monkeypatch):
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "release_checkpoint.py").write_bytes((ROOT / "scripts/release_checkpoint.py").read_bytes())
    (tmp_path / "README.md").write_text("# Mine\n<!-- releases -->\n<!-- /releases -->\n")
    (tmp_path / "releases.yaml").write_text("steps: [2, 5]")
    monkeypatch.setattr(tinyllama, "ROOT", tmp_path)
    run_dir = train(flags, release_schedule=tmp_path / "releases.yaml", keep_checkpoints=2)
    assert [int(path.name.removeprefix("step-")) for path in checkpoint.steps(run_dir)] == [2, 5, 6, 8], "2 and 5 stay"
    deadline = time.monotonic() + 120
    while (tmp_path / "README.md").read_text().count("intermediate-step") < 2 and time.monotonic() < deadline:
        time.sleep(0.5)
    readme = (tmp_path / "README.md").read_text()
    for step in (2, 5):
        name = f"TinyLlama-0M-intermediate-step-{step}-0m"
        assert name in readme
        assert (run_dir / "releases" / name / "model.safetensors").is_file()

    (tmp_path / "releases.yaml").write_text("steps: soon")
    with pytest.raises(ValueError, match="release schedule"):
        train(flags, release_schedule=tmp_path / "releases.yaml", name="other")
