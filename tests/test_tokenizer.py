"""Ids are the reference library's on every input, delimiters are placed once and never typed, errors name the file."""

import base64
import importlib.util
import random
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_gpt import text_sources
from lit_gpt import tokenizer as tokenizer_module
from lit_gpt.tokenizer import SEPARATOR, TORTURE, BatchEncoder, Tokenizer

pytestmark = pytest.mark.usefixtures("tokenizer_cache")
ROOT = Path(__file__).parent.parent
TEXT = ["The quick brown fox jumps over the lazy dog. ", "def f(x):\n    return x + 12345\n", "naïve café, Привет"] * 40


def train_tokenizer_script():
    spec = importlib.util.spec_from_file_location("train_tokenizer", ROOT / "scripts" / "train_tokenizer.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tiktoken_ranks() -> bytes:
    """All bytes and some merges, as Llama 3's tokenizer.model writes them."""
    tokens = [bytes([b]) for b in range(256)]
    tokens += [b"th", b"he", b"in", b" t", b" th", b" the", b"  ", b"    ", b"\n\n", b"12", b"123", "é".encode()]
    return b"".join(base64.b64encode(token) + f" {rank}\n".encode() for rank, token in enumerate(tokens))


@pytest.fixture(scope="session", params=["sentencepiece", "tokenizers", "tiktoken"])
def tokenizer(request, tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "tiktoken":
        pytest.importorskip("tiktoken")
        (folder / "tokenizer.model").write_bytes(tiktoken_ranks())
        return Tokenizer(folder)
    (folder / "corpus").mkdir()
    (folder / "corpus" / "a.txt").write_text("\n".join(TEXT))
    script = train_tokenizer_script()
    script.main(script.TrainTokenizerArgs(folder / "corpus", folder, vocab_size=330, kind=request.param))
    return Tokenizer(folder)


@pytest.fixture(scope="session")
def encoder(tokenizer, tmp_path_factory) -> BatchEncoder:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        encoder = BatchEncoder(tokenizer, "gigatoken")
    assert encoder.engine == "gigatoken" and encoder.why_slow is None
    return encoder


def test_delimiters_are_always_said(tokenizer):
    with pytest.raises(TypeError):
        tokenizer.encode("a")
    with pytest.raises(TypeError):
        tokenizer.encode("a", True, False)


def test_each_delimiter_is_placed_once(tokenizer):
    plain = tokenizer.encode("Hello, world", bos=False, eos=False)
    assert tokenizer.bos_id not in plain and tokenizer.eos_id not in plain
    assert tokenizer.encode("Hello, world", bos=True, eos=True) == [tokenizer.bos_id, *plain, tokenizer.eos_id]
    assert tokenizer.encode("", bos=True, eos=True) == [tokenizer.bos_id, tokenizer.eos_id]


@pytest.mark.parametrize("text", ["<s>", "</s>", "a<s>b</s>", "<unk>", "<|begin_of_text|>", "x<|end_of_text|>"])
def test_a_delimiter_that_is_typed_is_text(tokenizer, encoder, text):
    ids = tokenizer.encode(text, bos=False, eos=False)
    assert not {tokenizer.bos_id, tokenizer.eos_id} & set(ids)
    assert tokenizer.decode(ids) == text
    texts = ["a", text, "b"]
    assert plain(encoder, texts) == reference(tokenizer, texts)


def test_decode_inverts_encode_and_refuses_unknown_ids(tokenizer):
    text = "  The fox,\n\tnaïve 12345 \x00 你好 😀 end "
    assert tokenizer.decode(tokenizer.encode(text, bos=True, eos=True)) == text
    assert tokenizer.decode(np.array(tokenizer.encode(text, bos=False, eos=False), dtype=np.uint16)) == text
    for bad in (-1, tokenizer.vocab_size):
        with pytest.raises(ValueError, match=f"token id {bad} is outside"):
            tokenizer.decode([bad])


def test_lone_surrogates_are_refused(tokenizer):
    with pytest.raises(ValueError, match=r"character 2 is a lone surrogate"):
        tokenizer.encode("ab\ud800", bos=False, eos=False)


def reference(tokenizer: Tokenizer, texts: list[str], bos: bool = False, eos: bool = False) -> tuple[list, list, list]:
    rows = [tokenizer.encode(text, bos=bos, eos=eos) for text in texts]
    return [i for row in rows for i in row], [len(row) for row in rows], [len(text.encode()) for text in texts]


def plain(encoder: BatchEncoder, texts: list[str], bos: bool = False, eos: bool = False) -> tuple[list, list, list]:
    ids, lengths, sizes = encoder(texts, bos=bos, eos=eos)
    return ids.tolist(), lengths.tolist(), sizes.tolist()


@settings(max_examples=150, deadline=None)
@given(data=st.data(), bos=st.booleans(), eos=st.booleans())
def test_the_fast_encoder_gives_the_reference_ids(tokenizer, encoder, data, bos, eos):
    pieces = st.sampled_from([text[:40] for text in TORTURE] + ["the ", " the", "\n", "12", "fox", SEPARATOR])
    texts = st.lists(st.one_of(st.lists(pieces, max_size=12).map("".join), st.text(max_size=60)), max_size=6)
    batch = data.draw(texts)
    assert plain(encoder, batch, bos, eos) == reference(tokenizer, batch, bos, eos)


def test_the_fast_encoder_knows_any_ranks(tmp_path):
    """Also where a token comes before its parts, or cannot be joined from any."""
    pytest.importorskip("tiktoken")
    r = random.Random(0)
    for n in range(30):
        longer = {"".join(r.choices("abc", k=r.randrange(2, 7))).encode() for _ in range(r.randrange(3, 60))}
        tokens = [bytes([b]) for b in range(256)] + r.sample(sorted(longer), len(longer))
        path = tmp_path / f"{n}.model"
        path.write_bytes(b"".join(base64.b64encode(token) + f" {rank}\n".encode() for rank, token in enumerate(tokens)))
        tokenizer = Tokenizer(path)
        texts = ["".join(r.choices("abc", k=r.randrange(30))) for _ in range(300)]
        assert plain(BatchEncoder(tokenizer, "gigatoken"), texts) == reference(tokenizer, texts)


def test_long_runs_take_linear_time(encoder):
    # A quadratic encoder would need minutes for this; the whole suite's time limit is what would fail.
    for piece in ("x", " ", "ab", "你"):
        assert encoder([piece * 200_000], bos=False, eos=False)[1].sum() > 0


def test_an_encoder_that_is_wrong_is_not_used(tokenizer, monkeypatch):
    class Wrong:
        def __init__(self, right):
            self.right = right

        def encode_batch_padded(self, texts, **options):
            ids, lengths = self.right.encode_batch_padded(texts, **options)
            return np.where(ids == tab, tab + 1, ids), lengths

    tab = tokenizer.encode("\t", bos=False, eos=False)[-1]
    right = tokenizer_module._in_gigatoken(tokenizer)
    monkeypatch.setattr(tokenizer_module, "_in_gigatoken", lambda tokenizer: Wrong(right))
    encoder = BatchEncoder(tokenizer)
    assert encoder.engine == "reference" and r"differ from the reference on '\t'" in encoder.why_slow
    assert plain(encoder, ["a\tb"]) == reference(tokenizer, ["a\tb"])
    with pytest.raises(ValueError, match="--engine gigatoken: gigatoken's ids differ"):
        BatchEncoder(tokenizer, "gigatoken")


def test_without_the_fast_library_the_reference_is_used(tokenizer, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gigatoken", None)
    encoder = BatchEncoder(tokenizer)
    assert encoder.engine == "reference" and "pip install gigatoken" in encoder.why_slow
    texts = ["a b", "", "<s>"]
    assert plain(encoder, texts, bos=True, eos=True) == reference(tokenizer, texts, bos=True, eos=True)


def test_the_fast_encoder_needs_no_awkward_arrays(tokenizer, encoder, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "awkward", None)
    assert plain(encoder, TORTURE) == reference(tokenizer, TORTURE)


def test_a_text_with_the_separator_is_encoded_too(tokenizer, encoder):
    texts = ["a", f"x {SEPARATOR} y", SEPARATOR, "", SEPARATOR * 2]
    assert plain(encoder, texts, bos=True, eos=True) == reference(tokenizer, texts, bos=True, eos=True)


def test_the_conversion_for_the_fast_library_is_kept_and_made_anew_when_damaged(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    texts, convert, made = ["the fox", "12345"], type(tokenizer.model).as_json, []
    monkeypatch.setattr(type(tokenizer.model), "as_json", lambda self: made.append(self) or convert(self))

    def encode():
        assert plain(BatchEncoder(tokenizer, "gigatoken"), texts) == reference(tokenizer, texts)
        return len(made)

    assert encode() == 1 and encode() == 1
    (kept,) = (tmp_path / "lit_gpt").iterdir()
    whole = kept.read_bytes()
    for damaged in (b"", whole[:-1], whole.replace(b"fox", b"dog"), whole[:100] + b"\xff" + whole[101:]):
        made.clear()
        kept.write_bytes(damaged)
        assert encode() == (damaged != whole) and kept.read_bytes() == whole
    assert list((tmp_path / "lit_gpt").iterdir()) == [kept]

    made.clear()
    (tmp_path / "file").write_text("")  # where no folder can be made
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert encode() == 1 and encode() == 2


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json"])
@pytest.mark.parametrize(
    "content", [b"", b"not a tokenizer", b"{}", b"\x00\xff" * 100, b"YQ== 0\nYg== 7\n", b"YQ== x\n"]
)
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}: not a"):
        Tokenizer(tmp_path)


def test_a_missing_tokenizer_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone does not exist"):
        Tokenizer(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match="holds none of tokenizer.model, tokenizer.json"):
        Tokenizer(tmp_path)


def test_a_json_tokenizer_without_delimiters_refuses_to_place_them(tmp_path):
    from tokenizers import Tokenizer as Plain
    from tokenizers import models

    Plain(models.BPE({"a": 0}, [])).save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (None, None)
    with pytest.raises(ValueError, match="has no BOS token"):
        tokenizer.encode("a", bos=True, eos=False)


@pytest.mark.parametrize(
    ("config", "bos"),
    [
        (b'{"bos_token": "<s>"}', 0),
        (b'{"bos_token": {"content": "<s>"}}', 0),
        (b'{"bos_token": null}', None),
        (b'{"bos_token": ', "broken JSON"),
        (b"\xff", "broken JSON"),
        (b"", "broken JSON"),
        (b"[]", "bos_token is \\[\\], not the text"),
        (b'{"bos_token": 7}', "bos_token is 7, not the text"),
        (b'{"bos_token": {"lstrip": false}}', "bos_token is {.*}, not the text"),
    ],
)
def test_the_configuration_beside_a_json_tokenizer_names_its_delimiters(tmp_path, config, bos):
    from tokenizers import Tokenizer as Plain
    from tokenizers import models

    Plain(models.BPE({"<s>": 0}, [])).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_bytes(config)
    if isinstance(bos, str):
        with pytest.raises(ValueError, match=f"{tmp_path}/tokenizer_config.json: {bos}"):
            Tokenizer(tmp_path)
    else:
        assert Tokenizer(tmp_path).bos_id == bos


def test_train_tokenizer_says_what_is_wrong(tmp_path):
    script = train_tokenizer_script()
    (tmp_path / "a.txt").write_text("too little")
    for kind in ("sentencepiece", "tokenizers"):
        args = script.TrainTokenizerArgs(tmp_path / "a.txt", tmp_path / "out" / kind, vocab_size=30000, kind=kind)
        with pytest.raises(ValueError, match=r"^--vocab_size 30000: the text is enough for \d+; ") as most:
            script.main(args)
        with pytest.raises(ValueError, match=r"^--vocab_size 200: .* alone are \d+$") as least:
            script.main(replace(args, vocab_size=200))
        assert not (tmp_path / "out" / kind).exists()
        for error in (most, least):  # what is named is what works
            size = int(re.findall(r"\d+", str(error.value))[-1])
            script.main(replace(args, vocab_size=size, overwrite=True))
            assert Tokenizer(tmp_path / "out" / kind).vocab_size == size


def test_train_tokenizer_reads_as_much_as_it_says(tmp_path, monkeypatch):
    monkeypatch.setattr(text_sources, "UNIT", 1000)
    (tmp_path / "long.jsonl").write_text("".join(f'{{"content": "{i:05d}"}}\n' for i in range(1000)))
    (tmp_path / "short.jsonl").write_text('{"content": "0123456789"}\n')
    script = train_tokenizer_script()
    for limit, expected in ((8001, 4010), (10, 10), (100_000, 5010)):
        texts = list(script.sample(sorted(tmp_path.glob("*")), ["text", "content"], limit))
        assert sum(map(len, texts)) == expected


@pytest.mark.shared
def test_llama2_and_a_tokenizer_that_the_fast_library_gets_wrong(shared_data):
    llama = Tokenizer(shared_data / "tokenizer" / "llama2")
    assert (llama.name, llama.vocab_size, llama.bos_id, llama.eos_id) == ("llama2", 32000, 1, 2)
    assert llama.sha256.startswith("9e556afd")
    encoder = BatchEncoder(llama, "gigatoken")
    texts = [*TORTURE, "a<s>" * 50, "".join(map(chr, range(1, 0xD800, 7)))]
    assert plain(encoder, texts, bos=True) == reference(llama, texts, bos=True)

    stories = BatchEncoder(Tokenizer(shared_data / "models" / "stories260k"))
    assert stories.engine == "reference" and "differ from the reference" in stories.why_slow
