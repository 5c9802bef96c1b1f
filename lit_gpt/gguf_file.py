"""Our weights -> one GGUF file with its tokenizer inside, as llama.cpp and what is built on it load it, and back.

    write_gguf(config, weights, Path("model.gguf"), "q4_0", tokenizer_folder)
    weights = read_gguf(Path("model.gguf"), config)         # our names, fp32, each dequantised when it is asked for

Blocks of 32 weights of a row share a scale (q8_0, q4_0) or a scale and an offset (q4_1); the gguf package, llama.cpp's
own, quantises them. What rows of another length would not allow is stored as f16.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lit_gpt.config import Config
from lit_gpt.hf import check_finite, check_weights, from_hf, name_table, to_hf
from lit_gpt.hf_tokenizer import BYTE, CONTROL, USER_DEFINED, as_tokenizers, read_sentencepiece
from lit_gpt.kernels.rope import frequencies
from lit_gpt.tokenizer import LLAMA3_PATTERN, Tokenizer
from lit_gpt.weights import LazyWeights, whole_file

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGMLQuantizationType, GGUFWriter

DTYPES = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1")
BLOCK = 32
NAMES = {  # Hugging Face's -> GGUF's; {} is the layer
    "model.embed_tokens": "token_embd",
    "model.layers.{}.input_layernorm": "blk.{}.attn_norm",
    "model.layers.{}.self_attn.q_proj": "blk.{}.attn_q",
    "model.layers.{}.self_attn.k_proj": "blk.{}.attn_k",
    "model.layers.{}.self_attn.v_proj": "blk.{}.attn_v",
    "model.layers.{}.self_attn.o_proj": "blk.{}.attn_output",
    "model.layers.{}.post_attention_layernorm": "blk.{}.ffn_norm",
    "model.layers.{}.mlp.gate_proj": "blk.{}.ffn_gate",
    "model.layers.{}.mlp.up_proj": "blk.{}.ffn_up",
    "model.layers.{}.mlp.down_proj": "blk.{}.ffn_down",
    "model.norm": "output_norm",
    "lm_head": "output",
}
# How byte-level tokenizers cut text before they merge -> llama.cpp's name for it, which is all that its files can say.
PRE_TOKENIZERS = {
    ("Llama 3's", True): "llama-bpe",  # ignore_merges: whole words of the vocabulary first
    ("Llama 3's", False): "dbrx",
    ("GPT-2's", False): "gpt-2",
    ("GPT-2's, digits apart", False): "smollm",
}
UNUSED = 5  # of the types of a token, beside sentencepiece's


def write_gguf(
    config: Config,
    weights: Mapping[str, torch.Tensor],
    path: Path,
    dtype: str,
    tokenizer: Path,
    *,
    add_bos: bool,
    chat_template: str | None = None,
    overwrite: bool = False,
) -> None:
    """Write the file, read it again and compare each tensor within what its format can hold.

    Args:
        weights: ours, by name; read one at a time.
        path: appears when all of it is written and verified.
        dtype: of DTYPES, for matrices. Norms are f32; the head of a 4-bit model is q8_0, which costs little where
            errors cost most.
        tokenizer: folder or file.
        add_bos: whether llama.cpp puts BOS before a text.

    Raises:
        ValueError: a model or tokenizer that llama.cpp does not have, weights that are not finite, or a tensor that
            came back as another one.
        ImportError: the gguf package is missing.
    """
    from gguf import GGUFWriter, quantize
    from tqdm import tqdm

    check_supported(config)
    check_weights(config, weights)
    stored = storage(config, dtype)
    with whole_file(path, overwrite) as temporary:
        writer = GGUFWriter(temporary, "llama")
        try:
            _add_config(writer, config, dtype)
            _add_tokenizer(writer, Tokenizer(tokenizer), config, add_bos)
            if chat_template:
                writer.add_chat_template(chat_template)
            for name, (shape, kind) in stored.items():
                writer.add_tensor_info(name, shape, None, n_bytes(shape, kind), raw_dtype=kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            tensors = tensors_of(config, weights)
            for name, tensor in tqdm(tensors, "writing", len(stored), unit=" tensors"):
                writer.write_tensor_data(quantize(tensor, stored[name][1]))
        finally:
            writer.close()
        verify(config, weights, temporary)


def read_gguf(path: Path, config: Config) -> LazyWeights:
    """The file's weights under our names, fp32, each dequantised when it is asked for; for llama.cpp's K-quants too.

    Raises:
        ValueError: not a GGUF file, or not of this configuration.
    """
    from gguf import GGUFReader, dequantize

    try:
        found = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    except Exception as e:  # whatever the package makes of other bytes
        raise ValueError(f"{path} is damaged, or not a GGUF file: {e}") from e

    def read(theirs: str, name: str) -> torch.Tensor:
        values = dequantize(found[name].data, found[name].tensor_type)
        tensor = torch.from_numpy(values.copy())  # the file is mapped read-only
        return half_split(tensor, heads(config, theirs)) if heads(config, theirs) else tensor

    names = gguf_names(config)
    try:
        return from_hf(
            config,
            LazyWeights({t: lambda t=t, n=n: read(t, n) for t, n in names.items() if n in found}),
        )
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from e


def verify(config: Config, weights: Mapping[str, torch.Tensor], path: Path) -> None:
    """Raise ValueError naming a tensor of the file that differs by more than its format rounds."""
    from gguf import GGUFReader, dequantize
    from tqdm import tqdm

    found = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    for name, original in tqdm(tensors_of(config, weights), "verifying", len(found), unit=" tensors"):
        kind = found[name].tensor_type.name.lower()
        read = dequantize(found[name].data, found[name].tensor_type).reshape(original.shape)
        error, allowed = abs(read - original), rounding(original, kind)
        if not (error <= allowed).all():  # not: > allowed.any(), which NaN would pass
            raise ValueError(f"{path.name}: {name} came back with other values than were written as {kind}")


def rounding(x: "np.ndarray", kind: str) -> "np.ndarray | float":
    """How far each value may be from what a format makes of it."""
    import numpy as np

    if kind == "f32":
        return 0.0
    if kind in ("f16", "bf16"):  # half of the last place, or of the smallest number
        return abs(x) * 2.0 ** (-11 if kind == "f16" else -8) + (2.0**-25 if kind == "f16" else 0)
    blocks = x.reshape(-1, BLOCK)
    largest = abs(blocks).max(1, keepdims=True)
    step = {
        "q8_0": largest / 127 / 2,
        "q4_0": largest / 8,  # half a step, or a whole one: the scale has -8 to 7, and the largest value is at -8
        "q4_1": (blocks.max(1, keepdims=True) - blocks.min(1, keepdims=True)) / 15 / 2,
    }[kind]
    # The scale is an f16 itself.
    return np.broadcast_to(step * 1.001 + largest * 2.0**-10 + 1e-7, blocks.shape).reshape(x.shape)


def gguf_names(config: Config) -> dict[str, str]:
    """Hugging Face's name -> GGUF's, in the order of the file."""
    names = {}
    for theirs in (name for entry in name_table(config).values() for name in entry):
        layer = next((part for part in theirs.split(".") if part.isdigit()), "")
        pattern = theirs.removesuffix(".weight").replace(f".{layer}.", ".{}.") if layer else theirs[: -len(".weight")]
        names[theirs] = NAMES[pattern].format(layer) + ".weight"
    return names


def storage(config: Config, dtype: str) -> dict[str, tuple[tuple[int, ...], "GGMLQuantizationType"]]:
    """GGUF name -> (shape, type) of every tensor of the file."""
    from gguf import GGMLQuantizationType as Kind

    names, stored = gguf_names(config), {}
    shapes = {name: shape for entry in name_table(config).values() for name, shape in entry.items()}
    head = names["model.embed_tokens.weight" if config.tie_embeddings else "lm_head.weight"]
    for theirs, name in names.items():
        shape = shapes[theirs]
        kind = Kind.F32 if len(shape) == 1 else Kind[dtype.upper()]
        if kind in (Kind.Q4_0, Kind.Q4_1) and name == head:
            kind = Kind.Q8_0
        if kind in (Kind.Q8_0, Kind.Q4_0, Kind.Q4_1) and shape[-1] % BLOCK:
            kind = Kind.F16
        stored[name] = (shape, kind)
    if config.rope_scaling == "llama3":
        stored["rope_freqs.weight"] = ((config.rope_n_elem // 2,), Kind.F32)
    return stored


def n_bytes(shape: tuple[int, ...], kind: "GGMLQuantizationType") -> int:
    from gguf.constants import GGML_QUANT_SIZES

    block, size = GGML_QUANT_SIZES[kind]
    return torch.Size(shape).numel() // block * size


def interleaved(weight: torch.Tensor, n_heads: int) -> torch.Tensor:
    """Rows of queries or keys in the order that llama.cpp rotates: element i beside i + D/2, which is its partner here
    (in each head, 0 D/2 1 D/2+1 ..)."""
    return weight.view(n_heads, 2, -1, weight.size(-1)).transpose(1, 2).reshape(weight.shape)


def half_split(weight: torch.Tensor, n_heads: int) -> torch.Tensor:
    """The inverse of `interleaved`."""
    return weight.view(n_heads, -1, 2, weight.size(-1)).transpose(1, 2).reshape(weight.shape)


def heads(config: Config, theirs: str) -> int:
    """Heads that rotate in a tensor of Hugging Face's; 0 for the others."""
    if theirs.endswith("q_proj.weight"):
        return config.n_head
    return config.n_query_groups if theirs.endswith("k_proj.weight") else 0


def tensors_of(config: Config, weights: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, "np.ndarray"]]:
    """(GGUF name, fp32 array) of every tensor of the file, in its order."""
    names = gguf_names(config)
    for theirs, tensor in to_hf(config, weights):
        tensor, n_heads = check_finite(theirs, tensor.float()), heads(config, theirs)
        yield names[theirs], (interleaved(tensor, n_heads) if n_heads else tensor.contiguous()).numpy()
    if config.rope_scaling == "llama3":
        yield "rope_freqs.weight", slowing(config).numpy()


def slowing(config: Config) -> torch.Tensor:
    """By what llama3 scaling divides each frequency, (R / 2,) fp32."""
    cpu = torch.device("cpu")
    plain = replace(config, rope_scaling="none", rope_factor=1.0)
    return frequencies(plain, 0, cpu)[0] / frequencies(config, 0, cpu)[0]


def check_supported(config: Config) -> None:
    """Raise ValueError naming what llama.cpp's llama models do not have."""
    if config.family != "llama":
        raise ValueError(f"model {config.name!r} is a {config.family}; only Llama models are written as GGUF")
    if config.rope_scaling == "dynamic":
        raise ValueError(f"model {config.name!r} has dynamic rope scaling, which llama.cpp does not: export it as yarn")


def _add_config(writer: "GGUFWriter", config: Config, dtype: str) -> None:
    from gguf import LlamaFileType, RopeScalingType

    c = config
    writer.add_name(c.name or "llama")
    writer.add_context_length(c.block_size)
    writer.add_embedding_length(c.n_embd)
    writer.add_block_count(c.n_layer)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.n_head)
    writer.add_head_count_kv(c.n_query_groups)
    writer.add_key_length(c.head_size)
    writer.add_value_length(c.head_size)
    writer.add_rope_dimension_count(c.rope_n_elem)
    writer.add_rope_freq_base(c.rope_base)
    writer.add_layer_norm_rms_eps(c.norm_eps)
    writer.add_vocab_size(c.padded_vocab_size)
    writer.add_file_type(LlamaFileType["ALL_F32" if dtype == "f32" else f"MOSTLY_{dtype.upper()}"])
    writer.add_quantization_version(2)
    if c.rope_scaling in ("linear", "yarn"):
        writer.add_rope_scaling_type(RopeScalingType(c.rope_scaling))
        writer.add_rope_scaling_factor(c.rope_factor)
        writer.add_rope_scaling_orig_ctx_len(c.rope_original_size)


def _add_tokenizer(writer: "GGUFWriter", tokenizer: Tokenizer, config: Config, add_bos: bool) -> None:
    is_sentencepiece = tokenizer.path.suffix == ".model" and not hasattr(tokenizer.model, "ranks")
    (_add_sentencepiece if is_sentencepiece else _add_byte_level)(writer, tokenizer, config.padded_vocab_size)
    for token_id, add in (
        (tokenizer.bos_id, writer.add_bos_token_id),
        (tokenizer.eos_id, writer.add_eos_token_id),
    ):
        if token_id is not None:
            add(token_id)
    writer.add_add_bos_token(add_bos and tokenizer.bos_id is not None)
    writer.add_add_eos_token(False)


def _add_sentencepiece(writer: "GGUFWriter", tokenizer: Tokenizer, n_ids: int) -> None:
    proto = read_sentencepiece(tokenizer.path)
    if not any(piece.type == BYTE for piece in proto.pieces):
        raise ValueError(f"{tokenizer.path} has no byte tokens, and llama.cpp writes unknown characters with them")
    padding = n_ids - len(proto.pieces)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([piece.piece for piece in proto.pieces] + [f"[PAD{i}]" for i in range(padding)])
    writer.add_token_scores([piece.score for piece in proto.pieces] + [-1e4] * padding)
    writer.add_token_types([piece.type for piece in proto.pieces] + [UNUSED] * padding)  # the same numbers
    writer.add_unk_token_id(proto.trainer_spec.unk_id)
    writer.add_add_space_prefix(proto.normalizer_spec.add_dummy_prefix)


def _add_byte_level(writer: "GGUFWriter", tokenizer: Tokenizer, n_ids: int) -> None:
    file = json.loads(as_tokenizers(tokenizer).to_str())
    names: dict[int, tuple[str, int]] = {i: (text, 1) for text, i in file["model"]["vocab"].items()}
    for token in file["added_tokens"]:
        names[token["id"]] = (token["content"], CONTROL if token["special"] else USER_DEFINED)
    tokens = [names.get(i, (f"[PAD{i}]", UNUSED)) for i in range(n_ids)]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in file["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer(file, tokenizer.path))
    writer.add_token_list([text for text, _ in tokens])
    writer.add_token_types([kind for _, kind in tokens])
    writer.add_token_merges(merges)


def pre_tokenizer(file: Mapping[str, Any], path: Path) -> str:
    """llama.cpp's name for how a tokenizer.json cuts text.

    Raises:
        ValueError: it has none for it.
    """
    pre, model = file["pre_tokenizer"] or {}, file["model"]
    steps = pre.get("pretokenizers", [pre])
    cut = None
    if model["type"] == "BPE" and not file["normalizer"] and steps[-1].get("type") == "ByteLevel":
        by_regex = steps[-1]["use_regex"] and not steps[-1]["add_prefix_space"]
        before = [(step["type"], step.get("pattern", {}).get("Regex"), step.get("individual_digits")) for step in steps]
        if before[:-1] == [("Split", LLAMA3_PATTERN, None)] and not steps[-1]["use_regex"]:
            cut = "Llama 3's"
        elif before[:-1] == [("Digits", None, True)] and by_regex:
            cut = "GPT-2's, digits apart"
        elif not before[:-1] and by_regex:
            cut = "GPT-2's"
    name = PRE_TOKENIZERS.get((cut, bool(model.get("ignore_merges"))))
    if name is None:
        raise ValueError(
            f"{path} cuts text in a way that llama.cpp has no name for; known are sentencepiece, and byte-level BPE "
            "that cuts as Llama 3, GPT-2 or SmolLM do"
        )
    return name
