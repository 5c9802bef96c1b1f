"""Tokenizer files that transformers' AutoTokenizer loads and that give the ids which the model was trained on.

    special_ids = export_tokenizer(Path("data/llama2/tokenizer.model"), folder, add_bos=True, max_length=2048)

A bare sentencepiece tokenizer.model is not enough: transformers 5 rebuilds a tokenizer from its vocabulary by rules of
its own, and every fifth document of real text comes out with other ids. So we write tokenizer.json, which says exactly
what to do, and compare.
"""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from lit_gpt.tokenizer import LLAMA3_PATTERN, TORTURE, Tokenizer, byte_letters
from lit_gpt.weights import read_json, write_json

if TYPE_CHECKING:
    import tokenizers
    from sentencepiece import sentencepiece_model_pb2

FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)

# Types of a sentencepiece piece (sentencepiece_model.proto)
NORMAL, CONTROL, USER_DEFINED, BYTE, BPE = 1, 3, 4, 6, 2
LLAMA3_PAD = "<|reserved_special_token_2|>"  # the id that Llama 3.1 calls <|finetune_right_pad_id|>


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy what belongs to the tokenizer in `source`, a folder or a file of it, and nothing else."""
    directory = source.parent if source.is_file() else source
    for name in FILES:
        if (directory / name).is_file():
            shutil.copyfile(directory / name, folder / name)
    if source.is_file() and not (folder / source.name).exists():
        shutil.copyfile(source, folder / f"tokenizer{source.suffix}")  # under whatever name it had


def starts_with_bos(source: Path) -> bool:
    """Whether the tokenizer in `source` puts BOS before a text when transformers uses it, as its files say; where they
    do not say, as Llama's tokenizer.model does."""
    reference = Tokenizer(source)
    if reference.bos_id is None:
        return False
    directory = reference.path.parent
    if (directory / "tokenizer.json").is_file():
        import tokenizers

        return tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json")).encode("a").ids[0] == reference.bos_id
    config = directory / "tokenizer_config.json"
    return read_json(config).get("add_bos_token", True) if config.is_file() else True


def export_tokenizer(source: Path, folder: Path, *, add_bos: bool, max_length: int) -> dict[str, int]:
    """Write the tokenizer in `source` (a folder, a tokenizer.model or a tokenizer.json) for AutoTokenizer.

    Args:
        folder: exists; tokenizer.json, tokenizer_config.json and generation_config.json are written there, and
            tokenizer.model too if there is one.
        add_bos: whether encoding puts BOS first, as the training data had it; a source that is already in Hugging
            Face's form keeps its own rule.
        max_length: tokens that the model takes.

    Returns:
        bos_token_id, eos_token_id and pad_token_id, those that exist, for the model's configuration.

    Raises:
        FileNotFoundError, ValueError: not a tokenizer, one that tokenizer.json cannot express, or one whose ids come
            out differently.
    """
    reference = Tokenizer(source)
    described = reference.path.with_name("tokenizer_config.json")
    described = read_json(described) if described.is_file() else None
    copy_tokenizer(source, folder)
    if (folder / "tokenizer.json").is_file() and described is not None:
        # Already in their form. GPT2Tokenizer, LlamaTokenizer and others rebuild themselves in transformers 5 from the
        # vocabulary; this class takes tokenizer.json at its word.
        config = {**described, "tokenizer_class": "PreTrainedTokenizerFast"}
        pad_id = None
    else:
        converted = as_tokenizers(reference)
        names = {
            key: converted.id_to_token(i)
            for key, i in (("bos_token", reference.bos_id), ("eos_token", reference.eos_id))
            if i is not None
        }
        if converted.model.unk_token is not None:
            # Padding must be a token that training never asks for, which EOS is not; the vocabulary keeps its size.
            names |= {"unk_token": converted.model.unk_token, "pad_token": converted.model.unk_token}
        elif LLAMA3_PAD in reference.special:
            names["pad_token"] = LLAMA3_PAD
        pad_id = converted.token_to_id(names["pad_token"]) if "pad_token" in names else None
        if add_bos and reference.bos_id is not None:
            _prepend_bos(converted, names["bos_token"], reference.bos_id)
        converted.save(str(folder / "tokenizer.json"))
        template = (described or {}).get("chat_template")
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **names,
            "model_max_length": max_length,
            "clean_up_tokenization_spaces": False,
            # A "</s>" in a text is four characters, as it was in training; but a chat template writes real ones.
            "split_special_tokens": template is None and not (folder / "chat_template.jinja").is_file(),
            **({"chat_template": template} if template else {}),
        }
    write_json(folder / "tokenizer_config.json", config)

    ids = {"bos_token_id": reference.bos_id, "eos_token_id": reference.eos_id, "pad_token_id": pad_id}
    ids = {name: i for name, i in ids.items() if i is not None}
    if not (folder / "generation_config.json").is_file():
        write_json(folder / "generation_config.json", ids)
    verify_tokenizer(reference, folder)
    return ids


def verify_tokenizer(reference: Tokenizer, folder: Path, texts: list[str] = TORTURE) -> None:
    """Raise ValueError naming the first text whose ids AutoTokenizer (without transformers: tokenizers) gets wrong."""
    try:
        from transformers import AutoTokenizer
    except ImportError:
        import tokenizers

        raw = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        raw.encode_special_tokens = True

        def encode(text: str) -> list[int]:
            return raw.encode(text, add_special_tokens=False).ids
    else:
        theirs = AutoTokenizer.from_pretrained(folder)

        def encode(text: str) -> list[int]:
            return theirs(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]

    for text in texts:
        want, got = reference.encode(text, bos=False, eos=False), encode(text)
        if want != got:
            raise ValueError(
                f"{reference.path}: the exported tokenizer gives other ids on {text[:40]!r}: {got[:8]}, not {want[:8]}"
            )


def as_tokenizers(tokenizer: Tokenizer) -> "tokenizers.Tokenizer":
    """The same tokenizer in the tokenizers library, whatever file it came from.

    Raises:
        ValueError: it has a property that the library does not have.
    """
    import tokenizers

    if tokenizer.path.suffix == ".json":
        return tokenizers.Tokenizer.from_file(str(tokenizer.path))
    ranks = getattr(tokenizer.model, "ranks", None)
    return from_sentencepiece(tokenizer.path) if ranks is None else from_tiktoken(ranks, tokenizer.special)


def from_tiktoken(ranks: dict[bytes, int], special: dict[str, int]) -> "tokenizers.Tokenizer":
    """The tokenizers library's equivalent of Llama 3's ranks.

    tiktoken joins the two neighbours whose union has the lowest rank, the leftmost of equals. As merges: every way to
    cut a token in two, lowest rank first, and of those the cut whose own parts have the lowest.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    letters = byte_letters()
    merges = [
        (rank, ranks[token[:cut]], ranks[token[cut:]], token[:cut], token[cut:])
        for token, rank in ranks.items()
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    ]

    def written(token: bytes) -> str:
        return token.decode("latin-1").translate(letters)

    vocab = {written(token): rank for token, rank in ranks.items()} | special
    pairs = [(written(left), written(right)) for *_, left, right in sorted(merges)]
    result = Tokenizer(models.BPE(vocab, pairs, ignore_merges=True))
    split = pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    result.pre_tokenizer = pre_tokenizers.Sequence([split, as_bytes])
    result.decoder = decoders.ByteLevel()
    result.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in special])
    return result


def read_sentencepiece(path: Path) -> "sentencepiece_model_pb2.ModelProto":
    """The pieces and settings of a tokenizer.model.

    Raises:
        ValueError: not one, or not BPE with spaces marked at the beginning of a word, as Llama's is.
    """
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
    except Exception as e:  # protobuf's DecodeError, whose module differs by version
        raise ValueError(f"{path} is not a sentencepiece model") from e
    trainer, norm = proto.trainer_spec, proto.normalizer_spec
    if trainer.model_type != BPE or trainer.treat_whitespace_as_suffix or not norm.escape_whitespaces:
        raise ValueError(f"{path}: only BPE models that mark spaces at the beginning of a word can be exported")
    return proto


def from_sentencepiece(path: Path) -> "tokenizers.Tokenizer":
    """The tokenizers library's equivalent of a sentencepiece BPE model.

    Raises:
        ValueError: naming a property of the model that it does not have.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers

    proto = read_sentencepiece(path)
    trainer, norm = proto.trainer_spec, proto.normalizer_spec
    vocab = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    normal = {piece.piece: piece.score for piece in proto.pieces if piece.type in (NORMAL, USER_DEFINED)}
    # sentencepiece joins the two neighbours whose union scores best, the leftmost of equals. As merges: every way to
    # cut a piece in two, best piece first. Among the cuts of one piece tokenizers wants an order that sentencepiece
    # does not have; no text is known where it matters, and what is exported is compared.
    cuts = [(piece[:i], piece[i:]) for piece in normal for i in range(1, len(piece))]
    merges = [(left, right) for left, right in cuts if left in normal and right in normal]
    merges.sort(key=lambda m: (-normal[m[0] + m[1]], -len(m[0])))

    unk = proto.pieces[trainer.unk_id].piece
    byte_fallback = any(piece.type == BYTE for piece in proto.pieces)
    result = Tokenizer(models.BPE(vocab, merges, unk_token=unk, fuse_unk=True, byte_fallback=byte_fallback))
    steps = [normalizers.Precompiled(norm.precompiled_charsmap)] if norm.precompiled_charsmap else []
    if norm.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(" +"), " "), normalizers.Replace(Regex(r"\A "), "")]
    if norm.add_dummy_prefix:
        steps += [normalizers.Prepend("▁")]
    steps += [normalizers.Replace(" ", "▁")]
    if norm.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"▁+\z"), "")]  # at the end, a "▁" of the text itself goes too
    result.normalizer = normalizers.Sequence(steps)
    result.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        + ([decoders.Strip(" ", 1, 0)] if norm.add_dummy_prefix else [])
    )
    special = [piece.piece for piece in proto.pieces if piece.type == CONTROL or piece.piece == unk]
    result.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in special])
    own = [piece.piece for piece in proto.pieces if piece.type == USER_DEFINED]
    result.add_tokens([AddedToken(piece, normalized=False, special=False) for piece in own])
    return result


def _prepend_bos(tokenizer: "tokenizers.Tokenizer", bos: str, bos_id: int) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B:1", special_tokens=[(bos, bos_id)]
    )
