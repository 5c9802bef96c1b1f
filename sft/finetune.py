"""Fine-tune a model to chat: all of its weights, LoRA, or QLoRA.

    python sft/finetune.py --base out/tinyllama --data oasst1.trees.jsonl
    python sft/finetune.py --base TinyLlama/TinyLlama_v1.1 --data guanaco.jsonl --method lora --merge true
    python sft/chat.py --model out/chat/hf

Everything that decides the result is a field of FinetuneArgs. A run lives in out/<name>/: args.json, metrics.csv,
loss.png, checkpoints step-00000050/ (the newest and the best), and what came of it: hf/, a Hugging Face folder with the
chat template, or adapters/, which peft loads.
"""

import sys

from lit_gpt import cli, precompile

if __name__ == "__main__":
    cli.quiet_imports()
    precompile.begin(sys.argv)  # the kernels, while the libraries below are imported

import json
import math
import os
import shutil
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies import DDPStrategy, ModelParallelStrategy
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from lit_gpt import checkpoint, cluster
from lit_gpt.chat_data import ChatBatch, PackedRows, load_conversations, pack_conversations
from lit_gpt.chat_template import ChatTemplate, Message
from lit_gpt.cli import check_flags, one_line_errors, out_of_memory, parse
from lit_gpt.hf import export
from lit_gpt.hf_tokenizer import export_tokenizer, starts_with_bos
from lit_gpt.hub import local_folder
from lit_gpt.interrupt import Interrupt
from lit_gpt.kernels import select_kernels
from lit_gpt.lora import add_lora, merge, write_adapters
from lit_gpt.metrics import Metrics, plot_loss
from lit_gpt.model import GPT
from lit_gpt.optim import clip_and_step, lr_at, param_groups
from lit_gpt.pretrained import Pretrained, load_model, open_pretrained, refuse_other_tokenizer
from lit_gpt.tokenizer import Tokenizer
from lit_gpt.weights import whole_folder


@dataclass
class FinetuneArgs:
    """Fine-tune a model to chat."""

    base: str
    """What to start from: a run, a step-* checkpoint, a Hugging Face folder, or the id of a model on the hub."""
    data: Path
    """Conversations: .json, .jsonl, .jsonl.gz or .parquet."""
    format: str | None = None
    """Of data: messages, sharegpt, dolly, alpaca, oasst1 or guanaco. Default: found from the first row."""
    val_data: Path | None = None
    """Conversations to validate on. Default: a part of data, which is then not trained on:"""
    val_fraction: float = 0.05
    """... this part. 0: no validation."""
    template: str = "auto"
    """zephyr, chatml, guanaco, llama2 or llama3; auto is the base's own, or zephyr if it has none."""
    tokenizer_path: Path | None = None
    """Folder or file; default: the one that is kept with the base."""
    model_name: str | None = None
    """The preset of a .pth file that does not say."""

    method: Literal["full", "lora", "qlora"] = "full"
    """Train all weights, adapters beside frozen weights, or adapters beside 4-bit ones."""
    lora_rank: int = 16
    """Width of the adapters, which every linear layer of the blocks gets."""
    lora_alpha: float = 32.0
    """Adapters are scaled by lora_alpha / lora_rank."""
    merge: bool = False
    """After lora or qlora, write hf/ too, with the adapters added to the base's weights."""
    neftune_alpha: float = 0.0
    """Noise on the embeddings while training, uniform in ± alpha / √(length · width); 5 is usual (arXiv:2310.05914)."""

    block_size: int | None = None
    """Tokens of a row into which conversations are packed, and the longest conversation; default: the model's."""
    epochs: float = 3.0
    """Passes over the data."""
    max_steps: int | None = None
    """Optimizer steps of the whole run, instead of epochs."""
    global_batch_tokens: int = 32_768
    """Tokens in one optimizer step, padding included, over all devices and micro-batches."""
    micro_batch_size: int = 4
    """Rows in one forward and backward pass of one device."""
    learning_rate: float | None = None
    """Peak, reached after the warmup; default 2e-5 for full, 2e-4 for adapters."""
    min_lr: float = 0.0
    """Of the cosine's last step."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """After the warmup."""
    warmup: float = 0.03
    """Share of the steps in which the learning rate rises."""
    weight_decay: float = 0.0
    """AdamW's."""
    beta2: float = 0.95
    """AdamW's decay of the gradient's square; the mean's is 0.9."""
    grad_clip: float = 1.0
    """Largest norm of the whole gradient."""
    stop_at_step: int | None = None
    """Save and end after this step; the schedule stays that of the whole run."""

    devices: int | str = "auto"
    """Devices of this machine; auto is all GPUs, or the CPU. On several, full training is sharded (FSDP2), and adapters
    have the frozen model on each."""
    accelerator: str = "auto"
    """auto, cpu, cuda or mps."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """bf16 computes in bfloat16, over fp32 trained weights; auto is bf16 on a GPU that has it, else fp32."""
    kernels: str = "auto"
    """Backends of the fused operations, as for pretraining."""
    recompute: bool = False
    """Keep no activations inside a block but compute them again in the backward: slower, and fits smaller GPUs."""
    seed: int = 3407
    """Of the split, the order of the data, the adapters and the noise."""

    name: str = "chat"
    """Of the run: its folder is out_dir/name."""
    out_dir: Path = Path("out")
    """Where runs live."""
    resume: bool = False
    """Go on from the newest checkpoint of this run."""
    eval_interval: int | None = None
    """Steps between two validations, each with a checkpoint; default: an epoch. There is one at the end, too."""
    samples: int = 2
    """Questions of the validation data to answer at each validation."""
    logger: Literal["csv", "wandb", "tensorboard"] = "csv"
    """metrics.csv is written in any case."""

    def __post_init__(self) -> None:
        positive = ("epochs", "global_batch_tokens", "micro_batch_size", "learning_rate", "grad_clip", "lora_rank")
        positive += ("lora_alpha", "eval_interval", "max_steps", "stop_at_step")
        check_flags(self, positive)

    def peak_lr(self) -> float:
        return self.learning_rate or (2e-5 if self.method == "full" else 2e-4)

    def batch_rows(self, block_size: int) -> int:
        """Rows in one optimizer step."""
        return self.global_batch_tokens // block_size

    def check(self, block_size: int, model_block_size: int, world_size: int) -> None:
        """Raises ValueError with everything that is wrong, each named by its flag."""
        problems = []
        if not 1 < block_size <= model_block_size:
            problems.append(f"--block_size {block_size} is not between 2 and the model's {model_block_size}")
        micro_step = block_size * self.micro_batch_size * world_size
        if self.global_batch_tokens < micro_step or self.global_batch_tokens % micro_step:
            problems.append(
                f"--global_batch_tokens {self.global_batch_tokens:,} is not a multiple of {micro_step:,} = "
                f"{block_size} tokens x --micro_batch_size {self.micro_batch_size} x {world_size} device(s)"
            )
        if not 0 <= self.min_lr <= self.peak_lr():
            problems.append(f"--min_lr {self.min_lr} is not between 0 and --learning_rate {self.peak_lr()}")
        if not 0 <= self.val_fraction < 1 or not 0 <= self.warmup <= 1:
            problems.append("--val_fraction and --warmup are shares between 0 and 1")
        if self.merge and self.method == "full":
            problems.append("--merge is for --method lora and qlora; full training always writes hf/")
        if problems:
            raise ValueError("; ".join(problems))


@out_of_memory("Give a smaller --micro_batch_size, --recompute true, or --method lora or qlora")
def main(args: FinetuneArgs) -> None:
    fabric = launch(args)
    run_dir = args.out_dir / args.name
    resume_from = find_checkpoint(args, run_dir)

    # What we start from, and how a conversation is written for it.
    base = local_folder(args.base)
    found = open_pretrained(base, args.model_name)
    tokenizer_path = args.tokenizer_path or found.tokenizer
    if tokenizer_path is None:
        raise ValueError(f"{args.base} holds no tokenizer: give --tokenizer_path")
    tokenizer = Tokenizer(tokenizer_path)
    refuse_other_tokenizer(found, tokenizer)
    template = choose_template(args.template, tokenizer)
    config, block_size = found.config, args.block_size or found.config.block_size
    args.check(block_size, config.block_size, fabric.world_size)
    fabric.print(f"{args.base}: {config.name}; chat template: {template.name}, a turn ends with {template.end_of_turn}")

    # The conversations, before minutes go into the model.
    format, conversations = load_conversations(args.data, args.format)
    if args.val_data is not None:
        held_out = load_conversations(args.val_data)[1]
    else:
        order = np.random.default_rng(args.seed).permutation(len(conversations))
        n = min(math.ceil(args.val_fraction * len(conversations)), len(conversations) - 1)
        held_out, conversations = [conversations[i] for i in order[:n]], [conversations[i] for i in order[n:]]
    train_rows, report = pack_conversations(conversations, template, block_size, progress=fabric.is_global_zero)
    val_rows, val_report = pack_conversations(held_out, template, block_size)
    fabric.print(f"{args.data} ({format}): {report}\nvalidation: {val_report}")
    if not report.trained:
        raise ValueError(f"{args.data}: no conversation is left to train on")
    if not val_report.trained:
        way_out = "a larger --val_fraction, or --val_data, gives one"
        warnings.warn(f"no validation: the newest checkpoint is taken as the best; {way_out}", stacklevel=1)
    questions = [prompt for c in held_out if (prompt := first_question(c, template, block_size))][: args.samples]

    # The model, and of it what is trained.
    bf16 = args.precision == "bf16"
    dtype = torch.bfloat16 if bf16 else torch.float32
    heads = (config.n_head, config.n_query_groups, config.head_size)
    kernels = select_kernels(args.kernels, device=fabric.device, dtype=dtype, heads=heads)
    if args.method == "full":
        model = load_model(found, kernels, fabric.device, torch.float32).requires_grad_(True)
        if bf16 and fabric.world_size == 1:  # FSDP casts what it gathers
            model.compute_in(torch.bfloat16)
    elif args.method == "lora":
        model = load_model(found, kernels, fabric.device, dtype)
        adapters = add_lora(model, args.lora_rank, args.lora_alpha, args.seed)
    else:
        model = load_model(found, kernels, "cpu", dtype)
        adapters = add_lora(model, args.lora_rank, args.lora_alpha, args.seed, quantize_on=fabric.device)
    model.recompute = args.recompute
    noise = Neftune(model, args.neftune_alpha) if args.neftune_alpha else None
    if kernels.compile_blocks:
        for block in model.transformer.h:
            block.compile()
    model = fabric.setup_module(model)
    trained = model.module if args.method == "full" else adapters
    groups = param_groups(trained, args.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=args.peak_lr(), betas=(0.9, args.beta2), fused=True)

    # Resume: data, noise and learning rate follow from the step, the rest is in the checkpoint.
    flags = ("method", "lora_rank", "global_batch_tokens", "seed")
    fixed = {"rows": len(train_rows), "tokens": report.tokens, "block_size": block_size, "template": template.name}
    fixed |= {flag: getattr(args, flag) for flag in flags}
    step = 0
    meta = {"config": config.to_dict(), "fixed": fixed, "tokens_seen": 0, "best": None}
    if resume_from is not None:
        saved = checkpoint.check(resume_from)
        if saved["config"] != meta["config"]:
            raise ValueError(f"{resume_from} is of another model than --base {args.base}")
        if changed := [f"{k} {was} -> {fixed[k]}" for k, was in saved["fixed"].items() if was != fixed[k]]:
            raise ValueError(f"{resume_from} cannot go on with other data or settings: {', '.join(changed)}")
        checkpoint.load(resume_from, trained, optimizer)
        step, meta = saved["step"], {key: saved[key] for key in meta}
        fabric.print(f"resumed weights, optimizer and position from {resume_from}")

    n_trained = sum(p.numel() for p in trained.parameters())
    steps_an_epoch = math.ceil(len(train_rows) / args.batch_rows(block_size))
    max_steps = args.max_steps or max(1, round(args.epochs * steps_an_epoch))
    fabric.print(
        f"{args.method}: {n_trained:,} trained parameters on {fabric.world_size} x {fabric.device.type}, "
        f"{args.precision}\n{kernels.table()}\n"
        f"run: steps {step} to {max_steps}, {steps_an_epoch} an epoch of {args.batch_rows(block_size)} rows; {run_dir}"
    )
    if fabric.is_global_zero:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "args.json").write_text(json.dumps({"args": as_json(args), "model": config.to_dict()}, indent=1))
    meta["args"] = as_json(args)
    state = (trained, optimizer, meta)
    finished = train(fabric, args, model, state, train_rows, val_rows, template, questions, noise, step, max_steps)
    if finished and fabric.is_global_zero:
        adapters = None if args.method == "full" else adapters
        write_result(args, found, tokenizer_path, template, adapters, meta["best"]["step"])
    fabric.barrier()


def train(
    fabric: Fabric,
    args: FinetuneArgs,
    model: torch.nn.Module,
    state: tuple[torch.nn.Module, torch.optim.Optimizer, dict],
    rows: PackedRows,
    val_rows: PackedRows,
    template: ChatTemplate,
    questions: list[list[int]],
    noise: "Neftune | None",
    step: int,
    max_steps: int,
) -> bool:
    """True when the run came to its last step; false when it was interrupted."""
    trained, optimizer, meta = state
    run_dir = args.out_dir / args.name
    batch_rows = args.batch_rows(rows.block_size)
    eval_interval = args.eval_interval or math.ceil(len(rows) / batch_rows)
    last_step = min(max_steps, args.stop_at_step or max_steps)
    metrics = Metrics(run_dir, step, args.logger, as_json(args)) if fabric.is_global_zero else None
    interrupt = Interrupt(fabric.is_global_zero)
    if step == 0 and len(val_rows):  # what there is to improve on
        val_loss = validate(fabric, model, val_rows, args.micro_batch_size)
        fabric.print(f"step 0: validation loss {val_loss:.4f} nats per trained token")
        if metrics:
            metrics.log(0, tokens=0, val_loss=val_loss)
    t0 = time.perf_counter()
    model.train()

    upcoming = fetch(fabric, rows, step, batch_rows, args)
    while step < last_step:
        micro_batches, n_trained, n_tokens = upcoming

        # Forward and backward. The gradient is that of the sum over all ranks' trained tokens, divided once by their
        # number; it is averaged over ranks, hence x world_size.
        loss_sum = torch.zeros((), device=fabric.device)
        for i, batch in enumerate(micro_batches):
            if noise is not None:
                noise.prepare(batch, seed=(args.seed, step, i, fabric.global_rank))
            with fabric.no_backward_sync(model, enabled=i < len(micro_batches) - 1):
                loss = model(batch.idx, batch.targets, cu_seqlens=batch.cu_seqlens, logits_at=batch.trained)
                fabric.backward(loss * (fabric.world_size / n_trained))
            loss_sum += loss.detach()

        # Clip and step.
        lr = learning_rate(args, step, max_steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        grad_norm = clip_and_step(optimizer, args.grad_clip)
        upcoming = fetch(fabric, rows, step + 1, batch_rows, args)  # while the device computes
        asked = torch.tensor(float(interrupt.requested), device=fabric.device)
        loss_sum, asked = fabric.all_reduce(torch.stack((loss_sum, asked)), reduce_op="sum").tolist()
        loss, grad_norm, interrupted = loss_sum / n_trained, grad_norm.item(), asked > 0
        if not math.isfinite(grad_norm):
            raise ValueError(
                f"step {step + 1}: loss {loss}, gradient norm {grad_norm}; nothing was updated. Lower --learning_rate"
            )
        optimizer.zero_grad()
        step += 1
        meta["tokens_seen"] += n_tokens

        # Log.
        done = step == last_step or interrupted
        if metrics:
            t1 = time.perf_counter()
            speed, t0 = n_tokens / (t1 - t0), t1
            metrics.log(
                step,
                tokens=meta["tokens_seen"],
                loss=loss,
                learning_rate=lr,
                grad_norm=grad_norm,
                tokens_per_s=round(speed),
            )
            print(
                f"step {step:>{len(str(max_steps))}}/{max_steps} | loss {loss:.4f} | lr {lr:.2e} | "
                f"norm {grad_norm:.2f} | {n_tokens:,} tokens, {n_trained:,} of them trained | {speed:,.0f} tokens/s",
                flush=True,
            )

        # Validate, answer, save. The newest and the best checkpoint stay.
        if step % eval_interval == 0 or done:
            val_loss = validate(fabric, model, val_rows, args.micro_batch_size) if len(val_rows) else None
            if val_loss is not None:
                fabric.print(f"step {step}: validation loss {val_loss:.4f} nats per trained token")
                if metrics:
                    metrics.log(step, tokens=meta["tokens_seen"], val_loss=val_loss)
            if metrics:
                plot_loss({args.name: metrics.path}, run_dir / "loss.png")
            for prompt in questions:
                reply = answer(fabric, model, prompt, template)
                fabric.print(f"--- {template.tokenizer.decode(prompt)[-200:].strip()}\n>>> {reply}")
            if isinstance(trained, FSDPModule):
                trained.reshard()  # a forward without a backward leaves embedding and head gathered
            if meta["best"] is None or val_loss is None or val_loss <= meta["best"]["val_loss"]:
                meta["best"] = {"step": step, "val_loss": val_loss}
            saved = checkpoint.save(run_dir, step, trained, optimizer, meta)
            if fabric.is_global_zero:
                for old in checkpoint.steps(run_dir):
                    if int(old.name.removeprefix("step-")) not in (step, meta["best"]["step"]):
                        shutil.rmtree(old)
            fabric.print(f"step {step}: saved {saved}; the best is step {meta['best']['step']}")
            t0 = time.perf_counter()
        if interrupted:
            fabric.print(f"interrupted: go on with --resume true from step {step}")
            break
    if metrics:
        metrics.close()
    return step == max_steps


def fetch(
    fabric: Fabric, rows: PackedRows, step: int, batch_rows: int, args: FinetuneArgs
) -> tuple[list[ChatBatch], int, int]:
    """This rank's micro-batches of a step, and how many targets and tokens all ranks have in it: a function of seed and
    step alone, so a resume needs no other position."""
    steps_an_epoch = math.ceil(len(rows) / batch_rows)
    epoch, place = divmod(step, steps_an_epoch)
    order = np.random.default_rng((args.seed, epoch)).permutation(len(rows))
    indices = order[place * batch_rows : (place + 1) * batch_rows].tolist()  # fewer at the end of an epoch
    n_targets, n_tokens = (sum(counts[i] for i in indices) for counts in (rows.targets, rows.tokens))
    return list(micro_batches_of(fabric, rows, indices, args.micro_batch_size)), n_targets, n_tokens


def micro_batches_of(
    fabric: Fabric, rows: PackedRows, indices: list[int], micro_batch_size: int
) -> Iterator[ChatBatch]:
    """This rank's share of these rows, on its device; every rank has as many, with rows of padding at the end."""
    together = micro_batch_size * fabric.world_size
    indices = [*indices, *[None] * (-len(indices) % together)]
    for begin in range(0, len(indices), together):
        first = begin + fabric.global_rank * micro_batch_size
        batch = rows.batch(indices[first : first + micro_batch_size])
        if fabric.device.type == "cuda":  # a copy out of pinned memory waits for nothing
            batch = [tensor.pin_memory() for tensor in batch]
        yield ChatBatch(*fabric.to_device(tuple(batch)))


def learning_rate(args: FinetuneArgs, step: int, max_steps: int) -> float:
    """Warmup, then a cosine to min_lr, or the peak throughout."""
    peak, warmup_steps = args.peak_lr(), round(args.warmup * max_steps)
    low = args.min_lr if args.schedule == "cosine" else peak
    return lr_at(step, max_steps=max_steps, warmup_steps=warmup_steps, learning_rate=peak, min_lr=low)


@torch.no_grad()
def validate(fabric: Fabric, model: torch.nn.Module, rows: PackedRows, micro_batch_size: int) -> float:
    """Mean loss in nats over every trained token of the rows, summed over ranks."""
    model.eval()
    total = torch.zeros((), device=fabric.device, dtype=torch.float64)
    for batch in micro_batches_of(fabric, rows, list(range(len(rows))), micro_batch_size):
        total += model(batch.idx, batch.targets, cu_seqlens=batch.cu_seqlens, logits_at=batch.trained)
    model.train()
    return fabric.all_reduce(total, reduce_op="sum").item() / sum(rows.targets)


@torch.no_grad()
def answer(
    fabric: Fabric, model: torch.nn.Module, prompt: list[int], template: ChatTemplate, max_new_tokens: int = 64
) -> str:
    """The most likely reply, and whether it ended by itself. Without a cache: this is the forward of training, which
    works sharded and over fp32 weights too, and what is quadratic in 64 tokens is short."""
    model.eval()
    ids = list(prompt)
    longest = min(len(prompt) + max_new_tokens, model.module.config.block_size)
    while len(ids) < longest and (len(ids) == len(prompt) or ids[-1] != template.eos_id):
        logits = model(torch.tensor([ids], device=fabric.device))[0, -1, : model.module.config.vocab_size]
        ids.append(int(logits.argmax()))
    model.train()
    end = "" if ids[-1] == template.eos_id else " ..."
    return template.tokenizer.decode(ids[len(prompt) :]).strip() + end


def first_question(conversation: list[Message], template: ChatTemplate, block_size: int) -> list[int] | None:
    """The prompt up to the first reply, if it is a reasonable one."""
    n = next((i for i, m in enumerate(conversation) if m["role"] == "assistant"), 0)
    try:
        prompt = template.prompt(conversation[:n])
    except ValueError:
        return None
    return prompt if len(prompt) <= block_size // 2 else None


class Neftune:
    """Noisy embeddings in training (Jain et al. 2023, arXiv:2310.05914): uniform in ± alpha / √(L C), where L is the
    length of the token's own conversation, in a packed row too. A function of the seed, so that a resume repeats it."""

    def __init__(self, model: GPT, alpha: float) -> None:
        self.alpha = alpha
        self.scale: torch.Tensor | None = None
        model.transformer.wte.register_forward_hook(self._add)

    def prepare(self, batch: ChatBatch, seed: tuple[int, ...]) -> None:
        lengths = batch.cu_seqlens.diff()
        per_token = lengths.repeat_interleave(lengths).view(batch.idx.shape)  # (B, T)
        self.scale = self.alpha / per_token.float().sqrt()
        numbers = np.random.default_rng(seed).integers(2**62)
        self.generator = torch.Generator(batch.idx.device).manual_seed(int(numbers))

    def _add(self, module: torch.nn.Module, _: tuple, x: torch.Tensor) -> torch.Tensor:
        if not (torch.is_grad_enabled() and self.scale is not None):
            return x
        noise = torch.rand(x.shape, generator=self.generator, device=x.device) * 2 - 1  # (B, T, C)
        return x + (noise * self.scale[..., None] / math.sqrt(x.size(-1))).to(x.dtype)


def write_result(
    args: FinetuneArgs,
    found: Pretrained,
    tokenizer_path: Path,
    template: ChatTemplate,
    adapters: torch.nn.ModuleDict | None,
    best_step: int,
) -> None:
    """The best checkpoint as hf/ or adapters/, each appearing when it is whole."""
    run_dir = args.out_dir / args.name
    weights = checkpoint.load_weights(run_dir / f"step-{best_step:08d}")
    print(f"writing the best checkpoint, step {best_step}")

    def write_tokenizer(folder: Path) -> dict[str, int]:
        add_bos = "bos" in found.delimiters if found.delimiters else starts_with_bos(tokenizer_path)
        return export_tokenizer(tokenizer_path, folder, add_bos=add_bos, max_length=found.config.block_size)

    if adapters is not None:
        adapters.load_state_dict(weights)
        with whole_folder(run_dir / "adapters", overwrite=True) as folder:
            write_adapters(adapters, found.config, folder, args.base)
            write_tokenizer(folder)
            template.write(folder)
        print(f"adapters, for peft and sft/chat.py: {run_dir / 'adapters'}")
        if not args.merge:
            return
        weights = merge(found.config, found.weights, run_dir / "adapters")
    with whole_folder(run_dir / "hf", overwrite=True) as folder:
        special_ids = write_tokenizer(folder)
        dtype = found.weights["transformer.wte.weight"].dtype  # of the base's files
        export(found.config, weights, folder, dtype=dtype, special_ids=special_ids)
        template.write(folder)
    print(f"Hugging Face folder with its chat template; talk to it: python sft/chat.py --model {run_dir / 'hf'}")


def launch(args: FinetuneArgs) -> Fabric:
    """A running Fabric: one device as it is; several through FSDP2, or with the frozen model on each."""
    torch.set_float32_matmul_precision("high")
    on_gpu = cluster.on_gpu(args.accelerator)
    if args.precision == "auto":
        args.precision = cluster.auto_precision(on_gpu)
    bf16 = args.precision == "bf16"

    def shard(model: GPT, mesh) -> GPT:
        # cast_forward_inputs would round the rotary tables to bf16.
        dtype = torch.bfloat16 if bf16 else torch.float32
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        mesh = mesh._flatten()
        for block in model.transformer.h:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        return fully_shard(model, mesh=mesh, mp_policy=policy)

    devices, world_size = cluster.processes(args.devices, on_gpu)
    strategy = "auto"
    if world_size > 1:
        strategy = ModelParallelStrategy(shard) if args.method == "full" else DDPStrategy()
    fabric = Fabric(
        accelerator=args.accelerator,
        devices="auto" if "LT_CLI_USED" in os.environ else devices,
        num_nodes=world_size // devices,
        strategy=strategy,
    )
    if "LT_CLI_USED" not in os.environ:  # `fabric run` has started the processes already
        fabric.launch()
    if not fabric.is_global_zero:
        warnings.simplefilter("ignore")  # rank 0 says it for all
    return fabric


def choose_template(name: str, tokenizer: Tokenizer) -> ChatTemplate:
    if name != "auto":
        return ChatTemplate.named(name, tokenizer)
    return ChatTemplate.of_model(tokenizer.path.parent, tokenizer) or ChatTemplate.named("zephyr", tokenizer)


def find_checkpoint(args: FinetuneArgs, run_dir: Path) -> Path | None:
    """The checkpoint to go on from, None to start anew; a run is never overwritten."""
    existing = checkpoint.steps(run_dir)
    if existing and not args.resume:
        raise ValueError(
            f"{run_dir} already holds {existing[-1].name}: pass --resume true to go on, another --name, or delete it"
        )
    if args.resume and not existing:
        raise ValueError(f"--resume true: {run_dir} holds no complete checkpoint")
    return existing[-1] if existing else None


def as_json(args: FinetuneArgs) -> dict:
    return {k: str(v) if isinstance(v, Path) else v for k, v in asdict(args).items()}


if __name__ == "__main__":
    with one_line_errors():
        main(parse(FinetuneArgs))
