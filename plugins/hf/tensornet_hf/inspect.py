"""Inspect a model folder by its file headers; no weight is loaded."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tensornet.compression.plan import describe
from tensornet.io import Slice
from tensornet.nn.storage import Storage
from tensornet.topology import Topology
from tensornet_hf.checkpoint import WEIGHT_SUFFIXES, Checkpoint, read_checkpoint
from tensornet_hf.quantizer import DTYPES, promised_tensors


@dataclass(frozen=True)
class StoredLayer:
    """One compressed module of a folder.

    Args:
        name: name in the model.
        form: number formats, family and bonds; for modules with several matrices, their kind.
        shape: `(out_features, in_features)`, None for modules with several matrices.
        params: stored numbers, bias and scales included; 0 if the cores are stored under another name.
        bytes: size of these in the file.
        dense_params: elements of the dense weight (bias not counted), None for modules with several matrices.
        dtype: dtype of the cores, None if they are stored under another name.
    """

    name: str
    form: str
    shape: tuple[int, int] | None
    params: int
    bytes: int
    dense_params: int | None
    dtype: str | None


@dataclass(frozen=True)
class Inspection:
    """Contents of a model folder, as its file headers describe them.

    Args:
        folder: the folder.
        architecture: class named in its configuration.
        format_version: version of the description of compressed modules, None for an ordinary model.
        params: stored numbers of the whole model; each packed integer counts as one.
        bytes: size of the weight files.
        dtypes: stored numbers by dtype of their tensors; integers of fewer than 8 bits are packed in uint8.
        layers: the compressed modules.
        ties: names whose tensor is stored under another name.
    """

    folder: str
    architecture: str
    format_version: int | None
    params: int
    bytes: int
    dtypes: dict[str, int]
    layers: tuple[StoredLayer, ...]
    ties: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Convert to a JSON-ready form."""
        return asdict(self)


def inspect_folder(folder: str | Path) -> Inspection:
    """Describe a model folder by its headers, with the checks of `tensornet_hf.load`.

    Raises:
        FormatError: something is missing, surplus, damaged or contradictory; the message names it.
    """
    checkpoint = read_checkpoint(folder)
    description = checkpoint.compression
    counts = _stored_numbers(checkpoint)
    dtypes: dict[str, int] = {}
    for name, tensor in checkpoint.tensors.items():
        dtype = DTYPES.get(tensor.dtype, tensor.dtype)
        dtypes[dtype] = dtypes.get(dtype, 0) + counts[name]
    names = checkpoint.config.get("architectures") or ["unknown class"]
    return Inspection(
        folder=str(folder),
        architecture=str(names[0]),
        format_version=None if description is None else description.format_version,
        params=sum(dtypes.values()),
        bytes=weight_bytes(folder),
        dtypes=dtypes,
        layers=()
        if description is None
        else tuple(
            _stored_layer(name, spec, checkpoint.tensors, counts) for name, spec in description.layers.items()
        ),
        ties={} if description is None else dict(description.ties),
    )


def weight_bytes(folder: str | Path) -> int:
    """Sum the sizes of the safetensors files of a folder (of its other weight files if it has none)."""
    files = [file for file in Path(folder).iterdir() if file.suffix in WEIGHT_SUFFIXES]
    safe = [file for file in files if file.suffix == ".safetensors"]
    return sum(file.stat().st_size for file in safe or files)


def _stored_numbers(checkpoint: Checkpoint) -> dict[str, int]:
    """Count the numbers in every stored tensor; each packed integer counts as one."""
    layers = {} if checkpoint.compression is None else checkpoint.compression.layers
    promised = promised_tensors(layers)
    return {
        name: promised[name].numbers if name in promised else tensor.numel
        for name, tensor in checkpoint.tensors.items()
    }


def _stored_layer(
    name: str, spec: Mapping[str, Any], tensors: Mapping[str, Slice], counts: Mapping[str, int]
) -> StoredLayer:
    own = {key: tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}
    cores = [tensor.dtype for key, tensor in own.items() if key.startswith(f"{name}.core_")]
    topology = Topology.from_dict(spec["topology"]) if "topology" in spec else None
    storage = Storage.from_dict(spec.get("storage", {}))
    single = topology is not None and spec["type"] in ("linear", "embedding")
    return StoredLayer(
        name=name,
        form=describe(topology, storage) if topology is not None and single else _form(spec),
        shape=topology.shape if topology is not None and single else None,
        params=sum(counts[key] for key in own),
        bytes=sum(tensor.nbytes for tensor in own.values()),
        dense_params=math.prod(topology.shape) if topology is not None and single else None,
        dtype=DTYPES.get(cores[0], cores[0]) if cores else None,
    )


def _form(spec: Mapping[str, Any]) -> str:
    """Describe a module of several matrices by its kind and the number formats of its cores."""
    return " ".join(part for part in ("+".join(_formats(spec)), str(spec["type"])) if part)


def _formats(spec: Mapping[str, Any]) -> list[str]:
    """List the number formats of all cores inside a module, without repetition."""
    storage = Storage.from_dict(spec.get("storage", {}))
    found = [storage.number_format.name, *(each.name for _, each in storage.core_formats)]
    for part in spec.values():
        for inner in (part, *(part.values() if isinstance(part, Mapping) else ())):
            if isinstance(inner, Mapping) and "type" in inner:
                found += _formats(inner)
    return [name for name in dict.fromkeys(found) if name != "float"]
