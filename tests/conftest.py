"""Order and fixtures of the tests: fast ones first, GPU and shared-data ones skip where they cannot run."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    # Read when triton is first imported, by whichever test that is: our kernels then run in its interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared" / "data"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
        if item.get_closest_marker("shared") and not SHARED.is_dir():
            item.add_marker(pytest.mark.skip(reason=f"needs {SHARED}"))


@pytest.fixture
def shared_data() -> Path:
    """The folder of real data beside the project; mark tests that use it `shared`."""
    return SHARED


@pytest.fixture
def tokenizer_cache(tmp_path_factory, monkeypatch) -> None:
    """Converted tokenizers are kept in a folder of this session, not in the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory) -> Path:
    """A real model of 135M parameters as a Hugging Face folder, made from a download; without one the test skips."""
    pytest.importorskip("gguf")
    folder = tmp_path_factory.mktemp("smollm2")
    script = SHARED / "models" / "smollm2-135m-instruct" / "make_hf_checkpoint.py"
    made = subprocess.run([sys.executable, script, folder], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"could not be made, it needs a download: {made.stderr[-200:]}")
    return folder


@pytest.fixture(scope="session")
def llama3(tmp_path_factory) -> Path:
    """Llama 3's own tokenizer.model, from Meta's package of 7 MB; without a download the test skips."""
    folder = tmp_path_factory.mktemp("llama3")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, "llama-models==0.3.0"]
    made = subprocess.run(pip, capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"could not be downloaded: {made.stderr[-200:]}")
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        (folder / "tokenizer.model").write_bytes(wheel.read("llama_models/llama3/tokenizer.model"))
    return folder / "tokenizer.model"


@pytest.fixture
def interpreted(monkeypatch):
    """Triton's kernels run here: on a GPU, or in the interpreter."""
    pytest.importorskip("triton", reason="these kernels need triton")
    from triton import knobs
    from triton.runtime import interpreter

    if torch.cuda.is_available():
        return
    if not knobs.runtime.interpret:
        pytest.skip("triton was imported without TRITON_INTERPRET=1")
    patch = interpreter._patch_lang_tensor

    def patch_index(tensor, scope):
        """Bounds of a loop are arrays of one element there, which numpy 2.4 no longer takes for an index."""
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch_index)
