"""Checkpoints of a training run: complete, atomic, and independent of the number of GPUs.

    out/<run>/step-00005000/meta.json      step, tokens, configuration, loader position, the files below and their sizes
    out/<run>/step-00005000/.metadata      torch.distributed.checkpoint: which tensor is where
    out/<run>/step-00005000/__0_0.distcp   one file a rank: model (fp32), optimizer, RNG

A checkpoint is written under a temporary name and renamed when all of it is on the disk, so a folder that is called
step-N is whole or was damaged later; `check` tells which. The tensors are stored by name and global shape: any number
of ranks can load what any other number saved.
"""

import json
import re
import shutil
import subprocess
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from lit_gpt.config import Config

META = "meta.json"
# torch's remark that one process saves alone; it is what we asked for.
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized", UserWarning)


def save(run_dir: Path, step: int, model: torch.nn.Module, optimizer: torch.optim.Optimizer, meta: dict) -> Path:
    """Write run_dir/step-{step:08d}. Called by all ranks; returns when the checkpoint is whole and has its name.

    Args:
        meta: whatever else a resume needs, as JSON; "config" must be Config.to_dict() so that the checkpoint describes
            itself.

    Raises:
        OSError: (or torch's CheckpointException around it) the disk is full or read-only; earlier checkpoints are
            untouched and the temporary folder is left to the next save to clear.
    """
    final = run_dir / f"step-{step:08d}"
    temporary = final.with_name(final.name + ".tmp")
    if is_rank_zero():
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    barrier()
    dcp.save(_tensors(model, optimizer), checkpoint_id=temporary, no_dist=not dist.is_initialized())
    if is_rank_zero():
        files = {f.name: f.stat().st_size for f in sorted(temporary.iterdir())}
        meta = {"step": step, **meta, "commit": git_commit(), "torch": torch.__version__, "files": files}
        (temporary / META).write_text(json.dumps(meta, indent=1))
        shutil.rmtree(final, ignore_errors=True)  # the same step saved twice, e.g. after a resume
        temporary.rename(final)
    barrier()
    return final


def load(step_dir: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    """Restore model, optimizer and RNG in place and return the meta of `save`.

    Raises:
        ValueError: the checkpoint is not whole, or is of another model.
    """
    meta = check(step_dir)
    state = _tensors(model, optimizer)
    dcp.load(state, checkpoint_id=step_dir, no_dist=not dist.is_initialized())
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, optim_state_dict=state["optimizer"])
    torch.set_rng_state(state["rng"])
    return meta


def load_weights(step_dir: Path) -> dict[str, torch.Tensor]:
    """The model's parameters alone, whole, by name, on the CPU; no model and no process group needed."""
    check(step_dir)
    stored = dcp.FileSystemReader(step_dir).read_metadata().state_dict_metadata
    weights = {
        name.removeprefix("model."): torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in stored.items()
        if name.startswith("model.")
    }
    dcp.load({"model": weights}, checkpoint_id=step_dir, no_dist=True)
    return weights


def check(step_dir: Path) -> dict:
    """The meta of a checkpoint, after seeing that every file it lists is there in full.

    Raises:
        ValueError: naming what is missing, and the checkpoint to use instead if there is one.
    """
    try:
        meta = json.loads((step_dir / META).read_text())
        for name, size in meta["files"].items():
            actual = (step_dir / name).stat().st_size
            if actual != size:
                raise ValueError(f"{name} has {actual:,} bytes instead of {size:,}")
    except (OSError, ValueError, KeyError) as e:
        others = [d for d in steps(step_dir.parent) if d != step_dir]
        hint = f" Another checkpoint of this run: {others[-1]}" if others else ""
        raise ValueError(f"{step_dir} is not a complete checkpoint: {e}.{hint}") from e
    return meta


def config(step_dir: Path) -> Config:
    """The configuration of the model in a checkpoint."""
    return Config(**check(step_dir)["config"])


def steps(run_dir: Path) -> list[Path]:
    """The checkpoints of a run that carry their marker, by step (as a number: step-999999 is before step-11444096)."""
    found = [d for d in run_dir.glob("step-*") if re.fullmatch(r"step-\d+", d.name) and (d / META).is_file()]
    return sorted(found, key=lambda d: int(d.name.removeprefix("step-")))


def prune(run_dir: Path, keep: int, permanent_every: int) -> None:
    """Delete all but the newest `keep` checkpoints (0: keep all) and those whose step `permanent_every` divides."""
    if not is_rank_zero() or not keep:
        return
    for old in steps(run_dir)[:-keep]:
        if not permanent_every or int(old.name.removeprefix("step-")) % permanent_every:
            shutil.rmtree(old)


def _tensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer),
        "rng": torch.get_rng_state(),
    }


def is_rank_zero() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def git_commit() -> str:
    """The commit of this source tree, "+" appended when it was changed since, "" outside a repository."""
    here = Path(__file__).parent
    git = ["git", "-C", str(here), "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True, timeout=10).stdout.strip()
    except OSError:
        return ""
