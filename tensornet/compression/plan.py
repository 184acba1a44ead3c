"""Compression plans: the topology and number format of every layer, to print, edit, save and apply."""

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from tensornet._util import check_number, check_size, compact_bytes
from tensornet.compression.allocate import CostCurve, frontier
from tensornet.compression.config import EFFORTS, Effort
from tensornet.compression.coverage import Coverage
from tensornet.errors import FormatError, TopologyError
from tensornet.io import write_file
from tensornet.nn.storage import PLAIN, Storage
from tensornet.nn.targets import shortened
from tensornet.quantization import NumberFormat, Rounding
from tensornet.quantization.grids import grid_name
from tensornet.quantization.menus import MENUS, bytes_for
from tensornet.quantization.rounding import ROUNDINGS
from tensornet.topologies import dense
from tensornet.topology import Topology

#: Predicted losses and errors may be negative by rounding.
_ROUNDING = 1e-6
PLAN_VERSION = 1
#: How errors can be weighted (see `CompressionConfig.objective`).
OBJECTIVES = ("weight", "activation", "curvature")
#: What a plan says if nearly every layer has its smallest number format.
NO_CHOICE = (
    "nearly every layer has its smallest number format, so little was left to choose; effort='thorough' "
    "(--effort thorough) also plans low rank, which may lose less at this size"
)
#: Largest size of such a plan, relative to the smallest plan.
_LITTLE_CHOICE = 1.1
#: Relative error of a weight above which the predicted loss increase is uncertain. Integers of 2 bits and
#: networks of small rank have larger errors. Integers of 3 bits have errors of 0.2 to 0.3.
LARGE_ERROR = 0.35


@dataclass(frozen=True)
class LayerPlan:
    """Plan for one weight.

    Args:
        name: module name of the layer that uses the weight, or of the first such layer.
        shape: shape of the weight, `(out_features, in_features)`.
        topology: topology of the network that replaces the weight; None keeps the weight dense.
        bound_by: name of the limit that determined the choice, or `"dense"`.
        error: relative Frobenius error of the weight: an estimate in a plan, certified in a report; None if
            it is unknown because the plan was edited.
        baseline_error: relative error of a plain truncated SVD of the same size, for comparison; None if the
            plan was edited.
        storage: how the cores are stored.
        loss_increase: predicted loss increase per token due to errors in this layer alone; None without
            calibrated gradients.
        curve: `(bytes, predicted loss increase)` of the candidates on the convex hull.
        dtype: dtype of the weight.
        sample: four elements of the weight, from `weight_samples`, to recognize the model; if empty, the
            weight is not checked.
        target: export target in whose files the bytes are counted; None for files of this library.
        shared_core: name of a core that the network shares with those of other weights, and the name of the
            weight that stores it, whose sizes include it; None if the network shares nothing.
        grid: name of the smallest considered number format on whose grid the weight lies already, so that it
            loses nothing in this format; None if there is none.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(32, 64))
        >>> config = tn.CompressionConfig(topology="low_rank", topology_options={"max_bond": 4})
        >>> layer = tn.plan(model, config)["0"]
        >>> layer.shape, layer.topology.family, layer.params_after, layer.bound_by
        ((64, 32), 'low_rank', 384, 'max_bond')
    """

    name: str
    shape: tuple[int, int]
    topology: Topology | None
    bound_by: str
    error: float | None
    baseline_error: float | None = None
    storage: Storage = PLAIN
    loss_increase: float | None = None
    curve: tuple[tuple[int, float], ...] = ()
    dtype: torch.dtype = torch.float32
    sample: tuple[float, ...] = ()
    target: str | None = None
    shared_core: tuple[str, str] | None = None
    grid: str | None = None

    @property
    def params_before(self) -> int:
        """Number of elements of the dense weight, without the bias."""
        return self.shape[0] * self.shape[1]

    @property
    def params_after(self) -> int:
        """Planned number of stored values, with padding, scales, and row permutations of pivoted cores."""
        if self.topology is None:
            return self.params_before
        return self.storage.num_params(self.topology) - self._stored_elsewhere[0]

    @property
    def bytes_before(self) -> int:
        """Bytes of the dense weight in its own dtype."""
        return self.params_before * self.dtype.itemsize

    @property
    def bytes_after(self) -> int:
        """Planned bytes of all stored values: weights or cores, scales, minima, and row permutations."""
        if self.topology is None:
            return self.bytes_before
        if self.target is not None:  # plans for export targets have no networks
            return bytes_for(self.target, self.storage.number_format, self.shape, self.dtype)
        return self.storage.num_bytes(self.topology, self.dtype) - self._stored_elsewhere[1]

    @property
    def _stored_elsewhere(self) -> tuple[int, int]:
        """Number of values and bytes of a core that another weight stores."""
        if self.topology is None or self.shared_core is None or self.shared_core[1] == self.name:
            return 0, 0
        return self.storage.core_size(self.topology, self.shared_core[0], self.dtype)

    @property
    def bits_per_weight(self) -> float:
        """Planned number of bits per element of the dense weight."""
        return 8 * self.bytes_after / self.params_before

    @property
    def scheme(self) -> str:
        """Number formats, topology family and bonds, or `"dense"`."""
        shared = "" if self.shared_core is None else f", core {self.shared_core[0]} shared"
        return scheme_name(self.topology, self.storage) + shared

    @property
    def keeps_grid(self) -> bool:
        """True if the weight lies on the grid of a number format, and is stored without loss."""
        return self.grid is not None and self.error == 0

    @property
    def has_large_error(self) -> bool:
        """True if the error is above `LARGE_ERROR`, so that the predicted loss increase is uncertain."""
        return self.topology is not None and self.error is not None and self.error > LARGE_ERROR

    def with_baseline(self, spectrum: Sequence[float]) -> "LayerPlan":
        """Return a copy of the plan with `baseline_error` computed from the singular values of the weight.

        The baseline is the truncated SVD of the same size. If cores have number formats, it has the same
        number of bytes, with the factors in the dtype of the model.

        Args:
            spectrum: singular values of the weight in descending order.
        """
        if self.topology is None:
            return replace(self, baseline_error=0.0)
        size = self.bytes_after // self.dtype.itemsize if self.storage.own_dtypes else self.params_after
        energies = torch.tensor(spectrum, dtype=torch.float64).square()
        rank, total = max(1, size // sum(self.shape)), float(energies.sum())
        share = float(energies[rank:].sum()) / total if total > 0 else 0.0
        return replace(self, baseline_error=math.sqrt(share))

    def summary(self) -> dict[str, Any]:
        """Return name, scheme, sizes and errors as a JSON-ready dict, for reports."""
        names = ("name", "shape", "scheme", "bytes_before", "bytes_after", "params_before", "params_after")
        return {name: getattr(self, name) for name in (*names, "error", "baseline_error", "bound_by")}

    def to_dict(self) -> dict[str, Any]:
        """Convert to a JSON-ready dict."""
        return {
            **{field.name: getattr(self, field.name) for field in fields(self)},
            "shape": list(self.shape),
            "topology": None if self.topology is None else self.topology.to_dict(),
            "sample": list(self.sample),
            "shared_core": self.shared_core and list(self.shared_core),
            "storage": self.storage.to_dict(),
            "curve": [list(point) for point in self.curve],
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "LayerPlan":
        """Restore the plan of a layer from the result of `to_dict`.

        Raises:
            KeyError, TypeError, ValueError: the data is not the plan of a layer.
        """
        topology, dtype = data["topology"], getattr(torch, data["dtype"], None)
        if not isinstance(dtype, torch.dtype) or not (dtype.is_floating_point or dtype.is_complex):
            raise ValueError(f"unknown dtype {data['dtype']!r}, expected a float dtype such as 'float32'")
        data = {"grid": None, **data}  # files written before grids were found have no such entry
        known = {field.name: data[field.name] for field in fields(cls)}
        known |= {
            "shape": (data["shape"][0], data["shape"][1]),
            "topology": None if topology is None else Topology.from_dict(topology),
            "sample": tuple(data["sample"]),
            "storage": Storage.from_dict(data["storage"]),
            "curve": tuple((int(size), loss) for size, loss in data["curve"]),
            "dtype": dtype,
            "shared_core": None if (shared := data["shared_core"]) is None else (shared[0], shared[1]),
        }
        return cls(**known)


def scheme_name(topology: Topology | None, storage: Storage = PLAIN) -> str:
    """Return the name of a scheme: number formats, topology family, and sizes of bonds larger than 1."""
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
class CompressionPlan:
    """Plans of all targeted layers, in model order.

    A plan can be iterated over, indexed by the name of a layer, edited with `replace_layer`, saved and
    loaded.

    Args:
        layers: the plan of each layer.
        objective: how errors were weighted (see `CompressionConfig`). Unless it is `"weight"`, the
            calibration statistics are needed again to apply the plan.
        rounding: how integers are rounded (see `CompressionConfig`).
        effort: effort of the survey (see `CompressionConfig`).
        dense_loss: mean loss of a token during calibration.
        calibration: name of the data on which the statistics were collected.
        of_tokens: True if `dense_loss` is the cross entropy of tokens, whose exponential is the perplexity.
        unseen: names of targeted layers that stay dense because they never ran in calibration.
        unrouted: names of experts that received no token in calibration; they are planned with the mean
            moments of the other experts of their layer.
        unfit: for each number format that does not fit some layers, because its groups do not divide their
            number of inputs, the names of these layers.
        model_params_before, model_bytes_before: number of stored values of the whole model, and their bytes,
            if the plan was made for a folder.
        coverage: counts of the parameters that the plan covers and of those that it skips, in the same case.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 32))
        >>> limit = {"max_bond": 4}
        >>> config = tn.CompressionConfig(target_modules="all", topology="low_rank", topology_options=limit)
        >>> plan = tn.plan(model, config)
        >>> [(layer.name, layer.params_before, layer.params_after) for layer in plan]
        [('0', 2048, 384), ('2', 2048, 384)]
        >>> plan = plan.replace_layer("2", None)  # keep this layer dense
        >>> plan.params_after / plan.params_before < 0.6
        True
    """

    layers: tuple[LayerPlan, ...]
    objective: str = "weight"
    dense_loss: float | None = None
    calibration: str | None = None
    of_tokens: bool = False
    unseen: tuple[str, ...] = ()
    unrouted: tuple[str, ...] = ()
    unfit: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    rounding: Rounding = "two_sided"
    effort: Effort = "thorough"
    model_params_before: int | None = None
    model_bytes_before: int | None = None
    coverage: Coverage | None = None

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
    def stacks(self) -> list[tuple[str, ...]]:
        """Names of the weights of each stack whose networks share a core."""
        found: dict[tuple[str, str], list[str]] = {}
        for layer in self.layers:
            if layer.shared_core is not None:
                found.setdefault(layer.shared_core, []).append(layer.name)
        return [tuple(names) for names in found.values()]

    @property
    def survey_kind(self) -> str:
        """Kind of the survey that the plan needs (see `CompressionConfig.survey_kind`)."""
        networks = any(x.topology is not None and x.topology.family != "dense" for x in self.layers)
        return "networks" if networks and self.effort == "fast" else self.effort

    @property
    def has_no_choice(self) -> bool:
        """True if nearly every layer has its smallest number format, and networks were not considered."""
        planned = [x for x in self.layers if len(x.curve) > 1 and x.target is None]
        least = sum(x.curve[0][0] for x in planned)
        small = sum(x.bytes_after for x in planned) <= _LITTLE_CHOICE * least
        return bool(planned) and small and self.survey_kind == "fast"

    @property
    def reads_data(self) -> bool:
        """True if the layers are compressed with moments of calibration data."""
        return self.objective != "weight"

    @property
    def params_before(self) -> int:
        """Number of elements of all targeted weights."""
        return sum(layer.params_before for layer in self.layers)

    @property
    def params_after(self) -> int:
        """Planned number of stored values of all targeted weights."""
        return sum(layer.params_after for layer in self.layers)

    @property
    def bytes_before(self) -> int:
        """Bytes of all targeted weights in their own dtypes."""
        return sum(layer.bytes_before for layer in self.layers)

    @property
    def bytes_after(self) -> int:
        """Planned bytes of all targeted weights."""
        return sum(layer.bytes_after for layer in self.layers)

    @property
    def bits_per_weight(self) -> float:
        """Planned number of bits per element of the targeted weights."""
        return 8 * self.bytes_after / self.params_before

    @property
    def model_params_after(self) -> int | None:
        """Planned number of stored values of the whole model; None if the model's size is unknown."""
        before = self.model_params_before
        return None if before is None else before - self.params_before + self.params_after

    @property
    def model_bytes_after(self) -> int | None:
        """Planned bytes of the whole model; None if the model's size is unknown."""
        before = self.model_bytes_before
        return None if before is None else before - self.bytes_before + self.bytes_after

    @property
    def predicted_loss_increase(self) -> float | None:
        """Predicted loss increase per token due to errors in all layers, or None if gradients are missing.

        The prediction is of second order in the errors and neglects interactions between layers. It is
        accurate for small loss increases and too low for large ones. For losses that are not of tokens, such
        as the cosine distance of encoders, it is usually too low: on all-MiniLM-L6-v2 by 20 to 40 %.
        """
        known = [x.loss_increase for x in self.layers if x.loss_increase is not None]
        return sum(known) if known and len(known) == len(self.layers) else None

    @property
    def predicted_kl(self) -> float | None:
        """Predicted mean divergence `KL(dense || compressed)` of the next token, in nats.

        To second order this is the predicted loss increase. The reason: gradients for the labels of a text
        have about the same second moments as gradients for labels drawn from the model, and the latter
        moments are the Fisher information. The result is None if no loss was predicted, or if the loss is not
        that of tokens.
        """
        return self.predicted_loss_increase if self.of_tokens else None

    @property
    def predicted_perplexity(self) -> float | None:
        """Predicted perplexity on the calibration text; None if no token loss was predicted."""
        increase = self.predicted_loss_increase
        known = increase is not None and self.dense_loss is not None and self.of_tokens
        return math.exp(self.dense_loss + increase) if known else None  # type: ignore[operator]

    def predictions(self) -> dict[str, float | None]:
        """Collect all predictions in a JSON-ready dict, with None for unknown ones."""
        names = ("predicted_loss_increase", "predicted_kl", "predicted_perplexity")
        return {name: getattr(self, name) for name in names}

    def predicted_change(self) -> str:
        """Describe the predicted change of the perplexity, or of the loss if it is not a loss per token.

        The text is empty if the value of the loss has no meaning, as for the cosine distance of encoders.

        >>> tn.CompressionPlan(()).predicted_change()
        ''
        """
        increase = self.predicted_loss_increase
        if increase is None or self.dense_loss is None:
            return ""
        before, after = self.dense_loss, self.dense_loss + increase
        if self.of_tokens:
            return f", perplexity {math.exp(before):.4g} -> {math.exp(after):.4g}"
        return f", from {before:.4g} to {after:.4g}"

    def curve(self, points: int = 64) -> list[tuple[int, float]]:
        """Compute the predicted loss increase of the best plan at each of many sizes, without planning again.

        Args:
            points: largest number of points.

        Returns:
            Pairs `(bytes of all targeted layers, predicted loss increase)`, by decreasing size; empty without
            calibrated gradients.
        """
        if not all(layer.curve for layer in self.layers):
            return []
        hulls = [torch.tensor(layer.curve, dtype=torch.float64) for layer in self.layers]
        pairs = frontier([CostCurve(hull[:, 0], hull[:, 1]) for hull in hulls], points)
        return [(int(size), cost) for size, cost in pairs]

    def replace_layer(
        self, name: str, topology: Topology | None, storage: Storage | str | None = None
    ) -> "CompressionPlan":
        """Return a copy of the plan in which one layer has another topology and storage.

        The error and predicted loss increase of this layer become unknown, or 0 if it becomes dense.

        Args:
            name: name of the layer.
            topology: topology of the network; None means the dense matrix.
            storage: storage of the cores, or the name of a number format. If absent, cores keep the storage
                of the old plan as far as the family allows; a dense matrix is stored in the model's dtype.

        Raises:
            FormatError: a number format is unknown, or is given for a core that does not exist.
            KeyError: the plan has no layer of this name.
            TopologyError: the topology has another shape or type, or the layer shares a core with others.

        Example:
            >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64))
            >>> plan = tn.plan(model, tn.CompressionConfig(topology_options={"max_bond": 8}))
            >>> plan.replace_layer("0", None, "int4").bits_per_weight
            4.25
        """
        old = self[name]
        if old.shared_core is not None:
            others = [x.name for x in self.layers if x.shared_core == old.shared_core and x.name != name]
            raise TopologyError(
                f"{name!r} shares core {old.shared_core[0]} with {shortened(others)}, so it cannot change "
                "alone. Plan again without share_experts, or exclude the layer (exclude_modules)."
            )
        if isinstance(storage, str):
            storage = Storage(number_format=NumberFormat.parse(storage))
        if topology is None and storage is not None and not storage.plain:
            topology = dense(out_features=old.shape[0], in_features=old.shape[1])
        if topology is None:
            loss = None if old.loss_increase is None else 0.0
            made: dict[str, Any] = {
                "bound_by": "dense",
                "error": 0.0,
                "baseline_error": 0.0,
                "storage": PLAIN,
                "loss_increase": loss,
            }
        else:
            _check_topology(old, topology)
            kept = (storage or replace(old.storage, core_formats=())).for_topology(topology)
            kept.num_params(topology)  # raises an error if `kept` has formats for unknown cores
            unknown = dict.fromkeys(("error", "baseline_error", "loss_increase"))
            made = {"bound_by": "edited", "storage": kept, **unknown}
        edited = replace(old, topology=topology, **made)
        return replace(self, layers=tuple(edited if x.name == name else x for x in self.layers))

    def with_errors(self, errors: Mapping[str, float]) -> "CompressionPlan":
        """Return a copy of the plan with the certified errors from `apply_plan`; other layers get error 0."""
        known = (replace(layer, error=errors.get(layer.name, 0.0)) for layer in self.layers)
        return replace(self, layers=tuple(known))

    def __str__(self) -> str:
        width = max((len(layer.name) for layer in self.layers), default=5)
        compared = any(layer.baseline_error is not None for layer in self.layers)
        lines = [
            f"{'layer':<{width}}  {'scheme':<28} {'bits':>6} {'bytes':>24} {'parameters':>24} {'error':>8}"
            + (f" {'plain SVD':>9}" if compared else "")
        ]
        for layer in self.layers:
            size = f"{layer.bytes_before:,} -> {layer.bytes_after:,}"
            count = f"{layer.params_before:,} -> {layer.params_after:,}"
            error, baseline = ("?" if x is None else f"{x:.4f}" for x in (layer.error, layer.baseline_error))
            lines.append(
                f"{layer.name:<{width}}  {layer.scheme:<28} {layer.bits_per_weight:>6.2f} {size:>24} "
                f"{count:>24} {error:>8}" + (f" {baseline:>9}" if compared else "")
            )
        lines.append(
            f"these layers: {self.bytes_before:,} -> {self.bytes_after:,} bytes, "
            f"{self.bits_per_weight:.2f} bits a weight, {self.params_before:,} -> {self.params_after:,} "
            "parameters"
        )
        if self.predicted_loss_increase is not None:
            kl = "" if self.predicted_kl is None else f", KL divergence {self.predicted_kl:.4f}"
            lines.append(
                f"predicted loss increase{' per token' if self.of_tokens else ''}: "
                f"{self.predicted_loss_increase:.4f}{self.predicted_change()}{kl}, on {self.calibration}"
                + ("" if self.of_tokens else " (usually too low for losses that are not of tokens)")
            )
        if self.unrouted:
            lines.append(
                "received no token, so planned with the mean moments of the other experts of their layer: "
                f"{shortened(self.unrouted)}"
            )
        lines += self.grid_lines()
        for layers in dict.fromkeys(self.unfit.values()):
            names = [name for name, others in self.unfit.items() if others == layers]
            lines.append(f"{', '.join(names)} not planned, since they do not fit: {shortened(layers)}")
        if self.has_no_choice:
            lines.append(NO_CHOICE)
        if uncertain := sum(x.has_large_error and bool(x.loss_increase) for x in self.layers):
            lines.append(
                "the prediction is uncertain, and more often too low than too high: errors above "
                f"{LARGE_ERROR:.0%} in {uncertain} of {len(self.layers)} layers"
            )
        if self.model_bytes_before is not None:
            lines.append(
                f"whole model: {self.model_params_before:,} -> {self.model_params_after:,} parameters, "
                f"{compact_bytes(self.model_bytes_before)} -> {compact_bytes(self.model_bytes_after or 0)}"
            )
        if self.coverage is not None:
            lines.append(str(self.coverage))
        return "\n".join(lines)

    def grid_lines(self) -> list[str]:
        """Describe the layers whose weights lie on the grid of a number format, a line for each format."""
        found: dict[tuple[str, bool], list[str]] = {}
        for layer in self.layers:
            if layer.grid is not None:
                found.setdefault((layer.grid, layer.keeps_grid), []).append(layer.name)
        return [
            f"{shortened(names)}: weights lie on {grid_name(grid)}"
            + (": kept without loss" if kept else ", but the budget or other options need another format")
            for (grid, kept), names in found.items()
        ]

    def to_dict(self) -> dict[str, Any]:
        """Convert to a JSON-ready dict, which also has the predictions and the sizes of the whole model."""
        return {
            "version": PLAN_VERSION,
            **{field.name: getattr(self, field.name) for field in fields(self)},
            **self.predictions(),
            "model_params_after": self.model_params_after,
            "model_bytes_after": self.model_bytes_after,
            "coverage": None if self.coverage is None else self.coverage.to_dict(),
            "unseen": list(self.unseen),
            "unrouted": list(self.unrouted),
            "unfit": {name: list(layers) for name, layers in self.unfit.items()},
            "layers": [layer.to_dict() for layer in self.layers],
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any], *, complete: bool = True) -> "CompressionPlan":
        """Restore a plan from the result of `to_dict`.

        Args:
            data: the dict.
            complete: whether the plan must have layers.

        Raises:
            FormatError: the data is not a plan, has an unknown version, or is inconsistent after an edit.
        """
        if not isinstance(data, dict) or data.get("version") != PLAN_VERSION:
            raise FormatError(
                f"Not a compression plan of version {PLAN_VERSION}. Give a file of CompressionPlan.save, or "
                "the output of `tensornet plan --json`."
            )
        try:
            known = {field.name: data[field.name] for field in fields(cls)}
            known |= {
                "coverage": None if data["coverage"] is None else Coverage.from_dict(data["coverage"]),
                "unseen": _names(data["unseen"]),
                "unrouted": _names(data["unrouted"]),
                "unfit": {name: _names(layers) for name, layers in data["unfit"].items()},
                "layers": tuple(LayerPlan.from_dict(layer) for layer in data["layers"]),
            }
            made = cls(**known)
            _check(made, complete=complete)
            return made
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError) as error:
            raise FormatError(f"Bad compression plan: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write the plan to a JSON file; an existing file is replaced when the new file is complete.

        Raises:
            DestinationError: the file cannot be written.
        """
        write_file(Path(path), [json.dumps(self.to_dict(), indent=1).encode()], what="The plan")

    @classmethod
    def load(cls, path: str | Path) -> "CompressionPlan":
        """Read a plan from a file that `save` wrote.

        Raises:
            FormatError: the file cannot be read, or does not contain a plan.
        """
        try:
            data = json.loads(Path(path).read_text())
        except (OSError, ValueError, RecursionError) as error:
            raise FormatError(
                f"Cannot read a compression plan from {path}: {error}. Give a file of plan.save, or the "
                "output of tensornet plan --json."
            ) from error
        return cls.from_dict(data)


def _check_topology(layer: LayerPlan, topology: Topology) -> None:
    if not isinstance(topology, Topology):
        raise TopologyError(
            f"Layer {layer.name!r} can become a Topology, such as tensornet.topologies.mpo(...), or None to "
            f"stay dense; got {topology!r}."
        )
    if topology.shape != layer.shape:
        raise TopologyError(
            f"Layer {layer.name!r} has shape {layer.shape}, but the topology is for {topology.shape}; build "
            "a topology with out_features and in_features of the layer."
        )


def _check_finite(name: str, value: Any, *, least: float = -math.inf) -> None:
    """Raise ValueError unless a value is a finite number that float32 can hold, and is at least `least`."""
    check_number(name, value)
    if not least <= value or not abs(value) < torch.finfo(torch.float32).max:  # `not` is for NaN
        raise ValueError(f"{name} must be a finite number{' of at least 0' * (least > -1)}, got {value!r}")
    if isinstance(value, int) and abs(value) >= 2**63:
        raise ValueError(f"{name} must be a number of 64 bits, got {value!r}")


def _names(values: Any) -> tuple[Any, ...]:
    """Convert a list of names of layers to a tuple; a text would become a tuple of letters."""
    if not isinstance(values, list | tuple):
        raise TypeError(f"expected a list of names of layers, got {values!r:.60}")
    return tuple(values)


def _check(plan: CompressionPlan, *, complete: bool) -> None:
    """Check that a plan read from a file is consistent.

    Raises:
        ValueError, TopologyError: the plan is inconsistent; the message says which part.
    """
    if plan.objective not in OBJECTIVES:
        raise ValueError(f"unknown objective {plan.objective!r}, choose one of {', '.join(OBJECTIVES)}")
    if plan.rounding not in ROUNDINGS:
        raise ValueError(f"unknown rounding {plan.rounding!r}, choose one of {', '.join(ROUNDINGS)}")
    if plan.effort not in EFFORTS:
        raise ValueError(f"unknown effort {plan.effort!r}, choose one of {', '.join(EFFORTS)}")
    if plan.dense_loss is not None:
        _check_finite("dense_loss", plan.dense_loss)
    for name in ("model_params_before", "model_bytes_before"):
        if (size := getattr(plan, name)) is not None:
            check_size(name, size)
    named = {"unseen": plan.unseen, "unrouted": plan.unrouted, **plan.unfit}
    for name, layers in named.items():
        if not isinstance(name, str) or any(not isinstance(layer, str) for layer in layers):
            raise TypeError(f"{name} must be a list of names of layers, got {layers!r:.60}")
    if not isinstance(plan.of_tokens, bool) or not isinstance(plan.calibration, str | None):
        raise TypeError(f"got of_tokens={plan.of_tokens!r} and calibration={plan.calibration!r}")
    if not plan.layers and complete:
        raise ValueError("the plan has no layer")
    for name, count in Counter(layer.name for layer in plan).items():
        if count > 1:
            raise ValueError(f"layer {name!r} is listed {count} times")
    for layer in plan:
        where = f"of layer {layer.name!r}"
        if not isinstance(layer.name, str) or not isinstance(layer.bound_by, str):
            raise TypeError(f"name and bound_by {where} must be texts, got bound_by={layer.bound_by!r}")
        for size in layer.shape:
            check_size(f"shape {where}", size)
        for name in ("error", "baseline_error", "loss_increase"):
            if (value := getattr(layer, name)) is not None:
                _check_finite(f"{name} {where}", value, least=-_ROUNDING)
        for value in (*layer.sample, *(loss for _, loss in layer.curve)):
            _check_finite(f"sample and curve {where}", value)
        if layer.grid is not None:
            NumberFormat.parse(layer.grid)
        if layer.target is not None:
            _ = MENUS[layer.target]  # raises an error that lists the targets
        if layer.topology is not None:
            _check_topology(layer, layer.topology)
            layer.storage.num_params(layer.topology)
            if layer.shared_core is not None:
                core, owner = layer.shared_core
                if core not in layer.topology.core_names or plan[owner].shared_core != layer.shared_core:
                    raise ValueError(f"{owner!r} does not share a core {core!r} with layer {layer.name!r}")
