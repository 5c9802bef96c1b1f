"""Intermediate checkpoints for the world: a Hugging Face folder with a telling name, and a row in the README's table.

folder = release(Path("out/tinyllama"), step=50_000, out_dir=Path("releases"))
# releases/TinyLlama-1.1B-intermediate-step-50k-105b
"""

import re
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from lit_gpt import checkpoint
from lit_gpt.hf_folder import write_hf_folder
from lit_gpt.model_card import evaluation_scores, losses_at, model_card, n_parameters
from lit_gpt.weights import read_json

BEGIN, END = "<!-- releases -->", "<!-- /releases -->"
HEAD = "| release | date | step | tokens | validation loss | evaluation |\n|---|---|---|---|---|---|"


def release_name(prefix: str, parameters: int, step: int, tokens: int) -> str:
    """As TinyLlama's own: TinyLlama-1.1B-intermediate-step-50k-105b."""
    size = f"{parameters / 1e9:.1f}B" if parameters >= 1e9 else f"{parameters / 1e6:.0f}M"
    count = f"{step // 1000}k" if step >= 1000 and step % 1000 == 0 else str(step)
    if tokens >= 9.995e11:
        seen = f"{tokens / 1e12:.2f}".rstrip("0").rstrip(".") + "T"
    else:
        seen = f"{tokens / 1e9:.0f}b" if tokens >= 1e9 else f"{tokens / 1e6:.0f}m"
    return f"{prefix}-{size}-intermediate-step-{count}-{seen}"


def release(
    run_dir: Path,
    step: int,
    out_dir: Path,
    *,
    prefix: str = "TinyLlama",
    licence: str = "apache-2.0",
    dtype: torch.dtype | None = None,
    evaluation: Mapping[str, Any] | None = None,
    tokenizer_path: Path | None = None,
    readme: Path | None = None,
) -> Path:
    """Convert a step of a run into out_dir/<name>, verified, with its card, and add its row to `readme`.

    A folder of that name that exists is taken as done; the row is written in any case, and replaces an older one.

    Raises:
        FileNotFoundError: the run has no complete checkpoint of this step.
        ValueError: what conversion refuses, or a readme without the two comments between which its table stands.
    """
    step_dir = find_step(run_dir, step)
    if readme is not None:
        read_table(readme)  # before minutes go into the conversion
    meta = checkpoint.check(step_dir)
    name = release_name(prefix, n_parameters(checkpoint.config(step_dir)), step, meta["tokens_seen"])
    folder = out_dir / name
    if not (folder / "config.json").is_file():
        write_hf_folder(
            step_dir,
            folder,
            dtype=dtype,
            tokenizer_path=tokenizer_path,
            card=lambda found: model_card(found, name, licence=licence, evaluation=evaluation),
        )
    if readme is not None:
        scores = evaluation_scores(evaluation) if evaluation is not None else {}
        mean = sum(score for _, score in scores.values()) / len(scores) if scores else None
        loss = losses_at(run_dir, step).get("validation")
        row = {
            "release": name,
            "date": f"{datetime.now(timezone.utc):%Y-%m-%d}",
            "step": f"{step:,}",
            "tokens": f"{meta['tokens_seen']:,}",
            "validation loss": "" if loss is None else f"{loss:.3f}",
            "evaluation": f"{mean:.4f} over {', '.join(scores)}" if scores else "",
        }
        write_row(readme, row)
    return folder


def find_step(run_dir: Path, step: int) -> Path:
    steps = {int(d.name.removeprefix("step-")): d for d in checkpoint.steps(run_dir)}
    if step not in steps:
        there = ", ".join(map(str, steps)) or "none"
        raise FileNotFoundError(f"{run_dir} holds no complete checkpoint of step {step}; there are: {there}")
    return steps[step]


def read_table(readme: Path) -> tuple[str, list[str], str]:
    """What precedes the rows of the release table, the rows, and what follows them."""
    text = readme.read_text(encoding="utf-8")
    match = re.fullmatch(f"(.*{BEGIN}\n)(.*?)({END}.*)", text, re.DOTALL)
    if match is None:
        raise ValueError(f"{readme} has no release table: put {BEGIN} and {END} on lines of their own where it belongs")
    return match[1], [line for line in match[2].splitlines() if line.startswith("| **")], match[3]


def write_row(readme: Path, row: Mapping[str, str]) -> None:
    """Add a release at the table's end, or replace its row."""
    before, rows, after = read_table(readme)
    first, *rest = row.values()
    rows = [line for line in rows if not line.startswith(f"| **{first}** |")]
    rows.append(f"| **{first}** | {' | '.join(rest)} |")
    temporary = readme.with_name(readme.name + ".tmp")
    temporary.write_text("\n".join([before.rstrip("\n"), HEAD, *rows, after]), encoding="utf-8")
    temporary.replace(readme)


def read_schedule(path: Path) -> list[int]:
    """The steps of a schedule file, `steps: [50000, 100000]` in YAML, in order.

    Raises:
        ValueError: the file says anything else.
    """
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as e:
        raise ValueError(f"{path} is not YAML: {' '.join(str(e).split())}") from e
    steps = content.get("steps") if isinstance(content, dict) and set(content) == {"steps"} else None
    if not isinstance(steps, list) or not steps or not all(type(s) is int and s > 0 for s in steps):
        raise ValueError(f"{path}: a release schedule is one line, such as `steps: [50000, 100000]`")
    return sorted(set(steps))


def at_risk(run_dir: Path, steps: list[int]) -> list[int]:
    """Those of the steps that the run will not keep for long, or not save at all, as its args.json has it."""
    file = run_dir / "args.json"
    args = read_json(file).get("args", {}) if file.is_file() else {}
    kept = args.get("permanent_interval") or 0
    if not args or not args.get("keep_checkpoints"):
        return []
    return [step for step in steps if not kept or step % kept]


def upload(folder: Path, owner: str | None = None) -> str:
    """Upload a release to the hub, as a model of the user who is logged in, or of an organisation of theirs.

    Raises:
        ValueError: nobody is logged in.
        OSError: the hub refused, or was not reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import LocalTokenNotFoundError

    api = HfApi()
    try:
        user = api.whoami()["name"]
        repo_id = f"{owner or user}/{folder.name}"
        api.create_repo(repo_id, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=folder)
    except LocalTokenNotFoundError as e:
        raise ValueError("--push: nobody is logged in to Hugging Face here; run `hf auth login` first") from e
    except Exception as e:  # the hub's errors and the network's have no common class, and all mean this
        reason = (str(e).splitlines() or [type(e).__name__])[0]
        raise OSError(f"--push: {folder} was not uploaded: {reason}") from e
    return repo_id
