"""Count evaluation questions that stand in the training data.

    python scripts/check_contamination.py --data_dir data/slim_star_combined --tokenizer_path tokenizer/llama2 \\
        --tasks commonsense --out contamination.json

Compares runs of 13 tokens (lit_gpt/contamination.py). A question counts as met when any of its runs is in the data, and
as copied when 80% of them are.
"""

import json
import multiprocessing
import re
from pathlib import Path

import numpy as np
from tqdm import tqdm

from lit_gpt.cli import one_line_errors, parse
from lit_gpt.contamination import Grams
from lit_gpt.shards import HEADER_SIZE, read_header, read_manifest
from lit_gpt.tokenizer import BatchEncoder, Tokenizer

PIECE = 1 << 22
"""Tokens that are read at a time; pieces overlap by n - 1, so that no run is cut."""


def main(
    data_dir: Path,
    tokenizer_path: Path,
    tasks: list[str] | str = "commonsense",
    tasks_dir: Path | None = None,
    out: Path | None = None,
    n: int = 13,
    num_workers: int = 1,
) -> None:
    """Count evaluation questions that stand in the training data.

    Args:
        data_dir: Folder of shards; all of its prefixes are read.
        tokenizer_path: The shards' tokenizer.
        tasks: As for evaluate.py.
        tasks_dir: As for evaluate.py.
        out: File for the counts, and the questions that were met, as JSON.
        n: Tokens in a run.
        num_workers: Processes that read shards.
    """
    shards = sorted(data_dir.glob("*.bin"))
    if not shards:
        raise FileNotFoundError(f"{data_dir} holds no shards (*.bin)")
    tokenizer = Tokenizer(tokenizer_path)
    for prefix in {re.sub(r"_\d+$", "", path.stem) for path in shards}:
        manifest = read_manifest(data_dir, prefix)
        if manifest and manifest.tokenizer["sha256"] != tokenizer.sha256:
            raise ValueError(f"--tokenizer_path {tokenizer.path} is not the tokenizer that made {data_dir}/{prefix}")
    from lit_gpt.evaluation import load_tasks, texts_of

    texts = texts_of(load_tasks(tasks if isinstance(tasks, list) else tasks.split(","), tasks_dir))
    ids, lengths, _ = BatchEncoder(tokenizer)([text for _, _, text in texts], bos=False, eos=False)
    grams = Grams(np.split(ids, np.cumsum(lengths)[:-1]), n)

    places, tokens = {}, 0
    with multiprocessing.get_context("fork").Pool(num_workers, _start, (grams,)) as pool:
        bar = tqdm(total=sum(path.stat().st_size for path in shards), unit="B", unit_scale=True, desc="reading")
        for path, met, count, read in pool.imap_unordered(_mark_shard, shards):
            grams.met |= met
            tokens += read
            if count:
                places[path.name] = count
            bar.update(path.stat().st_size)
        bar.close()

    counts, found = grams.counts, grams.found
    summary = {}
    for task in dict.fromkeys(task for task, _, _ in texts):
        here = np.array([name == task for name, _, _ in texts])
        summary[task] = {
            "questions": int(here.sum()),
            "met": int((found[here] > 0).sum()),
            "copied": int(((found >= 0.8 * counts) & (counts > 0))[here].sum()),
            "too_short": int((counts[here] == 0).sum()),
        }
        s = summary[task]
        print(
            f"{task:<24} {s['met']:>6} of {s['questions']:,} questions met ({s['met'] / s['questions']:.2%}), "
            f"{s['copied']} copied, {s['too_short']} shorter than {n} tokens"
        )
    print(f"{tokens:,} tokens in {len(shards)} shards of {data_dir}")
    if out is not None:
        met = [
            {"task": task, "doc_id": doc_id, "met": int(found[i]), "runs": int(counts[i]), "text": text}
            for i, (task, doc_id, text) in enumerate(texts)
            if found[i]
        ]
        content = {"n": n, "tokens": tokens, "tasks": summary, "places_by_shard": dict(sorted(places.items()))}
        out.write_text(json.dumps(content | {"questions": met}, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _start(grams: Grams) -> None:
    global _grams
    _grams = grams


def _mark_shard(path: Path) -> tuple[Path, np.ndarray, int, int]:
    """Which runs a shard holds, at how many places, and its tokens. Runs across two shards are not looked for."""
    header = read_header(path)
    tokens = np.memmap(path, header.dtype, "r", offset=HEADER_SIZE)
    _grams.met[:] = False
    places = 0
    for start in range(0, max(1, len(tokens) - _grams.n + 1), PIECE):
        places += _grams.mark(tokens[start : start + PIECE + _grams.n - 1])
    return path, _grams.met.copy(), places, len(tokens)


if __name__ == "__main__":
    with one_line_errors():
        parse(main)
