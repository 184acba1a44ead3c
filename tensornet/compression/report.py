"""Report of a finished compression: sizes, errors, losses, and which parameters were compressed."""

import json
import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from tensornet.compression.loss_increase import LossIncrease
from tensornet.compression.plan import CompressionPlan, LayerPlan
from tensornet.nn.storage import PackedCore
from tensornet.nn.targets import BIAS, UNKNOWN, UNSEEN, Target

#: Key under which the biases of compressible layers are counted.
BIASES = "biases"
#: Largest number of types named in one line; further types are summed.
_NAMED = 5


@dataclass(frozen=True)
class Coverage:
    """Number of parameters that a plan covers, and of those that it does not; tied parameters count once.

    Args:
        total: number of elements of all parameters.
        covered: number of elements of all planned matrices, including those that stay dense.
        excluded: number of elements of matrices that the configuration excludes, by type of module.
        unknown: number of elements of parameters that cannot be compressed, by type of module, with the
            reason in brackets if the type is known.
    """

    total: int
    covered: int
    excluded: Mapping[str, int]
    unknown: Mapping[str, int]

    @property
    def share(self) -> float:
        """Covered parameters as a fraction of all parameters."""
        return self.covered / self.total if self.total else 0.0

    def __str__(self) -> str:
        parts = [f"covers {self.share:.1%} of {compact_count(self.total)} parameters".replace("%", " %")]
        for label, sizes in (("excluded", self.excluded), ("skipped", self.unknown)):
            if sizes:
                parts.append(f"{label}: {_listed(sizes)}")
        return "; ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """Convert to a JSON-ready dict."""
        return asdict(self) | {"share": self.share}


def measure_coverage(
    targets: Iterable[Target], layers: Collection[str], *, unseen: Iterable[str] = ()
) -> Coverage:
    """Count the parameters of a dense model that a plan covers, and all others by type of module.

    Args:
        targets: every weight of the model, from `find_targets` or `list_weights`.
        layers: names of the layers in the plan.
        unseen: names of layers that never ran in calibration.
    """
    planned, never_ran = set(layers), set(unseen)
    excluded: Counter[str] = Counter()
    unknown: Counter[str] = Counter()
    covered = 0
    for target in targets:
        size = target.weight.numel()
        if not planned.isdisjoint(target.names):
            covered += size
        elif target.name in never_ran:
            unknown[f"{target.type_name} ({UNSEEN})"] += size
        elif target.by_choice or not target.skip:
            excluded[target.type_name] += size
        elif target.skip == BIAS:
            unknown[BIASES] += size
        else:
            reason = "" if target.skip == UNKNOWN else f" ({target.skip})"
            unknown[f"{target.type_name}{reason}"] += size
    total = covered + excluded.total() + unknown.total()
    return Coverage(total, covered, _by_size(excluded), _by_size(unknown))


def compact_count(value: float) -> str:
    """Format a number with three significant digits and a unit, k, M or B."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{f'{value / size:#.3g}'.rstrip('.')}{unit}"
    return f"{value:g}"


def _by_size(sizes: Counter[str]) -> dict[str, int]:
    return dict(sorted(sizes.items(), key=lambda item: (-item[1], item[0])))


def _listed(sizes: Mapping[str, int]) -> str:
    named = [f"{name} {compact_count(size)}" for name, size in list(sizes.items())[:_NAMED]]
    if rest := sum(list(sizes.values())[_NAMED:]):
        named.append(f"{len(sizes) - _NAMED} other types {compact_count(rest)}")
    return ", ".join(named)


#: Largest loss whose exponential does not overflow.
_MOST = 700.0


@dataclass(frozen=True)
class CompressionReport:
    """Result of `compress`; `str(report)` is the table of its plan with the certified errors.

    Args:
        model_params_before, model_params_after: number of stored values of the whole model: elements of
            parameters, integer codes, scales and minima. Tied tensors are counted once.
        model_bytes_before, model_bytes_after: bytes of these values in memory.
        seconds: wall time of the compression.
        plan: the plan that was applied, with the certified error of each layer.
        coverage: counts of the parameters that the plan covers and does not cover.
        measured: loss increase measured on a few rows of the data, to compare with
            `plan.predicted_loss_increase`; None if there were no batches or the model has no loss.
        rounded: number formats of parameters that do not belong to layers, such as the shared cores of
            experts, by name. The plan and its predictions do not include these parameters.
        measured_layers: loss increase measured before the parameters in `rounded` were rounded, to compare
            with the prediction of the plan; equal to `measured` if `rounded` is empty.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.ReLU(), torch.nn.Linear(32, 32))
        >>> config = tn.CompressionConfig(param_ratio=0.5, objective="weight")
        >>> report = tn.compress(model, config, progress=False)
        >>> report.param_ratio <= 0.5, len(report.layers)
        (True, 2)
    """

    model_params_before: int
    model_params_after: int
    model_bytes_before: int
    model_bytes_after: int
    seconds: float
    plan: CompressionPlan
    coverage: Coverage
    measured: LossIncrease | None = None
    rounded: Mapping[str, str] = field(default_factory=dict)
    measured_layers: LossIncrease | None = None

    @property
    def layers(self) -> tuple[LayerPlan, ...]:
        """Plans of all layers, one for each targeted weight."""
        return self.plan.layers

    @property
    def byte_ratio(self) -> float:
        """Bytes of the whole model after compression, divided by its bytes before."""
        return self.model_bytes_after / self.model_bytes_before

    @property
    def param_ratio(self) -> float:
        """Parameters of the targeted weights after compression, divided by their parameters before."""
        return self.plan.params_after / self.plan.params_before

    def __str__(self) -> str:
        lines = [str(self.plan)]
        found = self.measured
        if found is not None:
            before, after = found.dense_loss, found.dense_loss + found.mean
            change = ""
            if self.plan.of_tokens and after < _MOST:
                change = f", perplexity {math.exp(before):.4g} -> {math.exp(after):.4g}"
            lines.append(f"measured loss increase: {found}{change}")
        elif self.plan.predicted_loss_increase is not None:
            lines.append("measured loss increase: none, since there were no batches")
        lines.append(
            f"whole model: {self.model_bytes_before / 1e6:.2f} -> {self.model_bytes_after / 1e6:.2f} MB, "
            f"{self.model_params_before:,} -> {self.model_params_after:,} parameters, {self.seconds:.1f} s"
        )
        lines.append(str(self.coverage))
        if self.rounded:
            counts = Counter(self.rounded.values()).items()
            lines.append("rounded outside of layers: " + ", ".join(f"{n} in {name}" for name, n in counts))
            if self.plan.predicted_loss_increase is not None:
                part = self.measured_layers
                known = "" if part is None else f"; without them {part.mean:.4f} was measured"
                lines.append(f"the predicted loss increase leaves these parameters out{known}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Convert to a JSON-ready dict."""
        return {
            "layers": [layer.summary() for layer in self.layers],
            **{name: value for name, value in vars(self).items() if name != "plan"},
            "byte_ratio": self.byte_ratio,
            "bits_per_weight": self.plan.bits_per_weight,
            "param_ratio": self.param_ratio,
            "coverage": self.coverage.to_dict(),
            "measured": None if self.measured is None else asdict(self.measured),
            "measured_layers": None if self.measured_layers is None else asdict(self.measured_layers),
            "rounded": dict(self.rounded),
            "unrouted": list(self.plan.unrouted),
            **self.plan.predictions(),
        }

    def to_json(self) -> str:
        """Convert the result of `to_dict` to JSON text."""
        return json.dumps(self.to_dict(), indent=1)


def model_size(model: nn.Module) -> tuple[int, int]:
    """Return the number of stored values of a model, and the number of bytes that they take.

    A packed code, scale or minimum counts as one value; tied tensors are counted once.
    """
    sizes = {id(x): (x.numel(), x.nbytes) for x in model.parameters()}
    for layer in model.modules():
        if isinstance(layer, PackedCore):
            tensors = layer.tensors
            sizes |= {id(tensors[name]): (n, tensors[name].nbytes) for name, n in layer.counts.items()}
    return sum(count for count, _ in sizes.values()), sum(size for _, size in sizes.values())
