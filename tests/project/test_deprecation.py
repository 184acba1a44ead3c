"""Names that moved: each works, and warns once with the place where it lives now."""

from __future__ import annotations

import inspect
import warnings
from importlib import import_module

import pytest

PACKAGES = ("tensornet.compression", "tensornet.calibration", "tensornet_hf")


def places(package: str) -> dict[str, str]:
    """Map the old names of a package to the modules that hold them."""
    found: dict[str, str] = inspect.getclosurevars(import_module(package).__getattr__).nonlocals["places"]
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_every_old_name_is_the_new_one_and_says_so(package: str) -> None:
    module, moved = import_module(package), places(package)
    assert moved
    for name, place in moved.items():
        with pytest.warns(DeprecationWarning, match=rf"{package}\.{name} is now {place}\.{name}; "):
            assert getattr(module, name) is getattr(import_module(place), name)
        assert name not in module.__all__


@pytest.mark.parametrize("package", PACKAGES)
def test_a_line_that_asks_again_is_not_told_again(package: str) -> None:
    module, name = import_module(package), next(iter(places(package)))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("default")
        for _ in range(3):
            getattr(module, name)
    assert [warning.category for warning in told] == [DeprecationWarning]
    assert told[0].filename == __file__


@pytest.mark.parametrize("package", PACKAGES)
def test_a_name_that_never_was_is_an_attribute_error(package: str) -> None:
    with pytest.raises(AttributeError, match=f"'{package}' has no attribute 'heel'"):
        _ = import_module(package).heel
