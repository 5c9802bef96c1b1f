"""What a person should know about a model before using it, from what its checkpoint and its run say: README.md."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lit_gpt import checkpoint
from lit_gpt.config import Config
from lit_gpt.hf import shapes
from lit_gpt.metrics import read_metrics
from lit_gpt.pretrained import Pretrained
from lit_gpt.weights import read_json

METRICS = ("acc_norm", "acc", "exact_match", "pass@1", "f1")
"""Of lm_eval, what a task is known by: the first that it has."""


def n_parameters(config: Config) -> int:
    """A tied head counts once."""
    return sum(torch.Size(shape).numel() for shape in shapes(config).values())


def model_card(
    found: Pretrained, name: str, *, licence: str | None = None, evaluation: Mapping[str, Any] | None = None
) -> str:
    """Markdown with Hugging Face's front matter.

    Args:
        found: where it is a checkpoint of a run, the card says on what and how it was trained, and its loss.
        licence: in Hugging Face's spelling, such as apache-2.0; None: the card says nothing about it.
        evaluation: results as scripts/evaluate.py writes them.
    """
    c = found.config
    family = {"llama": "Llama", "gptneox": "GPT-NeoX"}[c.family]
    stretched = f", {c.rope_scaling} rope scaling of {c.rope_original_size:,}" if c.rope_scaling != "none" else ""
    facts = {
        "parameters": f"{n_parameters(c):,}",
        "architecture": (
            f"{family}: {c.n_layer} layers, width {c.n_embd}, {c.n_head} heads of {c.head_size}, "
            f"{c.n_query_groups} key/value heads, MLP {c.intermediate_size}, vocabulary {c.vocab_size:,}"
        ),
        "context": f"{c.block_size:,} tokens{stretched}",
        **training_facts(found),
    }
    if licence:
        facts["licence"] = licence
    scores = evaluation_scores(evaluation) if evaluation is not None else {}
    front = ["library_name: transformers", "pipeline_tag: text-generation"] + [f"license: {licence}"] * bool(licence)
    lines = ["---", *front, "---", "", f"# {name}", "", "| | |", "|---|---|"]
    lines += [f"| {key} | {value} |" for key, value in facts.items()]
    if scores:
        lines += ["", "## Evaluation", "", "| task | metric | score |", "|---|---|---|"]
        lines += [f"| {task} | {metric} | {score:.4f} |" for task, (metric, score) in scores.items()]
    lines += [
        "",
        "## Use",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
        f'model = AutoModelForCausalLM.from_pretrained("{name}")',
        'inputs = tokenizer("Once upon a time", return_tensors="pt")',
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0], skip_special_tokens=True))",
        "```",
    ]
    return "\n".join(lines) + "\n"


def training_facts(found: Pretrained) -> dict[str, str]:
    """Of a checkpoint of a run; {} for what holds weights alone."""
    if not (found.path / checkpoint.META).is_file():
        return {}
    meta = read_json(found.path / checkpoint.META)
    args, facts = meta.get("args", {}), {}
    facts["training"] = f"{meta.get('tokens_seen', 0):,} tokens, {meta['step']:,} steps"
    if mix := args.get("train_mix"):
        total = sum(mix.values())
        facts["data"] = ", ".join(f"{share / total:.1%} {source}" for source, share in mix.items())
        facts["data"] += f"; around each document: {found.delimiters}" if found.delimiters else ""
    if "learning_rate" in args:
        facts["recipe"] = (
            f"AdamW, {args['schedule']} from {args['learning_rate']:g} to {args['min_lr']:g} after "
            f"{args['warmup_steps']:,} steps of warmup, batches of {args['global_batch_tokens']:,} tokens"
        )
    if losses := losses_at(found.path.parent, meta["step"]):
        facts["loss"] = "; ".join(f"{what} {value:.4f}" for what, value in losses.items())
    if meta.get("commit"):
        facts["code"] = f"commit {meta['commit']}"
    return facts


def losses_at(run_dir: Path, step: int) -> dict[str, float]:
    """From the run's metrics.csv, the last of each up to a step: training and validation loss, bits per byte."""
    rows = [row for row in read_metrics(run_dir / "metrics.csv") if row["step"] <= step]
    names = {"loss": "training", "val_loss": "validation", "val_bits_per_byte": "validation, bits per byte"}
    found = {what: [row[key] for row in rows if key in row] for key, what in names.items()}
    return {what: values[-1] for what, values in found.items() if values}


def evaluation_scores(results: Mapping[str, Any]) -> dict[str, tuple[str, float]]:
    """Task -> (metric, score) of an lm_eval results file.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(results.get("results"), dict):
        raise ValueError("the evaluation holds no results: give what scripts/evaluate.py --out wrote")
    scores = {}
    for task, values in results["results"].items():
        values = {key.partition(",")[0]: value for key, value in values.items()}
        metric = next((m for m in METRICS if isinstance(values.get(m), float)), None)
        if metric:
            scores[task] = metric, values[metric]
    return scores
