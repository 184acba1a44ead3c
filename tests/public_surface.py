"""The public surface: packages whose `__all__` is documented, and the objects in them."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator

#: Packages with a documented `__all__`, each with its page below docs/api/.
PAGES = {
    "tensornet": "tensornet.md",
    "tensornet.nn": "tensornet.md",
    "tensornet.topologies": "tensornet.md",
    "tensornet.calibration": "tensornet.md",
    "tensornet.compression": "tensornet.md",
    "tensornet.healing": "tensornet.md",
    "tensornet.quantization": "tensornet.md",
    "tensornet.testing": "testing.md",
    "tensornet_moe": "tensornet_moe.md",
    "tensornet_hf": "tensornet_hf.md",
    "tensornet_hf.embedded": "tensornet_hf.md",
    "tensornet_hf.peft": "tensornet_hf.md",
}


def public_objects() -> Iterator[tuple[str, object]]:
    """List the public names of all documented packages with their objects.

    A public module that is no documented package itself, such as `tensornet.testing.laws`, stands for the
    functions and classes that it defines.
    """
    for package in PAGES:
        module = importlib.import_module(package)
        for name in module.__all__:
            found = getattr(module, name)
            if not inspect.ismodule(found):
                yield f"{package}.{name}", found
            elif found.__name__ not in PAGES:
                for inner, value in vars(found).items():
                    if not inner.startswith("_") and getattr(value, "__module__", "") == found.__name__:
                        yield f"{found.__name__}.{inner}", value
