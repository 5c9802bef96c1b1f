import math

import pytest
import torch

from lit_gpt import Config
from lit_gpt.model import GPT
from lit_gpt.optim import SpikeGuard, clip_and_step, init_adam, lr_at, param_groups

RECIPE = dict(max_steps=1000, warmup_steps=100, learning_rate=4e-4, min_lr=4e-5)


@pytest.mark.parametrize("schedule", [dict(), dict(schedule="wsd", decay_steps=200)])
def test_learning_rate_starts_above_zero_peaks_after_warmup_and_ends_at_min_lr(schedule):
    lr = [lr_at(step, **RECIPE, **schedule) for step in range(1001)]
    assert lr[0] == pytest.approx(4e-6)
    assert lr[99] == max(lr) == pytest.approx(4e-4)
    assert lr[999] == lr[1000] == 4e-5
    steps = [abs(b - a) for a, b in zip(lr, lr[1:], strict=False)]
    assert max(steps) <= 4e-6 + 1e-12  # nowhere steeper than the warmup: no jump


def test_cosine_is_half_way_in_the_middle():
    assert lr_at(100 + (999 - 100) // 2, **RECIPE) == pytest.approx((4e-4 + 4e-5) / 2, rel=2e-3)


def test_wsd_without_decay_is_constant_to_the_last_step():
    assert {lr_at(step, **RECIPE, schedule="wsd") for step in range(99, 999)} == {4e-4}


def test_wsd_is_constant_then_linear():
    lr = [lr_at(step, **RECIPE, schedule="wsd", decay_steps=200) for step in range(1000)]
    assert set(lr[100:800]) == {4e-4}
    assert lr[899] == pytest.approx((4e-4 + 4e-5) / 2)


@pytest.mark.parametrize("max_steps, warmup_steps", [(1, 0), (1, 1), (2, 1), (5, 5)])
def test_short_runs_have_a_learning_rate(max_steps, warmup_steps):
    for schedule in (dict(), dict(schedule="wsd", decay_steps=0)):
        for step in range(max_steps):
            lr = lr_at(step, max_steps=max_steps, warmup_steps=warmup_steps, learning_rate=1.0, min_lr=0.1, **schedule)
            assert math.isfinite(lr) and 0 < lr <= 1.0


def test_norms_and_biases_are_not_decayed():
    model = GPT(Config.from_name("pythia-160m", n_layer=1, n_embd=64, n_head=4, vocab_size=64))
    decayed, plain = param_groups(model, 0.1)
    assert decayed["weight_decay"] == 0.1 and plain["weight_decay"] == 0.0
    assert all(p.dim() == 2 for p in decayed["params"]) and all(p.dim() == 1 for p in plain["params"])
    assert len(decayed["params"]) + len(plain["params"]) == len(list(model.parameters()))
    assert isinstance(decayed["params"][0], torch.nn.Parameter)


def two_models():
    for seed in (0, 0):
        torch.manual_seed(seed)
        model = torch.nn.Linear(5, 3)
        yield model, torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)


@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_clipping_inside_the_step_equals_clipping_before_it(max_norm):
    (a, opt_a), (b, opt_b) = two_models()
    for _ in range(3):
        x = 30 * torch.randn(4, 5)
        for model, optimizer in ((a, opt_a), (b, opt_b)):
            optimizer.zero_grad()
            model(x).square().mean().backward()
        expected = torch.nn.utils.clip_grad_norm_(b.parameters(), max_norm)
        opt_b.step()
        torch.testing.assert_close(clip_and_step(opt_a, max_norm), expected)
        for p, q in zip(a.parameters(), b.parameters(), strict=True):
            torch.testing.assert_close(p, q)
            torch.testing.assert_close(opt_a.state[p], opt_b.state[q])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(bad):
    (model, optimizer), _ = two_models()
    model(torch.ones(1, 5)).sum().backward()
    clip_and_step(optimizer, 1.0)
    before = [p.clone() for p in model.parameters()] + [s.clone() for s in optimizer.state[model.weight].values()]
    model.weight.grad[0, 0] = bad
    assert not clip_and_step(optimizer, 1.0).isfinite()
    after = [*model.parameters(), *optimizer.state[model.weight].values()]
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


@pytest.mark.parametrize(
    "loss, limits, taken", [(3.0, (2.9, 1e9), False), (3.0, (3.1, 1e9), True), (3.0, (9, 1e-9), False)]
)
def test_a_spike_changes_nothing(loss, limits, taken):
    (model, optimizer), _ = two_models()
    before = model.weight.clone()
    model(torch.ones(1, 5)).sum().backward()
    clip_and_step(optimizer, 1.0, torch.tensor(loss), limits)
    assert torch.equal(model.weight, before) != taken and optimizer.found_inf.item() == (not taken)


def test_a_loss_that_is_not_finite_changes_nothing_though_its_gradient_is():
    (model, optimizer), _ = two_models()
    before = model.weight.clone()
    model(torch.ones(1, 5)).sum().backward()
    assert clip_and_step(optimizer, 1.0, torch.tensor(math.nan)).isfinite()
    assert torch.equal(model.weight, before)


def test_spikes_are_told_from_noise():
    guard = SpikeGuard()
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        loss, norm = (
            (3 + 0.1 * torch.randn((), generator=generator)).item(),
            1.0 + torch.rand((), generator=generator).item(),
        )
        max_loss, max_norm = guard.limits()
        assert loss <= max_loss and norm <= max_norm
        guard.add(loss, norm)
    assert len(guard.history) == 128
    max_loss, max_norm = guard.limits()
    assert 3.4 < max_loss < 3.8 and 2.5 < max_norm < 4
    assert SpikeGuard(list(guard.history)).limits() == guard.limits()  # as after a resume
    assert SpikeGuard([[3.0, 1.0]] * 63).limits() == (math.inf, math.inf)


def test_moments_made_beforehand_change_no_step():
    (a, opt_a), (b, opt_b) = two_models()
    init_adam(opt_a)
    for _ in range(2):
        for model, optimizer in ((a, opt_a), (b, opt_b)):
            model(torch.ones(1, 5)).sum().backward()
            optimizer.step()
    assert torch.equal(a.weight, b.weight) and torch.equal(opt_a.state[a.weight]["step"], opt_b.state[b.weight]["step"])
