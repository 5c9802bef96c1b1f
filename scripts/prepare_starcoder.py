"""StarCoderData to packed shards: column `content` of `source_path/**/*.parquet`.

python scripts/prepare_starcoder.py --source_path starcoderdata --tokenizer_path tokenizer/llama2 \
    --destination_path data/star --split train
"""

from dataclasses import dataclass

from lit_gpt.prepare import PrepareArgs, prepare
from lit_gpt.text_sources import Fields


@dataclass
class StarCoderArgs(PrepareArgs):
    """StarCoderData to packed shards `{split}_starcoder_{n}.bin` and their manifest."""

    split: str = "train"
    """Name of the shards; StarCoderData itself is not split."""


def main(args: StarCoderArgs) -> None:
    prepare(args, f"{args.split}_starcoder", ["**/*.parquet"], Fields("content"))


if __name__ == "__main__":
    from lit_gpt.cli import one_line_errors, parse

    with one_line_errors():
        main(parse(StarCoderArgs))
