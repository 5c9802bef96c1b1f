"""The model against transformers, in fp32 on the CPU, and what else its docstrings promise."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

from lit_gpt import MODELS, Config
from lit_gpt.hf import from_hf
from lit_gpt.kernels import IGNORE_INDEX
from lit_gpt.model import GPT, KVCache
from lit_gpt.pretrained import Pretrained, load_model, open_pretrained

SMALL = dict(n_layer=3, n_embd=64, n_head=4, intermediate_size=112, vocab_size=192, block_size=48)
LLAMA_HF = dict(
    num_hidden_layers=3,
    hidden_size=64,
    num_attention_heads=4,
    intermediate_size=112,
    vocab_size=192,
    max_position_embeddings=48,
    rms_norm_eps=1e-5,
    # transformers' default of 0.02 makes logits so small that a missing layer would pass
    initializer_range=0.2,
)

# (ours, transformers'), written down independently of each other and of hf.config_to_hf
LLAMAS = {
    "mha": (dict(), dict(num_key_value_heads=4)),
    "mqa": (dict(n_query_groups=1), dict(num_key_value_heads=1)),
    "gqa": (dict(n_query_groups=2), dict(num_key_value_heads=2)),
    "padded vocabulary": (dict(vocab_size=150, n_query_groups=2), dict(num_key_value_heads=2)),
    "tied": (dict(n_query_groups=2, tie_embeddings=True), dict(num_key_value_heads=2, tie_word_embeddings=True)),
    "condensed positions": (
        dict(rope_scaling="linear", rope_factor=4),
        dict(rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}),
    ),
    "rope base": (
        dict(rope_base=500000.0),
        dict(rope_parameters={"rope_type": "default", "rope_theta": 500000.0}),
    ),
    "head size": (dict(head_size=32, n_query_groups=2), dict(head_dim=32, num_key_value_heads=2)),
    "norm eps": (dict(norm_eps=0.1), dict(rms_norm_eps=0.1)),
}
NEOXES = {
    "a quarter rotates": (dict(rotary_percentage=0.25), dict(rope_parameters=dict(partial_rotary_factor=0.25))),
    "all rotates": (dict(rotary_percentage=1.0), dict(rope_parameters=dict(partial_rotary_factor=1.0))),
    "tied": (
        dict(rotary_percentage=0.5, tie_embeddings=True),
        dict(rope_parameters=dict(partial_rotary_factor=0.5), tie_word_embeddings=True),
    ),
}


def randomised(hf_model: torch.nn.Module) -> torch.nn.Module:
    """Norms and biases too: as they are born, 1 and 0, exchanging two of them would not show."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in hf_model.parameters():
            if p.dim() == 1:
                p.add_(torch.empty_like(p).uniform_(-0.5, 0.5, generator=generator))
    return hf_model.eval()


def ours_from(config: Config, hf_model: torch.nn.Module) -> GPT:
    weights = dict(hf_model.state_dict())
    if config.family == "gptneox":  # transformers 5 renames its head in memory, not in its files
        weights["embed_out.weight"] = weights.pop("lm_head.weight")
    return load_model(Pretrained(None, config, from_hf(config, weights)))


def assert_same_logits(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert theirs.std() > 0.1  # logits that say something
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", LLAMAS)
@torch.inference_mode()
def test_llama_logits_equal_transformers(case):
    ours, theirs = LLAMAS[case]
    torch.manual_seed(0)
    hf_model = randomised(LlamaForCausalLM(LlamaConfig(**{**LLAMA_HF, **theirs})))
    model = ours_from(Config(**{**SMALL, **ours}), hf_model)
    idx = torch.randint(model.config.vocab_size, (2, 48))
    assert_same_logits(model(idx), hf_model(idx).logits)


LONG = dict(block_size=48, rope_factor=4.0, rope_original_size=12)
SCALED = {
    "linear": dict(factor=4.0),
    "dynamic": dict(factor=4.0),
    "yarn": dict(factor=4.0, original_max_position_embeddings=12),
    "llama3": dict(factor=4.0, original_max_position_embeddings=12, low_freq_factor=1.0, high_freq_factor=4.0),
}


@pytest.mark.parametrize("length", [9, 12, 13, 48])
@pytest.mark.parametrize("scaling", SCALED)
@pytest.mark.parametrize("family", ["llama", "gptneox"])
@torch.inference_mode()
def test_longer_contexts_equal_transformers(family, scaling, length):
    torch.manual_seed(0)
    rope = {"rope_type": scaling, "rope_theta": 100.0, **SCALED[scaling]}  # a base that lets some elements turn often
    shape = {**LLAMA_HF, "max_position_embeddings": 12 if scaling == "dynamic" else 48}
    ours = {**SMALL, **LONG, "rope_base": 100.0, "rope_scaling": scaling}
    if family == "llama":
        hf_model = LlamaForCausalLM(LlamaConfig(**shape, num_key_value_heads=2, rope_parameters=rope))
        config = Config(**ours, n_query_groups=2)
    else:
        shape.pop("rms_norm_eps")
        rope["partial_rotary_factor"] = 0.5
        hf_model = GPTNeoXForCausalLM(GPTNeoXConfig(**shape, rope_parameters=rope))
        config = Config(**ours, family="gptneox", rotary_percentage=0.5)
    model = ours_from(config, randomised(hf_model))
    idx = torch.randint(model.config.vocab_size, (2, length))
    logits, want = model(idx), hf_model(idx).logits
    assert (logits - want).abs().max() <= 1e-5 * want.abs().max()
    model.config, model._rope = replace(config, rope_scaling="none", rope_factor=1, rope_original_size=0), None
    if scaling != "dynamic" or length > 12:
        assert (model(idx) - logits).abs().max() > 0.01  # the scaling says something here


@torch.inference_mode()
def test_a_dynamically_scaled_cache_equals_no_cache():
    """All its keys rotate as the length of the cache has it."""
    model = small(rope_scaling="dynamic", **LONG)
    idx = torch.randint(192, (1, 30))
    cache, rows = new_cache(model, 1, 30), []
    for positions in (torch.arange(20), *torch.arange(20, 30).split(1)):
        rows.append(model(idx[:, positions], cache=cache, positions=positions))
    torch.testing.assert_close(torch.cat(rows, 1), model(idx), rtol=0, atol=1e-4)


@pytest.mark.parametrize("scaling", ["none", *SCALED])
def test_frequencies_of_real_sizes_are_those_of_transformers(scaling):
    """To the bit but for the order of two multiplications: at position 131,072 an angle must still be exact."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    from lit_gpt.kernels.rope import frequencies

    original = 8192
    config = Config(rope_base=5e5, block_size=16 * original)
    rope = {"rope_type": "default", "rope_theta": 5e5}
    if scaling != "none":
        config = replace(config, rope_scaling=scaling, rope_factor=16.0, rope_original_size=original)
        rope |= {**SCALED[scaling], "rope_type": scaling, "factor": 16.0}
        if "original_max_position_embeddings" in rope:
            rope["original_max_position_embeddings"] = original
    max_positions = original if scaling == "dynamic" else 16 * original
    hf = LlamaConfig(
        hidden_size=2048, num_attention_heads=32, max_position_embeddings=max_positions, rope_parameters=rope
    )
    ours, amplitude = frequencies(config, 50_000, torch.device("cpu"))
    if scaling == "none":
        want, their_amplitude = 1.0 / (5e5 ** (torch.arange(0, 64, 2).float() / 64)), 1.0
    else:
        want, their_amplitude = ROPE_INIT_FUNCTIONS[scaling](hf, torch.device("cpu"), seq_len=50_000)
    torch.testing.assert_close(ours, want, rtol=3e-7, atol=0)
    assert amplitude == their_amplitude


@pytest.mark.parametrize("case", NEOXES)
@torch.inference_mode()
def test_gpt_neox_logits_equal_transformers(case):
    ours, theirs = NEOXES[case]
    torch.manual_seed(0)
    shape = {k: v for k, v in LLAMA_HF.items() if k != "rms_norm_eps"}
    rope = {"rope_type": "default", "rope_theta": 10000.0, **theirs["rope_parameters"]}
    hf_model = randomised(GPTNeoXForCausalLM(GPTNeoXConfig(**{**shape, **theirs, "rope_parameters": rope})))
    model = ours_from(Config(family="gptneox", **{**SMALL, **ours}), hf_model)
    idx = torch.randint(192, (2, 48))
    assert_same_logits(model(idx), hf_model(idx).logits)


@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_presets_at_reduced_depth_equal_transformers(name):
    """Every preset's own shapes of heads, groups and rope, with few layers, thin MLPs and a small vocabulary."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    from lit_gpt.hf import config_to_hf

    config = Config.from_name(name, n_layer=2, intermediate_size=96, vocab_size=64, padded_vocab_size=64)
    hf = config_to_hf(config)
    hf_config = {"llama": LlamaConfig, "gpt_neox": GPTNeoXConfig}[hf["model_type"]](**hf, dtype="float32")
    torch.manual_seed(0)
    hf_model = randomised(AutoModelForCausalLM.from_config(hf_config))
    idx = torch.randint(64, (1, 40))
    torch.testing.assert_close(ours_from(config, hf_model)(idx), hf_model(idx).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.shared
@torch.inference_mode()
def test_stories260k_matches_its_reference(shared_data):
    folder = shared_data / "models" / "stories260k"
    reference = json.loads((folder / "REFERENCE.json").read_text())
    model = load_model(open_pretrained(folder))
    ids = torch.tensor([reference["logits"]["ids"]])
    logits = model(ids)[0]
    torch.testing.assert_close(logits[-1], torch.tensor(reference["logits"]["last_position_logits"]), rtol=0, atol=1e-4)
    logprobs = logits.log_softmax(-1)[:-1].gather(1, ids[0, 1:, None])[:, 0]
    torch.testing.assert_close(logprobs, torch.tensor(reference["logits"]["token_logprobs"]), rtol=0, atol=1e-4)
    for text in reference["perplexity"].values():
        ids = torch.tensor([text["ids"]])
        loss = model(ids[:, :-1], ids[:, 1:]) / (ids.numel() - 1)
        assert loss.item() == pytest.approx(text["mean_nll"], abs=2e-6)


# --- the cache -------------------------------------------------------------------------------------------------------


def small(seed: int = 0, **overrides) -> GPT:
    model = GPT(Config(**{**SMALL, "n_query_groups": 2, **overrides}))
    model.init_weights(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.0 if p.dim() == 1 else 3.0)  # at birth a model hardly attends
    return model.eval()


def new_cache(model: GPT, batch_size: int, length: int) -> KVCache:
    return KVCache(model.config, batch_size, length, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("family", ["llama", "gptneox"])
@pytest.mark.parametrize("chunks", [[40], [1] * 40, [7, 1, 1, 5, 16, 10], [1, 39]])
@torch.inference_mode()
def test_cache_equals_no_cache(chunks, family):
    """Prefill, one token, k tokens: a mask that is aligned at the wrong corner shows in k."""
    model = small(family=family, n_query_groups=4 if family == "gptneox" else 2)
    idx = torch.randint(150, (2, 40), generator=torch.Generator().manual_seed(0))
    cache = new_cache(model, 2, 48)
    got, at = [], 0
    for n in chunks:
        got.append(model(idx[:, at : at + n], cache=cache, positions=torch.arange(at, at + n)))
        at += n
    torch.testing.assert_close(torch.cat(got, 1), model(idx), rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_rows_at_different_positions():
    """(B, T) positions: each row continues where it is, over what padding left in the cache."""
    model = small()
    idx = torch.randint(150, (3, 30), generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([4, 11, 19])
    cache = new_cache(model, 3, 32)
    model(idx[:, :19], cache=cache, positions=torch.arange(19))  # rows 0 and 1 are prefilled too far
    where = lengths[:, None] + torch.arange(5)
    steps = idx.gather(1, where)
    got = model(steps, cache=cache, positions=where)
    for row, n in enumerate(lengths.tolist()):
        want = model(idx[row : row + 1, : n + 5])[0, n:]
        torch.testing.assert_close(got[row], want, rtol=1e-4, atol=1e-4)


def test_more_tokens_than_the_block():
    model = small()
    with pytest.raises(ValueError, match="49 tokens do not fit the model's block_size of 48"):
        model(torch.zeros(1, 49, dtype=torch.long))
    with pytest.raises(ValueError, match="49 tokens exceeds the model's block_size of 48"):
        new_cache(model, 1, 49)


# --- initialisation, names, precision --------------------------------------------------------------------------------


def test_init_is_a_function_of_the_seed():
    a, b, other = small(seed=1).state_dict(), small(seed=1).state_dict(), small(seed=2).state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(a["lm_head.weight"], other["lm_head.weight"])


def test_init_has_the_documented_spread():
    model = GPT(Config(**{**SMALL, "n_embd": 256, "head_size": 64}))
    model.init_weights(0)
    assert model.lm_head.weight.std().item() == pytest.approx((2 / 5 / 256) ** 0.5, rel=0.02)
    for h in model.transformer.h:
        assert h.mlp.proj.weight.std().item() == pytest.approx(1 / 16 / 3, rel=0.03)
        assert h.attn.proj.weight.std().item() == pytest.approx(1 / 16 / 3, rel=0.03)
        assert h.norm_1.weight.eq(1).all()


def test_published_names_load():
    model, other = small(seed=1), small(seed=2)
    published = {
        k.replace(".mlp.fc_1.", ".mlp.swiglu.w1.").replace(".mlp.fc_2.", ".mlp.swiglu.w2.")
        if "fc_" in k
        else k.replace(".mlp.proj.", ".mlp.swiglu.w3."): v
        for k, v in model.state_dict().items()
    }
    assert sum("swiglu" in k for k in published) == 9
    other.load_state_dict(published)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_rope_tables_stay_fp32():
    model = small().to(torch.bfloat16)
    model(torch.zeros(1, 4, dtype=torch.long))
    assert all(t.dtype == torch.float32 for t in model.rope(torch.device("cpu"), 4))
    model.to(torch.float32)
    want = small().rope(torch.device("cpu"), 4)
    assert all(torch.equal(a, b) for a, b in zip(model.rope(torch.device("cpu"), 4), want, strict=True))


# --- the loss --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("tie", [False, True])
def test_loss_equals_cross_entropy_in_value_and_gradient(reduction, tie):
    model, reference = small(tie_embeddings=tie).train(), small(tie_embeddings=tie).train()
    generator = torch.Generator().manual_seed(0)
    idx, targets = torch.randint(150, (2, 4, 48), generator=generator)
    targets = targets.masked_fill(torch.rand(4, 48, generator=generator) < 0.3, IGNORE_INDEX)

    loss = model(idx, targets, reduction=reduction)
    want = F.cross_entropy(reference(idx).flatten(0, 1), targets.flatten(), reduction=reduction, ignore_index=-100)
    assert loss.dtype == torch.float32 and loss.shape == (() if reduction == "sum" else (4, 48))
    torch.testing.assert_close(loss.flatten(), want.flatten(), rtol=1e-5, atol=1e-5)
    # not uniform weights: a "none" that sums its gradient would pass with ones
    upstream = torch.rand(loss.shape, generator=generator)
    (loss * upstream).sum().backward()
    (want.view_as(loss) * upstream).sum().backward()
    for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_nothing_to_predict_is_zero_not_nan():
    model = small().train()
    loss = model(torch.zeros(2, 8, dtype=torch.long), torch.full((2, 8), IGNORE_INDEX))
    loss.backward()
    assert loss.item() == 0.0
    assert all(p.grad is not None and (p.grad == 0).all() for p in model.parameters())
