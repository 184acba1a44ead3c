"""Every example in a docstring runs, and every public name has one.

Examples run module by module, offline, from a fixed seed, with warnings as errors. Tracebacks and other
output may be shortened by an ellipsis.
"""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

import tensornet_moe.router_base
from tensornet.nn import serialization
from tensornet.topologies import registry

PACKAGES = ("tensornet", "tensornet_moe", "tensornet_hf")

#: Packages with documented `__all__`.
NAMESPACES = ("tensornet", "tensornet.nn", "tensornet.testing", "tensornet_moe", "tensornet_hf")

#: Public names without an example. A name that has got one has to leave the list.
WITHOUT_EXAMPLE = {
    "tensornet.CalibrationStats",
    "tensornet.CompressionConfig",
    "tensornet.CompressionPlan",
    "tensornet.CompressionReport",
    "tensornet.HealReport",
    "tensornet.LayerPlan",
    "tensornet.LayerReport",
    "tensornet.apply_plan",
    "tensornet.calibrate",
    "tensornet.compress",
    "tensornet.decompress",
    "tensornet.load_model",
    "tensornet.nn.Compound",
    "tensornet.nn.CompoundKind",
    "tensornet.nn.Explanation",
    "tensornet.nn.LayerKind",
    "tensornet.nn.MPOEmbedding",
    "tensornet.nn.MPOLinear",
    "tensornet.nn.NetworkModule",
    "tensornet.nn.PartMatrix",
    "tensornet.nn.Stack",
    "tensornet.nn.StrategyCost",
    "tensornet.nn.TensorNetworkLinear",
    "tensornet.nn.build_module",
    "tensornet.nn.kind_of",
    "tensornet.nn.layer_kind",
    "tensornet.nn.module_spec",
    "tensornet.nn.register_layer_kind",
    "tensornet.nn.register_module_type",
    "tensornet.plan",
    "tensornet.save_model",
    "tensornet_hf.CheckpointReport",
    "tensornet_hf.CompressOptions",
    "tensornet_hf.FolderReport",
    "tensornet_hf.GradientMaskCallback",
    "tensornet_hf.MoEConfig",
    "tensornet_hf.OptionError",
    "tensornet_hf.PlannedFolder",
    "tensornet_hf.RouterStatsCallback",
    "tensornet_hf.TensorNetworkConfig",
    "tensornet_hf.UpcycleReport",
    "tensornet_hf.WorkerError",
    "tensornet_hf.calibrate_checkpoint",
    "tensornet_hf.compress_checkpoint",
    "tensornet_hf.decompress",
    "tensornet_hf.load",
    "tensornet_hf.prepare_for_saving",
    "tensornet_hf.save_model",
    "tensornet_hf.upcycle",
    "tensornet_hf.verify_manifest",
}

#: Examples that fail, with the reason. An example that runs, or is gone, has to leave the list.
STALE = {
    "tensornet.calibration.losses.output_losses": "imports a name that the package no longer exports",
    "tensornet.healing.heal.heal": "needs a teacher that it does not build",
    "tensornet.healing.refine.refine": "needs a model that it does not build",
    "tensornet.nn.extension.ModelExtension": "needs a model that it does not build",
    "tensornet_hf.folder_compression.compress_folder": "needs a folder that it does not write",
    "tensornet_hf.folder_compression.plan_folder": "needs a folder that it does not write",
    "tensornet_hf.pipeline.upcycle_folder": "needs a folder that it does not write",
}


def modules() -> Iterator[str]:
    """List all modules of all packages, without scripts that run when imported."""
    for package in PACKAGES:
        found = importlib.import_module(package)
        yield package
        for info in pkgutil.walk_packages(found.__path__, f"{package}."):
            if not info.name.endswith("__main__"):
                yield info.name


def examples(module: ModuleType) -> list[doctest.DocTest]:
    """Collect the docstrings of a module that hold examples."""
    finder = doctest.DocTestFinder(exclude_empty=True)
    return [test for test in finder.find(module, module.__name__) if test.examples]


def documented(namespace: str) -> Iterator[tuple[str, object]]:
    """List the public classes and functions of a package."""
    package = importlib.import_module(namespace)
    for name in package.__all__:
        found = getattr(package, name)
        if inspect.isclass(found) or inspect.isroutine(found):
            yield f"{namespace}.{name}", found


def has_example(found: object) -> bool:
    """Return True if the docstring of a class or function holds an example."""
    return bool(doctest.DocTestParser().get_examples(inspect.getdoc(found) or ""))


@pytest.fixture
def _own_registries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undo the registrations that examples make."""
    for module, name in (
        (registry, "_FAMILIES"),
        (serialization, "_BUILDERS"),
        (tensornet_moe.router_base, "_ROUTERS"),
    ):
        monkeypatch.setattr(module, name, dict(getattr(module, name)))


@pytest.mark.usefixtures("_own_registries")
@pytest.mark.parametrize("name", sorted(modules()))
def test_examples_of_a_module_run(name: str) -> None:
    report: list[str] = []
    for test in examples(importlib.import_module(name)):
        torch.manual_seed(0)  # an example does not depend on those before it
        runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS, verbose=False)
        failures = runner.run(test, out=report.append).failed
        assert not failures or test.name in STALE, "".join(report)
        assert failures or test.name not in STALE, f"{test.name} runs: remove it from STALE"


def test_stale_examples_exist() -> None:
    found = {
        test.name
        for name in modules()
        for test in examples(importlib.import_module(name))
        if test.name in STALE
    }
    assert found == STALE.keys()


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_every_public_name_has_an_example(namespace: str) -> None:
    missing = {name for name, found in documented(namespace) if not has_example(found)}
    listed = {name for name in WITHOUT_EXAMPLE if name.rpartition(".")[0] == namespace}
    assert missing - listed == set(), "a public class or function needs a short runnable example"
    assert listed - missing == set(), "has an example now, or is no longer public: remove it from the list"
