"""Let a target write texts, for a draft to learn from: who has read the target's own words guesses them better
(sequence-level distillation, Kim & Rush 2016, arXiv:1606.07947).

    python speculative_decoding/write_samples.py --target_dir out/target --prompts texts --out_file samples/a.jsonl
    python scripts/prepare_dataset.py --source_path samples --tokenizer_path ... --destination_path data/samples

Every text of the prompts is cut into pieces, and each piece is continued. The texts, prompt and continuation, are what
scripts/prepare_dataset.py reads, and pretrain/tinyllama.py trains the draft on them as on any other.
"""

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from lit_gpt.cli import one_line_errors, parse
from lit_gpt.generate import generate
from lit_gpt.kernels import select_kernels
from lit_gpt.pretrained import load_model, open_pretrained, refuse_other_tokenizer
from lit_gpt.text_sources import ANY_TEXT, Fields, find_files, open_source
from lit_gpt.tokenizer import Tokenizer


def main(
    target_dir: Path,
    prompts: Path,
    out_file: Path,
    prompt_tokens: int = 64,
    max_new_tokens: int = 192,
    max_texts: int = 20_000,
    batch_size: int = 512,
    temperature: float = 1.0,
    seed: int = 1337,
    device: str = "auto",
) -> None:
    """Continue pieces of texts with a model, and write what comes of it as JSON lines.

    Args:
        target_dir: The model: whatever scripts/generate.py takes.
        prompts: Texts to begin from, best those of the training: a file or folder, as scripts/prepare_dataset.py takes,
            texts in a field "text".
        out_file: Is written under a temporary name first.
        prompt_tokens: Length of a piece.
        max_new_tokens: Tokens that follow it, if the document does not end before.
        max_texts: To write; so many pieces are taken at random.
        batch_size: Continued at once.
        temperature: Of the sampling; 1 is the target's own distribution.
        seed: Of the choice of pieces and of the samples.
        device: cpu or cuda; auto takes a GPU if there is one.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    found = open_pretrained(target_dir)
    if found.tokenizer is None:
        raise ValueError(f"{target_dir} holds no tokenizer")
    tokenizer = Tokenizer(found.tokenizer)
    refuse_other_tokenizer(found, tokenizer)
    chosen = list(pieces(prompts, tokenizer, prompt_tokens))
    if not chosen:
        raise ValueError(f"--prompts {prompts}: no text has {prompt_tokens} tokens")
    random.Random(seed).shuffle(chosen)
    chosen = chosen[:max_texts]
    c = found.config
    heads = (c.n_head, c.n_query_groups, c.head_size)
    kernels = select_kernels("auto", device=torch.device(device), dtype=dtype, heads=heads, training=False)
    model = load_model(found, kernels, device, dtype)
    sampling = dict(temperature=temperature, generator=torch.Generator(device).manual_seed(seed))
    out_file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = out_file.with_name(out_file.name + ".tmp")
    written = 0
    with open(unfinished, "w", encoding="utf-8") as out, tqdm(total=len(chosen), unit=" texts") as progress:
        for start in range(0, len(chosen), batch_size):
            batch = chosen[start : start + batch_size]
            for prompt, new in zip(
                batch, generate(model, batch, max_new_tokens, eos_id=tokenizer.eos_id, **sampling), strict=True
            ):
                text = tokenizer.decode([i for i in (*prompt, *new) if i not in (tokenizer.bos_id, tokenizer.eos_id)])
                out.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                written += len(new)
            progress.update(len(batch))
    os.replace(unfinished, out_file)
    print(f"{out_file}: {len(chosen):,} texts, {written:,} new tokens")


def pieces(path: Path, tokenizer: Tokenizer, n_tokens: int) -> Iterator[list[int]]:
    """The ids of every text, n_tokens at a time."""
    for file in find_files(path, ANY_TEXT):
        source, index, unit = open_source(file), 0, None
        while unit is None or not unit.last:
            unit, index = source.read(index, Fields()), index + 1
            if unit.bad:
                row, problem = unit.bad[0]
                raise ValueError(f"--prompts {file}: record {row} of part {index}: {problem}")
            for text in unit.texts:
                ids = tokenizer.encode(text, bos=False, eos=False)
                yield from (ids[i : i + n_tokens] for i in range(0, len(ids) - n_tokens + 1, n_tokens))


if __name__ == "__main__":
    with one_line_errors():
        parse(main)
