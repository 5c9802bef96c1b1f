"""Text to token ids and back: sentencepiece, tokenizers and tiktoken files behind one small interface.

    tokenizer = Tokenizer("../data/tokenizer/llama2")           # a folder or a file
    ids = tokenizer.encode("Hello", bos=True, eos=False)         # delimiters are always said, there is no default
    text = tokenizer.decode(ids)

`Tokenizer` is exact and slow: it asks the library that defines the file format. `BatchEncoder` gives the same ids for
many documents at once, about ten times faster, through a library that is checked against `Tokenizer` before it is
trusted and while it works.
"""

import binascii
import hashlib
import importlib.metadata
import json
import os
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json")
"""What is looked for in a folder. The .model comes first: a tokenizer.json is often a conversion of it, and not every
conversion splits runs of spaces as the original does."""

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Llama 3 cuts text before byte-pair encoding; its tokenizer.model holds only the ranks."""

LLAMA3_SPECIAL = (
    *("<|begin_of_text|>", "<|end_of_text|>", *(f"<|reserved_special_token_{i}|>" for i in range(4))),
    *("<|start_header_id|>", "<|end_header_id|>", "<|reserved_special_token_4|>", "<|eot_id|>"),
    *(f"<|reserved_special_token_{i}|>" for i in range(5, 251)),
)
"""The 256 ids after the ranks, which that file does not list either."""


class Tokenizer:
    """The tokenizer in `path`: a tokenizer.model (sentencepiece, or the tiktoken ranks of Llama 3), a tokenizer.json,
    or a folder that holds one of them.

    Raises: FileNotFoundError when there is none, ValueError when the file is not a tokenizer.
    """

    name: str
    """The folder's name, for people"""
    sha256: str
    """Of the file: what the manifest records and the other programs compare"""
    vocab_size: int
    """One more than the largest id"""
    bos_id: int | None
    eos_id: int | None
    special: dict[str, int]
    """Special tokens by their text; `encode` never gives them, only who asks for them by name gets them"""

    def __init__(self, path: str | Path) -> None:
        self.path = _find_file(Path(path))
        self.name = self.path.resolve().parent.name
        content = self.path.read_bytes()
        self.sha256 = hashlib.sha256(content).hexdigest()
        if self.path.suffix == ".json":
            self.model = _TokenizersModel(self.path, content)
        elif re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", content):
            self.model = _TiktokenModel(self.path, content)
        else:
            self.model = _SentencePieceModel(self.path, content)
        self.vocab_size, self.bos_id, self.eos_id = self.model.vocab_size, self.model.bos_id, self.model.eos_id
        self.special = self.model.special
        for text in self.special:
            if {self.bos_id, self.eos_id} & set(self.model.encode(text)):
                raise ValueError(f"{self.path}: {text!r} as text becomes a delimiter; mark it special in the file")

    def encode(self, text: str, *, bos: bool, eos: bool) -> list[int]:
        """The ids of `text`, with one BOS before and one EOS after it as asked.

        Text never becomes a delimiter: a "<s>" or "<|end_of_text|>" in it is encoded as the characters that it is.
        Raises: ValueError when the text is not Unicode (lone surrogates), or a delimiter does not exist here.
        """
        check_unicode(text)
        head, tail = self.delimiters(bos=bos, eos=eos)
        return head + self.model.encode(text) + tail

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids` (any sequence of integers); delimiters and other special tokens have none.

        Raises: ValueError naming an id outside the vocabulary.
        """
        ids = [int(i) for i in ids]
        if outside := [i for i in ids if not 0 <= i < self.vocab_size]:
            raise ValueError(f"{self.path}: token id {outside[0]} is outside the vocabulary [0, {self.vocab_size})")
        return self.model.decode(ids)

    def delimiters(self, *, bos: bool, eos: bool) -> tuple[list[int], list[int]]:
        """The ids to put before and after a document. Raises: ValueError when one that is asked for does not exist."""
        for wanted, token, name in ((bos, self.bos_id, "BOS"), (eos, self.eos_id, "EOS")):
            if wanted and token is None:
                raise ValueError(f"{self.path}: this tokenizer has no {name} token; choose other delimiters")
        return [self.bos_id] * bos, [self.eos_id] * eos

    def describe(self) -> dict:
        """What a manifest says about the tokenizer: name, sha256, vocab_size, bos_id, eos_id."""
        return {key: getattr(self, key) for key in ("name", "sha256", "vocab_size", "bos_id", "eos_id")}


def check_unicode(text: str) -> None:
    """Raise ValueError for a string with half a surrogate pair: it is not text, and libraries differ on its ids."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"character {error.start} is a lone surrogate (\\u{ord(text[error.start]):04x})") from None


def _find_file(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.exists():
        raise FileNotFoundError(f"tokenizer: {path} does not exist")
    for name in TOKENIZER_FILES:
        if (path / name).is_file():
            return path / name
    raise FileNotFoundError(f"tokenizer: {path} holds none of {', '.join(TOKENIZER_FILES)}")


# --- three file formats ----------------------------------------------------------------------------------------------
# Each has vocab_size, bos_id, eos_id, `special` (id of each text that other libraries take for a special token),
# encode (no delimiters), decode, and `as_json()`: the same tokenizer as the contents of a tokenizer.json, which is what
# gigatoken reads.


class _SentencePieceModel:
    def __init__(self, path: Path, content: bytes) -> None:
        import sentencepiece

        self.content = content
        try:
            self.processor = sentencepiece.SentencePieceProcessor(model_proto=content)
            self.vocab_size = self.processor.get_piece_size()
        except RuntimeError as error:
            raise ValueError(f"{path}: not a tokenizer: neither sentencepiece nor tiktoken reads it") from error
        if self.vocab_size == 0:
            raise ValueError(f"{path}: not a tokenizer: it holds no pieces")
        self.bos_id, self.eos_id = (i if i >= 0 else None for i in (self.processor.bos_id(), self.processor.eos_id()))
        ids = range(self.vocab_size)
        self.special = {self.processor.id_to_piece(i): i for i in ids if self.processor.is_control(i)}

    def encode(self, text: str) -> list[int]:
        return self.processor.encode(text)

    def decode(self, ids: list[int]) -> str:
        return self.processor.decode(ids)

    def as_json(self) -> dict:
        import gigatoken

        return gigatoken.Tokenizer.from_sentencepiece(self.content)._hf_config()


class _TokenizersModel:
    def __init__(self, path: Path, content: bytes) -> None:
        import tokenizers

        self.content = content
        try:
            self.processor = tokenizers.Tokenizer.from_str(content.decode())
        except Exception as error:  # tokenizers raises bare Exception
            raise ValueError(f"{path}: not a tokenizer: {error}") from error
        # Text that is typed must not become a special token, and we place the delimiters ourselves.
        self.processor.encode_special_tokens = True
        self.processor.no_truncation()
        self.processor.no_padding()
        self.vocab_size = max(self.processor.get_vocab().values()) + 1
        self.special = {t.content: i for i, t in self.processor.get_added_tokens_decoder().items() if t.special}
        self.bos_id = self._delimiter(path, "bos_token", ("<s>", "<|begin_of_text|>", "<bos>", "<|endoftext|>"))
        self.eos_id = self._delimiter(path, "eos_token", ("</s>", "<|end_of_text|>", "<eos>", "<|endoftext|>"))

    def _delimiter(self, path: Path, key: str, usual: tuple[str, ...]) -> int | None:
        """tokenizer_config.json beside the file says which token it is; without one, the first usual name."""
        config_file = path.with_name("tokenizer_config.json")
        if config_file.is_file():
            try:
                config = json.loads(config_file.read_bytes())
            except ValueError as error:
                raise ValueError(f"{config_file}: broken JSON ({error}); fetch it again, or delete it") from error
            token = config.get(key) if isinstance(config, dict) else config
            token = token.get("content", token) if isinstance(token, dict) else token
            if not isinstance(token, str | None):
                raise ValueError(f"{config_file}: {key} is {token!r}, not the text of a token; mend it, or delete it")
            usual = () if token is None else (token,)
        return next((i for name in usual if (i := self.processor.token_to_id(name)) is not None), None)

    def encode(self, text: str) -> list[int]:
        return self.processor.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self.processor.decode(ids, skip_special_tokens=True)

    def as_json(self) -> dict:
        return json.loads(self.content)


class _TiktokenModel:
    """Llama 3: 128,000 ranks as lines of `base64 rank`, then the special tokens."""

    def __init__(self, path: Path, content: bytes) -> None:
        try:
            import tiktoken
        except ImportError as error:
            raise ValueError(f"{path}: this is a tiktoken file; pip install tiktoken") from error

        try:
            words = content.split()
            self.ranks = dict(zip(map(binascii.a2b_base64, words[::2]), map(int, words[1::2]), strict=True))
        except ValueError as error:
            raise ValueError(f"{path}: not a tokenizer: a line is not `base64 rank`") from error
        if list(self.ranks.values()) != list(range(len(self.ranks))):
            raise ValueError(f"{path}: not a whole tokenizer: its ranks are not 0, 1, 2, ...")
        self.bos_id = len(self.ranks)
        self.eos_id = self.bos_id + 1
        self.vocab_size = self.bos_id + len(LLAMA3_SPECIAL)
        self.special = {text: self.bos_id + i for i, text in enumerate(LLAMA3_SPECIAL)}
        self.processor = tiktoken.Encoding(
            "llama3", pat_str=LLAMA3_PATTERN, mergeable_ranks=self.ranks, special_tokens={}
        )

    def encode(self, text: str) -> list[int]:
        return self.processor.encode_ordinary(text)

    def decode(self, ids: list[int]) -> str:
        return self.processor.decode([i for i in ids if i < self.bos_id])

    def as_json(self) -> dict:
        """With merges instead of ranks: of each token the two parts that it is joined from, lowest rank first.

        No others are needed. What happens inside of a token's place in a text is what happens to the token alone, since
        nothing is joined across its edges; and there only one pair of parts comes up.
        """
        letters = byte_letters()
        written = {token: token.decode("latin-1").translate(letters) for token in self.ranks}
        merges = [[written[part] for part in parts] for token in self.ranks if len(parts := self._parts(token)) == 2]
        split = {"type": "Split", "pattern": {"Regex": LLAMA3_PATTERN}, "behavior": "Isolated", "invert": False}
        as_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        vocab = {written[token]: rank for token, rank in self.ranks.items()}
        model = {"type": "BPE", "vocab": vocab, "merges": merges}
        model |= {"dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None}
        model |= {"fuse_unk": False, "byte_fallback": False, "ignore_merges": True}
        pre_tokenizer = {"type": "Sequence", "pretokenizers": [split, as_bytes]}
        content = {"version": "1.0", "added_tokens": [], "normalizer": None, "pre_tokenizer": pre_tokenizer}
        content |= {"post_processor": None, "decoder": as_bytes, "model": model, "truncation": None, "padding": None}
        return content

    def _parts(self, token: bytes) -> list[bytes]:
        """The last two parts of a token; more if they cannot be joined to it, or the byte that it is."""
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            ranks = [self.ranks.get(left + right, self.bos_id) for left, right in pairwise(parts)]
            lowest = min(ranks)
            if lowest == self.bos_id:
                break
            i = ranks.index(lowest)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        return parts


def byte_letters() -> dict[int, str]:
    """GPT-2's printable stand-in for each byte, the alphabet of a byte-level tokenizer.json."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}


# --- many documents at once ------------------------------------------------------------------------------------------

SEPARATOR = "<|between documents|>"
"""A special token that only gigatoken is told of. It stands between the documents that are encoded together."""


class BatchEncoder:
    """`tokenizer.encode` for many texts at once, with exactly the same ids.

    engine: "auto" takes gigatoken if it is installed, knows this tokenizer and agrees with it on `TORTURE`, and
    otherwise the reference, saying why in `why_slow`; "reference" is `tokenizer` itself; "gigatoken" raises ValueError
    where auto would fall back.
    """

    def __init__(self, tokenizer: Tokenizer, engine: str = "auto") -> None:
        if engine not in ("auto", "gigatoken", "reference"):
            raise ValueError(f"--engine {engine}: choose auto, gigatoken or reference")
        self.tokenizer = tokenizer
        self.engine = "reference"
        self.why_slow = None
        self._fast = None
        if engine == "reference":
            return
        try:
            self._fast = _in_gigatoken(tokenizer)
            self.engine = "gigatoken"
        except ImportError as error:
            self.why_slow = f"gigatoken is not installed: pip install gigatoken ({error})"
        except BaseException as error:  # a panic in its Rust code is no Exception
            if isinstance(error, (KeyboardInterrupt, SystemExit, MemoryError)):
                raise
            self.why_slow = f"gigatoken cannot read this tokenizer: {str(error).splitlines()[0]}"
        # gigatoken makes special tokens of these. A tiktoken file has none that it could be told of.
        special = () if isinstance(tokenizer.model, _TiktokenModel) else tokenizer.special
        self._special = re.compile("|".join(map(re.escape, special)).encode()) if special else None
        if self._fast is not None and (text := self.disagreement(TORTURE)) is not None:
            self.engine, self._fast = "reference", None
            self.why_slow = f"gigatoken's ids differ from the reference on {text[:40]!r}"
        if self.why_slow and engine == "gigatoken":
            raise ValueError(f"--engine gigatoken: {self.why_slow}")

    def __call__(self, texts: Sequence[str], *, bos: bool, eos: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Encode, with one BOS before and one EOS after each text as asked.

        Returns: ids of all texts in one row, uint32 (N,); how many of them each text has, int64 (len(texts),); and its
        length in UTF-8 bytes, int64 (len(texts),).
        Raises: ValueError when a delimiter does not exist in this tokenizer.
        """
        self.tokenizer.delimiters(bos=bos, eos=eos)
        utf8 = [text.encode() for text in texts]
        sizes = np.fromiter(map(len, utf8), np.int64, len(utf8))
        search = self._special.search if self._fast is not None and self._special else None
        apart = [i for i, text in enumerate(utf8) if search(text)] if search else []
        for i in apart:
            utf8[i] = b""
        encoded = self._encode_fast(utf8, bos, eos) if self._fast is not None and texts else None
        if encoded is None:  # no gigatoken, or SEPARATOR itself is in a text
            encoded, apart = (np.empty(0, np.uint32), np.zeros(len(texts), np.int64)), range(len(texts))
        ids, lengths = encoded
        if not apart:
            return ids, lengths, sizes
        starts = np.cumsum(lengths) - lengths
        pieces, done = [], 0
        for i in apart:
            row = np.array(self.tokenizer.encode(texts[i], bos=bos, eos=eos), dtype=np.uint32)
            pieces += [ids[done : starts[i]], row]
            done = starts[i] + lengths[i]
            lengths[i] = len(row)
        return np.concatenate([*pieces, ids[done:]]), lengths, sizes

    def _encode_fast(self, utf8: list[bytes], bos: bool, eos: bool) -> tuple[np.ndarray, np.ndarray] | None:
        """Encode all as one text with SEPARATORs in it, whose ids then become those of the delimiters.

        A BytesSource in and one row of ids out need no awkward arrays, gigatoken's form of lists, which take 0.3 s to
        import. Returns: None when there are more SEPARATORs than we have put in.
        """
        import gigatoken

        each = max(bos + eos, 1)
        block = gigatoken.BytesSource((SEPARATOR.encode() * each).join([b"", *utf8, b""]))
        ids = self._fast.encode_batch_padded(block, pad_id=0, parallel=False)[0][0]
        places = np.flatnonzero(ids == self.tokenizer.vocab_size)
        if len(places) != each * (len(utf8) + 1):
            return None
        starts, ends = places[each - 1 : -each : each], places[each::each]  # of each text, delimiters included
        if bos:
            ids[starts] = self.tokenizer.bos_id
        if eos:
            ids[ends] = self.tokenizer.eos_id
        lengths = ends - starts - 1 + bos + eos
        return (ids[eos : len(ids) - bos] if bos or eos else np.delete(ids, places)), lengths

    def disagreement(self, texts: Sequence[str]) -> str | None:
        """The first of `texts` whose ids differ from the reference's, or None."""
        if self._fast is None or not texts:
            return None
        ids, lengths, _ = self(texts, bos=False, eos=False)
        rows = np.split(ids, np.cumsum(lengths)[:-1])
        reference = (self.tokenizer.model.encode(text) for text in texts)
        return next((t for t, row, want in zip(texts, rows, reference, strict=True) if row.tolist() != want), None)


def _in_gigatoken(tokenizer: Tokenizer):
    """`tokenizer` and SEPARATOR, id `vocab_size`, as a gigatoken.Tokenizer, which reads a tokenizer.json.

    To write a tokenizer.model as one takes about a second, so the result is kept in the user's cache, under a name that
    says what it was made of. What cannot be read there, or is not as it was written, is made anew.
    """
    import gigatoken

    made_of = f"{tokenizer.sha256} {importlib.metadata.version('gigatoken')}".encode() + Path(__file__).read_bytes()
    cache = Path(os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache"), "lit_gpt")
    path = cache / f"tokenizer-{hashlib.sha256(made_of).hexdigest()[:16]}.json"
    try:
        checksum, _, content = path.read_bytes().partition(b"\n")
    except OSError:
        checksum, content = b"", b""
    if checksum != hashlib.sha256(content).hexdigest().encode():
        content = _with_separator(tokenizer)
        _keep(path, hashlib.sha256(content).hexdigest().encode() + b"\n" + content)
    return gigatoken.Tokenizer.from_json(content)


def _with_separator(tokenizer: Tokenizer) -> bytes:
    import msgspec

    as_json = tokenizer.model.as_json()
    separator = {"id": tokenizer.vocab_size, "content": SEPARATOR, "special": True, "normalized": False}
    separator |= dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
    return msgspec.json.encode(as_json | {"added_tokens": [*(as_json.get("added_tokens") or []), separator]})


def _keep(path: Path, content: bytes) -> None:
    """Write a file whole or, where that is not allowed, not at all."""
    import tempfile

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            new = Path(folder, path.name)
            new.write_bytes(content)
            new.replace(path)
    except OSError:
        pass


TORTURE = [
    *("", " ", "  ", "   a  b   ", " a", "a ", "\n", "\n\n\n", "\t", "\t\t  \t", " \n \n ", "\r\n", "a\r\nb"),
    *("\x00", "a\x00b", "\x7f\x1b", "<s>", "</s>", "<unk>", "a<s>b</s>c", "<pad>", "<0x0A>", "[INST]", "<|eot_id|>"),
    *("<|endoftext|>", "<|begin_of_text|>", "<|end_of_text|>", "▁", "▁▁▁", "a▁b", " ▁ ▁", "▁a ▁", "Ġ", "ĠĊ", "##a"),
    *("Hello, world!", "hello  world", "I'm you're he'LL 'S ſ's", "3.14159 1234567 1e-9 0x1F", "CamelCase snake_case"),
    "def f(x):\n    return x ** 2\n\n\n\tif x:\n\t\tpass",
    *('{"a": [1, 2.5e3, null]}', "http://a.b/c?d=e&f#g", "<div class='x'>&nbsp;</div>", "naïve café Ångström"),
    *("e\u0301 a\u030a\u0323", "ﬁ ﬂ ½ ² Ⅷ ㎏ ﷽", "Привет, мир", "γειά σου κόσμε", "שלום עולם", "مرحبا بالعالم"),
    *("नमस्ते दुनिया", "สวัสดีชาวโลก", "你好，世界。", "こんにちは世界", "안녕하세요 세계", "\U00020000\U0002a6d6"),
    *("😀👩\u200d👩\u200d👧\u200d👦🏳\ufe0f\u200d🌈👍🏽", "\u200b\u200d\ufeff\u00ad", "\u00a0\u2003\u3000 x"),
    *("\u2028\u2029\u0085x", "\ufffd\ufffe\uffff\U0010ffff", "\u202eabc\u202c"),
    *(piece * 3000 for piece in ("x", " ", "\n", "\t", "ab", " a", "é", "你", "1", "-", "=", "▁")),
]
"""What tokenizers are known to get wrong: special tokens as text, spaces, controls, scripts, long runs."""
