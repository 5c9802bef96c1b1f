"""Who may import whom: within lit_gpt only what stands earlier in this list; runnable folders never each other."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ORDER = [
    # floor 0
    *("config", "kernels", "tokenizer", "text_sources", "shards", "mix", "packed_dataset", "optim", "sharding"),
    *("cluster", "cli", "metrics"),
    *("interrupt", "hub"),
    # floor 1
    *("model", "int8", "prepare", "weights", "hf_tokenizer", "hf", "gguf_file", "speed_monitor", "chat_template"),
    *("chat_data", "precompile"),
    # floor 2
    *("checkpoint", "lora", "pretrained", "model_card", "hf_folder", "release", "decoder", "generate", "perplexity"),
    *("scoring", "sandbox", "evaluation", "contamination", "report", "speculative", "retrieval", "chat"),
    "lightning_cli",
]
RUNNABLE = ("pretrain", "scripts", "sft", "speculative_decoding", "chat_gradio", "phone")


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def test_every_module_has_its_place():
    present = {p.stem for p in (ROOT / "lit_gpt").glob("*.py")} | {"kernels"}
    assert present - {"__init__"} <= set(ORDER)


@pytest.mark.parametrize("path", sorted((ROOT / "lit_gpt").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path):
    module = path.relative_to(ROOT / "lit_gpt").parts[0].removesuffix(".py")
    below = ORDER[: ORDER.index(module)] if module in ORDER else ["config"]
    used = {name.split(".")[1] for name in imports(path) if name.startswith("lit_gpt.")}
    not_modules = {name for name in used if name not in ORDER}  # from lit_gpt import Config
    assert used - not_modules <= {*below, module}


@pytest.mark.parametrize("folder", RUNNABLE)
def test_runnable_folders_import_the_library_alone(folder):
    for path in (ROOT / folder).glob("*.py"):
        assert not {name.split(".")[0] for name in imports(path)} & {*RUNNABLE, "tests"}, path


def test_importing_the_library_needs_torch_alone():
    heavy = {
        "lightning_fabric",
        "transformers",
        "sentencepiece",
        "tokenizers",
        "pyarrow",
        "matplotlib",
        "triton",
        "wandb",
    }
    code = f"import sys, lit_gpt, lit_gpt.model; sys.exit(', '.join({heavy} & set(sys.modules)) or 0)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
