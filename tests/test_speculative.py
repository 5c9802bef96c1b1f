"""Speculation changes nothing but the speed: greedy text is the target's, samples are distributed as the target's."""

import itertools
import json
import runpy
import shutil
import time
import warnings
from collections import Counter

import pytest
import torch

from lit_gpt import Config, speculative
from lit_gpt.generate import ContextFull, generate, probabilities
from lit_gpt.hf_folder import write_hf_folder
from lit_gpt.kernels import select_kernels
from lit_gpt.model import GPT
from lit_gpt.pretrained import Pretrained, load_model, open_pretrained
from lit_gpt.speculative import Speculator, accept, refuse_different_tokenizers
from lit_gpt.tokenizer import Tokenizer
from tests.tiny import DYNAMIC, ROOT, TINY, random_weights, run_script, train_sentencepiece, write_lit_folder

PROMPTS = [[5], [7, 8, 9, 10, 11, 12, 13], [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], [8, 8, 8, 8]]


def tiny(noise: float = 0.0, **overrides) -> GPT:
    """The same random model each time; with noise a draft for it, less like it the more noise."""
    config = Config(**{**TINY, **overrides})
    weights = random_weights(config)
    generator = torch.Generator().manual_seed(1)
    for w in weights.values():
        w += noise * w.std().nan_to_num() * torch.randn(w.shape, generator=generator)
    return load_model(Pretrained(None, config, weights))


def drafts() -> dict:
    return {
        "itself": tiny(),
        "near": tiny(0.05),
        "far": tiny(1.0),
        "n-grams": None,
        "smaller vocabulary": tiny(vocab_size=400),
        "larger vocabulary": tiny(vocab_size=600),
        "short context": tiny(0.05, block_size=16),
    }


@pytest.fixture(scope="module")
def alone() -> list[list[int]]:
    """What the target writes after PROMPTS without help."""
    return generate(tiny(), PROMPTS, 24)


@pytest.mark.filterwarnings("ignore:speculation does not pay")
@pytest.mark.parametrize("name, guesses", [(name, 4) for name in drafts()] + [("near", None), ("near", 1)])
def test_greedy_is_the_targets_greedy(alone, name, guesses):
    speculator = Speculator(tiny(), drafts()[name], guesses)
    assert speculator.generate(PROMPTS, 24) == alone
    assert list(speculator.stream(PROMPTS[1], 24)) == alone[1]
    eos = alone[1][9]
    want = [row[: row.index(eos) + 1] if eos in row else row for row in alone]
    assert speculator.generate(PROMPTS, 24, eos_id=eos) == want
    if name == "itself":
        assert speculator.stats.acceptance_rate > 0.99
        assert speculator.stats.tokens_per_pass > 3
    if name == "far":
        assert speculator.stats.acceptance_rate < 0.2


@pytest.mark.filterwarnings("ignore:speculation does not pay")
@pytest.mark.parametrize("name", ["itself", "n-grams"])
def test_greedy_is_the_targets_greedy_with_dynamic_scaling(name):
    """Though its caches are larger, and some were made for a longer text before."""
    target, draft = tiny(**DYNAMIC), tiny(**DYNAMIC) if name == "itself" else None
    speculator = Speculator(target, draft, 4)
    for prompts, n in ((PROMPTS, 40), (PROMPTS, 12), (PROMPTS[1:2], 40), (PROMPTS[1:2], 20)):
        assert speculator.generate(prompts, n) == generate(target, prompts, n)
    if draft is not None:
        assert speculator.stats.acceptance_rate > 0.99


def test_repeated_text_is_guessed_from_itself():
    target = tiny()
    with torch.no_grad():  # each token is followed by the next larger: a cycle of 8
        for name, p in target.named_parameters():
            p.zero_() if "proj" in name else None
        target.transformer.wte.weight[:8] = torch.eye(8, 64) * 8
        target.lm_head.weight.zero_()
        target.lm_head.weight[:8] = torch.eye(8, 64).roll(1, 0)
    prompt = [0, 1, 2, 3, 4, 5, 6, 7, 0, 1]
    speculator = Speculator(target, guesses=4)
    assert speculator.generate([prompt], 40) == [[(2 + i) % 8 for i in range(40)]]
    assert speculator.stats.acceptance_rate == 1 and speculator.stats.tokens_per_pass > 4


@pytest.mark.filterwarnings("ignore:speculation does not pay")
def test_the_context_limit_is_that_of_the_target_alone():
    target = tiny(block_size=24)
    speculator = Speculator(target, tiny(0.05, block_size=24))
    assert speculator.generate(PROMPTS, 14) == generate(target, PROMPTS, 14)  # the longest fits just so
    with pytest.raises(ContextFull, match="context of 24 tokens") as caught:
        speculator.generate(PROMPTS, 30)
    with pytest.raises(ContextFull) as alone:
        generate(target, PROMPTS, 30)
    assert caught.value.generated == alone.value.generated


def expected(target: GPT, prompt: list[int], n: int, settings: dict) -> torch.Tensor:
    """Probability of every continuation of n tokens, (V, ..., V)."""
    V = target.config.vocab_size
    p = torch.ones(())
    with torch.inference_mode():
        for i in range(n):
            heads = [prompt + list(head) for head in itertools.product(range(V), repeat=i)]
            logits = target(torch.tensor(heads))[:, -1, :V]
            p = p[..., None] * probabilities(logits, **settings).view(*p.shape, V)
    return p.flatten().double()


def chi_square(counts: torch.Tensor, p: torch.Tensor) -> float:
    """The p-value of Pearson's test; cells that expect fewer than 10 are put together."""
    n = counts.sum()
    rare = p * n < 10
    counts = torch.cat((counts[~rare], counts[rare].sum()[None])).double()
    want = torch.cat((p[~rare], p[rare].sum()[None])) * n
    if want[-1] < 1:
        counts, want = counts[:-1], want[:-1]
    statistic = ((counts - want).square() / want).sum()
    degrees = torch.tensor((len(want) - 1) / 2, dtype=torch.float64)
    return torch.special.gammaincc(degrees, statistic / 2).item()


def p_value(draft: str, guesses: int | None, n: int = 4, samples: int = 20_000, V: int = 5, **settings) -> float:
    small = dict(vocab_size=V, n_layer=1, n_embd=16, n_head=1, n_query_groups=1, intermediate_size=24)
    target = tiny(**small)
    speculator = Speculator(target, None if draft == "n-grams" else tiny(0.3, **small), guesses)
    prompt = [1, 2, 3, 1]
    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(2):
        rows += speculator.generate(
            [prompt], n, num_samples=samples // 2, generator=generator, **{"temperature": 1.0, **settings}
        )
    cells = torch.tensor(rows) @ V ** torch.arange(n - 1, -1, -1)
    p = expected(target, prompt, n, {"temperature": 1.0, **settings})
    assert (
        (p > 0.001).sum() > 20 and speculator.stats.guessed > 1.5 * samples and speculator.stats.acceptance_rate > 0.03
    )
    counts = torch.bincount(cells, minlength=len(p))
    assert (counts[p == 0] == 0).all()
    return chi_square(counts[p > 0], p[p > 0])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:speculation does not pay")
@pytest.mark.parametrize("draft", ["model", "n-grams"])
@pytest.mark.parametrize("settings", [{}, dict(temperature=1.7), dict(temperature=2.0, top_k=4, top_p=0.9, min_p=0.02)])
def test_samples_are_distributed_as_the_targets(draft, settings):
    assert p_value(draft, 2, **settings) > 1e-4


BROKEN = {
    "accepts too much": lambda p, q, g, u, noise: accept(p, q, g, u * 0.8, noise),
    "accepts all": lambda p, q, g, u, noise: accept(p, q, g, u * 0, noise),
    "draws the rest from p": lambda p, q, g, u, noise: (
        (kept := accept(p, q, g, u, noise)[0]),
        (p[torch.arange(len(p)), kept] / noise).argmax(-1),
    ),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:speculation does not pay")
@pytest.mark.parametrize("rule", BROKEN)
def test_the_test_sees_a_broken_rule(monkeypatch, rule):
    monkeypatch.setattr(speculative, "accept", BROKEN[rule])
    assert p_value("model", 2) < 1e-6


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:speculation does not pay")
@pytest.mark.shared
def test_greedy_of_200_prompts_equals_the_real_models(shared_data):
    """A real model, and as its draft the same without its last layers."""
    found = open_pretrained(shared_data / "models" / "stories260k")
    target, draft = load_model(found), load_model(found)
    del draft.transformer.h[3:]
    object.__setattr__(draft, "config", Config(**{**found.config.to_dict(), "n_layer": 3}))
    reference = json.loads((shared_data / "models" / "stories260k" / "REFERENCE.json").read_text())
    text = [i for case in reference["greedy"] for i in case["prompt_ids"] + case["new_ids"]]
    prompts = [text[i % (len(text) - 20) :][: 4 + i % 9] for i in range(0, 1600, 8)]
    assert len(prompts) == 200 and len({tuple(p) for p in prompts}) > 190
    for pair in (Speculator(target, draft, 4), Speculator(target, None, 4)):
        got = [row for i in range(0, 200, 50) for row in pair.generate(prompts[i : i + 50], 16)]
        assert got == [row for i in range(0, 200, 50) for row in generate(target, prompts[i : i + 50], 16)]
        assert pair.stats.accepted > 100


@pytest.mark.filterwarnings("ignore:speculation does not pay")
def test_seeds():
    speculator = Speculator(tiny(), tiny(0.05), 3)

    def sample(seed: int) -> list[int]:
        return speculator.generate([[5]], 20, temperature=1.0, generator=torch.Generator().manual_seed(seed))[0]

    assert sample(1) == sample(1) != sample(2)
    assert [sample(1) for _ in range(6)] == 6 * [sample(1)]


@pytest.mark.parametrize("end", ["all tokens", "a full context", "a stop string"])
def test_a_slow_draft_is_warned_of(end):
    draft = tiny(1.0, n_layer=12)
    with pytest.warns(UserWarning, match="speculation does not pay here: .* times as fast as without"):
        speculator = Speculator(tiny(), draft, 2)
        for _ in range(3):
            if end == "all tokens":
                speculator.generate([[5]], 30)
            elif end == "a full context":
                with pytest.raises(ContextFull):
                    speculator.generate([[5]], 100)
            else:
                text = speculator.stream([5], 50)
                assert len([next(text) for _ in range(30)]) == 30
                text.close()


def test_what_is_reported_counts_all_passes():
    speculator = Speculator(tiny(), tiny())
    for _ in range(2):
        speculator._count(2, [1] * 8, 4.0)  # eight rows, of which each writes two tokens
        speculator._count(0, [0] * 8, 1.5, 0.5)  # half a second of it the draft's
    stats = speculator.stats
    assert (stats.row_passes, stats.tokens, stats.seconds, stats.tokens_per_pass) == (32, 48, 11.0, 1.5)
    assert stats.speedup == pytest.approx(48 / 11 / 8)
    assert speculator.pass_s == {2: 4.0, 0: 1.5}
    assert not stats.does_not_pay  # four passes say little, however many the rows
    for _ in range(6):
        speculator._count(2, [1] * 8, 4.0)
    assert not stats.does_not_pay
    speculator._count(0, [0] * 8, 1.5, 0.5)
    assert stats.does_not_pay


def test_passes_without_guesses_are_timed_with_the_drafts_reading(monkeypatch):
    passes = speculative._Passes(tiny(), tiny(), 1, 40, (0.0, None, 1.0, 0.0))
    passes.start(PROMPTS[1:2], 1, 40)
    read = passes.draft.read
    monkeypatch.setattr(passes.draft, "read", lambda *state: (time.sleep(0.1), read(*state)))
    (elapsed_s, read_s), (_, not_read_s) = (passes.begin(0, [False], follows)()[2:] for follows in (True, False))
    assert elapsed_s > read_s > 0.1 > not_read_s


def test_the_number_of_guesses_adapts():
    good, bad = Speculator(tiny(), tiny()), Speculator(tiny(), tiny(1.0))
    for speculator in (good, bad):
        speculator.pass_s = {k: 1 + k / 10 for k in (0, *speculative.ADAPTIVE_GUESSES)}
        for _ in range(3):
            speculator._count(0, [0], 1.0)
    for _ in range(200):
        good._count(4, [4], 1.4)
        bad._count(4, [0], 1.4)
    assert good._best() == speculative.MAX_GUESSES and bad._best() == 0
    assert [bad._next(i, 20) for i in range(16, 33)] == [1, *[0] * 7, 1, *[0] * 7, 1]  # it may pay again


@pytest.mark.parametrize(
    "base_s, each_s, kept_rate",
    [(0.9, 0.05, 0.8), (0.9, 0.5, 0.8), (0.1, 0.3, 0.6), (0.9, 1.0, 0.1)],
    ids=["many pay", "few pay", "one or two pay", "none pays"],
)
def test_the_number_of_guesses_settles_where_nothing_was_measured(base_s, each_s, kept_rate):
    """As on a CPU, where the first pass of each kind takes four times as long."""

    def pass_s(k: int) -> float:
        return 1 + (base_s + each_s * k if k else 0)

    def tokens_per_s(k: int) -> float:
        return sum(kept_rate**i for i in range(k + 1)) / pass_s(k)

    speculator, cold, chosen = Speculator(tiny()), set(range(11)), []
    generator = torch.Generator().manual_seed(0)
    for i in range(1200):
        k = speculator._next(i, 50)
        wrong = (torch.rand(k, generator=generator) >= kept_rate).nonzero()
        speculator._count(k, [int(wrong[0]) if len(wrong) else k], pass_s(k) * (4 if k in cold else 1))
        cold.discard(k)
        chosen.append(k)
    assert chosen[-600:].count(0) >= 9  # the target alone is timed again and again
    usual = Counter(chosen[-600:]).most_common(1)[0][0]
    assert tokens_per_s(usual) > 0.95 * max(map(tokens_per_s, range(11)))


def test_no_samples_are_refused():
    with pytest.raises(ValueError, match="num_samples 0: give 1 or more"):
        Speculator(tiny()).generate(PROMPTS, 5, num_samples=0)


@pytest.mark.parametrize("guesses", [0, 11])
def test_numbers_of_guesses_that_make_no_sense(guesses):
    with pytest.raises(ValueError, match="give 1 to 10"):
        Speculator(tiny(), None, guesses)


def test_models_with_different_tokenizers_are_refused(tmp_path):
    for name in ("a", "b", "none"):
        write_lit_folder(tmp_path / name, tokenizer=name != "none")
    a, b, none = (open_pretrained(tmp_path / name) for name in ("a", "b", "none"))
    refuse_different_tokenizers(a, b)
    with open(tmp_path / "b" / "tokenizer.model", "ab") as file:
        file.write(b"\x12\x00")
    with pytest.raises(ValueError, match="their tokenizers differ"):
        refuse_different_tokenizers(a, b)
    with pytest.raises(ValueError, match="none holds no tokenizer"):
        refuse_different_tokenizers(a, none)


def test_prompts_without_text_are_refused(tmp_path):
    read_prompts = runpy.run_path(str(ROOT / "speculative_decoding" / "benchmark.py"))["read_prompts"]
    prompts = tmp_path / "prompts.jsonl"
    for line in ('{"prompt": "Once"}', "Once", "[1]"):
        prompts.write_text(line)
        with pytest.raises(ValueError, match="--prompts .*prompts.jsonl: not JSON lines with a .text."):
            read_prompts(prompts, None, 8, False)


@pytest.mark.filterwarnings("ignore:speculation does not pay")
def test_the_benchmark_compares_every_method_at_every_temperature(tmp_path, capsys):
    main = runpy.run_path(str(ROOT / "speculative_decoding" / "benchmark.py"))["main"]
    write_lit_folder(tmp_path / "target")
    write_lit_folder(tmp_path / "draft", n_layer=1)
    lines = [json.dumps({"text": f"def f{i}(x): return x + {i}"}) for i in range(5)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    where = (tmp_path / "target", tmp_path / "prompts.jsonl", tmp_path / "draft")
    sizes = dict(max_new_tokens=8, prompt_tokens=6, num_prompts=2)
    main(*where, **sizes, guesses=3, device="cpu", json=tmp_path / "rows.json")
    rows = json.loads((tmp_path / "rows.json").read_text())
    methods = ["target alone", "draft model", "n-grams"]
    assert [(row["temperature"], row["method"]) for row in rows] == [(t, m) for t in (0.0, 1.0) for m in methods]
    assert [row.get("same text") for row in rows] == [None, "2 of 2", "2 of 2", None, None, None]
    assert [row["speed-up"] for row in rows if row["method"] == "target alone"] == ["1.00 ± 0.00"] * 2
    assert "| draft model |" in capsys.readouterr().out
    with pytest.raises(ValueError) as caught:
        main(*where, **dict.fromkeys(sizes, 0))
    assert str(caught.value).split("; ") == [f"--{flag} 0: give 1 or more" for flag in sizes]
    (tmp_path / "prompts.jsonl").write_text(lines[0])
    with pytest.raises(ValueError, match="prompts.jsonl holds 1 prompts; give 2 or more: the first warms up"):
        main(*where, **sizes, device="cpu")


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:speculation does not pay")
@pytest.mark.parametrize("draft", ["near", "far", "n-grams"])
@pytest.mark.parametrize("overrides", [{}, DYNAMIC], ids=["", "dynamic"])
def test_graphs_of_whole_passes_equal_the_target_alone(draft, overrides):
    """In fp32 on a GPU: passes that begin before the last one was looked at, chosen by the kernels."""
    device = torch.device("cuda")
    kernels = select_kernels("auto", device=device, dtype=torch.float32, heads=(4, 2, 16), training=False)

    def on_gpu(noise: float) -> GPT:
        model = tiny(noise, **overrides)
        return load_model(Pretrained(None, model.config, model.state_dict()), kernels, "cuda", torch.float32)

    target = on_gpu(0.0)
    speculator = Speculator(target, None if draft == "n-grams" else on_gpu(0.05 if draft == "near" else 1.0), 3)
    for prompts, n in ((PROMPTS, 24), (PROMPTS[1:2], 24), (PROMPTS[1:2], 24), (PROMPTS[:1], 2)):
        assert speculator.generate(prompts, n) == generate(target, prompts, n)
    samples = speculator.generate(PROMPTS[:1], 12, temperature=1.0, num_samples=8)
    assert [len(row) for row in samples] == [12] * 8 and len(set(map(tuple, samples))) > 4


@pytest.mark.slow
def test_a_taught_draft_guesses_better(tmp_path, tokenizer_cache, monkeypatch):
    script = runpy.run_path(str(ROOT / "speculative_decoding" / "distill.py"))
    write_lit_folder(tmp_path / "target")
    write_lit_folder(tmp_path / "draft", n_layer=1, n_embd=32, n_head=2)
    tokenizer, taught = Tokenizer(tmp_path / "target"), tmp_path / "taught"
    text = "once upon a time there was a text that is long enough"
    (tmp_path / "texts.jsonl").write_text(json.dumps({"text": text}) + "\n")
    flags = ("--source_path", tmp_path / "texts.jsonl", "--tokenizer_path", tmp_path / "target")
    run_script("prepare_dataset.py", *flags, "--destination_path", tmp_path / "packed", "--prefix", "texts")
    where = (tmp_path / "target", tmp_path / "draft", tmp_path / "packed", {"texts": 1.0})
    settings = dict(prompt_tokens=4, new_tokens=20, texts=16, temperatures=[0.0], batch_size=8, device="cpu")
    script["main"](*where, taught, steps=240, learning_rate=1e-2, **settings)
    target, before, after = (load_model(open_pretrained(tmp_path / n)) for n in ("target", "draft", "taught"))
    refuse_different_tokenizers(open_pretrained(tmp_path / "target"), open_pretrained(taught))
    prompt = tokenizer.encode(text, bos=True, eos=False)[:4]
    accepted = []
    for draft in (before, after):
        speculator = Speculator(target, draft, 4)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # slower on a CPU
            assert speculator.generate([prompt], 20) == generate(target, [prompt], 20)
        accepted.append(speculator.stats.acceptance_rate)
    assert accepted[0] < 0.2 and accepted[1] > 0.4

    def interrupted(*_) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setitem(script["main"].__globals__, "teach", interrupted)
        script["main"](*where, tmp_path / "b", rows=3, **settings)
    assert not list(tmp_path.glob("b*"))
    with pytest.raises(ValueError, match="4 . 61 exceed 64 tokens"):
        script["main"](*where, tmp_path / "b", **{**settings, "new_tokens": 61})
    manifest = tmp_path / "packed" / "texts.manifest.json"
    manifest.write_text(manifest.read_text().replace(tokenizer.sha256, "0" * 64))
    with pytest.raises(ValueError, match="packed was made with another tokenizer than"):
        script["main"](*where, tmp_path / "b", **settings)


def test_a_draft_that_knows_fewer_ids_is_taught():
    teach = runpy.run_path(str(ROOT / "speculative_decoding" / "distill.py"))["teach"]
    draft = tiny(vocab_size=400).train().requires_grad_(True)
    before = draft.lm_head.weight.clone()
    teach(tiny(), draft, torch.tensor([[3, 499, 5]] * 4), 2, 2, 1e-2, torch.Generator().manual_seed(0))
    assert draft.lm_head.weight.isfinite().all() and not torch.equal(draft.lm_head.weight, before)


def test_flags_that_teach_nothing_are_refused_all_at_once(tmp_path):
    main = runpy.run_path(str(ROOT / "speculative_decoding" / "distill.py"))["main"]
    flags = dict(prompt_tokens=1, texts=1, temperatures=[0.0, 1.0], rows=0, steps=0, learning_rate=0.0)
    with pytest.raises(ValueError) as caught:
        main(tmp_path, tmp_path, tmp_path, {"texts": 1.0}, tmp_path / "b", **flags)
    for flag in ("--prompt_tokens 1:", "--texts 1: give 2", "--rows 0", "--steps 0", "--learning_rate 0.0"):
        assert flag in str(caught.value)
    with pytest.raises(ValueError, match=r"--temperatures \[\]: give one or more"):
        main(tmp_path, tmp_path, tmp_path, {"texts": 1.0}, tmp_path / "b", temperatures=[])


@pytest.mark.slow
def test_assisted_generation_of_transformers(tmp_path, capsys):
    """The script as it is; its text is the target's own."""
    transformers = pytest.importorskip("transformers")
    for name, overrides in (("target", {}), ("draft", dict(n_layer=1)), ("other", {})):
        write_lit_folder(tmp_path / name, tokenizer=name != "draft", **overrides)
    shutil.copy(tmp_path / "target" / "tokenizer.model", tmp_path / "draft")
    train_sentencepiece(tmp_path / "other" / "tokenizer.model", vocab_size=500)
    for name in ("target", "draft", "other"):
        write_hf_folder(tmp_path / name, tmp_path / "hf" / name)
    main = runpy.run_path(str(ROOT / "speculative_decoding" / "instruct_hf_assisted_decoding.py"))["main"]
    hf = [str(tmp_path / "hf" / name) for name in ("target", "draft", "other")]
    main(*hf[:2], prompt="def ", max_new_tokens=12, eight_bit=False)
    out = capsys.readouterr().out
    assert "alone: 12 tokens in" in out and "assisted: 12 tokens in" in out
    tokenizer = transformers.AutoTokenizer.from_pretrained(hf[0])
    ids = tokenizer("def ")["input_ids"]
    written = generate(load_model(open_pretrained(tmp_path / "target")), [ids], 12)[0]
    assert out.endswith(f"\n\n{tokenizer.decode(ids + written, skip_special_tokens=True)}\n")
    with pytest.raises(ValueError, match="different tokenizers"):
        main(hf[0], hf[2])
