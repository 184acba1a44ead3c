"""Report of a compression: sizes, errors and predicted losses, layer by layer."""

import json
import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from tensornet._util import html_table
from tensornet.compression.layer_plan import describe
from tensornet.compression.measured_loss import MeasuredRise
from tensornet.compression.plan import CompressionPlan, plan_text
from tensornet.compression.reach import Reach
from tensornet.nn.fixed_dtypes import FixedDtypes

if TYPE_CHECKING:
    from matplotlib.figure import Figure


#: Largest loss whose exponential is a number.
_MOST = 700.0


@dataclass(frozen=True)
class LayerReport:
    """One targeted layer after compression.

    Args:
        name: module name.
        shape: `(out_features, in_features)`.
        form: number formats, family and bonds, or `"dense"`.
        bytes_before, bytes_after: of the weight before and after, scales and padding included.
        params_before, params_after: stored numbers of the weight before and after: elements or codes, scales,
            zero points and padding.
        error: certified relative Frobenius error.
        baseline_error: error of the plain truncated SVD with the same number of parameters.
        bound_by: the cap that decided.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(32, 32))
        >>> config = tn.CompressionConfig(max_bond=4, topology="low_rank", objective="weight")
        >>> layer = tn.compress(model, config, progress=False).layers[0]
        >>> layer.name, layer.form, layer.params_after, abs(layer.error - layer.baseline_error) < 1e-6
        ('0', 'low_rank 4', 256, True)
    """

    name: str
    shape: tuple[int, int]
    form: str
    bytes_before: int
    bytes_after: int
    params_before: int
    params_after: int
    error: float
    baseline_error: float
    bound_by: str


@dataclass(frozen=True)
class CompressionReport:
    """Result of `compress`: `str(report)` is the table of its plan with the certified errors.

    Args:
        layers: one entry for each targeted weight.
        model_params_before, model_params_after: stored numbers of the whole model, tied ones once: elements
            of parameters, codes of integers, scales and zero points.
        model_bytes_before, model_bytes_after: their size in memory.
        seconds: wall time.
        plan: the plan that was carried out, with topologies, spectra and the errors expected before.
        reach: which share of the parameters was considered, and which modules hold the rest.
        measured: rise of the loss, measured on a few rows of the data beside `plan.predicted_loss_increase`;
            None where no batches were at hand or the model has no loss.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.ReLU(), torch.nn.Linear(32, 32))
        >>> config = tn.CompressionConfig(param_ratio=0.5, objective="weight")
        >>> report = tn.compress(model, config, progress=False)
        >>> report.param_ratio <= 0.5, len(report.layers)
        (True, 2)
    """

    layers: tuple[LayerReport, ...]
    model_params_before: int
    model_params_after: int
    model_bytes_before: int
    model_bytes_after: int
    seconds: float
    plan: CompressionPlan
    reach: Reach
    measured: MeasuredRise | None = None

    @property
    def byte_ratio(self) -> float:
        """Bytes of the whole model after compression, relative to before."""
        return self.model_bytes_after / self.model_bytes_before

    @property
    def param_ratio(self) -> float:
        """Parameters of the targeted weights after compression, relative to before."""
        return sum(x.params_after for x in self.layers) / sum(x.params_before for x in self.layers)

    def __str__(self) -> str:
        table = plan_text(self.plan, {layer.name: layer.error for layer in self.layers})
        return (
            f"{table}\n{self._measured_line()}"
            f"whole model: {self.model_bytes_before / 1e6:.2f} -> {self.model_bytes_after / 1e6:.2f} MB, "
            f"{self.model_params_before:,} -> {self.model_params_after:,} parameters, "
            f"{self.seconds:.1f} s\n{self.reach}"
        )

    def _measured_line(self) -> str:
        """Format the measured rise as a line; empty if no loss was predicted or measured."""
        found = self.measured
        if found is None:
            missing = "measured rise of the loss: none, without batches that it could be measured on\n"
            return "" if self.plan.predicted_loss_increase is None else missing
        change = ""
        if self.plan.of_tokens and found.dense_loss + found.value < _MOST:
            before, after = found.dense_loss, found.dense_loss + found.value
            change = f", perplexity {math.exp(before):.4g} -> {math.exp(after):.4g}"
        return f"measured rise of the loss: {found}{change}\n"

    def plot(self) -> "Figure":
        """Draw bits and ranks of all layers, and the loss or the weight error of each.

        Returns:
            A `matplotlib.figure.Figure`, not registered with pyplot; save it with `savefig`.

        Raises:
            MissingDependencyError: matplotlib is not installed.

        Example:
            >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64))
            >>> report = tn.compress(model, tn.CompressionConfig(param_ratio=0.5), progress=False)
            >>> len(report.plot().axes)
            2
        """
        from tensornet.compression.pictures import report_figure

        return report_figure(self.plan, {layer.name: layer.error for layer in self.layers})

    def _repr_html_(self) -> str:
        """Format as a table for notebooks."""
        before, after = self.model_bytes_before / 1e6, self.model_bytes_after / 1e6
        rise = self.plan.predicted_loss_increase
        predicted = "" if rise is None else f", predicted rise of the loss {rise:.4f}"
        if self.measured is not None:
            predicted += f", measured {self.measured.value:.4f}"
        rows = [
            (x.name, x.form, f"{x.bytes_before:,}", f"{x.bytes_after:,}", f"{x.error:.4f}")
            for x in self.layers
        ]
        return html_table(
            f"Compressed in {self.seconds:.1f} s: model {before:.2f} -> {after:.2f} MB{predicted}",
            ("layer", "form", "bytes before", "bytes after", "error"),
            rows,
        )

    def to_dict(self) -> dict[str, Any]:
        """Convert to a JSON-ready form, without spectra."""
        data = asdict(self)
        del data["plan"]
        counted = {
            "byte_ratio": self.byte_ratio,
            "bits_per_weight": self.plan.bits_per_weight,
            "param_ratio": self.param_ratio,
            "reach": self.reach.to_dict(),
            "baseline": None if self.plan.baseline is None else asdict(self.plan.baseline),
            "measured": None if self.measured is None else self.measured.to_dict(),
            "verification": None if (seen := self.plan.verification) is None else seen.to_dict(),
        }
        return data | counted | self.plan.predictions()

    def to_json(self) -> str:
        """Convert to JSON text, see `to_dict`."""
        return json.dumps(self.to_dict(), indent=1)


def layer_reports(plan: CompressionPlan, errors: dict[str, float]) -> tuple[LayerReport, ...]:
    """Combine the layers of a plan with their certified errors into layer reports."""
    return tuple(
        LayerReport(
            name=layer.name,
            shape=layer.shape,
            form=describe(layer.topology, layer.storage),
            bytes_before=layer.bytes_before,
            bytes_after=layer.bytes_after,
            params_before=layer.params_before,
            params_after=layer.params_after,
            error=errors.get(layer.name, 0.0),
            baseline_error=layer.baseline_error,
            bound_by=layer.bound_by,
        )
        for layer in plan
    )


def model_size(model: nn.Module) -> tuple[int, int]:
    """Count `(numbers, bytes)` of all distinct parameters, tied ones once.

    Integers count as the floats beside them: each packed code, scale and zero point is one number.
    """
    sizes = {id(x): (x.numel(), x.nbytes) for x in model.parameters()}
    for layer in model.modules():
        if isinstance(layer, FixedDtypes):
            stored = layer.stored
            for name, count in layer.stored_counts.items():
                sizes[id(stored[name])] = count, stored[name].nbytes
    return sum(count for count, _ in sizes.values()), sum(size for _, size in sizes.values())
