"""Questions a second: our model class against lm_eval's own `hf` backend, the same weights, tasks and process.

    python scripts/benchmark_evaluate.py --tokenizer_path tokenizer/llama2 --tasks_dir my/tasks

Weights are random; what they answer does not matter for the time. "answering" is the time in the model's methods,
tokenization included; "whole" is lm_eval.evaluate, which also writes the prompts from the data and counts the scores.
"""

import functools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import lm_eval.evaluator
import lm_eval.utils
import torch
from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM

from lit_gpt.cli import one_line_errors, parse
from lit_gpt.config import Config
from lit_gpt.evaluation import LitLM, evaluate, load_tasks, scores
from lit_gpt.hf import export
from lit_gpt.hf_tokenizer import export_tokenizer
from lit_gpt.kernels import select_kernels
from lit_gpt.model import GPT
from lit_gpt.pretrained import load_model, open_pretrained
from lit_gpt.tokenizer import Tokenizer


def main(
    tokenizer_path: Path,
    tasks_dir: Path | None = None,
    tasks: str = "commonsense",
    model: str = "tiny_LLaMA_1b",
    model_overrides: dict[str, int] | None = None,
    limit: int | None = None,
    batch_size: str = "auto",
) -> None:
    """Questions a second: our model class against lm_eval's own `hf` backend.

    Args:
        tokenizer_path: Folder or file.
        tasks_dir: As for evaluate.py.
        tasks: As for evaluate.py.
        model: A preset of lit_gpt/config.py.
        model_overrides: Fields of it that differ.
        limit: Questions of each task; default: all.
        batch_size: Of the hf backend; auto, numbers, or several of them, joined by commas.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    config = Config.from_name(model, **(model_overrides or {}))
    loaded = load_tasks(tasks.split(","), tasks_dir)
    with tempfile.TemporaryDirectory() as folder:
        special_ids = export_tokenizer(tokenizer_path, Path(folder), add_bos=True, max_length=config.block_size)
        with device:
            net = GPT(config).to(dtype)
        net.init_weights(seed=0)
        weights = {name: p.detach().cpu() for name, p in net.named_parameters()}
        export(config, weights, Path(folder), special_ids=special_ids)
        del net, weights

        heads = (config.n_head, config.n_query_groups, config.head_size)
        kernels = select_kernels(device=device, dtype=dtype, heads=heads)
        ours = LitLM(load_model(open_pretrained(Path(folder)), kernels, device), Tokenizer(tokenizer_path), bos=True)
        evaluate(ours, loaded, limit=4)  # compiles
        ours.ids.clear()
        _, answering_s, whole_s = timed(ours, lambda: evaluate(ours, loaded, limit=limit), "ours")

        lm_eval.utils.env.from_string = lm_eval.utils.env.from_string.__wrapped__  # as lm_eval comes
        for size in batch_size.split(","):
            theirs = HFLM(pretrained=folder, device=str(device), dtype=dtype, batch_size=size)
            run = functools.partial(lm_eval.evaluator.evaluate, theirs, loaded, log_samples=False, bootstrap_iters=1000)
            run(limit=4)
            _, answering, whole = timed(theirs, functools.partial(run, limit=limit), f"hf, batch_size {size}")
            ratios = f"answering {answering / answering_s:.2f}x, whole {whole / whole_s:.2f}x"
            print(f"examples a second, ours to hf's: {ratios}", flush=True)
            del theirs


def timed(lm: LM, run: Callable[[], dict], name: str) -> tuple[int, float, float]:
    """Questions, and seconds of the answering alone and of the whole."""
    answering_s = 0.0
    method = lm.loglikelihood

    def loglikelihood(*args, **kwargs):
        nonlocal answering_s
        t0 = time.perf_counter()
        answers = method(*args, **kwargs)
        answering_s += time.perf_counter() - t0
        return answers

    lm.loglikelihood = loglikelihood
    t0 = time.perf_counter()
    results = run()
    whole_s = time.perf_counter() - t0
    lm.loglikelihood = method
    n = sum(n["effective"] for n in results["n-samples"].values())
    print(
        f"{name}: {n:,} questions; answering {answering_s:.2f} s, {n / answering_s:,.0f} questions/s; "
        f"whole {whole_s:.2f} s, {n / whole_s:,.0f} questions/s\n"
        f"  {', '.join(f'{task} {value:.4f}' for task, (_, value, _) in scores(results).items())}",
        flush=True,
    )
    return n, answering_s, whole_s


if __name__ == "__main__":
    with one_line_errors():
        parse(main)
