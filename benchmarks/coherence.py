"""Do predictions rank layers rightly, with tokens taken as independent and with their coherence?

    OMP_NUM_THREADS=1 python benchmarks/coherence.py [--toy] [--models gpt2 minilm smollm2] [--cache CACHE]

All layers of one kind, or of one block, are rounded under both moments in int4, groups of 32, and all else
stays. The loss is measured with these errors and with the opposite ones, and averaged, so that what is linear
in them cancels. `independent` is the predicted loss increase over the measured one by the moments of single
tokens (K-FAC), `coherent` the same times the coherence of each layer. A common factor does not matter, since
only ratios between layers decide a plan: `spread` is the largest of such ratios over the smallest.
`estimated` is the mean coherence of the layers, `made` that of the errors themselves on the calibration text.
Models and texts are those of `bytes.py`, judged on a fourth of its windows. Writes `coherence.json`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from bytes import AUTOCAST, rounding_options, subjects
from bytes_models import Subject, judge, pooled, tokens_of
from harness import RECORDS, record

import tensornet as tn
from tensornet.calibration import label_losses
from tensornet.calibration.hooks import observed
from tensornet.nn.targets import Target, find_targets
from tensornet.quantization import round_weight

FORMAT = "int4:g32:float8"
#: Predicted over measured loss increase.
RATIOS = ("independent", "coherent")
Row = dict[str, Any]


def groups(names: Sequence[str], by: str) -> dict[str, list[str]]:
    """Group layers by the number of their block, or by what follows it in their names."""
    found: dict[str, list[str]] = {}
    for name in names:
        parts = re.match(r".*?(\d+)\.(.*)", name)
        block, kind = parts.groups() if parts else (name, name)
        found.setdefault(kind if by == "kind" else block, []).append(name)
    return found


@torch.no_grad()
def rows(subject: Subject, every: int) -> Iterator[Row]:
    """Measure every group of layers of one model."""
    subject = replace(subject, judged=subject.judged[::every])
    model = subject.load()
    stats = tn.calibrate(
        model, subject.calibration(0), config=subject.layers, loss_fn=subject.losses, autocast=AUTOCAST
    )
    dense = [pooled(model, x) for x in subject.judged] if subject.encoder else []
    before = judge(subject, model, dense)
    targets = {target.name: target for target in find_targets(model, subject.layers)}
    errors = {name: error_of(target, stats) for name, target in targets.items()}
    predicted = {name: prediction(target, errors[name], stats) for name, target in targets.items()}
    made = coherence_made(subject, model, {targets[name].names[0]: error for name, error in errors.items()})
    for by in ("kind", "block"):
        for key, names in groups([*targets], by).items():
            found = rise(subject, model, [(targets[name], errors[name]) for name in names], dense, before)
            sums = (sum(values) for values in zip(*(predicted[name] for name in names), strict=True))
            ratios = {name: value / found["loss_increase"] for name, value in zip(RATIOS, sums, strict=True)}
            row = {"model": subject.name, "by": by, "group": key, "layers": len(names)}
            for which, known in (("estimated", stats.coherence), ("made", made)):
                row[which] = sum(known[targets[name].names[0]] for name in names) / len(names)
            yield row | found | ratios | {"judged_tokens": tokens_of(subject.judged)}


def error_of(target: Target, stats: tn.CalibrationStats) -> Tensor:
    """Return the error of rounding one weight under both moments."""
    options = rounding_options("two-sided", target, stats)
    return round_weight(target.matrix, FORMAT, **options).dequantize() - target.matrix


class Changes:
    """Recorder of how errors in the weights change the loss, token by token: it stands in for moments."""

    def __init__(self, errors: dict[str, Tensor]) -> None:
        self.errors = errors
        self.joint, self.alone = dict.fromkeys(errors, 0.0), dict.fromkeys(errors, 0.0)

    def see_input(self, name: str, x: Tensor) -> None:
        """Wait for the gradient."""

    def see_states(self, *_: Any) -> None:
        """Look for nothing: no model here has experts."""

    def hold(self, name: str, x: Tensor) -> list[Tensor]:
        """Keep the whole input."""
        return [x.detach()]

    def see_gradient(self, name: str, gradient: Tensor, held: list[Tensor]) -> None:
        """Add the changes of all rows of a batch; the gradient of padding is zero."""
        with torch.autocast(gradient.device.type, enabled=False):
            changes = ((held[0].float() @ self.errors[name].mT) * gradient.float()).sum(-1).double()
        self.joint[name] += float(changes.sum(-1).square().sum())
        self.alone[name] += float(changes.square().sum())


def coherence_made(subject: Subject, model: nn.Module, errors: dict[str, Tensor]) -> dict[str, float]:
    """Measure the coherence of given errors, on every fourth batch of the calibration text."""
    changes = Changes(errors)
    with torch.enable_grad(), observed(model, changes, subject.layers):
        for batch in subject.calibration(0)[::4]:
            with torch.autocast("cpu", AUTOCAST, cache_enabled=False):
                (subject.losses or label_losses)(model, batch).sum().backward()
    return {name: changes.joint[name] / changes.alone[name] for name in errors}


def prediction(target: Target, error: Tensor, stats: tn.CalibrationStats) -> tuple[float, float]:
    """Predict the loss increase of an error in one weight, in the order of `RATIOS`."""
    name = target.names[0]
    alone = 0.5 * float(((stats.rows[name] @ error) * (error @ stats.columns[name])).sum())
    return alone, alone * stats.coherence[name]


def rise(
    subject: Subject,
    model: nn.Module,
    wrong: Sequence[tuple[Target, Tensor]],
    dense: Sequence[Tensor],
    before: Tensor,
) -> Row:
    """Measure the mean loss increase of errors in some weights and of the opposite ones."""
    kept, found = [target.matrix.clone() for target, _ in wrong], []
    for sign in (1, -1):
        for (target, error), weight in zip(wrong, kept, strict=True):
            target.matrix.copy_(weight + sign * error)
        found.append(judge(subject, model, dense) - before)
    for (target, _), weight in zip(wrong, kept, strict=True):
        target.matrix.copy_(weight)
    both = (found[0] + found[1]) / 2
    return {"loss_increase": float(both.mean()), "standard_error": float(both.std() / len(both) ** 0.5)}


def spread(found: Sequence[Row], model: str, by: str, which: str) -> float:
    """Return the largest over the smallest ratio of predicted to measured among the groups of a model."""
    values = [row[which] for row in found if (row["model"], row["by"]) == (model, by)]
    return max(values) / min(values)


def main(arguments: Sequence[str] | None = None) -> Path:
    """Measure the models that the record does not have."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--toy", action="store_true", help="few layers of the embedded model")
    parser.add_argument("--models", nargs="+", default=["gpt2", "minilm", "smollm2"])
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--records", type=Path, default=RECORDS)
    given = parser.parse_args(arguments)
    path = given.records / "coherence.json"
    found = json.loads(path.read_text())["rows"] if path.is_file() else []
    makers = subjects(given)
    for name in makers if given.toy else given.models:
        if any(row["model"] == name for row in found):
            continue
        made = list(rows(makers[name](), every=1 if given.toy else 4))
        found += made
        spreads = {
            f"{model}, by {by}": {x: round(spread(found, model, by, x), 2) for x in RATIOS}
            for model in dict.fromkeys(row["model"] for row in found)
            for by in ("kind", "block")
        }
        record("coherence", found, folder=given.records, summary=spreads)
    return path


if __name__ == "__main__":
    print(main())
