"""`compress`: plan, carry out, report."""

import time

from torch import nn

from tensornet.compression.apply import apply_plan
from tensornet.compression.config import CompressionConfig
from tensornet.compression.planner import plan
from tensornet.compression.report import CompressionReport, layer_reports, model_size


def compress(model: nn.Module, config: CompressionConfig, *, progress: bool = True) -> CompressionReport:
    """Replace the targeted layers of a model by layers made of cores, in place.

    Args:
        model: any module.
        config: what to compress and how far.
        progress: show progress bars.

    Returns:
        What was done to each layer, with certified errors and the plain-SVD baseline.

    Raises:
        TargetError, BudgetError, NonFiniteError, TopologyError: before anything is replaced.
    """
    start = time.perf_counter()
    params_before, bytes_before = model_size(model)
    made = plan(model, config, progress=progress)
    errors = apply_plan(model, made, progress=progress)
    params_after, bytes_after = model_size(model)
    return CompressionReport(
        layers=layer_reports(made, errors),
        model_params_before=params_before,
        model_params_after=params_after,
        model_bytes_before=bytes_before,
        model_bytes_after=bytes_after,
        seconds=time.perf_counter() - start,
        plan=made,
    )
