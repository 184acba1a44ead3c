"""With how much damping of gradient moments are integers rounded best?

Two-sided rounding moves errors into directions in which the calibration text had small gradients. Here all
linear layers are rounded to one format with moments `R + d mean(diag R)` for several `d`, and one-sidedly,
without `R`. The loss increase is the mean of those with the errors and with the opposite errors, on the
validation text of `bytes.py`, whose source is another than that of calibration for MiniLM and SmolLM2: what
is linear in an error cancels, and the standard error is a third. `over_least` is the mean difference to the
damping of decompositions, token by token, with its standard error; `price` is that of a plan. Models whose
rows the record has are skipped. Writes `rounding_damping.json`.

    OMP_NUM_THREADS=1 python benchmarks/rounding_damping.py [--toy] [--models gpt2 minilm smollm2]
        [--cache CACHE] [--work FOLDER]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
import bytes_models
from bytes_models import Subject
from harness import RECORDS, record

import tensornet as tn
from tensornet.calibration.losses import losses_against
from tensornet.compression.forecast import all_losses
from tensornet.compression.sensitivity import layer_weighting
from tensornet.nn.targets import find_targets
from tensornet.quantization import round_weight
from tensornet.quantization.rounding import LEAST_DAMPING, ROW_DAMPING

#: Fractions of the mean diagonal; None rounds with the moments of inputs alone.
DAMPINGS = (None, ROW_DAMPING, 0.3, 1.0, 4.0)
FORMAT = "int4:g32:float8"

Row = dict[str, Any]


def moments(subject: Subject, model: nn.Module, work: Path | None) -> tn.CalibrationStats:
    """Calibrate on the first seed, or read the moments that `bytes.py` left in its working folder."""
    path = work and work / f"{subject.name}-moments-0.pt"
    if path and path.is_file():
        stats: tn.CalibrationStats = torch.load(path, weights_only=False)[0]
        return stats
    batches = subject.calibration(0)
    return tn.calibrate(model, batches, config=subject.layers, loss_fn=subject.losses, progress=False)


def rounded(
    model: nn.Module, subject: Subject, stats: tn.CalibrationStats, damping: float | None
) -> tuple[dict[int, Tensor], float]:
    """Round every layer; return the errors by the place of the layer, and their price in a plan."""
    errors, price = {}, 0.0
    for place, target in enumerate(find_targets(model, subject.layers)):
        own = layer_weighting(target, "curvature", stats, ROW_DAMPING)
        if own is None:
            raise SystemExit(f"no gradient reaches {target.name}")
        found = replace(own, rows=None)
        if damping is not None:
            found = layer_weighting(target, "curvature", stats, damping) or own
        made = round_weight(
            target.matrix, FORMAT, rows=found.rows, columns=found.columns, row_damping=LEAST_DAMPING
        )
        errors[place] = made.dequantize(target.matrix.dtype) - target.matrix
        price += own.cost(errors[place])
    return errors, price


def measured(subject: Subject, stats: tn.CalibrationStats) -> list[Row]:
    """Measure one model with every damping."""
    model, dense = subject.load(), subject.load()
    targets = find_targets(model, subject.layers)
    weights = [target.matrix.clone() for target in targets]
    loss_fn, batches = losses_against(dense), subject.validation["judged source"]
    plain = all_losses(dense, batches, loss_fn)
    rises: dict[float | None, Tensor] = {}
    rows = []
    for damping in DAMPINGS:
        start = time.process_time()
        errors, price = rounded(dense, subject, stats, damping)
        seconds, losses = time.process_time() - start, []
        for sign in (1, -1):
            for place, (target, weight) in enumerate(zip(targets, weights, strict=True)):
                target.matrix.copy_(weight + sign * errors[place])
            losses.append(all_losses(model, batches, loss_fn))
        rises[damping] = sum(losses) / 2 - plain
        row: Row = {"model": subject.name, "format": FORMAT, "damping": damping, "round_seconds": seconds}
        row |= _mean("loss_increase", rises[damping]) | {"price": price, "unit": subject.unit}
        if ROW_DAMPING in rises:
            row |= _mean("over_least", rises[damping] - rises[ROW_DAMPING])
        rows.append(row)
        print(row, flush=True)
    return rows


def _mean(name: str, values: Tensor) -> Mapping[str, float]:
    """Compute the mean over tokens and its standard error."""
    return {name: float(values.mean()), f"{name}_error": float(values.std() / len(values) ** 0.5)}


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> Path:
    """Measure the models that are missing, and add each to the record at once."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--toy", action="store_true", help="the embedded model, few tokens")
    parser.add_argument("--models", nargs="+", default=["gpt2", "minilm", "smollm2"])
    parser.add_argument("--cache", type=Path, help="folder of `real_data.py`")
    parser.add_argument("--work", type=Path, help="working folder of `bytes.py`, for its moments")
    parser.add_argument("--records", type=Path, default=RECORDS)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    subjects: dict[str, Callable[[], Subject]] = {
        "gpt2": lambda: bytes_models.gpt2(**({"count": 8, "limit": 8_000} if given.toy else {})),
        "minilm": lambda: bytes_models.minilm(given.cache),
        "smollm2": lambda: bytes_models.smollm2(given.cache),
    }
    path = given.records / "rounding_damping.json"
    rows = json.loads(path.read_text())["rows"] if path.is_file() else []
    for name in ["gpt2"] if given.toy else given.models:
        if any(row["model"] == name for row in rows):
            continue
        subject = subjects[name]()
        with torch.enable_grad():
            stats = moments(subject, subject.load(), given.work)
        rows += measured(subject, stats)
        record("rounding_damping", rows, folder=given.records, dtype="float32")
    return path


if __name__ == "__main__":
    print(main())
