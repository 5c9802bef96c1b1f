"""Teach a draft what its target would say: the more alike they are, the more guesses stay.

    python speculative_decoding/distill.py --target_dir out/target --draft_dir out/120m --train_data_dir data/packed \
        --train_mix '{"train_star": 1}' --out_dir out/taught

The target continues pieces of texts, greedily and by sampling, and at every token of what comes out the draft is pulled
towards the target's whole distribution, KL(target || draft) (Zhou et al. 2023, arXiv:2310.08461): 32,000 numbers where
the text itself says only one. The target's own words are what a draft will have to guess from.

R rows, T tokens of each, V ids.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from lit_gpt.cli import one_line_errors, parse
from lit_gpt.generate import decode
from lit_gpt.hf_tokenizer import copy_tokenizer
from lit_gpt.kernels import select_kernels
from lit_gpt.model import GPT
from lit_gpt.optim import clip_and_step, lr_at, param_groups
from lit_gpt.packed_dataset import PackedDataset
from lit_gpt.pretrained import (
    Pretrained,
    load_model,
    open_pretrained,
    refuse_other_tokenizer,
    resolve_device,
    write_lit,
)
from lit_gpt.speculative import refuse_different_tokenizers
from lit_gpt.tokenizer import Tokenizer
from lit_gpt.weights import whole_folder


def main(
    target_dir: Path,
    draft_dir: Path,
    train_data_dir: Path,
    train_mix: dict[str, float],
    out_dir: Path,
    prompt_tokens: int = 64,
    new_tokens: int = 192,
    texts: int = 8192,
    temperatures: list[float] = (0.0, 1.0),
    rows: int = 256,
    steps: int = 256,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    seed: int = 1337,
    device: str = "auto",
    overwrite: bool = False,
) -> None:
    """Train a draft on what its target says, and how surely.

    Args:
        target_dir: The model whose text will be wanted: whatever scripts/generate.py takes.
        draft_dir: A smaller model with the same tokenizer, best one that has learnt from the same texts.
        train_data_dir: Folder with the packed shards that the target was trained on, as pretrain/tinyllama.py takes it.
        train_mix: Prefix of shards -> its share of the pieces.
        out_dir: Of the taught draft, with the tokenizer; appears when all is done.
        prompt_tokens: Length of a piece of these texts, which the target continues ...
        new_tokens: ... by so many.
        texts: Pieces to take, at random.
        temperatures: Of the continuations, in equal shares: those that the draft will be used at; 0 is greedy.
        rows: Pieces that the target continues at once. Its cache of them is what takes memory: 32 GiB for 256 tokens
            of 256 pieces and a model of 7B.
        steps: Optimizer steps. With the defaults every row is seen twice.
        batch_size: Rows in a step.
        learning_rate: Peak, after a tenth of the steps; it falls to a tenth.
        seed: Of the choice of pieces, of samples and order.
        device: cpu or cuda; auto takes a GPU if there is one.
        overwrite: Replace out_dir if it exists.

    Raises:
        ValueError: names every flag that makes no sense.
    """
    least = dict(prompt_tokens=(prompt_tokens, 2), new_tokens=(new_tokens, 1), texts=(texts, max(1, len(temperatures))))
    least |= dict(rows=(rows, 1), steps=(steps, 1), batch_size=(batch_size, 1))
    problems = [f"--{flag} {n}: give {at_least} or more" for flag, (n, at_least) in least.items() if n < at_least]
    if not temperatures or min(temperatures) < 0:
        problems.append(f"--temperatures {list(temperatures)}: give one or more, none below 0")
    if not learning_rate > 0:
        problems.append(f"--learning_rate {learning_rate} is not positive")
    if problems:
        raise ValueError("; ".join(problems))
    device = resolve_device(device)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    found, found_draft = open_pretrained(target_dir), open_pretrained(draft_dir)
    refuse_different_tokenizers(found, found_draft)
    if found.tokenizer is None:
        raise ValueError(f"{target_dir} holds no tokenizer")
    tokenizer = Tokenizer(found.tokenizer)
    refuse_other_tokenizer(found, tokenizer)
    longest = min(found.config.block_size, found_draft.config.block_size)
    if prompt_tokens + new_tokens > longest:
        raise ValueError(f"--prompt_tokens and --new_tokens: {prompt_tokens} + {new_tokens} exceed {longest} tokens")
    what = dict(seed=seed, vocab_size=found.config.vocab_size)
    data = PackedDataset(train_data_dir, train_mix, prompt_tokens - 1, **what)  # sequences have a token more
    if data.tokenizer and data.tokenizer["sha256"] != tokenizer.sha256:
        raise ValueError(f"{train_data_dir} was made with another tokenizer than {target_dir}")
    starts = data.tokens(range(texts))

    with whole_folder(out_dir, overwrite) as folder:
        generator = torch.Generator().manual_seed(seed)

        def load(which: Pretrained, weights_dtype: torch.dtype) -> GPT:
            c = which.config
            heads = (c.n_head, c.n_query_groups, c.head_size)
            kernels = select_kernels("auto", device=torch.device(device), dtype=dtype, heads=heads, training=False)
            return load_model(which, kernels, device, weights_dtype)

        target = load(found, dtype)
        samples = torch.Generator(device).manual_seed(seed)
        continuations = continued(target, starts, new_tokens, temperatures, rows, samples)
        draft = load(found_draft, torch.float32).train().requires_grad_(True)
        if dtype != torch.float32:
            draft.compute_in(dtype)
        teach(target, draft, continuations, steps, batch_size, learning_rate, generator)
        weights = {name: w.cpu() for name, w in draft.state_dict().items()}
        write_lit(Pretrained(folder, found_draft.config, weights), folder)
        copy_tokenizer(found.tokenizer, folder)
    print(f"{out_dir}: the draft, taught for {steps:,} steps by {texts:,} texts of the target")


def continued(
    target: GPT,
    starts: torch.Tensor,
    new_tokens: int,
    temperatures: list[float],
    at_once: int,
    generator: torch.Generator,
) -> torch.Tensor:
    """starts (R, n), each with the target's continuation, (R, n + new_tokens). Documents that end are followed by what
    the target begins then."""
    rows = []
    with tqdm(total=len(starts), desc="target", unit=" texts") as progress:
        for temperature, part in zip(temperatures, starts.tensor_split(len(temperatures)), strict=True):
            for prompts in part.split(at_once):
                sampling = dict(temperature=temperature, generator=generator, max_new_tokens=new_tokens)
                rows.append(torch.cat((prompts, torch.stack(list(decode(target, prompts.tolist(), **sampling)), 1)), 1))
                progress.update(len(prompts))
    return torch.cat(rows)


def teach(
    target: GPT,
    draft: GPT,
    rows: torch.Tensor,
    steps: int,
    batch_size: int,
    learning_rate: float,
    generator: torch.Generator,
) -> None:
    """Train the draft, in place, on the target's distributions at every token of rows (R, T).

    What is shown beside the loss, in nats a token, is the share of guesses that would stay at temperature 1: the sum of
    min(p, q) over the ids (Leviathan et al. 2022, arXiv:2211.17192, corollary 3.6), over the last batch looked at.
    """
    known = draft.transformer.wte.weight.size(0)  # tables of embeddings are padded to different sizes
    V, device = min(target.config.vocab_size, draft.config.vocab_size), target.lm_head.weight.device
    optimizer = torch.optim.AdamW(param_groups(draft, 0.1), lr=learning_rate, betas=(0.9, 0.95), fused=True)
    schedule = dict(max_steps=steps, warmup_steps=steps // 10, learning_rate=learning_rate, min_lr=learning_rate / 10)
    epochs = -(-steps * batch_size // len(rows))
    order = torch.cat([torch.randperm(len(rows), generator=generator) for _ in range(epochs)])
    with tqdm(range(steps), desc="draft", unit=" steps") as progress:
        for step in progress:
            for group in optimizer.param_groups:
                group["lr"] = lr_at(step, **schedule)
            idx = rows[order[step * batch_size : (step + 1) * batch_size]].to(device)
            with torch.no_grad():
                p = target(idx)[..., :V].float().softmax(-1)  # (B, T, V)
            log_q = draft(idx.clamp(max=known - 1))[..., :V].float().log_softmax(-1)
            loss = F.kl_div(log_q, p, reduction="sum") / idx.numel()
            loss.backward()
            clip_and_step(optimizer, 1.0)
            optimizer.zero_grad()
            if step % 16 == 15 or step + 1 == steps:
                stays = torch.minimum(p, log_q.detach().exp()).sum(-1).mean()
                progress.set_postfix_str(f"KL {loss.item():.3f}, {100 * stays.item():.0f}% would stay")


if __name__ == "__main__":
    with one_line_errors():
        parse(main)
