"""Tokens/s per GPU on several GPUs of this machine against one of them, for each way of sharing the model.

python scripts/benchmark.py scaling --devices '[1, 2, 4]' --model '[tiny_LLaMA_1b]' --sharding '[optimizer, fsdp]'

One torchrun on random tokens, with the optimizer step of pretrain/tinyllama.py: fp32 parameters, moments and sums of
gradients, clipping. Kernels are compiled once for all cases, and GPUs that a case leaves free measure another one.
"""

import gc
import json
import os
import re
import subprocess
import sys
import time
from datetime import timedelta
from itertools import product
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from lit_gpt import cluster
from lit_gpt.cli import one_line_errors
from lit_gpt.config import Config
from lit_gpt.kernels import select_kernels
from lit_gpt.model import GPT
from lit_gpt.optim import clip_and_step, param_groups
from lit_gpt.sharding import ShardedWeights
from lit_gpt.speed_monitor import flops_per_token, peak_flops

ALONE_S = 10  # ranks that do the same run out of memory within this time of each other


def scaling(
    devices: list[int] | None = None,
    model: list[str] | None = None,
    sharding: list[str] | None = None,
    precision: list[Literal["bf16", "fp8"]] | None = None,
    micro_batch_tokens: int = 32_768,
    accumulation: int = 8,
    steps: int = 2,
    kernels: str = "auto",
    json: Path | None = None,
) -> None:
    """Measure scaling. Run it on an idle machine.

    Args:
        devices: how many GPUs, one after the other. Default: 1, 2, 4, ... up to all.
        model: presets of lit_gpt/config.py. Default: tiny_LLaMA_1b.
        sharding: optimizer, fsdp or ddp, as pretrain/tinyllama.py's; optimizer/2 shares among 2 and repeats. Default:
            optimizer, fsdp.
        precision: bf16 or fp8. Default: bf16.
        micro_batch_tokens: in one forward and backward of a device.
        accumulation: micro-batches of a device in an optimizer step; the fewer, the more its communication counts.
        steps: that are timed, after two short ones; the fastest counts.
        kernels: backends, as pretrain/tinyllama.py's --kernels.
        json: write the rows to this file as well.

    Raises: ValueError at the end, if a case failed. What fails on all of its devices (too little memory, say) does not
    cost the other cases; what fails on some ends the run.
    """
    available = max(torch.cuda.device_count(), 1)
    devices = devices or [n for n in (1, 2, 4, 8, 16) if n <= available]
    if min(devices) < 1 or (torch.cuda.is_available() and max(devices) > available):
        raise ValueError(f"--devices {devices}: this machine has {available}")
    for name in model or []:
        Config.from_name(name)
    if unknown := [way for way in sharding or [] if not re.fullmatch(r"(optimizer|fsdp)(/\d+)?|ddp", way)]:
        raise ValueError(f"--sharding {unknown[0]} is none of optimizer, fsdp, ddp, and optimizer/2 or the like")
    request = dict(
        devices=devices,
        cases=list(product(sharding or ["optimizer", "fsdp"], model or ["tiny_LLaMA_1b"], precision or ["bf16"])),
        tokens=micro_batch_tokens,
        accumulation=accumulation,
        steps=steps,
        kernels=kernels,
    )
    words = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={max(devices)}", __file__]
    worker = subprocess.Popen([sys.executable, *words, dumps(request)], stdout=subprocess.PIPE, text=True)
    rows: list[dict] = []
    for line in worker.stdout:
        if not line.startswith("{"):
            print(line, end="", flush=True)
            continue
        row = loads(line)
        same = [r for r in rows if all(r[key] == row[key] for key in ("model", "precision")) and r["GPUs"] == 1]
        if same and same[0]["tokens/s/GPU"]:
            row["x one GPU"] = round(row["tokens/s/GPU"] * row["GPUs"] / same[0]["tokens/s/GPU"], 3)
        rows.append(row)
        print(row, flush=True)
        if json is not None:
            json.write_text(dumps(rows))
    problems = [row["problem"] for row in rows if "problem" in row]
    if worker.wait() or problems:
        n_cases = sum(len(cases_on(n, request["cases"])) for n in devices)
        first = f"; the first problem: {problems[0]}" if problems else ""
        raise ValueError(f"{len(rows) - len(problems)} of {n_cases} cases were measured{first}")


def cases_on(n: int, cases: list[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    """One device shares nothing, so there all ways are one."""
    return cases if n > 1 else list(dict.fromkeys(("one device", *case[1:]) for case in cases))


# --- one rank --------------------------------------------------------------------------------------------------------


def measure(devices: list[int], cases: list[tuple[str, str, str]], **how) -> None:
    rank, world_size, local = (int(os.environ[k]) for k in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store = cluster.join(rank, world_size, os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), device)
    if world_size > 1:
        check = cluster.self_check(store, init_device_mesh(device.type, (world_size,)), ("ranks",))
        if rank == 0:
            print(check, flush=True)
    cluster.leave()
    for n in devices:
        # Groups of n ranks, each with a process group of its own, measure different cases at the same time.
        groups, (group, place) = world_size // n, divmod(rank, n)
        mine = cases_on(n, cases)[group::groups] if group < groups else []
        if mine and n > 1:
            # Without device_id: torch 2.11 crashes where a mesh splits a process's second default group that has one.
            of_group = dist.PrefixStore(f"{n}/{group}", store)
            backend = "nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=of_group, rank=place, world_size=n)
        for i, (way, name, precision) in enumerate(mine):
            t0 = time.perf_counter()
            row = {"model": name, "precision": precision, "GPUs": n, "sharding": way}
            try:
                row |= time_case(Config.from_name(name), precision, way, device, n, **how)
            except RuntimeError as e:  # out of memory, say
                row |= {"tokens/s/GPU": 0, "problem": cluster.first_line(e)}
                if not all_fail(dist.PrefixStore(f"{n}/{group}/{i}", store), place, n):
                    row["problem"] += f" (rank {rank} alone)"
                    print(dumps(row), flush=True)
                    os._exit(1)  # torchrun ends the others; they wait in a collective, as an orderly exit here might
            row["took s"] = round(time.perf_counter() - t0, 1)
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
            if place == 0:
                print(dumps(row), flush=True)
        cluster.leave()
        store.set(f"{n}/done/{rank}", "")
        # Others may have more cases to measure; torchrun ends who waits for a rank that died.
        store.wait([f"{n}/done/{r}" for r in range(world_size)], timedelta(days=1))


def all_fail(store: dist.Store, place: int, n: int) -> bool:
    """Whether the other ranks of a case fail as well, and do not wait for this one in a collective."""
    store.set(f"failed/{place}", "")
    try:
        store.wait([f"failed/{r}" for r in range(n)], timedelta(seconds=ALONE_S))
    except dist.DistStoreError:
        return False
    return True


def time_case(
    config: Config,
    precision: str,
    way: str,
    device: torch.device,
    world_size: int,
    tokens: int,
    accumulation: int,
    steps: int,
    kernels: str,
) -> dict:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    heads = (config.n_head, config.n_query_groups, config.head_size)
    with device:
        model = GPT(config, select_kernels(kernels, device=device, dtype=dtype, heads=heads, fp8=precision == "fp8"))
    model.init_weights(1)
    if precision == "fp8":
        model.train_in_fp8()
    weights, fsdp = model, False
    if way == "one device":
        model.compute_in(dtype)
    else:
        kind, _, sharers = way.partition("/")
        n = int(sharers) if sharers else 1 if kind == "ddp" else world_size
        mesh = init_device_mesh(device.type, (world_size // n, n), mesh_dim_names=("replicate", "shard"))
        fsdp = kind == "fsdp"
        weights = shard_all(model, mesh, dtype) if fsdp else ShardedWeights(model, dtype, mesh)
    optimizer = torch.optim.AdamW(param_groups(weights, 0.1), lr=1e-4, betas=(0.9, 0.95), fused=True)
    size = max(1, tokens // config.block_size)
    batch = torch.randint(config.vocab_size, (size, config.block_size + 1), device=device)
    n_tokens = size * config.block_size
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def moment() -> "torch.cuda.Event | float":
        """Now, on the device's clock."""
        if device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def step(accumulation: int) -> float:
        """Seconds of it that follow the last backward."""
        for i in range(accumulation):
            if fsdp:
                model.set_requires_gradient_sync(i == accumulation - 1)
            (model(batch[:, :-1], batch[:, 1:]) / (n_tokens * accumulation)).backward()
        begin = moment()
        if isinstance(weights, ShardedWeights):
            weights.reduce_gradients()
        norm = clip_and_step(optimizer, 1.0)
        optimizer.zero_grad()
        if isinstance(weights, ShardedWeights) and weights.refresh() and model.fp8 is not None:
            model.fp8.quantise_weights()  # as the next forward would
        end = moment()
        assert norm.isfinite()  # waits for the device, as the train loop does
        synchronize()
        return begin.elapsed_time(end) / 1e3 if device.type == "cuda" else end - begin

    for n_short in (2, 1):  # compiles, makes the optimizer's state and the connections
        step(n_short)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elapsed_s, after_s = [], []
    while len(elapsed_s) < steps:
        if dist.is_initialized():
            dist.all_reduce(torch.zeros((), device=device))  # all begin together
            synchronize()
        t0 = time.perf_counter()
        after_s.append(step(accumulation))
        synchronize()
        elapsed_s.append(time.perf_counter() - t0)
    speed = accumulation * n_tokens / min(elapsed_s)
    peak = peak_flops(device, "bf16")
    return {
        "micro-batch": n_tokens,
        "accumulation": accumulation,
        "tokens/s/GPU": round(speed),
        "MFU %": round(100 * speed * flops_per_token(config) / peak, 1) if peak else None,
        "ms after the last backward": round(1e3 * min(after_s), 1),
        "step s": [round(s, 4) for s in elapsed_s],
        "peak GB": round(torch.cuda.max_memory_allocated() / 1e9, 1) if device.type == "cuda" else None,
    }


def shard_all(model: GPT, mesh: DeviceMesh, dtype: torch.dtype) -> GPT:
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    mesh = mesh if mesh.size(0) > 1 else mesh["shard"]
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)


loads, dumps = json.loads, json.dumps  # `scaling` has an argument of that name

if __name__ == "__main__":
    with one_line_errors():
        measure(**loads(sys.argv[1]))
