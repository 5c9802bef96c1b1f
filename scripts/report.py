"""Tables, pictures and a page of runs and their evaluations.

    python scripts/report.py --runs out/tinyllama,out/other --out report    # report/report.html and pictures
    python scripts/report.py --runs out/tinyllama --out report --watch 60      # again every minute, while it trains
    python scripts/report.py --runs out/tinyllama --out report --update EVAL.md

A run is a folder of pretrain/tinyllama.py; the results of scripts/evaluate.py that lie in it or in its checkpoints, as
results*.json, belong to it.
"""

import sys
import time
from pathlib import Path

from lit_gpt.cli import one_line_errors, parse
from lit_gpt.metrics import plot_loss
from lit_gpt.report import (
    COMMONSENSE,
    INSTRUCT,
    Run,
    plot_scores,
    read_evaluation,
    read_run,
    release_table,
    replace_between_marks,
    score_table,
    write_page,
)

# Commonsense averages by tokens, from TinyLlama's EVAL.md (see EVAL.md here).
TINYLLAMA = [(103e9, 46.11), (503e9, 48.28), (1007e9, 50.22), (1.5e12, 51.29), (2e12, 51.64)]
TINYLLAMA += [(2.5e12, 53.86), (3e12, 52.99)]
NOTHING = "None yet."


def main(
    out: Path,
    runs: list[Path] | None = None,
    results: list[Path] | None = None,
    update: Path | None = None,
    references: bool = True,
    watch: int = 0,
) -> None:
    """Tables, pictures and a page of runs and their evaluations.

    Args:
        out: Folder for report.html, loss.png, scores.png and tables.md.
        runs: Folders of runs; loss curves are drawn over each other.
        results: Results files of models that belong to no run.
        update: A file, such as EVAL.md, whose tables between <!-- releases --> and <!-- /releases -->, <!-- commonsense
            --> and <!-- instruct --> are to be written anew.
        references: Draw TinyLlama's published averages beside ours.
        watch: Do it again every so many seconds, and let the page load itself anew; end it with Ctrl-C.
    """
    if not runs and not results:
        raise ValueError("nothing to report on: give --runs or --results")
    if watch < 0:
        raise ValueError(f"--watch {watch}: give seconds, or 0 to write the report once")
    while True:
        read = [read_run(folder) for folder in runs or []]
        read += [Run(e.checkpoint, [], [e]) for e in map(read_evaluation, results or [])]
        curves = {run.name: folder / "metrics.csv" for run, folder in zip(read, runs or [], strict=False)}
        write_report(read, curves, out, update, references, watch)
        if not watch:
            break
        print(f"written {time.strftime('%H:%M:%S')}; again in {watch} s, Ctrl-C ends it", file=sys.stderr, flush=True)
        time.sleep(watch)
    print(f"{out / 'report.html'}: {', '.join(run.name for run in read)}")


def write_report(
    runs: list[Run], curves: dict[str, Path], out: Path, update: Path | None, references: bool, refresh_s: int
) -> None:
    tables = {
        "releases": release_table(runs),
        "commonsense": score_table(runs, COMMONSENSE, mean=True),
        "instruct": score_table(runs, INSTRUCT, mean=False),
    }
    if update is not None:
        text = update.read_text(encoding="utf-8")
        for name, table in tables.items():
            text = replace_between_marks(text, name, table or NOTHING)
        update.write_text(text, encoding="utf-8")
    out.mkdir(parents=True, exist_ok=True)
    found = "\n\n".join(table for table in tables.values() if table)
    (out / "tables.md").write_text(f"{found or NOTHING}\n", encoding="utf-8")
    if curves:
        plot_loss(curves, out / "loss.png")
    plot_scores(runs, out / "scores.png", {"TinyLlama, published": TINYLLAMA} if references else None)
    write_page(runs, out / "report.html", refresh_s=refresh_s)


if __name__ == "__main__":
    with one_line_errors():
        parse(main)
