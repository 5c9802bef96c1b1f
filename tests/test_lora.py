"""Adapters: beside the weights, in the weights, and in peft."""

import json

import pytest
import torch
from tiny import TINY, random_weights, train_sentencepiece

from lit_gpt import Config
from lit_gpt.hf import export
from lit_gpt.lora import add_lora, merge, write_adapters
from lit_gpt.pretrained import load_model, open_pretrained

IDX = torch.arange(24).view(2, 12) * 7


@pytest.fixture(params=["llama", "gptneox"])
def base(request, tmp_path):
    """A Hugging Face folder."""
    neox = dict(family="gptneox", n_query_groups=4, rotary_percentage=0.25)
    config = Config(name="tiny", **{**TINY, **(neox if request.param == "gptneox" else {})})
    folder = tmp_path / "base"
    folder.mkdir()
    export(config, random_weights(config), folder)
    return folder


def with_random_adapters(base):
    """The model with adapters that do something."""
    model = load_model(open_pretrained(base))
    adapters = add_lora(model, rank=4, alpha=6)
    generator = torch.Generator().manual_seed(1)
    for lora in adapters.values():
        lora.B.data.normal_(std=0.1, generator=generator)
    return model, adapters


def written(adapters, base):
    folder = base.with_name("adapters")
    folder.mkdir()
    write_adapters(adapters, open_pretrained(base).config, folder, str(base))
    return folder


def test_new_adapters_change_nothing_and_alone_are_trained(base):
    model = load_model(open_pretrained(base))
    before = model(IDX)
    adapters = add_lora(model, rank=4, alpha=8)
    torch.testing.assert_close(model(IDX), before)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        f"{name.replace('-', '.')}.lora.{part}" for name in adapters for part in "AB"
    }
    assert len(adapters) == (5 if open_pretrained(base).config.family == "llama" else 4) * TINY["n_layer"]
    model(IDX, IDX).backward()
    assert all(lora.B.grad.abs().sum() > 0 for lora in adapters.values())


def test_merged_weights_give_the_adapters_logits(base):
    _, adapters = with_random_adapters(base)
    found = open_pretrained(written(adapters, base))
    # These weights amplify the rounding of sums in another order; in double there is none worth the name.
    model = load_model(open_pretrained(base), dtype=torch.float64)
    without = model(IDX)
    add_lora(model, rank=4, alpha=6).load_state_dict(adapters.state_dict())
    with_adapters, merged = model(IDX), load_model(found, dtype=torch.float64)(IDX)
    assert (with_adapters - without).abs().max() > 0.1
    torch.testing.assert_close(merged, with_adapters, rtol=1e-5, atol=1e-5)


def test_adapters_bring_their_tokenizer_and_name_a_model_that_is_gone(base):
    folder = written(with_random_adapters(base)[1], base)
    for path in (base, folder):
        assert open_pretrained(folder).tokenizer is None
        train_sentencepiece(path / "tokenizer.model")
        assert open_pretrained(folder).tokenizer == path
        (path / "tokenizer.model").unlink()
    base.rename(base.with_name("elsewhere"))
    with pytest.raises(FileNotFoundError, match="adapters holds adapters, .* is not there: .*base does not exist"):
        open_pretrained(folder)


@pytest.mark.slow
def test_peft_loads_them(base):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    model, adapters = with_random_adapters(base)
    folder = written(adapters, base)
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    torch.testing.assert_close(theirs(IDX).logits, model(IDX), rtol=1e-4, atol=1e-4)


def test_adapters_of_peft_with_other_layers_and_ranks_are_read(base):
    """Peft's may have an A of its own for query, key and value, and leave layers out."""
    _, adapters = with_random_adapters(base)
    folder = written(adapters, base)
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "adapter_model.safetensors")
    kept = {name: t for name, t in tensors.items() if "layers.0." in name and "k_proj" not in name}
    for name in [name for name in kept if "q_proj.lora_A" in name]:
        kept[name] = kept[name] * 2
    save_file(kept, folder / "adapter_model.safetensors")
    found = open_pretrained(base)
    merged = merge(found.config, found.weights, folder)
    assert torch.equal(merged["transformer.h.1.attn.attn.weight"], found.weights["transformer.h.1.attn.attn.weight"])
    assert not torch.equal(
        merged["transformer.h.0.attn.proj.weight"], found.weights["transformer.h.0.attn.proj.weight"]
    )


@pytest.mark.parametrize(
    "change, message",
    [
        ({"use_dora": True}, "only plain LoRA is read, and this has use_dora True"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"peft_type": "IA3"}, "peft_type 'IA3'"),
    ],
)
def test_other_adapters_are_refused(base, change, message):
    folder = written(with_random_adapters(base)[1], base)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=message):
        open_pretrained(folder)


def test_adapters_of_another_model_are_refused(base):
    folder = written(with_random_adapters(base)[1], base)
    found = open_pretrained(base)
    for change, message in ((dict(n_layer=1), "do not belong to"), (dict(n_embd=128, head_size=16), "is for")):
        config = Config(**{**found.config.to_dict(), **change})
        with pytest.raises(ValueError, match=message):
            merge(config, found.weights, folder)
    with pytest.raises(FileNotFoundError, match="no adapter_config.json"):
        merge(found.config, found.weights, base)


def test_4_bit_weights(base):
    pytest.importorskip("bitsandbytes")
    model = load_model(open_pretrained(base))
    layer, x = model.transformer.h[1].attn.proj, torch.randn(3, TINY["n_embd"])
    want = layer(x)
    adapters = add_lora(model, rank=4, alpha=8, quantize_on=torch.device("cpu"))
    got = model.transformer.h[1].attn.proj(x)
    assert 0 < ((got - want).norm() / want.norm()).item() < 0.15
    assert not any(p.dim() == 2 and "lora" not in n for n, p in model.transformer.h.named_parameters())
    model(IDX, IDX).backward()
    assert all(lora.B.grad.abs().sum() > 0 for lora in adapters.values())


def test_4_bit_weights_say_what_they_need(base, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match="pip install bitsandbytes"):
        add_lora(load_model(open_pretrained(base)), 4, 8, quantize_on=torch.device("cpu"))
