"""Checkpoints of a training run: complete, atomic, and independent of the number of GPUs.

    out/<run>/step-00005000/meta.json      step, tokens, configuration, loader position, the files below, checksums
    out/<run>/step-00005000/.metadata      torch.distributed.checkpoint: which tensor is where
    out/<run>/step-00005000/__0_0.distcp   one file a rank: model (fp32), optimizer, RNG

A checkpoint is written under a temporary name and renamed when all of it is on the disk, so a folder that is called
step-N is whole or was damaged later; `check` tells which. The tensors are stored by name and global shape: any number
of ranks can load what any other number saved, however it shards its weights.

    checkpoints = Checkpointer(run_dir, keep=3, permanent_every=50_000)
    checkpoints.save(step, model, optimizer, meta)      # copies to host memory; a thread writes while training goes on
    checkpoints.close()                                 # waits for the last one
"""

import json
import os
import re
import shutil
import subprocess
import threading
import time
import warnings
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from lit_gpt.config import Config
from lit_gpt.optim import init_adam
from lit_gpt.sharding import ShardedWeights
from lit_gpt.shards import file_checksum

META = "meta.json"
# torch's remark that one process saves alone; it is what we asked for.
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized", UserWarning)


class Checkpointer:
    """Saves a run's checkpoints in the background and deletes old ones. Made, and called, by all ranks together.

    `save` copies the tensors to host memory (pinned, kept for the next time) and returns. A failed write, a full disk
    say, harms neither the run nor earlier checkpoints: it is reported, and training may go on.

    Args:
        keep, permanent_every, permanent: see `prune`.
        report: gets a line for each checkpoint that was written, or was not; called on rank 0.
        saved: gets the step of each checkpoint that was written; called on rank 0.
    """

    def __init__(
        self,
        run_dir: Path,
        keep: int = 0,
        permanent_every: int = 0,
        permanent: Collection[int] = (),
        report: Callable[[str], None] = print,
        saved: Callable[[int], None] = lambda step: None,
    ) -> None:
        self.run_dir, self.keep, self.permanent_every, self.permanent = run_dir, keep, permanent_every, permanent
        self.report, self.saved = report, saved
        # Of its own, so that the thread's messages never meet the training's.
        self.group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self.staged: dict[str, Any] | None = None
        self.thread: threading.Thread | None = None
        self.error: Exception | None = None
        if is_rank_zero():
            for unfinished in run_dir.glob("step-*.tmp"):  # of a run that was killed
                shutil.rmtree(unfinished, ignore_errors=True)

    def reserve(self, weights: Any, optimizer: torch.optim.AdamW) -> None:
        """Pin the host memory for the first save, in the background: it takes seconds."""
        init_adam(optimizer)
        state = tensors(weights, optimizer)
        self.thread = threading.Thread(target=lambda: self._stage(state, copy=False), name="pin")
        self.thread.start()

    def save(self, step: int, weights: Any, optimizer: torch.optim.Optimizer, meta: dict) -> float:
        """Save as step-{step:08d}, in the background; waits first for the checkpoint before, if it is not yet written.

        Returns: the seconds for which it held up training.
        """
        t0 = time.perf_counter()
        self.wait()
        self._stage(tensors(weights, optimizer), copy=True)
        held_up_s = time.perf_counter() - t0
        self.thread = threading.Thread(target=self._write, args=(step, meta, held_up_s), name="checkpoint")
        self.thread.start()
        return held_up_s

    def wait(self) -> None:
        if self.thread is not None:
            self.thread.join()
            self.thread = None

    def close(self) -> None:
        """Wait for the last checkpoint. Raises: OSError if it could not be written."""
        self.wait()
        if self.error is not None:
            raise self.error

    def _stage(self, state: dict, copy: bool) -> None:
        if self.staged is None:
            self.staged = host_buffers(state)
        if copy:
            for (_, source), (_, target) in zip(leaves(state), leaves(self.staged), strict=True):
                local(target).copy_(local(source), non_blocking=True)
            if torch.cuda.is_available():
                torch.cuda.synchronize()

    def _write(self, step: int, meta: dict, held_up_s: float) -> None:
        t0 = time.perf_counter()
        try:
            path = write(self.run_dir, step, self.staged, meta, self.group)
            if is_rank_zero():
                prune(self.run_dir, self.keep, self.permanent_every, self.permanent)
                self.report(
                    f"step {step}: saved {path}; training waited {held_up_s:.2f} s, writing took "
                    f"{time.perf_counter() - t0:.1f} s"
                )
                self.saved(step)
            self.error = None
        except (OSError, ValueError) as e:
            self.error = e
            if is_rank_zero():
                older = steps(self.run_dir)
                self.report(
                    f"step {step}: NOT saved: {e}. Training goes on; the newest checkpoint is "
                    f"{older[-1].name if older else 'none'}"
                )


def save(run_dir: Path, step: int, weights: Any, optimizer: torch.optim.Optimizer, meta: dict) -> Path:
    """Write run_dir/step-{step:08d}. Called by all ranks; returns when the checkpoint is whole and has its name.

    Args:
        weights: a module, or lit_gpt.sharding's ShardedWeights.
        meta: whatever else a resume needs, as JSON; "config" must be Config.to_dict() so that the checkpoint describes
            itself.

    Raises:
        OSError: the disk is full or read-only; earlier checkpoints are untouched and nothing half-written is left.
    """
    return write(run_dir, step, tensors(weights, optimizer), meta, None)


def write(run_dir: Path, step: int, state: dict, meta: dict, group: dist.ProcessGroup | None) -> Path:
    """`save` for tensors that are already out of the optimizer's reach."""
    final = run_dir / f"step-{step:08d}"
    temporary = final.with_name(final.name + ".tmp")
    try:
        together(lambda: _begin(temporary, state), group, on_rank_zero=True)
        try:
            dcp.save(
                state,
                storage_writer=dcp.FileSystemWriter(temporary),
                process_group=group,
                no_dist=not dist.is_initialized(),
            )
        except CheckpointException as e:  # every rank gets it; it wraps what happened on some of them
            raise OSError(f"{temporary}: {next(iter(e.failures.values()))[0]}") from e
        mine = f"__{dist.get_rank() if dist.is_initialized() else 0}_"
        files = together(
            lambda: {
                f.name: {"bytes": f.stat().st_size, "xxh3_64": file_checksum(f)}
                for f in sorted(temporary.iterdir())
                if f.name.startswith(mine) or (is_rank_zero() and not f.name.startswith("__"))
            },
            group,
        )
        meta = {"step": step, **meta, "commit": git_commit(), "torch": torch.__version__, "files": files}
        together(lambda: _finish(temporary, final, meta), group, on_rank_zero=True)
    except OSError:
        if is_rank_zero():
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def _begin(temporary: Path, state: dict) -> None:
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    needed = sum(t.numel() * t.element_size() for _, t in leaves(state))
    free = shutil.disk_usage(temporary).free
    if needed > free:
        raise OSError(
            f"{temporary.parent}: the checkpoint needs {needed / 1e9:.2f} GB and {free / 1e9:.2f} GB are free"
        )


def _finish(temporary: Path, final: Path, meta: dict) -> None:
    with (temporary / META).open("w") as f:
        f.write(json.dumps(meta, indent=1))
        f.flush()
        os.fsync(f.fileno())
    if final.exists():  # the same step once more, after a resume from an earlier one
        old = final.with_name(final.name + ".old.tmp")
        final.rename(old)
        temporary.rename(final)
        shutil.rmtree(old, ignore_errors=True)
    else:
        temporary.rename(final)


def together(action: Callable[[], Any], group: dist.ProcessGroup | None, on_rank_zero: bool = False) -> Any:
    """Run `action` on all ranks, or on rank 0, and merge the dictionaries that it returns. If it fails on one it fails
    on all, so that none waits for another that has given up.

    Raises: OSError.
    """
    result, problem = {}, None
    try:
        if not on_rank_zero or is_rank_zero():
            result = action() or {}
    except OSError as e:
        problem = str(e)
    everyones = [(result, problem)]
    if dist.is_initialized():
        everyones = [None] * dist.get_world_size()
        dist.all_gather_object(everyones, (result, problem), group=group)
    for _, problem in everyones:
        if problem:
            raise OSError(problem)
    return {k: v for result, _ in everyones for k, v in result.items()}


def load(step_dir: Path, weights: Any, optimizer: torch.optim.Optimizer) -> dict:
    """Restore model, optimizer and RNG in place and return the meta of `save`. The files' checksums are compared.

    Raises:
        ValueError: the checkpoint is not whole, or is of another model; model and optimizer may be overwritten.
    """
    meta = check(step_dir)
    if isinstance(optimizer, torch.optim.AdamW):
        init_adam(optimizer)
    state = tensors(weights, optimizer)
    with ThreadPoolExecutor(1) as beside:  # both need a processor more than they need the disk
        verified = beside.submit(damaged, step_dir, meta)
        try:
            dcp.load(state, checkpoint_id=step_dir, no_dist=not dist.is_initialized())
        except CheckpointException as e:
            problem = verified.result() or next(iter(e.failures.values()))[0]
            raise ValueError(f"{step_dir} cannot be loaded: {problem}{_other(step_dir)}") from e
        refuse(verified.result())
    torch.set_rng_state(state["rng"])
    if isinstance(weights, ShardedWeights):
        weights.stale = True
    return meta


def damaged(step_dir: Path, meta: dict) -> str | None:
    """The first file whose checksum is not the one in `meta`, of this rank's share of them."""
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    for name, file in sorted(meta["files"].items())[rank::world_size]:
        if file_checksum(step_dir / name) != file["xxh3_64"]:
            return f"{step_dir / name} was damaged: its checksum is not the one in {META}{_other(step_dir)}"
    return None


def refuse(problem: str | None) -> None:
    """Raise ValueError on all ranks if there is a problem on one."""

    def fail() -> None:
        if problem:
            raise OSError(problem)

    try:
        together(fail, None)
    except OSError as e:
        raise ValueError(str(e)) from e


def load_weights(step_dir: Path) -> dict[str, torch.Tensor]:
    """The model's parameters alone, whole, by name, on the CPU; no model and no process group needed."""
    return load_tensors(step_dir, "model.")


def load_tensors(step_dir: Path, prefix: str) -> dict[str, torch.Tensor]:
    """The tensors whose names begin with `prefix` ("model.", "optimizer.state."), whole, on the CPU, without it."""
    check(step_dir)
    stored = dcp.FileSystemReader(step_dir).read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in stored.items()
        if name.startswith(prefix)
    }
    dcp.load(tensors, checkpoint_id=step_dir, no_dist=True)
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def check(step_dir: Path) -> dict:
    """The meta of a checkpoint, after seeing that every file it lists is there in full.

    Raises:
        ValueError: naming what is missing, and the checkpoint to use instead if there is one.
    """
    try:
        meta = json.loads((step_dir / META).read_text())
        for name, file in meta["files"].items():
            actual = (step_dir / name).stat().st_size
            if actual != file["bytes"]:
                raise ValueError(f"{name} has {actual:,} bytes instead of {file['bytes']:,}")
    except (OSError, ValueError, KeyError) as e:
        raise ValueError(f"{step_dir} is not a complete checkpoint: {e}{_other(step_dir)}") from e
    return meta


def _other(step_dir: Path) -> str:
    others = [d for d in steps(step_dir.parent) if d != step_dir]
    return f". Another checkpoint of this run: {others[-1]}" if others else ""


def config(step_dir: Path) -> Config:
    """The configuration of the model in a checkpoint."""
    return Config(**check(step_dir)["config"])


def steps(run_dir: Path) -> list[Path]:
    """The checkpoints of a run that carry their marker, by step (as a number: step-999999 is before step-11444096)."""
    found = [d for d in run_dir.glob("step-*") if re.fullmatch(r"step-\d+", d.name) and (d / META).is_file()]
    return sorted(found, key=lambda d: int(d.name.removeprefix("step-")))


def prune(run_dir: Path, keep: int, permanent_every: int, permanent: Collection[int] = ()) -> None:
    """Delete all but the newest `keep` checkpoints (0: keep all), those whose step `permanent_every` divides, and those
    of the steps in `permanent`."""
    if not is_rank_zero() or not keep:
        return
    for old in steps(run_dir)[:-keep]:
        step = int(old.name.removeprefix("step-"))
        if step not in permanent and (not permanent_every or step % permanent_every):
            shutil.rmtree(old)


# --- tensors ---------------------------------------------------------------------------------------------------------


def tensors(weights: Any, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What a checkpoint holds, by name: views of parameters and optimizer state (DTensors where they are sharded)."""
    names = dict(weights.named_parameters())
    return {
        "model": {name: p.detach() for name, p in weights.named_parameters(remove_duplicate=False)},
        "optimizer": {"state": {name: optimizer.state[p] for name, p in names.items() if optimizer.state.get(p)}},
        "rng": torch.get_rng_state(),
    }


def leaves(state: dict, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    for key, value in state.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def host_buffers(state: dict) -> dict:
    """The same tensors in host memory, values not yet; in one block, pinned where there is a GPU, so that copies run at
    the bus's speed and torch's pinned allocator does not round each up to a power of two."""
    sizes = [local(t).numel() * t.element_size() for _, t in leaves(state)]
    offsets, total = [], 0
    for size in sizes:
        offsets.append(total)
        total += -(-size // 16) * 16
    block = torch.zeros(total, dtype=torch.uint8)
    if torch.cuda.is_available():
        if int(torch.cuda.cudart().cudaHostRegister(block.data_ptr(), total, 0)) != 0:
            warnings.warn(f"{total / 1e9:.1f} GB of host memory cannot be pinned: saving takes longer", stacklevel=2)
    places = iter(zip(offsets, sizes, strict=True))

    def place(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: place(v) for key, v in value.items()}
        offset, size = next(places)
        host = block[offset : offset + size].view(value.dtype).view(local(value).shape)
        # Its placement on the mesh goes into the checkpoint; that the mesh is of GPUs does not matter there.
        return DTensor(host, value._spec, requires_grad=False) if isinstance(value, DTensor) else host

    return place(state)


# --- processes and commits -------------------------------------------------------------------------------------------


def is_rank_zero() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def git_commit() -> str:
    """The commit of this source tree, "+" appended when it was changed since, "" outside a repository."""
    here = Path(__file__).parent
    git = ["git", "-C", str(here), "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True, timeout=10).stdout.strip()
    except OSError:
        return ""
