"""Every example in a docstring runs, and every public name has one.

Examples run module by module, offline, from a fixed seed, with warnings as errors. Tracebacks and other
output may be shortened by an ellipsis. They see `torch` and the packages under their usual names, those of
layers above their own excepted, and nothing else: whoever copies one needs no more.
"""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from public_surface import public_objects

import tensornet_moe.routers
from tensornet.nn import extension, layer_kinds, unfuse
from tensornet.nn import module as nn_module
from tensornet.topologies import registry

#: The usual name of each package; a package may use those before it.
PACKAGES = {"tensornet": "tn", "tensornet_moe": "tm", "tensornet_hf": "th"}


def modules() -> Iterator[str]:
    """List all modules of all packages, without scripts that run when imported."""
    for package in PACKAGES:
        found = importlib.import_module(package)
        yield package
        for info in pkgutil.walk_packages(found.__path__, f"{package}."):
            if not info.name.endswith("__main__"):
                yield info.name


def usual_names(package: str) -> dict[str, object]:
    """Return what an example of a package may use without importing it."""
    below = list(PACKAGES)[: list(PACKAGES).index(package) + 1]
    return {"torch": torch} | {PACKAGES[name]: importlib.import_module(name) for name in below}


def examples(module: ModuleType) -> list[doctest.DocTest]:
    """Collect the docstrings of a module that hold examples."""
    known = usual_names(module.__name__.split(".")[0])
    tests = doctest.DocTestFinder(exclude_empty=True).find(module, module.__name__)
    for test in tests:
        test.globs = {"__name__": "__main__"} | known
    return [test for test in tests if test.examples]


def has_example(found: object) -> bool:
    """Return True if the docstring of a class or function holds an example."""
    return bool(doctest.DocTestParser().get_examples(inspect.getdoc(found) or ""))


#: Modules whose examples need the extra `gguf`; they run among all tests.
NEEDS_GGUF = ("tensornet_hf.recipes",)
#: Modules whose examples take seconds.
SLOW = (*NEEDS_GGUF, "tensornet_hf.specializing")


@pytest.fixture
def _own_registries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undo the registrations that examples make."""
    for module, name in (
        (extension, "_EXTENSIONS"),
        (registry, "_FAMILIES"),
        (nn_module, "_BUILDERS"),
        (layer_kinds, "_KINDS"),
        (unfuse, "_COMPOUNDS"),
        (tensornet_moe.routers, "_ROUTERS"),
    ):
        monkeypatch.setattr(module, name, getattr(module, name).copy())


@pytest.mark.usefixtures("_own_registries")
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT's use of it
@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=[pytest.mark.slow] * (x in SLOW)) for x in sorted(modules())]
)
def test_examples_of_a_module_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name in NEEDS_GGUF:
        for package in ("gguf", "libgguf"):
            pytest.importorskip(package, reason="needs the extra `gguf`")
    report: list[str] = []
    for number, test in enumerate(examples(importlib.import_module(name))):
        folder = tmp_path / str(number)
        folder.mkdir()
        monkeypatch.chdir(folder)
        torch.manual_seed(0)  # an example does not depend on those before it
        runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS, verbose=False)
        assert not runner.run(test, out=report.append).failed, "".join(report)


def test_every_public_name_has_an_example() -> None:
    """A constant or a type alias has no docstring of its own."""
    missing = {
        name
        for name, found in public_objects()
        if (inspect.isclass(found) or inspect.isroutine(found)) and not has_example(found)
    }
    assert missing == set(), "a public class or function needs a short runnable example"
