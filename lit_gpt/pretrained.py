"""A trained model out of whatever holds one.

    found = open_pretrained(Path("out/tiny_LLaMA_1b"))      # reads names and shapes; weights are read when used
    model = load_model(found, dtype=torch.bfloat16)

What is accepted: a run (its latest checkpoint; of sft/finetune.py, what came of the best one), a step-N checkpoint of
it, a Hugging Face folder, adapters of ours or peft's (with the model that they name), a folder that
scripts/convert_hf_checkpoint.py wrote (lit_config.json and lit_model.safetensors), and the original TinyLlama's .pth.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lit_gpt import checkpoint
from lit_gpt.config import Config
from lit_gpt.hf import check_finite, check_weights, read_hf, same_bits, shapes
from lit_gpt.hub import local_folder
from lit_gpt.kernels import Kernels
from lit_gpt.lora import ADAPTER_CONFIG, merge
from lit_gpt.model import GPT, accept_published_names
from lit_gpt.tokenizer import TOKENIZER_FILES, Tokenizer
from lit_gpt.weights import load_pickle, open_weights, read_json, write_json, write_safetensors

LIT_CONFIG, LIT_MODEL = "lit_config.json", "lit_model.safetensors"


@dataclass(frozen=True)
class Pretrained:
    path: Path
    """Where the weights are: the checkpoint that was chosen, where a run was given."""
    config: Config
    weights: Mapping[str, torch.Tensor]
    """By our names; from a Hugging Face folder or a file, each is read when it is asked for."""
    tokenizer: Path | None = None
    """Folder of the tokenizer files that came with it."""
    tokenizer_sha256: str | None = None
    """Of the tokenizer file that made the training data, where that is known."""
    delimiters: str | None = None
    """What stood around the documents in training: bos+eos, eos, bos or none; None: not known."""

    def stretched(self, rope_scaling: str, rope_factor: float) -> "Pretrained":
        """The same weights for longer sequences (Config.stretched); ("none", 1) leaves it as it is."""
        if (rope_scaling, rope_factor) == ("none", 1):
            return self
        return replace(self, config=self.config.stretched(rope_scaling, rope_factor))


def open_pretrained(path: Path, model_name: str | None = None) -> Pretrained:
    """Find out what `path` is and open it.

    Args:
        model_name: the preset, for a .pth that does not say.

    Raises:
        FileNotFoundError: nothing there that holds a model.
        ValueError: incomplete or damaged, or weights that are not the configuration's.
    """
    if path.is_file():
        return _open_file(path, model_name)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    runs = checkpoint.steps(path)
    if (path / LIT_CONFIG).is_file():
        config = _config(read_json(path / LIT_CONFIG), path / LIT_CONFIG)
        if not (path / LIT_MODEL).is_file():
            raise FileNotFoundError(f"{path / LIT_MODEL} is missing")
        found = Pretrained(path, config, open_weights(path / LIT_MODEL), _tokenizer_folder(path))
    elif (path / ADAPTER_CONFIG).is_file():
        return _open_adapters(path, model_name)
    elif (path / "config.json").is_file():
        config, weights = read_hf(path)
        found = Pretrained(path, config, weights, _tokenizer_folder(path))
    elif result := _finetuned(path, runs):
        return open_pretrained(result, model_name)
    elif (path / checkpoint.META).is_file() or runs:
        step_dir = path if (path / checkpoint.META).is_file() else runs[-1]
        meta = checkpoint.check(step_dir)
        run = step_dir.resolve().parent
        if (method := meta.get("fixed", {}).get("method", "full")) != "full":
            raise ValueError(
                f"{step_dir} holds only the adapters of --method {method}; the model is in {run / 'adapters'} once "
                "sft/finetune.py is at its end, to which --resume true goes on"
            )
        config = _config(meta["config"], step_dir / checkpoint.META)
        weights = checkpoint.load_weights(step_dir)
        sha256 = (meta.get("tokenizer") or {}).get("sha256")
        tokenizer = _tokenizer_folder(run / "tokenizer") or _tokenizer_folder(run / "hf")
        found = Pretrained(step_dir, config, weights, tokenizer, sha256, meta.get("delimiters"))
    else:
        raise FileNotFoundError(
            f"{path} holds no model: neither a step-* checkpoint, nor {LIT_CONFIG}, nor a Hugging Face config.json"
        )
    if model_name and model_name != found.config.name:
        raise ValueError(f"{path} holds model {found.config.name!r}, not {model_name!r}")
    _check(found)
    return found


def _finetuned(path: Path, runs: list[Path]) -> Path | None:
    """What a run of sft/finetune.py made of its best checkpoint. An hf/ in a run of pretraining is a copy of some step
    that the newest checkpoint may be far beyond."""
    if runs and "best" not in read_json(runs[-1] / checkpoint.META):
        return None
    return next((path / name for name in ("hf", "adapters") if (path / name).is_dir()), None)


def _open_adapters(path: Path, model_name: str | None) -> Pretrained:
    """The model that adapters were made for, with them added."""
    name = read_json(path / ADAPTER_CONFIG)["base_model_name_or_path"]
    try:
        base = open_pretrained(local_folder(name), model_name)
    except FileNotFoundError as e:
        raise FileNotFoundError(f"{path} holds adapters, and their model is not there: {e}") from e
    found = replace(base, path=path, weights=merge(base.config, base.weights, path))
    if tokenizer := _tokenizer_folder(path):
        found = replace(found, tokenizer=tokenizer, tokenizer_sha256=None)
    return found


def _open_file(path: Path, model_name: str | None) -> Pretrained:
    weights = open_weights(path)
    accept_published_names(None, weights.read, "")
    if model_name is None and path.suffix != ".safetensors":
        # The original's iter-*-ckpt.pth holds the arguments of its training run.
        model_name = (load_pickle(path).get("hparams") or {}).get("model_name")
    if model_name is None:
        raise ValueError(f"{path} does not say which model it is: give --model_name")
    found = Pretrained(path, Config.from_name(model_name), weights, _tokenizer_folder(path.parent))
    _check(found)
    return found


def _config(fields: dict, file: Path) -> Config:
    try:
        return Config(**fields)
    except TypeError as e:
        raise ValueError(f"{file} is not a model configuration of this version: {e}") from e


def _check(found: Pretrained) -> None:
    try:
        check_weights(found.config, found.weights)
    except ValueError as e:
        raise ValueError(f"{found.path}: {e}") from e


def _tokenizer_folder(folder: Path) -> Path | None:
    return folder if any((folder / name).is_file() for name in TOKENIZER_FILES) else None


def refuse_other_tokenizer(found: Pretrained, tokenizer: Tokenizer) -> None:
    """Raise ValueError when the model was trained on another tokenizer's ids, or has no row for some of this one's."""
    if found.tokenizer_sha256 not in (None, tokenizer.sha256):
        raise ValueError(
            f"{tokenizer.path} (sha256 {tokenizer.sha256[:12]}..) is not the tokenizer of the training data of "
            f"{found.path} (sha256 {found.tokenizer_sha256[:12]}..)"
        )
    if tokenizer.vocab_size > found.config.padded_vocab_size:
        raise ValueError(
            f"{tokenizer.path} has {tokenizer.vocab_size} ids, and the model in {found.path} has "
            f"{found.config.padded_vocab_size}"
        )


def resolve_device(name: str) -> str:
    """What --device means: auto is a GPU if there is one. Raises: ValueError for one that is not there."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, colon, number = name.partition(":")
    there = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if kind not in there or (colon and not number.isdecimal()):
        raise ValueError(f"--device {name}: give cpu, cuda or mps, or auto for a GPU if there is one")
    if int(number or 0) >= there[kind]:
        raise ValueError(f"--device {name}: PyTorch sees no such device here; auto takes what there is")
    return name


def load_model(
    found: Pretrained,
    kernels: Kernels | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> GPT:
    """The model with these weights, in evaluation mode. dtype None: each weight's own."""
    with torch.device("meta"):
        model = GPT(found.config, kernels)
    state = {name: found.weights[name].to(device, dtype) for name in shapes(found.config)}
    if found.config.tie_embeddings:
        state["lm_head.weight"] = state["transformer.wte.weight"]
    model.load_state_dict(state, assign=True)
    if found.config.tie_embeddings:
        model.lm_head.weight = model.transformer.wte.weight  # assign made two parameters of the one
    return model.eval().requires_grad_(False)


def write_lit(found: Pretrained, folder: Path) -> None:
    """Write lit_config.json and lit_model.safetensors into `folder`, read them again and compare, bit by bit.

    Raises:
        ValueError: a tensor with NaN or infinite values, or one that did not come back as it was written.
    """
    from tqdm import tqdm

    def finite(name: str) -> tuple[str, torch.Tensor]:
        return name, check_finite(name, found.weights[name])

    layout = {name: (shape, found.weights[name].dtype) for name, shape in shapes(found.config).items()}
    write_json(folder / LIT_CONFIG, found.config.to_dict())
    stem = LIT_MODEL.removesuffix(".safetensors")
    tensors = tqdm(map(finite, layout), "writing", len(layout), unit=" tensors")
    write_safetensors(folder, layout, tensors, max_shard_bytes=2**63, stem=stem)
    read = open_weights(folder / LIT_MODEL)
    for name in tqdm(layout, "verifying", unit=" tensors"):
        if not same_bits(found.weights[name], read[name]):
            raise ValueError(f"{folder / LIT_MODEL}: {name} came back with other values than were written")


@torch.inference_mode()
def difference_from_transformers(folder: Path) -> float | None:
    """Largest difference between our logits and transformers', both in fp32 from the Hugging Face folder, relative to
    the largest logit. None where transformers is not installed. One model is in memory at a time.
    """
    try:
        from transformers import AutoModelForCausalLM
    except ImportError:
        return None
    found = open_pretrained(folder)
    c = found.config
    generator = torch.Generator().manual_seed(0)
    idx = torch.randint(c.vocab_size, (2, min(c.block_size, 64)), generator=generator)
    ours = load_model(found, dtype=torch.float32)(idx)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(idx).logits
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()
