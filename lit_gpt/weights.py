"""Files of weights: read lazily and written tensor by tensor, so that a model is never twice in memory.

weights = open_weights(Path("TinyLlama-1.1B"))     # name -> tensor, each read when it is asked for
with whole_folder(Path("out/hf")) as folder:       # appears under its name when all of it is written
    write_safetensors(folder, layout, tensors)
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch

INDEX = "model.safetensors.index.json"
FORMATS = (INDEX, "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin")
DTYPE_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}

Layout = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
"""Name -> (shape, dtype) of every tensor of a file, which its header needs before the first tensor is there."""


class LazyWeights(Mapping[str, torch.Tensor]):
    """Name -> tensor, made anew at each access from a function of no arguments."""

    def __init__(self, read: dict[str, Callable[[], torch.Tensor]]) -> None:
        self.read = read

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.read[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self.read)

    def __len__(self) -> int:
        return len(self.read)


def open_weights(path: Path) -> LazyWeights:
    """The tensors of a file (.safetensors, or torch's .bin/.pth) or of a Hugging Face folder, sharded or not.

    Raises:
        FileNotFoundError: no weights there, or a shard that the index lists is missing.
        ValueError: a file that is damaged, that holds more than tensors, or an index with paths in it.
    """
    if path.is_file():
        return _open_file(path)
    found = [path / name for name in FORMATS if (path / name).is_file()]
    if not found:
        raise FileNotFoundError(f"{path}: no weights there. Looked for {', '.join(FORMATS)}")
    if not found[0].name.endswith(".index.json"):
        return _open_file(found[0])

    index = read_json(found[0]).get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(file, str) for file in index.values()):
        raise ValueError(f"{found[0]}: no weight_map of names to files")
    shards = {}
    for file in sorted(set(index.values())):
        # An index comes with a download: it may name its neighbours, not the rest of the disk.
        if file in ("", ".", "..") or re.search(r"[/\\:\0]", file):
            raise ValueError(f"{found[0]}: {file!r} is a path, not the name of a file in the same folder")
        if not (path / file).is_file():
            raise FileNotFoundError(f"{path / file} is missing, and {found[0].name} lists it")
        shards[file] = _open_file(path / file).read
    for name, file in index.items():
        if name not in shards[file]:
            raise ValueError(f"{path / file} does not hold {name}, and {found[0].name} says so")
    return LazyWeights({name: shards[file][name] for name, file in index.items()})


def _open_file(path: Path) -> LazyWeights:
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            file = safe_open(path, framework="pt")
        except SafetensorError as e:
            raise ValueError(f"{path} is damaged, or not a safetensors file: {e}") from e
        return LazyWeights({name: lambda name=name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118

    tensors = load_pickle(path)
    tensors = tensors.get("model", tensors)  # a training state of the original TinyLlama
    wrong = [str(name) for name, value in tensors.items() if not isinstance(value, torch.Tensor)]
    if wrong:
        raise ValueError(f"{path} is not a file of weights: {', '.join(wrong[:3])} .. are not tensors")
    return LazyWeights({name: lambda name=name: tensors[name] for name in tensors})


def load_pickle(path: Path) -> dict[str, Any]:
    """A dict that torch.save wrote, its tensors left on the disk until used. Only data is unpickled, never code.

    Raises:
        ValueError: damaged, not a dict, or a pickle that would run code.
    """
    try:
        with open(path, "rb") as f:
            is_zip = f.read(4) == b"PK\3\4"  # what torch has written since 1.6, and what it can map
        data = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except OSError:
        raise
    except Exception as e:  # a damaged file raises whatever its bytes happen to mean
        code = re.search(r"GLOBAL (\S+)", str(e))
        what = f"a pickle that wants to run {code[1]}" if code else "damaged, or not a file that torch.save wrote"
        raise ValueError(f"{path} is refused: {what}") from e
    if not isinstance(data, dict):
        raise ValueError(f"{path} is not a file of weights: it holds a {type(data).__name__}")
    return data


def write_safetensors(
    folder: Path,
    layout: Layout,
    tensors: Iterable[tuple[str, torch.Tensor]],
    max_shard_bytes: int = 5_000_000_000,
    stem: str = "model",
) -> None:
    """Write {stem}.safetensors, or {stem}-00001-of-0000N.safetensors with an index where one file would exceed
    max_shard_bytes (a tensor is never split).

    The library's own writer wants all tensors of a file at once; the format (8 bytes of header length, a JSON header,
    the bytes) lets us hold one.

    Args:
        layout: what `tensors` will give, in the same order.
        tensors: (name, tensor); cast to the layout's dtype here.
    """
    sizes = {name: torch.Size(shape).numel() * dtype.itemsize for name, (shape, dtype) in layout.items()}
    shards: list[list[str]] = [[]]
    for name, size in sizes.items():
        if shards[-1] and sum(sizes[n] for n in shards[-1]) + size > max_shard_bytes:
            shards.append([])
        shards[-1].append(name)
    files = [f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        files = [f"{stem}.safetensors"]

    source = iter(tensors)
    for file, names in zip(files, shards, strict=True):
        with open(folder / file, "wb") as f:
            f.write(_safetensors_header({name: layout[name] for name in names}))
            for expected in names:
                name, tensor = next(source)
                shape, dtype = layout[name]
                assert name == expected and tuple(tensor.shape) == shape, (name, expected, tensor.shape, shape)
                _write_tensor(f, tensor.to(dtype))
            f.flush()
            os.fsync(f.fileno())
    if len(shards) > 1:
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        write_json(folder / f"{stem}.safetensors.index.json", index)


def _safetensors_header(layout: Layout) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (shape, dtype) in layout.items():
        begin, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    data = json.dumps(header, separators=(",", ":")).encode()
    data += b" " * (-len(data) % 8)  # so that the tensors are aligned in a memory map
    return len(data).to_bytes(8, "little") + data


def _write_tensor(f: BinaryIO, tensor: torch.Tensor) -> None:
    f.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)


def parse_bytes(size: str) -> int:
    """ "5GB" -> 5_000_000_000. Raises ValueError for anything but a number and KB, MB, GB or nothing."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMG]?)B?", size.strip(), re.IGNORECASE)
    if not match or float(match[1]) == 0:
        raise ValueError(f"{size!r} is not a size. Write for example 5GB or 500MB")
    return int(float(match[1]) * 1000 ** " KMG".index(match[2].upper() or " "))


@contextmanager
def whole_folder(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder that becomes `path` when the block ends well, and vanishes when it does not.

    Raises:
        FileExistsError: `path` is there, holds something, and `overwrite` is false.
    """
    if not overwrite and path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} exists already. Give another folder, or --overwrite true")
    temporary = path.with_name(path.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if path.is_dir():
            shutil.rmtree(path)
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def whole_file(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """The same for one file."""
    if not overwrite and path.exists():
        raise FileExistsError(f"{path} exists already. Give another file, or --overwrite true")
    temporary = path.with_name(path.name + ".tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises ValueError naming the file where it is not one."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise ValueError(f"{path} is not JSON: {e}") from e
    if not isinstance(data, dict):
        raise ValueError(f"{path} is not a JSON object")
    return data


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
