"""Runs and evaluations as tables, pictures, and one page that opens from the disk.

runs = [read_run(Path("out/tinyllama"))]
write_page(runs, Path("out/tinyllama/report.html"), refresh_s=30)
print(release_table(runs))
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

from lit_gpt.metrics import read_metrics
from lit_gpt.perplexity import Row
from lit_gpt.weights import read_json

COMMONSENSE = {
    "hellaswag": "HellaSwag",
    "openbookqa": "Obqa",
    "winogrande": "WinoGrande",
    "arc_challenge": "ARC_c",
    "arc_easy": "ARC_e",
    "boolq": "boolq",
    "piqa": "piqa",
}
"""lm_eval's names -> those of TinyLlama's table, in its order."""
INSTRUCT = {"mmlu": "MMLU", "bbh_fewshot": "BBH", "humaneval": "HumanEval", "drop": "DROP"}
SCORE = {"winogrande": "acc", "boolq": "acc", "mmlu": "acc", "bbh_fewshot": "exact_match"}
SCORE |= {"humaneval": "pass@1", "drop": "f1"}
"""The metric that a table shows; acc_norm for the others, as TinyLlama does."""
TEMPLATE = Path(__file__).with_name("report.html")
MOST_POINTS = 800
"""Of a curve in the page; longer ones are averaged in pieces."""


@dataclass
class Evaluation:
    """One results.json of scripts/evaluate.py."""

    path: Path
    checkpoint: str
    scores: dict[str, tuple[float, float | None]]
    """Task -> score and standard error, in percent."""
    step: int | None = None
    tokens: int | None = None
    date: str = ""
    limit: int | None = None
    """Questions of each task, where not all were asked."""

    @property
    def average(self) -> float | None:
        """Of the seven commonsense tasks, where all are there."""
        if not COMMONSENSE.keys() <= self.scores.keys():
            return None
        return sum(self.scores[task][0] for task in COMMONSENSE) / len(COMMONSENSE)


@dataclass
class Run:
    """One folder of pretrain/tinyllama.py, or a model that was only evaluated."""

    name: str
    rows: list[dict[str, float]] = field(default_factory=list)
    """Of metrics.csv."""
    evaluations: list[Evaluation] = field(default_factory=list)

    def curve(self, column: str) -> list[tuple[float, float]]:
        """(tokens, value) of a column of metrics.csv, at most MOST_POINTS, each the mean of a piece."""
        points = [(row["tokens"], row[column]) for row in self.rows if column in row]
        size = -(-len(points) // MOST_POINTS)
        pieces = [points[i : i + size] for i in range(0, len(points), size or 1)]
        return [(piece[-1][0], sum(value for _, value in piece) / len(piece)) for piece in pieces]

    def columns(self, prefix: str) -> list[str]:
        return list(dict.fromkeys(c for row in self.rows for c in row if c.startswith(prefix)))


def read_run(folder: Path) -> Run:
    """metrics.csv of a run, and every results file (results*.json) in it and in its checkpoints.

    Raises:
        FileNotFoundError: neither is there.
    """
    files = sorted({*folder.glob("results*.json"), *folder.glob("*/results*.json")})
    if not files and not (folder / "metrics.csv").is_file():
        raise FileNotFoundError(f"{folder} is no run: neither metrics.csv nor results*.json is there")
    evaluations = [read_evaluation(file) for file in files]
    return Run(folder.name, read_metrics(folder / "metrics.csv"), sorted(evaluations, key=lambda e: e.step or 0))


def read_evaluation(file: Path) -> Evaluation:
    """Raises ValueError where `file` is no results file of scripts/evaluate.py (or of lm_eval)."""
    content = read_json(file)
    results, about = content.get("results"), content.get("config") or {}
    if not isinstance(results, dict):
        raise ValueError(f'{file} is not a results file: it has no "results"')
    scores = {}
    for task, values in results.items():
        name = task.removesuffix("_local")
        for metric in (SCORE.get(name, "acc_norm"), "acc"):
            found = [(key, value) for key, value in values.items() if key.split(",")[0] == metric]
            if found:
                key, value = found[0]
                stderr = values.get(key.replace(",", "_stderr,", 1))
                scores[name] = (100 * value, 100 * stderr if isinstance(stderr, float) else None)
                break
    checkpoint = about.get("checkpoint") or content.get("model_name") or file.stem
    facts = {key: about.get(key) for key in ("step", "tokens", "limit")}
    return Evaluation(file, checkpoint, scores, date=about.get("date") or "", **facts)


# --- tables ----------------------------------------------------------------------------------------------------------


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table; "" where it would have no rows."""
    if not rows:
        return ""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def markdown_of(rows: list[dict]) -> str:
    """Rows of named values, not all of which have every name."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    return markdown(columns, [[str(row.get(column, "")) for column in columns] for row in rows])


def release_table(runs: list[Run]) -> str:
    """Date, checkpoint, tokens, step and commonsense average of every evaluation that has one, by tokens."""
    header = ["Date", "Checkpoint", "Tokens", "Step", "Commonsense Avg"]
    found = [e for run in runs for e in run.evaluations if e.average is not None]
    return markdown(header, [release_row(e) for e in sorted(found, key=lambda e: e.tokens or 0)])


def release_row(e: Evaluation) -> list[str]:
    subset = f" ({e.limit} questions a task)" if e.limit else ""
    step = f"{e.step:,}" if e.step is not None else "--"
    return [e.date[:10], short(e.checkpoint), in_units(e.tokens), step, f"{e.average:.2f}{subset}"]


def score_table(runs: list[Run], names: dict[str, str], mean: bool) -> str:
    """The scores of every evaluation on these tasks, ± their standard errors; rows without any are left out."""
    rows = []
    for e in (e for run in runs for e in run.evaluations):
        cells = ["--" if task not in e.scores else with_error(*e.scores[task]) for task in names]
        if set(cells) != {"--"}:
            average = [f"{e.average:.2f}" if e.average is not None else "--"] if mean else []
            rows.append([short(e.checkpoint), in_units(e.tokens), *cells, *average])
    return markdown(["Model", "Tokens", *names.values(), *(["avg"] if mean else [])], rows)


def with_error(value: float, stderr: float | None) -> str:
    return f"{value:.2f}" if stderr is None else f"{value:.2f} ± {stderr:.2f}"


def short(checkpoint: str) -> str:
    """run/step-00005000 of a path."""
    return "/".join(Path(checkpoint).parts[-2:]) if "step-" in Path(checkpoint).name else Path(checkpoint).name


def in_units(tokens: float | None) -> str:
    if tokens is None:
        return "--"
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if tokens >= size:
            return f"{tokens / size:.3g}{unit}"
    return f"{tokens:.0f}"


def replace_between_marks(text: str, name: str, content: str) -> str:
    """`text` with what stands between <!-- name --> and <!-- /name --> replaced.

    Raises:
        ValueError: the marks are not there.
    """
    head, begin, rest = text.partition(f"<!-- {name} -->")
    _, end, tail = rest.partition(f"<!-- /{name} -->")
    if not end:
        raise ValueError(f"no <!-- {name} --> .. <!-- /{name} --> to write between")
    return f"{head}{begin}\n\n{content}\n\n{end}{tail}"


# --- pictures --------------------------------------------------------------------------------------------------------


def plot_scores(runs: list[Run], out: Path, references: dict[str, list[tuple[float, float]]] | None = None) -> bool:
    """Draw commonsense averages against tokens. False where there is nothing to draw.

    Args:
        references: name -> (tokens, average in percent), drawn in gray.
    """
    curves = {run.name: scores_by_tokens(run) for run in runs}
    curves = {name: points for name, points in curves.items() if points}
    if not curves:
        return False
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(8, 4.5), dpi=150)
    for name, points in (references or {}).items():
        ax.plot(*zip(*points, strict=True), color="gray", marker="s", ms=3, lw=1, ls="--", label=name)
    for i, (name, points) in enumerate(curves.items()):
        ax.plot(*zip(*points, strict=True), color=f"C{i}", marker="o", ms=4, lw=1.8, label=name)
    ax.axhline(CHANCE, color="gray", lw=1, ls=":")
    ax.annotate(f"chance {CHANCE:.1f}", (0.995, CHANCE), xycoords=("axes fraction", "data"), ha="right", va="bottom")
    ax.set(xlabel="tokens", ylabel="commonsense average (%)")
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter(lambda tokens, _: in_units(tokens))
    ax.grid(alpha=0.3)
    ax.legend(loc="upper left")
    fig.tight_layout()
    temporary = out.with_name(f".{out.name}.tmp{out.suffix}")
    fig.savefig(temporary)
    plt.close(fig)
    temporary.replace(out)
    return True


CHANCE = 100 * (1 / 4 + 1 / 4 + 1 / 2 + 1 / 4 + 1 / 4 + 1 / 2 + 1 / 2) / 7
"""What guessing gets on average: four choices or two."""


def scores_by_tokens(run: Run) -> list[tuple[float, float]]:
    """Commonsense averages in percent: of its results files, else of its own evaluations while it trained, which ask
    fewer questions."""
    after = [(float(e.tokens), e.average) for e in run.evaluations if e.average is not None and e.tokens]
    return sorted(after) or [(tokens, 100 * value) for tokens, value in run.curve("eval/commonsense")]


def plot_perplexity(models: dict[str, Sequence[Row]], out: Path, block_size: int) -> None:
    """Draw perplexity against the length of the sequences, a curve for each model and rope scaling.

    Args:
        models: name -> rows of perplexity.perplexity_by_length.
        block_size: what the model was trained on, a vertical line.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(8, 4.5), dpi=150)
    for name, rows in models.items():
        trained = [row for row in rows if row.length <= block_size]
        for scaling in dict.fromkeys(row.rope_scaling for row in rows):
            beyond = [row for row in rows if row.length > block_size and row.rope_scaling == scaling]
            curve = [*trained, *beyond]  # up to block_size nothing is scaled: all curves begin alike
            label = name if scaling == "none" else f"{name}, {scaling}"
            ax.plot([r.length for r in curve], [r.perplexity for r in curve], marker="o", ms=4, label=label)
    ax.axvline(block_size, color="gray", ls="--", lw=1)
    lengths = sorted({row.length for rows in models.values() for row in rows})
    values = [row.perplexity for rows in models.values() for row in rows]
    scale = "log" if max(values) > 5 * min(values) else "linear"
    ax.set(xlabel="tokens in a sequence", ylabel="perplexity", xscale="log", yscale=scale)
    ax.set_xticks(lengths, map(str, lengths))
    ax.xaxis.minorticks_off()
    ax.grid(alpha=0.3)
    ax.legend()
    fig.tight_layout()
    fig.savefig(out)
    plt.close(fig)


# --- the page --------------------------------------------------------------------------------------------------------


def write_page(runs: list[Run], out: Path, *, refresh_s: int = 0) -> None:
    """One HTML file with everything in it, for any browser; it needs no server and no network.

    Args:
        refresh_s: the page loads itself anew this often, for runs that go on; 0: never.
    """
    content = {
        "updated": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC"),
        "refresh_s": refresh_s,
        "chance": CHANCE,
        "runs": [_page_run(run) for run in runs],
    }
    # "</script>" in a run's name must not end the script, nor may NaN, which is no JSON.
    data = json.dumps(_finite(content), allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    refresh = f'<meta http-equiv="refresh" content="{refresh_s}">' if refresh_s else ""
    page = TEMPLATE.read_text(encoding="utf-8").replace("<!--REFRESH-->", refresh).replace("/*DATA*/null", data)
    temporary = out.with_name(f".{out.name}.tmp")
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(out)


def _page_run(run: Run) -> dict:
    last = [row for row in run.rows if "loss" in row]
    return {
        "name": run.name,
        "loss": run.curve("loss"),
        "validation": {c.removeprefix("val_loss").removeprefix("/"): run.curve(c) for c in run.columns("val_loss")},
        "speed": run.curve("tokens_per_s"),
        "learning_rate": run.curve("learning_rate"),
        "grad_norm": run.curve("grad_norm"),
        "average": scores_by_tokens(run),
        "tasks": {c.removeprefix("eval/"): run.curve(c) for c in run.columns("eval/") if c != "eval/commonsense"},
        "last": last[-1] if last else {},
        "evaluations": [
            {
                "checkpoint": short(e.checkpoint),
                "date": e.date,
                "tokens": e.tokens,
                "step": e.step,
                "limit": e.limit,
                "average": e.average,
                "scores": e.scores,
            }
            for e in run.evaluations
        ],
    }


def _finite(value):
    """NaN and infinities, which JSON cannot say, become null."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not abs(value) < float("inf") else value
