import json

import pytest
import torch

from lit_gpt import Config
from lit_gpt.generate import ContextFull, generate, probabilities, stream, stream_text
from lit_gpt.model import GPT
from lit_gpt.pretrained import Pretrained, load_model, open_pretrained
from tests.tiny import TINY, random_weights, run_script, write_lit_folder

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
    "temperature, top_k, top_p",
    [(1, None, 1), (0.7, None, 1), (1, 5, 1), (1, None, 0.6), (1.5, 40, 0.8), (0.5, 1, 0.1)],
)
def test_probabilities_equal_transformers(temperature, top_k, top_p):
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn(50, 100, generator=torch.Generator().manual_seed(0)) * 3
    want = TemperatureLogitsWarper(float(temperature))(None, logits)
    want = TopKLogitsWarper(top_k)(None, want) if top_k else want
    want = TopPLogitsWarper(float(top_p))(None, want) if top_p < 1 else want
    got = probabilities(logits, temperature, top_k, top_p)
    torch.testing.assert_close(got, want.softmax(-1))
    assert ((got > 0).sum(-1) < 100).all() == (top_k is not None or top_p < 1)


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
    assert [len(row) for row in caught.value.generated] == [6, 6, 6]
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
        ([1], dict(max_new_tokens=0), "max_new_tokens 0"),
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


@pytest.mark.shared
def test_streamed_text_of_a_real_tokenizer(shared_data):
    from lit_gpt.tokenizer import Tokenizer

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


def test_command_line_at_the_context_limit(tmp_path, capsys):
    write_lit_folder(tmp_path / "lit")
    flags = ("--checkpoint_dir", tmp_path / "lit", "--prompt", "def ", "--max_new_tokens", 200)
    message = run_script("generate.py", *flags, "--temperature", 0)
    assert message.startswith("error: the text fills the model's context of 64 tokens")
    assert len(capsys.readouterr().out) > 30  # what there was until then


@pytest.mark.parametrize(
    "folder, message",
    [("none", "none does not exist"), ("empty", "empty holds no model"), ("lit", "give --tokenizer_path")],
)
def test_command_line_mistakes(tmp_path, folder, message):
    write_lit_folder(tmp_path / "lit", tokenizer=False)
    (tmp_path / "empty").mkdir()
    assert message in run_script("generate.py", "--checkpoint_dir", tmp_path / folder)
