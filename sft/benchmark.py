"""How fast fine-tuning is, in real tokens a second, against transformers' Trainer with Liger; and in how much memory.

    python sft/benchmark.py --data guanaco.jsonl --tokenizer_path tokenizer/llama2

The same conversations and random weights of the true shape, all in one run. First, packed rows through the fast kernels
are compared with each conversation alone in fp32. Then sft/finetune.py runs as a user runs it, with the memory of the
process limited for adapters, and then Trainer: without padding (conversations flattened into one row for
FlashAttention-4), and padded, grouped by length.
"""

import csv
import gc
import os
import re
import runpy
import statistics
import sys
import time
from pathlib import Path
from unittest import mock

import torch

from lit_gpt.chat_data import PackedRows, load_conversations, pack_conversations
from lit_gpt.chat_template import ChatTemplate
from lit_gpt.cli import one_line_errors, parse
from lit_gpt.config import Config
from lit_gpt.hf import export
from lit_gpt.hf_tokenizer import export_tokenizer
from lit_gpt.kernels import IGNORE_INDEX, select_kernels
from lit_gpt.model import GPT
from lit_gpt.tokenizer import Tokenizer
from lit_gpt.weights import whole_folder

WARMUP_STEPS = 3


def main(
    data: Path,
    tokenizer_path: Path,
    out_dir: Path = Path("out/sft-benchmark"),
    model: str = "tiny_LLaMA_1b",
    steps: int = 10,
    micro_batch_size: int = 8,
    global_batch_tokens: int = 32768,
    stages: list[str] = ["check", "qlora", "lora", "full", "flat-37", "padded-8"],  # noqa: B006
) -> None:
    """Measure fine-tuning.

    Args:
        data: Conversations, the same for both.
        tokenizer_path: Folder or file of the model's tokenizer.
        out_dir: For the random base model and the runs; deleted by you.
        model: A preset of lit_gpt/config.py.
        steps: Optimizer steps of each run; the first three are not counted.
        micro_batch_size: Packed rows in our forward pass.
        global_batch_tokens: In our optimizer step. Trainer gets as many conversations as hold this many tokens.
        stages: What to run, in this order. flat-37 is Trainer with 37 conversations in its forward pass, without
            padding; padded-8 with 8, padded; padded-8-bf16 with weights and Adam's moments in bf16, which is faster and
            trains worse than fp32 as ours. With PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True Trainer, whose batches
            are of all sizes, needs less memory.
    """
    base = out_dir / "base"
    config = Config.from_name(model)
    if not base.exists():
        write_base(config, tokenizer_path, base)
    tokenizer = Tokenizer(base)
    template = ChatTemplate.named("zephyr", tokenizer)
    _, conversations = load_conversations(data)
    rows, report = pack_conversations(conversations, template, config.block_size)
    print(f"{data}: {report}", flush=True)

    common = ["--base", base, "--data", data, "--template", "zephyr", "--val_fraction", 0, "--samples", 0]
    common += ["--epochs", 100, "--stop_at_step", steps, "--out_dir", out_dir, "--resume", "false"]
    batch = ["--micro_batch_size", micro_batch_size, "--global_batch_tokens", global_batch_tokens]
    small = ["--micro_batch_size", 1, "--global_batch_tokens", 8192, "--recompute", "true"]
    speeds: dict[str, float] = {}
    for stage in stages:
        try:
            if stage == "check":
                check(config, rows)
            elif stage == "full":
                speeds["ours, full"] = finetune([*common, *batch, "--name", f"full-{os.getpid()}"])
            elif stage == "lora":
                flags = ["--method", "lora", "--micro_batch_size", 2, "--global_batch_tokens", global_batch_tokens]
                speeds["ours, LoRA"] = finetune([*common, *flags, "--name", f"lora-{os.getpid()}"], limit_gb=16)
            elif stage == "qlora":
                flags = ["--method", "qlora", *small, "--name", f"qlora-{os.getpid()}"]
                speeds["ours, QLoRA"] = finetune([*common, *flags], limit_gb=4)
            elif match := re.fullmatch(r"(flat|padded)-(\d+)(-bf16)?", stage):
                batch_size, dtype = int(match[2]), torch.bfloat16 if match[3] else torch.float32
                per_step = max(1, round(global_batch_tokens / (report.tokens / report.kept) / batch_size))
                flat = match[1] == "flat"
                speeds[f"Trainer, {stage}"] = trainer(base, rows, steps, batch_size, per_step, dtype, flat)
            else:
                raise ValueError(f"--stages: unknown stage {stage!r}")
        except (RuntimeError, ImportError, SystemExit) as e:  # the others are still worth their time
            print(f"{stage}: FAILED: {type(e).__name__}: {str(e)[:500]}", flush=True)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    for name, speed in speeds.items():
        print(f"{name}: {speed:,.0f} tokens/s", flush=True)
    for kind, what in (("flat", "without"), ("padded", "with")):
        theirs = [speed for name, speed in speeds.items() if name.startswith(f"Trainer, {kind}")]
        if theirs and "ours, full" in speeds:
            print(f"full: {speeds['ours, full'] / max(theirs):.2f} times Trainer {what} padding", flush=True)


def write_base(config: Config, tokenizer_path: Path, folder: Path) -> None:
    """A Hugging Face folder in bf16 with random weights."""
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = GPT(config)
    model.init_weights(0)
    weights = {name: p.detach().bfloat16().cpu() for name, p in model.named_parameters()}
    with whole_folder(folder) as temporary:
        ids = export_tokenizer(tokenizer_path, temporary, add_bos=False, max_length=config.block_size)
        export(config, weights, temporary, special_ids=ids)


def check(config: Config, rows: PackedRows) -> None:
    """Packed through the selected kernels in bf16, against one after the other through the references in fp32."""
    small = Config(**{**config.to_dict(), "n_layer": 2})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    heads = (small.n_head, small.n_query_groups, small.head_size)
    kernels = select_kernels("auto", device=device, dtype=torch.bfloat16, heads=heads)
    with device:
        reference, fast = GPT(small), GPT(small, kernels)
    reference.init_weights(1)
    reference.bfloat16().float()  # the same weights, that bf16 holds exactly
    fast.load_state_dict(reference.state_dict())
    fast.bfloat16()
    batch = rows.batch([len(rows) - 1, len(rows) // 2])
    with torch.no_grad():
        idx, targets, cu_seqlens, trained = (tensor.to(device) for tensor in batch)
        packed = fast(idx, targets, cu_seqlens=cu_seqlens, logits_at=trained)
        alone, flat = 0.0, (idx.flatten(), targets.flatten())
        for begin, end in zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True):
            if (flat[1][begin:end] != IGNORE_INDEX).any():
                alone += reference(flat[0][None, begin:end], flat[1][None, begin:end]).item()
    n = (batch.targets != IGNORE_INDEX).sum().item()
    print(
        f"check: {len(batch.cu_seqlens) - 1} packed pieces, loss {packed.item() / n:.5f} in bf16 and {alone / n:.5f} "
        f"alone in fp32: {abs(packed.item() / alone - 1):.1e} apart\n{kernels.table()}",
        flush=True,
    )


def finetune(flags: list, limit_gb: float | None = None) -> float:
    """Run sft/finetune.py in this process and return the median of its tokens/s.

    Args:
        limit_gb: of the process, of which a CUDA context takes 0.6.
    """
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction((limit_gb - 0.6) * 1e9 / total if limit_gb else 1.0)
        torch.cuda.reset_peak_memory_stats()
    argv, sys.argv = sys.argv, ["sft/finetune.py", *map(str, flags)]
    try:
        with mock.patch("lit_gpt.checkpoint.save"):  # 13 GB that tell nothing about speed
            runpy.run_path(str(Path(__file__).with_name("finetune.py")), run_name="__main__")
    finally:
        sys.argv = argv
        if torch.cuda.is_available():
            torch.cuda.set_per_process_memory_fraction(1.0)
    flags = dict(zip(flags[::2], flags[1::2], strict=True))
    with (flags["--out_dir"] / flags["--name"] / "metrics.csv").open() as f:
        speeds = [float(row["tokens_per_s"]) for row in csv.DictReader(f) if row["tokens_per_s"]]
    if torch.cuda.is_available():
        used = torch.cuda.max_memory_reserved() / 1e9
        print(f"peak: {used:.2f} GB reserved, limit {limit_gb or 'none'} GB less 0.6 for the context", flush=True)
    print(f"tokens/s of each step: {' '.join(f'{s:.0f}' for s in speeds)}", flush=True)
    return statistics.median(speeds[WARMUP_STEPS:])


def trainer(
    base: Path, rows: PackedRows, steps: int, batch_size: int, accumulation: int, dtype: torch.dtype, flat: bool
) -> float:
    """transformers' Trainer at its best: bf16 autocast, fused AdamW, Liger's kernels, batches made by workers.

    Args:
        dtype: of the weights and of Adam's moments.
        flat: conversations end to end in one row that attention keeps apart, by FlashAttention-4 where there is a GPU.
            Else padded to the longest of a batch, grouped by length, with PyTorch's attention.
    """
    from transformers import (
        AutoModelForCausalLM,
        DataCollatorForSeq2Seq,
        DataCollatorWithFlattening,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    on_gpu = torch.cuda.is_available()
    examples = [
        {"input_ids": ids.tolist(), "labels": ids.long().masked_fill(~trained, IGNORE_INDEX).tolist()}
        for ids, trained in zip(rows.ids, rows.trained, strict=True)
    ]
    seen = torch.zeros((), dtype=torch.int64, device="cuda" if on_gpu else "cpu")
    times: list[tuple[float, int]] = []

    def count(_: torch.nn.Module, __: tuple, inputs: dict) -> None:
        seen.add_(inputs["input_ids"].numel() if flat else inputs["attention_mask"].sum())

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__) -> None:
            tokens = seen.item()  # waits for the device
            times.append((time.perf_counter(), tokens))

    if flat:
        collate = DataCollatorWithFlattening(return_flash_attn_kwargs=on_gpu)
    else:
        from transformers import PreTrainedTokenizerFast

        padding = PreTrainedTokenizerFast(tokenizer_file=str(base / "tokenizer.json"), pad_token="<unk>")
        collate = DataCollatorForSeq2Seq(padding)
    attention = {"attn_implementation": "flash_attention_4"} if flat and on_gpu else {}
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, **attention)
    model.config.use_cache = False
    model.register_forward_pre_hook(count, with_kwargs=True)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    args = TrainingArguments(
        output_dir=base.parent / "trainer",
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        bf16=on_gpu,
        optim="adamw_torch_fused",
        use_liger_kernel=on_gpu,
        learning_rate=2e-5,
        max_grad_norm=1.0,
        save_strategy="no",
        logging_steps=1,
        report_to=[],
        remove_unused_columns=False,
        dataloader_num_workers=2,  # batches are made beside the device's work, as ours
        dataloader_persistent_workers=True,
        **({} if flat else {"train_sampling_strategy": "group_by_length"}),
    )
    Trainer(model=model, args=args, train_dataset=examples, data_collator=collate, callbacks=[Clock()]).train()
    if on_gpu:
        print(f"peak: {torch.cuda.max_memory_reserved() / 1e9:.2f} GB reserved", flush=True)
    speeds = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in zip(times[:-1], times[1:], strict=True)]
    print(f"tokens/s of each step: {' '.join(f'{s:.0f}' for s in speeds)}", flush=True)
    return statistics.median(speeds[WARMUP_STEPS - 1 :])


if __name__ == "__main__":
    with one_line_errors():
        parse(main)
