"""Any text to packed shards, and a check of shards that exist.

python scripts/prepare_dataset.py --source_path my/texts --tokenizer_path tokenizer/llama2 --destination_path data/mine
python scripts/prepare_dataset.py --source_path hf:roneneldan/TinyStories --split validation ...
python scripts/prepare_dataset.py --verify data/mine
python scripts/prepare_dataset.py --verify data/mine --document 17 --tokenizer_path tokenizer/llama2
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from lit_gpt.prepare import PrepareArgs, prepare
from lit_gpt.shards import HEADER_SIZE, Manifest, TokenStream, read_manifest
from lit_gpt.text_sources import ANY_TEXT, Fields, Filter
from lit_gpt.tokenizer import Tokenizer


@dataclass
class PrepareDatasetArgs(PrepareArgs):
    """Any text to packed shards `{prefix}_{n}.bin` and their manifest; with --verify a check of such shards."""

    source_path: Path | None = None
    """Folder or file: jsonl and txt (also .zst, .gz), parquet, arrow; or hf:NAME, a data set of the Hugging Face hub
    (or a folder) that the `datasets` library opens."""
    tokenizer_path: Path | None = None
    """Folder or file of the tokenizer: tokenizer.model or tokenizer.json."""
    destination_path: Path | None = None
    """Folder for the shards."""
    prefix: str = "train"
    """Name of the shards."""
    text_key: str = "text"
    """Where the text of a record is; dots go into nested objects."""
    filter: list[str] | str | None = None
    """Which records to take, by their metadata: key=value keeps, key!=value leaves out; of several in brackets all have
    to hold."""
    subset_key: str | None = None
    """Metadata by which the summary counts; by default the first folder below source_path."""
    split: str = "train"
    """Split of an hf: data set."""
    verify: Path | None = None
    """Check the shards in this folder instead: checksums, ids, counts of tokens and documents."""
    document: int | None = None
    """With --verify: print this document of the prefix, counted from 0, decoded."""

    def __post_init__(self) -> None:
        if self.verify is None:
            if missing := [f"--{key}" for key in PATHS if getattr(self, key) is None]:
                raise ValueError(f"{', '.join(missing)} missing")
            super().__post_init__()
        elif self.document is not None and (self.document < 0 or self.tokenizer_path is None):
            raise ValueError("--document counts from 0 and needs --tokenizer_path to decode")


PATHS = ("source_path", "tokenizer_path", "destination_path")


def main(args: PrepareDatasetArgs) -> None:
    if args.verify is not None:
        verify(args.verify)
        if args.document is not None:
            print(decode_document(args.verify, args.prefix, args.document, Tokenizer(args.tokenizer_path)))
        return
    patterns = ANY_TEXT
    if str(args.source_path).startswith("hf:"):
        folder, patterns = dataset_files(str(args.source_path).removeprefix("hf:"), args.split)
        args = replace(args, source_path=folder)
    filters = [args.filter] if isinstance(args.filter, str) else args.filter or []
    fields = Fields(args.text_key, tuple(map(Filter.parse, filters)), args.subset_key)
    prepare(args, args.prefix, patterns, fields)


def dataset_files(name: str, split: str) -> tuple[Path, list[str]]:
    """Folder and names of the Arrow files in which `datasets` keeps a split; it downloads them first if need be."""
    try:
        import datasets
    except ImportError as error:
        raise ImportError("--source_path hf:... needs the datasets library: pip install datasets") from error
    files = [Path(file["filename"]) for file in datasets.load_dataset(name, split=split).cache_files]
    return files[0].parent, [file.name for file in files]


def verify(directory: Path) -> None:
    """Check all shards in a folder against their manifests.

    Raises: FileNotFoundError if there is no manifest; ValueError naming what is not as it should be.
    """
    prefixes = sorted(path.name.removesuffix(".manifest.json") for path in directory.glob("*.manifest.json"))
    if not prefixes:
        raise FileNotFoundError(f"--verify {directory}: no *.manifest.json in it")
    for prefix in prefixes:
        manifest = read_manifest(directory, prefix)
        if not manifest.complete:
            raise ValueError(f"{directory}/{prefix}: not complete; the command that began it goes on with it")
        TokenStream(directory, prefix, vocab_size=manifest.tokenizer["vocab_size"]).verify()
        counts = {
            "tokens": (manifest.tokens, "shards", sum(shard["tokens"] for shard in manifest.shards)),
            "documents": (manifest.documents, "shards", sum(shard["documents"] for shard in manifest.shards)),
        }
        counts["tokens of the sources"] = (manifest.tokens, "sources", sum(s["tokens"] for s in manifest.sources))
        if mark := document_mark(manifest):
            found = sum(int((tokens == mark[0]).sum()) for tokens in shards(directory, manifest))
            counts["delimiters"] = (manifest.documents * mark[1], "shards", found)
        for what, (expected, where, found) in counts.items():
            if expected != found:
                raise ValueError(f"{directory}/{prefix}: {found:,} {what} in the {where}, not {expected:,}")
        print(
            f"{directory}/{prefix}: {len(manifest.shards):,} shards, {manifest.documents:,} documents, "
            f"{manifest.tokens:,} tokens: all as the manifest says"
        )


def document_mark(manifest: Manifest) -> tuple[int, int] | None:
    """The id that marks documents, and how many times each has it; None when nothing does."""
    bos, eos = manifest.tokenizer["bos_id"], manifest.tokenizer["eos_id"]
    marks = {"bos+eos": (bos, 1 + (bos == eos)), "bos": (bos, 1), "eos": (eos, 1), "none": None}
    return marks[manifest.delimiters]


def shards(directory: Path, manifest: Manifest):
    """The tokens of one shard after the other."""
    for shard in manifest.shards:
        yield np.memmap(directory / shard["file"], manifest.dtype, mode="r", offset=HEADER_SIZE)


def decode_document(directory: Path, prefix: str, number: int, tokenizer: Tokenizer) -> str:
    """The text of document `number` of a prefix. Raises: ValueError when it does not exist or cannot be found."""
    manifest = read_manifest(directory, prefix)
    if manifest is None:
        raise FileNotFoundError(f"--verify {directory}: no {prefix}.manifest.json in it; name one with --prefix")
    if tokenizer.sha256 != manifest.tokenizer["sha256"]:
        raise ValueError(f"{tokenizer.path}: not the tokenizer that made {directory}/{prefix}")
    mark = document_mark(manifest)
    if mark is None:
        raise ValueError(f"{directory}/{prefix}: made with --delimiters none, so nothing tells where a document begins")
    if number >= manifest.documents:
        raise ValueError(f"--document {number}: {directory}/{prefix} has {manifest.documents:,} documents")
    # A BOS opens the document that it marks, an EOS closes it.
    first = number * mark[1] - (manifest.delimiters == "eos")
    last = first + mark[1]
    seen, offset, begin, end = 0, 0, 0, manifest.tokens
    for tokens in shards(directory, manifest):
        places = np.flatnonzero(tokens == mark[0])
        if seen <= first < seen + len(places):
            begin = offset + int(places[first - seen])
        if seen <= last < seen + len(places):
            end = offset + int(places[last - seen])
            break
        seen, offset = seen + len(places), offset + len(tokens)
    stream = TokenStream(directory, prefix, vocab_size=tokenizer.vocab_size)
    return tokenizer.decode(stream.read(np.array([begin]), end - begin, fill=0)[0])


if __name__ == "__main__":
    from lit_gpt.cli import one_line_errors, parse

    with one_line_errors():
        main(parse(PrepareDatasetArgs))
