from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="lit_gpt",
    version="0.1.0",
    description="TinyLlama, done again and done right: pretrain a small Llama from raw text",
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["lit_gpt", "lit_gpt.*"]),
    package_data={"lit_gpt": ["*.html"]},
    # Ranges that should work; requirements.txt pins what was tested.
    install_requires=[
        "torch>=2.11",
        "lightning-fabric>=2.5",
        "numpy>=1.26",
        "jsonargparse[signatures]>=4.40",
        "sentencepiece>=0.2",
        "protobuf>=4",
        "gigatoken>=0.10",
        "tokenizers>=0.21",
        "transformers>=4.50",
        "safetensors>=0.5",
        "pyarrow>=17",
        "zstandard>=0.23",
        "msgspec>=0.19",
        "xxhash>=3.4",
        "tqdm>=4.66",
        "matplotlib>=3.8",
        "fsspec>=2024.6",
        "click>=8",
    ],
    extras_require={
        "gpu": ["flash-attn", "xformers"],
        "gguf": ["gguf>=0.17"],
        "eval": ["lm-eval>=0.4.13,<0.5"],
        "chat": ["gradio>=6", "bm25s>=0.2"],
        "qlora": ["bitsandbytes>=0.45"],
        "wandb": ["wandb"],
        "remote": ["s3fs>=2024.6"],
        "dev": ["pytest>=8", "pytest-timeout>=2.3", "pytest-xdist>=3.6", "hypothesis>=6.100", "ruff>=0.9"],
    },
    entry_points={"console_scripts": ["lightning = lit_gpt.lightning_cli:main"]},
)
