"""Perplexity by length: what it measures, and that the scalings are what tells the rows apart."""

import json
import math
import signal

import numpy as np
import pytest
import torch

from lit_gpt import Config
from lit_gpt.model import GPT
from lit_gpt.perplexity import longer_config, perplexity_by_length, with_config
from lit_gpt.shards import write_shard
from tests.tiny import TINY, run_script


@pytest.fixture(scope="module")
def model() -> GPT:
    torch.manual_seed(0)
    model = GPT(Config(**{**TINY, "block_size": 16}))
    model.init_weights(0)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.0 if p.dim() == 1 else 3.0)  # at birth a model hardly attends
    return model.eval()


TOKENS = torch.arange(150) * 7 % 512


def test_rows(model):
    rows = perplexity_by_length(model, TOKENS, [16, 64, 32])
    five = ["none", "linear", "dynamic", "yarn", "llama3"]
    assert [(r.length, r.rope_scaling) for r in rows] == [(16, "none")] + [(n, s) for n in (32, 64) for s in five]
    assert {r.targets for r in rows} == {128}  # the same 128 of 149 targets each time
    assert all(r.perplexity == math.exp(r.loss) for r in rows)
    assert len({round(r.loss, 6) for r in rows}) == len(rows)


def test_a_row_is_the_mean_over_whole_sequences(model):
    losses = [model(TOKENS[None, i : i + 16], TOKENS[None, i + 1 : i + 17]) for i in range(0, 144, 16)]
    (row,) = perplexity_by_length(model, TOKENS, [16])
    assert row.loss == pytest.approx(sum(losses).item() / 144, rel=1e-6)
    assert perplexity_by_length(model, TOKENS[:33], [8, 32])[0].targets == 32


def test_the_weights_are_shared_and_the_model_is_left_alone(model):
    config = model.config
    longer = with_config(model, longer_config(config, 64, "yarn"))
    assert longer.config.rope_factor == 4 and model.config is config
    ours, theirs = (m.transformer.h[0].mlp.fc_1.weight for m in (model, longer))
    assert ours.data_ptr() == theirs.data_ptr()


def test_a_stretched_model_goes_on_as_it_is(model):
    stretched = with_config(model, model.config.stretched("yarn", 2))
    rows = perplexity_by_length(stretched, TOKENS, [32, 64])
    assert [(r.length, r.rope_scaling) for r in rows] == [(32, "none"), (64, "none")]
    assert rows[0].loss == pytest.approx(perplexity_by_length(model, TOKENS[:129], [32], ["yarn"])[0].loss, abs=1e-6)
    with pytest.raises(ValueError, match="is stretched already: yarn, 2 times"):
        perplexity_by_length(stretched, TOKENS, [64], ["linear"])


def test_too_little_text(model):
    with pytest.raises(ValueError, match="64 tokens of text are too few: sequences of 64 tokens need 65"):
        perplexity_by_length(model, TOKENS[:64], [16, 64])


@pytest.mark.slow
def test_a_longer_context_from_the_command_line_to_transformers(tmp_path, monkeypatch):
    """Pretrain, go on with a stretched context, export: the last step compares with transformers itself."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # the training's handlers would outlive it here
    tokens = np.minimum(np.random.default_rng(0).zipf(1.5, 9000), 127).astype(np.uint16)
    write_shard(tmp_path / f"train_slim_{0:010d}.bin", tokens)
    flags = [
        *("--train_data_dir", tmp_path, "--out_dir", tmp_path / "out", "--accelerator", "cpu", "--num_workers", 0),
        *("--train_mix", '{"train_slim": 1}', "--max_steps", 2, "--warmup_steps", 0, "--model", "tiny_LLaMA_demo"),
        *("--global_batch_tokens", 256, "--micro_batch_size", 1),
    ]
    short = '"n_layer": 2, "n_embd": 32, "n_head": 4, "n_query_groups": 2, "vocab_size": 128'
    long = '"block_size": 128, "rope_scaling": "yarn", "rope_factor": 4'
    model = ("--model_overrides", f'{{{short}, "block_size": 32}}')
    assert run_script("../pretrain/tinyllama.py", *flags, *model, "--name", "short") == 0
    model = ("--model_overrides", f"{{{short}, {long}}}")
    init = ("--init_from", tmp_path / "out" / "short")
    assert run_script("../pretrain/tinyllama.py", *flags, *model, *init, "--name", "long") == 0
    hf = tmp_path / "hf"
    assert run_script("convert_lit_checkpoint.py", "--checkpoint_dir", tmp_path / "out" / "long", "--out_dir", hf) == 0
    rope = json.loads((hf / "config.json").read_text())["rope_parameters"]
    assert (rope["rope_type"], rope["factor"], rope["original_max_position_embeddings"]) == ("yarn", 4, 32)
