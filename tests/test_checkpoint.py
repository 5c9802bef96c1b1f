import json

import pytest
import torch

from lit_gpt import Config, checkpoint
from lit_gpt.model import GPT
from lit_gpt.optim import param_groups
from lit_gpt.pretrained import open_pretrained

CONFIG = Config(
    "test", block_size=16, vocab_size=64, n_layer=2, n_embd=32, n_head=4, n_query_groups=2, intermediate_size=48
)


def a_run(seed: int, steps: int = 2):
    model = GPT(CONFIG)
    model.init_weights(seed)
    optimizer = torch.optim.AdamW(param_groups(model, 0.1), lr=1e-2)
    for step in range(steps):
        idx = torch.randint(0, 64, (2, 17), generator=torch.Generator().manual_seed(step))
        model(idx[:, :-1], idx[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def save(run_dir, step, model, optimizer):
    return checkpoint.save(run_dir, step, model, optimizer, {"config": CONFIG.to_dict()})


def test_what_is_loaded_is_what_was_saved(tmp_path):
    model, optimizer = a_run(seed=1)
    torch.manual_seed(5)
    path = save(tmp_path, 7, model, optimizer)
    expected_draw = torch.rand(3)

    other, other_optimizer = a_run(seed=2, steps=0)
    meta = checkpoint.load(path, other, other_optimizer)
    assert torch.equal(torch.rand(3), expected_draw)  # RNG
    assert meta["step"] == 7 and checkpoint.config(path) == CONFIG
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name
        for key, value in optimizer.state[p].items():
            assert torch.equal(value, other_optimizer.state[q][key]), (name, key)
    weights = checkpoint.load_weights(path)
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(weights[k], v) for k, v in model.state_dict().items())


def test_a_run_is_its_newest_checkpoint_whatever_was_made_of_an_older_one(tmp_path):
    """PRETRAIN.md writes hf/ into the run; for what fine-tuning leaves there see test_finetune.py."""
    model, optimizer = a_run(seed=1)
    newest = save(tmp_path, 7, model, optimizer)
    (tmp_path / "hf").mkdir()
    assert open_pretrained(tmp_path).path == newest


def test_the_newest_is_by_number_and_unfinished_ones_do_not_count(tmp_path):
    for name in ("step-999999", "step-11444096", "step-00000005", "step-20000000.tmp", "step-x"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "meta.json").write_text('{"files": {}}')
    (tmp_path / "step-30000000").mkdir()  # no marker
    names = [d.name for d in checkpoint.steps(tmp_path)]
    assert names == ["step-00000005", "step-999999", "step-11444096"]


@pytest.mark.parametrize("damage", ["truncate", "remove", "meta", "not there"])
def test_an_incomplete_checkpoint_is_refused_and_another_named(tmp_path, damage):
    model, optimizer = a_run(seed=1, steps=1)
    save(tmp_path, 1, model, optimizer)
    path = save(tmp_path, 2, model, optimizer)
    data = next(path.glob("*.distcp"))
    if damage == "truncate":
        data.write_bytes(data.read_bytes()[:-100])
    elif damage == "remove":
        data.unlink()
    elif damage == "meta":
        (path / "meta.json").write_text('{"step": 2, "fil')
    else:
        path = tmp_path / "step-00000099"
    with pytest.raises(ValueError, match=r"not a complete checkpoint.*Another checkpoint of this run: .*step-0"):
        checkpoint.load(path, model, optimizer)


def test_a_failed_save_leaves_the_earlier_checkpoint_and_no_new_one(tmp_path, monkeypatch):
    model, optimizer = a_run(seed=1, steps=1)
    save(tmp_path, 1, model, optimizer)

    def full(*_args, **_kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoint.dcp, "save", full)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, 2, model, optimizer)
    assert [d.name for d in checkpoint.steps(tmp_path)] == ["step-00000001"]
    checkpoint.check(tmp_path / "step-00000001")


def test_pruning_keeps_the_newest_and_the_permanent_ones(tmp_path):
    for step in (10, 20, 30, 40, 50):
        (tmp_path / f"step-{step:08d}").mkdir()
        (tmp_path / f"step-{step:08d}" / "meta.json").write_text(json.dumps({"files": {}}))
    checkpoint.prune(tmp_path, keep=2, permanent_every=20)
    assert [d.name[-2:] for d in checkpoint.steps(tmp_path)] == ["20", "40", "50"]
    checkpoint.prune(tmp_path, keep=0, permanent_every=20)
    assert len(checkpoint.steps(tmp_path)) == 3
