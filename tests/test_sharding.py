"""Sharded weights against plain ones: same losses, gradients, steps, on any grid of ranks."""

import pytest
import torch
import torch.distributed as dist
from processes import run_ranks
from torch.distributed.device_mesh import init_device_mesh

from lit_gpt import Config
from lit_gpt.model import GPT
from lit_gpt.optim import clip_and_step, param_groups
from lit_gpt.sharding import ShardedWeights

# 48 rows of the MLP and 63 of the vocabulary: not all shapes can be shared out evenly.
SIZES = dict(block_size=16, vocab_size=63, padded_vocab_size=63, n_layer=2, n_embd=32, n_head=4, n_query_groups=2)


def config(**more) -> Config:
    return Config("test", **SIZES, intermediate_size=48, **more)


def steps(grid: tuple[int, int] | None, dtype: torch.dtype, **more) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and norms of three steps of two micro-batches a rank, and the weights after them."""
    model = GPT(config(**more))
    model.init_weights(1)
    rank, world_size, weights = 0, 1, model
    if grid:
        if not dist.is_initialized():
            dist.init_process_group("gloo")
        rank, world_size = dist.get_rank(), dist.get_world_size()
        weights = ShardedWeights(model, dtype, init_device_mesh("cpu", grid, mesh_dim_names=("replicate", "shard")))
    elif dtype != torch.float32:
        model.compute_in(dtype)
    optimizer = torch.optim.AdamW(param_groups(weights, 0.1), lr=1e-3, fused=True)
    seen = []
    for step in range(3):
        tokens = torch.randint(0, 63, (24, 17), generator=torch.Generator().manual_seed(step))
        total = torch.zeros(())
        for batch in tokens.chunk(2 * world_size)[2 * rank : 2 * rank + 2]:
            loss = model(batch[:, :-1], batch[:, 1:])
            (loss / 384).backward()
            total += loss.detach()
        if grid:
            weights.reduce_gradients()
            dist.all_reduce(total)
        seen += [total.item(), round(clip_and_step(optimizer, 0.5).item(), 4)]
        optimizer.zero_grad()
    whole = {name: getattr(p, "full_tensor", lambda p=p: p)().detach() for name, p in weights.named_parameters()}
    return seen, whole


@pytest.mark.slow
@pytest.mark.parametrize("grid", [(1, 3), (2, 1), (2, 2)])
def test_every_grid_takes_the_steps_of_one_device(grid, dtype=torch.float32):
    expected, weights = steps(None, dtype)
    tolerance = dict(rel=1e-6) if dtype == torch.float32 else dict(rel=1e-2)
    for seen, whole in run_ranks(grid[0] * grid[1], steps, grid, dtype):
        assert seen == pytest.approx(expected, **tolerance)
        for name, p in weights.items():
            torch.testing.assert_close(
                whole[name], p, atol=1e-4 if dtype == torch.float32 else 5e-3, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.slow
def test_bf16_over_fp32_shards():
    test_every_grid_takes_the_steps_of_one_device((1, 2), torch.bfloat16)


@pytest.mark.slow
def test_tied_embeddings_are_one_parameter():
    expected, weights = steps(None, torch.float32, tie_embeddings=True)
    seen, whole = run_ranks(2, tied)[0]
    assert seen == pytest.approx(expected, rel=1e-6) and whole.keys() == weights.keys()


def tied():
    return steps((1, 2), torch.float32, tie_embeddings=True)
