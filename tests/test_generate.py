import json
import re

import pytest
import torch

from lit_gpt import Config, decoder
from lit_gpt.generate import ContextFull, generate, penalise, probabilities, stream, stream_text
from lit_gpt.model import GPT
from lit_gpt.pretrained import Pretrained, load_model, open_pretrained
from lit_gpt.tokenizer import Tokenizer
from tests.tiny import DYNAMIC, TINY, random_weights, run_script, write_lit_folder

PROMPTS = [[5], [7, 8, 9, 10, 11, 12, 13], [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]]


def tiny(**overrides) -> GPT:
    config = Config(**{**TINY, **overrides})
    return load_model(Pretrained(None, config, random_weights(config)))


@torch.inference_mode()
def greedy_without_cache(model: GPT, prompt: list[int], n: int) -> list[int]:
    ids = list(prompt)
    for _ in range(n):
        ids.append(model(torch.tensor([ids]))[0, -1, : model.config.vocab_size].argmax().item())
    return ids[len(prompt) :]


@pytest.mark.parametrize("overrides", [{}, dict(family="gptneox", n_query_groups=4), dict(tie_embeddings=True)])
def test_greedy_equals_no_cache(overrides):
    model = tiny(**overrides)
    for prompt in PROMPTS:
        assert list(stream(model, prompt, 20)) == greedy_without_cache(model, prompt, 20)


def test_a_batch_of_different_lengths_equals_each_prompt_alone():
    model = tiny()
    alone = [list(stream(model, prompt, 20)) for prompt in PROMPTS]
    assert generate(model, PROMPTS, 20) == alone
    assert len({tuple(row) for row in alone}) == 3


@pytest.mark.shared
def test_greedy_continuation_of_the_real_model(shared_data):
    folder = shared_data / "models" / "stories260k"
    model = load_model(open_pretrained(folder))
    for case in json.loads((folder / "REFERENCE.json").read_text())["greedy"]:
        assert list(stream(model, case["prompt_ids"], len(case["new_ids"]))) == case["new_ids"]


@pytest.mark.parametrize(
    "temperature, top_k, top_p, min_p",
    [(1, None, 1, 0), (0.7, None, 1, 0), (1, 5, 1, 0), (1, None, 0.6, 0), (1.5, 40, 0.8, 0), (0.5, 1, 0.1, 0)]
    + [(1, None, 1, 0.1), (2.0, 30, 0.9, 0.3)],
)
def test_probabilities_equal_transformers(temperature, top_k, top_p, min_p):
    from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn(50, 100, generator=torch.Generator().manual_seed(0)) * 3
    want = TemperatureLogitsWarper(float(temperature))(None, logits)
    want = TopKLogitsWarper(top_k)(None, want) if top_k else want
    want = TopPLogitsWarper(float(top_p))(None, want) if top_p < 1 else want
    want = MinPLogitsWarper(min_p)(None, want) if min_p else want
    got = probabilities(logits, temperature, top_k, top_p, min_p)
    torch.testing.assert_close(got, want.softmax(-1))
    assert ((got > 0).sum(-1) < 100).all() == (top_k is not None or top_p < 1 or min_p > 0)


def test_repetition_penalty_equals_transformers():
    from transformers import RepetitionPenaltyLogitsProcessor

    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[1, 2, 2], [7, 49, 0], [3, 3, 3]])
    seen = torch.zeros(3, 50, dtype=torch.bool).scatter(1, ids, True)
    want = RepetitionPenaltyLogitsProcessor(1.7)(ids, logits)
    torch.testing.assert_close(penalise(logits, seen, 1.7), want)


def test_a_repetition_penalty_counts_the_prompt_and_what_follows():
    rows = generate(tiny(vocab_size=512), PROMPTS, 40, repetition_penalty=1e6)
    for prompt, row in zip(PROMPTS, rows, strict=True):  # nothing ever comes twice, while something else is left
        assert len({*row}) == 40 and not {*row} & {*prompt}


def test_samples_of_a_prompt_read_it_once():
    model = tiny()
    want = [row for row in generate(model, PROMPTS, 12) for _ in range(3)]
    assert generate(model, PROMPTS, 12, num_samples=3) == want
    sampled = generate(model, PROMPTS, 12, num_samples=3, temperature=2.0)
    assert len({tuple(row) for row in sampled}) == 9


def test_log_probabilities_are_the_models_own():
    model = tiny()
    rows, logprobs = generate(model, PROMPTS, 10, temperature=0.5, top_k=3, logprobs=True)
    for prompt, row, got in zip(PROMPTS, rows, logprobs, strict=True):
        with torch.inference_mode():
            want = model(torch.tensor([prompt + row]))[0, len(prompt) - 1 : -1].log_softmax(-1)
        torch.testing.assert_close(torch.tensor(got), want[range(10), row], rtol=1e-4, atol=1e-4)
    pairs = list(stream(model, PROMPTS[0], 5, logprobs=True))
    assert [i for i, _ in pairs] == list(stream(model, PROMPTS[0], 5)) and all(p < 0 for _, p in pairs)


@pytest.mark.parametrize("chunk", [None, 4])
@pytest.mark.parametrize("num_samples", [1, 3])
def test_dynamic_scaling_looks_at_the_text_alone(monkeypatch, num_samples, chunk):
    """Neither at how many places a cache has, nor at how it was filled: the model without one says the same."""
    if chunk:
        monkeypatch.setattr(decoder, "PREFILL_TOKENS", 2 * chunk)
    model = tiny(**DYNAMIC)
    prompts = [PROMPTS[2], PROMPTS[2][::-1]]
    settings = dict(num_samples=num_samples, temperature=1.0, generator=torch.Generator().manual_seed(0))
    rows, logprobs = generate(model, prompts, 30, logprobs=True, **settings)
    for i, (row, got) in enumerate(zip(rows, logprobs, strict=True)):
        with torch.inference_mode():
            logits = model(torch.tensor([prompts[i // num_samples] + row[:-1]]))[0, len(PROMPTS[2]) - 1 :]
        want = logits.log_softmax(-1)[range(30), row]
        torch.testing.assert_close(torch.tensor(got), want, rtol=1e-4, atol=1e-4)


def test_two_streams_of_one_model_do_not_disturb_each_other():
    model = tiny()
    alone = [list(stream(model, prompt, 10)) for prompt in PROMPTS]
    streams = [stream(model, prompt, 10) for prompt in PROMPTS]
    assert list(map(list, zip(*[[next(s) for s in streams] for _ in range(10)], strict=True))) == alone


def test_temperature_zero_is_the_largest():
    p = probabilities(torch.tensor([[1.0, 3.0, 2.0], [0.0, -1.0, -2.0]]), temperature=0)
    assert p.tolist() == [[0, 1, 0], [1, 0, 0]]


def test_samples_follow_the_distribution_and_the_seed():
    model = tiny()
    with torch.inference_mode():
        p = probabilities(model(torch.tensor([PROMPTS[1]]))[0, -1], temperature=2.0, top_k=8)
    rows = generate(model, [PROMPTS[1]] * 4000, 1, temperature=2.0, top_k=8, generator=torch.Generator().manual_seed(0))
    frequencies = torch.bincount(torch.tensor(rows)[:, 0], minlength=len(p)) / 4000
    assert (frequencies - p).abs().max() < 5 * (0.25 / 4000) ** 0.5  # five standard deviations at most
    assert (frequencies[p == 0] == 0).all()

    def sample(seed: int) -> list[int]:
        return list(stream(model, [5], 20, temperature=1.0, generator=torch.Generator().manual_seed(seed)))

    assert sample(1) == sample(1) != sample(2)


def test_eos_ends_a_row_and_is_part_of_it():
    model = tiny()
    free = generate(model, PROMPTS, 20)
    eos = free[0][6]
    want = [row[: row.index(eos) + 1] if eos in row else row for row in free]
    assert generate(model, PROMPTS, 20, eos_id=eos) == want
    assert list(stream(model, PROMPTS[0], 20, eos_id=eos)) == want[0]
    assert len(want[0]) < 20


def test_rows_that_pad_the_vocabulary_are_never_chosen():
    model = tiny(vocab_size=70, padded_vocab_size=128)
    with torch.no_grad():
        model.lm_head.weight[70:] *= 100
    greedy, sampled = generate(model, [[1]], 30), generate(model, [[1]] * 20, 30, temperature=2.0)
    assert max(max(row) for row in greedy + sampled) < 70


def test_the_context_limit_keeps_what_was_generated():
    model = tiny(block_size=16)
    prompt = PROMPTS[2]  # 11 tokens: 5 more fit, and a sixth is predicted from a full context
    assert len(list(stream(model, prompt, 6))) == 6
    got = []
    with pytest.raises(ContextFull, match="context of 16 tokens") as caught:
        for token in stream(model, prompt, 7):
            got.append(token)
    assert got == caught.value.generated[0] == greedy_without_cache(model, prompt, 6)
    with pytest.raises(ContextFull) as caught:
        generate(model, PROMPTS, 100)
    assert [len(row) for row in caught.value.generated] == [6, 6, 6] and caught.value.logprobs is None
    with pytest.raises(ContextFull) as caught:
        generate(model, PROMPTS, 100, logprobs=True)
    assert (caught.value.generated, caught.value.logprobs) == generate(model, PROMPTS, 6, logprobs=True)
    with pytest.raises(ContextFull) as caught:
        list(stream(model, prompt, 100, logprobs=True))
    [row], [logprobs] = caught.value.generated, caught.value.logprobs
    assert list(zip(row, logprobs, strict=True)) == list(stream(model, prompt, 6, logprobs=True))
    eos = got[-1]
    assert list(stream(model, prompt, 100, eos_id=eos))[-1] == eos  # nobody is cut off: no error


@pytest.mark.parametrize(
    "prompt, settings, message",
    [
        ([], {}, "prompt is empty"),
        ([1] * 65, {}, "the prompt has 65 tokens; the model takes 64"),
        ([1, 512], {}, "token id 512 in the prompt; the model knows 0 to 511"),
        ([1], dict(temperature=-1.0), "temperature -1.0"),
        ([1], dict(top_k=0), "top_k 0"),
        ([1], dict(top_p=0.0), "top_p 0.0"),
        ([1], dict(min_p=1.5), "min_p 1.5"),
        ([1], dict(repetition_penalty=0.0), "repetition_penalty 0.0"),
        ([1], dict(max_new_tokens=0), "max_new_tokens 0"),
        ([1], dict(num_samples=0), "num_samples 0: give 1 or more"),
        ([1], dict(num_samples=-1), "num_samples -1"),
    ],
)
def test_settings_that_make_no_sense(prompt, settings, message):
    with pytest.raises(ValueError, match=message):
        generate(tiny(), [prompt], **{"max_new_tokens": 5, **settings})


class Bytes:
    """A tokenizer whose tokens are bytes, so most characters take several; like sentencepiece it drops the text's first
    space."""

    def decode(self, ids) -> str:
        return bytes(ids).decode(errors="replace").removeprefix(" ")


@pytest.mark.parametrize(
    "text", ["plain words", " a  b ", "naïve 你好 😀👍🏽 end", "😀", "  ", "tail \ufffd not half", "a\n\n b"]
)
@pytest.mark.parametrize("prompt", ["Once", "ends in a space ", "你好", "x"])
def test_streamed_text_keeps_spaces_and_whole_characters(prompt, text):
    pieces = list(stream_text(Bytes(), list(prompt.encode()), list(text.encode())))
    assert "".join(pieces) == text
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


def test_half_a_character_at_the_end_is_shown_as_such():
    assert "".join(stream_text(Bytes(), list(b"x"), "é😀".encode()[:-1])) == "é\ufffd"


@pytest.mark.parametrize(
    "text, stop, want",
    [
        ("one. two. three", [". t"], "one"),
        ("one. two", ["xyz", "\n"], "one. two"),
        ("a\n\nb", ["\n\n", "b"], "a"),
        ("ends in half a stop \n", ["\n\n"], "ends in half a stop \n"),
        ("你好 and 😀!", ["😀"], "你好 and "),
        ("aab", ["ab", "aab"], ""),
    ],
)
def test_stop_strings(text, stop, want):
    pieces = list(stream_text(Bytes(), [*b"x"], iter(text.encode()), stop))
    assert "".join(pieces) == want


@pytest.mark.shared
def test_streamed_text_of_a_real_tokenizer(shared_data):
    tokenizer = Tokenizer(shared_data / "tokenizer" / "llama2")
    text = "The first  words,\nthen 你好世界 and 𝔘𝔫𝔦 😀👩‍👩‍👧 code:\n    return x"
    ids = tokenizer.encode(text, bos=True, eos=True)
    for cut in (1, 2, 5):
        pieces = list(stream_text(tokenizer, ids[:cut], ids[cut:]))
        assert "".join(pieces) == text[len(tokenizer.decode(ids[:cut])) :]
        assert not any("\ufffd" in piece for piece in pieces)
        assert len(pieces) > 20


def test_command_line(tmp_path, capsys):
    write_lit_folder(tmp_path / "lit")

    def text(*flags) -> str:
        assert run_script("generate.py", "--checkpoint_dir", tmp_path / "lit", "--prompt", "def ", *flags) == 0
        return capsys.readouterr().out

    first = text("--max_new_tokens", 20)
    assert first.startswith("def ") and len(first) > 6
    assert first == text("--max_new_tokens", 20) != text("--max_new_tokens", 20, "--seed", 1)


def test_command_line_drafts_stops_and_scores(tmp_path, capsys):
    write_lit_folder(tmp_path / "lit")
    flags = ("--checkpoint_dir", tmp_path / "lit", "--prompt", "def ", "--max_new_tokens", 20, "--temperature", 0)

    def run(*more) -> tuple[str, str]:
        assert run_script("generate.py", *flags, *more) == 0
        out = capsys.readouterr()
        return out.out.removesuffix("\n"), out.err

    text, _ = run()
    drafted, stats = run("--draft_dir", tmp_path / "lit")
    assert drafted == text and "100% of" in stats and "tokens per pass" in stats
    assert run("--prompt_lookup", "true")[0] == text
    assert run("--int8", "true")[0].startswith("def ")
    end = text[8:10]
    assert run("--stop", f"[{json.dumps(end)}]")[0] == text[: text.index(end, 4)]
    assert len([line for line in run("--logprobs", "true")[1].splitlines() if line.startswith("  ")]) == 20
    message = run_script("generate.py", *flags, "--prompt_lookup", "true", "--logprobs", "true")
    assert message.startswith("error: --logprobs and --repetition_penalty do not go together")


@pytest.mark.filterwarnings("ignore:speculation does not pay")
@pytest.mark.parametrize("how", ["--draft_dir", "--prompt_lookup"])
def test_command_line_seeds_with_guesses(tmp_path, capsys, how):
    """A fixed number of them, as otherwise the clock chooses it."""
    write_lit_folder(tmp_path / "lit")
    write_lit_folder(tmp_path / "draft", n_layer=1)
    flags = ("--checkpoint_dir", tmp_path / "lit", "--prompt", "def f(x): def f(x", "--num_samples", 2)
    flags += (how, tmp_path / "draft" if how == "--draft_dir" else "true", "--guesses", 3, "--max_new_tokens", 30)

    def text(seed: int) -> str:
        assert run_script("generate.py", *flags, "--seed", seed) == 0
        out = capsys.readouterr()
        guessed = int(re.search(r"of (\d+) guesses", out.err)[1])
        assert guessed > 30 and guessed % 3 == 0
        return out.out

    assert text(1) == text(1) != text(2)


@pytest.mark.filterwarnings("ignore:speculation does not pay")
def test_command_line_at_the_context_limit(tmp_path, capsys):
    """All samples, as far as they go, with all that is said of them; then the error."""
    write_lit_folder(tmp_path / "lit")
    flags = ("--checkpoint_dir", tmp_path / "lit", "--prompt", "def ", "--temperature", 0, "--num_samples", 2)

    def run(n: int | None, *more) -> tuple[int | str, str, str]:
        wanted = () if n is None else ("--max_new_tokens", n)
        return run_script("generate.py", *flags, *wanted, *more), *capsys.readouterr()

    fit = 65 - len(Tokenizer(tmp_path / "lit").encode("def ", bos=True, eos=False))
    code, out, err = run(fit)
    assert code == 0 and err.count(f"{fit} tokens in") == 2
    assert run(None)[:2] == (0, out)  # who asks for no number is not told that it was too large
    for more in (("--logprobs", "true"), ("--prompt_lookup", "true")):
        code, cut, err = run(200, *more)
        assert code.startswith("error: the text fills the model's context of 64 tokens")
        assert cut == out and err.count(f"{fit} tokens in") == 2
        scored = [line for line in err.splitlines() if line.startswith("  ")]
        assert len(scored) == (2 * fit if "--logprobs" in more else 0)
        assert ("guesses accepted" in err) == ("--prompt_lookup" in more)


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--stop", '[".", ""]'), "--stop holds an empty string"),
        (("--num_samples", 0), "num_samples 0: give 1 or more"),
        (("--temperature", -1), "temperature -1.0: give 0"),
    ],
)
def test_command_line_settings_are_looked_at_before_the_model(tmp_path, flags, message):
    assert message in run_script("generate.py", "--checkpoint_dir", tmp_path / "none", *flags)


@pytest.mark.parametrize(
    "folder, message",
    [("none", "none does not exist"), ("empty", "empty holds no model"), ("lit", "give --tokenizer_path")],
)
def test_command_line_mistakes(tmp_path, folder, message):
    write_lit_folder(tmp_path / "lit", tokenizer=False)
    (tmp_path / "empty").mkdir()
    assert message in run_script("generate.py", "--checkpoint_dir", tmp_path / folder)
