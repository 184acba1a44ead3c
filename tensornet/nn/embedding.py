"""Embedding whose table is a tensor network: rows are computed from the cores without building the table."""

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from tensornet._util import transforms_active
from tensornet.contraction.plan import TOKEN, ContractionPlan, plan_contraction, plan_sum, run
from tensornet.decompose import decompose
from tensornet.errors import ShapeError, TargetError
from tensornet.linalg.weighted_svd import Weighting
from tensornet.network import TensorNetwork
from tensornet.nn.layer_kinds import Scale, ScaledEmbedding, embedding_scale, kind_of, layer_kind
from tensornet.nn.module import NetworkModule, register_module_type
from tensornet.nn.storage import PLAIN, Storage, decode, row_cores, storage_entry
from tensornet.nn.strategy import Strategy
from tensornet.nn.unfuse import type_and_reason
from tensornet.quantization import Rounding
from tensornet.topologies import TopologyFamily
from tensornet.topology import Topology


class MPOEmbedding(NetworkModule):
    """Embedding that computes rows of its table `W: (num_embeddings, embedding_dim)` without building `W`.

    The index of a token is split into one digit for each out-leg. The digits select a slice of each core, and
    the slices are contracted for all tokens at once. This works for any topology.

    Args:
        topology: topology of `W`; its out-legs index the vocabulary, and its in-legs the embedding dimension.
        padding_idx: stored for information only; the row with this index is treated like any other row.
        scale: constant by which the rows are multiplied after they have been computed. It does not belong to
            `W`, which an output head may share.
        strategy, storage, device, dtype: see `NetworkModule`. `"factorized"` and `"auto"` read slices;
            `"reconstruct"` builds the table in each call.

    Example:
        >>> table = torch.nn.Embedding(1000, 64)
        >>> small = tn.nn.MPOEmbedding.from_embedding(table, sites=3, max_bond=8)
        >>> small(torch.tensor([[1, 5, 9]])).shape, small.num_params
        (torch.Size([1, 3, 64]), 3200)
    """

    def __init__(
        self,
        topology: Topology,
        *,
        padding_idx: int | None = None,
        scale: Scale | None = None,
        strategy: Strategy = "auto",
        storage: Storage = PLAIN,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            topology, source="embedding", strategy=strategy, storage=storage, device=device, dtype=dtype
        )
        self.num_embeddings, self.embedding_dim = topology.shape
        self.padding_idx, self.scale = padding_idx, scale
        self.lookup = plan_lookup(topology)
        self._row_cores = row_cores(topology, storage)

    def forward(self, input: Tensor) -> Tensor:
        """Map token indices `input: (...)` to vectors `(..., embedding_dim)`."""
        if self.strategy == "reconstruct":
            rows = nn.functional.embedding(input, self.to_matrix())
        else:
            rows = self._look_up(input)
        return rows if self.scale is None else self.scale.times(rows)

    def _look_up(self, indices: Tensor) -> Tensor:
        """Compute the rows of the given indices from slices of the cores.

        Args:
            indices: token indices of any shape.

        Returns:
            The rows, shape `(*indices.shape, embedding_dim)`.

        Raises:
            IndexError: an index lies outside the table. On a GPU a device-side assertion fails instead, as in
                `nn.Embedding`.
            ShapeError: the indices are neither int64 nor int32.
        """
        topology, dtype = self.topology, self.dtype
        if indices.dtype not in (torch.int64, torch.int32):
            raise ShapeError(f"Token indices must be torch.int64 or torch.int32, got {indices.dtype}.")
        flat = indices.reshape(-1)
        outside = (flat < 0) | (flat >= topology.out_features)
        readable = flat.is_cpu and type(flat) is Tensor and not is_compiling() and not transforms_active()
        if readable and bool(outside.any()):
            raise IndexError(
                f"Token index {int(flat[outside][0])} is outside the table, which has the rows 0 to "
                f"{topology.out_features - 1}."
            )
        digits, rest = {}, flat
        for label, size in zip(reversed(topology.out_labels), reversed(topology.out_dims), strict=True):
            digits[label] = rest % size
            rest = torch.div(rest, size, rounding_mode="floor")
        # If the table is padded, an index outside of it can still have valid digits. Such an index gets a
        # first digit that is too large, so that indexing the first core raises an error.
        first, size = topology.out_labels[0], topology.out_dims[0]
        digits[first] = torch.where(outside, size, digits[first])
        slices, sizes = [], topology.size_of
        for spec, core in zip(topology.cores, self.stored_cores, strict=True):
            if spec.name in self._row_cores and not isinstance(core, Tensor):
                # Unpack only the requested rows of integers.
                row = torch.zeros_like(flat)
                for label in (x for x in spec.labels if x in digits):
                    row = row * sizes[label] + digits[label]
                shape = [sizes[label] for label in spec.labels if label not in digits]
                slices.append(core.matrix(dtype, row).reshape(-1, *shape))
            else:
                (dense,) = decode([core], dtype)
                slices.append(_take(dense, spec.labels, digits))
        rows = run(self.lookup, slices).reshape(flat.shape[0], topology.padded_shape[1])
        return rows[:, : topology.in_features].reshape(*indices.shape, topology.in_features)

    @classmethod
    def from_embedding(
        cls,
        layer: nn.Embedding,
        *,
        topology: str | TopologyFamily | Topology = "mpo",
        max_bond: int | None = None,
        rel_error: float | None = None,
        param_ratio: float | None = None,
        **options: Any,
    ) -> "MPOEmbedding":
        """Decompose the table of an embedding into a new layer that shares no memory with the old one.

        Args:
            layer: an `nn.Embedding`, or one of a subclass that only multiplies the rows by a constant; it is
                not changed.
            topology, max_bond, rel_error, param_ratio, options: see `TensorNetworkLinear.from_linear`.

        Raises:
            TargetError: the layer has another type, or a `max_norm`.
            BudgetError, NonFiniteError, TopologyError: see `tensornet.decompose`.
        """
        kind = kind_of(layer)
        if kind is None or kind.name != "embedding":
            raise TargetError(
                f"from_embedding takes nn.Embedding, got {type_and_reason(layer)}"
                f"{'' if getattr(layer, 'max_norm', None) is None else ' whose max_norm changes its rows'}."
            )
        result = decompose(
            layer.weight, topology, max_bond=max_bond, rel_error=rel_error, param_ratio=param_ratio, **options
        )
        network = result.network.to(layer.weight.dtype)
        return embedding_from_network(network, padding_idx=layer.padding_idx, scale=embedding_scale(layer))

    def to_embedding(self, matrix: Tensor | None = None) -> nn.Embedding:
        """Convert to an `nn.Embedding`, or to a `ScaledEmbedding` if the rows are multiplied by a constant.

        Args:
            matrix: table of the embedding, shape `(num_embeddings, embedding_dim)`; by default, the table
                rebuilt from the cores.
        """
        with torch.no_grad():
            matrix = self.own_matrix() if matrix is None else matrix
            if self.scale is None:
                layer: Any = layer_kind("embedding").build(matrix, None)
            else:
                rows, columns = matrix.shape
                layer = ScaledEmbedding(rows, columns, self.scale, device="meta")
                layer.weight = nn.Parameter(matrix)
        assert isinstance(layer, nn.Embedding)
        layer.padding_idx = self.padding_idx
        return layer

    def spec(self) -> dict[str, Any]:
        """Return the JSON-ready description of the layer (see `NetworkModule.spec`)."""
        return {
            "type": "embedding",
            "source": self.source,
            "padding_idx": self.padding_idx,
            **({} if self.scale is None else {"scale": self.scale._asdict()}),
            "topology": self.topology.to_dict(),
            **storage_entry(self.storage),
        }

    def extra_repr(self) -> str:
        """Show sizes, topology and bonds in `print(model)`."""
        bonds = list(self.topology.bond_dims.values())
        scale = "" if self.scale is None else f", scale={self.scale.factor:g}"
        topology = f"topology={self.topology.family}, bonds={bonds}"
        return f"{self.num_embeddings}, {self.embedding_dim}{scale}, {topology}"


def _take(core: Tensor, labels: tuple[str, ...], digits: dict[str, Tensor]) -> Tensor:
    """Select a slice of a core for each token, according to the digits of the token.

    Args:
        core: the core.
        labels: label of each axis.
        digits: for each out-leg, the digits of the tokens, shape `(tokens,)`.

    Returns:
        The slices, shape `(tokens, *remaining axes)`; the core itself if it has no out-leg.
    """
    legs = [axis for axis, label in enumerate(labels) if label in digits]
    if not legs:
        return core
    rest = [axis for axis in range(core.ndim) if axis not in legs]
    return core.permute(*legs, *rest)[tuple(digits[labels[axis]] for axis in legs)]


@lru_cache(maxsize=256)
def plan_lookup(topology: Topology) -> ContractionPlan:
    """Plan the contraction of the slices of all cores (see `_take`) to rows, shape `(tokens, *in_dims)`."""
    if topology.terms:
        return plan_sum([(places, plan_lookup(part)) for places, part in topology.parts])
    legs = set(topology.out_labels)
    operands = []
    for core in topology.cores:
        rest = tuple(x for x in core.labels if x not in legs)
        operands.append((TOKEN, *rest) if len(rest) < len(core.labels) else rest)
    return plan_contraction(operands, (TOKEN, *topology.in_labels), {**topology.size_of, TOKEN: 256})


def embedding_from_network(
    network: TensorNetwork,
    *,
    padding_idx: int | None = None,
    scale: Scale | None = None,
    storage: Storage = PLAIN,
    weighting: Weighting | None = None,
    rounding: Rounding = "two_sided",
) -> MPOEmbedding:
    """Build an embedding from the cores of a network, in their dtype and on their device.

    Args:
        network: topology and cores of the table.
        padding_idx, scale, storage: arguments of `MPOEmbedding`.
        weighting, rounding: how cores are rounded to integers (see `NetworkModule.set_cores`).
    """
    layer = MPOEmbedding(
        network.topology, padding_idx=padding_idx, scale=scale, storage=storage, device="meta"
    )
    layer.set_cores(network.cores, weighting, rounding)
    return layer


def _build(
    spec: Mapping[str, Any], device: torch.device | str | None, dtype: torch.dtype | None
) -> MPOEmbedding:
    topology, storage = Topology.from_dict(spec["topology"]), Storage.from_dict(spec.get("storage", {}))
    scale = None
    if (entry := spec.get("scale")) is not None:
        scale = Scale(float(entry["factor"]), bool(entry["rounded"]))
        if not math.isfinite(scale.factor):
            raise ValueError(f"the factor of its rows is {scale.factor}")
    return MPOEmbedding(
        topology, padding_idx=spec["padding_idx"], scale=scale, storage=storage, device=device, dtype=dtype
    )


register_module_type("embedding", _build)
