"""Which choices of calibration, allocation and refitting make low rank better, at the same parameters?

    OMP_NUM_THREADS=1 python benchmarks/low_rank_choices.py [--toy]

All linear layers of the embedded GPT-2 at 80 and 60 %, calibrated on 160 windows of 128 tokens of its
training text. Every variant changes one thing of the base: gradient moments at labels drawn from the model,
damping 0.1, one allocation by predicted losses. Judged on two sets of windows of the held-out text: choose by
the first, believe the second. `divergence` (from the dense model's outputs) is the less noisy of the two
measures: single tokens' losses also go up and down to first order in an error. Writes
`low_rank_choices.json` after every variant; those that the record has are skipped.
"""

from __future__ import annotations

import argparse
import copy
import json
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import tensornet as tn
from tensornet.calibration import label_losses, sampled_losses
from tensornet.compression import PreparedPlan, prepare
from tensornet.compression.forecast import light_copy
from tensornet.healing import refine
from tensornet_hf.embedded import calibration_text, gpt2_path, heldout_text
from tensornet_hf.text.tokens import load_tokenizer, token_ids

sys.path.insert(0, str(Path(__file__).parent))
from harness import RECORDS, record

LENGTH = 128
Models = Mapping[float, nn.Module]


@dataclass(frozen=True)
class Text:
    """Windows to judge by, with the dense model's log-probabilities of all tokens."""

    windows: Tensor
    dense: Tensor

    @classmethod
    def of(cls, model: nn.Module, windows: Tensor) -> Text:
        """Collect the dense model's log-probabilities on some windows."""
        return cls(windows, log_probabilities(model, windows))

    def judge(self, model: nn.Module) -> Tensor:
        """Compute loss increase and divergence from the dense outputs, by token, shape `(tokens, 2)`."""
        found = log_probabilities(model, self.windows)
        labels = self.windows[:, 1:, None]
        rise = (self.dense - found).gather(-1, labels).flatten()
        divergence = (self.dense.exp() * (self.dense - found)).sum(-1).flatten()
        return torch.stack([rise, divergence], 1).double()


@torch.no_grad()
def log_probabilities(model: nn.Module, windows: Tensor) -> Tensor:
    """Compute log-probabilities of the next token, shape `(windows, tokens - 1, vocabulary)`."""
    parts = [model(input_ids=part, use_cache=False).logits[:, :-1] for part in windows.split(16)]
    return torch.cat(parts).float().log_softmax(-1)


@dataclass(frozen=True)
class Clip:
    """Limit on the gradient norms of single tokens at one layer, computed per batch.

    Args:
        of_rms: limit as a multiple of the root mean square of the norms; or
        quantile: of the norms above 0.
    """

    of_rms: float | None = None
    quantile: float | None = None

    def __call__(self, gradient: Tensor) -> Tensor:
        """Shrink the gradients `(..., features)` of tokens beyond the limit."""
        norms = gradient.norm(dim=-1, keepdim=True)
        if self.of_rms is not None:
            limit = self.of_rms * norms.square().mean().sqrt()
        else:
            limit = norms[norms > 0].quantile(self.quantile)
        return gradient * (limit / norms.clamp_min(1e-30)).clamp(max=1)


@dataclass
class Bench:
    """Model, texts, and the base configuration that every variant changes in one place."""

    count: int
    ratios: Sequence[float]
    model: Any = field(init=False)

    def __post_init__(self) -> None:
        tokenizer = load_tokenizer(gpt2_path())
        self.model = AutoModelForCausalLM.from_pretrained(gpt2_path()).eval()
        known, held = (
            token_ids(tokenizer, text)[: 8 * LENGTH * self.count].split(LENGTH)[:-1]
            for text in (calibration_text(), heldout_text())
        )
        self.known, held = torch.stack(known), torch.stack(held)
        third = min(len(held) // 3, self.count // 2)
        self.chosen, self.reported, self.third = (Text.of(self.model, held[k::3][:third]) for k in range(3))

    def windows(self, count: int) -> Tensor:
        """Select evenly spread calibration windows."""
        return self.known[torch.linspace(0, len(self.known) - 1, count).long()]

    @cached_property
    def unused(self) -> Tensor:
        """Calibration windows that the base does not use, as many as it uses."""
        free = torch.ones(len(self.known), dtype=torch.bool)
        free[torch.linspace(0, len(self.known) - 1, self.count).long()] = False
        left = self.known[free]
        return left[torch.linspace(0, len(left) - 1, self.count).long()]

    def moments(
        self,
        model: nn.Module | None = None,
        *,
        more: int = 1,
        labels: bool = False,
        clip: Clip | None = None,
    ) -> tn.CalibrationStats:
        """Collect the moments of a model, by default the dense one, on the calibration text."""
        torch.manual_seed(0)
        losses = label_losses if labels else sampled_losses
        batches = self.windows(more * self.count).split(8)
        with clipped(clip):
            return tn.calibrate(model or self.model, batches, loss_fn=losses)

    @cached_property
    def stats(self) -> tn.CalibrationStats:
        """Moments of the base."""
        return self.moments()

    @cached_property
    def prepared(self) -> PreparedPlan:
        """Candidates of the base."""
        return self.prepare(self.stats)

    @cached_property
    def base(self) -> dict[float, nn.Module]:
        """Compressed models of the base."""
        return self.made(self.prepared, self.stats)

    def prepare(self, stats: tn.CalibrationStats, damping: float = 0.1) -> PreparedPlan:
        """Compute the candidates of all linear layers."""
        config = tn.CompressionConfig(param_ratio=self.ratios[0], objective="curvature", damping=damping)
        return prepare(self.model, config, stats)

    def made(self, prepared: PreparedPlan, stats: tn.CalibrationStats) -> dict[float, nn.Module]:
        """Compress the model to all sizes."""
        found = {}
        for ratio in self.ratios:
            found[ratio] = light_copy(self.model)
            tn.apply_plan(found[ratio], prepared.plan(param_ratio=ratio), stats)
        return found

    def of(self, stats: tn.CalibrationStats, damping: float = 0.1) -> dict[float, nn.Module]:
        """Compress the model to all sizes with other moments."""
        return self.made(self.prepare(stats, damping), stats)


class clipped:
    """Context manager that clips gradients before they enter the moments."""

    def __init__(self, clip: Clip | None) -> None:
        self.clip, self.recorder = clip, import_module("tensornet.calibration.calibrate").MomentRecorder

    def __enter__(self) -> None:
        self.before = before = self.recorder.see_gradient
        clip = self.clip
        if clip is not None:
            self.recorder.see_gradient = lambda r, name, gradient, *x: before(r, name, clip(gradient), *x)

    def __exit__(self, *error: object) -> None:
        self.recorder.see_gradient = self.before


def ranks_in_eights(bench: Bench) -> Models:
    """Keep only candidates whose rank is a multiple of 8."""
    kept = []
    for found in bench.prepared.candidates:
        topologies = [found.make(k)[0] for k in range(len(found.params))]
        kept.append(
            found.only(
                [k for k, x in enumerate(topologies) if x is None or max(x.bond_dims.values()) % 8 == 0]
            )
        )
    return bench.made(replace(bench.prepared, candidates=tuple(kept)), bench.stats)


def allocated_by_forecasts(bench: Bench) -> Models:
    """Choose ranks by the losses with damping 1, on which forecasts are based."""
    found = tuple(replace(x, costs=x.forecasts) for x in bench.prepared.candidates)
    return bench.made(replace(bench.prepared, candidates=found), bench.stats)


def measured_by(key: Callable[[str], str]) -> Callable[[Bench], Models]:
    """Make a variant that scales predicted losses of groups of layers by measured over predicted increase."""

    def build(bench: Bench) -> Models:
        plan = bench.prepared.plan(param_ratio=min(bench.ratios))
        places = [
            int((x.params - layer.params_after).abs().argmin())
            for layer, x in zip(plan, bench.prepared.candidates, strict=True)
        ]
        costs = [float(x.costs[k]) for x, k in zip(bench.prepared.candidates, places, strict=True)]
        keys = [key(layer.name) for layer in plan]
        factors = {}
        for group in dict.fromkeys(keys):
            layers = tuple(x for x, k in zip(plan, keys, strict=True) if k == group and x.topology)
            cost = sum(x for x, k in zip(costs, keys, strict=True) if k == group)
            small = light_copy(bench.model)
            tn.apply_plan(small, replace(plan, layers=layers), bench.stats)
            factors[group] = float(bench.third.judge(small)[:, 1].mean()) / cost if cost else 1.0
        scaled = tuple(
            replace(x, costs=x.costs * factors[k])
            for x, k in zip(bench.prepared.candidates, keys, strict=True)
        )
        return bench.made(replace(bench.prepared, candidates=scaled), bench.stats)

    return build


def collected_again(rows_alone: bool) -> Callable[[Bench], Models]:
    """Make a variant that averages the moments of the dense model and of that of the largest size.

    Gradients there see errors of products, query times key and value times output, since one of the two
    factors is truncated already.
    """

    def build(bench: Bench) -> Models:
        other = bench.moments(tn.decompress(copy.deepcopy(bench.base[max(bench.ratios)])))
        rows = mean_of(bench.stats.rows, other.rows)
        columns = bench.stats.columns if rows_alone else mean_of(bench.stats.columns, other.columns)
        return bench.of(replace(bench.stats, rows=rows, columns=columns))

    return build


def mean_of(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Average moments by name."""
    return {name: (moment + second[name]) / 2 for name, moment in first.items()}


def refitted(*, passes: int = 1, new_rows: bool = False, **options: Any) -> Callable[[Bench], Models]:
    """Make a variant that refits the base; `new_rows` takes gradient moments of the refitted model."""

    def build(bench: Bench) -> Models:
        found = {}
        for ratio, model in bench.base.items():
            stats = bench.stats
            if new_rows:
                first = copy.deepcopy(model)
                refine(first, bench.model, bench.unused.split(8), stats)
                stats = replace(stats, rows=bench.moments(tn.decompress(first)).rows)
            found[ratio] = copy.deepcopy(model)
            for _ in range(passes):
                refine(found[ratio], bench.model, bench.unused.split(8), stats, **options)
        return found

    return build


VARIANTS: dict[str, Callable[[Bench], Models]] = {
    "base": lambda bench: bench.base,
    "norms clipped at their RMS": lambda bench: bench.of(bench.moments(clip=Clip(of_rms=1.0))),
    "norms clipped at their median": lambda bench: bench.of(bench.moments(clip=Clip(quantile=0.5))),
    "ranks in multiples of 8": ranks_in_eights,
    "losses measured by kind of layer": measured_by(lambda name: re.sub(r"\d+", "#", name)),
    "losses measured by layer": measured_by(str),
    "moments collected again at 80 %, and averaged": collected_again(rows_alone=False),
    "the same, gradients alone": collected_again(rows_alone=True),
    "three times the tokens": lambda bench: bench.of(bench.moments(more=3)),
    "refitted": refitted(),
    "refitted twice": refitted(passes=2),
    "refitted, gradients of the refitted model": refitted(new_rows=True),
    "refitted by the whole step": refitted(correction=1.0),
    "gradients at the labels of the text": lambda bench: bench.of(bench.moments(labels=True)),
    "gradients at the labels, norms clipped at their RMS": lambda bench: bench.of(
        bench.moments(labels=True, clip=Clip(of_rms=1.0))
    ),
    "allocated by losses of damping 1": allocated_by_forecasts,
    "damping 0.01": lambda bench: bench.of(bench.stats, 0.01),
    "damping 0.3": lambda bench: bench.of(bench.stats, 0.3),
}


def main(arguments: Sequence[str] | None = None) -> Path:
    """Measure all variants and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--toy", action="store_true", help="few windows, to see that everything runs")
    parser.add_argument("--records", type=Path, default=RECORDS, help="folder of the record")
    given = parser.parse_args(arguments)
    path = given.records / "low_rank_choices.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.is_file() else []
    bench = Bench(12 if given.toy else 160, (0.8, 0.6))
    base: dict[float, dict[str, Tensor]] = {}
    for name, build in VARIANTS.items():
        if name != "base" and any(row["variant"] == name for row in rows):
            continue
        start = time.process_time()
        models = build(bench)
        seconds = time.process_time() - start
        rows = [row for row in rows if row["variant"] != name]
        for ratio, model in models.items():
            found = {"chosen": bench.chosen.judge(model), "reported": bench.reported.judge(model)}
            base.setdefault(ratio, found)
            rows.append({"variant": name, "ratio": ratio, "seconds": seconds, **figures(found, base[ratio])})
            print(rows[-1], flush=True)
        record("low_rank_choices", rows, folder=given.records, windows=bench.count, length=LENGTH)
    return path


def figures(found: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> dict[str, float]:
    """Summarize loss increases and divergences, and their differences from the base, paired by token."""
    made = {}
    for use, values in found.items():
        gap = values - base[use]
        made[f"{use} rise"], made[f"{use} divergence"] = values.mean(0).tolist()
        made[f"{use} rise above base"] = float(gap[:, 0].mean())
        made[f"{use} standard error"] = float(gap[:, 0].std()) / len(gap) ** 0.5
        made[f"{use} divergence over base"] = float(values[:, 1].mean() / base[use][:, 1].mean())
    return made


if __name__ == "__main__":
    main()
