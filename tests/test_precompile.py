"""Kernels that are compiled ahead: by the right process, once, and the very ones that a step calls."""

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lit_gpt import precompile
from lit_gpt.kernels import _usable
from lit_gpt.kernels.attention import usable

ROOT = Path(__file__).parent.parent
PROGRAM = [sys.executable, "-m", "lit_gpt.precompile"]


def executable(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def environment(tmp_path) -> dict[str, str]:
    """Of a process with empty caches, whose Triton does not interpret."""
    caches = ("QUACK_CACHE_DIR", "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", "TRITON_CACHE_DIR")
    plain = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return plain | {name: str(tmp_path / name) for name in caches}


def test_the_model_is_the_command_lines(tmp_path):
    (tmp_path / "run.yaml").write_text("max_steps: 3\nmodel: tinyllama3_2b\n")
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9\n")
    for argv, model in {
        "": "tiny_LLaMA_1b",
        "--micro_batch_size 4 --model tiny_LLaMA_120M --devices 1": "tiny_LLaMA_120M",
        "--model=pythia-160m": "pythia-160m",
        "--model_overrides.n_layer 4": "tiny_LLaMA_1b",
        "--model no-such": "tiny_LLaMA_1b",
        f"--config {tmp_path}/run.yaml": "tinyllama3_2b",
        f"--config={tmp_path}/run.yaml": "tinyllama3_2b",
        f"--config {tmp_path}/missing.yaml": "tiny_LLaMA_1b",
        f"--config {tmp_path}/latin.yaml": "tiny_LLaMA_1b",
    }.items():
        assert precompile.model_named(["pretrain/tinyllama.py", *argv.split()]) == model


def test_begins_only_where_there_is_a_gpu_and_a_run(tmp_path, monkeypatch):
    """`python` here writes down how it was called."""
    python, called = tmp_path / "python", tmp_path / "called"
    executable(python, f'#!/bin/sh\necho "$@" >> {called}\n')
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    if not torch.cuda.is_available():
        precompile.begin(["tinyllama.py"])
    executable(tmp_path / "bin/nvidia-smi", "#!/bin/sh\n")
    (tmp_path / "cpu.yaml").write_text("accelerator: cpu\n")
    for flags in (
        *("--help", "--plan 8xH100", "--plan=8xH100", "--kernels triton", "--kernels=[]", "--accelerator cpu"),
        *("--precision=fp32", "--precision [fp32]", f"--config {tmp_path}/cpu.yaml"),
    ):
        precompile.begin(["tinyllama.py", *flags.split()])
    with monkeypatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        precompile.begin(["tinyllama.py"])
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", str(tmp_path / "missing"))  # not to begin is no reason not to train
        precompile.begin(["tinyllama.py"])
    precompile.begin(["benchmark.py", "--kernels", "[triton, auto]", "--model", "tiny_LLaMA_120M"])
    for _ in range(100):
        time.sleep(0.1)
        if called.exists() and called.read_text():
            break
    assert called.read_text() == "-m lit_gpt.precompile --model tiny_LLaMA_120M\n"


@pytest.mark.parametrize("script", ["pretrain/tinyllama.py", "sft/finetune.py", "scripts/benchmark.py"])
def test_scripts_that_train_begin_before_they_import_anything_slow(script):
    code = (
        "import runpy, sys\n"
        "from lit_gpt import precompile\n"
        "precompile.begin = lambda argv: sys.exit(f'{argv[1]} {\"torch\" in sys.modules}')\n"
        "sys.argv = [sys.argv[1], 'step']\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code, script], capture_output=True, text=True, cwd=ROOT)
    assert done.stderr == "step False\n"


@pytest.mark.parametrize(
    "flags, message",
    [
        ("", "one of the arguments --model --heads is required"),
        ("--model tiny_LLaMA_1b --heads 4 2 64", "not allowed with argument"),
        ("--model tiny_LLaMA_1b --capability sm_90", "'sm_90' is not the capability of a GPU"),
        ("--model tiny_LLaMA_1b", "error: there is no nvidia-smi"),
    ],
)
def test_wrong_arguments(flags, message, environment, tmp_path):
    environment |= {"PATH": str(tmp_path), "PYTHONPATH": os.getcwd()}
    done = subprocess.run([*PROGRAM, *flags.split()], env=environment, capture_output=True, text=True)
    assert done.returncode and message in done.stderr and "Traceback" not in done.stderr


def test_a_child_that_does_not_end_is_killed():
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    child.start()
    assert not precompile.succeeded(child, time.monotonic() + 0.1)
    assert child.exitcode == -signal.SIGKILL


WORKS = """
def write(name, text):
    open(f"{folder}/{{name}}", "a").write(text)

def _flash_attn_fwd(q, k, v, causal, return_lse):
    assert (q.shape, k.shape, q.device.type) == ((1, 256, 4, 64), (1, 256, 2, 64), "cuda")
    write("forward", "x")


def _flash_attn_bwd(q, k, v, out, dout, lse, causal):
    write("backward", "x")
"""
HANGS = """
    import os, time
    write("child", f"{os.getpid()} ")
    time.sleep(60)
"""


@pytest.fixture
def packages(environment, tmp_path) -> Path:
    """Where a flash-attn-4 lies whose interface is still to be written, as on a machine with a Hopper GPU."""
    packages = tmp_path / "packages"
    for name, text in {
        "cutlass.py": "",
        "quack/__init__.py": "",
        "quack/cache.py": "from torch._subclasses.fake_tensor import FakeTensorMode as compile_only_mode",
        "flash_attn/cute/__init__.py": "flash_attn_func = flash_attn_varlen_func = None",
        "flash_attn_4-0.0.dist-info/METADATA": "Name: flash-attn-4\nVersion: 0.0\n",
    }.items():
        (packages / name).parent.mkdir(parents=True, exist_ok=True)
        (packages / name).write_text(text)
    environment["PYTHONPATH"] = f"{packages}{os.pathsep}{os.getcwd()}"
    environment["PYTHONDONTWRITEBYTECODE"] = "1"  # of the same second and size, it would pass for the next text's
    return packages


@pytest.mark.slow
def test_is_done_once(environment, packages, tmp_path):
    works = WORKS.format(folder=tmp_path)
    command = [*PROGRAM, "--heads", "4", "2", "64", "--capability", "9.0"]
    done = []
    for interface, together in ((works + "    raise RuntimeError", 2), (works, 1), (works, 1)):
        (packages / "flash_attn/cute/interface.py").write_text(interface)
        programs = [subprocess.Popen(command, env=environment) for _ in range(together)]
        codes = sorted(program.wait() for program in programs)
        done.append((codes, len(list((tmp_path / "QUACK_CACHE_DIR").glob("precompiled-*-9.0")))))
    # What failed is tried again, but not by who waited for it.
    assert done == [([0, 1], 0), ([0], 1), ([0], 1)]
    assert (tmp_path / "forward").read_text() == (tmp_path / "backward").read_text() == "xx"
    executable(tmp_path / "bin/nvidia-smi", "#!/bin/sh\necho 8.0\n")  # by itself it finds out that this is no Hopper
    environment["PATH"] = f"{tmp_path / 'bin'}:{environment['PATH']}"
    subprocess.run([*PROGRAM, "--heads", "8", "2", "64"], env=environment, check=True)
    assert (tmp_path / "forward").read_text() == "xx"
    assert not list((tmp_path / "QUACK_CACHE_DIR").glob("precompiled-*-8.0"))  # nothing was to be done

    # What another cache lacks is compiled into it; and a child dies with its parent.
    (packages / "flash_attn/cute/interface.py").write_text(works + HANGS)
    environment["FLASH_ATTENTION_CUTE_DSL_CACHE_DIR"] = str(tmp_path / "other")
    program = subprocess.Popen(command, env=environment)
    assert within(60, lambda: (tmp_path / "child").exists() and (tmp_path / "child").read_text())
    program.kill()
    program.wait()
    child = Path("/proc") / (tmp_path / "child").read_text().strip()
    # Where no init reaps orphans, a dead one stays as a zombie.
    assert within(5, lambda: not child.exists() or "State:\tZ" in (child / "status").read_text())


def within(seconds: float, holds: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


@pytest.mark.slow
def test_quack_alone(environment, packages, tmp_path):
    pytest.importorskip("triton")
    shutil.rmtree(packages / "flash_attn_4-0.0.dist-info")
    shutil.rmtree(packages / "flash_attn")
    gemm = f"""
from types import SimpleNamespace

def write(*args, **kwargs):
    open("{tmp_path}/called", "a").write("x")

gemm_tuned = gemm_gated_tuned = gemm_dgated_tuned = SimpleNamespace(fn=write)
"""
    for name, text in {
        "quack/gemm_config.py": "GemmConfig = dict",
        "quack/gemm_interface.py": gemm,
        "quack_kernels-0.0.dist-info/METADATA": "Name: quack-kernels\nVersion: 0.0\n",
    }.items():
        (packages / name).parent.mkdir(exist_ok=True)
        (packages / name).write_text(text)
    subprocess.run([*PROGRAM, "--heads", "4", "2", "64", "--capability", "9.0"], env=environment, check=True)
    assert (tmp_path / "called").read_text() == "xxxx"


MISSES = """
import triton

misses = []
def listener(src, metadata, metadata_group, times, cache_hit):
    if not cache_hit:
        misses.append(src.name)
triton.knobs.compilation.listener = listener
"""


@pytest.mark.slow
def test_triton_compiles_without_a_gpu(environment, tmp_path):
    """For the named GPU; and the second time finds all of it. That a launcher fails is seen."""
    pytest.importorskip("triton")
    code = MISSES + (
        "from lit_gpt.config import Config\n"
        "from lit_gpt.precompile import triton_kernels\n"
        "try:\n"
        "    triton_kernels(Config.from_name('tiny_LLaMA_120M'), 80)\n"
        "finally:\n"
        "    print(sorted(set(misses)))"
    )

    def run() -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)

    done = run()
    assert done.returncode == 0, done.stderr
    first = done.stdout
    environment |= {"TRITON_LIBCUDA_PATH": str(tmp_path), "CC": "/bin/false"}
    done = run()
    assert done.returncode and "CalledProcessError" in done.stderr
    second = done.stdout
    for name in (
        "_add_rms_norm_forward",
        "_add_rms_norm_backward",
        "_split_rope",
        "_swiglu_backward",
        "_cross_entropy",
    ):
        assert name in first
    assert second == "[]\n"
    ptx = [path.read_text() for path in Path(environment["TRITON_CACHE_DIR"]).rglob("*.ptx")]
    assert ptx and all(".target sm_80" in text for text in ptx)


STEP = """
import os
from pathlib import Path

import torch

from lit_gpt.config import Config
from lit_gpt.kernels import select_kernels
from lit_gpt.model import GPT


def compiled():
    return sum(len(list(Path(os.environ[v]).rglob("*.o"))) for v in
               ("QUACK_CACHE_DIR", "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR"))


before = compiled()
device = torch.device("cuda")
config = Config.from_name("tiny_LLaMA_120M", n_layer=2)
heads = (config.n_head, config.n_query_groups, config.head_size)
selected = select_kernels("quack+fa4", device=device, dtype=torch.bfloat16, heads=heads)
with device:
    model = GPT(config, selected)
model.init_weights(1)
model.compute_in(torch.bfloat16)
tokens = torch.randint(512, (2, 2049), device=device)
for _ in range(2):
    model(tokens[:, :-1], tokens[:, 1:]).backward()
torch.cuda.synchronize()
print(before, "before,", compiled(), "after; of Triton", misses)
"""


@pytest.mark.gpu
def test_what_was_compiled_is_what_a_step_calls(environment):
    """In a process that finds what the program left, no kernel of a step is compiled."""
    device = torch.device("cuda")
    if _usable("quack", device, torch.bfloat16) or usable("fa4", device, torch.bfloat16):
        pytest.skip("flash-attn-4 or quack-kernels is missing")
    subprocess.run([*PROGRAM, "--model", "tiny_LLaMA_120M"], env=environment, check=True)
    done = subprocess.run([sys.executable, "-c", MISSES + STEP], capture_output=True, text=True, env=environment)
    assert done.stdout == "8 before, 8 after; of Triton []\n", done.stderr[-2000:]
