"""RedPajama-1T (or its sample) to packed shards: field `text` of all jsonl files, counted by folder.

python scripts/prepare_redpajama.py --source_path RedPajama-Data-1T --tokenizer_path tokenizer/llama2 \
    --destination_path data/redpajama --filenames_subset '[arxiv, book, c4, common_crawl, stackexchange, wikipedia]'
"""

from dataclasses import dataclass

from lit_gpt.prepare import PrepareArgs, prepare
from lit_gpt.text_sources import Fields


@dataclass
class RedPajamaArgs(PrepareArgs):
    """RedPajama to packed shards `{split}_redpajama_{n}.bin` and their manifest."""

    split: str = "train"
    """Name of the shards; RedPajama itself is not split."""


def main(args: RedPajamaArgs) -> None:
    prepare(args, f"{args.split}_redpajama", ["**/*.jsonl", "**/*.jsonl.zst"], Fields("text"))


if __name__ == "__main__":
    from lit_gpt.cli import one_line_errors, parse

    with one_line_errors():
        main(parse(RedPajamaArgs))
