"""Warnings name the line of the caller."""

from __future__ import annotations

import inspect
import warnings
from pathlib import Path

from torch import nn

import tensornet as tn


def line_here() -> int:
    frame = inspect.currentframe()
    assert frame is not None
    assert frame.f_back is not None
    return frame.f_back.f_lineno


def test_warnings_point_at_the_call() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    found = {}
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        found["compress"] = line_here() + 1
        tn.compress(model, tn.CompressionConfig(param_ratio=0.5), progress=False)
        found["clip"] = line_here() + 1
        tn.topologies.mpo(out_dims=(2, 2), in_dims=(2, 2), bond_dims=(99,))
    assert [(Path(w.filename).name, w.lineno) for w in seen] == [
        (Path(__file__).name, line) for line in found.values()
    ]
