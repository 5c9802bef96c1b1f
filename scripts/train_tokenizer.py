"""Train a byte-pair tokenizer on raw text.

python scripts/train_tokenizer.py --source_path data/raw --destination_path data/tokenizer --vocab_size 8192

`--kind sentencepiece` makes a tokenizer.model as Llama 2 has it (spaces kept as they are, digits one by one, bytes for
characters it does not know); `--kind tokenizers` a tokenizer.json as Llama 3 has it.
"""

import io
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lit_gpt.text_sources import ANY_TEXT, Fields, find_files, open_source
from lit_gpt.tokenizer import LLAMA3_PATTERN, Tokenizer

MAX_LINE = 4096
"""Characters of the longest piece of text that sentencepiece is shown (it leaves longer lines out)"""

BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"


@dataclass
class TrainTokenizerArgs:
    """Train a byte-pair tokenizer on raw text."""

    source_path: Path
    """Folder or file of raw text: jsonl and txt (also .zst, .gz), parquet, arrow."""
    destination_path: Path
    """Folder for tokenizer.model or tokenizer.json."""
    vocab_size: int = 32_000
    """Number of ids, delimiters and bytes included."""
    kind: Literal["sentencepiece", "tokenizers"] = "sentencepiece"
    """As Llama 2 or as Llama 3."""
    text_keys: list[str] = field(default_factory=lambda: ["text", "content"])
    """Where the text of a record is; the first of these that a file has."""
    max_characters: int = 100_000_000
    """Of text to train on, taken from all files evenly."""
    overwrite: bool = False
    """Replace the tokenizer that is in destination_path."""


def main(args: TrainTokenizerArgs) -> None:
    """Raises: FileNotFoundError without input, ValueError for input that cannot be read or is too little."""
    name = {"sentencepiece": "tokenizer.model", "tokenizers": "tokenizer.json"}[args.kind]
    out_file = args.destination_path / name
    if out_file.exists() and not args.overwrite:
        raise ValueError(f"{out_file} exists; --overwrite true replaces it")
    files = find_files(args.source_path, ANY_TEXT)
    texts = sample(files, args.text_keys, args.max_characters)
    train = {"sentencepiece": train_sentencepiece, "tokenizers": train_tokenizers}[args.kind]
    content = train(texts, args.vocab_size)

    args.destination_path.mkdir(parents=True, exist_ok=True)
    temporary = out_file.with_name(name + ".tmp")
    temporary.write_bytes(content)
    os.replace(temporary, out_file)
    if args.kind == "tokenizers":  # its file does not say which tokens are the delimiters
        config = {"bos_token": BOS, "eos_token": EOS, "tokenizer_class": "PreTrainedTokenizerFast"}
        (args.destination_path / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")
    print(f"{out_file}: {Tokenizer(out_file).describe()}")


def sample(files: list[Path], text_keys: list[str], max_characters: int) -> Iterator[str]:
    """Documents of all files, of each about as much, from its beginning."""
    from tqdm import tqdm

    for path in tqdm(files, desc="reading", unit="file"):
        left = max(max_characters // len(files), 1)
        source = open_source(path)
        fields = next((f for f in map(Fields, text_keys) if source.read(0, f).texts), None)
        if fields is None:
            raise ValueError(f"{path}: no text in it under {' or '.join(text_keys)}; name its key with --text_keys")
        index, last = 0, False
        while left > 0 and not last:
            unit = source.read(index, fields)
            for text in unit.texts:
                yield text[:left]
                left -= len(text)
                if left <= 0:
                    break
            index, last = index + 1, unit.last


def train_sentencepiece(texts: Iterator[str], vocab_size: int) -> bytes:
    """A tokenizer.model with the settings of Llama 2's."""
    import sentencepiece

    pieces = (
        line[i : i + MAX_LINE] for text in texts for line in text.split("\n") for i in range(0, len(line), MAX_LINE)
    )
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=pieces,
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            max_sentence_length=4 * MAX_LINE,
            character_coverage=0.99995,
            byte_fallback=True,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            num_threads=os.cpu_count(),
            minloglevel=2,
        )
    except RuntimeError as error:
        # "... too high (32000). Please set it to a value <= 4940.", "... smaller than required_chars. 200 vs 355. ..."
        if size := re.search(r"(?:<=|vs) (\d+)", str(error)):
            raise wrong_size(vocab_size, int(size[1])) from error
        raise ValueError(f"--vocab_size {vocab_size}: {str(error).splitlines()[-1]}") from error
    return model.getvalue()


def wrong_size(vocab_size: int, possible: int) -> ValueError:
    """What to say to a vocabulary that this text cannot have; `possible` is the next one that it can."""
    if vocab_size > possible:
        return ValueError(f"--vocab_size {vocab_size}: the text is enough for {possible}; give that, or more text")
    return ValueError(f"--vocab_size {vocab_size}: delimiters, bytes and characters of the text alone are {possible}")


def train_tokenizers(texts: Iterator[str], vocab_size: int) -> bytes:
    """A byte-level tokenizer.json that cuts text as Llama 3 does."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, as_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise wrong_size(vocab_size, tokenizer.get_vocab_size())
    return tokenizer.to_str().encode()


if __name__ == "__main__":
    from lit_gpt.cli import one_line_errors, parse

    with one_line_errors():
        main(parse(TrainTokenizerArgs))
