"""Plan for one weight: its network and number format, sizes and predictions, and the place of its layer."""

import math
import os.path
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tensornet.nn.storage import PLAIN, Storage
from tensornet.topology import Topology


@dataclass(frozen=True)
class LayerPlan:
    """Plan for one weight.

    Args:
        name: module name of the (first) layer that uses the weight.
        shape: `(out_features, in_features)`.
        topology: the network that replaces it, bonds included; None keeps it dense.
        bound_by: the cap that decided, or `"dense"`.
        error: expected relative Frobenius error; None where the plan was edited and it is not known yet.
        baseline_error: error of the plain truncated SVD with the same number of parameters.
        singular_values: spectrum of the weight in descending order, for pictures.
        storage: encoding of the cores.
        loss_increase: predicted loss increase per token by this layer alone, before measurements of the
            whole model correct it; None without calibrated gradients.
        curve: `(parameters, predicted loss increase)`, likewise, on the convex hull of the candidates.
        milliseconds: predicted time of a forward pass, None where no token count was given.
        dtype: of the weight.
        byte_curve: as `curve`, over bytes.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(32, 64))
        >>> layer = tn.plan(model, tn.CompressionConfig(max_bond=4, topology="low_rank"))["0"]
        >>> layer.shape, layer.topology.family, layer.params_after, layer.bound_by
        ((64, 32), 'low_rank', 384, 'max_bond')
    """

    name: str
    shape: tuple[int, int]
    topology: Topology | None
    bound_by: str
    error: float | None
    baseline_error: float
    singular_values: tuple[float, ...] = ()
    storage: Storage = PLAIN
    loss_increase: float | None = None
    curve: tuple[tuple[int, float], ...] = ()
    milliseconds: float | None = None
    dtype: torch.dtype = torch.float32
    byte_curve: tuple[tuple[int, float], ...] = ()

    @property
    def params_before(self) -> int:
        """Dense parameters of the weight (bias not counted)."""
        return self.shape[0] * self.shape[1]

    @property
    def params_after(self) -> int:
        """Stored numbers of the planned network, padding, scales and row orders included."""
        if self.topology is None:
            return self.params_before
        return self.storage.num_params(self.topology)

    @property
    def bytes_before(self) -> int:
        """Bytes of the dense weight in its own dtype."""
        return self.params_before * self.dtype.itemsize

    @property
    def bytes_after(self) -> int:
        """Bytes as planned: packed integers, scales, zero points and row orders included."""
        if self.topology is None:
            return self.bytes_before
        return self.storage.num_bytes(self.topology, self.dtype)

    @property
    def bits_per_weight(self) -> float:
        """Planned bits for each element of the dense weight."""
        return 8 * self.bytes_after / self.params_before

    @property
    def scheme(self) -> str:
        """Number formats, topology family and bonds, or `"dense"`."""
        return describe(self.topology, self.storage)


def describe(topology: Topology | None, storage: Storage = PLAIN) -> str:
    """Abbreviate number formats, family and bonds, without boundary bonds of 1.

    Example:
        >>> topology = tn.topologies.low_rank(out_features=64, in_features=64, rank=8)
        >>> describe(topology, Storage(number_format="int8"))
        'int8 low_rank 8'
    """
    if topology is None:
        return "dense"
    bonds = [size for size in topology.bond_dims.values() if size > 1]
    if not bonds and topology.bond_dims:
        bonds = [1]
    names = [storage.format_of(name).name for name in topology.core_names]
    formats = "+".join(dict.fromkeys(name for name in names if name != "float"))
    parts = [formats, topology.family, "x".join(map(str, bonds))]
    return " ".join(part for part in parts if part)


def low_rank_error(spectrum: Tensor, shape: tuple[int, int], params: int) -> float:
    """Compute the relative error of the truncated SVD with at most this many parameters."""
    rank = max(1, params // (shape[0] + shape[1]))
    energies = spectrum.square()
    total = float(energies.sum())
    return math.sqrt(float(energies[rank:].sum()) / total) if total > 0 else 0.0


def with_baseline(layer: LayerPlan) -> LayerPlan:
    """Add the error of the plain SVD of the same size, from the spectrum; 0 for a dense layer.

    The size is that in bytes where cores have number formats, and the SVD is kept in the model's dtype.
    """
    if layer.topology is None:
        return layer
    spectrum = torch.tensor(layer.singular_values, dtype=torch.float64)
    size = layer.params_after
    if layer.storage.own_dtypes:
        size = layer.bytes_after // layer.dtype.itemsize
    return replace(layer, baseline_error=low_rank_error(spectrum, layer.shape, size))


def layer_to_dict(layer: LayerPlan) -> dict[str, Any]:
    """Convert the plan of one layer to a JSON-ready form."""
    return {
        "name": layer.name,
        "shape": list(layer.shape),
        "topology": None if layer.topology is None else layer.topology.to_dict(),
        "bound_by": layer.bound_by,
        "error": layer.error,
        "baseline_error": layer.baseline_error,
        "singular_values": list(layer.singular_values),
        "storage": layer.storage.to_dict(),
        "loss_increase": layer.loss_increase,
        "curve": [list(point) for point in layer.curve],
        "milliseconds": layer.milliseconds,
        "dtype": str(layer.dtype).removeprefix("torch."),
        "byte_curve": [list(point) for point in layer.byte_curve],
    }


def layer_from_dict(data: dict[str, Any]) -> LayerPlan:
    """Restore the plan of one layer."""
    topology = data["topology"]
    return LayerPlan(
        name=data["name"],
        shape=(data["shape"][0], data["shape"][1]),
        topology=None if topology is None else Topology.from_dict(topology),
        bound_by=data["bound_by"],
        error=data["error"],
        baseline_error=data["baseline_error"],
        singular_values=tuple(data["singular_values"]),
        storage=Storage.from_dict(data["storage"]),
        loss_increase=data["loss_increase"],
        curve=tuple((int(size), cost) for size, cost in data["curve"]),
        milliseconds=data["milliseconds"],
        dtype=_dtype(data["dtype"]),
        byte_curve=tuple((int(size), cost) for size, cost in data["byte_curve"]),
    )


def _dtype(name: str) -> torch.dtype:
    """Look up a floating-point dtype by its name.

    Raises:
        ValueError: torch has no floating-point dtype of this name.
    """
    found = getattr(torch, name, None) if isinstance(name, str) else None
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"unknown dtype {name!r}, expected a floating-point one of torch, such as 'float32'")
    return found


@dataclass(frozen=True)
class LayerName:
    """Parts of the name of a layer: its block, and its name within the block.

    Args:
        name: in the model.
        block: index of the block, None outside of blocks.
        place: name of the block, such as `"layers.3"`; the name up to its last dot outside of blocks.
        kind: what follows, such as `"mlp.up_proj"`.
    """

    name: str
    block: int | None
    place: str
    kind: str


def layer_names(names: Sequence[str]) -> list[LayerName]:
    """Split the names of layers at the number of their block.

    Example:
        >>> from tensornet.compression.layer_plan import layer_names
        >>> parts = layer_names(["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"])
        >>> [(part.place, part.kind) for part in parts]
        [('layers.0', 'mlp.up_proj'), ('layers.1', 'mlp.up_proj')]
    """
    parts = [name.split(".") for name in names]
    shared = len(os.path.commonprefix([p[:-1] for p in parts]))  # works on lists as on strings
    found = []
    for name, part in zip(names, parts, strict=True):
        at = next((k for k, word in enumerate(part) if word.isdigit()), None)
        if at is None or at == len(part) - 1:
            block, cut = None, len(part) - 1
        else:
            block, cut = int(part[at]), at + 1
        first = max(0, min(shared - 1, cut - 2))
        found.append(LayerName(name, block, ".".join(part[first:cut]), ".".join(part[cut:])))
    return found
