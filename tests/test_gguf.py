"""GGUF files: what is written comes back, llama.cpp computes with it what we do, and what it cannot hold is refused.

The tests that ask llama.cpp itself need llama-cpp-python, which is built from source and is no requirement; they skip
without it. `pip install llama-cpp-python` somewhere and put it on PYTHONPATH to run them.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys

import gguf
import jinja2
import pytest
import torch
from safetensors.torch import save_file

from lit_gpt import MODELS, Config, pretrained
from lit_gpt.chat_template import TEMPLATES
from lit_gpt.generate import stream
from lit_gpt.gguf_file import DTYPES, half_split, heads, interleaved, read_gguf, rounding, storage, write_gguf
from lit_gpt.hf import same_bits
from lit_gpt.hf_tokenizer import export_tokenizer
from lit_gpt.kernels.rope import rope_tables, rotate
from lit_gpt.pretrained import Pretrained, load_model, open_pretrained
from lit_gpt.tokenizer import TORTURE, Tokenizer
from tests.test_hf import llama3_ranks, reduced
from tests.tiny import ROOT, TINY, random_weights, run_script, train_sentencepiece, write_lit_folder

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_sentencepiece(tmp_path_factory.mktemp("sentencepiece") / "tokenizer.model")


@pytest.fixture
def llama_cpp(monkeypatch):
    package = pytest.importorskip("llama_cpp", reason="needs llama-cpp-python")
    defaults = package.llama_cpp.llama_model_default_params

    def without_extra_buffers():  # its AMX code does not run in every sandbox
        params = defaults()
        params.use_extra_bufts = False
        return params

    monkeypatch.setattr(package.llama_cpp, "llama_model_default_params", without_extra_buffers)
    return package


def written(config: Config, tokenizer, path, dtype="f32", weights=None):
    weights = weights or random_weights(config)
    write_gguf(config, weights, path, dtype, tokenizer, add_bos=True)
    return weights


# --- the file --------------------------------------------------------------------------------------------------------


def test_llama_cpps_order_of_rotation():
    """It turns elements 2i and 2i+1 of a head together, where we turn i and i + D/2."""
    config = Config(n_embd=64, n_head=4, n_query_groups=2, block_size=16)
    weight, x = torch.randn(64, 64), torch.randn(16, 64)
    cos, sin = rope_tables(config, 16, CPU)
    cos, sin = cos[:, None], sin[:, None]
    ours = rotate((x @ weight.T).view(16, 4, 16), cos, sin)
    pairs = (x @ interleaved(weight, 4).T).view(16, 4, 8, 2)
    theirs = torch.stack((pairs[..., 0] * cos - pairs[..., 1] * sin, pairs[..., 1] * cos + pairs[..., 0] * sin), -1)
    torch.testing.assert_close(torch.cat((theirs[..., 0], theirs[..., 1]), -1), ours)
    assert torch.equal(half_split(interleaved(weight, 4), 4), weight)
    assert [heads(config, f"x.{n}_proj.weight") for n in "qkvo"] == [4, 2, 0, 0]


@pytest.mark.parametrize("name", [name for name, fields in MODELS.items() if fields.get("family") != "gptneox"])
def test_presets_come_back_bit_by_bit(name, tokenizer, tmp_path):
    config = reduced(name, n_layer=1, vocab_size=512)
    weights = written(config, tokenizer, tmp_path / "x.gguf")
    read = read_gguf(tmp_path / "x.gguf", config)
    assert set(read) == set(weights) and all(same_bits(weights[n], read[n]) for n in weights)
    assert os.listdir(tmp_path) == ["x.gguf"]


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_formats(dtype, tie, tokenizer, tmp_path):
    config = Config(name="x", **{**TINY, "intermediate_size": 80}, tie_embeddings=tie)  # no multiple of 32
    weights = written(config, tokenizer, tmp_path / "x.gguf", dtype)
    read = read_gguf(tmp_path / "x.gguf", config)
    kinds = {t.name: t.tensor_type.name.lower() for t in gguf.GGUFReader(tmp_path / "x.gguf").tensors}
    quantised = dtype[0] == "q"
    assert kinds["blk.0.attn_q.weight"] == dtype and kinds["output_norm.weight"] == "f32"
    assert kinds["blk.1.ffn_down.weight"] == ("f16" if quantised else dtype)
    assert kinds["token_embd.weight" if tie else "output.weight"] == ("q8_0" if quantised else dtype)
    name = "transformer.h.0.mlp.fc_1.weight"
    if dtype in ("f16", "bf16"):
        assert torch.equal(read[name], weights[name].to({"f16": torch.half, "bf16": torch.bfloat16}[dtype]).float())
    error = (read[name] - weights[name]).pow(2).mean().sqrt() / weights[name].std()
    least, most = dict(
        f32=(0, 0), f16=(0, 3e-4), bf16=(0, 3e-3), q8_0=(1e-3, 0.01), q4_0=(0.03, 0.1), q4_1=(0.03, 0.1)
    )[dtype]
    assert least <= error <= most


def test_what_is_said_about_the_model(tokenizer, tmp_path):
    config = Config(name="my model", **{**TINY, "vocab_size": 520}, head_size=32, rope_base=5e5, norm_eps=1e-6)
    write_gguf(
        config, random_weights(config), tmp_path / "x.gguf", "q4_0", tokenizer, add_bos=False, chat_template="{{x}}"
    )
    fields = {k: f.contents() for k, f in gguf.GGUFReader(tmp_path / "x.gguf").fields.items()}
    said = {k.removeprefix("llama."): v for k, v in fields.items() if k.startswith("llama.")}
    assert said.pop("attention.layer_norm_rms_epsilon") == pytest.approx(1e-6)
    assert said == {
        **{"context_length": 64, "embedding_length": 64, "block_count": 2, "feed_forward_length": 96},
        **{"attention.head_count": 4, "attention.head_count_kv": 2, "vocab_size": 576},
        **{"attention.key_length": 32, "attention.value_length": 32, "rope.dimension_count": 32, "rope.freq_base": 5e5},
    }
    assert fields["general.name"] == "my model" and fields["tokenizer.chat_template"] == "{{x}}"
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert len(tokens) == len(kinds) == 576  # rows that no id uses are there, too
    assert (tokens[:3], kinds[:4]) == (["<unk>", "<s>", "</s>"], [2, 3, 3, 6])
    assert (tokens[512:514], kinds[512]) == (["[PAD0]", "[PAD1]"], 5)
    assert (fields["tokenizer.ggml.bos_token_id"], fields["tokenizer.ggml.eos_token_id"]) == (1, 2)
    assert fields["tokenizer.ggml.add_bos_token"] is False


def test_the_size_of_a_1b_model():
    """TinyLlama's README says 637 MB of llama.cpp's q4_0, whose head has 6 bits; ours has 8."""
    from lit_gpt.gguf_file import n_bytes

    config = Config.from_name("tiny_LLaMA_1b")
    size = {dtype: sum(n_bytes(*tensor) for tensor in storage(config, dtype).values()) for dtype in DTYPES}
    assert [round(size[dtype] / 1e6) for dtype in DTYPES] == [4400, 2200, 2200, 1169, 652, 717]


def test_how_far_values_may_be_rounded():
    """The bound is met by the formats and missed by the same values one row further."""
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).numpy()
    for kind in DTYPES:
        ggml = gguf.GGMLQuantizationType[kind.upper()]
        back = gguf.dequantize(gguf.quantize(x, ggml), ggml)
        assert (abs(back - x) <= rounding(x, kind)).all()
        assert not (abs(back[::-1] - x) <= rounding(x, kind)).all()


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def lit(tmp_path, tokenizer):
    write_lit_folder(tmp_path / "lit", tokenizer=False)
    shutil.copy(tokenizer, tmp_path / "lit")
    return tmp_path / "lit"


def convert(folder, out, *flags):
    return run_script("convert_gguf.py", "--checkpoint_dir", folder, "--out_file", out, *flags)


def test_the_cost_is_printed(lit, tmp_path, capsys):
    assert convert(lit, tmp_path / "x.gguf") == 0
    out = capsys.readouterr().out
    assert "127,296 parameters in" in out and "perplexity of PRETRAIN.md, 64 tokens:" in out
    assert "before," in out and "as q4_0 (" in out
    assert sorted(os.listdir(tmp_path)) == ["lit", "x.gguf"]


def test_a_hugging_face_folder_and_ours_give_the_same_file(lit, tmp_path):
    assert run_script("convert_lit_checkpoint.py", "--checkpoint_dir", lit, "--out_dir", tmp_path / "hf") == 0
    for source in ("lit", "hf"):
        assert convert(tmp_path / source, tmp_path / f"{source}.gguf", "--dtype", "f16") == 0
    assert (tmp_path / "lit.gguf").read_bytes() == (tmp_path / "hf.gguf").read_bytes()


@pytest.mark.parametrize("dtype", ["f32", "q4_0"])
def test_one_wrong_tensor_is_found(dtype, lit, tmp_path, monkeypatch):
    write, count = gguf.GGUFWriter.write_tensor_data, iter(range(100))

    def write_another(self, tensor):
        return write(self, tensor[::-1] if next(count) == 3 else tensor)  # two rows exchanged, and more

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", write_another)
    line = convert(lit, tmp_path / "x.gguf", "--dtype", dtype)
    assert "blk.0.attn_q.weight came back with other values than were written as " + dtype in line
    assert os.listdir(tmp_path) == ["lit"]


def test_nan_is_not_written(lit, tmp_path):
    weights = random_weights(open_pretrained(lit).config)
    weights["transformer.h.1.attn.attn.weight"][3, 3] = torch.nan
    save_file(weights, lit / pretrained.LIT_MODEL)
    assert "q_proj.weight holds 1 values that are NaN" in convert(lit, tmp_path / "x.gguf")
    assert os.listdir(tmp_path) == ["lit"]


def test_what_f16_cannot_hold_is_found(lit, tmp_path):
    weights = random_weights(open_pretrained(lit).config)
    weights["lm_head.weight"][0, 0] = 70_000
    save_file(weights, lit / pretrained.LIT_MODEL)
    assert "output.weight came back with other values" in convert(lit, tmp_path / "x.gguf", "--dtype", "f16")
    assert convert(lit, tmp_path / "x.gguf", "--dtype", "bf16") == 0


def test_an_existing_file_is_kept(lit, tmp_path):
    (tmp_path / "x.gguf").write_text("precious")
    assert "x.gguf exists already" in convert(lit, tmp_path / "x.gguf")
    assert (tmp_path / "x.gguf").read_text() == "precious"
    assert convert(lit, tmp_path / "x.gguf", "--overwrite", "true") == 0


def test_models_that_llama_cpp_does_not_have(tokenizer, tmp_path):
    for config, message in (
        (reduced("pythia-160m"), "is a gptneox; only Llama models"),
        (Config(name="x", **TINY).stretched("dynamic", 2), "dynamic rope scaling"),
    ):
        with pytest.raises(ValueError, match=message):
            written(config, tokenizer, tmp_path / "x.gguf")
    assert os.listdir(tmp_path) == []


def test_tokenizers_that_llama_cpp_does_not_have(tmp_path):
    config = Config(name="x", **TINY)
    with pytest.raises(ValueError, match="has no byte tokens"):
        source = train_sentencepiece(tmp_path / "a" / "tokenizer.model", byte_fallback=False, character_coverage=1.0)
        written(config, source, tmp_path / "x.gguf")
    source = llama3_ranks(tmp_path / "a" / "tokenizer.model")
    (tmp_path / "b").mkdir()
    export_tokenizer(source, tmp_path / "b", add_bos=True, max_length=64)
    content = json.loads((tmp_path / "b" / "tokenizer.json").read_text())
    content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\w+|\W+"
    (tmp_path / "b" / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="cuts text in a way that llama.cpp has no name for"):
        config = Config(name="x", **{**TINY, "vocab_size": 1756})
        written(config, tmp_path / "b" / "tokenizer.json", tmp_path / "x.gguf")
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_a_checkpoint_without_tokenizer(lit, tmp_path):
    (lit / "tokenizer.model").unlink()
    assert "a GGUF file needs one: give --tokenizer_path" in convert(lit, tmp_path / "x.gguf")


def test_another_file_is_not_read_as_gguf(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"hello" * 100)
    with pytest.raises(ValueError, match="x.gguf is damaged, or not a GGUF file"):
        read_gguf(tmp_path / "x.gguf", Config(**TINY))


def test_without_the_package(lit, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "the gguf package is missing: pip install gguf" in convert(lit, tmp_path / "x.gguf")


def test_k_quants_without_the_tool(lit, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert "--dtype q4_k_m needs llama.cpp's llama-quantize" in convert(lit, tmp_path / "x.gguf", "--dtype", "q4_k_m")


def test_a_tool_that_fails_leaves_nothing(lit, tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    tool = tmp_path / "bin" / "llama-quantize"
    tool.write_text("#!/bin/sh\necho started\necho no such type $3 >&2\nexit 3\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    line = convert(lit, tmp_path / "x.gguf", "--dtype", "q4_k_m")
    assert "failed with exit code 3: no such type Q4_K_M" in line
    assert sorted(os.listdir(tmp_path)) == ["bin", "lit"]


# --- llama.cpp itself ------------------------------------------------------------------------------------------------


def test_k_quants(tmp_path, tokenizer, capsys):
    if shutil.which("llama-quantize") is None:
        pytest.skip("needs llama.cpp's llama-quantize on the PATH")
    write_lit_folder(tmp_path / "lit", tokenizer=False, n_embd=256, intermediate_size=512)
    shutil.copy(tokenizer, tmp_path / "lit")
    assert convert(tmp_path / "lit", tmp_path / "x.gguf", "--dtype", "q4_k_m") == 0
    kinds = {t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "x.gguf").tensors}
    assert kinds == {"F32", "Q4_K", "Q6_K"}
    assert "as q4_k_m (" in capsys.readouterr().out


@pytest.mark.parametrize("scaling", ["none", "linear", "yarn", "llama3"])
@torch.inference_mode()
def test_llama_cpp_computes_what_we_do(scaling, llama_cpp, tokenizer, tmp_path):
    config = Config(name="x", **TINY, rope_base=100.0)
    if scaling != "none":
        config = config.stretched(scaling, 4)
    weights = written(config, tokenizer, tmp_path / "x.gguf")
    ids = torch.randint(512, (1, config.block_size), generator=torch.Generator().manual_seed(0))
    ours = load_model(Pretrained(tmp_path, config, weights))(ids)[0]
    fp32_cache = dict(type_k=0, type_v=0)
    theirs = llama_cpp.Llama(
        str(tmp_path / "x.gguf"), n_ctx=0, verbose=False, logits_all=True, n_threads=1, **fp32_cache
    )
    theirs.eval(ids[0].tolist())
    difference = (torch.from_numpy(theirs.scores[: config.block_size]) - ours).abs().max() / ours.abs().max()
    assert difference < 1e-4


@pytest.mark.parametrize(
    "kind",
    ["sentencepiece", "llama 3", "trained", "digits apart", pytest.param("llama3", marks=pytest.mark.long)],
)
def test_llama_cpp_gives_our_ids(kind, llama_cpp, tokenizer, tmp_path, request):
    source = tokenizer
    if kind == "llama3":  # the real one
        source = request.getfixturevalue("llama3")
    elif kind != "sentencepiece":
        source = llama3_ranks(tmp_path / "ranks" / "tokenizer.model")
    if kind in ("trained", "digits apart"):  # a tokenizer.json of scripts/train_tokenizer.py, and one like SmolLM's
        export_tokenizer(source, tmp_path, add_bos=True, max_length=64)
        content = json.loads((tmp_path / "tokenizer.json").read_text())
        content["model"]["ignore_merges"] = False
        if kind == "digits apart":
            as_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
            content["pre_tokenizer"]["pretokenizers"] = [{"type": "Digits", "individual_digits": True}, as_bytes]
        source = tmp_path / "tokenizer.json"
        source.write_text(json.dumps(content))
    reference = Tokenizer(source)
    config = Config(name="x", **{**TINY, "vocab_size": reference.vocab_size})
    written(config, source, tmp_path / "x.gguf")
    theirs = llama_cpp.Llama(str(tmp_path / "x.gguf"), vocab_only=True, verbose=False)
    # llama.cpp takes "▁" for a space, knows no NUL and cuts words by Unicode tables of its own.
    texts = [t for t in TORTURE if t and not set(t) & set("▁\x00ſ\u200d\ufeff\u0301\u0323") and len(t) < 9000]
    texts += [path.read_text(encoding="utf-8") for path in sorted((ROOT / "lit_gpt").glob("*.py"))]
    differ = [
        text
        for text in texts
        if theirs.tokenize(text.encode(), add_bos=True, special=False) != reference.encode(text, bos=True, eos=False)
    ]
    assert differ == []


@pytest.mark.shared
@pytest.mark.slow
def test_a_real_model_writes_the_same_in_llama_cpp(llama_cpp, shared_data, tmp_path):
    """200 tokens in f16, one by one."""
    found = open_pretrained(shared_data / "models" / "stories260k")
    write_gguf(found.config, found.weights, tmp_path / "x.gguf", "f16", found.tokenizer, add_bos=True)
    rounded = Pretrained(tmp_path, found.config, read_gguf(tmp_path / "x.gguf", found.config))
    prompt = Tokenizer(found.tokenizer).encode("Once upon a time", bos=True, eos=False)
    assert greedy(llama_cpp, tmp_path / "x.gguf", prompt, 200) == list(stream(load_model(rounded), prompt, 200))


@pytest.mark.long
@pytest.mark.shared
def test_a_larger_real_model_writes_the_same_in_llama_cpp(llama_cpp, smollm2, tmp_path):
    found = open_pretrained(smollm2)
    write_gguf(found.config, found.weights, tmp_path / "x.gguf", "f16", found.tokenizer, add_bos=False)
    rounded = Pretrained(tmp_path, found.config, read_gguf(tmp_path / "x.gguf", found.config))
    prompt = Tokenizer(found.tokenizer).encode("Once upon a time", bos=False, eos=False)
    assert greedy(llama_cpp, tmp_path / "x.gguf", prompt, 200) == list(stream(load_model(rounded), prompt, 200))


GO = """package main

import ("encoding/json"; "os"; "text/template")

func main() {
	var data map[string]any
	if err := json.Unmarshal([]byte(os.Args[2]), &data); err != nil { panic(err) }
	if err := template.Must(template.New("").Parse(os.Args[1])).Execute(os.Stdout, data); err != nil { panic(err) }
}
"""


@pytest.mark.long
@pytest.mark.skipif(shutil.which("go") is None, reason="needs go")
def test_the_template_for_ollama_says_what_ours_says(tmp_path):
    modelfile = (ROOT / "PRETRAIN.md").read_text(encoding="utf-8").split("FROM ./tinyllama-q4_0.gguf\n")[1]
    template = modelfile.split('TEMPLATE """')[1].split('"""')[0]
    (tmp_path / "main.go").write_text(GO)
    said = [("system", "Be brief."), ("user", "Who?"), ("assistant", "A llama."), ("user", "Why <b>&</b>?")]
    for messages in (said, said[1:], said[1:2]):
        data = json.dumps({"Messages": [{"Role": role, "Content": content} for role, content in messages]})
        command = ["go", "run", str(tmp_path / "main.go"), template, data]
        rendered = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        messages = [{"role": role, "content": content} for role, content in messages]
        ours = jinja2.Template(TEMPLATES["zephyr"])
        assert rendered == ours.render(messages=messages, eos_token="</s>", add_generation_prompt=True)


def greedy(llama_cpp, path, prompt: list[int], n: int) -> list[int]:
    model = llama_cpp.Llama(str(path), n_ctx=512, verbose=False, n_threads=1)
    return [token for token, _ in zip(model.generate(prompt, top_k=1, repeat_penalty=1.0), range(n))]  # noqa: B905
