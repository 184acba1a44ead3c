"""A compression plan: which layer becomes which network. Printable, editable, saveable."""

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tensornet.compression.allocate import CostCurve, frontier
from tensornet.compression.config import OBJECTIVES
from tensornet.compression.forecast import UNMEASURED, Forecast
from tensornet.errors import FormatError, TopologyError
from tensornet.io.atomic import write_file
from tensornet.nn.encoding import PLAIN, Storage
from tensornet.topology import Topology

PLAN_VERSION = 1
_HEADER = ("objective", "damping", "dense_loss", "calibration")


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
        storage: how the cores are kept.
        loss_increase: predicted rise of the loss of a token by this layer alone, before measurements of the
            whole model correct it; None without calibrated gradients.
        curve: `(parameters, predicted loss increase)`, likewise, on the convex hull of the candidates.
        milliseconds: predicted time of a forward pass, None where no token count was given.
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

    @property
    def params_before(self) -> int:
        """Dense parameters of the weight (bias not counted)."""
        return self.shape[0] * self.shape[1]

    @property
    def params_after(self) -> int:
        """Stored numbers of the planned network, padding, scales and row orders included."""
        return self.params_before if self.topology is None else self.storage.num_params(self.topology)

    def num_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of the planned network for a weight of this dtype."""
        if self.topology is None:
            return self.params_before * dtype.itemsize
        return self.storage.num_bytes(self.topology, dtype)


@dataclass(frozen=True)
class CompressionPlan:
    """Plans of all targeted layers, in model order.

    Iterate over it, look layers up by name, `replace_layer` to edit, `save`/`load` to keep.

    Args:
        layers: the plans.
        objective: what an error was taken to cost, see `CompressionConfig`. All but `"weight"` need the
            calibration statistics again when the plan is carried out.
        damping: of the gradient moments.
        dense_loss: mean loss of a token during calibration.
        calibration: what the statistics were collected on.
        tokens: for which `milliseconds` were predicted.
        forecast: corrects the sum over layers, where rises were measured (`PreparedPlan.measured`).
        topology_options: options of the family that the topologies were built with.
    """

    layers: tuple[LayerPlan, ...]
    objective: str = "weight"
    damping: float = 0.0
    dense_loss: float | None = None
    calibration: str | None = None
    tokens: int | None = None
    forecast: Forecast = UNMEASURED
    topology_options: Mapping[str, Any] | None = None

    def __iter__(self) -> Iterator[LayerPlan]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, name: str) -> LayerPlan:
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(f"No layer {name!r} in the plan; it has {[layer.name for layer in self.layers]}.")

    @property
    def params_before(self) -> int:
        """Dense parameters of all targeted weights."""
        return sum(layer.params_before for layer in self.layers)

    @property
    def params_after(self) -> int:
        """Parameters of all targeted weights as planned."""
        return sum(layer.params_after for layer in self.layers)

    @property
    def predicted_loss_increase(self) -> float | None:
        """Rise of the loss of a token that all layers together will cause; None if nothing was calibrated.

        Second order in the errors and without interplay between layers: close for small rises, low for
        large ones, unless measurements corrected it.
        """
        total = _sum([layer.loss_increase for layer in self.layers])
        return None if total is None else self.forecast.rise(total)

    @property
    def predicted_milliseconds(self) -> float | None:
        """Time of one forward pass of `tokens` tokens through all layers together, by the cost model."""
        return _sum([layer.milliseconds for layer in self.layers])

    @property
    def predicted_perplexity(self) -> float | None:
        """Perplexity of the calibration text after compression, or of the text that was measured."""
        rise = self.predicted_loss_increase
        return None if rise is None or self.dense_loss is None else math.exp(self.dense_loss + rise)

    def predictions(self) -> dict[str, float | None]:
        """Predictions, JSON-ready: loss increase, perplexity, milliseconds; None for those unknown."""
        names = ("predicted_loss_increase", "predicted_perplexity", "predicted_milliseconds")
        return {name: getattr(self, name) for name in names}

    def curve(self, points: int = 64) -> list[tuple[int, float]]:
        """`(parameters of all targeted layers, predicted rise of the loss)` over all budgets, largest first.

        Empty without calibrated gradients.
        """
        if any(not layer.curve for layer in self.layers):
            return []
        hulls = [torch.tensor(layer.curve, dtype=torch.float64) for layer in self.layers]
        pairs = frontier([CostCurve(hull[:, 0], hull[:, 1]) for hull in hulls], points)
        return [(int(size), self.forecast.rise(cost)) for size, cost in pairs]

    def replace_layer(self, name: str, topology: Topology | None) -> "CompressionPlan":
        """A plan in which one layer becomes `topology` (None: stays dense).

        Its cores are encoded as before, as far as the family allows. Error and predicted loss increase of
        that layer are no longer known; both are 0 where it stays dense.

        Raises:
            KeyError: no such layer.
            TopologyError: not a topology, or for a matrix of another shape.
        """
        old = self[name]
        if topology is None:
            rise = None if old.loss_increase is None else 0.0
            edited = replace(old, topology=None, bound_by="dense", error=0.0, baseline_error=0.0)
            edited = replace(edited, storage=PLAIN, loss_increase=rise, milliseconds=None)
        else:
            _check_topology(old, topology)
            storage = old.storage.for_topology(topology)
            edited = replace(old, topology=topology, bound_by="edited", error=None, storage=storage)
            edited = with_baseline(replace(edited, loss_increase=None, milliseconds=None))
        return replace(self, layers=tuple(edited if x.name == name else x for x in self.layers))

    def __str__(self) -> str:
        width = max((len(layer.name) for layer in self.layers), default=5)
        lines = [f"{'layer':<{width}}  {'form':<28} {'parameters':>24} {'error':>8} {'plain SVD':>9}"]
        for layer in self.layers:
            form = "dense" if layer.topology is None else describe(layer.topology)
            size = f"{layer.params_before:,} -> {layer.params_after:,}"
            error = "?" if layer.error is None else f"{layer.error:.4f}"
            errors = f"{error:>8} {layer.baseline_error:>9.4f}"
            lines.append(f"{layer.name:<{width}}  {form:<28} {size:>24} {errors}")
        lines.append(f"total: {self.params_before:,} -> {self.params_after:,} parameters")
        if self.predicted_loss_increase is not None:
            seen = f" (measured on {self.forecast.source})" if self.forecast.source else ""
            text = f"predicted rise of the loss of a token: {self.predicted_loss_increase:.4f}{seen}"
            if self.dense_loss is not None and self.predicted_perplexity is not None:
                text += f", perplexity {math.exp(self.dense_loss):.4g} -> {self.predicted_perplexity:.4g}"
            lines.append(text)
        if self.predicted_milliseconds is not None:
            lines.append(f"predicted for {self.tokens} tokens: {self.predicted_milliseconds:.4g} ms")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        data = {name: getattr(self, name) for name in _HEADER}
        return {
            "version": PLAN_VERSION,
            **data,
            "tokens": self.tokens,
            "forecast": self.forecast.to_dict(),
            "topology_options": None if self.topology_options is None else dict(self.topology_options),
            "layers": [_layer_to_dict(x) for x in self.layers],
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "CompressionPlan":
        """Inverse of `to_dict`.

        Raises:
            FormatError: not a plan, of an unknown version, or edited to something else.
        """
        if not isinstance(data, dict) or data.get("version") != PLAN_VERSION:
            raise FormatError(f"Not a compression plan of version {PLAN_VERSION}.")
        try:
            layers = tuple(_layer_from_dict(layer) for layer in data["layers"])
            header = {name: data[name] for name in _HEADER}
            forecast = Forecast.from_dict(data["forecast"]) if "forecast" in data else UNMEASURED
            options = data.get("topology_options")
            if not isinstance(options, Mapping | None):
                raise TypeError(f"topology_options must be a mapping, got {options!r}")
            made = cls(
                layers,
                **header,
                tokens=data.get("tokens"),
                forecast=forecast,
                topology_options=options,
            )
            _check(made)
            return made
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise FormatError(f"Bad compression plan: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON; an earlier file stays until the new one is complete.

        Raises:
            DestinationError: the file cannot be written there.
        """
        write_file(Path(path), [json.dumps(self.to_dict(), indent=1).encode()], what="The plan")

    @classmethod
    def load(cls, path: str | Path) -> "CompressionPlan":
        """Read a plan written by `save`.

        Raises:
            FormatError: not a plan.
        """
        try:
            data = json.loads(Path(path).read_text())
        except (OSError, ValueError, RecursionError) as error:
            raise FormatError(f"Cannot read a compression plan from {path}: {error}") from error
        return cls.from_dict(data)


def low_rank_error(spectrum: Tensor, shape: tuple[int, int], params: int) -> float:
    """Relative error of the truncated SVD that has at most this many parameters (rank at least 1)."""
    rank = max(1, params // (shape[0] + shape[1]))
    energies = spectrum.square()
    total = float(energies.sum())
    return math.sqrt(float(energies[rank:].sum()) / total) if total > 0 else 0.0


def with_baseline(layer: LayerPlan) -> LayerPlan:
    """The plan with the error of the plain SVD of its size, by its spectrum; 0 for a dense layer."""
    if layer.topology is None:
        return layer
    spectrum = torch.tensor(layer.singular_values, dtype=torch.float64)
    return replace(layer, baseline_error=low_rank_error(spectrum, layer.shape, layer.params_after))


def _check_topology(layer: LayerPlan, topology: Topology) -> None:
    if not isinstance(topology, Topology):
        raise TopologyError(
            f"Layer {layer.name!r} can become a Topology, such as tensornet.topologies.mpo(...), or None to "
            f"stay dense; got {topology!r}."
        )
    if topology.shape != layer.shape:
        raise TopologyError(
            f"Layer {layer.name!r} has shape {layer.shape}, the topology is for {topology.shape}; build one "
            "with out_features and in_features of the layer."
        )


def _check(plan: CompressionPlan) -> None:
    """Raise unless a plan that was read is consistent.

    Raises:
        ValueError, TopologyError: what does not fit.
    """
    if plan.objective not in OBJECTIVES:
        raise ValueError(f"unknown objective {plan.objective!r}")
    if not 0 <= plan.damping < math.inf:
        raise ValueError(f"damping must be at least 0, got {plan.damping!r}")
    if not plan.layers:
        raise ValueError("it holds no layer")
    name, count = Counter(layer.name for layer in plan).most_common(1)[0]
    if count > 1:
        raise ValueError(f"layer {name!r} is there {count} times")
    for layer in plan:
        if layer.topology is not None:
            _check_topology(layer, layer.topology)
            layer.storage.num_params(layer.topology)


def _sum(values: Sequence[float | None]) -> float | None:
    """Sum of the values; None if empty or if any is None."""
    known = [value for value in values if value is not None]
    return sum(known) if known and len(known) == len(values) else None


def describe(topology: Topology) -> str:
    """Family and bonds in a few characters, boundary bonds of 1 left out."""
    bonds = [size for size in topology.bond_dims.values() if size > 1] or [1]
    return f"{topology.family} {'x'.join(map(str, bonds))}"


def _layer_to_dict(layer: LayerPlan) -> dict[str, Any]:
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
    }


def _layer_from_dict(data: dict[str, Any]) -> LayerPlan:
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
        milliseconds=data.get("milliseconds"),
    )
