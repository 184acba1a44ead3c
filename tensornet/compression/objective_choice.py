"""Choice of the objective by the statistics at hand."""

from tensornet.calibration.stats import CalibrationStats
from tensornet.compression.config import CompressionConfig
from tensornet.errors import TargetError


def resolve_objective(config: CompressionConfig, stats: CalibrationStats | None) -> str:
    """Resolve the objective `"auto"` by the statistics at hand.

    Raises:
        TargetError: the objective needs statistics that are not there.
    """
    known = "weight" if stats is None else "curvature" if stats.has_gradients else "activation"
    order = ("weight", "activation", "curvature")
    if known == "weight" and config.objective in ("auto", "weight") and config.one_format_keeps:
        return known
    wanted = "curvature" if config.needs_curvature else config.objective
    if wanted == "auto":
        return known
    if order.index(wanted) > order.index(known):
        missing = "gradients" if wanted == "curvature" else "inputs"
        raise TargetError(
            f"objective={wanted!r} needs calibrated {missing}: pass calibration=batches to compress, or the "
            "statistics that tensornet.calibrate collects to plan; objective='weight' needs none."
        )
    return wanted
