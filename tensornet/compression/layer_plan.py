"""Plan for one weight: network, number format, sizes, predictions; and the place of its layer."""

import math
import os.path
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from tensornet.nn.storage import PLAIN, Storage
from tensornet.topology import Topology

#: Relative error of a weight above which its predicted loss increase is uncertain: that of 2-bit integers
#: and of small ranks. Integers of three bits have 0.2 to 0.3.
LARGE_ERROR = 0.35


@dataclass(frozen=True)
class LayerPlan:
    """Plan for one weight.

    Args:
        name: module name of the (first) layer that uses the weight.
        shape: `(out_features, in_features)`.
        topology: the network that replaces it, bonds included; None keeps it dense.
        bound_by: the cap that decided, or `"dense"`.
        error: relative Frobenius error: expected in a plan, certified in a report; None if it is unknown
            because the plan was edited.
        baseline_error: error of the plain truncated SVD of the same size.
        singular_values: spectrum of the weight in descending order.
        storage: how the cores are stored.
        loss_increase: predicted loss increase per token by this layer alone, before it is corrected by
            measurements of the whole model; None without calibrated gradients.
        curve: `(parameters, predicted loss increase)` of the candidates on the convex hull, not corrected
            either.
        byte_curve: the same, with bytes in place of parameters.
        milliseconds: predicted time of a forward pass, None if no token count was given.
        dtype: dtype of the weight.

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
    byte_curve: tuple[tuple[int, float], ...] = ()
    milliseconds: float | None = None
    dtype: torch.dtype = torch.float32

    @property
    def params_before(self) -> int:
        """Dense parameters of the weight (bias not counted)."""
        return self.shape[0] * self.shape[1]

    @property
    def params_after(self) -> int:
        """Stored numbers of the planned network, padding, scales and row orders included."""
        return self.params_before if self.topology is None else self.storage.num_params(self.topology)

    @property
    def bytes_before(self) -> int:
        """Bytes of the dense weight in its own dtype."""
        return self.params_before * self.dtype.itemsize

    @property
    def bytes_after(self) -> int:
        """Bytes as planned, including packed integers, scales, zero points and row orders."""
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

    @property
    def has_large_error(self) -> bool:
        """True if the error is so large that the predicted loss increase is uncertain."""
        return self.topology is not None and self.error is not None and self.error > LARGE_ERROR

    def with_baseline(self) -> "LayerPlan":
        """Return the plan with the error of the plain SVD of the same size, from the spectrum.

        If cores have number formats, sizes are compared in bytes, with the SVD in the dtype of the model. The
        error is 0 for a dense layer.
        """
        if self.topology is None:
            return self
        size = self.bytes_after // self.dtype.itemsize if self.storage.own_dtypes else self.params_after
        energies = torch.tensor(self.singular_values, dtype=torch.float64).square()
        rank, total = max(1, size // sum(self.shape)), float(energies.sum())
        error = math.sqrt(float(energies[rank:].sum()) / total) if total > 0 else 0.0
        return replace(self, baseline_error=error)

    def summary(self) -> dict[str, Any]:
        """Return name, scheme, sizes and errors in a JSON-ready form, for reports."""
        names = ("name", "shape", "scheme", "bytes_before", "bytes_after", "params_before", "params_after")
        return {name: getattr(self, name) for name in (*names, "error", "baseline_error", "bound_by")}

    def to_dict(self) -> dict[str, Any]:
        """Convert to a JSON-ready form."""
        return {
            **{field.name: getattr(self, field.name) for field in fields(self)},
            "shape": list(self.shape),
            "topology": None if self.topology is None else self.topology.to_dict(),
            "singular_values": list(self.singular_values),
            "storage": self.storage.to_dict(),
            "curve": [list(point) for point in self.curve],
            "byte_curve": [list(point) for point in self.byte_curve],
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "LayerPlan":
        """Restore a plan from `to_dict`.

        Raises:
            KeyError, TypeError, ValueError: the data is not the plan of a layer.
        """
        topology, dtype = data["topology"], getattr(torch, data["dtype"], None)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise ValueError(f"unknown dtype {data['dtype']!r}, expected one of floats, such as 'float32'")
        known = {field.name: data[field.name] for field in fields(cls)}
        known |= {
            "shape": (data["shape"][0], data["shape"][1]),
            "topology": None if topology is None else Topology.from_dict(topology),
            "singular_values": tuple(data["singular_values"]),
            "storage": Storage.from_dict(data["storage"]),
            "curve": tuple((int(size), loss) for size, loss in data["curve"]),
            "byte_curve": tuple((int(size), loss) for size, loss in data["byte_curve"]),
            "dtype": dtype,
        }
        return cls(**known)


def describe(topology: Topology | None, storage: Storage = PLAIN) -> str:
    """Describe number formats, family and bonds in short, without boundary bonds of 1.

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


@dataclass(frozen=True)
class LayerName:
    """Parts of the name of a layer: its block, and its name within the block.

    Args:
        name: name of the layer in the model.
        block: index of the block, None outside of blocks.
        place: name of the block, such as `"layers.3"`; the name up to its last dot outside of blocks.
        kind: the rest of the name, such as `"mlp.up_proj"`.
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
    shared = len(os.path.commonprefix([p[:-1] for p in parts]))  # accepts lists as well as strings
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
