"""What a run says about itself: metrics.csv always, loss.png, and W&B or TensorBoard on request."""

import csv
from pathlib import Path
from typing import Any

FIELDS = (
    "step",
    "tokens",
    "loss",
    "learning_rate",
    "grad_norm",
    "tokens_per_s",
    "mfu",
    "data_wait_s",
    "val_loss",
    "val_bits_per_byte",
)


class Metrics:
    """Rows of run_dir/metrics.csv, mirrored to the loggers that were asked for. Use it on rank 0 alone."""

    def __init__(self, run_dir: Path, resume_step: int, logger: str = "csv", hparams: dict | None = None) -> None:
        """
        Args:
            resume_step: rows of later steps, which the run is about to repeat, are dropped. 0 starts a new file.
            logger: "csv", "wandb" or "tensorboard"; the file is written in every case.

        Raises:
            ImportError: the logger is not installed.
        """
        self.path = run_dir / "metrics.csv"
        rows, fields = [], list(FIELDS)
        if resume_step and self.path.is_file():
            with self.path.open(newline="") as f:
                reader = csv.DictReader(f)
                # The last row of a run that was killed may lack its end.
                rows = [row for row in reader if None not in row.values() and int(row["step"]) <= resume_step]
                fields = list(dict.fromkeys((*FIELDS, *(reader.fieldnames or ()))))
        self._write(fields, rows)
        self._wandb = self._tensorboard = None
        if logger == "wandb":
            try:
                import wandb
            except ImportError as e:
                raise ImportError("--logger wandb needs a package: pip install wandb") from e
            name = run_dir.name
            self._wandb = wandb.init(
                project="tinyllama", name=name, id=name, resume="allow", dir=run_dir, config=hparams
            )
        elif logger == "tensorboard":
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as e:
                raise ImportError("--logger tensorboard needs a package: pip install tensorboard") from e
            self._tensorboard = SummaryWriter(run_dir / "tensorboard", purge_step=resume_step + 1)

    def _write(self, fields: list[str], rows: list[dict]) -> None:
        temporary = self.path.with_suffix(".csv.tmp")  # a run that is killed here keeps its history
        with temporary.open("w", newline="") as f:
            whole = csv.DictWriter(f, fields)
            whole.writeheader()
            whole.writerows(rows)
        temporary.replace(self.path)
        self._file = self.path.open("a", newline="")
        self._csv = csv.DictWriter(self._file, fields)

    def log(self, step: int, **values: Any) -> None:
        """Add a row. A name that is new becomes a column, behind the others."""
        if new := [name for name in values if name not in self._csv.fieldnames]:
            self._file.close()
            with self.path.open(newline="") as f:
                rows = list(csv.DictReader(f))
            self._write([*self._csv.fieldnames, *new], rows)
        self._csv.writerow({"step": step, **values})
        self._file.flush()
        if self._wandb is not None:
            self._wandb.log(values, step=step)
        if self._tensorboard is not None:
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        if self._wandb is not None:
            self._wandb.finish()
        if self._tensorboard is not None:
            self._tensorboard.close()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of a metrics.csv, each with the columns that it has a value for; [] where there is no file yet."""
    if not path.is_file():
        return []
    with path.open(newline="") as f:
        return [{k: float(v) for k, v in row.items() if v not in ("", None)} for row in csv.DictReader(f)]


def plot_loss(runs: dict[str, Path], out: Path, levels: dict[str, float] | None = None) -> None:
    """Draw training and validation loss against tokens.

    Args:
        runs: label -> metrics.csv.
        out: the picture, its format from the suffix.
        levels: label -> loss in nats of a horizontal line to compare with.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import EngFormatter

    fig, ax = plt.subplots(figsize=(8, 4.5), dpi=150)
    for i, (label, path) in enumerate(runs.items()):
        rows = read_metrics(path)
        train = [(r["tokens"], r["loss"]) for r in rows if "loss" in r]
        val = [(r["tokens"], r["val_loss"]) for r in rows if "val_loss" in r]
        if train:
            ax.plot(*zip(*train, strict=True), color=f"C{i}", alpha=0.5, lw=1, label=f"{label}: training")
        if val:
            ax.plot(*zip(*val, strict=True), color=f"C{i}", marker="o", ms=3, lw=1.8, label=f"{label}: validation")
    for label, level in (levels or {}).items():
        ax.axhline(level, color="gray", ls="--", lw=1)
        ax.annotate(f"{label} {level:.2f}", (0.5, level), xycoords=("axes fraction", "data"), ha="center", va="bottom")
    ax.set(xlabel="tokens", ylabel="loss (nats per token)")
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    ax.grid(alpha=0.3)
    if ax.get_legend_handles_labels()[0]:
        ax.legend(loc="upper right")
    fig.tight_layout()
    temporary = out.with_name(f".{out.name}.tmp{out.suffix}")  # a viewer never meets half a picture
    fig.savefig(temporary)
    plt.close(fig)
    temporary.replace(out)
