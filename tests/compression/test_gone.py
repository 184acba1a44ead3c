"""Errors about names of earlier versions say what to write instead."""

from __future__ import annotations

import inspect

import pytest

import tensornet as tn
import tensornet_hf as th
import tensornet_moe as tm
from tensornet.gone import GONE

#: Options of `CompressionConfig`; all other names are those of functions and classes.
OPTIONS = (
    "byte_ratio",
    "damping",
    "max_bond",
    "objective",
    "pivoted",
    "prices",
    "rel_error",
    "require_calibrated",
    "rounding",
    "sites",
    "whole_model",
)


@pytest.mark.parametrize("name", sorted(GONE.keys() - {*OPTIONS}))
def test_gone_attributes_are_explained(name: str) -> None:
    for module in (tn, tm, th):
        with pytest.raises(AttributeError, match=f"{name} is gone"):
            getattr(module, name)


@pytest.mark.parametrize("name", OPTIONS)
def test_gone_options_are_explained(name: str) -> None:
    with pytest.raises(TypeError, match=f"{name} is gone"):
        tn.CompressionConfig(**{name: 1})
    with pytest.raises(ValueError, match=f"{name} is gone"):
        tn.CompressionConfig.from_dict({name: 1})


def test_other_options_are_listed() -> None:
    with pytest.raises(ValueError, match="max_bytes"):
        tn.CompressionConfig.from_dict({"bytes": 1})
    with pytest.raises(TypeError, match="bytes"):
        tn.CompressionConfig(bytes=1)  # type: ignore[call-arg]
    assert "max_bytes" in inspect.signature(tn.CompressionConfig).parameters
