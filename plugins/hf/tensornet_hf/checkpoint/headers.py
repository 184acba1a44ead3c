"""Read a model folder without loading it, and compare its description with the stored tensors.

Only headers are read. Nothing here allocates a weight, and nothing unpickles.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tensornet.errors import FormatError
from tensornet.io import read_headers as locate_tensors
from tensornet.nn.fixed_dtypes import FixedDtypes
from tensornet.nn.serialization import build_module
from tensornet_hf.checkpoint.describe import is_inside
from tensornet_hf.checkpoint.guards import without_guards
from tensornet_hf.checkpoint.json_files import read_json
from tensornet_hf.checkpoint.links import inside
from tensornet_hf.checkpoint.quantization_config import METHOD, TensorNetworkConfig

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
#: Other forms of weights; a compressed model must not carry the dense ones along.
WEIGHT_SUFFIXES = (
    ".safetensors", ".bin", ".pt", ".pth", ".pkl", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".ot",
    ".npz", ".onnx_data", ".tflite", ".mlmodel",
)  # fmt: skip

#: Names of dtypes in safetensors headers.
DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}


@dataclass(frozen=True)
class StoredTensor:
    """Dtype, shape and file of a stored tensor.

    Args:
        dtype: name as in torch, such as `"float32"`.
        shape: its shape.
        file: the file that holds it.
    """

    dtype: str
    shape: tuple[int, ...]
    file: Path

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        itemsize: int = getattr(torch, self.dtype).itemsize
        return math.prod(self.shape) * itemsize


@dataclass(frozen=True)
class PromisedTensor:
    """Shape of a described tensor, its dtype where a number format fixes it, and the numbers it holds."""

    shape: tuple[int, ...]
    dtype: str | None
    numbers: int


@dataclass(frozen=True)
class Checkpoint:
    """Validated model folder: its configuration, description and tensor headers.

    Args:
        folder: where it is.
        config: content of `config.json`.
        compression: description of the compressed modules, None for an ordinary model.
        tensors: every stored tensor by name, guards left out (see `tensornet_hf.checkpoint.guards`).
    """

    folder: Path
    config: dict[str, Any]
    compression: TensorNetworkConfig | None
    tensors: dict[str, StoredTensor]

    @property
    def files(self) -> tuple[Path, ...]:
        """Files that hold weights."""
        return tuple(sorted({tensor.file for tensor in self.tensors.values()}))


def read_checkpoint(folder: str | Path) -> Checkpoint:
    """Read and check a model folder.

    Raises:
        FormatError: something is missing, surplus, damaged or contradictory; the message names it.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise FormatError(_not_a_model(folder))
    config = read_json(inside(folder, "config.json"))
    tensors = read_headers(weight_files(folder)[0])
    compression = read_compression(config)
    if compression is not None:
        tensors = without_guards(tensors)
        check_layers(compression, tensors, where=str(folder))
    elif cores := [name for name in tensors if _names_a_core(name)]:
        raise FormatError(
            f"{folder} stores cores ({cores[0]} and {len(cores) - 1} more), but its config.json has no "
            "quantization_config that describes them. Restore the config.json that was saved with the model; "
            "if layers were replaced by hand, call tensornet_hf.prepare_for_saving(model) before saving it."
        )
    return Checkpoint(folder, config, compression, tensors)


def read_compression(config: Mapping[str, Any]) -> TensorNetworkConfig | None:
    """Return the description of the compressed modules in a configuration, None for an ordinary model.

    Raises:
        FormatError: it is damaged, of an unknown version, or of another quantization method.
    """
    entry = config.get("quantization_config")
    if entry is None:
        return None
    if not isinstance(entry, dict) or entry.get("quant_method") != METHOD:
        method = entry.get("quant_method") if isinstance(entry, dict) else entry
        raise FormatError(
            f"The model is quantized by {method!r}, not by {METHOD!r}. Use the original model, with weights "
            "in floating point."
        )
    try:
        return TensorNetworkConfig(**entry)
    except FormatError:
        raise
    except (TypeError, ValueError) as error:
        raise FormatError(f"The quantization_config of the model is damaged: {error}") from error


def weight_files(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """Find the safetensors files of a model folder.

    Returns:
        The files, and the index `{tensor: file name}`, empty for a single file.

    Raises:
        FormatError: no such file, one of the index is missing or lies elsewhere, or weights are pickled.
    """
    if (folder / WEIGHTS).is_file():
        return [inside(folder, WEIGHTS)], {}
    if not (folder / INDEX).is_file():
        other = sorted(x.name for x in folder.iterdir() if x.suffix in WEIGHT_SUFFIXES)
        if not other:
            raise FormatError(f"{folder} holds no weights: there is no {WEIGHTS} and no {INDEX}.")
        raise FormatError(
            f"{folder} holds no {WEIGHTS} and no {INDEX}, only {', '.join(other)}. Pickles can run code and "
            "are never opened: convert them where you trust them, with model.save_pretrained(folder)."
        )
    index = read_json(inside(folder, INDEX)).get("weight_map")
    if not isinstance(index, dict) or not index or not all(isinstance(x, str) for x in index.values()):
        raise FormatError(f"{folder / INDEX} has no weight_map from tensors to files.")
    names = sorted(set(index.values()))
    for name in names:
        if Path(name).name != name or Path(name).suffix != ".safetensors":
            raise FormatError(
                f"{folder / INDEX} names {name!r:.200}: only safetensors files beside the index are read, "
                "nothing outside the folder."
            )
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise FormatError(
            f"{folder} lacks {', '.join(missing)}, which {INDEX} names. Copy or download it again."
        )
    return [inside(folder, name) for name in names], index


def read_headers(files: Iterable[Path]) -> dict[str, StoredTensor]:
    """Read names, dtypes and shapes of all tensors in safetensors files.

    Raises:
        FormatError: a file is truncated or damaged, or two hold the same name.
    """
    return {
        name: StoredTensor(DTYPES.get(part.dtype, part.dtype), part.shape, part.file)
        for name, part in locate_tensors(files).items()
    }


def check_layers(
    compression: TensorNetworkConfig, tensors: Mapping[str, StoredTensor], *, where: str
) -> None:
    """Compare the tensors that a description of compressed modules promises with the stored headers.

    Args:
        compression: the description.
        tensors: the headers.
        where: folder, for messages.

    Raises:
        FormatError: a description that nothing can be built from, or a missing, surplus or wrong tensor.
    """
    expected: dict[str, PromisedTensor] = {}
    known: dict[str, dict[str, PromisedTensor]] = {}  # by description: the layers of a model repeat a few
    for layer, spec in compression.layers.items():
        if (key := repr(spec)) not in known:
            known[key] = promised_tensors(layer, spec)
        expected |= {f"{layer}.{name}": tensor for name, tensor in known[key].items()}
    stored = {name: tensor for name, tensor in expected.items() if name not in compression.ties}
    in_file = _renaming(list(stored), tensors)
    for name, tensor in stored.items():
        _check_tensor(tensors.get(in_file(name)), name, tensor, compression.stored_dtype(name), where)
    for name, owner in compression.ties.items():
        there = tensors.get(in_file(owner))
        wanted = expected.get(name)
        if there is None or owner in compression.ties or wanted is None or there.shape != wanted.shape:
            raise FormatError(
                f"{where}: quantization_config ties {name} to {owner}, which is not a stored tensor of that "
                "shape."
            )
    described = {in_file(name) for name in stored}
    layers = {in_file(layer) for layer in compression.layers}
    if surplus := sorted(k for k in tensors.keys() - described if is_inside(k, layers) or _names_a_core(k)):
        raise FormatError(
            f"{where}: {', '.join(surplus)} stored, but not described in config.json. The weight files and "
            "config.json belong to different saves."
        )


def _check_tensor(
    stored: StoredTensor | None, name: str, promised: PromisedTensor, dtype: str | None, where: str
) -> None:
    if stored is None:
        raise FormatError(
            f"{where}: {name} is missing. config.json promises it, the weight files do not hold it: they "
            "belong to another save, or one is incomplete."
        )
    if stored.shape != promised.shape:
        raise FormatError(
            f"{where}: {name} is stored with shape {list(stored.shape)}, its description says "
            f"{list(promised.shape)}."
        )
    if dtype is not None and stored.dtype != dtype:
        raise FormatError(f"{where}: {name} is stored as {stored.dtype}, its description says {dtype}.")
    in_training = stored.dtype == "float32" and (promised.dtype or "").endswith("float16")
    if promised.dtype not in (None, stored.dtype) and not in_training:
        raise FormatError(
            f"{where}: {name} is stored as {stored.dtype}, but the number format of its layer in config.json "
            f"claims {promised.dtype}. The weight files and config.json belong to different saves: restore "
            "the config.json that was saved with these weights, or compress the model again."
        )


def _renaming(names: list[str], tensors: Mapping[str, StoredTensor]) -> Callable[[str], str]:
    """Return the map from names in the description to names in the files.

    They differ by a prefix if one was written for a part of the model and the other for the whole.
    """
    if not names or any(name in tensors for name in names):
        return str
    longer = next((key for key in tensors if key.endswith("." + names[0])), None)
    if longer is not None:
        return lambda name: longer.removesuffix(names[0]) + name
    part, _, shorter = names[0].partition(".")
    return (lambda name: name.removeprefix(part + ".")) if shorter in tensors else str


def _names_a_core(name: str) -> bool:
    return name.rpartition(".")[2].startswith("core_")


def promised_tensors(layer: str, spec: Mapping[str, Any]) -> dict[str, PromisedTensor]:
    """Return shapes and dtypes of all tensors of a described module; nothing is allocated.

    Raises:
        FormatError: nothing can be built from the description.
    """
    try:
        module = build_module(spec, device="meta")
    except (FormatError, RuntimeError, OverflowError, MemoryError) as error:
        # torch raises RuntimeError for sizes beyond what it can count
        raise FormatError(
            f"The description of {layer!r} in quantization_config is unusable: {error!s:.500}"
        ) from error
    fixed = {
        f"{part}.{name}" if part else name: str(dtype).removeprefix("torch.")
        for part, inner in module.named_modules()
        if isinstance(inner, FixedDtypes)
        for name, dtype in inner.fixed_dtypes.items()
    }
    counts = {
        f"{part}.{name}" if part else name: count
        for part, inner in module.named_modules()
        if isinstance(inner, FixedDtypes)
        for name, count in inner.stored_counts.items()
    }
    return {
        name: PromisedTensor(tuple(x.shape), fixed.get(name), counts.get(name, x.numel()))
        for name, x in module.state_dict().items()
    }


def _not_a_model(folder: Path) -> str:
    what = (
        "is a file" if folder.is_file() else "does not exist" if not folder.exists() else "has no config.json"
    )
    return (
        f"{folder} is not a model folder: it {what}. Give a folder written by save_pretrained, or a hub id."
    )
