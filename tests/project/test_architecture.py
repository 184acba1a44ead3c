"""The borders of the project: who may import whom, no circles, and which names are public.

The public names are a snapshot in ``tests/public_names.txt``. After changing them on purpose run
``make names`` and commit the file with the change.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from public_surface import PAGES

from tensornet._entry import CLI_MODULES

ROOT = Path(__file__).resolve().parents[2]
SNAPSHOT = ROOT / "tests" / "public_names.txt"
PACKAGES = {
    "tensornet": ROOT / "tensornet",
    "tensornet_moe": ROOT / "plugins" / "moe" / "tensornet_moe",
    "tensornet_hf": ROOT / "plugins" / "hf" / "tensornet_hf",
}
#: Optional packages of the core: imported inside the function that needs them, never with the package.
OPTIONAL = {"cotengra", "quimb", "tensorly", "matplotlib", "jinja2", "hypothesis", "pytest"}
HUGGING_FACE = {"transformers", "accelerate", "peft", "typer", "rich"}


def modules(package: str) -> dict[str, Path]:
    """Map the dotted names of all modules of a package to their files."""
    base = PACKAGES[package].parent
    return {
        ".".join(path.relative_to(base).with_suffix("").parts).removesuffix(".__init__"): path
        for path in sorted(PACKAGES[package].rglob("*.py"))
    }


def imported(path: Path) -> Iterator[str]:
    """Dotted names of everything that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def offenders(package: str, forbidden: set[str], *, without: str = "") -> dict[str, set[str]]:
    return {
        name: bad
        for name, path in modules(package).items()
        if not (without and name.startswith(without))
        and (bad := {x.split(".")[0] for x in imported(path)} & forbidden)
    }


# --- who may import whom -------------------------------------------------------------------------


def test_core_imports_no_plugin() -> None:
    plugins = {"tensornet_moe", "tensornet_hf"} | HUGGING_FACE
    assert offenders("tensornet", plugins | {"hypothesis"}, without="tensornet.testing") == {}
    assert offenders("tensornet", plugins) == {}


def test_moe_imports_no_hugging_face() -> None:
    assert offenders("tensornet_moe", {"tensornet_hf"} | HUGGING_FACE) == {}


def test_plugins_import_no_private_name_of_another_package() -> None:
    private = {
        f"{name}: {target}"
        for package in ("tensornet_moe", "tensornet_hf")
        for name, path in modules(package).items()
        for target in imported(path)
        if target.startswith("tensornet")
        and target.split(".")[0] != package
        # `tensornet._util` is shared by the packages of this distribution, not by its users.
        and any(part.startswith("_") for part in target.removeprefix("tensornet._util").split("."))
    }
    assert private == set()


@pytest.mark.parametrize("package", PACKAGES)
def test_no_circle_of_imports(package: str) -> None:
    """Imports inside functions and under TYPE_CHECKING count as well: they hide a circle, not end it."""
    names = modules(package)
    uses: dict[str, set[str]] = defaultdict(set)
    for module, path in names.items():
        for target in imported(path):
            found = target if target in names else target.rpartition(".")[0]
            if found in names and found != module:
                uses[module].add(found)
    try:
        tuple(TopologicalSorter(uses).static_order())
    except CycleError as error:
        pytest.fail(f"these import one another: {' -> '.join(error.args[1])}")


@pytest.mark.slow
@pytest.mark.parametrize("package", ["tensornet", "tensornet_moe"])
def test_loading_a_package_loads_nothing_optional(package: str) -> None:
    code = f"import sys, {package}; print(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True
    )
    forbidden = {"tensornet_hf", "tensornet_moe"} - {package} | HUGGING_FACE | OPTIONAL
    assert set(done.stdout.split()) & forbidden == set()


def test_entry_checks_for_all_that_the_extra_brings() -> None:
    needed = packages_of_extra("cli") - packages_of_extra("")
    assert {name.lower() for name in needed} == set(CLI_MODULES)


def packages_of_extra(extra: str) -> set[str]:
    """Names of the requirements of an extra, extras it refers to included."""
    names: set[str] = set()
    for line in requires("tensornet-torch") or []:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        if requirement.name == "tensornet-torch":
            for inner in requirement.extras:
                names |= packages_of_extra(inner)
        else:
            names.add(requirement.name)
    return names


def test_every_folder_of_code_is_a_typed_package() -> None:
    for root in PACKAGES.values():
        assert (root / "py.typed").is_file()
        assert [f for p in root.rglob("*.py") if not ((f := p.parent) / "__init__.py").is_file()] == []


# --- what is public ------------------------------------------------------------------------------


def public_names() -> list[str]:
    return sorted(f"{name}.{public}" for name in PAGES for public in importlib.import_module(name).__all__)


def test_public_names_are_the_snapshot() -> None:
    recorded, current = set(SNAPSHOT.read_text().split()), set(public_names())
    added, gone = sorted(current - recorded), sorted(recorded - current)
    assert (added, gone) == ([], []), "public names changed; if that is meant, run `make names`"


def test_every_public_name_has_a_docstring() -> None:
    def has_docstring(name: str) -> bool:
        module, _, attribute = name.rpartition(".")
        value = getattr(importlib.import_module(module), attribute)
        if not (inspect.isclass(value) or inspect.isroutine(value) or inspect.ismodule(value)):
            return True  # a constant or a type alias has no docstring of its own
        text = (value.__doc__ or "").strip()
        # A dataclass without a docstring gets its signature as one.
        return bool(text) and not text.startswith(f"{attribute}(")

    assert [name for name in public_names() if not has_docstring(name)] == []


if __name__ == "__main__":
    if sys.argv[1:] != ["--update"]:
        raise SystemExit("usage: python tests/project/test_architecture.py --update")
    SNAPSHOT.write_text("".join(f"{name}\n" for name in public_names()))
