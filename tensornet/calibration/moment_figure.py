"""Picture of calibration statistics: how sensitive each layer is, and how many directions its inputs use."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from tensornet._util import import_optional

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from tensornet.calibration.stats import CalibrationStats

_INK, _OURS, _MUTED = "#1a1f2b", "#2563eb", "#98a2b3"


@dataclass(frozen=True)
class MomentSummary:
    """Moments of one layer in a few numbers.

    Args:
        name: of the layer.
        inputs: size of the input moment.
        directions: participation ratio `(tr C)^2 / |C|_F^2` of the input moment: the inputs vary in about so
            many directions.
        loss: `1/2 tr R tr C`, the loss increase by an error of variance 1 in every weight; None without
            gradients.
    """

    name: str
    inputs: int
    directions: float
    loss: float | None


def moment_summaries(stats: "CalibrationStats") -> list[MomentSummary]:
    """Summarize the moments of every layer that has a moment of its inputs.

    Example:
        >>> from tensornet.calibration.moment_figure import moment_summaries
        >>> stats = tn.calibrate(torch.nn.Sequential(torch.nn.Linear(8, 4)), [torch.eye(8)])
        >>> round(moment_summaries(stats)[0].directions)
        8
    """
    found = []
    for name, columns in stats.columns.items():
        rows = stats.rows.get(name)
        squares = float(columns.double().square().sum())
        total = _trace(columns)
        factor = 0.5 * stats.coherence.get(name, 1.0)
        loss = None if rows is None or not stats.has_gradients else factor * _trace(rows) * total
        directions = total**2 / squares if squares > 0 else 0.0
        found.append(MomentSummary(name, len(columns), directions, loss))
    return found


def moment_figure(stats: "CalibrationStats") -> "Figure":
    """Draw sensitivities and used directions of all layers, one row each.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    module = import_optional("matplotlib.figure", extra="viz", user="stats.plot()")
    found = moment_summaries(stats)
    height = 1.2 + min(14.0, 0.22 * len(found))
    figure: Figure = module.Figure(figsize=(9.0, height), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    rows = range(len(found))
    left.plot([x.loss or 0.0 for x in found], rows, "o", color=_OURS)
    left.grid(axis="x", color="#e3e6eb")
    if any(x.loss for x in found):
        left.set_xscale("log")
    right.barh(rows, [x.inputs for x in found], color=_MUTED, alpha=0.4, label="inputs")
    right.barh(rows, [x.directions for x in found], color=_OURS, label="directions used")
    right.legend(frameon=False, fontsize=8)
    left.set_yticks(rows, [x.name for x in found], fontsize=8 if len(found) <= 64 else 4)
    left.set_ylim(len(found) - 0.4, -0.6)
    left.set_xlabel("sensitivity 1/2 tr R tr C")
    right.set_xlabel("directions that inputs use")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(length=0, colors=_INK)
    return figure


def _trace(moment: Tensor) -> float:
    diagonal = moment if moment.ndim == 1 else moment.diagonal()
    return float(diagonal.double().sum())
