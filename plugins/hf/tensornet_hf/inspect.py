"""Inspect a folder of a model or of specialists by its description and headers, without loading weights."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensornet.compression.plan import scheme_name
from tensornet.io import read_header
from tensornet.nn.storage import Storage
from tensornet.topology import Topology
from tensornet_hf.checkpoint import read_checkpoint, weight_bytes
from tensornet_hf.quantizer import DTYPES, promised_tensors
from tensornet_hf.specialist_files import read_description


def inspect_folder(folder: str | Path) -> dict[str, Any]:
    """Check a model folder (see `read_checkpoint`), and describe it by its configuration and file headers.

    Returns:
        JSON-ready facts about the model:

        - `folder`, and `architecture`, the class in its configuration
        - `format_version` of the compression's description, None for an ordinary model
        - `params`, the count of stored numbers (each packed integer counts), and `dtypes`, the count by dtype
        - `bytes`, the size of the weight files
        - `ties`, the names of tensors that are stored under another name, `{name: stored name}`
        - `layers`, a list with an entry for each compressed module: `name`, `form` (number formats, topology
          family and bonds), `shape` and `dense_params` (None for a module of several matrices), `params`,
          `bytes`, and `dtype` of the cores (None if the cores are stored under another name)

    Raises:
        FormatError: a file or tensor is missing, surplus, damaged or contradictory; the message names it.
    """
    checkpoint = read_checkpoint(folder)
    description, tensors = checkpoint.compression, checkpoint.tensors
    specs = {} if description is None else description.layers
    promised = promised_tensors(specs)
    counts = {name: promised[name].numbers if name in promised else x.numel for name, x in tensors.items()}
    dtypes: dict[str, int] = {}
    for name, tensor in tensors.items():
        dtype = DTYPES.get(tensor.dtype, tensor.dtype)
        dtypes[dtype] = dtypes.get(dtype, 0) + counts[name]
    layers = []
    for name, spec in specs.items():
        own = {key: tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}
        cores = [tensor.dtype for key, tensor in own.items() if key.startswith(f"{name}.core_")]
        form, shape = " ".join(part for part in ("+".join(_formats(spec)), str(spec["type"])) if part), None
        if spec["type"] in ("linear", "embedding"):
            topology = Topology.from_dict(spec["topology"])
            form, shape = scheme_name(topology, Storage.from_dict(spec.get("storage", {}))), topology.shape
        layers.append(
            {
                "name": name,
                "form": form,
                "shape": shape,
                "params": sum(counts[key] for key in own),
                "bytes": sum(tensor.nbytes for tensor in own.values()),
                "dense_params": None if shape is None else math.prod(shape),
                "dtype": DTYPES.get(cores[0], cores[0]) if cores else None,
            }
        )
    return {
        "folder": str(folder),
        "architecture": str((checkpoint.config.get("architectures") or ["unknown class"])[0]),
        "format_version": None if description is None else description.format_version,
        "params": sum(dtypes.values()),
        "bytes": weight_bytes(folder),
        "dtypes": dtypes,
        "layers": layers,
        "ties": {} if description is None else dict(description.ties),
    }


def inspect_specialists(folder: str | Path) -> dict[str, Any]:
    """Describe a folder of specialists by its description and file headers.

    Returns:
        JSON-ready facts:

        - `trunk`, the folder or hub id of the model, None if unknown
        - `layers`, the number of layers that have specialists
        - `shared`, the bytes of the shared cores
        - `specialists`, the bytes of each specialist by name
        - `next`, the bytes of a new one; None for packed models, each of which has bytes of its own

    Raises:
        FormatError: a file is missing or damaged.
    """
    path = Path(folder).expanduser()
    description = read_description(path)
    sizes = {
        name: sum(tensor.nbytes for tensor in read_header(path / f"{name}.safetensors").values())
        for name in ("shared", *description.specialists)
    }
    shared = sizes.pop("shared")
    changed = {layer for layers in description.changes.values() for layer in layers}
    return {
        "trunk": description.trunk,
        "layers": len(description.layers) or len(changed),
        "shared": shared,
        "specialists": sizes,
        # All specialists that were trained together have cores of the same shapes.
        "next": None if changed else next(iter(sizes.values())),
    }


def _formats(spec: Mapping[str, Any]) -> list[str]:
    """List the number formats of all cores inside a module, without repetition."""
    storage = Storage.from_dict(spec.get("storage", {}))
    found = [storage.number_format.name, *(each.name for _, each in storage.core_formats)]
    for part in spec.values():
        for inner in (part, *(part.values() if isinstance(part, Mapping) else ())):
            if isinstance(inner, Mapping) and "type" in inner:
                found += _formats(inner)
    return [name for name in dict.fromkeys(found) if name != "float"]
