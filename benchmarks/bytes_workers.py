"""Plan and round for `bytes.py` in forked processes of one thread each, which share the layers."""

from __future__ import annotations

import io
import multiprocessing
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch
from torch import nn

import tensornet as tn
from tensornet.compression import PreparedPlan, prepare
from tensornet.compression.apply import set_submodule
from tensornet.compression.candidates import LayerCandidates
from tensornet.compression.rounded_layers import RoundedLayers
from tensornet.nn.module import NetworkModule
from tensornet.nn.targets import find_targets

Portable = dict[str, tuple[dict[str, Any], tuple[float, ...]]]
#: Arguments that forked processes share, one for each.
_GIVEN: list[Any] = []


def in_processes(function: Callable[[int], Any], given: list[Any]) -> list[Any]:
    """Call a function with the position of each item of `_GIVEN`, in a process of its own."""
    with multiprocessing.get_context("fork").Pool(len(given), _start, (given,)) as pool:
        return pool.map(function, range(len(given)), chunksize=1)


def _start(given: list[Any]) -> None:
    torch.set_num_threads(1)
    _GIVEN.extend(given)


def prepared_in_parallel(
    model: nn.Module, config: tn.CompressionConfig, stats: tn.CalibrationStats, workers: int
) -> PreparedPlan:
    """Run `prepare` in several processes."""
    if workers == 1:
        return prepare(model, config, stats)
    targets = find_targets(model, config, stats.readers)
    workers = min(workers, len(targets))
    parts = [tuple(t.name for t in targets[k::workers]) for k in range(workers)]
    given = [(model, replace(config, target_modules=part, exclude_modules=()), stats) for part in parts]
    found: Portable = {}
    for each in in_processes(_candidates, given):
        found |= each
    candidates = [
        LayerCandidates(**{**values, "make": values["make"].__getitem__})
        for values, _ in (found[t.name] for t in targets)
    ]
    spectra = tuple(found[t.name][1] for t in targets)
    return PreparedPlan(
        config, "curvature", tuple(targets), tuple(candidates), spectra, stats.loss, stats.source
    )


def _candidates(part: int) -> Portable:
    """Compute the candidates of some layers, in a form that can be sent between processes."""
    made = prepare(*_GIVEN[part])
    found = {}
    for target, each, spectrum in zip(made.targets, made.candidates, made.spectra, strict=True):
        values = {field.name: getattr(each, field.name) for field in fields(each)}
        values["make"] = [each.make(k) for k in range(len(each.params))]
        found[target.name] = values, spectrum
    return found


def apply_in_parallel(
    model: nn.Module,
    plan: tn.CompressionPlan,
    stats: tn.CalibrationStats,
    workers: int,
    rounded: RoundedLayers | None = None,
) -> None:
    """Run `apply_plan` in several processes, or in this one with layers that verification has rounded."""
    if workers == 1:
        tn.apply_plan(model, plan, stats, rounded=rounded)
        return
    parts = [plan.layers[k::workers] for k in range(min(workers, len(plan.layers)))]
    given = [(model, replace(plan, layers=part, baseline=None), stats) for part in parts]
    for made in in_processes(_rounded, given):
        for name, module in torch.load(io.BytesIO(made), weights_only=False).items():
            set_submodule(model, name, module)


def _rounded(part: int) -> bytes:
    """Compress the layers of one part of a plan, and serialize them."""
    model, plan, stats = _GIVEN[part]
    tn.apply_plan(model, plan, stats)
    buffer = io.BytesIO()
    torch.save({name: m for name, m in model.named_modules() if isinstance(m, NetworkModule)}, buffer)
    return buffer.getvalue()
