"""Runs a function in several processes that are ranks of one job, without importing torch anew in each."""

import multiprocessing
import os
import pickle
import socket
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path

ROOT = Path(__file__).parent.parent
# The server imports once and forks; unlike a fork of pytest itself it has no threads that a fork would break.
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["torch.distributed.checkpoint", "lightning_fabric", "matplotlib.pyplot"])


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start_ranks(
    n: int, function: Callable, *args: object, only: list[int] | None = None, log_dir: Path | None = None
) -> list:
    """Start `function(*args)` in n processes that have the environment of torchrun's. Returns (process, pipe) pairs.

    Args:
        only: these of the n ranks; the others are missing.
        log_dir: where stdout and stderr go, to rank-{r}.log.
    """
    port = free_port()
    ranks = []
    for rank in range(n) if only is None else only:
        ours, theirs = context.Pipe()
        environment = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": n,
            "LOCAL_WORLD_SIZE": n,
            "GROUP_RANK": 0,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "TORCHELASTIC_RUN_ID": "test",
            "OMP_NUM_THREADS": 1,
            "GLOO_SOCKET_IFNAME": "lo",
        }
        log = log_dir and log_dir / f"rank-{rank}.log"
        process = context.Process(target=_rank, args=(theirs, environment, log, function, args))
        process.start()
        theirs.close()
        ranks.append((process, ours))
    return ranks


def run_ranks(n: int, function: Callable, *args: object, timeout_s: float = 300) -> list:
    """What `function(*args)` returned in each of n ranks; a failure in one fails here."""
    ranks = start_ranks(n, function, *args)
    results = []
    for process, pipe in ranks:
        if not wait([pipe], timeout_s):
            [p.kill() for p, _ in ranks]
            raise TimeoutError(f"a rank has not answered in {timeout_s} s")
        try:
            problem, result = pickle.loads(pipe.recv_bytes())
        except EOFError:
            problem, result = f"a rank ended without a word, exit code {process.exitcode}", None
        if problem:
            [p.kill() for p, _ in ranks]
            raise AssertionError(problem)
        results.append(result)
    for process, _ in ranks:
        process.join(30)
    return results


def _rank(pipe: Connection, environment: dict, log: Path | None, function: Callable, args: tuple) -> None:
    os.environ.update({k: str(v) for k, v in environment.items()})
    if log:
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 1)
        os.dup2(1, 2)
    sys.path.insert(0, str(ROOT / "tests"))
    import torch

    torch.set_num_threads(1)
    try:
        answer = (None, function(*args))
    except BaseException:
        answer = (traceback.format_exc(), None)
    pipe.send_bytes(pickle.dumps(answer))  # not send(): it would share tensors' memory, which ends with the process
    pipe.close()
