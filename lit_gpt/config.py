"""Model configurations: one dataclass, and the presets that this project trains.

from lit_gpt.config import Config
config = Config.from_name("tiny_LLaMA_1b", n_layer=4)
"""

import difflib
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

ROPE_SCALINGS = ("none", "linear", "dynamic", "yarn", "llama3")


@dataclass(frozen=True)
class Config:
    """Shape of a decoder-only transformer, Llama's unless said otherwise. Sizes are in elements, not bytes."""

    name: str = ""
    block_size: int = 2048
    """Longest sequence, in tokens, that the model is trained on."""
    vocab_size: int = 32000
    """Ids that the tokenizer can produce."""
    padded_vocab_size: int = 0
    """Rows of the embedding and the head. 0: vocab_size rounded up to a multiple of 64, which matmuls like."""
    n_layer: int = 22
    n_embd: int = 2048
    n_head: int = 32
    n_query_groups: int = 0
    """Key/value heads. 0: as many as query heads (MHA); 1: MQA; between them: GQA."""
    head_size: int = 0
    """0: n_embd / n_head."""
    intermediate_size: int = 5632
    """Width of the MLP."""
    family: Literal["llama", "gptneox"] = "llama"
    """llama: RMSNorm, SwiGLU, no biases. gptneox (Pythia): LayerNorm, GELU, biases, attention and MLP in parallel."""
    norm_eps: float = 1e-5
    rope_base: float = 10000.0
    rotary_percentage: float = 1.0
    """Share of each head that rotates, from its beginning."""
    rope_scaling: Literal["none", "linear", "dynamic", "yarn", "llama3"] = "none"
    """How rotation slows down for sequences longer than the model was first trained on; see kernels/rope.py."""
    rope_factor: float = 1.0
    """How many times longer."""
    rope_original_size: int = 0
    """The block_size of that first training. 0: block_size / rope_factor, as linear scaling always has it."""
    tie_embeddings: bool = False
    """The head is the embedding's weight."""

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            least = 0 if f.default == 0 else 1  # a default of 0 means: derived from others
            if f.type is int and not (type(value) is int and value >= least):
                raise ValueError(f"model {self.name!r}: {f.name} is {value!r}, and should be a whole number above 0")
            if f.type is float and not (type(value) in (int, float) and 0 < value < math.inf):
                raise ValueError(f"model {self.name!r}: {f.name} is {value!r}, and should be a number above 0")
        if self.rope_scaling not in ROPE_SCALINGS:
            raise ValueError(
                f"model {self.name!r}: unknown rope_scaling {self.rope_scaling!r}. Known: {', '.join(ROPE_SCALINGS)}"
            )
        if (self.rope_scaling == "none") != (self.rope_factor == 1) or not 1 <= self.rope_factor < math.inf:
            raise ValueError(
                f"model {self.name!r}: rope_factor {self.rope_factor} with rope_scaling {self.rope_scaling!r}; "
                "a scaling needs a factor greater than 1, and a factor a scaling"
            )
        scaled_size = round(self.block_size / self.rope_factor)
        if self.rope_scaling in ("none", "linear"):
            object.__setattr__(self, "rope_original_size", scaled_size)
        derived = {
            "rope_original_size": scaled_size,
            "padded_vocab_size": -(-self.vocab_size // 64) * 64,
            "n_query_groups": self.n_head,
            "head_size": self.n_embd // self.n_head,
        }
        for name, value in derived.items():
            if not getattr(self, name):
                object.__setattr__(self, name, value)  # frozen, but not yet born
        if self.family not in ("llama", "gptneox"):
            raise ValueError(f"model {self.name!r}: unknown family {self.family!r}. Known: llama, gptneox")
        if self.n_head % self.n_query_groups:
            raise ValueError(
                f"model {self.name!r}: n_head {self.n_head} is not a multiple of n_query_groups {self.n_query_groups}"
            )
        if self.padded_vocab_size < self.vocab_size:
            raise ValueError(
                f"model {self.name!r}: padded_vocab_size {self.padded_vocab_size} < vocab_size {self.vocab_size}"
            )
        if self.rope_n_elem % 2:
            raise ValueError(f"model {self.name!r}: {self.rope_n_elem} elements of a head would rotate: an odd number")

    @property
    def rope_n_elem(self) -> int:
        """Elements of a head that rotate."""
        return int(self.rotary_percentage * self.head_size)

    @property
    def condense_ratio(self) -> float:
        """The factor of linear scaling, by lit-gpt's name; from_name takes it, too."""
        return self.rope_factor if self.rope_scaling == "linear" else 1.0

    @property
    def qkv_size(self) -> int:
        """Rows of the fused query, key and value projection."""
        return (self.n_head + 2 * self.n_query_groups) * self.head_size

    @classmethod
    def from_name(cls, name: str, **overrides: Any) -> "Config":
        """The preset `name` with some fields replaced. Raises ValueError, with the nearest names, if there is none."""
        if name not in MODELS:
            raise ValueError(f"unknown model {name!r}.{did_you_mean(name, MODELS)} Known: {', '.join(MODELS)}")
        if (ratio := overrides.pop("condense_ratio", None)) is not None:
            overrides |= dict(rope_scaling="none" if ratio == 1 else "linear", rope_factor=float(ratio))
        known = [f.name for f in fields(cls)]
        for field in overrides:
            if field not in known:
                hint = did_you_mean(field, known)
                raise ValueError(f"unknown model field {field!r}.{hint} Known: {', '.join(known)}")
        return cls(**{"name": name, **MODELS[name], **overrides})

    def stretched(self, rope_scaling: str, rope_factor: float) -> "Config":
        """The same model for sequences `rope_factor` times as long, by one of ROPE_SCALINGS.

        Raises:
            ValueError: it is stretched already, or the scaling and its factor make no sense.
        """
        if self.rope_scaling != "none":
            raise ValueError(
                f"model {self.name!r} is stretched already: {self.rope_scaling}, {self.rope_factor:g} times"
            )
        block_size = round(self.block_size * rope_factor)
        size = dict(block_size=block_size, rope_original_size=self.block_size)
        return replace(self, **size, rope_scaling=rope_scaling, rope_factor=rope_factor)

    def to_dict(self) -> dict[str, Any]:
        """Every field, derived ones filled in; `Config(**config.to_dict()) == config`."""
        return asdict(self)


def did_you_mean(name: str, known: Iterable[str], cutoff: float = 0.4) -> str:
    by_lower = {k.lower(): k for k in known}
    close = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=cutoff)
    return f" Did you mean {by_lower[close[0]]!r}?" if close else ""


_llama3 = dict(block_size=4096, n_embd=2560, n_head=20, n_query_groups=4, intermediate_size=6912, rope_base=500000.0)
_pythia = dict(family="gptneox", vocab_size=50304, rotary_percentage=0.25)

# Fields that differ from the dataclass's defaults, which are TinyLlama-1.1B's but for its 4 key/value heads.
MODELS: dict[str, dict[str, Any]] = {
    # For `make demo`: a few minutes on a laptop's CPU.
    "tiny_LLaMA_demo": dict(
        block_size=256, vocab_size=2048, n_layer=4, n_embd=256, n_head=8, n_query_groups=4, intermediate_size=704
    ),
    "tiny_LLaMA_120M": dict(n_layer=12, n_embd=768, n_head=12, n_query_groups=1, intermediate_size=2048),
    "tiny_LLaMA_1b": dict(n_query_groups=4),
    "code_tiny_LLaMA_1b": dict(n_query_groups=4, block_size=8192, rope_scaling="linear", rope_factor=4.0),
    "tinyllama3_2b": dict(**_llama3, vocab_size=128256),
    "tinyllama3_2b_32k": dict(**_llama3, n_layer=24),
    "pythia-1b": dict(**_pythia, n_layer=16, n_head=8, intermediate_size=8192),
    "pythia-160m": dict(**_pythia, n_layer=12, n_embd=768, n_head=12, intermediate_size=3072),
}
