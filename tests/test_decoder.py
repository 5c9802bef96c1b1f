"""A cache equals no cache, whatever the cut into prompt, chunks and steps; on a GPU graphs and fused kernels, too."""

import copy

import pytest
import torch

from lit_gpt import Config, decoder
from lit_gpt.decoder import Decoder, borrow
from lit_gpt.generate import generate
from lit_gpt.int8 import Int8Linear, quantize_int8
from lit_gpt.kernels import select_kernels
from lit_gpt.model import GPT
from lit_gpt.pretrained import Pretrained, load_model
from tests.tiny import TINY, random_weights

LENGTHS = (1, 17, 6)


def tiny(device: str = "cpu", dtype: torch.dtype = torch.float32, **overrides) -> GPT:
    config = Config(**{**TINY, **overrides})
    kernels = select_kernels("auto", device=torch.device(device), dtype=dtype, heads=(4, 2, 16))
    return load_model(Pretrained(None, config, random_weights(config)), kernels, device, dtype)


def tokens(model: GPT) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(512, (3, 40), generator=generator).to(model.lm_head.weight.device)


def through_cache(decoder: Decoder, idx: torch.Tensor, cuts: list[int]) -> list[torch.Tensor]:
    """Logits of each row from its prompt's last token on, after as many steps as cuts, of cuts tokens each."""
    parts = [decoder.prefill([row[:n].tolist() for row, n in zip(idx, LENGTHS, strict=True)])[:, None].clone()]
    position = torch.tensor(LENGTHS, device=idx.device)
    for T in cuts:
        where = position[:, None] + torch.arange(T, device=idx.device)
        parts.append(decoder.step(idx.gather(1, where), position).clone())
        position = position + T
    return list(torch.cat(parts, 1))


def without_cache(model: GPT, idx: torch.Tensor, n: int) -> list[torch.Tensor]:
    with torch.inference_mode():
        logits = model(idx)
    return [
        row[length - 1 : length + n, : model.config.vocab_size] for row, length in zip(logits, LENGTHS, strict=True)
    ]


@pytest.mark.parametrize("cuts", [[1] * 8, [8], [3, 1, 4]], ids=str)
@pytest.mark.parametrize("chunk", [None, 4], ids=["whole prompts", "prompts in chunks"])
@pytest.mark.parametrize(
    "overrides", [{}, dict(family="gptneox", rotary_percentage=0.25), dict(vocab_size=500)], ids=str
)
def test_cache_equals_no_cache(monkeypatch, overrides, chunk, cuts):
    if chunk:
        monkeypatch.setattr(decoder, "PREFILL_TOKENS", 3 * chunk)
    model = tiny(**overrides)
    idx = tokens(model) % model.config.vocab_size
    for got, want in zip(through_cache(Decoder(model, 3, 30), idx, cuts), without_cache(model, idx, 8), strict=True):
        assert (got - want).abs().max() <= 1e-5 * want.abs().max()


def test_fused_kernels_and_int8_equal_the_forward(decode_kernels):
    device = "cuda" if torch.cuda.is_available() else "cpu"  # there the interpreter
    for model in (tiny(device, vocab_size=64), quantize_int8(tiny(device, vocab_size=64))):
        plain, fused = Decoder(model, 3, 30), Decoder(model, 3, 30)
        plain._fused, fused._fused = None, decode_kernels
        idx = tokens(model) % 64
        for cuts in ([1], [3]):
            both = zip(through_cache(fused, idx, cuts), through_cache(plain, idx, cuts), strict=True)
            for got, want in both:
                assert (got - want).abs().max() <= 1e-5 * want.abs().max()
        two, position = idx[:, :2].contiguous(), torch.tensor(LENGTHS, device=device)
        with torch.inference_mode():
            want = plain.forward(two, position)[:, 1:]
            for each in (plain, fused):
                got = each.forward(two, position, only_last=True)
                assert got.shape == want.shape and (got - want).abs().max() <= 1e-5 * want.abs().max()


@pytest.fixture
def decode_kernels(interpreted):
    from lit_gpt.kernels import decode

    return decode


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_graphs_equal_no_cache(dtype):
    model = tiny("cuda", dtype)
    exact = tiny("cuda")
    for p in exact.parameters():
        p.copy_(p.to(dtype))
    idx = tokens(model)
    d = Decoder(model, 3, 30)
    for cuts in ([1] * 8, [8], [3, 1, 4], [1] * 8):  # the last with graphs that are there
        every = zip(
            through_cache(d, idx, cuts), without_cache(model, idx, 8), without_cache(exact, idx, 8), strict=True
        )
        for got, plain, want in every:
            # In bf16 both round, each in its own way.
            allowed = 1e-5 * want.norm() if dtype == torch.float32 else 2 * (plain - want).norm()
            assert (got - want).norm() <= allowed


def test_int8_rounds_each_row_to_its_own_scale():
    model = tiny()
    quantized = quantize_int8(copy.deepcopy(model))
    layer, was = quantized.transformer.h[0].mlp.proj, model.transformer.h[0].mlp.proj.weight
    assert type(layer) is Int8Linear and layer.weight.dtype == torch.int8
    error = (layer.weight * layer.scale[:, None] - was).abs()
    assert (error <= 0.5001 * was.abs().amax(1, keepdim=True) / 127).all()  # half a step of each row
    with torch.inference_mode():
        a, b = model(tokens(model)), quantized(tokens(model))
    assert 0 < (a - b).norm() / a.norm() < 0.08


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_int8_of_large_activations_stays_finite(dtype):
    """As some channels of trained models have them: 127 times so much is more than fp16 can hold."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 8).requires_grad_(False).to(dtype)
    x = 2000 * torch.randn(5, 64).to(dtype)
    layer = Int8Linear(linear)
    assert (x.float() @ layer.weight.T.float()).abs().max() > 65504  # what fp16 ends at
    got, want = layer(x), linear.float()(x.float())
    assert got.dtype == dtype and (got - want).norm() < 0.01 * want.norm()


def test_int8_in_fp16_keeps_small_rows():
    """Whose scale alone fp16 could hardly hold."""
    torch.manual_seed(0)
    x, linear = torch.randn(5, 64).half(), torch.nn.Linear(64, 8, bias=False).requires_grad_(False)
    linear.weight *= 1e-3
    layer = Int8Linear(linear)
    want = x.float() @ (layer.weight * layer.scale[:, None]).T
    assert (layer(x) - want).norm() < 1e-3 * want.norm()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_int8_in_fp16_decodes_large_activations(device):
    """The forward of prompts, and on a GPU the fused kernels in graphs of one token and of several."""
    model, exact = tiny(device, torch.float16), tiny(device)
    for m in (model, exact):
        m.transformer.ln_f.weight.mul_(1000)
    quantize_int8(model)
    for name, layer in model.named_modules():
        if isinstance(layer, Int8Linear):  # the exact model is of the rounded weights
            exact.get_submodule(name).weight.copy_(layer.weight * layer.scale[:, None])
    idx = tokens(model)
    d = Decoder(model, 3, 30)
    for cuts in ([1] * 8, [3, 1, 4]):
        for got, want in zip(through_cache(d, idx, cuts), without_cache(exact, idx, 8), strict=True):
            assert got.isfinite().all() and (got - want).norm() < 0.01 * want.norm()


def test_int8_of_tied_weights_leaves_the_embedding():
    model = quantize_int8(tiny(tie_embeddings=True))
    assert model.transformer.wte.weight.dtype == torch.float32 and type(model.lm_head) is Int8Linear


def test_borrowed_decoders_are_not_shared():
    model = tiny()
    with borrow(model, 1, 10) as a, borrow(model, 1, 10) as b:
        assert a is not b


class Eager:
    """What decoder.Graph does to the state: the function runs once to warm up, and at every call."""

    def __init__(self, function) -> None:
        self.function = function
        function()

    def __call__(self) -> None:
        self.function()


def test_walking_goes_on_from_where_it_was(monkeypatch):
    """A graph that is captured on the way leaves the state alone; all temperatures but 0 share one."""
    monkeypatch.setattr(decoder, "Graph", Eager)
    model = tiny()
    prompt, got = [5, 7, 9], {}

    def move(logits, noise, inverse_temperature, token, position) -> None:
        p = (logits * inverse_temperature).softmax(1)
        token.copy_((p if noise is None else p / noise).argmax(1))
        position.add_(1)

    for walked in (True, False):
        d, generator = Decoder(model, 1, 30), torch.Generator().manual_seed(3)
        got[walked] = []
        d.token.copy_(d.prefill([prompt]).argmax(1))
        d.position.fill_(len(prompt))
        for temperature in (0.0, 0.0, 0.7, 1.3, 2.0, 0.0):
            got[walked].append(d.token.item())
            d.inverse_temperature.fill_(1 / (temperature or 1))
            if walked:
                d.walk(move, temperature > 0, generator)
            else:
                logits = d.step(d.token[:, None], d.position)[:, 0]
                noise = torch.empty_like(logits).exponential_(generator=generator) if temperature else None
                move(logits, noise, d.inverse_temperature, d.token, d.position)
        assert len(d._walks) == 2 * walked
    assert got[True] == got[False] and len(set(got[True])) > 2


@pytest.mark.gpu
def test_walking_equals_steps_and_seeds_are_kept():
    model = tiny("cuda")
    prompts = [row.tolist() for row in tokens(model)[:2, :7]]

    def sample(seed: int, temperature: float, **settings) -> list[list[int]]:
        generator = torch.Generator("cuda").manual_seed(seed)
        return generate(model, prompts, 20, temperature=temperature, generator=generator, **settings)

    for temperature in (0.0, 1.0, 0.5, 0.0):
        assert sample(1, temperature) == sample(1, temperature)
        assert (sample(1, temperature) == sample(2, temperature)) == (temperature == 0)
    assert sample(1, 1.0) != sample(1, 0.5)
    # min_p is not in the kernel, and changes nothing here.
    assert sample(1, 0.0) == sample(1, 0.0, min_p=0.5)
    # Nearly greedy: the temperature is that of the call, not of the capture.
    assert sample(1, 1e-4) == sample(1, 0.0)
