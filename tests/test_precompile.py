"""Kernels that are compiled ahead: by the right process, once, and the very ones that a step calls."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lit_gpt import precompile
from lit_gpt.kernels import _usable
from lit_gpt.kernels.attention import usable

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
    for argv, model in {
        "": "tiny_LLaMA_1b",
        "--micro_batch_size 4 --model tiny_LLaMA_120M --devices 1": "tiny_LLaMA_120M",
        "--model=pythia-160m": "pythia-160m",
        "--model_overrides.n_layer 4": "tiny_LLaMA_1b",
        "--model no-such": "tiny_LLaMA_1b",
        f"--config {tmp_path}/run.yaml": "tinyllama3_2b",
        f"--config={tmp_path}/run.yaml": "tinyllama3_2b",
        f"--config {tmp_path}/missing.yaml": "tiny_LLaMA_1b",
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
    for argv in (["--help"], ["--plan", "8xH100"], ["--plan=8xH100"], ["--kernels", "triton"], ["--kernels=[]"]):
        precompile.begin(["tinyllama.py", *argv])
    precompile.begin(["benchmark.py", "--kernels", "[triton, auto]", "--model", "tiny_LLaMA_120M"])
    for _ in range(100):
        time.sleep(0.1)
        if called.exists() and called.read_text():
            break
    assert called.read_text() == "-m lit_gpt.precompile --model tiny_LLaMA_120M\n"


@pytest.mark.slow
def test_is_done_once(environment, tmp_path):
    """With a flash-attn-4 whose functions are written here, as on a machine with a Hopper GPU."""
    works = f"""
def _flash_attn_fwd(q, k, v, causal, return_lse):
    assert (q.shape, k.shape, q.device.type) == ((1, 256, 4, 64), (1, 256, 2, 64), "cuda")
    open("{tmp_path}/forward", "a").write("x")


def _flash_attn_bwd(q, k, v, out, dout, lse, causal):
    open("{tmp_path}/backward", "a").write("x")
"""
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
    left = []
    for interface in (works + "    raise RuntimeError", works, works):
        (packages / "flash_attn/cute/interface.py").write_text(interface)
        subprocess.run([*PROGRAM, "--heads", "4", "2", "64", "--capability", "9.0"], env=environment)
        left.append(len(list((tmp_path / "QUACK_CACHE_DIR").glob("precompiled-*"))))
    assert left == [0, 1, 1]  # what failed is tried again
    assert (tmp_path / "forward").read_text() == (tmp_path / "backward").read_text() == "xx"
    executable(tmp_path / "bin/nvidia-smi", "#!/bin/sh\necho 8.0\n")  # by itself it finds out that this is no Hopper
    environment["PATH"] = f"{tmp_path / 'bin'}:{environment['PATH']}"
    subprocess.run([*PROGRAM, "--heads", "8", "2", "64"], env=environment, check=True)
    assert (tmp_path / "forward").read_text() == "xx"


MISSES = """
import triton

misses = []
def listener(src, metadata, metadata_group, times, cache_hit):
    if not cache_hit:
        misses.append(src.name)
triton.knobs.compilation.listener = listener
"""


@pytest.mark.slow
def test_triton_compiles_without_a_gpu(environment):
    """For the named GPU; and the second time finds all of it."""
    pytest.importorskip("triton")
    code = MISSES + (
        "from lit_gpt.config import Config\n"
        "from lit_gpt.precompile import triton_kernels\n"
        "triton_kernels(Config.from_name('tiny_LLaMA_120M'), 80)\n"
        "print(sorted(set(misses)))"
    )
    first, second = (
        subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True).stdout
        for _ in range(2)
    )
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
