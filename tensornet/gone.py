"""Names that this version no longer has, and what to write instead; the next version drops this table."""

from collections.abc import Iterable
from dataclasses import fields
from functools import wraps
from typing import Any, TypeVar

#: Maps options and public names to the advice that errors show.
GONE = {
    "PriceList": "use tensornet.Survey",
    "compress_experts": "use tensornet.compress with CompressionConfig(share_experts=True)",
    "ExpertsReport": "use tensornet.CompressionReport",
    "FolderReport": "compress_folder returns a tensornet.CompressionReport",
    "PlannedFolder": "plan_folder returns a tensornet.CompressionPlan",
    "UpcycleOptions": "pass its fields as arguments of tensornet_hf.upcycle",
    "compress_checkpoint": "use tensornet_hf.compress_folder",
    "plan_map": "run benchmarks/maps.py",
    "prices": "use survey=",
    "byte_ratio": "use max_bytes= for the whole file, or bits_per_weight= for the targeted layers",
    "damping": "it is the constant tensornet.damping.MOMENT_DAMPING",
    "max_bond": 'use topology_options={"max_bond": 64}',
    "objective": "use method='nearest' (formats), 'svd' (networks) or 'gptq' (errors of outputs)",
    "pivoted": "method='auto' stores networks so if there is calibration data",
    "rel_error": 'use topology_options={"rel_error": 0.1}',
    "require_calibrated": "turn the CalibrationWarning about layers that never ran into an error",
    "rounding": "use method='gptq' or method='nearest'",
    "sites": 'use topology_options={"sites": 4}',
    "whole_model": "max_bytes= counts the whole file, and bits_per_weight= the targeted layers",
}

Options = TypeVar("Options", bound=type)


def no_attribute(module: str, name: str) -> AttributeError:
    """Return the error for a public name that a module does not have."""
    return AttributeError(f"module {module!r} has no attribute {name!r}.{advice([name])}")


def advice(names: Iterable[str]) -> str:
    """Return a sentence for each name that is in the table, to be added to an error.

    Example:
        >>> from tensornet.gone import advice
        >>> advice(["byte_ratios", "prices"])
        ' prices is gone: use survey=.'
    """
    return "".join(f" {name} is gone: {GONE[name]}." for name in names if name in GONE)


def explains_gone(options: Options) -> Options:
    """Make the constructor of a dataclass explain arguments that are in the table."""
    plain: Any = options.__init__  # type: ignore[misc]  # the class itself, not a subclass
    known = {x.name for x in fields(options)}

    @wraps(plain)
    def init(self: Any, *values: Any, **named: Any) -> None:
        if found := advice(name for name in named if name not in known):
            raise TypeError(f"{options.__name__} got unknown options.{found}")
        plain(self, *values, **named)

    options.__init__ = init  # type: ignore[misc]
    return options
