"""What a long run meets: processes and disks fail, and it goes on where it was, or ends with a line that says why."""

import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from processes import run_ranks, start_ranks
from test_pretrain import data, flags, losses, runs, tinyllama, train  # noqa: F401 - two of them are fixtures

from lit_gpt import Config, checkpoint, cluster
from lit_gpt.checkpoint import Checkpointer
from lit_gpt.model import GPT
from lit_gpt.optim import init_adam, param_groups

ROOT = Path(__file__).parent.parent
CONFIG = Config(
    "t", block_size=16, vocab_size=64, n_layer=1, n_embd=64, n_head=4, n_query_groups=2, intermediate_size=96
)


def small_run() -> tuple[GPT, torch.optim.AdamW]:
    model = GPT(CONFIG)
    model.init_weights(1)
    optimizer = torch.optim.AdamW(param_groups(model, 0.1), fused=True)
    init_adam(optimizer)
    return model, optimizer


class TestDisks:
    """Saving fails; what was saved before stays, and training goes on."""

    def saved_after(self, tmp_path: Path, harm, repair) -> list[str]:
        """What is reported when the second of three saves is harmed."""
        reports: list[str] = []
        model, optimizer = small_run()
        checkpoints = Checkpointer(tmp_path / "run", report=reports.append)
        for step in (1, 2, 3):
            if step == 2:
                harm()
            checkpoints.save(step, model, optimizer, {"config": CONFIG.to_dict()})
            checkpoints.wait()
            if step == 2:
                repair()
                assert not list((tmp_path / "run").glob("*.tmp"))
                checkpoint.load(tmp_path / "run" / "step-00000001", model, optimizer)
        checkpoints.close()
        assert [d.name for d in checkpoint.steps(tmp_path / "run")] == ["step-00000001", "step-00000003"]
        return reports

    def test_a_write_that_the_system_cuts_short(self, tmp_path):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        first, second, third = self.saved_after(
            tmp_path,
            lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1])),
            lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits),
        )
        assert "step 2: NOT saved" in second and "File too large" in second
        assert "Training goes on; the newest checkpoint is step-00000001" in second
        assert "step 1: saved" in first and "step 3: saved" in third

    def test_too_little_room_is_seen_before_anything_is_written(self, tmp_path, monkeypatch):
        real = shutil.disk_usage
        reports = self.saved_after(
            tmp_path,
            lambda: monkeypatch.setattr(shutil, "disk_usage", lambda path: real(path)._replace(free=1000)),
            lambda: monkeypatch.setattr(shutil, "disk_usage", real),
        )
        assert "the checkpoint needs 0.00 GB and 0.00 GB are free" in reports[1]

    def test_a_folder_that_cannot_be_written(self):
        with tempfile.TemporaryDirectory() as folder:  # tmp_path is root's alone
            os.chmod(folder, 0o555)
            reports = run_ranks(1, as_nobody, Path(folder))[0]
            os.chmod(folder, 0o755)
        assert "step 1: NOT saved" in reports[0] and "Permission denied" in reports[0]

    def test_the_last_checkpoint_of_a_run_must_be_saved(self, tmp_path, monkeypatch):
        model, optimizer = small_run()
        checkpoints = Checkpointer(tmp_path / "run", report=lambda line: None)
        real = shutil.disk_usage
        monkeypatch.setattr(shutil, "disk_usage", lambda path: real(path)._replace(free=1000))
        checkpoints.save(1, model, optimizer, {"config": CONFIG.to_dict()})
        with pytest.raises(OSError, match="are free"):
            checkpoints.close()

    def test_a_flipped_bit_is_found_on_loading(self, tmp_path):
        model, optimizer = small_run()
        path = checkpoint.save(tmp_path, 1, model, optimizer, {"config": CONFIG.to_dict()})
        file = next(path.glob("*.distcp"))
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"__0_0.distcp (was damaged: its checksum|cannot be loaded)"):
            checkpoint.load(path, model, optimizer)


def as_nobody(folder: Path) -> list[str]:
    if os.getuid() == 0:
        os.seteuid(65534)  # root may write anywhere
    reports: list[str] = []
    model, optimizer = small_run()
    checkpoints = Checkpointer(folder / "run", report=reports.append)
    checkpoints.save(1, model, optimizer, {"config": CONFIG.to_dict()})
    checkpoints.wait()
    return reports


class TestBackground:
    def test_training_after_a_save_does_not_change_what_is_saved(self, tmp_path):
        model, optimizer = small_run()
        checkpoints = Checkpointer(tmp_path, report=lambda line: None)
        before = [p.detach().clone() for p in model.parameters()]
        checkpoints.save(1, model, optimizer, {"config": CONFIG.to_dict()})
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(7.0)
        checkpoints.close()
        checkpoint.load(tmp_path / "step-00000001", model, optimizer)
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))

    def test_what_a_killed_run_left_half_written_is_cleared(self, tmp_path):
        (tmp_path / "step-00000009.tmp").mkdir()
        Checkpointer(tmp_path)
        assert not list(tmp_path.iterdir())

    def test_the_same_step_again_replaces_the_old_one(self, tmp_path):
        model, optimizer = small_run()
        for _ in range(2):
            path = checkpoint.save(tmp_path, 1, model, optimizer, {"config": CONFIG.to_dict()})
        assert [d.name for d in tmp_path.iterdir()] == [path.name] and checkpoint.check(path)


@pytest.mark.filterwarnings("ignore:.*no manifest")
class TestKills:
    """SIGKILL at random moments, also while a checkpoint is written."""

    def survive(self, flags: dict, kills: int, seed: int, max_steps: int) -> None:  # noqa: F811
        flags = dict(
            flags, val_data_dir=None, max_steps=max_steps, save_interval=2, global_batch_tokens=4 * 32, log_interval=50
        )
        straight = train(flags, name="straight", save_interval=max_steps)
        rng, newest = random.Random(seed), 0
        run_dir = flags["out_dir"] / "run"
        killed = 0
        while killed < kills:
            [(process, _)] = start_ranks(1, runs, flags, [dict(resume="auto")], log_dir=flags["out_dir"])
            known = set(run_dir.glob("step-*"))
            while process.is_alive() and set(run_dir.glob("step-*")) <= known:  # until it saves, or has saved
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.4))
            process.kill()
            process.join()
            if process.exitcode != -signal.SIGKILL:
                assert process.exitcode == 0, (flags["out_dir"] / "rank-0.log").read_text()[-2000:]
                break
            killed += 1
            found = checkpoint.steps(run_dir)
            if found:  # whatever has its name is whole, and nothing is lost that was there before
                meta = checkpoint.check(found[-1])
                assert not checkpoint.damaged(found[-1], meta)
                assert meta["step"] >= newest
                newest = meta["step"]
        run_ranks(1, runs, flags, [dict(resume="auto", save_interval=max_steps)])
        a, b = (checkpoint.load_weights(d / f"step-{max_steps:08d}") for d in (straight, run_dir))
        assert all(torch.equal(a[name], b[name]) for name in a)
        assert not list(run_dir.glob("*.tmp"))
        print(f"{killed} kills, the last checkpoint before the end was step {newest}")

    @pytest.mark.slow
    def test_four_kills(self, flags):  # noqa: F811
        self.survive(flags, kills=4, seed=1, max_steps=60)

    @pytest.mark.long
    def test_fifty_kills(self, flags):  # noqa: F811
        self.survive(flags, kills=50, seed=2, max_steps=400)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*no manifest")
class TestRanks:
    def ends(self, ranks: list, log_dir: Path, within_s: float) -> dict[int, str]:
        """Logs of ranks that must all end soon."""
        t0 = time.monotonic()
        for process, _ in ranks:
            process.join(max(0.1, within_s - (time.monotonic() - t0)))
        alive = [process for process, _ in ranks if process.is_alive()]
        [process.kill() for process in alive]
        logs = {int(f.stem[5:]): f.read_text() for f in log_dir.glob("rank-*.log")}
        assert not alive, logs
        return logs

    def says(self, ranks: list, log_dir: Path, what: str) -> None:
        """Waits until rank 0 has said it."""
        log = log_dir / "rank-0.log"
        while not (log.exists() and what in log.read_text()):
            time.sleep(0.1)
            assert ranks[0][0].is_alive(), log.read_text()

    def test_a_rank_that_dies_takes_the_others_down_and_is_named(self, flags, tmp_path):  # noqa: F811
        flags = dict(flags, global_batch_tokens=12 * 32, max_steps=10**6, eval_interval=10**6, save_interval=10**6)
        ranks = start_ranks(3, runs, flags, [{}], log_dir=tmp_path)
        self.says(ranks, tmp_path, "\nstep ")
        ranks[1][0].kill()
        logs = self.ends(ranks, tmp_path, within_s=55)
        for rank in (0, 2):
            assert ranks[rank][0].exitcode == 1
            assert f"rank 1 ({os.uname().nodename}, process {ranks[1][0].pid}) died" in logs[rank], logs[rank]
            assert "resume from the last checkpoint" in logs[rank]

    def test_a_rank_that_fails_tells_the_others_why(self, flags, tmp_path):  # noqa: F811
        ranks = start_ranks(2, fails_on_rank_1, flags, log_dir=tmp_path)
        logs = self.ends(ranks, tmp_path, within_s=55)
        assert "ended in step 1 with FileNotFoundError:" in logs[0], logs[0]

    def test_a_mistake_of_all_ranks_is_named_by_rank_0_alone(self, flags):  # noqa: F811
        ranks = start_ranks(3, runs, dict(flags, train_mix={"nowhere": 1.0}), [{}])
        ends = []
        for process, pipe in ranks:
            assert pipe.poll(60)
            ends.append(pickle.loads(pipe.recv_bytes())[0].splitlines()[-1].partition(":")[0])
            process.join()
        assert ends == ["FileNotFoundError", "SystemExit", "SystemExit"]

    def test_a_rank_without_memory_tells_the_others_at_once(self, flags, tmp_path):  # noqa: F811
        ranks = start_ranks(2, has_no_memory_on_rank_1, flags, log_dir=tmp_path)
        self.says(ranks, tmp_path, "rank 0 computes")
        logs = self.ends(ranks, tmp_path, within_s=cluster.SILENCE_S - 5)
        assert "ended in step 1 with ValueError: CUDA out of memory" in logs[0], logs[0]
        assert "--micro_batch_size" in logs[0]

    def test_a_killed_reader_ends_all_ranks_at_once(self, flags, tmp_path):  # noqa: F811
        flags = dict(flags, max_steps=10**6, num_workers=1, eval_interval=10**6, save_interval=10**6)
        ranks = start_ranks(2, loses_its_reader_while_it_computes, flags, log_dir=tmp_path)
        self.says(ranks, tmp_path, "\nstep ")
        logs = self.ends(ranks, tmp_path, within_s=cluster.SILENCE_S - 5)
        assert "ended in step" in logs[0] and "OSError: rank 1 gets no data: DataLoader worker" in logs[0], logs[0]

    def test_missing_ranks_are_named(self, tmp_path):
        for (process, pipe), rank in zip(start_ranks(4, meet, only=[0, 2]), (0, 2), strict=True):
            assert pipe.poll(40), rank
            problem, message = pickle.loads(pipe.recv_bytes())
            assert not problem and "2 of 4 ranks are here" in message and "missing after 3 s: ranks 1, 3" in message
            process.join()

    def test_a_missing_rank_0_is_named(self):
        [(process, pipe)] = start_ranks(2, meet, only=[1])
        assert pipe.poll(40)
        problem, message = pickle.loads(pipe.recv_bytes())
        assert not problem and "finds no rank 0 at 127.0.0.1:" in message, problem
        process.join()


def loses_its_reader_while_it_computes(flags: dict) -> None:  # noqa: F811
    """Rank 1, in its third micro-batch."""
    assert multiprocessing.get_start_method() == "forkserver"  # in these ranks, and Linux's default from Python 3.14
    forward, calls = tinyllama.forward, []

    def interrupted(*args):
        calls.append(0)
        if os.environ["RANK"] == "1" and len(calls) == 3:
            os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
            time.sleep(10)  # until torch's signal handler raises
            raise AssertionError("no signal came: the worker is not this process's child")
        return forward(*args)

    tinyllama.forward = interrupted
    runs(flags, [{}])


def fails_on_rank_1(flags: dict) -> None:  # noqa: F811
    more = {"train_mix": {"nowhere": 1.0}} if os.environ["RANK"] == "1" else {}
    runs(flags, [more])


def has_no_memory_on_rank_1(flags: dict) -> None:  # noqa: F811
    def forward(*args):
        if os.environ["RANK"] == "1":
            raise torch.OutOfMemoryError("CUDA out of memory")
        print("rank 0 computes", flush=True)
        return real(*args)

    real, tinyllama.forward = tinyllama.forward, forward
    runs(flags, [{}])


def meet() -> str:
    cluster.ROLL_CALL_S, cluster.GIVE_UP_S = 2, 3
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    try:
        cluster.join(rank, world_size, "127.0.0.1", int(os.environ["MASTER_PORT"]), torch.device("cpu"))
    except ConnectionError as e:
        if rank == 0:
            time.sleep(2)  # it holds the store, which the others ask who is there
        return str(e)
    return "all came"


class TestWaiting:
    def test_a_hung_reader_is_reported(self, monkeypatch, capsys):
        monkeypatch.setattr(cluster, "STUCK_S", 0.2)
        monkeypatch.setattr(cluster, "BEAT_S", 0.05)
        with cluster.Watch() as watch:
            watch.doing("waiting for data", 6)
            time.sleep(0.5)
        assert "rank 0 on" in (err := capsys.readouterr().err) and "for the data of step 7" in err

    def test_a_killed_reader_ends_the_run_with_a_line(self, flags, tmp_path):  # noqa: F811
        flags = dict(flags, max_steps=10**6, num_workers=1, eval_interval=10**6, save_interval=10**6)
        [(process, pipe)] = start_ranks(1, runs, flags, [{}], log_dir=tmp_path)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        log = tmp_path / "rank-0.log"
        while not (log.exists() and "\nstep " in log.read_text()):
            time.sleep(0.1)
        os.kill(int(children.read_text().split()[0]), signal.SIGKILL)
        assert pipe.poll(60)
        problem, _ = pickle.loads(pipe.recv_bytes())
        assert "OSError: rank 0 gets no data" in problem
        process.join()


class TestGpus:
    """What is asked for, devices or memory, and not there."""

    @pytest.fixture(autouse=True)
    def machine(self, monkeypatch):
        monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
        monkeypatch.delenv("WORLD_SIZE", raising=False)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
        self.has_gpus(monkeypatch, 0)

    def test_a_gpu_that_only_emulates_bf16_is_not_given_it(self, monkeypatch):
        for has_it in (False, True):  # on a V100 the function alone says True
            supported = lambda including_emulation=True, has_it=has_it: including_emulation or has_it  # noqa: E731
            monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
            assert [cluster.auto_precision(on_gpu) for on_gpu in (True, False)] == [
                "bf16" if has_it else "fp32",
                "fp32",
            ]

    def has_gpus(self, monkeypatch, n: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: n > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: n)

    @pytest.mark.parametrize("command", ["pretrain/tinyllama.py", "sft/finetune.py --base x --data x"])
    def test_none(self, command):
        command = [sys.executable, *command.split(), "--accelerator", "cuda"]
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
        assert done.returncode == 1 and done.stderr == "error: --accelerator cuda: PyTorch sees no GPU here\n"

    def test_too_few(self, monkeypatch):
        assert not cluster.on_gpu("auto") and cluster.processes("auto", on_gpu=False) == (1, 1)
        assert cluster.processes("8", on_gpu=False, num_nodes=2) == (8, 16)  # on CPUs
        self.has_gpus(monkeypatch, 1)
        assert cluster.on_gpu("auto") and cluster.on_gpu("cuda") and not cluster.on_gpu("cpu")
        with pytest.raises(ValueError, match="^--devices 8: this machine has 1 GPU$"):
            cluster.processes(8, on_gpu=True)
        self.has_gpus(monkeypatch, 4)
        assert cluster.processes("auto", on_gpu=True) == (4, 4) and cluster.processes("2", on_gpu=True) == (2, 2)
        with pytest.raises(ValueError, match="^--devices 8: this machine has 4 GPUs$"):
            cluster.processes("8", on_gpu=True)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
        monkeypatch.setenv("WORLD_SIZE", "16")
        assert cluster.processes("auto", on_gpu=True) == (2, 16)  # the launcher knows

    def test_too_little_memory_is_said_before_the_run(self, monkeypatch):
        config, args = tinyllama.Config.from_name("tiny_LLaMA_1b"), tinyllama.TrainArgs(precision="bf16")
        self.has_gpus(monkeypatch, 1)
        monkeypatch.setattr(tinyllama, "Fabric", MagicMock())
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            for gb in (24, 80):
                properties = SimpleNamespace(total_memory=gb * 1e9)
                monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, is_=properties: is_)
                tinyllama.launch(args, config)
        [line] = [str(w.message) for w in seen]
        assert line.startswith("this run is planned to take 38.3 GB, and the GPU has 24.0: it may need a smaller --m")

    def test_out_of_memory_is_a_line_with_the_way_out(self, monkeypatch, flags):  # noqa: F811
        def forward(*_):
            raise torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.64 GiB of which 1.06 "
                "GiB is free. Of the allocated memory 21.00 GiB is allocated by PyTorch, and 9 MiB is reserved"
            )

        monkeypatch.setattr(tinyllama, "forward", forward)
        with pytest.raises(ValueError, match="^CUDA .* 2.00 GiB. GPU 0 .* is free. Give a smaller --micro_batch_size"):
            train(flags)


def test_ranks_are_listed_shortly():
    assert cluster.ranges([0, 1, 2, 5]) == "ranks 0-2, 5" and cluster.ranges([3]) == "rank 3"
