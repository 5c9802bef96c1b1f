"""The processes of a run: who is there, how fast they reach each other, and who has died.

    store = join(rank, world_size, address, port, device)     # a process group, or a message naming who is missing
    print(self_check(store, mesh, names))
    with Watch(rank, world_size, address, port) as watch:     # a rank that dies takes the others down, and is named
        watch.doing("waiting for data", step)

Collectives cannot say who is missing: a rank that waits for a dead one waits until a timeout of many minutes. So every
process keeps a thread that writes its heartbeat to the launcher's key-value store and reads its neighbour's.
"""

import atexit
import json
import os
import socket
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from lit_gpt.sharding import all_gather

ROLL_CALL_S = 60  # after this long at the start, and then again and again, the missing ranks are named
GIVE_UP_S = 300  # ... and after this long the others end
BEAT_S = 1.0  # between two heartbeats
SILENCE_S = 30.0  # without one, a process counts as dead; compilers may hold Python's lock for many seconds
STUCK_S = 60.0  # waiting for data longer than this is reported, again and again
COLLECTIVE_S = 600  # no collective waits longer, even if every process is alive


def on_gpu(accelerator: str) -> bool:
    """Whether a run with this --accelerator is on CUDA devices. Raises: ValueError if it asks for what is not there."""
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if not {"cuda": cuda, "mps": mps, "gpu": cuda or mps}.get(accelerator, True):
        raise ValueError(f"--accelerator {accelerator}: PyTorch sees no GPU here")
    return cuda and accelerator in ("auto", "cuda", "gpu")


def auto_precision(on_gpu: bool) -> str:
    """bf16 on a GPU that has it, not where PyTorch only emulates it (V100, T4)."""
    return "bf16" if on_gpu and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"


def processes(devices: int | str, on_gpu: bool, num_nodes: int = 1) -> tuple[int, int]:
    """Of this node and of the whole run: as the launcher (torchrun, fabric) says, or else as asked for; auto is all
    GPUs, or the CPU. Raises: ValueError if more GPUs are asked for than there are."""
    if "LOCAL_WORLD_SIZE" in os.environ:
        per_node = int(os.environ["LOCAL_WORLD_SIZE"])
    else:
        gpus = torch.cuda.device_count() if on_gpu else 0
        per_node = (gpus or 1) if devices == "auto" else int(devices)
        if on_gpu and per_node > gpus:
            raise ValueError(f"--devices {devices}: this machine has {gpus} GPU{'s' * (gpus != 1)}")
    return per_node, int(os.environ.get("WORLD_SIZE", per_node * num_nodes))


def join(rank: int, world_size: int, address: str, port: int, device: torch.device) -> dist.Store:
    """Meet the other ranks and make the default process group: NCCL for CUDA tensors, gloo for those on the CPU.

    Raises:
        ConnectionError: not all came within GIVE_UP_S; the message names who is missing.
    """
    if dist.is_initialized():  # an earlier run of this process has met them
        return own_keys(connect(address, port, SILENCE_S))
    t0 = time.monotonic()
    while True:
        try:
            store = own_keys(connect(address, port, ROLL_CALL_S, is_master=rank == 0 and not hosted()))
            break
        except RuntimeError as e:
            message = (
                f"rank {rank} on {socket.gethostname()} finds no rank 0 at {address}:{port} after "
                f"{time.monotonic() - t0:.0f} s: start it there, or correct the main address and port"
            )
            if time.monotonic() - t0 > GIVE_UP_S:
                raise ConnectionError(f"{message} ({first_line(e)})") from e
            print(f"warning: {message}", file=sys.stderr, flush=True)
    roll_call(store, rank, world_size)
    atexit.register(leave)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=dist.PrefixStore("default", store),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=COLLECTIVE_S),
        device_id=device if device.type == "cuda" else None,
    )
    return store


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def hosted() -> bool:
    """Whether the store lives in torchrun, which may start its ranks repeatedly, and not in rank 0."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def own_keys(store: dist.Store) -> dist.Store:
    """Apart from torch's keys, and from those of earlier attempts of torchrun."""
    return dist.PrefixStore(f"lit_gpt/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def connect(address: str, port: int, timeout_s: float, is_master: bool = False) -> dist.TCPStore:
    timeout = timedelta(seconds=timeout_s)
    return dist.TCPStore(address, port, is_master=is_master, timeout=timeout, wait_for_workers=False, multi_tenant=True)


def roll_call(store: dist.Store, rank: int, world_size: int) -> None:
    """Wait until every rank has called. Raises: ConnectionError, naming those that have not."""
    store.set(f"here/{rank}", json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))
    t0 = time.monotonic()
    missing = list(range(world_size))
    while True:
        while missing and store.check([f"here/{missing[0]}"]):
            missing.pop(0)
        if not missing:
            return
        elapsed_s = time.monotonic() - t0
        if elapsed_s > ROLL_CALL_S:
            missing = [r for r in missing if not store.check([f"here/{r}"])]
            hosts = sorted({who(store, r)["host"] for r in range(world_size) if r not in missing})
            message = (
                f"{world_size - len(missing)} of {world_size} ranks are here (on {', '.join(hosts)}); missing after "
                f"{elapsed_s:.0f} s: {ranges(missing)}"
            )
            if elapsed_s > GIVE_UP_S:
                raise ConnectionError(message)
            if rank == 0:
                print(f"warning: {message}", file=sys.stderr, flush=True)
            time.sleep(min(ROLL_CALL_S, GIVE_UP_S - ROLL_CALL_S))
        time.sleep(0.05)


def who(store: dist.Store, rank: int) -> dict:
    """{"host", "pid"} of a rank that has called."""
    return json.loads(store.get(f"here/{rank}"))


def name(store: dist.Store, rank: int) -> str:
    at = who(store, rank)
    return f"rank {rank} ({at['host']}, process {at['pid']})"


def ranges(ranks: list[int]) -> str:
    """[0, 1, 2, 5] -> "ranks 0-2, 5"."""
    parts: list[list[int]] = []
    for r in ranks:
        if parts and parts[-1][-1] == r - 1:
            parts[-1][1:] = [r]
        else:
            parts.append([r])
    return f"rank{'s' * (len(ranks) > 1)} " + ", ".join("-".join(map(str, part)) for part in parts)


def self_check(store: dist.Store, mesh: DeviceMesh, names: tuple[str, ...]) -> str:
    """A line for each host with its ranks, then the mesh and the bandwidth of an all-gather in each of its dimensions.

    Args:
        names: of the mesh's dimensions, in the plural.

    Bandwidth is what a rank receives in a second: (n - 1)/n of the whole, NCCL's "bus bandwidth".
    """
    hosts: dict[str, list[int]] = {}
    for r in range(dist.get_world_size()):
        hosts.setdefault(who(store, r)["host"], []).append(r)
    on_gpu = mesh.device_type == "cuda"
    kind = torch.cuda.get_device_name() if on_gpu else "CPU"
    lines = [f"{host}: {ranges(ranks)} ({len(ranks)} x {kind})" for host, ranks in hosts.items()]
    for dim, n in enumerate(mesh.shape):
        if n > 1:
            speed = all_gather_bandwidth(
                mesh.get_group(dim), n, torch.device(mesh.device_type), 2**28 if on_gpu else 2**20
            )
            lines.append(f"{n} {names[dim]}: all-gather at {speed / 1e9:.1f} GB/s")
    return "\n".join(lines)


def all_gather_bandwidth(group: dist.ProcessGroup, n: int, device: torch.device, n_bytes: int) -> float:
    whole = torch.zeros(n_bytes // n * n, dtype=torch.uint8, device=device)
    part = whole.chunk(n)[0].clone()
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    elapsed_s = []
    for _ in range(4):  # the first makes the connections
        synchronize()
        t0 = time.perf_counter()
        all_gather(whole, part, group=group)
        synchronize()
        elapsed_s.append(time.perf_counter() - t0)
    slowest = torch.tensor(min(elapsed_s[1:]), device=device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX, group=group)
    return whole.numel() * (n - 1) / n / slowest.item()


class Watch:
    """A thread that notices what the training thread, waiting, cannot: dead ranks, and waiting itself.

    With a store, each rank watches the next one's heartbeat. Whoever finds it dead, or ends with an exception itself,
    writes that into the store, where all the others read it, print it and end with exit code 1. A rank that ends with
    the same exception as another one before it says nothing.
    """

    def __init__(self, rank: int = 0, world_size: int = 1, address: str = "", port: int = 0) -> None:
        """
        Args:
            address, port: of the store, if there are other ranks.
        """
        self.rank, self.world_size = rank, world_size
        self.store = None
        if world_size > 1:
            # A connection of its own: on the main one a collective that waits would block the heartbeat, too.
            self.store = own_keys(connect(address, port, SILENCE_S))
        self.next = (rank + 1) % world_size
        self._doing, self._step, self._since = "starting", 0, time.monotonic()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def doing(self, what: str, step: int) -> None:
        self._doing, self._step, self._since = what, step, time.monotonic()

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _: object) -> None:
        if self.store is not None and isinstance(error, RuntimeError):
            # Perhaps only the echo of another rank's death: give its neighbour the time to find out, then end there.
            self._end.wait(SILENCE_S + 5)
        self._end.set()
        self._thread.join()
        if self.store is None:
            return
        already_said = False
        try:
            if isinstance(error, Exception):
                already_said = self._tell(f"{kind.__name__}: {first_line(error)}")
            self.store.set(f"beat/{self.rank}", "done")
            waits_until = time.monotonic() + (SILENCE_S if error is None else 3 * BEAT_S)
            while self.rank == 0 and not self._all_done() and time.monotonic() < waits_until:
                time.sleep(0.05)  # its end takes the store from the others
        except RuntimeError:
            pass  # the store went with rank 0, which has ended for its own reason
        if already_said:
            sys.exit(1)

    def _tell(self, problem: str) -> bool:
        """Tell the others how this rank ended. Returns whether one of them has said the same of itself."""
        waits_until = time.monotonic() + BEAT_S
        while self.rank and not self.store.check(["verdict"]) and time.monotonic() < waits_until:
            time.sleep(0.05)  # a wrong flag is every rank's mistake, and rank 0's to name
        mine = f"{name(self.store, self.rank)} ended in step {self._step + 1} with {problem}"
        verdict = self.store.compare_set("verdict", "", mine).decode()
        return verdict != mine and verdict.endswith(f" with {problem}")

    def _run(self) -> None:
        beat, heard, heard_at, reported = 0, b"", time.monotonic(), 0.0
        while not self._end.wait(BEAT_S):
            waited_s = time.monotonic() - self._since
            if self._doing == "waiting for data" and waited_s > STUCK_S and waited_s - reported > STUCK_S:
                reported = waited_s
                self._say(
                    f"warning: rank {self.rank} on {socket.gethostname()} has waited {waited_s:.0f} s for the data of "
                    f"step {self._step + 1}: a reader or its storage hangs"
                )
            if waited_s < STUCK_S:
                reported = 0.0
            if self.store is None:
                continue
            try:
                beat += 1
                self.store.set(f"beat/{self.rank}", f"{beat}")
                if self.store.check(["verdict"]):
                    self._leave(self.store.get("verdict").decode())
                now = self.store.get(f"beat/{self.next}") if self.store.check([f"beat/{self.next}"]) else b""
                if now != heard:
                    heard, heard_at = now, time.monotonic()
                silent_s = time.monotonic() - heard_at
                if heard != b"done" and (silent_s > SILENCE_S or (silent_s > 2 * BEAT_S and self._next_is_gone())):
                    message = f"{name(self.store, self.next)} died, or cannot be reached, {silent_s:.0f} s ago"
                    self._leave(self.store.compare_set("verdict", "", message).decode())
            except RuntimeError as e:
                if not self._end.is_set():
                    holder = "torchrun" if hosted() else "rank 0"
                    self._leave(f"{holder}, which holds the store, died or cannot be reached ({first_line(e)})")

    def _all_done(self) -> bool:
        beats = [f"beat/{r}" for r in range(self.world_size)]
        return self.store.check(beats) and all(beat == b"done" for beat in self.store.multi_get(beats))

    def _next_is_gone(self) -> bool:
        """Whether the next rank ran on this host and its process has ended: no need to wait for its silence then."""
        at = who(self.store, self.next)
        if at["host"] != socket.gethostname() or not Path(f"/proc/{os.getpid()}/stat").exists():
            return False
        try:
            state = Path(f"/proc/{at['pid']}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        return state in "ZX"

    def _leave(self, message: str) -> None:
        self._say(f"error: {message}; rank {self.rank} ends in step {self._step + 1}, resume from the last checkpoint")
        sys.stdout.flush()
        if self.rank == 0:
            time.sleep(3 * BEAT_S)  # it may hold the store, where the others read the same
        os._exit(1)  # the training thread may wait in a collective for ever, where no exception reaches it

    def _say(self, message: str) -> None:
        print(message, file=sys.stderr, flush=True)


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0][:200]
