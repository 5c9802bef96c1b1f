"""Pretrain TinyLlama, or any preset, from packed shards.

    python pretrain/tinyllama.py --devices 1 --train_data_dir data/slim_star --val_data_dir data/slim_star
    python pretrain/tinyllama.py --config pretrain/120m.yaml --learning_rate 3e-4 --resume true
    lightning run model --devices=8 --num-nodes=2 --node-rank=0 --main-address=10.0.0.1 pretrain/tinyllama.py ...

Everything that decides the result is a field of TrainArgs. A run lives in out/<name>/: args.json, metrics.csv, loss.png
and checkpoints step-00005000/. `--help` lists all flags, `--print_config` shows what a command line amounts to.
"""

import itertools
import json
import math
import os
import shutil
import signal
import time
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies import ModelParallelStrategy
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from lit_gpt import checkpoint
from lit_gpt.cli import one_line_errors, parse
from lit_gpt.config import Config
from lit_gpt.hf import check_weights
from lit_gpt.kernels import IGNORE_INDEX, select_kernels
from lit_gpt.metrics import Metrics, plot_loss
from lit_gpt.model import GPT
from lit_gpt.optim import clip_and_step, lr_at, param_groups
from lit_gpt.packed_dataset import DocumentBatch, PackedDataset, PackedLoader, ValidationSet
from lit_gpt.pretrained import open_pretrained
from lit_gpt.speed_monitor import flops_per_token, peak_flops
from lit_gpt.tokenizer import Tokenizer


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
    """Prefixes of the validation shards."""
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
    nonfinite: Literal["stop", "skip"] = "stop"
    """What to do with a step whose loss or gradient is not finite: end the run, or drop that step and go on."""

    devices: int | str = "auto"
    """Devices of this node; auto is all GPUs, or the CPU."""
    num_nodes: int = 1
    """Nodes, each started with the same command by your launcher."""
    accelerator: str = "auto"
    """auto, cpu, cuda or mps."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """bf16 computes in bfloat16 over fp32 weights; auto is bf16 on a GPU that has it, else fp32."""
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
    """Validate on at most this many sequences, the same ones each time."""
    save_interval: int = 1000
    """Steps between two checkpoints; there is one at the end, too."""
    keep_checkpoints: int = 3
    """Newest checkpoints to keep; 0 keeps all."""
    permanent_interval: int = 50_000
    """Checkpoints of these steps are never deleted."""
    logger: Literal["csv", "wandb", "tensorboard"] = "csv"
    """metrics.csv is written in any case."""

    def accumulation(self, block_size: int, world_size: int) -> int:
        """Micro-batches of each device in one optimizer step."""
        return self.global_batch_tokens // (block_size * self.micro_batch_size * world_size)

    def steps(self, dataset_tokens: int) -> int:
        """The horizon in optimizer steps, whatever unit it was given in."""
        if self.max_steps is not None:
            return self.max_steps
        tokens = self.max_tokens or 3_000_000_000_000
        if self.max_epochs is not None:
            tokens = self.max_epochs * dataset_tokens
        return int(tokens // self.global_batch_tokens)

    def check(self, block_size: int, world_size: int, max_steps: int) -> None:
        """Raises ValueError with everything that is wrong, each named by its flag."""
        problems = []
        if sum(h is not None for h in (self.max_tokens, self.max_steps, self.max_epochs)) > 1:
            problems.append("give one of --max_tokens, --max_steps and --max_epochs")
        micro_step = block_size * self.micro_batch_size * world_size
        if self.global_batch_tokens < micro_step or self.global_batch_tokens % micro_step:
            problems.append(
                f"--global_batch_tokens {self.global_batch_tokens:,} is not a multiple of {micro_step:,} = "
                f"{block_size} tokens x --micro_batch_size {self.micro_batch_size} x {world_size} device(s)"
            )
        if max_steps < 1:
            problems.append(f"the run would have {max_steps} steps of {self.global_batch_tokens:,} tokens")
        elif self.warmup_steps + (self.decay_steps if self.schedule == "wsd" else 0) > max_steps:
            problems.append(f"--warmup_steps and --decay_steps do not fit the run's {max_steps:,} steps")
        if not 0 <= self.min_lr <= self.learning_rate:
            problems.append(f"--min_lr {self.min_lr} is not between 0 and --learning_rate {self.learning_rate}")
        for flag in ("log_interval", "eval_interval", "save_interval", "micro_batch_size"):
            if getattr(self, flag) < 1:
                problems.append(f"--{flag} {getattr(self, flag)} is not positive")
        if problems:
            raise ValueError("; ".join(problems))


def main(args: TrainArgs) -> None:
    fabric = launch(args)
    run_dir = args.out_dir / args.name
    config = Config.from_name(args.model, **args.model_overrides)
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
    val_set = None
    if args.val_data_dir is not None:
        val_set = ValidationSet(args.val_data_dir, args.val_prefixes, max_sequences=args.eval_sequences, **what)
        for fact in ("tokenizer", "delimiters"):
            if getattr(val_set, fact) != getattr(dataset, fact):
                raise ValueError(f"{args.val_data_dir} was made with another {fact} than {args.train_data_dir}")
    max_steps = args.steps(sum(stream.tokens for stream in dataset.streams.values()))
    args.check(config.block_size, fabric.world_size, max_steps)
    tokenizer = args.tokenizer_path and Tokenizer(args.tokenizer_path)
    if tokenizer and dataset.tokenizer and tokenizer.sha256 != dataset.tokenizer["sha256"]:
        raise ValueError(f"--tokenizer_path {tokenizer.path} is not the tokenizer that made {args.train_data_dir}")
    if args.verify_data and fabric.is_global_zero:
        dataset.verify()
    fabric.print(dataset.table())

    # The model, real from the start and the same at any world size; then sharded, if there is more than one device.
    bf16 = args.precision == "bf16"
    kernels = select_kernels(
        args.kernels,
        device=fabric.device,
        dtype=torch.bfloat16 if bf16 else torch.float32,
        heads=(config.n_head, config.n_query_groups, config.head_size),
    )
    with fabric.device:
        model = GPT(config, kernels)
    if args.init_from is not None:
        pretrained = open_pretrained(args.init_from)
        check_weights(config, pretrained.weights)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(pretrained.weights[name])
        fabric.print(f"weights from {pretrained.path}; optimizer, data and step start anew")
    else:
        model.init_weights(args.seed)
    n_parameters = sum(p.numel() for p in model.parameters())
    model.recompute = args.recompute
    if bf16 and fabric.world_size == 1:  # FSDP casts what it gathers
        model.compute_in(torch.bfloat16)
    if kernels.compile_blocks:
        for block in model.transformer.h:
            block.compile()
    model = fabric.setup_module(model)
    groups = param_groups(model, args.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, betas=(args.beta1, args.beta2), fused=True)

    # Resume: everything that the next step depends on is in the checkpoint.
    step = 0
    if resume_from is not None:
        meta = checkpoint.check(resume_from)
        refuse_other_model(resume_from, Config(**meta["config"]), config)
        checkpoint.load(resume_from, model.module, optimizer)
        loader.load_state_dict(meta["loader"], args.resume_mix)
        step = meta["step"]
        fabric.print(f"resumed model, optimizer, RNG and data position from {resume_from}")
        for flag, was in meta["args"].items():
            now = as_json(args).get(flag)
            if was != now and flag != "resume":
                fabric.print(f"  --{flag} was {was} and is now {now}")

    fabric.print(
        f"{config.name}: {n_parameters:,} parameters on {fabric.world_size} x {fabric.device.type}, {args.precision}\n"
        f"{kernels.table()}\n"
        f"batch: {args.global_batch_tokens:,} tokens = {config.block_size} tokens x {args.micro_batch_size} sequences "
        f"x {args.accumulation(config.block_size, fabric.world_size)} micro-batches x {fabric.world_size} device(s)\n"
        f"run: steps {step:,} to {max_steps:,}, {max_steps * args.global_batch_tokens:,} tokens; {run_dir}"
    )
    if fabric.is_global_zero:
        run_dir.mkdir(parents=True, exist_ok=True)
        if tokenizer:
            (run_dir / "tokenizer").mkdir(exist_ok=True)
            shutil.copy(tokenizer.path, run_dir / "tokenizer")
        (run_dir / "args.json").write_text(json.dumps({"args": as_json(args), "model": config.to_dict()}, indent=1))
    train(fabric, args, model, optimizer, loader, val_set, step, max_steps, run_dir)


def train(
    fabric: Fabric,
    args: TrainArgs,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    loader: PackedLoader,
    val_set: ValidationSet | None,
    step: int,
    max_steps: int,
    run_dir: Path,
) -> None:
    config, world_size = model.module.config, fabric.world_size
    accumulation = args.accumulation(config.block_size, world_size)
    last_step = min(max_steps, args.stop_at_step or max_steps)
    if (end := loader.dataset.end) is not None:  # in sequences; the last batch may be smaller
        last_step = min(last_step, math.ceil(end / (args.global_batch_tokens // config.block_size)))
    peak = peak_flops(fabric.device, "bf16" if args.precision == "bf16" else "tf32")
    metrics = Metrics(run_dir, step, args.logger, as_json(args)) if fabric.is_global_zero else None
    interrupt = Interrupt()
    batches = iter(loader)
    t0, tokens_since, data_wait_s = time.perf_counter(), 0, 0.0
    model.train()

    while step < last_step:
        # Fetch the whole step, so that its valid targets are known before the first backward.
        t_fetch = time.perf_counter()
        first_sequence = loader.sequences
        micro_batches = list(itertools.islice(batches, accumulation))  # fewer where the data end
        data_wait_s += time.perf_counter() - t_fetch
        n_valid = sum((targets_of(batch) != IGNORE_INDEX).sum() for batch in micro_batches).to(fabric.device)
        n_valid = fabric.all_reduce(n_valid, reduce_op="sum")

        # Forward and backward. The gradient is that of the sum over all ranks' targets, divided once by their number;
        # FSDP averages gradients over ranks, hence x world_size.
        loss_sum = torch.zeros((), device=fabric.device)
        for i, batch in enumerate(micro_batches):
            with fabric.no_backward_sync(model, enabled=i < len(micro_batches) - 1):
                loss = forward(model, fabric.to_device(batch))
                fabric.backward(loss * (world_size / n_valid))
            loss_sum += loss.detach()

        # Clip and step. A gradient that is not finite, the same on all ranks, changes nothing.
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
        grad_norm = clip_and_step(optimizer, args.grad_clip)

        # The one wait for the device in an optimizer step: loss, norm, and whether any rank was asked to stop.
        asked = torch.tensor(float(interrupt.requested), device=fabric.device)
        loss_sum, asked = fabric.all_reduce(torch.stack((loss_sum, asked)), reduce_op="sum").tolist()
        loss, grad_norm, interrupted = loss_sum / n_valid.item(), grad_norm.item(), asked > 0
        if not math.isfinite(grad_norm):
            where = (
                f"step {step + 1} (global sequences {first_sequence:,} to {loader.sequences:,}, "
                f"from {loader.dataset.describe(first_sequence)})"
            )
            if args.nonfinite == "stop":
                raise ValueError(
                    f"{where}: loss {loss}, gradient norm {grad_norm}. Nothing was updated or saved; resume from the "
                    f"last checkpoint, with --nonfinite skip to leave this step out"
                )
            fabric.print(f"{where}: loss {loss}, gradient norm {grad_norm}: skipped")
        optimizer.zero_grad()
        step += 1
        tokens_since += args.global_batch_tokens

        # Log.
        done = step == last_step or interrupted
        if metrics and (step % args.log_interval == 0 or done):
            elapsed_s = time.perf_counter() - t0
            speed = tokens_since / elapsed_s
            mfu = speed / world_size * flops_per_token(config) / peak if peak else None
            metrics.log(
                step,
                tokens=step * args.global_batch_tokens,
                loss=loss,
                learning_rate=lr,
                grad_norm=grad_norm,
                tokens_per_s=round(speed),
                data_wait_s=round(data_wait_s, 4),
                **({"mfu": mfu} if mfu else {}),
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

        # Validate.
        t_pause = time.perf_counter()
        if val_set is not None and (step % args.eval_interval == 0 or done):
            val_loss = validate(fabric, model, val_set, args.micro_batch_size)
            bits_per_byte = val_loss / math.log(2) * tokens_per_byte(val_set)
            fabric.print(f"step {step}: validation loss {val_loss:.4f} nats/token, {bits_per_byte:.4f} bits/byte")
            if metrics:
                tokens = step * args.global_batch_tokens
                metrics.log(step, tokens=tokens, val_loss=val_loss, val_bits_per_byte=bits_per_byte)
                plot_loss({args.name: metrics.path}, run_dir / "loss.png")

        # Save.
        if step % args.save_interval == 0 or done:
            meta = {
                "tokens_seen": step * args.global_batch_tokens,
                "config": config.to_dict(),
                "loader": loader.state_dict(),
                "tokenizer": loader.dataset.tokenizer,
                "delimiters": loader.dataset.delimiters,
                "args": as_json(args),
            }
            t_save = time.perf_counter()
            saved = checkpoint.save(run_dir, step, model.module, optimizer, meta)
            checkpoint.prune(run_dir, args.keep_checkpoints, args.permanent_interval)
            fabric.print(f"step {step}: saved {saved} in {time.perf_counter() - t_save:.1f} s")
        t0 += time.perf_counter() - t_pause  # validation and checkpoints are not training speed
        if interrupted:
            fabric.print(f"interrupted: go on with --resume true from step {step}")
            break
    if metrics:
        metrics.close()


@torch.no_grad()
def validate(fabric: Fabric, model: torch.nn.Module, val_set: ValidationSet, micro_batch_size: int) -> float:
    """Mean loss in nats over every target of the set, the same batches each time, summed over ranks."""
    model.eval()
    total = torch.zeros(2, device=fabric.device, dtype=torch.float64)  # loss, targets
    for batch in val_set.batches(micro_batch_size, fabric.global_rank, fabric.world_size):
        batch = fabric.to_device(batch)
        total += torch.stack((forward(model, batch).double(), (targets_of(batch) != IGNORE_INDEX).sum()))
    model.train()
    loss, n_targets = fabric.all_reduce(total, reduce_op="sum").tolist()
    return loss / n_targets


def forward(model: torch.nn.Module, batch: torch.Tensor | DocumentBatch) -> torch.Tensor:
    """Loss summed over the targets of a batch; with documents, each sees itself alone."""
    tokens, cu_seqlens = (batch.tokens, batch.cu_seqlens) if isinstance(batch, DocumentBatch) else (batch, None)
    return model(tokens[:, :-1].clamp(min=0), targets_of(batch), cu_seqlens=cu_seqlens)


def targets_of(batch: torch.Tensor | DocumentBatch) -> torch.Tensor:
    """(B, T) next tokens, IGNORE_INDEX past the end of the data and, with documents, where another one begins."""
    if isinstance(batch, DocumentBatch):
        return batch.tokens[:, 1:].masked_fill(batch.loss_weights == 0, IGNORE_INDEX)
    return batch[:, 1:]


def launch(args: TrainArgs) -> Fabric:
    """A running Fabric: one device as it is; several through FSDP2, over all ranks of all nodes."""
    torch.set_float32_matmul_precision("high")
    on_gpu = args.accelerator in ("auto", "cuda", "gpu") and torch.cuda.is_available()
    if args.precision == "auto":
        args.precision = "bf16" if on_gpu and torch.cuda.is_bf16_supported() else "fp32"
    bf16 = args.precision == "bf16"

    def shard(model: GPT, mesh) -> GPT:
        # cast_forward_inputs would round the rotary tables to bf16.
        dtype = torch.bfloat16 if bf16 else torch.float32
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        mesh = mesh._flatten()
        for block in model.transformer.h:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        return fully_shard(model, mesh=mesh, mp_policy=policy)

    per_node = args.devices if args.devices != "auto" else torch.cuda.device_count() if on_gpu else 1
    world_size = int(os.environ.get("WORLD_SIZE", int(per_node) * args.num_nodes))
    fabric = Fabric(
        accelerator=args.accelerator,
        devices=args.devices,
        num_nodes=args.num_nodes,
        strategy=ModelParallelStrategy(shard) if world_size > 1 else "auto",
    )
    if "LT_CLI_USED" not in os.environ:  # `fabric run` has started the processes already
        fabric.launch()
    if not fabric.is_global_zero:
        warnings.simplefilter("ignore")  # rank 0 says it for all
    return fabric


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


class Interrupt:
    """Notes SIGTERM, SIGUSR1 and Ctrl-C, so that the loop can finish the step, save, and end."""

    def __init__(self) -> None:
        self.requested = False
        for signum in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(signum, self._note)

    def _note(self, signum: int, _frame: object) -> None:
        self.requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C ends it at once


def tokens_per_byte(val_set: ValidationSet) -> float:
    """Of the validation text; nan for shards without a manifest, which do not know how much text they hold."""
    manifests = [m for stream in val_set.streams.values() for m in stream.manifests]
    n_bytes = sum(m.text_bytes for m in manifests)
    return sum(m.tokens for m in manifests) / n_bytes if n_bytes else math.nan


def epochs(loader: PackedLoader) -> str:
    return "epochs " + " ".join(f"{name} {a['epochs']:.3g}" for name, a in loader.accounts().items())


def duration(seconds: float) -> str:
    days, rest = divmod(int(seconds), 86400)
    return f"{days} d {rest // 3600} h" if days else f"{rest // 3600}:{rest // 60 % 60:02d}:{rest % 60:02d}"


def as_json(args: TrainArgs) -> dict:
    return {k: str(v) if isinstance(v, Path) else v for k, v in asdict(args).items()}


if __name__ == "__main__":
    with one_line_errors():
        main(parse(TrainArgs))
