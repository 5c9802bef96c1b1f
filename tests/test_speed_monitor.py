import pytest
import torch

from lit_gpt import MODELS, Config
from lit_gpt.model import GPT
from lit_gpt.speed_monitor import GPUS, flops_per_token, largest_micro_batch, memory_plan, peak_flops, plan_run


def test_24k_tokens_a_second_on_an_a100_are_56_percent():
    """TinyLlama's own claim pins the convention."""
    mfu = 24_000 * flops_per_token(Config.from_name("tiny_LLaMA_1b")) / 312e12
    assert mfu == pytest.approx(0.56, abs=0.005)


@pytest.mark.parametrize("name", MODELS)
def test_flops_count_every_parameter_but_the_input_embedding(name):
    config = Config.from_name(name)
    with torch.device("meta"):
        model = GPT(config)
    n = sum(p.numel() for p in model.parameters()) - model.transformer.wte.weight.numel()
    attention = 12 * config.n_layer * config.n_embd * config.block_size
    assert flops_per_token(config) == pytest.approx(6 * n + attention, rel=1e-3)  # biases of Pythia


def test_no_peak_for_a_cpu():
    assert peak_flops(torch.device("cpu"), "bf16") is None


def test_plan_counts_18_bytes_a_parameter():
    config = Config.from_name("tiny_LLaMA_1b")
    plan = memory_plan(config, n_tokens=1)
    fixed = sum(plan[k] for k in plan if k not in ("activations", "temporary"))
    assert fixed == pytest.approx(18 * 1_100_048_384, rel=1e-3)


@pytest.mark.parametrize(
    "name, sequences, recompute, peak",
    [
        ("tiny_LLaMA_1b", 16, False, 56.5e9),
        ("tiny_LLaMA_1b", 8, False, 38.8e9),
        ("tiny_LLaMA_1b", 2, True, 21.2e9),
        ("tinyllama3_2b_32k", 4, False, 58.4e9),
        ("tinyllama3_2b_32k", 6, False, 70.4e9),
        ("tinyllama3_2b", 4, False, 66.9e9),
    ],
)
def test_plan_is_within_10_percent_of_peaks_measured_on_an_h100(name, sequences, recompute, peak):
    config = Config.from_name(name)
    plan = memory_plan(config, sequences * config.block_size, recompute)
    assert sum(plan.values()) == pytest.approx(peak, rel=0.1)


@pytest.mark.gpu
@pytest.mark.parametrize("recompute", [False, True])
def test_plan_agrees_with_the_measured_peak(recompute):
    from lit_gpt.kernels import select_kernels
    from lit_gpt.optim import clip_and_step, param_groups

    config = Config.from_name("tiny_LLaMA_120M")
    device = torch.device("cuda")
    with device:
        model = GPT(config, select_kernels("auto", device=device, dtype=torch.bfloat16))
    model.init_weights(1)
    model.compute_in(torch.bfloat16)
    model.recompute = recompute
    optimizer = torch.optim.AdamW(param_groups(model, 0.1), fused=True)
    tokens = torch.randint(config.vocab_size, (8, config.block_size + 1), device=device)
    for _ in range(3):  # optimizer state from the first; gradients that are added to from the second micro-batch
        torch.cuda.reset_peak_memory_stats()
        for _ in range(2):
            model(tokens[:, :-1], tokens[:, 1:]).backward()
        clip_and_step(optimizer, 1.0)
        optimizer.zero_grad()
    planned = sum(memory_plan(config, tokens.size(0) * config.block_size, recompute).values())
    assert planned == pytest.approx(torch.cuda.max_memory_allocated(), rel=0.1)


def test_largest_micro_batch_fits_and_the_next_does_not():
    config = Config.from_name("tiny_LLaMA_1b")
    n = largest_micro_batch(config, 42e9)
    assert n >= 16384  # TinyLlama's 8 sequences on its A100-40G
    for tokens, fits in ((n, True), (n + config.block_size, False)):
        assert (sum(memory_plan(config, tokens).values()) <= 0.95 * 42e9) == fits
    assert largest_micro_batch(config, 24e9, recompute=True) >= 4096
    assert largest_micro_batch(config, 10e9) == 0


RECIPE = dict(tokens=3e12, global_batch_tokens=2_097_152)


def test_plan_reproduces_tinyllamas_90_days():
    """Its README: 3 trillion tokens in 90 days on 16 A100-40G, 24k tokens/s each, micro-batch 8."""
    plan = plan_run(Config.from_name("tiny_LLaMA_1b"), "A100-40G", 16, micro_batch_size=8, **RECIPE)
    assert plan.days == pytest.approx(90, abs=1) and plan.tokens_per_s_per_gpu == pytest.approx(24_000, rel=0.01)
    assert plan.sharding == "optimizer" and sum(plan.memory.values()) < 40e9
    assert plan.usd == pytest.approx(16 * 24 * plan.days * 2) and "90." in str(plan) and "NOT FIT" not in str(plan)


@pytest.mark.parametrize(
    "name, sequences, measured",
    [("tiny_LLaMA_1b", 16, 82_315), ("tinyllama3_2b_32k", 6, 48_365), ("tinyllama3_2b", 4, 44_958)],
)
def test_plan_is_within_10_percent_of_speeds_measured_on_an_h100(name, sequences, measured):
    plan = plan_run(Config.from_name(name), "H100", 1, micro_batch_size=sequences, **RECIPE)
    assert plan.tokens_per_s_per_gpu == pytest.approx(measured, rel=0.1)


def test_plan_agrees_with_what_was_measured_on_2_and_4_h200():
    config = Config.from_name("tiny_LLaMA_1b")
    for n, measured in ((1, 85_118), (2, 84_728), (4, 84_398)):
        plan = plan_run(config, "H200", n, tokens=3e12, global_batch_tokens=n * 262_144, micro_batch_size=16)
        assert plan.tokens_per_s_per_gpu == pytest.approx(measured, rel=0.01)


def test_plan_shards_everything_where_the_matrices_alone_do_not_fit():
    config = Config.from_name("tinyllama3_2b", n_layer=44)
    assert plan_run(config, "A100-80G", 8, micro_batch_size=2, **RECIPE).sharding == "optimizer"
    plan = plan_run(config, "RTX4090", 8, micro_batch_size=1, recompute=True, **RECIPE)
    assert plan.sharding == "fsdp" and "NOT FIT" not in str(plan)
    assert "DOES NOT FIT" in str(plan_run(config, "RTX4090", 1, micro_batch_size=1, **RECIPE))


def test_plan_names_the_gpus_that_it_knows():
    with pytest.raises(ValueError, match="no figures for the GPU 'TPU'; known: " + ", ".join(GPUS)):
        plan_run(Config.from_name("tiny_LLaMA_1b"), "TPU", 1, micro_batch_size=1, **RECIPE)


def test_more_nodes_are_faster_and_each_gpu_slower():
    plans = [
        plan_run(Config.from_name("tiny_LLaMA_1b"), "H100", n, micro_batch_size=8, **RECIPE) for n in (1, 8, 16, 64)
    ]
    assert all(
        a.days > b.days and a.tokens_per_s_per_gpu > b.tokens_per_s_per_gpu
        for a, b in zip(plans, plans[1:], strict=False)
    )
