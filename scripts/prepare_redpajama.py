"""RedPajama-1T, or its sample, to packed shards: field `text`, each of the seven sets (each file of the sample) under a
prefix of its own, so that training can mix them.

python scripts/prepare_redpajama.py --source_path RedPajama-Data-1T-Sample --tokenizer_path tokenizer/llama2 \
    --destination_path data/redpajama_sample
python scripts/prepare_redpajama.py --source_path RedPajama-Data-1T --sample false --match wikipedia ...
"""

from dataclasses import dataclass

from lit_gpt.prepare import PrepareArgs, prepare, select_files
from lit_gpt.text_sources import Fields, find_files

SETS = {
    "arxiv": "arxiv/arxiv*.jsonl",
    "book": "book/book*.jsonl",
    "c4": "c4/c4-train*.jsonl",
    "common_crawl": "common_crawl/**/*.jsonl.zst",
    "github": "github/filtered*.jsonl",
    "stackexchange": "stackexchange/stackexchange*.jsonl",
    "wikipedia": "wikipedia/wiki*.jsonl",
}
"""Where the files of each set are"""
SAMPLE = "*_sample.jsonl"


@dataclass
class RedPajamaArgs(PrepareArgs):
    """RedPajama to packed shards `{set}_{n}.bin` and a manifest for each set."""

    sample: bool = True
    """Whether it is the sample, one file a set, or everything."""
    match: str = ""
    """Take only the sets with this in their name."""


def main(args: RedPajamaArgs) -> None:
    sets = {path.stem: path.name for path in find_files(args.source_path, [SAMPLE])} if args.sample else SETS
    sets = {name: pattern for name, pattern in sets.items() if args.match in name}
    if not sets:
        raise ValueError(f"--match {args.match}: no set has this in its name")
    for pattern in sets.values():
        select_files(args, [pattern])  # what is missing is said before hours of work on the others
    for name, pattern in sets.items():
        prepare(args, name, [pattern], Fields("text"))


if __name__ == "__main__":
    from lit_gpt.cli import one_line_errors, parse

    with one_line_errors():
        main(parse(RedPajamaArgs))
