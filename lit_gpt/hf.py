"""Between Hugging Face's checkpoints and ours: configuration and names. One table, used both ways.

    config = config_from_hf(read_json(folder / "config.json"))
    weights = from_hf(config, open_weights(folder))         # our names over their files, read lazily
    export(config, weights, Path("out/hf"))                 # and back; what was written is read again and compared

Families: Llama (transformers' LlamaForCausalLM) and GPT-NeoX (GPTNeoXForCausalLM, e.g. Pythia).
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from lit_gpt.config import ROPE_SCALINGS, Config
from lit_gpt.weights import LazyWeights, open_weights, read_json, write_json, write_safetensors

BUFFERS = (".rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias")  # not weights; old files hold them
HEADS = {"lm_head.weight", "embed_out.weight"}


def name_table(config: Config) -> dict[str, dict[str, tuple[int, ...]]]:
    """Our name -> {their name: shape}, for every tensor of the model; a tied head is left out.

    Where they keep query, key and value apart, three of theirs make one of ours.
    """
    c = config
    C, F, V = c.n_embd, c.intermediate_size, c.padded_vocab_size
    HD, GD = c.n_head * c.head_size, c.n_query_groups * c.head_size
    if c.family == "llama":
        layers = "model.layers"
        table = {
            "transformer.wte.weight": {"model.embed_tokens.weight": (V, C)},
            "{}.norm_1.weight": {"{}.input_layernorm.weight": (C,)},
            "{}.attn.attn.weight": {
                "{}.self_attn.q_proj.weight": (HD, C),
                "{}.self_attn.k_proj.weight": (GD, C),
                "{}.self_attn.v_proj.weight": (GD, C),
            },
            "{}.attn.proj.weight": {"{}.self_attn.o_proj.weight": (C, HD)},
            "{}.norm_2.weight": {"{}.post_attention_layernorm.weight": (C,)},
            "{}.mlp.fc_1.weight": {"{}.mlp.gate_proj.weight": (F, C)},
            "{}.mlp.fc_2.weight": {"{}.mlp.up_proj.weight": (F, C)},
            "{}.mlp.proj.weight": {"{}.mlp.down_proj.weight": (C, F)},
            "transformer.ln_f.weight": {"model.norm.weight": (C,)},
            "lm_head.weight": {"lm_head.weight": (V, C)},
        }
    else:
        layers = "gpt_neox.layers"
        table = {
            "transformer.wte.weight": {"gpt_neox.embed_in.weight": (V, C)},
            "{}.norm_1.weight": {"{}.input_layernorm.weight": (C,)},
            "{}.norm_1.bias": {"{}.input_layernorm.bias": (C,)},
            # (q k v) for each head, which is our interleaving where every head is a group
            "{}.attn.attn.weight": {"{}.attention.query_key_value.weight": (c.qkv_size, C)},
            "{}.attn.attn.bias": {"{}.attention.query_key_value.bias": (c.qkv_size,)},
            "{}.attn.proj.weight": {"{}.attention.dense.weight": (C, HD)},
            "{}.attn.proj.bias": {"{}.attention.dense.bias": (C,)},
            "{}.norm_2.weight": {"{}.post_attention_layernorm.weight": (C,)},
            "{}.norm_2.bias": {"{}.post_attention_layernorm.bias": (C,)},
            "{}.mlp.fc.weight": {"{}.mlp.dense_h_to_4h.weight": (F, C)},
            "{}.mlp.fc.bias": {"{}.mlp.dense_h_to_4h.bias": (F,)},
            "{}.mlp.proj.weight": {"{}.mlp.dense_4h_to_h.weight": (C, F)},
            "{}.mlp.proj.bias": {"{}.mlp.dense_4h_to_h.bias": (C,)},
            "transformer.ln_f.weight": {"gpt_neox.final_layer_norm.weight": (C,)},
            "transformer.ln_f.bias": {"gpt_neox.final_layer_norm.bias": (C,)},
            "lm_head.weight": {"embed_out.weight": (V, C)},
        }
    if c.tie_embeddings:
        del table["lm_head.weight"]
    return {
        ours.format(f"transformer.h.{i}"): {name.format(f"{layers}.{i}"): shape for name, shape in theirs.items()}
        for ours, theirs in table.items()
        for i in (range(c.n_layer) if ours.startswith("{}") else [0])
    }


def shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Our name -> shape."""
    return {
        ours: (sum(shape[0] for shape in theirs.values()), *next(iter(theirs.values()))[1:])
        for ours, theirs in name_table(config).items()
    }


def split_qkv(qkv: torch.Tensor, config: Config) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Our fused ((H + 2G) D, C), interleaved by group, -> q (H D, C), k (G D, C), v (G D, C)."""
    per_group = config.n_head // config.n_query_groups
    groups = qkv.view(config.n_query_groups, per_group + 2, config.head_size, -1)
    q, k, v = groups.split((per_group, 1, 1), dim=1)
    return tuple(x.reshape(-1, qkv.size(-1)) for x in (q, k, v))


def join_qkv(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, config: Config) -> torch.Tensor:
    """The inverse of split_qkv."""
    G, D = config.n_query_groups, config.head_size
    groups = torch.cat([x.reshape(G, -1, D, x.size(-1)) for x in (q, k, v)], dim=1)
    return groups.reshape(config.qkv_size, -1)


def to_hf(config: Config, weights: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Their (name, tensor) for all of our weights, in the order of the table."""
    for ours, theirs in name_table(config).items():
        parts = split_qkv(weights[ours], config) if len(theirs) == 3 else (weights[ours],)
        yield from zip(theirs, parts, strict=True)


def from_hf(config: Config, weights: Mapping[str, torch.Tensor]) -> LazyWeights:
    """Our names over their tensors, each joined when it is asked for.

    Raises:
        ValueError: tensors that are missing, left over, of another shape than the configuration's, or not numbers that
            a model is trained in.
    """
    table = name_table(config)
    _compare_names({name for theirs in table.values() for name in theirs}, weights, config)

    def read(theirs: dict[str, tuple[int, ...]]) -> torch.Tensor:
        for name, shape in theirs.items():
            _compare_shape(name, weights[name], shape)
        parts = [weights[name] for name in theirs]
        return parts[0] if len(parts) == 1 else join_qkv(*parts, config)

    ours = LazyWeights({name: lambda theirs=theirs: read(theirs) for name, theirs in table.items()})
    check_weights(config, ours)
    for head in HEADS & set(weights) if config.tie_embeddings else ():
        if not same_bits(weights[head], ours["transformer.wte.weight"]):
            raise ValueError(f"tie_word_embeddings is true, and {head} differs from the embedding")
    return ours


def check_weights(config: Config, weights: Mapping[str, torch.Tensor]) -> None:
    """Refuse weights (ours) that are not this configuration's. Reads shapes, not values.

    Raises:
        ValueError: naming the tensors that are missing, left over, or of another shape or dtype.
    """
    expected = shapes(config)
    _compare_names(set(expected), weights, config)
    for name, shape in expected.items():
        tensor = weights[name]
        _compare_shape(name, tensor, shape)
        if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(f"{name} is {tensor.dtype}; only float32, float16 and bfloat16 weights are read")


def _compare_names(expected: set[str], weights: Mapping[str, torch.Tensor], config: Config) -> None:
    found = {name for name in weights if not name.endswith(BUFFERS)}
    if config.tie_embeddings:
        found -= HEADS  # some writers store the tied head a second time
    problems = [
        f"{len(names)} {what} ({', '.join(sorted(names)[:3])}{' ..' if len(names) > 3 else ''})"
        for what, names in (("tensors are missing", expected - found), ("do not belong to it", found - expected))
        if names
    ]
    if problems:
        raise ValueError(f"these are not the weights of model {config.name!r}: {'; '.join(problems)}")


def _compare_shape(name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} is {tuple(tensor.shape)}, and the configuration says {shape}")


def config_to_hf(config: Config) -> dict[str, Any]:
    """config.json of the model, as transformers 4 (rope_theta, rope_scaling) and 5 (rope_parameters) read it.

    Raises:
        ValueError: a shape that their model cannot have.
    """
    c = config
    scaling = _rope_scaling_to_hf(c)
    rope = {**(scaling or {"rope_type": "default"}), "rope_theta": float(c.rope_base)}
    common = {
        "vocab_size": c.padded_vocab_size,
        "hidden_size": c.n_embd,
        "intermediate_size": c.intermediate_size,
        "num_hidden_layers": c.n_layer,
        "num_attention_heads": c.n_head,
        # In dynamic scaling their model grows beyond this as it needs to, and counts from it.
        "max_position_embeddings": c.rope_original_size if c.rope_scaling == "dynamic" else c.block_size,
        "initializer_range": 0.02,
        "tie_word_embeddings": c.tie_embeddings,
        "rope_scaling": scaling,
        "use_cache": True,
        # What theirs cannot say, so that a round trip gives the same Config.
        "lit_gpt": {"name": c.name, "vocab_size": c.vocab_size},
    }
    if c.family == "llama":
        if c.rotary_percentage != 1.0:
            raise ValueError(f"LlamaForCausalLM rotates whole heads, and rotary_percentage is {c.rotary_percentage}")
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **common,
            "num_key_value_heads": c.n_query_groups,
            "head_dim": c.head_size,
            "hidden_act": "silu",
            "rms_norm_eps": c.norm_eps,
            "rope_theta": float(c.rope_base),
            "rope_parameters": rope,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "mlp_bias": False,
            "pretraining_tp": 1,
        }
    if c.n_query_groups != c.n_head or c.head_size * c.n_head != c.n_embd:
        raise ValueError(
            "GPTNeoXForCausalLM has as many key/value heads as query heads, and n_embd = n_head * head_size"
        )
    return {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        **common,
        "hidden_act": "gelu",
        "layer_norm_eps": c.norm_eps,
        "rotary_emb_base": float(c.rope_base),
        "rotary_pct": c.rotary_percentage,
        "rope_parameters": {**rope, "partial_rotary_factor": c.rotary_percentage},
        "attention_bias": True,
        "use_parallel_residual": True,
    }


# What transformers lets a config.json choose and we do not, with the value of every model that we know.
ROPE_CONSTANTS = {
    "yarn": {"beta_fast": 32, "beta_slow": 1, "truncate": True},
    "llama3": {"low_freq_factor": 1, "high_freq_factor": 4},
}


def _rope_scaling_to_hf(c: Config) -> dict[str, Any] | None:
    if c.rope_scaling == "none":
        return None
    # "type" is the name that transformers < 4.43 knew it by.
    scaling = {"type": c.rope_scaling, "rope_type": c.rope_scaling, "factor": float(c.rope_factor)}
    if c.rope_scaling in ("yarn", "llama3"):
        scaling["original_max_position_embeddings"] = c.rope_original_size
    if c.rope_scaling == "llama3":  # has no defaults there
        scaling |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    return scaling


def _rope_scaling_from_hf(rope: Mapping[str, Any], max_positions: int) -> tuple[dict[str, Any], list[str]]:
    """Fields of our Config, and what it cannot express."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return {}, []
    if kind not in ROPE_SCALINGS:
        return {}, [f"rope_scaling {kind!r} (supported: {', '.join(ROPE_SCALINGS[1:])})"]
    factor = rope.get("factor")
    if not isinstance(factor, int | float) or not factor >= 1:
        return {}, [f"rope_scaling factor {factor!r}"]
    constants = dict(ROPE_CONSTANTS.get(kind, {}))
    if kind == "yarn":
        constants["attention_factor"] = round(0.1 * math.log(factor) + 1, 6)
        if rope.get("mscale") and rope.get("mscale_all_dim"):  # one without the other means nothing to transformers
            constants["mscale"] = None
    unsupported = [
        f"rope_scaling {key} {rope[key]!r} (supported: {only})"
        for key, only in constants.items()
        if rope.get(key) is not None
        and (only is None or not isinstance(rope[key], int | float) or round(rope[key], 6) != only)
    ]
    if factor == 1:
        return {}, unsupported
    fields: dict[str, Any] = {"rope_scaling": kind, "rope_factor": float(factor)}
    if kind == "dynamic":
        fields |= {"block_size": round(max_positions * factor), "rope_original_size": max_positions}
    elif kind != "linear":
        fields["rope_original_size"] = rope.get("original_max_position_embeddings") or max_positions
    return fields, unsupported


def config_from_hf(hf: Mapping[str, Any], name: str = "") -> Config:
    """The Config of a config.json, whichever transformers wrote it.

    Args:
        name: for the model, unless the file has one.

    Raises:
        ValueError: naming each setting that our model does not have.
    """
    family = {"llama": "llama", "gpt_neox": "gptneox"}.get(str(hf.get("model_type")))
    if family is None:
        raise ValueError(f"model_type {hf.get('model_type')!r} is not supported. Supported: llama, gpt_neox")
    required = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    missing = [key for key in required if key not in hf]
    if missing:
        raise ValueError(f"config.json lacks {', '.join(missing)}")
    for key in ("rope_scaling", "rope_parameters", "lit_gpt"):
        if not isinstance(hf.get(key) or {}, dict):
            raise ValueError(f"config.json: {key} is {hf[key]!r}, and should be an object")

    # In transformers 5 everything about rope is in rope_parameters; in 4 base and scaling are apart, and the scaling's
    # kind was once called "type". An old key that is set wins, as it does in transformers 5.
    rope = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    old_base, old_share = ("rope_theta", None) if family == "llama" else ("rotary_emb_base", "rotary_pct")
    base = rope.get("rope_theta", hf.get(old_base, 10000.0))
    share = rope.get("partial_rotary_factor", hf.get(old_share, 1.0 if family == "llama" else 0.25))

    unsupported = [
        f"{key} {hf[key]!r}"
        for key, only in {
            "hidden_act": "silu" if family == "llama" else "gelu",
            "attention_bias": family == "gptneox",
            "mlp_bias": False,
            "use_parallel_residual": True,
            "quantization_config": None,
        }.items()
        if key in hf and hf[key] != only
    ]
    block_size = hf.get("max_position_embeddings", 2048)
    numbers = {"rope_theta": base, "partial_rotary_factor": share, "max_position_embeddings": block_size}
    for key, value in numbers.items():
        if type(value) not in (int, float):
            raise ValueError(f"config.json: {key} is {value!r}, and should be a number")
    scaling, beyond_ours = _rope_scaling_from_hf(rope, block_size)
    unsupported += beyond_ours
    if family == "llama" and share != 1.0:
        unsupported.append(f"partial_rotary_factor {share}")
    if unsupported:
        raise ValueError(f"the model's {'; '.join(unsupported)}: not supported")

    extra = hf.get("lit_gpt") or {}
    return Config(
        name=extra.get("name") or name,
        **{"block_size": block_size, **scaling},
        vocab_size=extra.get("vocab_size", hf["vocab_size"]),
        padded_vocab_size=hf["vocab_size"],
        n_layer=hf["num_hidden_layers"],
        n_embd=hf["hidden_size"],
        n_head=hf["num_attention_heads"],
        n_query_groups=(hf.get("num_key_value_heads") or 0) if family == "llama" else 0,
        head_size=(hf.get("head_dim") or 0) if family == "llama" else 0,
        intermediate_size=hf["intermediate_size"],
        family=family,
        norm_eps=hf.get("rms_norm_eps", 1e-6) if family == "llama" else hf.get("layer_norm_eps", 1e-5),
        rope_base=float(base),
        rotary_percentage=float(share),
        tie_embeddings=bool(hf.get("tie_word_embeddings", False)),
    )


def export(
    config: Config,
    weights: Mapping[str, torch.Tensor],
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5_000_000_000,
    special_ids: Mapping[str, int] | None = None,
) -> None:
    """Write config.json and the weights into `folder`, then read them again and compare, bit by bit.

    Args:
        weights: ours, by name; read one at a time.
        folder: exists; see weights.whole_folder for one that does not outlive a failure.
        dtype: of the files; None keeps each tensor's own.
        special_ids: bos_token_id and the like for config.json.

    Raises:
        ValueError: weights that are not the configuration's or not finite, or files that did not come back as written.
    """
    from tqdm import tqdm

    hf_config = config_to_hf(config)
    check_weights(config, weights)
    dtypes = {ours: dtype or weights[ours].dtype for ours in shapes(config)}
    layout = {
        name: (shape, dtypes[ours]) for ours, theirs in name_table(config).items() for name, shape in theirs.items()
    }
    widest = max(dtypes.values(), key=lambda d: d.itemsize)
    hf_config |= {**(special_ids or {}), "torch_dtype": str(widest).removeprefix("torch.")}
    write_json(folder / "config.json", hf_config)
    # After the cast: what fits float32 may be infinite in float16.
    tensors = ((name, check_finite(name, tensor.to(layout[name][1]))) for name, tensor in to_hf(config, weights))
    write_safetensors(folder, layout, tqdm(tensors, "writing", len(layout), unit=" tensors"), max_shard_bytes)
    verify(config, weights, folder, dtypes)


def verify(
    config: Config, weights: Mapping[str, torch.Tensor], folder: Path, dtypes: Mapping[str, torch.dtype]
) -> None:
    """Read a folder that `export` wrote the way that an importer does. Raises ValueError where it differs."""
    from tqdm import tqdm

    read_config, read = read_hf(folder)
    if read_config != config:
        raise ValueError(f"{folder}: config.json came back as another configuration: {read_config}, not {config}")
    for name in tqdm(dtypes, "verifying", unit=" tensors"):
        if not same_bits(weights[name].to(dtypes[name]), read[name]):
            raise ValueError(f"{folder}: {name} came back with other values than were written")


def read_hf(folder: Path) -> tuple[Config, LazyWeights]:
    """Configuration and weights, under our names, of a Hugging Face folder.

    Raises:
        FileNotFoundError: no config.json or weights, or a shard is missing.
        ValueError: what config_from_hf, open_weights and from_hf refuse.
    """
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} is not a Hugging Face model: no config.json")
    try:
        config = config_from_hf(read_json(folder / "config.json"), folder.resolve().name)
        return config, from_hf(config, open_weights(folder))
    except ValueError as e:
        raise e if str(folder) in str(e) else ValueError(f"{folder}: {e}") from e


def check_finite(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a ValueError that names it where it holds NaN or infinity."""
    smallest, largest = tensor.aminmax()  # NaN if there is one; unlike isfinite(tensor), without copies of the tensor
    if not (smallest.isfinite() and largest.isfinite()):
        raise ValueError(
            f"{name} holds {int((~tensor.isfinite()).sum())} values that are NaN or infinite in {tensor.dtype}"
        )
    return tensor


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether dtype, shape and every bit agree; as floats, 0.0 would equal -0.0."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(*(x.contiguous().view(-1).view(torch.uint8) for x in (a, b)))
