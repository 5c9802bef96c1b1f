"""sft/finetune.py, run for real on the CPU with a model of a few thousand parameters."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import TINY, train_sentencepiece

from lit_gpt import Config, checkpoint
from lit_gpt.chat import ChatModel, Sampling
from lit_gpt.chat_data import ChatBatch
from lit_gpt.metrics import read_metrics
from lit_gpt.model import GPT
from lit_gpt.pretrained import Pretrained, load_model, open_pretrained, write_lit

ROOT = Path(__file__).parent.parent
spec = importlib.util.spec_from_file_location("finetune", ROOT / "sft" / "finetune.py")
finetune = importlib.util.module_from_spec(spec)
sys.modules["finetune"] = finetune  # where dataclasses look their annotations up
spec.loader.exec_module(finetune)

WORDS = "the of and to in is that for it as was with be by on not he his".split()


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """base/, whose weights were drawn as pretraining draws them, and data.jsonl: the reply repeats the question."""
    folder = tmp_path_factory.mktemp("finetune")
    config = Config(name="tiny", **{**TINY, "block_size": 128})
    model = GPT(config)
    model.init_weights(0)
    train_sentencepiece(folder / "base" / "tokenizer.model")
    write_lit(Pretrained(folder, config, dict(model.state_dict())), folder / "base")
    rng = np.random.default_rng(0)
    with (folder / "data.jsonl").open("w") as f:
        for _ in range(48):
            text = " ".join(rng.choice(WORDS, rng.integers(1, 6)))
            f.write(json.dumps({"instruction": text, "input": "", "output": text}) + "\n")
    return folder


@pytest.fixture
def flags(files, tmp_path) -> dict:
    """A run of 6 steps, in two epochs of 3, the last of which is smaller."""
    return dict(
        base=str(files / "base"),
        data=files / "data.jsonl",
        val_fraction=0.1,
        epochs=2,
        global_batch_tokens=4 * 128,
        micro_batch_size=2,
        learning_rate=1e-2,
        weight_decay=0.0,
        samples=0,
        accelerator="cpu",
        out_dir=tmp_path / "out",
        name="run",
    )


def train(flags: dict, **more) -> Path:
    args = finetune.FinetuneArgs(**{**flags, **more})
    handlers = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    try:
        finetune.main(args)
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
    return args.out_dir / args.name


def rows(run_dir: Path, column: str) -> list[float]:
    return [row[column] for row in read_metrics(run_dir / "metrics.csv") if column in row]


def test_a_run_learns_validates_answers_keeps_the_best_and_exports(flags, capsys):
    run_dir = train(flags, epochs=4, eval_interval=2, samples=1)
    losses, val = rows(run_dir, "loss"), rows(run_dir, "val_loss")
    assert losses[-1] < losses[0] - 0.3 and val[-1] < val[0] - 0.3
    steps = [int(d.name.removeprefix("step-")) for d in checkpoint.steps(run_dir)]
    best = checkpoint.check(checkpoint.steps(run_dir)[-1])["best"]
    assert best["val_loss"] == min(val[1:]) and steps == sorted({best["step"], len(losses)})
    out = capsys.readouterr().out
    assert "48 conversations" not in out and "43 of 43 conversations" in out and "\n>>> " in out
    assert (run_dir / "loss.png").exists() and not list(run_dir.glob("*.tmp"))

    exported = open_pretrained(run_dir)
    assert exported.path == run_dir / "hf" and open_pretrained(checkpoint.steps(run_dir)[-1]).tokenizer == exported.path
    weights = checkpoint.load_weights(run_dir / f"step-{best['step']:08d}")
    assert all(torch.equal(exported.weights[name], weights[name]) for name in exported.weights)
    reply = ChatModel.open(run_dir).reply([{"role": "user", "content": "the of"}], Sampling(0, max_new_tokens=4))
    assert isinstance("".join(reply), str)
    assert "chat_template" in json.loads((run_dir / "hf" / "tokenizer_config.json").read_text())


@pytest.mark.parametrize("more", [{}, {"method": "lora", "neftune_alpha": 5.0}], ids=["full", "lora with noise"])
def test_an_interrupted_run_equals_a_straight_one_to_the_bit(flags, more):
    straight = train(flags, name="straight", stop_at_step=5, **more)
    train(flags, stop_at_step=2, **more)
    resumed = train(flags, resume=True, stop_at_step=5, **more)
    assert rows(straight, "loss") == rows(resumed, "loss") and len(rows(straight, "loss")) == 5
    assert rows(straight, "tokens")[-1] == rows(resumed, "tokens")[-1]
    a, b = (checkpoint.load_weights(d / "step-00000005") for d in (straight, resumed))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_micro_batch_does_not_matter(flags):
    a, b = (rows(train(flags, name=f"m{m}", micro_batch_size=m, stop_at_step=3), "loss") for m in (1, 4))
    assert a == pytest.approx(b, rel=1e-4)


def test_adapters_and_their_merge(flags, files):
    run_dir = train(flags, method="lora", lora_rank=8, merge=True)
    assert rows(run_dir, "loss")[-1] < rows(run_dir, "loss")[0]
    names = checkpoint.load_weights(run_dir / "step-00000006")
    assert all(".A" in name or ".B" in name for name in names)  # the base is not in it
    base = open_pretrained(files / "base")
    merged, with_adapters = open_pretrained(run_dir / "hf"), ChatModel.open(run_dir / "adapters").model
    idx = torch.arange(12)[None] * 7
    torch.testing.assert_close(load_model(merged)(idx), with_adapters(idx))
    assert open_pretrained(run_dir).path == run_dir / "hf"
    shutil.rmtree(run_dir / "hf")
    found = open_pretrained(run_dir)
    assert found.path == found.tokenizer == run_dir / "adapters"
    assert torch.equal(load_model(found)(idx), with_adapters(idx))
    shutil.rmtree(run_dir / "adapters")
    for path in (run_dir, run_dir / "step-00000006"):
        with pytest.raises(ValueError, match="step-00000006 holds only the adapters of --method lora; the model is in"):
            open_pretrained(path)
    assert not torch.equal(load_model(base)(idx), with_adapters(idx))


def test_noise_is_as_strong_as_the_paper_says_and_only_in_training(files):
    model = load_model(open_pretrained(files / "base"))
    noise = finetune.Neftune(model, alpha=5.0)
    idx = torch.zeros(2, 32, dtype=torch.int64)
    cu_seqlens = torch.tensor([0, 4, 32, 64], dtype=torch.int32)
    clean = model.transformer.wte(idx)
    noise.prepare(ChatBatch(idx, idx, cu_seqlens, idx), seed=(1, 2))
    first = model.transformer.wte(idx) - clean
    noise.prepare(ChatBatch(idx, idx, cu_seqlens, idx), seed=(1, 2))
    assert torch.equal(model.transformer.wte(idx) - clean, first)
    C = model.config.n_embd
    for begin, end in ((0, 4), (4, 32), (32, 64)):
        part, bound = first.view(-1, C)[begin:end], 5.0 / ((end - begin) * C) ** 0.5
        assert 0.9 * bound < part.abs().max() <= bound * 1.001
    with torch.no_grad():
        assert torch.equal(model.transformer.wte(idx), clean)


def test_learning_rates():
    args = finetune.FinetuneArgs(base="", data=Path(), learning_rate=1.0, warmup=0.1)
    assert [finetune.learning_rate(args, s, 100) for s in (0, 9, 99)] == [0.1, 1.0, 0.0]
    args.schedule = "constant"
    assert [finetune.learning_rate(args, s, 100) for s in (0, 9, 50, 99)] == [0.1, 1.0, 1.0, 1.0]
    assert finetune.FinetuneArgs(base="", data=Path(), method="lora").peak_lr() == 2e-4


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(micro_batch_size=3), "--global_batch_tokens 512 is not a multiple of 384"),
        (dict(block_size=256), "--block_size 256 is not between 2 and the model's 128"),
        (dict(merge=True, min_lr=1.0), "--min_lr 1.0 is not between.*; --merge is for"),
        (dict(template="vicuna"), "unknown chat template 'vicuna'"),
        (dict(base="no/where/at/all"), "no/where/at/all does not exist"),
        (dict(resume=True), "holds no complete checkpoint"),
        (dict(micro_batch_size=0, devices="one"), "--micro_batch_size 0 is not positive; --devices one is neither"),
        (dict(data=Path("nothing.jsonl")), "nothing.jsonl"),
    ],
)
def test_mistakes_are_named_and_leave_nothing(flags, wrong, message):
    with pytest.raises((ValueError, OSError), match=message):
        train(flags, **wrong)
    assert not flags["out_dir"].exists()


def test_what_exists_is_not_overwritten_and_other_data_not_resumed(flags):
    train(flags, stop_at_step=1)
    with pytest.raises(ValueError, match="already holds step-00000001: pass --resume true"):
        train(flags)
    with pytest.raises(ValueError, match="other data or settings: .*block_size 128 -> 64"):
        train(flags, resume=True, block_size=64)
    with pytest.raises(ValueError, match="method full -> lora"):
        train(flags, resume=True, method="lora")


def test_data_without_a_conversation_to_train_on(flags, tmp_path):
    (tmp_path / "x.jsonl").write_text('{"instruction": "a", "output": ""}\n' * 3)
    with pytest.raises(ValueError, match="x.jsonl: no conversation is left"):
        train(flags, data=tmp_path / "x.jsonl")


def test_so_many_steps_instead_of_epochs(flags):
    run_dir = train(flags, max_steps=4)
    assert rows(run_dir, "learning_rate")[-1] == 0 and len(rows(run_dir, "loss")) == 4 and (run_dir / "hf").is_dir()


def test_without_validation_it_says_so_and_draws_what_there_is(flags, tmp_path):
    """What was held out cannot be used; and one conversation is trained on, not held out."""
    (tmp_path / "val.jsonl").write_text('{"instruction": "a", "output": ""}\n')
    (tmp_path / "one.jsonl").write_text('{"instruction": "the of", "output": "the of"}\n')
    for name, more in (("a", dict(val_data=tmp_path / "val.jsonl")), ("b", dict(data=tmp_path / "one.jsonl"))):
        with pytest.warns(UserWarning, match="no validation: .*--val_data"):
            run_dir = train(flags, epochs=1, name=name, **more)
        assert (run_dir / "loss.png").exists() and (run_dir / "hf").exists() and not rows(run_dir, "val_loss")


@pytest.mark.long
@pytest.mark.parametrize("method", ["full", "lora"])
def test_two_processes_give_the_same_losses(flags, method):
    one = rows(train(flags, name="one", method=method), "loss")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    # A resume goes on as if nothing had been.
    for launcher, more in (([], dict(devices=2, stop_at_step=2)), (torchrun, dict(resume=True))):
        two = dict(flags, name="two", method=method, **more)
        words = [word for flag, value in two.items() for word in (f"--{flag}", str(value))]
        command = [sys.executable, *launcher, str(ROOT / "sft" / "finetune.py"), *words]
        out = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert out.returncode == 0, out.stderr[-3000:]
    assert rows(flags["out_dir"] / "two", "loss") == pytest.approx(one, rel=1e-4)
    assert (flags["out_dir"] / "two" / ("hf" if method == "full" else "adapters")).is_dir()


def test_out_of_memory_is_a_line_with_the_way_out(flags, monkeypatch):
    def forward(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 24 GiB. And so on")

    monkeypatch.setattr(finetune.GPT, "forward", forward)
    with pytest.raises(ValueError, match="^CUDA out of memory.* 24 GiB. Give a smaller --micro_batch_size.* qlora$"):
        train(flags)


@pytest.mark.long
def test_the_command_line_and_its_one_line_errors(flags):
    words = [w for k, v in dict(flags, base="owner/nothing").items() for w in (f"--{k}", str(v))]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "sft" / "finetune.py"), *words]
    out = subprocess.run(command, capture_output=True, text=True, env=environment)
    lines = [line for line in out.stderr.splitlines() if "srun" not in line]  # a hint of Lightning's where SLURM is
    assert out.returncode == 1 and len(lines) == 1
    assert lines[0].startswith("error: owner/nothing: no such folder here, and not loaded")


def test_a_tokenizer_in_a_file_of_its_own(flags, files, tmp_path):
    base = tmp_path / "bare"
    shutil.copytree(files / "base", base)
    (base / "tokenizer.model").rename(tmp_path / "llama.model")
    with pytest.raises(ValueError, match="give --tokenizer_path"):
        train(flags, base=str(base))
    run_dir = train(flags, base=str(base), tokenizer_path=tmp_path / "llama.model", epochs=1)
    assert (run_dir / "hf" / "tokenizer.model").is_file()


@pytest.mark.shared
@pytest.mark.long
def test_a_model_that_could_not_chat_answers_in_the_template_and_stops(shared_data, tmp_path):
    """A model of children's stories never ends a reply; after five passes over 270 short answers it mostly does."""
    rows = [json.loads(line) for line in (shared_data / "sft" / "dolly_hhrlhf_train.jsonl").read_text().splitlines()]
    rows = sorted((r for r in rows if r["output"].strip()), key=lambda r: sum(map(len, r.values())))[:300]
    for name, part in (("train", [r for i, r in enumerate(rows) if i % 10]), ("asked", rows[::10])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    base = shared_data / "models" / "stories260k"
    flags = dict(base=str(base), data=tmp_path / "train.jsonl", val_data=tmp_path / "asked.jsonl", out_dir=tmp_path)
    flags |= dict(template="zephyr", global_batch_tokens=4096, micro_batch_size=4, learning_rate=2e-3, epochs=5)
    run_dir = train(flags, schedule="constant", accelerator="cpu", samples=0)
    losses = [row["val_loss"] for row in read_metrics(run_dir / "metrics.csv") if "val_loss" in row]
    assert min(losses) < losses[0] - 0.8

    def ended(chat: ChatModel) -> int:
        sampling, n = Sampling(temperature=1.0, top_p=1.0, max_new_tokens=200, seed=1), 0
        for row in rows[::10]:
            reply = chat.reply([{"role": "user", "content": row["instruction"]}], sampling)
            text = "".join(reply)
            n += reply.finish_reason == "stop"
            assert "<|" not in text and "</s>" not in text
        return n

    assert ended(ChatModel.open(base, template="zephyr")) == 0
    assert ended(ChatModel.open(run_dir)) >= 15  # of 30
