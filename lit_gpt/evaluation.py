"""Evaluation through EleutherAI's lm-evaluation-harness (lm_eval), with this project's model underneath.

    results = evaluate(LitLM(model, tokenizer, bos=True), load_tasks(["commonsense"]), limit=200)
    average(results)        # of the seven tasks, as TinyLlama reports it

lm_eval knows the tasks: prompts, choices, metrics. What it asks of a model, `LitLM` answers: log-likelihoods through
lit_gpt.scoring, continuations through lit_gpt.generate.
"""

import difflib
import functools
import hashlib
import json
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from lit_gpt.generate import decode
from lit_gpt.model import GPT
from lit_gpt.sandbox import humaneval_passes
from lit_gpt.scoring import score
from lit_gpt.tokenizer import BatchEncoder, Tokenizer

try:
    import lm_eval.evaluator
    import lm_eval.tasks
    import lm_eval.utils
    from lm_eval.api.model import TemplateLM
except ImportError as e:
    raise ImportError(f"evaluation needs lm_eval: pip install 'lm-eval==0.4.13' ({e})") from e

# lm_eval compiles a task's template anew for each of its questions, which takes longer than the model on a GPU does.
lm_eval.utils.env.from_string = functools.cache(lm_eval.utils.env.from_string)

COMMONSENSE = ("hellaswag", "openbookqa", "winogrande", "arc_challenge", "arc_easy", "boolq", "piqa")
HUMANEVAL: dict[str, Any] = {
    "task": "humaneval",
    "dataset_path": "openai/openai_humaneval",
    "unsafe_code": True,
    "output_type": "generate_until",
    "test_split": "test",
    "num_fewshot": 0,
    "doc_to_text": "{{prompt}}",
    "doc_to_target": "{{test}}\ncheck({{entry_point}})",
    "generation_kwargs": {"until": ["\nclass", "\ndef", "\n#", "\nif", "\nprint"], "max_gen_toks": 512},
    "process_results": humaneval_passes,
    "metric_list": [{"metric": "pass@1", "aggregation": "mean", "higher_is_better": True}],
    "metadata": {"version": 1.0},
}
"""HumanEval (Chen et al. 2021, arXiv:2107.03374) with the programs run in lit_gpt.sandbox. lm_eval's own task runs them
with the network open and memory unbounded, and downloads the code that runs them."""
GROUPS: dict[str, dict[str, int]] = {
    "commonsense": dict.fromkeys(COMMONSENSE, 0),
    "instruct": {"mmlu": 5, "bbh_fewshot": 3, "drop": 3, "humaneval": 0},
}
"""Group -> task -> examples before each question: TinyLlama's two tables."""
METRICS = ("acc_norm", "acc", "exact_match", "f1", "pass@1", "em", "word_perplexity")
"""A task's score is the first of these that it has."""


# --- tasks -----------------------------------------------------------------------------------------------------------


def load_tasks(names: Sequence[str], tasks_dir: Path | None = None, num_fewshot: int | None = None) -> dict:
    """lm_eval's tasks, with their data.

    Args:
        names: tasks and groups of lm_eval, of GROUPS, or of tasks_dir. Where tasks_dir has NAME or NAME_local, that is
            taken for NAME.
        tasks_dir: a folder of lm_eval's YAML files; data files that they name relatively are looked for beside it.
        num_fewshot: examples before each question; None: what the group or the task says, else 0.

    Raises:
        ValueError: an unknown name, with the nearest known ones.
        FileNotFoundError: a data file is not there, named with the YAML file that wants it.
    """
    shots = {task: n for group in names for task, n in GROUPS.get(group, {}).items()}
    wanted = [task for name in names for task in GROUPS.get(name, (name,))]
    if tasks_dir is not None and not tasks_dir.is_dir():
        raise FileNotFoundError(f"--tasks_dir {tasks_dir} is not a folder")
    tasks_dir = tasks_dir and tasks_dir.resolve()
    local = lm_eval.tasks.TaskManager(include_path=str(tasks_dir), include_defaults=False) if tasks_dir else None
    known_here = set(local.all_tasks) if local else set()
    everywhere: lm_eval.tasks.TaskManager | None = None  # reading lm_eval's 14,000 files takes some seconds

    loaded: dict[str, dict] = {"tasks": {}, "groups": {}, "group_map": {}}
    for name in dict.fromkeys(wanted):
        here = next((n for n in (name, f"{name}_local") if n in known_here), None)
        if here is None and name != "humaneval":
            everywhere = everywhere or lm_eval.tasks.TaskManager()
            if name not in everywhere.task_index:
                known = [*GROUPS, *known_here, *everywhere.all_tasks]
                near = difflib.get_close_matches(name, known, 5, cutoff=0.5)
                raise ValueError(f"unknown task {name!r}. Nearest: {', '.join(near) or 'none'}")
        manager = local if here else everywhere or lm_eval.tasks.TaskManager(include_defaults=False)
        with _in_folder(tasks_dir.parent if here else Path()):
            try:
                part = manager.load(here or (HUMANEVAL if name == "humaneval" else name))
            except (OSError, ValueError) as e:
                why = str(e).strip().splitlines()[0]
                if here:
                    raise FileNotFoundError(f"{manager.task_index[here].yaml_path}: {why}") from e
                raise FileNotFoundError(f"task {name}: {why}. Without a network, give local files: --tasks_dir") from e
        for task in part["tasks"].values():
            n = shots.get(name, task.get_config("num_fewshot") or 0) if num_fewshot is None else num_fewshot
            if task.get_config("num_fewshot") != 0 or n == 0:  # a task that says 0 means it
                task.set_config("num_fewshot", n)
            task.set_fewshot_seed(1234)
        for kind, found in part.items():
            loaded[kind].update(found)
    return loaded


def texts_of(tasks: dict) -> list[tuple[str, int, str]]:
    """(task, question's number, its text with the right answer) of everything that the tasks ask."""
    texts = []
    for name, task in tasks["tasks"].items():
        docs = task.test_docs() if task.has_test_docs() else task.validation_docs()
        for i, doc in enumerate(docs):
            if task.OUTPUT_TYPE != "multiple_choice":
                text = f"{task.doc_to_text(doc)} {task.doc_to_target(doc)}"
            elif isinstance(right := task.doc_to_text(doc), int):  # the choices begin the text, the target ends it
                text = f"{task.doc_to_choice(doc)[right]} {task.doc_to_target(doc)}"
            else:
                right, choices = task.doc_to_target(doc), task.doc_to_choice(doc)
                text = f"{task.doc_to_text(doc)} {choices[right] if isinstance(right, int) else right}"
            texts.append((name.removesuffix("_local"), i, text))
    return texts


@contextmanager
def _in_folder(folder: Path):
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


# --- the model -------------------------------------------------------------------------------------------------------


class LitLM(TemplateLM):
    """What lm_eval asks of a model, answered by ours.

    With torch.distributed every rank makes the same requests, answers a share of them, and gets all the answers; so
    lm_eval is told that there is one process.
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        *,
        bos: bool,
        pack_tokens: int | None = None,
        max_gen_toks: int = 256,
        answers: Path | None = None,
    ) -> None:
        """
        Args:
            model: in evaluation mode; texts longer than its block_size lose their beginning.
            bos: whether BOS stands before a text, as it did in training.
            pack_tokens: of one forward pass; see scoring.score.
            max_gen_toks: new tokens, for tasks that do not say.
            answers: a file to keep answers in as they come. A second evaluation of the same model finds them there.
        """
        super().__init__()
        self.model, self.tokenizer, self.bos = model, tokenizer, bos
        self.pack_tokens, self.max_gen_toks = pack_tokens, max_gen_toks
        self.tokenizer.delimiters(bos=bos, eos=False)  # raises where there is no such token
        self.encoder = BatchEncoder(tokenizer)
        self.ids: dict[str, list[int]] = {}
        """Of every text seen so far: an evaluation in a training run asks the same again and again."""
        self.bar = functools.partial(tqdm, file=sys.stderr, disable=not is_first_rank())
        self.answers = Answers(answers, self.fingerprint()) if answers else Answers()
        self.batch_size = 64
        """Texts to continue at a time; halved while memory is short."""

    @property
    def max_length(self) -> int:
        return self.model.config.block_size

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context."""
        return next(i for i in (self.tokenizer.bos_id, self.tokenizer.eos_id, 0) if i is not None)

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.sha256

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        bos = self.bos if add_special_tokens is None else add_special_tokens and self.tokenizer.bos_id is not None
        return self.tokenizer.encode(string, bos=bos, eos=False)

    def fingerprint(self) -> str:
        """Of everything that answers depend on; of the weights, the beginnings."""
        digest = hashlib.sha256()
        parts = (self.model.config, self.bos, self.tokenizer.sha256, self.max_gen_toks)
        digest.update(repr(parts).encode())
        for name, p in self.model.named_parameters():
            digest.update(f"{name} {p.dtype} {p.flatten()[:64].float().tolist()}".encode())
        return digest.hexdigest()

    def loglikelihood(self, requests: Sequence) -> list[tuple[float, bool]]:
        texts = [request.args for request in requests]
        known = [self.answers.get(*pair) for pair in texts]
        todo = [i for i, answer in enumerate(known) if answer is None]
        pairs = self.encode_pairs([texts[i] for i in todo])
        for i, (log_p, greedy) in zip(todo, self._score(pairs, [texts[i] for i in todo]), strict=True):
            known[i] = (log_p, greedy)
        return [(log_p, bool(greedy)) for log_p, greedy in known]

    def loglikelihood_rolling(self, requests: Sequence) -> list[float]:
        pairs, owner = [], []
        for i, request in enumerate(requests):
            (text,) = request.args
            windows = lm_eval.utils.get_rolling_token_windows(
                token_list=self.tokenizer.encode(text, bos=False, eos=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for window in windows:
                pairs.append(lm_eval.utils.make_disjoint_window(window))
                owner.append(i)
        total = [0.0] * len(requests)
        for i, (log_p, _) in zip(owner, self._score(pairs, None), strict=True):
            total[i] += log_p
        return total

    def _loglikelihood_tokens(self, requests: Sequence, **kwargs: Any) -> list[tuple[float, bool]]:
        return self._score([pair for _, *pair in requests], None)

    def encode_pairs(self, texts: Sequence[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
        """The ids of contexts and continuations, cut where lm_eval cuts them: the continuation is what the ids of both
        together have beyond the number of the context's own."""
        moved = []  # spaces that end a context begin the continuation, as tokenizers want them
        for context, continuation in texts:
            kept = context.rstrip()
            moved.append((kept, context[len(kept) :] + continuation) if kept else ("", context + continuation))
        self._encode([text for pair in moved for text in (pair[0], "".join(pair))])
        head = [self.tokenizer.bos_id] * self.bos
        pairs = []
        for context, continuation in moved:
            whole = self.ids[context + continuation]
            if context:
                whole, cut = head + whole, len(head) + len(self.ids[context])
            else:
                whole, cut = whole if whole[0] == self.prefix_token_id else [self.prefix_token_id, *whole], 1
            pairs.append((whole[:cut], whole[cut:]))
        return pairs

    def _encode(self, texts: Iterable[str]) -> None:
        new = [text for text in dict.fromkeys(texts) if text not in self.ids]
        for start in range(0, len(new), 4096):
            part = new[start : start + 4096]
            ids, lengths, _ = self.encoder(part, bos=False, eos=False)
            rows = np.split(ids, np.cumsum(lengths)[:-1])
            self.ids.update(zip(part, (row.tolist() for row in rows), strict=True))

    def _score(self, pairs: Sequence, texts: Sequence | None) -> list[tuple[float, bool]]:
        """The answers to all pairs, over all ranks; of those with texts, kept for later."""
        fitting = []
        for context, continuation in pairs:
            if len(continuation) > self.max_length:
                raise ValueError(
                    f"a continuation of {len(continuation):,} tokens does not fit the model's {self.max_length:,}"
                )
            context = context[max(0, len(context) + len(continuation) - 1 - self.max_length) :]
            fitting.append((context, continuation))
        found: dict[int, tuple[float, bool]] = {}
        with self.bar(total=len(pairs), desc="scoring", unit=" texts") as bar:
            for part in score(self.model, fitting, self.pack_tokens):
                for i, log_p, greedy in part:
                    found[i] = (log_p, greedy)
                if texts is not None:
                    self.answers.add((*texts[i], (log_p, greedy)) for i, log_p, greedy in part)
                bar.update(len(part))
        found = _of_all_ranks(found)
        return [found[i] for i in range(len(pairs))]

    def generate_until(self, requests: Sequence) -> list[str]:
        keys = [(request.args[0], json.dumps(request.args[1], sort_keys=True)) for request in requests]
        found = {key: answer for key in keys if (answer := self.answers.get(*key)) is not None}
        settings = defaultdict(list)  # texts continued in the same way can share a batch
        for key in dict.fromkeys(keys):
            if key not in found:
                settings[key[1]].append(key[0])
        rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        bar = self.bar(total=sum(map(len, settings.values())), desc="writing", unit=" texts")
        for setting, contexts in settings.items():
            self._encode(contexts)
            contexts = sorted(contexts, key=lambda text: -len(self.ids[text]))[rank::world_size]
            while contexts:
                batch = contexts[: self.batch_size]
                try:
                    written = self._continue([self.ids[text] for text in batch], json.loads(setting))
                except torch.OutOfMemoryError:
                    if self.batch_size == 1:
                        raise
                    self.batch_size //= 2
                    torch.cuda.empty_cache()
                    continue
                self.answers.add((text, setting, answer) for text, answer in zip(batch, written, strict=True))
                found.update(((text, setting), answer) for text, answer in zip(batch, written, strict=True))
                contexts = contexts[len(batch) :]
                bar.update(len(batch) * world_size)
        bar.close()
        found = _of_all_ranks(found)
        return [found[key] for key in keys]

    def _continue(self, prompts: Sequence[list[int]], setting: dict) -> list[str]:
        """The texts that follow, up to a stop string, which is cut off, or EOS."""
        until = setting.get("until") or []
        until = [until] if isinstance(until, str) else until
        n = min(setting.get("max_gen_toks", self.max_gen_toks), self.max_length - 1)
        temperature = setting.get("temperature", 1.0) if setting.get("do_sample") else 0.0
        head = [self.tokenizer.bos_id] * self.bos
        prompts = [(head + ids or [self.prefix_token_id])[-(self.max_length - n) :] for ids in prompts]
        rows: list[list[int]] = [[] for _ in prompts]
        texts = [""] * len(rows)
        done = [False] * len(rows)
        for tokens in decode(self.model, prompts, max_new_tokens=n, temperature=temperature):
            for i, token in enumerate(tokens.tolist()):
                if done[i]:
                    continue
                if token == self.tokenizer.eos_id:
                    done[i] = True
                    continue
                rows[i].append(token)
                texts[i] = self.tokenizer.decode(rows[i])
                done[i] = any(stop in texts[i] for stop in until)
            if all(done):
                break
        cuts = (min((text.find(stop) for stop in until if stop in text), default=None) for text in texts)
        return [text[:cut] for text, cut in zip(texts, cuts, strict=True)]


class Answers:
    """Answers by request, in memory and in a file that outlives a crash: a line each, after a line that says of what
    model. Each rank writes a file of its own and reads all."""

    def __init__(self, path: Path | None = None, fingerprint: str = "") -> None:
        self.known: dict[str, Any] = {}
        self.file = None
        if path is None:
            return
        files = sorted(path.parent.glob(f"{path.name}.*"))
        for file in files:
            header, *lines = file.read_text(encoding="utf-8").split("\n")[:-1] or [""]  # the last may be half a line
            if header == fingerprint:
                self.known.update(json.loads(line) for line in lines)
        if dist.is_initialized():
            dist.barrier()  # all have read
        mine = path.with_name(f"{path.name}.{dist.get_rank() if dist.is_initialized() else 0}")
        if is_first_rank():
            for file in {*files} - {mine}:
                file.unlink()
        self.file = mine.open("w", encoding="utf-8")
        self.file.write(fingerprint + "\n")
        self._write(self.known.items())

    def get(self, *request: str) -> Any:
        return self.known.get(self._key(request))

    def add(self, answers: Iterable[tuple]) -> None:
        """(request .., answer) of each."""
        if self.file is not None:
            self._write((self._key(request), answer) for *request, answer in answers)

    def _write(self, items: Iterable[tuple[str, Any]]) -> None:
        self.file.writelines(json.dumps(item) + "\n" for item in items)
        self.file.flush()

    def _key(self, request: Sequence[str]) -> str:
        return hashlib.blake2b("\0".join(request).encode(), digest_size=16).hexdigest() if self.file else ""

    def delete(self) -> None:
        if self.file is not None:
            self.file.close()
            Path(self.file.name).unlink()


def is_first_rank() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def _of_all_ranks(found: dict) -> dict:
    if not dist.is_initialized():
        return found
    parts: list[dict] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, found)
    return {key: answer for part in parts for key, answer in part.items()}


# --- an evaluation ---------------------------------------------------------------------------------------------------


def evaluate(
    lm: LitLM,
    tasks: dict,
    *,
    limit: int | None = None,
    samples: bool = False,
    allow_code_execution: bool = False,
    cache_requests: bool = False,
) -> dict[str, Any]:
    """lm_eval's results: "results" by task with standard errors, "configs", "versions", "n-samples" ...; the same on
    every rank.

    Args:
        tasks: of `load_tasks`.
        limit: questions of each task; None: all.
        samples: add "samples": each question with its answers.
        allow_code_execution: run the programs that the model writes, in lit_gpt.sandbox.
        cache_requests: keep the requests of lm_eval's own tasks on the disk for the next evaluation.

    Raises:
        ValueError: a task would run code and allow_code_execution is false.
    """
    unsafe = [name for name, task in tasks["tasks"].items() if getattr(task, "UNSAFE_CODE", False)]
    if unsafe and not allow_code_execution:
        raise ValueError(
            f"{', '.join(unsafe)} runs programs that the model wrote, with time, memory and network cut off; "
            f"--allow_code_execution true allows it"
        )
    with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):  # lm_eval's own bars, several for each task
        return lm_eval.evaluator.evaluate(
            lm,
            tasks,
            limit=limit,
            log_samples=samples,
            confirm_run_unsafe_code=allow_code_execution,
            cache_requests=cache_requests,
            bootstrap_iters=1000,
        )


def task_scorer(
    model: GPT,
    tokenizer: Tokenizer,
    names: Sequence[str],
    *,
    bos: bool,
    tasks_dir: Path | None = None,
    limit: int | None = 100,
) -> Callable[[], dict[str, float]]:
    """For a training run: load the tasks now, so that mistakes show before it starts; each call scores the model as it
    is then, on the first `limit` questions of each task, and gives task -> score, and "commonsense", the average, where
    the seven tasks are there. All ranks call it together.

    Raises:
        ValueError: a task wants text written, which a training run does not wait for.
    """
    tasks = load_tasks(names, tasks_dir)
    if slow := [name for name, task in tasks["tasks"].items() if task.OUTPUT_TYPE == "generate_until"]:
        raise ValueError(
            f"{', '.join(slow)}: the model would have to write text; evaluate it from a checkpoint instead"
        )
    lm = LitLM(model, tokenizer, bos=bos)

    def score_tasks() -> dict[str, float]:
        training = model.training
        model.eval()
        results = evaluate(lm, tasks, limit=limit)
        model.train(training)
        mean = average(results)
        found = {name: value for name, (_, value, _) in scores(results).items()}
        return found if mean is None else {**found, "commonsense": mean}

    return score_tasks


def scores(results: dict[str, Any]) -> dict[str, tuple[str, float, float | None]]:
    """Task or group -> (metric, score, standard error): the first of METRICS that it has."""
    found = {}
    for name, values in results["results"].items():
        plain = {key.split(",")[0]: v for key, v in values.items() if isinstance(v, float | int)}
        if metric := next((m for m in METRICS if m in plain), None):
            found[name.removesuffix("_local")] = (metric, plain[metric], plain.get(f"{metric}_stderr"))
    return found


def average(results: dict[str, Any]) -> float | None:
    """TinyLlama's commonsense average: of the seven tasks, acc_norm where there is one, else acc (WinoGrande, BoolQ).
    None where a task is missing."""
    found = scores(results)
    return sum(found[task][1] for task in COMMONSENSE) / 7 if found.keys() >= set(COMMONSENSE) else None


def write_results(results: dict[str, Any], out: Path, about: dict[str, Any]) -> None:
    """results.json: lm_eval's layout, with "commonsense_average" where it can be had and what was evaluated in
    "config"."""
    content = {
        "results": results["results"],
        **({"commonsense_average": average(results)} if average(results) is not None else {}),
        "config": about,
        **{key: value for key, value in results.items() if key not in ("results", "config", "samples")},
    }
    text = json.dumps(content, indent=2, default=lm_eval.utils.handle_non_serializable, ensure_ascii=False)
    temporary = out.with_name(out.name + ".tmp")
    temporary.write_text(text + "\n", encoding="utf-8")
    temporary.replace(out)


def write_samples(samples: dict[str, list[dict]], out: Path) -> None:
    """A line for each question: task, doc_id, the log-likelihood of every choice or the texts, and its metrics."""
    with out.open("w", encoding="utf-8") as f:
        for task, questions in samples.items():
            for q in questions:
                answers = [answer for (answer,) in q["resps"]]
                choices = all(isinstance(answer, (list, tuple)) for answer in answers)
                said = {"loglikelihoods": [a[0] for a in answers]} if choices else {"answers": answers}
                line = {"task": task, "doc_id": q["doc_id"], **said, **{m: q[m] for m in q["metrics"]}}
                f.write(json.dumps(line, default=str) + "\n")


def table(results: dict[str, Any]) -> str:
    """The scores in percent with their standard errors, in lines for people."""
    lines = []
    for name, (metric, value, stderr) in scores(results).items():
        error = "" if stderr is None else f" ± {100 * stderr:.2f}"
        lines.append(f"  {name:<28} {metric:<12} {100 * value:6.2f}{error}")
    if (mean := average(results)) is not None:
        lines.append(f"  {'commonsense average':<41} {100 * mean:6.2f}")
    return "\n".join(lines)
