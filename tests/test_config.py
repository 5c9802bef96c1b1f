import pytest
import torch

from lit_gpt import MODELS, Config
from lit_gpt.model import GPT

PARAMETERS = {
    "tiny_LLaMA_demo": 4_000_000,
    "tiny_LLaMA_120M": 121_129_728,
    "tiny_LLaMA_1b": 1_100_048_384,
    "code_tiny_LLaMA_1b": 1_100_048_384,
    "tinyllama3_2b": 2_170_667_520,
    "tinyllama3_2b_32k": 1_815_472_640,
    "pythia-1b": 1_011_781_632,
    "pythia-160m": 162_322_944,
}


@pytest.mark.parametrize("name", MODELS)
def test_parameter_counts(name):
    with torch.device("meta"):
        model = GPT(Config.from_name(name))
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


def test_unknown_names_list_the_known_ones_with_the_nearest():
    with pytest.raises(ValueError, match="Did you mean 'tiny_LLaMA_1b'.*Known: .*tinyllama3_2b"):
        Config.from_name("tiny_llama_1B")
    with pytest.raises(ValueError, match="Did you mean 'n_layer'"):
        Config.from_name("tiny_LLaMA_1b", n_layers=3)


def test_derived_fields_follow_overrides():
    config = Config.from_name("tiny_LLaMA_1b", n_embd=128, n_head=4, vocab_size=1000)
    assert (config.head_size, config.n_query_groups, config.padded_vocab_size) == (32, 4, 1024)
    assert Config(**config.to_dict()) == config


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(n_head=6, n_query_groups=4), "not a multiple"),
        (dict(vocab_size=100, padded_vocab_size=64), "padded_vocab_size 64 < vocab_size 100"),
        (dict(family="bert"), "unknown family 'bert'"),
        (dict(head_size=6, rotary_percentage=0.5), "an odd number"),
        (dict(n_layer=0), "n_layer is 0, and should be a whole number above 0"),
        (dict(n_head="32"), "n_head is '32'"),
        (dict(n_query_groups=-4), "n_query_groups is -4"),
        (dict(rope_base=float("inf")), "rope_base is inf, and should be a number above 0"),
    ],
)
def test_impossible_shapes_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Config(name="x", **wrong)


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(rope_scaling="ntk", rope_factor=2), "unknown rope_scaling 'ntk'. Known: none, linear, dynamic, yarn"),
        (dict(rope_scaling="yarn"), "rope_factor 1.0 with rope_scaling 'yarn'"),
        (dict(rope_factor=2), "rope_factor 2 with rope_scaling 'none'"),
        (dict(rope_scaling="yarn", rope_factor=0.5), "rope_factor 0.5"),
        (dict(rope_scaling="yarn", rope_factor=float("nan")), "rope_factor is nan"),
    ],
)
def test_rope_scalings_that_make_no_sense(fields, message):
    with pytest.raises(ValueError, match=message):
        Config(**fields)


def test_a_stretched_model_remembers_its_length():
    config = Config.from_name("tiny_LLaMA_1b").stretched("yarn", 4)
    assert (config.block_size, config.rope_original_size) == (8192, 2048)
    assert Config.from_name("tiny_LLaMA_1b", block_size=8192, rope_scaling="yarn", rope_factor=4) == config
    with pytest.raises(ValueError, match="is stretched already: yarn, 4 times"):
        config.stretched("linear", 2)


def test_lit_gpts_name_of_linear_scaling():
    assert Config.from_name("code_tiny_LLaMA_1b").condense_ratio == 4
    assert Config.from_name("tiny_LLaMA_1b").condense_ratio == 1
    stretched = Config.from_name("tiny_LLaMA_1b", block_size=4096, condense_ratio=2)
    assert (stretched.rope_scaling, stretched.rope_factor, stretched.rope_original_size) == ("linear", 2, 2048)
