"""Pretrain TinyLlama, or any preset, from packed shards.

    python pretrain/tinyllama.py --devices 1 --train_data_dir data/slim_star --val_data_dir data/slim_star
    python pretrain/tinyllama.py --config pretrain/120m.yaml --learning_rate 3e-4 --resume true
    lightning run model --devices=8 --num-nodes=2 --node-rank=0 --main-address=10.0.0.1 pretrain/tinyllama.py ...

Everything that decides the result is a field of TrainArgs. A run lives in out/<name>/: args.json, metrics.csv, loss.png
and checkpoints step-00005000/. `--help` lists all flags, `--print_config` shows what a command line amounts to.
"""

import sys

from lit_gpt import cli, precompile

if __name__ == "__main__":
    cli.quiet_imports()
    precompile.begin(sys.argv)  # the kernels, while the libraries below are imported

import itertools
import json
import math
import os
import shutil
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from lightning_fabric import Fabric
from lightning_fabric.strategies import ModelParallelStrategy
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from lit_gpt import checkpoint, cluster
from lit_gpt.checkpoint import Checkpointer
from lit_gpt.cli import check_flags, one_line_errors, out_of_memory, parse
from lit_gpt.config import Config
from lit_gpt.hf import check_weights
from lit_gpt.interrupt import Interrupt
from lit_gpt.kernels import IGNORE_INDEX, select_kernels
from lit_gpt.metrics import Metrics, plot_loss
from lit_gpt.model import GPT
from lit_gpt.optim import SpikeGuard, clip_and_step, init_adam, lr_at, param_groups
from lit_gpt.packed_dataset import DocumentBatch, PackedDataset, PackedLoader, ValidationSet
from lit_gpt.pretrained import open_pretrained
from lit_gpt.release import read_schedule
from lit_gpt.report import read_run, write_page
from lit_gpt.sharding import ShardedWeights
from lit_gpt.speed_monitor import RunPlan, flops_per_token, known_gpu, memory_plan, peak_flops, plan_run
from lit_gpt.tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent


@dataclass
class TrainArgs:
    """Pretrain a model from packed shards. The defaults are TinyLlama-1.1B's recipe."""

    train_data_dir: Path = Path("data/slim_star_combined")
    """Folder with the shards that the prepare scripts wrote; s3:// and gs:// work too."""
    val_data_dir: Path | None = None
    """Folder with the validation shards. Without one there is no validation."""
    train_mix: dict[str, float] = field(default_factory=lambda: {"train_slim": 0.693584, "train_star": 0.306416})
    """Prefix of shards -> its share of the training sequences."""
    val_prefixes: list[str] = field(default_factory=lambda: ["validation"])
    """Prefixes of the validation shards; each is a set whose loss is also reported apart."""
    exhaustion: Literal["repeat", "stop", "renormalise"] = "repeat"
    """When a source has been read source_epochs times: repeat it for ever, stop the run, or go on with the others."""
    source_epochs: float | dict[str, float] | None = None
    """How often to read each source at most, for stop and renormalise; default once."""
    document_mask: bool = False
    """Attend within documents only and learn no transition between them; default: plain concatenation, the recipe."""
    tokenizer_path: Path | None = None
    """Folder or file of the shards' tokenizer, to be copied into the run for conversion and generation."""
    verify_data: bool = False
    """Before the run, read all shards: checksums against the manifest and every id against the vocabulary."""
    cache_dir: Path | None = None
    """Local disk for shards that are read from s3:// or gs://."""
    num_workers: int = 1
    """Processes per device that read data ahead; 0 reads in the training process."""

    model: str = "tiny_LLaMA_1b"
    """A preset of lit_gpt/config.py."""
    model_overrides: dict[str, int | float | str | bool] = field(default_factory=dict)
    """Fields of Config that differ from the preset, e.g. --model_overrides.n_layer 4."""
    init_from: Path | None = None
    """Start a new run from the weights in this run, step-... folder, Hugging Face folder or original .pth."""

    global_batch_tokens: int = 2_097_152
    """Tokens in one optimizer step, over all devices and micro-batches."""
    micro_batch_size: int = 8
    """Sequences in one forward and backward pass of one device."""
    max_tokens: int | None = None
    """Length of the run, and of its learning-rate schedule, in tokens. Default 3e12, unless given in other units:"""
    max_steps: int | None = None
    """... in optimizer steps,"""
    max_epochs: float | None = None
    """... or in multiples of all tokens in train_mix together."""
    stop_at_step: int | None = None
    """Save and end after this step; the schedule stays that of the whole run."""

    learning_rate: float = 4e-4
    """Peak, reached after the warmup."""
    min_lr: float = 4e-5
    """Learning rate of the last step."""
    warmup_steps: int = 2000
    """Steps of linear warmup."""
    schedule: Literal["cosine", "wsd"] = "cosine"
    """cosine, or wsd: constant after the warmup, then linear down over decay_steps."""
    decay_steps: int = 0
    """Steps of wsd's decay."""
    weight_decay: float = 0.1
    """AdamW's, on matrices and embeddings, not on norms."""
    beta1: float = 0.9
    """AdamW's decay of the gradient's mean."""
    beta2: float = 0.95
    """AdamW's decay of the gradient's square."""
    grad_clip: float = 1.0
    """Largest norm of the whole gradient."""
    z_loss: float = 0.0
    """Weight of log²Z in the training loss, which keeps the logits from drifting (PaLM's was 1e-4); losses that are
    printed while training contain it, validation losses do not."""
    nonfinite: Literal["stop", "skip"] = "stop"
    """What to do with a step whose loss or gradient is not finite: end the run, or drop that step and go on."""
    spike: Literal["off", "stop", "skip"] = "off"
    """The same for a step whose loss or gradient norm is 6 standard deviations above those of the last 128 steps."""

    devices: int | str = "auto"
    """Devices of this node; auto is all GPUs, or the CPU."""
    num_nodes: int = 1
    """Nodes, each started with the same command by your launcher."""
    accelerator: str = "auto"
    """auto, cpu, cuda or mps."""
    sharding: Literal["auto", "ddp", "optimizer", "fsdp"] = "auto"
    """What devices share: nothing, the optimizer's state with the fp32 weights, or everything, weights gathered layer
    by layer (FSDP2). auto: the optimizer if the rest fits each device, else fsdp."""
    shard_devices: int | None = None
    """How many devices share one copy; others repeat it. Default: optimizer those of a node, fsdp all."""
    precision: Literal["auto", "fp32", "bf16", "fp8"] = "auto"
    """bf16 computes in bfloat16 over fp32 weights; fp8 the blocks' matrix products in fp8 and the rest
    in bf16 (RTX 40, H100 or newer); auto is bf16 on a GPU that has it, else fp32."""
    kernels: str = "auto"
    """Backends of the fused operations: auto, quack, triton, compile or torch, and attention's, as in triton+cudnn."""
    recompute: bool = False
    """Keep no activations inside a block but compute them again in the backward: slower, and fits smaller GPUs."""
    seed: int = 3407
    """Of the weights and of the order of the data."""

    name: str = "tinyllama"
    """Of the run: its folder is out_dir/name."""
    out_dir: Path = Path("out")
    """Where runs live."""
    resume: bool | str = False
    """true: from the newest checkpoint of this run; auto: the same, or anew if there is none; or a path of one."""
    resume_mix: Literal["keep", "change"] = "keep"
    """change: take train_mix from here on instead of the one that the run started with."""
    log_interval: int = 1
    """Steps between two lines of the log."""
    eval_interval: int = 1000
    """Steps between two validations; there is one at the end, too."""
    eval_sequences: int | None = 4096
    """Validate on at most this many sequences of each set, the same ones each time."""
    eval_tasks: list[str] = field(default_factory=list)
    """Tasks of lm_eval to score at each validation, e.g. commonsense; needs --tokenizer_path. See EVAL.md."""
    eval_tasks_dir: Path | None = None
    """Folder of task files, where there is no network."""
    eval_limit: int = 100
    """Questions of each task, the same ones each time."""
    save_interval: int = 1000
    """Steps between two checkpoints; there is one at the end, too."""
    release_schedule: Path | None = None
    """File with a line such as `steps: [50000, 100000]`: these steps are saved, kept, and released beside the run into
    out/<name>/releases; see scripts/release_checkpoint.py."""
    keep_checkpoints: int = 3
    """Newest checkpoints to keep; 0 keeps all."""
    permanent_interval: int = 50_000
    """Checkpoints of these steps are never deleted."""
    requeue_exit_code: int = 0
    """Exit code after a signal has ended the run early and all is saved; a job script can requeue upon it."""
    logger: Literal["csv", "wandb", "tensorboard"] = "csv"
    """metrics.csv is written in any case."""
    profile_step: int | None = None
    """Write a trace of this step to the run's folder, for chrome://tracing or ui.perfetto.dev."""
    plan: str | None = None
    """Only say what this run would take on such GPUs, 8 in a node, e.g. 16xA100-40G: sharding, memory, speed, days."""
    plan_network: float = 25.0
    """GB/s between nodes for each GPU, for the plan."""
    plan_usd_per_hour: float = 2.0
    """Price of a GPU, for the plan."""

    def __post_init__(self) -> None:
        positive = ("global_batch_tokens", "micro_batch_size", "max_tokens", "max_steps", "max_epochs", "stop_at_step")
        positive += ("grad_clip", "num_nodes", "shard_devices", "profile_step", "eval_sequences", "eval_limit")
        positive += ("log_interval", "eval_interval", "save_interval")
        not_negative = ("warmup_steps", "decay_steps", "weight_decay", "z_loss", "num_workers", "keep_checkpoints")
        not_negative += ("permanent_interval",)
        check_flags(self, positive, not_negative)

    def accumulation(self, block_size: int, world_size: int) -> int:
        """Micro-batches of each device in one optimizer step."""
        return self.global_batch_tokens // (block_size * self.micro_batch_size * world_size)

    def steps(self, dataset_tokens: int | None) -> int:
        """The horizon in optimizer steps, whatever unit it was given in."""
        if self.max_steps is not None:
            return self.max_steps
        tokens = 3_000_000_000_000 if self.max_tokens is None else self.max_tokens
        if self.max_epochs is not None:
            if dataset_tokens is None:
                raise ValueError("--max_epochs cannot be planned without the data: give --max_tokens or --max_steps")
            tokens = self.max_epochs * dataset_tokens
        return int(tokens // self.global_batch_tokens)

    def check(self, block_size: int, world_size: int, max_steps: int) -> None:
        """Raises ValueError with everything that is wrong, each named by its flag."""
        problems = []
        if sum(h is not None for h in (self.max_tokens, self.max_steps, self.max_epochs)) > 1:
            problems.append("give one of --max_tokens, --max_steps and --max_epochs; null takes a YAML file's back")
        micro_step = block_size * self.micro_batch_size * world_size
        if self.global_batch_tokens < micro_step or self.global_batch_tokens % micro_step:
            problems.append(
                f"--global_batch_tokens {self.global_batch_tokens:,} is not a multiple of {micro_step:,} = "
                f"{block_size} tokens x --micro_batch_size {self.micro_batch_size} x {world_size} device(s)"
            )
        phases = {"warmup_steps": self.warmup_steps}
        if self.schedule == "wsd":
            phases["decay_steps"] = self.decay_steps
        if max_steps < 1:
            problems.append(f"the run would have {max_steps} steps of {self.global_batch_tokens:,} tokens")
        elif sum(phases.values()) > max_steps:
            given = " + ".join(f"--{flag} {steps}" for flag, steps in phases.items())
            fewer = " ".join(f"--{flag} {max_steps // 10}" for flag in phases)
            problems.append(f"{given} is more than the run's {max_steps:,} steps: give fewer, e.g. {fewer}")
        if not 0 <= self.min_lr <= self.learning_rate:
            problems.append(f"--min_lr {self.min_lr} is not between 0 and --learning_rate {self.learning_rate}")
        if self.release_schedule is not None:
            read_schedule(self.release_schedule)
        if problems:
            raise ValueError("; ".join(problems))


def main(args: TrainArgs) -> int:
    """Returns the exit code."""
    config = Config.from_name(args.model, **args.model_overrides)
    if args.plan:
        count, _, gpu = args.plan.partition("x")
        if not count.isdecimal() or int(count) < 1:
            raise ValueError(f"--plan {args.plan} is not a number of GPUs and their type, as in 16xA100-40G")
        print(plan(args, config, gpu, int(count), args.steps(dataset_tokens=None)))
        return 0
    fabric = launch(args, config)
    environment = getattr(fabric.strategy, "cluster_environment", None)
    address = (environment.main_address, environment.main_port) if fabric.world_size > 1 else ("", 0)
    with cluster.Watch(fabric.global_rank, fabric.world_size, *address) as watch:
        try:
            interrupted = setup(fabric, args, config, watch)
        except RuntimeError as e:
            if "DataLoader worker" not in str(e):
                raise
            # A worker was killed: torch's signal handler raises that wherever the training thread is at the time.
            raise OSError(f"rank {fabric.global_rank} gets no data: {e}") from e
    return args.requeue_exit_code if interrupted else 0


@out_of_memory("Give a smaller --micro_batch_size, or --recompute true; --plan 1xH100 says what a run takes")
def setup(fabric: Fabric, args: TrainArgs, config: Config, watch: cluster.Watch) -> bool:
    """Everything up to the first step, and then `train`. Returns whether a signal ended it early."""
    run_dir = args.out_dir / args.name
    resume_from = find_checkpoint(args, run_dir)

    # Data first: what is wrong with it shows before minutes go into the model.
    what = dict(
        block_size=config.block_size,
        vocab_size=config.vocab_size,
        document_mask=args.document_mask,
        cache_dir=args.cache_dir,
    )
    order = dict(seed=args.seed, exhaustion=args.exhaustion, max_epochs=args.source_epochs)
    dataset = PackedDataset(args.train_data_dir, args.train_mix, **order, **what)
    loader = PackedLoader(dataset, args.micro_batch_size, fabric.global_rank, fabric.world_size, args.num_workers)
    val_sets = {}
    for prefix in args.val_prefixes if args.val_data_dir is not None else []:
        val_set = ValidationSet(args.val_data_dir, [prefix], max_sequences=args.eval_sequences, **what)
        for fact in ("tokenizer", "delimiters"):
            if getattr(val_set, fact) != getattr(dataset, fact):
                raise ValueError(f"{args.val_data_dir} was made with another {fact} than {args.train_data_dir}")
        val_sets[prefix] = val_set
    max_steps = args.steps(sum(stream.tokens for stream in dataset.streams.values()))
    args.check(config.block_size, fabric.world_size, max_steps)
    tokenizer = args.tokenizer_path and Tokenizer(args.tokenizer_path)
    if args.eval_tasks and not tokenizer:
        raise ValueError("--eval_tasks needs --tokenizer_path")
    if tokenizer and dataset.tokenizer and tokenizer.sha256 != dataset.tokenizer["sha256"]:
        raise ValueError(f"--tokenizer_path {tokenizer.path} is not the tokenizer that made {args.train_data_dir}")
    if args.verify_data and fabric.is_global_zero:
        dataset.verify()
    report(dataset.table())

    # The model, real from the start and the same at any world size; then sharded, if there is more than one device.
    dtype = torch.float32 if args.precision == "fp32" else torch.bfloat16
    kernels = select_kernels(
        args.kernels,
        device=fabric.device,
        dtype=dtype,
        heads=(config.n_head, config.n_query_groups, config.head_size),
        fp8=args.precision == "fp8",
    )
    with fabric.device:
        model = GPT(config, kernels)
    if args.init_from is not None:
        pretrained = open_pretrained(args.init_from)
        check_weights(config, pretrained.weights)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(pretrained.weights[name])
        report(f"weights from {pretrained.path}; optimizer, data and step start anew")
    else:
        model.init_weights(args.seed)
    n_parameters = sum(p.numel() for p in model.parameters())
    model.recompute = args.recompute
    if args.precision == "fp8":
        model.train_in_fp8()
    if kernels.compile_blocks:
        for block in model.transformer.h:
            block.compile()
    weights = model  # what the optimizer steps and checkpoints hold
    if fabric.world_size > 1 and args.sharding != "fsdp":
        weights = ShardedWeights(model, dtype, fabric.strategy.device_mesh)
    elif dtype == torch.bfloat16 and fabric.world_size == 1:  # FSDP casts what it gathers
        model.compute_in(dtype)
    model = fabric.setup_module(model)
    groups = param_groups(weights, args.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, betas=(args.beta1, args.beta2), fused=True)

    # Resume: everything that the next step depends on is in the checkpoint.
    step, guard = 0, SpikeGuard()
    if resume_from is not None:
        meta = checkpoint.check(resume_from)
        refuse_other_model(resume_from, Config(**meta["config"]), config)
        t0 = time.perf_counter()
        checkpoint.load(resume_from, weights, optimizer)
        loader.load_state_dict(meta["loader"], args.resume_mix)
        step, guard = meta["step"], SpikeGuard(meta.get("spike_guard"))
        if model.module.fp8 is not None and meta.get("fp8"):
            model.module.fp8.load_state_dict(meta["fp8"])
        report(
            f"resumed model, optimizer, RNG and data position from {resume_from} in {time.perf_counter() - t0:.1f} s"
        )
        for flag, was in meta["args"].items():
            now = as_json(args).get(flag)
            if was != now and flag != "resume":
                report(f"  --{flag} was {was} and is now {now}")

    changed = ", ".join(f"{field} {value}" for field, value in args.model_overrides.items())
    report(
        f"{config.name}{' with ' if changed else ''}{changed}: {n_parameters:,} parameters "
        f"on {fabric.world_size} x {fabric.device.type}, {args.precision}"
        f"{sharing(args, fabric)}\n"
        f"{kernels.table()}\n"
        f"batch: {args.global_batch_tokens:,} tokens = {config.block_size} tokens x {args.micro_batch_size} sequences "
        f"x {args.accumulation(config.block_size, fabric.world_size)} micro-batches x {fabric.world_size} device(s)\n"
        f"run: steps {step:,} to {max_steps:,}, {max_steps * args.global_batch_tokens:,} tokens; {run_dir}"
    )
    if gpu := known_gpu(fabric.device):
        expected = plan(args, config, gpu, fabric.world_size, max_steps - step)
        if expected.days > 1 / 24:
            report(expected)
    if fabric.is_global_zero:
        run_dir.mkdir(parents=True, exist_ok=True)
        if tokenizer:
            (run_dir / "tokenizer").mkdir(exist_ok=True)
            shutil.copy(tokenizer.path, run_dir / "tokenizer")
        (run_dir / "args.json").write_text(json.dumps({"args": as_json(args), "model": config.to_dict()}, indent=1))
    score_tasks = None
    if args.eval_tasks:
        from lit_gpt.evaluation import task_scorer

        bos = "bos" in (dataset.delimiters or "")
        where = dict(tasks_dir=args.eval_tasks_dir, limit=args.eval_limit)
        score_tasks = task_scorer(model.module, tokenizer, args.eval_tasks, bos=bos, **where)
    evaluation = (val_sets, score_tasks)
    return train(fabric, args, model, weights, optimizer, loader, evaluation, guard, step, max_steps, run_dir, watch)


def train(
    fabric: Fabric,
    args: TrainArgs,
    model: torch.nn.Module,
    weights: torch.nn.Module | ShardedWeights,
    optimizer: torch.optim.AdamW,
    loader: PackedLoader,
    evaluation: tuple[dict[str, ValidationSet], Callable[[], dict[str, float]] | None],
    guard: SpikeGuard,
    step: int,
    max_steps: int,
    run_dir: Path,
    watch: cluster.Watch,
) -> bool:
    (val_sets, score_tasks), config, world_size = evaluation, model.module.config, fabric.world_size
    fp8 = model.module.fp8
    accumulation = args.accumulation(config.block_size, world_size)
    last_step = min(max_steps, args.stop_at_step or max_steps)
    if (end := loader.dataset.end) is not None:  # in sequences; the last batch may be smaller
        last_step = min(last_step, math.ceil(end / (args.global_batch_tokens // config.block_size)))
    fsdp = world_size > 1 and args.sharding == "fsdp"
    peak = peak_flops(fabric.device, "tf32" if args.precision == "fp32" else "bf16")
    metrics = Metrics(run_dir, step, args.logger, as_json(args)) if fabric.is_global_zero else None
    releases = read_schedule(args.release_schedule) if args.release_schedule else []

    def saved(step: int) -> None:
        if step in releases:
            release_beside(run_dir, step)

    checkpoints = Checkpointer(run_dir, args.keep_checkpoints, args.permanent_interval, releases, report, saved)
    init_adam(optimizer)  # before the first activations: what stays lies together
    interrupt, interrupted, profiler, reserved = Interrupt(fabric.is_global_zero), False, None, False
    batches = iter(loader)
    t0, tokens_since, data_wait_s = time.perf_counter(), 0, 0.0
    next_picture = time.monotonic() + 60
    model.train()

    while step < last_step and not interrupted:
        if step + 1 == args.profile_step:
            profiler = torch.profiler.profile()
            profiler.start()

        # Fetch the whole step, so that its valid targets are known before the first backward.
        watch.doing("waiting for data", step)
        t_fetch = time.perf_counter()
        first_sequence = loader.sequences
        micro_batches = list(itertools.islice(batches, accumulation))  # fewer where the data end
        data_wait_s += time.perf_counter() - t_fetch
        watch.doing("computing", step)
        n_valid = sum((targets_of(batch) != IGNORE_INDEX).sum() for batch in micro_batches).to(fabric.device)
        sum_over_ranks(n_valid)

        # Forward and backward. The gradient is that of the sum over all ranks' targets, divided once by their number;
        # FSDP averages gradients over ranks, hence x world_size.
        scale = (world_size if fsdp else 1) / n_valid
        loss_sum = torch.zeros((), device=fabric.device)
        for i, batch in enumerate(micro_batches):
            with fabric.no_backward_sync(model, enabled=i < len(micro_batches) - 1) if fsdp else nullcontext():
                loss = forward(model, fabric.to_device(batch), args.z_loss)
                fabric.backward(loss * scale)
            loss_sum += loss.detach()
        if isinstance(weights, ShardedWeights):
            weights.reduce_gradients()

        # Clip and step. A loss or gradient that is not finite or a spike, the same on all ranks, changes nothing.
        lr = lr_at(
            step,
            max_steps=max_steps,
            warmup_steps=args.warmup_steps,
            learning_rate=args.learning_rate,
            min_lr=args.min_lr,
            schedule=args.schedule,
            decay_steps=args.decay_steps,
        )
        for group in optimizer.param_groups:
            group["lr"] = lr
        sums = sum_over_ranks(torch.stack((loss_sum, torch.tensor(float(interrupt.requested), device=fabric.device))))
        limits = guard.limits() if args.spike != "off" else (math.inf, math.inf)
        norm = clip_and_step(optimizer, args.grad_clip, sums[0] / n_valid, limits)

        # The one wait for the device in an optimizer step: loss, norm, and whether any rank was asked to stop.
        loss_sum, asked, grad_norm, left_out = torch.stack((*sums, norm, optimizer.found_inf)).tolist()
        loss, interrupted = loss_sum / n_valid.item(), asked > 0
        if left_out:
            finite = math.isfinite(loss) and math.isfinite(grad_norm)
            flag, policy = ("spike", args.spike) if finite else ("nonfinite", args.nonfinite)
            what = (
                f"step {step + 1} (global sequences {first_sequence:,} to {loader.sequences:,}, "
                f"from {loader.dataset.describe(first_sequence)}): loss {loss}, gradient norm {grad_norm}"
                + (f", above the limits of {limits[0]:.3f} and {limits[1]:.3f}" if finite else "")
            )
            if policy == "stop":
                checkpoints.wait()  # all ranks are here; the last one may still be on its way to the disk
                raise ValueError(
                    f"{what}. Nothing was updated or saved; resume from the last checkpoint, with --{flag} skip to "
                    f"leave this step out"
                )
            report(f"{what}: skipped")
        else:
            guard.add(loss, grad_norm)
        optimizer.zero_grad()
        step += 1
        if not reserved:  # not earlier: pinning tens of GB would hold up all that the first step sets up
            checkpoints.reserve(weights, optimizer)
            reserved = True
        tokens_since += args.global_batch_tokens
        if profiler:
            profiler.stop()
            profiler.export_chrome_trace(str(run_dir / f"trace-step-{step}-rank-{fabric.global_rank}.json.gz"))
            profiler = None

        # Log.
        done = step == last_step or interrupted
        fp8_counts = {}
        if fp8 is not None and (step % args.log_interval == 0 or done):  # on all ranks, which leave fp8 together
            fp8_counts["fp8_saturated"], fp8_counts["fp8_nonfinite"], lines = fp8.check()
            for line in lines:
                report(f"step {step}: {line}")
        if metrics and (step % args.log_interval == 0 or done):
            elapsed_s = time.perf_counter() - t0
            speed = tokens_since / elapsed_s
            mfu = speed / world_size * flops_per_token(config) / peak if peak else None
            with despite_a_full_disk():
                metrics.log(
                    step,
                    tokens=step * args.global_batch_tokens,
                    loss=loss,
                    learning_rate=lr,
                    grad_norm=grad_norm,
                    tokens_per_s=round(speed),
                    data_wait_s=round(data_wait_s, 4),
                    **({"mfu": mfu} if mfu else {}),
                    **fp8_counts,
                )
            print(
                f"step {step:>{len(str(max_steps))}}/{max_steps} | loss {loss:.4f} | lr {lr:.2e} | "
                f"norm {grad_norm:.2f} | {speed / world_size:,.0f} tokens/s/device | "
                f"{f'MFU {mfu:.1%} | ' if mfu else ''}"
                f"data wait {data_wait_s / elapsed_s:.0%} | {step * args.global_batch_tokens:,} tokens | "
                f"{epochs(loader)} | ETA {duration((max_steps - step) * args.global_batch_tokens / speed)}",
                flush=True,
            )
            t0, tokens_since, data_wait_s = time.perf_counter(), 0, 0.0

        # Validate; but who asks a run to stop does not wait for long.
        t_pause = time.perf_counter()
        validated = bool(val_sets or score_tasks) and not interrupted and (step % args.eval_interval == 0 or done)
        if validated:
            watch.doing("validating", step)
            tokens = step * args.global_batch_tokens
            row = {}
            for name, val_set in val_sets.items():
                val_loss = validate(fabric, model, val_set, args.micro_batch_size)
                bits_per_byte = val_loss / math.log(2) * tokens_per_byte(val_set)
                report(f"step {step}: {name} loss {val_loss:.4f} nats/token, {bits_per_byte:.4f} bits/byte")
                # The first set is the run's validation loss, further ones have columns of their own.
                of = f"/{name}" if row else ""
                row |= {f"val_loss{of}": val_loss, f"val_bits_per_byte{of}": bits_per_byte}
            if score_tasks is not None:
                t_score = time.perf_counter()
                task_scores = score_tasks()
                row |= {f"eval/{task}": value for task, value in task_scores.items()}
                said = ", ".join(f"{task} {100 * value:.1f}" for task, value in task_scores.items())
                report(f"step {step}: {said} (%, in {time.perf_counter() - t_score:.1f} s)")
            if fsdp:
                weights.reshard()  # a forward without a backward leaves embedding and head gathered
            if metrics:
                with despite_a_full_disk():
                    metrics.log(step, tokens=tokens, **row)
        if metrics and (validated or time.monotonic() > next_picture):
            t_plot = time.perf_counter()
            with despite_a_full_disk():
                plot_loss({args.name: metrics.path}, run_dir / "loss.png")
                write_page([read_run(run_dir)], run_dir / "report.html", refresh_s=0 if done else 60)
            # Live, but drawing long runs takes seconds: at most 1% of the time.
            next_picture = time.monotonic() + max(60, 100 * (time.perf_counter() - t_plot))

        # Save.
        if step % args.save_interval == 0 or step in releases or done:
            watch.doing("saving", step)
            meta = {
                "tokens_seen": step * args.global_batch_tokens,
                "config": config.to_dict(),
                "loader": loader.state_dict(),
                "spike_guard": list(guard.history),
                "tokenizer": loader.dataset.tokenizer,
                "delimiters": loader.dataset.delimiters,
                "args": as_json(args),
                **({"fp8": fp8.state_dict()} if fp8 is not None else {}),
            }
            checkpoints.save(step, weights, optimizer, meta)
        t0 += time.perf_counter() - t_pause  # validation and checkpoints are not training speed

    watch.doing("saving", step)
    checkpoints.close()
    if interrupted:
        report(f"interrupted: go on with --resume true from step {step}")
    if metrics:
        metrics.close()
    return interrupted


@torch.no_grad()
def validate(fabric: Fabric, model: torch.nn.Module, val_set: ValidationSet, micro_batch_size: int) -> float:
    """Mean loss in nats over every target of the set, the same batches each time, summed over ranks."""
    model.eval()
    total = torch.zeros(2, device=fabric.device, dtype=torch.float64)  # loss, targets
    for batch in val_set.batches(micro_batch_size, fabric.global_rank, fabric.world_size):
        batch = fabric.to_device(batch)
        total += torch.stack((forward(model, batch).double(), (targets_of(batch) != IGNORE_INDEX).sum()))
    model.train()
    loss, n_targets = sum_over_ranks(total).tolist()
    return loss / n_targets


def forward(model: torch.nn.Module, batch: torch.Tensor | DocumentBatch, z_loss: float = 0.0) -> torch.Tensor:
    """Loss summed over the targets of a batch; with documents, each sees itself alone."""
    tokens, cu_seqlens = (batch.tokens, batch.cu_seqlens) if isinstance(batch, DocumentBatch) else (batch, None)
    return model(tokens[:, :-1].clamp(min=0), targets_of(batch), cu_seqlens=cu_seqlens, z_loss=z_loss)


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """In place. (fabric.all_reduce would put a barrier before it, and the host would wait for the device.)"""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def targets_of(batch: torch.Tensor | DocumentBatch) -> torch.Tensor:
    """(B, T) next tokens, IGNORE_INDEX past the end of the data and, with documents, where another one begins."""
    if isinstance(batch, DocumentBatch):
        return batch.tokens[:, 1:].masked_fill(batch.loss_weights == 0, IGNORE_INDEX)
    return batch[:, 1:]


class Strategy(ModelParallelStrategy):
    """Fabric's strategy for FSDP2, over a grid of ranks (replicate, shard), after a roll call."""

    def __init__(self, replicas: int, sharers: int, shard: Callable[[GPT, DeviceMesh], GPT]) -> None:
        super().__init__(shard, data_parallel_size=replicas, tensor_parallel_size=sharers)

    def setup_environment(self) -> None:
        environment = self.cluster_environment
        self._set_world_ranks()
        rank, world_size = environment.global_rank(), environment.world_size()
        store = cluster.join(rank, world_size, environment.main_address, environment.main_port, self.root_device)
        super().setup_environment()
        check = cluster.self_check(store, self.device_mesh, ("copies of the model", "shards of each"))
        if rank == 0:
            print(check, flush=True)


def launch(args: TrainArgs, config: Config) -> Fabric:
    """A running Fabric, and what args leave to be decided by the machine: precision and sharding."""
    torch.set_float32_matmul_precision("high")
    on_gpu = cluster.on_gpu(args.accelerator)
    if args.precision == "auto":
        args.precision = cluster.auto_precision(on_gpu)
    per_node, world_size = cluster.processes(args.devices, on_gpu, args.num_nodes)

    plan = memory_plan(config, args.micro_batch_size * config.block_size, args.recompute, sharers=per_node)
    needed, there = sum(plan.values()), torch.cuda.get_device_properties(0).total_memory if on_gpu else math.inf
    if args.sharding == "auto":
        args.sharding = "optimizer" if needed < 0.9 * there else "fsdp"
    if world_size == 1 and needed > 0.95 * there:  # no more than a warning: the plan is within 10%
        warnings.warn(
            f"this run is planned to take {needed / 1e9:.1f} GB, and the GPU has {there / 1e9:.1f}: it may need a "
            "smaller --micro_batch_size, or --recompute true",
            stacklevel=2,
        )
    by_default = {"ddp": 1, "optimizer": min(per_node, world_size), "fsdp": world_size}[args.sharding]
    sharers = args.shard_devices or by_default
    if world_size % sharers:
        raise ValueError(f"--shard_devices {sharers} does not divide the run's {world_size} devices")

    def shard(model: GPT, mesh: DeviceMesh) -> GPT:
        if args.sharding != "fsdp":
            return model
        # cast_forward_inputs would round the rotary tables to bf16.
        dtype = torch.float32 if args.precision == "fp32" else torch.bfloat16
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        if sharers == world_size:
            mesh = mesh["tensor_parallel"]  # Fabric's name for the second dimension
        for block in model.transformer.h:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        return fully_shard(model, mesh=mesh, mp_policy=policy)

    fabric = Fabric(
        accelerator=args.accelerator,
        devices="auto" if "LT_CLI_USED" in os.environ else per_node,
        num_nodes=world_size // per_node,
        strategy=Strategy(world_size // sharers, sharers, shard) if world_size > 1 else "auto",
    )
    if "LT_CLI_USED" not in os.environ:  # `fabric run` has started the processes already
        fabric.launch()
    if not fabric.is_global_zero:
        warnings.simplefilter("ignore")  # rank 0 says it for all
    return fabric


def plan(args: TrainArgs, config: Config, gpu: str, n_gpus: int, steps: int) -> RunPlan:
    return plan_run(
        config,
        gpu,
        n_gpus,
        tokens=steps * args.global_batch_tokens,
        global_batch_tokens=args.global_batch_tokens,
        micro_batch_size=args.micro_batch_size,
        recompute=args.recompute,
        network=args.plan_network * 1e9,
        usd_per_hour=args.plan_usd_per_hour,
    )


def sharing(args: TrainArgs, fabric: Fabric) -> str:
    if fabric.world_size == 1:
        return ""
    replicas, sharers = fabric.strategy.device_mesh.shape
    what = {"ddp": "nothing shared", "optimizer": "optimizer and fp32 weights", "fsdp": "everything (FSDP2)"}
    return (
        f"; {what[args.sharding]}"
        + (f" shared by {sharers}" if sharers > 1 else "")
        + (f", {replicas} copies" if replicas > 1 else "")
    )


def find_checkpoint(args: TrainArgs, run_dir: Path) -> Path | None:
    """The checkpoint that --resume means, None to start anew; a run is never overwritten without being asked."""
    existing = checkpoint.steps(run_dir)
    if args.resume not in (False, True, "auto"):
        return Path(args.resume)
    if args.resume is False and existing:
        raise ValueError(
            f"{run_dir} already holds {existing[-1].name}: pass --resume true to go on, another --name, or delete it"
        )
    if args.resume is True and not existing:
        raise ValueError(f"--resume true: {run_dir} holds no complete checkpoint; --resume auto starts anew then")
    return existing[-1] if args.resume and existing else None


def refuse_other_model(path: Path, saved: Config, config: Config) -> None:
    different = {k: (v, config.to_dict()[k]) for k, v in saved.to_dict().items() if v != config.to_dict()[k]}
    if different:
        changes = ", ".join(f"{k} {was} -> {now}" for k, (was, now) in different.items())
        raise ValueError(f"{path} is of another model: {changes}. Start a new run with --init_from, or fix --model")


def tokens_per_byte(val_set: ValidationSet) -> float:
    """Of the validation text; nan for shards without a manifest, which do not know how much text they hold."""
    manifests = [m for stream in val_set.streams.values() for m in stream.manifests]
    n_bytes = sum(m.text_bytes for m in manifests)
    return sum(m.tokens for m in manifests) / n_bytes if n_bytes else math.nan


@contextmanager
def despite_a_full_disk() -> Iterator[None]:
    """What is only told about a run does not end it."""
    try:
        yield
    except OSError as e:
        report(f"warning: not logged: {e}")


def report(what: object) -> None:
    """Print it on rank 0; fabric.print would on each node, and a job's nodes often share a log."""
    if checkpoint.is_rank_zero():
        print(what, flush=True)


def release_beside(run_dir: Path, step: int) -> None:
    """Release a checkpoint in a process of its own: training does not wait for it, nor ends with it."""
    command = [ROOT / "scripts" / "release_checkpoint.py", "--run", run_dir, "--step", step]
    command += ["--out_dir", run_dir / "releases"]
    subprocess.Popen([sys.executable, *map(str, command)], start_new_session=True)


def epochs(loader: PackedLoader) -> str:
    return "epochs " + " ".join(f"{name} {a['epochs']:.3g}" for name, a in loader.accounts().items())


def duration(seconds: float) -> str:
    days, rest = divmod(int(seconds), 86400)
    return f"{days} d {rest // 3600} h" if days else f"{rest // 3600}:{rest // 60 % 60:02d}:{rest % 60:02d}"


def as_json(args: TrainArgs) -> dict:
    return {k: str(v) if isinstance(v, Path) else v for k, v in asdict(args).items()}


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main(parse(TrainArgs)))
