"""Baselines of the same size as a plan: round to nearest, GPTQ and the truncated SVD.

Each baseline is a configuration of the same pipeline: use it with `tensornet.plan` and `apply_plan`.
"""

from dataclasses import replace

from tensornet.calibration.stats import CalibrationStats
from tensornet.compression.config import CompressionConfig
from tensornet.compression.plan import CompressionPlan
from tensornet.quantization import NumberFormat
from tensornet.quantization.formats import BITS

NEAREST, GPTQ, SVD = "round to nearest", "GPTQ", "plain SVD"
#: Integer formats of the baselines, with 16-bit scales.
_FORMATS = tuple(NumberFormat(bits, group) for bits in BITS for group in (64, 32, 128))
#: A format may take this many times the bytes of the plan and still counts as the same size.
_SLACK = 1.01


def baseline_configs(plan: CompressionPlan, stats: CalibrationStats | None) -> dict[str, CompressionConfig]:
    """Configure the baselines with about the bytes of a plan, by name; GPTQ needs moments of inputs.

    Example:
        >>> from tensornet.compression.baselines import baseline_configs
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64))
        >>> plan = tn.plan(model, tn.CompressionConfig(max_bond=8)).replace_layer("0", None, "int4")
        >>> nearest = tn.plan(model, baseline_configs(plan, None)["round to nearest"])
        >>> nearest["0"].scheme, nearest.bytes_after == plan.bytes_after
        ('int4 dense', True)
    """
    names = [layer.name for layer in plan]
    sizes = {x: sum(x.nbytes(layer.shape) for layer in plan) for x in _FORMATS}
    fitting = [x for x in _FORMATS if sizes[x] <= _SLACK * plan.bytes_after]
    largest = max(fitting, key=sizes.__getitem__) if fitting else min(_FORMATS, key=sizes.__getitem__)
    integers = CompressionConfig(target_modules=names, formats=(largest.name,), verify=False)
    low_rank = CompressionConfig(
        target_modules=names,
        topology="low_rank",
        objective="weight",
        param_ratio=min(1.0, plan.bytes_after / (svd_itemsize(plan) * plan.params_before)),
    )
    found = {NEAREST: replace(integers, rounding="nearest")}
    if stats is not None:
        found[GPTQ] = replace(integers, rounding="one_sided")
    return {**found, SVD: low_rank}


def svd_itemsize(plan: CompressionPlan) -> int:
    """Bytes of a number in the factors of the plain SVD: 2 if the plan has number formats."""
    integers = any(layer.storage.own_dtypes for layer in plan)
    return 2 if integers else plan.layers[0].dtype.itemsize
