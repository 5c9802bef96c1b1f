"""Order and fixtures of the tests: fast ones first, GPU and shared-data ones skip where they cannot run."""

import os
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
