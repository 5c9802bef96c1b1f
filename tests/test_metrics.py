import sys

import pytest

from lit_gpt.metrics import Metrics, plot_loss, read_metrics


def test_a_resume_drops_the_rows_that_it_repeats_and_keeps_the_rest_as_they_were(tmp_path):
    first = Metrics(tmp_path, resume_step=0)
    for step in range(1, 6):
        first.log(step, tokens=step * 100, loss=1 / 3 / step)
    first.log(5, tokens=500, val_loss=0.1)
    first.close()
    before = (tmp_path / "metrics.csv").read_text().splitlines()

    second = Metrics(tmp_path, resume_step=3)
    second.log(4, tokens=400, loss=9.0)
    second.close()
    after = (tmp_path / "metrics.csv").read_text().splitlines()
    assert after[:4] == before[:4]
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.csv")] == [1, 2, 3, 4]

    Metrics(tmp_path, resume_step=0).close()
    assert read_metrics(tmp_path / "metrics.csv") == []


def test_the_picture_is_drawn_from_what_there_is(tmp_path):
    metrics = Metrics(tmp_path, resume_step=0)
    plot_loss({"empty": metrics.path}, tmp_path / "empty.png")
    metrics.log(1, tokens=100, loss=2.0)
    metrics.log(1, tokens=100, val_loss=2.1)
    metrics.close()
    plot_loss({"run": metrics.path}, tmp_path / "loss.png", levels={"unigram entropy": 3.0})
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert {p.name for p in tmp_path.iterdir()} == {"metrics.csv", "empty.png", "loss.png"}


def test_a_new_name_becomes_a_column_and_outlives_a_resume(tmp_path):
    metrics = Metrics(tmp_path, resume_step=0)
    metrics.log(1, tokens=100, loss=2.0)
    metrics.log(2, tokens=200, val_loss=2.1, **{"eval/piqa": 0.5, "val_loss/code": 1.0})
    metrics.log(3, tokens=300, loss=1.5)
    metrics.close()
    Metrics(tmp_path, resume_step=2).log(3, tokens=300, loss=1.4)
    assert read_metrics(tmp_path / "metrics.csv") == [
        {"step": 1, "tokens": 100, "loss": 2.0},
        {"step": 2, "tokens": 200, "val_loss": 2.1, "eval/piqa": 0.5, "val_loss/code": 1.0},
        {"step": 3, "tokens": 300, "loss": 1.4},
    ]


@pytest.mark.parametrize("left", ["", "step,tokens,loss\n1,10,3.0\n2,2"])
def test_what_a_killed_run_left_is_taken_as_far_as_it_goes(tmp_path, left):
    (tmp_path / "metrics.csv").write_text(left)
    metrics = Metrics(tmp_path, resume_step=5)
    metrics.log(6, loss=2.0)
    metrics.close()
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.csv")] == ([1, 6] if left else [6])
    assert [f.name for f in tmp_path.iterdir()] == ["metrics.csv"]


@pytest.mark.parametrize("logger", ["wandb", "tensorboard"])
def test_a_logger_that_is_not_installed_says_how_to(tmp_path, monkeypatch, logger):
    monkeypatch.setitem(sys.modules, logger, None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    with pytest.raises(ImportError, match=f"--logger {logger} needs a package: pip install {logger}"):
        Metrics(tmp_path, resume_step=0, logger=logger)


class Wandb:
    """What a run tells W&B, without its server."""

    def __init__(self) -> None:
        self.rows, self.started = [], {}

    def init(self, **how):
        self.started = how
        return self

    def log(self, values, step):
        self.rows.append((step, values))

    def finish(self):
        self.rows.append("the end")


def test_wandb_gets_every_row_and_the_hyperparameters(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", wandb := Wandb())
    (tmp_path / "a").mkdir()
    metrics = Metrics(tmp_path / "a", resume_step=0, logger="wandb", hparams={"seed": 1})
    metrics.log(1, loss=2.0)
    metrics.close()
    assert wandb.rows == [(1, {"loss": 2.0}), "the end"]
    assert wandb.started["id"] == "a" and wandb.started["resume"] == "allow" and wandb.started["config"] == {"seed": 1}
