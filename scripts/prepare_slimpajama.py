"""SlimPajama to packed shards: `source_path/{split}/*/*.jsonl.zst` without its GitHub documents.

python scripts/prepare_slimpajama.py --source_path SlimPajama --tokenizer_path tokenizer/llama2 \
    --destination_path data/slim --split train
"""

from dataclasses import dataclass
from typing import Literal

from lit_gpt.prepare import PrepareArgs, prepare
from lit_gpt.text_sources import Fields, Filter


@dataclass
class SlimPajamaArgs(PrepareArgs):
    """SlimPajama to packed shards `{split}_slimpajama_{n}.bin` and their manifest."""

    split: Literal["train", "validation", "test"] = "train"
    """Folder below source_path."""


def main(args: SlimPajamaArgs) -> None:
    # The code of the mix comes from StarCoder, so SlimPajama's own is left out.
    filters = (Filter("meta.redpajama_set_name", equal=False, value="RedPajamaGithub"),)
    fields = Fields("text", filters, subset="meta.redpajama_set_name")
    prepare(args, f"{args.split}_slimpajama", [f"{args.split}/*/*.jsonl.zst"], fields)


if __name__ == "__main__":
    from lit_gpt.cli import one_line_errors, parse

    with one_line_errors():
        main(parse(SlimPajamaArgs))
