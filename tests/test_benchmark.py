"""scripts/benchmark.py on a CPU: a row for each combination, failures told, mistakes named before anything is timed."""

import json
import runpy
import shutil
from pathlib import Path

import pytest
import torch
import torch._dynamo.utils

from lit_gpt import Config

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    return runpy.run_path(str(SCRIPTS / "benchmark.py"))


def test_every_combination_is_a_row_and_a_failed_one_costs_no_other(benchmark, tmp_path, capsys):
    path = tmp_path / "rows.json"
    with pytest.raises(ValueError, match="^quack: kernels 'quack': needs a CUDA GPU; nosuch: unknown kernels 'nosuch'"):
        benchmark["step"](
            "tiny_LLaMA_demo", ["quack", "nosuch", "torch"], [1, 2], 2, steps=1, precision="fp32", json=path
        )
    rows = json.loads(path.read_text())
    assert [(row["kernels"], row["tokens"]) for row in rows] == [
        (name, tokens) for name in ("quack", "nosuch", "torch") for tokens in (256, 512)
    ]
    assert [row["tokens/s"] == "failed" for row in rows] == [True] * 4 + [False] * 2
    assert all(row["tokens/s"] > 0 and row["first step s"] > 0 and row["MFU %"] is None for row in rows[4:])
    assert "| tiny_LLaMA_demo | torch | fp32 | 512 | 2 |" in capsys.readouterr().out


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs g++")
def test_blocks_compiled_around_the_kernels_have_the_same_gradients(benchmark):
    config, cpu = Config.from_name("tiny_LLaMA_demo", n_layer=2), torch.device("cpu")
    idx = torch.randint(config.vocab_size, (2, 33), generator=torch.Generator().manual_seed(1))
    grads = []
    for compile_blocks in (False, True):
        torch._dynamo.utils.counters.clear()
        model, loss_of = benchmark["build_ours"]("torch", config, cpu, "bf16", False, compile_blocks)
        for _ in range(2):
            loss_of(idx[:, :-1], idx[:, 1:]).backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    for name, want in grads[0].items():
        assert torch.equal(grads[1][name], want), name
    torch.compiler.reset()


def test_decode_has_a_row_for_every_size_and_number_format(benchmark, tmp_path, capsys):
    path = tmp_path / "rows.json"
    sizes = dict(batch_size=[1, 2], prompt_length=[4, 254], new_tokens=[3], num_samples=2)  # 254 + 3 fit just so
    benchmark["decode"]("tiny_LLaMA_demo", **sizes, int8=[False, True], kernels="torch", json=path)
    rows = json.loads(path.read_text())
    assert [(row["by"], row["batch"], row["prompt"]) for row in rows] == [
        (name, b, p) for name in ("ours", "ours int8") for b in (1, 2) for p in (4, 254)
    ]
    assert all(row["tokens/s"] > 0 and row["tokens/s in all"] > 0 and row["first token ms"] > 0 for row in rows)
    assert "| ours int8 | 2 | 2 | 254 | 3 |" in capsys.readouterr().out


def test_decode_refuses_what_the_context_does_not_hold(benchmark, monkeypatch):
    for name in ("build", "copy_bandwidth"):
        monkeypatch.setitem(benchmark["decode"].__globals__, name, None)
    sizes = dict(prompt_length=[4, 100], new_tokens=[253, 254, 157], batch_size=[0], num_samples=-1, peer=["vllm"])
    with pytest.raises(ValueError) as caught:
        benchmark["decode"]("tiny_LLaMA_demo", **sizes)
    both = "--prompt_length {} and --new_tokens {} exceed the 257 tokens that tiny_LLaMA_demo takes"
    assert str(caught.value).split("; ") == [
        "--peer vllm: known are hf, hf-static",
        "--batch_size 0: give 1 or more",
        "--num_samples -1: give 1 or more",
        *(both.format(*pair) for pair in ((4, 254), (100, 253), (100, 254))),
    ]


def test_plan_prints_parts_and_cards(benchmark, capsys):
    benchmark["plan"]("tiny_LLaMA_1b", 8)
    out = capsys.readouterr().out
    assert "total at 16,384 tokens" in out and "A100-40G        micro-batch of 8 sequences" in out


@pytest.mark.parametrize(
    "command, arguments, message",
    [
        ("step", dict(peer="nanogpt"), "--peer nanogpt: known are litgpt, "),
        ("step", dict(precision=["bf16", "fp16"]), "--precision fp16: known are bf16, fp8, fp32"),
        (
            "step",
            dict(peer="litgpt", model="tinyllama3_2b"),
            "--peer litgpt: .* only tiny_LLaMA_1b .* not tinyllama3_2b",
        ),
        ("step", dict(peer=["hf"], model="pythia-160m"), "--peer hf and hf-liger are Llama models, pythia-160m is not"),
        ("step", dict(steps=0), "--steps must be at least 1"),
        ("step", dict(accumulation=0), "--accumulation and"),
        ("step", dict(memory_limit_gb=23.0), "--memory_limit_gb needs a GPU"),
        ("step", dict(profile=True), "--profile needs a GPU"),
        ("plan", dict(micro_batch_size=-3), "--micro_batch_size must be at least 1"),
        ("kernels", dict(), "kernels needs a GPU"),
        ("attention", dict(), "attention needs a GPU"),
    ],
)
def test_mistakes_are_named_before_anything_is_timed(benchmark, monkeypatch, command, arguments, message):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setitem(benchmark[command].__globals__, "time_step", None)
    with pytest.raises(ValueError, match=message):
        benchmark[command](**arguments)
