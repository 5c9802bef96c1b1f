"""Score a model on lm_eval's tasks.

    python scripts/evaluate.py --checkpoint_dir out/tinyllama --tasks commonsense --out results.json
    torchrun --nproc-per-node 8 scripts/evaluate.py ...                     # or --devices 8
    python scripts/evaluate.py --checkpoint_dir out/tinyllama --tasks_dir my/tasks --tasks my_task --out mine.json

Groups: commonsense (TinyLlama's seven tasks and their average), instruct (MMLU 5-shot, BBH 3-shot, DROP 3-shot,
HumanEval), and lm_eval's own. EVAL.md explains; scripts/report.py makes tables and pictures of the results.
"""

import importlib.metadata
import json
import os
import time
import warnings
from dataclasses import asdict, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

from lit_gpt import checkpoint, cluster, perplexity
from lit_gpt.cli import one_line_errors, parse
from lit_gpt.hf_tokenizer import starts_with_bos
from lit_gpt.kernels import select_kernels
from lit_gpt.pretrained import Pretrained, load_model, open_pretrained, refuse_other_tokenizer, resolve_device
from lit_gpt.report import plot_perplexity
from lit_gpt.tokenizer import Tokenizer
from lit_gpt.weights import write_json


def main(
    checkpoint_dir: Path,
    out: Path,
    tasks: list[str] | str = "commonsense",
    tasks_dir: Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    tokenizer_path: Path | None = None,
    delimiters: Literal["bos+eos", "bos", "eos", "none"] | None = None,
    max_length: int | None = None,
    model_name: str | None = None,
    devices: int = 1,
    device: str = "auto",
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    kernels: str = "auto",
    allow_code_execution: bool = False,
    cache_requests: bool = False,
    samples_out: Path | None = None,
    perplexity_by_length: list[int] | None = None,
    text: Path | None = None,
) -> None:
    """Score a model on lm_eval's tasks. An evaluation that was interrupted goes on where it was with the same command.

    Args:
        checkpoint_dir: A run, a step-* checkpoint, a Hugging Face folder, a folder that convert_hf_checkpoint.py wrote,
            or a .pth file of the original TinyLlama.
        out: File for the results, JSON in lm_eval's own layout.
        tasks: Names, joined by commas or as a list: commonsense, instruct, or any task or group of lm_eval.
        tasks_dir: Folder of lm_eval's task files (YAML), which are preferred; relative data files are looked for beside
            it. Without a network, this is where tasks come from.
        limit: Take only this many questions of each task.
        num_fewshot: Examples before each question; default: as the group or the task says.
        tokenizer_path: Folder or file; default: the one that is kept with the model.
        delimiters: What stood around the documents in training; default: what the checkpoint says, else what its
            tokenizer does.
        max_length: Longest text in tokens; default: the model's block_size.
        model_name: The preset of a .pth file that does not say.
        devices: Processes, one a GPU, each with the whole model and a share of the questions.
        device: cpu, cuda or mps; auto takes a GPU if there is one.
        dtype: Of weights and arithmetic; default: bfloat16 on a GPU, float32 on a CPU.
        kernels: As for pretraining.
        allow_code_execution: Run the programs that the model writes for HumanEval, with time, memory, files and network
            cut off.
        cache_requests: Keep the requests of lm_eval's own tasks, once they are made from its data, for the next time.
        samples_out: File for every question's answers, a JSON line each.
        perplexity_by_length: Instead of tasks: how well the model predicts --text read in sequences of so many tokens,
            beyond its block_size too, with each rope scaling. A picture is written beside --out.
        text: A long text file, for --perplexity_by_length.
    """
    device = resolve_device(device)
    if devices > 1 or "WORLD_SIZE" in os.environ:
        device = launch(device, devices)
    rank_zero = checkpoint.is_rank_zero()
    torch_dtype = getattr(torch, dtype) if dtype else torch.float32 if device == "cpu" else torch.bfloat16

    found = open_pretrained(checkpoint_dir, model_name)
    if max_length:
        found = replace(found, config=replace(found.config, block_size=max_length))
    tokenizer, delimiters = tokenizer_of(found, tokenizer_path, delimiters)

    if perplexity_by_length:
        if text is None:
            raise ValueError("--perplexity_by_length needs --text, a file with a long text")
        kernels_here = select_kernels(kernels, device=torch.device(device), dtype=torch_dtype)
        model = load_model(found, kernels_here, device, torch_dtype)
        ids = tokenizer.encode(text.read_text(encoding="utf-8"), bos="bos" in delimiters, eos=False)
        rows = perplexity.perplexity_by_length(model, torch.tensor(ids), perplexity_by_length)
        about = describe(found, tokenizer, delimiters) | {"text": str(text)}
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(out, {"perplexity_by_length": [asdict(row) for row in rows], "config": about})
        plot_perplexity({found.path.name: rows}, out.with_suffix(".png"), found.config.block_size)
        print(f"{'length':>8}  {'rope scaling':<12} perplexity  nats/token")
        for row in rows:
            print(f"{row.length:>8}  {row.rope_scaling:<12} {row.perplexity:>10.3f}  {row.loss:>10.4f}")
        return

    # Importing lm_eval takes seconds, so mistakes above are said first.
    from lit_gpt import evaluation

    names = tasks if isinstance(tasks, list) else tasks.split(",")
    loaded = evaluation.load_tasks(names, tasks_dir, num_fewshot)
    c = found.config
    chosen = select_kernels(
        kernels, device=torch.device(device), dtype=torch_dtype, heads=(c.n_head, c.n_query_groups, c.head_size)
    )
    model = load_model(found, chosen, device, torch_dtype)
    if rank_zero:
        print(f"{found.path}: {c.name or 'model'}, {device}, {torch_dtype}, delimiters {delimiters}", flush=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    answers = out.with_name(out.name + ".answers")
    lm = evaluation.LitLM(model, tokenizer, bos="bos" in delimiters, answers=answers)

    t0 = time.perf_counter()
    results = evaluation.evaluate(
        lm,
        loaded,
        limit=limit,
        samples=samples_out is not None,
        allow_code_execution=allow_code_execution,
        cache_requests=cache_requests,
    )
    elapsed_s = time.perf_counter() - t0
    if rank_zero:
        samples = results.pop("samples", None)
        if samples_out is not None:
            evaluation.write_samples(samples, samples_out)
        about = describe(found, tokenizer, delimiters) | {
            "dtype": str(torch_dtype).removeprefix("torch."),
            "device": torch.cuda.get_device_name() if device.startswith("cuda") else device,
            "devices": dist.get_world_size() if dist.is_initialized() else 1,
            "limit": limit,
            "seconds": round(elapsed_s, 1),
        }
        evaluation.write_results(results, out, about)
        print(evaluation.table(results))
        print(f"{sum(n['effective'] for n in results['n-samples'].values()):,} questions in {elapsed_s:.1f} s -> {out}")
    lm.answers.delete()
    if dist.is_initialized():
        dist.destroy_process_group()


def tokenizer_of(found: Pretrained, tokenizer_path: Path | None, delimiters: str | None) -> tuple[Tokenizer, str]:
    """The tokenizer and the delimiters that the model was trained with.

    Raises:
        ValueError: others were asked for than the checkpoint says, or none are known.
    """
    tokenizer_path = tokenizer_path or found.tokenizer
    if tokenizer_path is None:
        raise ValueError(f"{found.path} holds no tokenizer: give --tokenizer_path")
    tokenizer = Tokenizer(tokenizer_path)
    refuse_other_tokenizer(found, tokenizer)
    if delimiters and found.delimiters and delimiters != found.delimiters:
        raise ValueError(f"--delimiters {delimiters}: {found.path} was trained with {found.delimiters}")
    if delimiters is None:
        delimiters = found.delimiters or ("bos" if starts_with_bos(tokenizer_path) else "none")
    return tokenizer, delimiters


def describe(found: Pretrained, tokenizer: Tokenizer, delimiters: str) -> dict:
    """What was evaluated, and with what."""
    meta = found.path / checkpoint.META
    trained = json.loads(meta.read_text()) if meta.is_file() else {}
    packages = ("torch", "lm_eval", "transformers", "datasets", "tokenizers", "sentencepiece")
    installed = {package.metadata["Name"] for package in importlib.metadata.distributions()}
    return {
        "checkpoint": str(found.path),
        "model": found.config.name,
        "step": trained.get("step"),
        "tokens": trained.get("tokens_seen"),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "delimiters": delimiters,
        "tokenizer_sha256": tokenizer.sha256,
        "max_length": found.config.block_size,
        "commit": checkpoint.git_commit(),
        "versions": {name: importlib.metadata.version(name) for name in packages if name in installed},
    }


def launch(device: str, devices: int) -> str:
    """Start the other processes, or find out which one this is; returns this one's device."""
    from lightning_fabric import Fabric

    accelerator = "cuda" if device == "cuda" else "cpu"
    devices, world_size = cluster.processes(devices, on_gpu=accelerator == "cuda")
    fabric = Fabric(accelerator=accelerator, devices=devices, num_nodes=world_size // devices, strategy="ddp")
    fabric.launch()
    if not fabric.is_global_zero:
        warnings.simplefilter("ignore")
    return str(fabric.device)


if __name__ == "__main__":
    with one_line_errors():
        parse(main)
