"""The whole pipeline on a corpus that every machine has: Python's own standard library.

    make demo        (or: python scripts/demo.py)

Writes the corpus in the layouts of SlimPajama and StarCoder, trains a tokenizer on it, packs it, pretrains a small
Llama with one interruption, converts the model to Hugging Face and lets transformers write with it. Every step is a
command that you could type; it is printed before it runs. Finished preparation is not done twice.
"""

import ast
import json
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lit_gpt.cli import one_line_errors, parse
from lit_gpt.metrics import plot_loss, read_metrics
from lit_gpt.shards import HEADER_SIZE, read_header

ROOT = Path(__file__).parent.parent


@dataclass
class DemoArgs:
    """Raw text in, a trained model that transformers loads out, in a few minutes."""

    data_dir: Path = Path("data/demo")
    """Where the corpus, the tokenizer and the shards go."""
    out_dir: Path = Path("out")
    """The run goes to out_dir/demo, started anew each time."""
    max_steps: int = 240
    """Optimizer steps of 4,096 tokens."""
    code_bytes: int = 12_000_000
    """Take at most so much source code."""


def main(args: DemoArgs) -> None:
    t0 = time.perf_counter()
    corpus, tokenizer, shards, run_dir = (
        args.data_dir / "corpus",
        args.data_dir / "tokenizer",
        args.data_dir / "shards",
        args.out_dir / "demo",
    )
    if not (corpus / "DONE").exists():
        title("a corpus, from the standard library's docstrings and source files")
        write_corpus(corpus, args.code_bytes)

    title("a tokenizer")
    if not (tokenizer / "tokenizer.model").exists():
        python("scripts/train_tokenizer.py", source_path=corpus, destination_path=tokenizer, vocab_size=2048)

    title("packed shards")
    packing = dict(tokenizer_path=tokenizer, destination_path=shards, chunk_size=257 * 1024)
    for split in ("train", "validation"):
        python("scripts/prepare_slimpajama.py", source_path=corpus / "SlimPajama", split=split, **packing)
    python("scripts/prepare_starcoder.py", source_path=corpus / "starcoderdata", split="train", **packing)

    title("pretraining, interrupted half-way and resumed")
    shutil.rmtree(run_dir, ignore_errors=True)
    recipe = dict(
        name="demo",
        out_dir=args.out_dir,
        model="tiny_LLaMA_demo",
        train_data_dir=shards,
        val_data_dir=shards,
        tokenizer_path=tokenizer,
        global_batch_tokens=4096,
        micro_batch_size=16,
        max_steps=args.max_steps,
        warmup_steps=args.max_steps // 20,
        learning_rate=3e-3,
        min_lr=3e-4,
        log_interval=10,
        eval_interval=max(1, args.max_steps // 6),
        eval_sequences=128,
        save_interval=max(1, args.max_steps // 3),
    )
    python("pretrain/tinyllama.py", **recipe, stop_at_step=args.max_steps // 2)
    python("pretrain/tinyllama.py", **recipe, resume="true")

    title("a Hugging Face model")
    hf_dir = run_dir / "hf"
    python("scripts/convert_lit_checkpoint.py", checkpoint_dir=run_dir, out_dir=hf_dir)
    for prompt in ("def __init__(self, ", "Return the "):
        print(f"--- {prompt!r}\n{sample(hf_dir, prompt)}\n")

    unigram = unigram_entropy(sorted(shards.glob("validation_*.bin")))
    plot_loss({"demo": run_dir / "metrics.csv"}, run_dir / "loss.png", levels={"unigram entropy": unigram})
    val_loss = [row["val_loss"] for row in read_metrics(run_dir / "metrics.csv") if "val_loss" in row][-1]
    print(
        f"validation loss   {val_loss:.3f} nats per token; from the tokens' frequencies alone: {unigram:.3f}\n"
        f"loss curve        {run_dir / 'loss.png'}\n"
        f"Hugging Face      {hf_dir}\n"
        f"run, checkpoints  {run_dir}\n"
        f"corpus, shards    {args.data_dir}\n"
        f"took {time.perf_counter() - t0:.0f} s\n\n"
        f"next: python scripts/generate.py --checkpoint_dir {run_dir} --prompt 'import '"
    )


def write_corpus(corpus: Path, code_bytes: int) -> None:
    """SlimPajama's layout from prose, StarCoder's from code, with the column names of the real ones."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    import zstandard

    prose = list(documents())
    # Every 20th document validates; none is in both.
    splits = {
        "train/chunk1": [d for i, d in enumerate(prose) if i % 20 and i % 2],
        "train/chunk2": [d for i, d in enumerate(prose) if i % 20 and not i % 2],
        "validation/chunk1": prose[::20],
    }
    for folder, docs in splits.items():
        path = corpus / "SlimPajama" / folder / "example_0.jsonl.zst"
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({"text": text, "meta": {"redpajama_set_name": name}}) + "\n" for name, text in docs]
        path.write_bytes(zstandard.compress("".join(lines).encode()))

    files = []
    for path in stdlib_files():
        files.append((path, path.read_text(encoding="utf-8", errors="replace")))
        code_bytes -= path.stat().st_size
        if code_bytes < 0:
            break
    root = Path(sysconfig.get_path("stdlib"))
    folder = corpus / "starcoderdata" / "python"
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(2):
        part = files[i::2]
        table = {
            "max_stars_repo_path": [str(path.relative_to(root)) for path, _ in part],
            "max_stars_repo_name": ["python/cpython"] * len(part),
            "max_stars_count": pa.array([None] * len(part), pa.int64()),
            "id": [str(n) for n in range(len(part))],
            "content": [text for _, text in part],
        }
        pq.write_table(pa.table(table), folder / f"train-{i:05d}-of-00002.parquet", row_group_size=100)
    (corpus / "DONE").touch()
    print(f"{len(prose):,} texts and {len(files):,} source files in {corpus}")


def stdlib_files() -> list[Path]:
    """The standard library's modules without its tests, the same order everywhere."""
    skip = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3", "__pycache__"}
    root = Path(sysconfig.get_path("stdlib"))
    return [p for p in sorted(root.rglob("*.py")) if not skip & set(p.relative_to(root).parts)]


def documents() -> Iterator[tuple[str, str]]:
    """(set name, text): the topics of Python's help, and a document for each module's docstrings."""
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions package it apart
        topics = {}
    for _, text in sorted(topics.items()):
        yield "RedPajamaWikipedia", text
    for path in stdlib_files():
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        nodes = (n for n in ast.walk(tree) if isinstance(n, (ast.Module, ast.ClassDef, ast.FunctionDef)))
        docstrings = [text for node in nodes if (text := ast.get_docstring(node)) and len(text) > 60]
        if docstrings:
            yield "RedPajamaC4", "\n\n".join(docstrings)


def python(script: str, **flags: object) -> None:
    """Run one of the project's commands, printed as one would type it."""
    command = [script, *(str(word) for flag, value in flags.items() for word in (f"--{flag}", value))]
    print("$ python " + shlex.join(command), flush=True)
    done = subprocess.run([sys.executable, *command], cwd=Path(__file__).parent.parent)
    if done.returncode:
        raise ValueError(
            f"{script} failed; its message is above. The command to repeat it: python {shlex.join(command)}"
        )


def sample(hf_dir: Path, prompt: str) -> str:
    """Text by transformers alone, as any user of the converted model would get it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(1)
    tokenizer = AutoTokenizer.from_pretrained(hf_dir)
    model = AutoModelForCausalLM.from_pretrained(hf_dir)
    inputs = tokenizer(prompt, return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=80, do_sample=True, temperature=0.8, top_k=50)
    return tokenizer.decode(out[0], skip_special_tokens=True)


def unigram_entropy(shards: list[Path]) -> float:
    """Entropy in nats of the tokens' frequencies: the loss of the best model without context."""
    counts = np.zeros(1 << 16)
    for path in shards:
        counts += np.bincount(np.fromfile(path, read_header(path).dtype, offset=HEADER_SIZE), minlength=len(counts))
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())


def title(text: str) -> None:
    print(f"\n=== {text}", flush=True)


if __name__ == "__main__":
    with one_line_errors():
        main(parse(DemoArgs))
