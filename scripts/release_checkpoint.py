"""Release intermediate checkpoints of a run: Hugging Face folders with cards, and rows in the README's table.

    python scripts/release_checkpoint.py --run out/tinyllama --step 50000
    python scripts/release_checkpoint.py --run out/tinyllama --schedule releases.yaml --follow true    # beside the run

A schedule is a YAML file, `steps: [50000, 100000, 150000]`. With --follow this waits for each step's checkpoint to be
complete, releases it, and ends after the last; it needs nothing from the training process and may be started again at
any time. Let --permanent_interval of the training divide the steps, so that they are not deleted before.
"""

import time
from pathlib import Path
from typing import Literal

import torch

from lit_gpt import checkpoint
from lit_gpt.cli import one_line_errors, parse
from lit_gpt.release import at_risk, read_schedule, read_table, release, upload
from lit_gpt.weights import read_json

README = Path(__file__).parent.parent / "README.md"


def main(
    run: Path,
    step: int | None = None,
    schedule: Path | None = None,
    follow: bool = False,
    out_dir: Path = Path("releases"),
    name: str = "TinyLlama",
    licence: str = "apache-2.0",
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    evaluation: Path | None = None,
    tokenizer_path: Path | None = None,
    readme: Path = README,
    push: bool = False,
    owner: str | None = None,
    poll_s: float = 30,
) -> None:
    """Release one step of a run, or those of a schedule.

    Args:
        run: Folder of the run.
        step: The one to release.
        schedule: File that names several, instead of step.
        follow: Wait for those that are still to come.
        out_dir: Where the folders go.
        name: What their names begin with.
        licence: For the card, in Hugging Face's spelling.
        dtype: Of the weights.
        evaluation: Results for the card, as scripts/evaluate.py --out wrote them; {step} in the name is the step's.
        tokenizer_path: Folder or file; default: the one that is kept with the run.
        readme: Its table, between the comments <!-- releases --> and <!-- /releases -->, gets a row.
        push: Upload, too; you must be logged in (hf auth login).
        owner: Of the model on the hub; default: who is logged in.
        poll_s: Seconds between two looks at the run, when following.
    """
    if (step is None) == (schedule is None):
        raise ValueError("give one of --step and --schedule")
    if not run.is_dir():
        raise FileNotFoundError(f"--run {run} does not exist")
    steps = read_schedule(schedule) if schedule else [step]
    read_table(readme)
    if follow and (soon_gone := at_risk(run, steps)):
        print(f"warning: the run will delete step {soon_gone[0]}: its --permanent_interval does not divide it")
    for step in steps:
        newest = wait_for(run, step, follow, poll_s)
        if newest is not None:
            print(f"step {step} of {run} is not there, and step {newest} is: it was deleted or never saved")
            continue
        results = read_json(Path(str(evaluation).format(step=step))) if evaluation else None
        folder = release(
            run,
            step,
            out_dir,
            prefix=name,
            licence=licence,
            dtype=getattr(torch, dtype),
            evaluation=results,
            tokenizer_path=tokenizer_path,
            readme=readme,
        )
        print(f"{folder}; its row is in {readme}")
        if push:
            print(f"https://huggingface.co/{upload(folder, owner)}")


def wait_for(run: Path, step: int, follow: bool, poll_s: float) -> int | None:
    """Until the step is there (None), or a later one is while it is not (that one)."""
    while True:
        there = [int(d.name.removeprefix("step-")) for d in checkpoint.steps(run)]
        if step in there or not follow:
            return None
        if there and there[-1] > step:
            return there[-1]
        time.sleep(poll_s)


if __name__ == "__main__":
    with one_line_errors():
        parse(main)
