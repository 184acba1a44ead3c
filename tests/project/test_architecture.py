"""The shape of the project: who may import whom, which names are public, how long a file may be.

The public names are a snapshot in ``tests/public_names.txt``. After changing them on purpose run
``python tests/project/test_architecture.py --update`` and commit the file with the change.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import requires
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from public_surface import PAGES

from tensornet._entry import CLI_MODULES

ROOT = Path(__file__).resolve().parents[2]
CORE = ROOT / "tensornet"
MOE = ROOT / "plugins" / "moe" / "tensornet_moe"
HF = ROOT / "plugins" / "hf" / "tensornet_hf"
SNAPSHOT = ROOT / "tests" / "public_names.txt"
PUBLIC_MODULES = tuple(PAGES)

# Optional packages of the core: imported inside the function that needs them, never with the package.
LAZY = {"quimb", "tensorly", "matplotlib", "jinja2"}
HUGGING_FACE = {"transformers", "accelerate", "peft", "typer", "rich"}

MAX_LINES = 500
# Path from the root -> why one idea needs more lines than that.
LONG_FILES: dict[str, str] = {
    "tensornet/testing/laws.py": "every law with its example, and the classes that draw for them",
    "tests/hf_architectures.py": "one table: an entry for each architecture, with its configuration",
    "tensornet/mpo.py": "one class: the algebra of an operator, every method with its example",
    "tensornet/mpo_algebra.py": "the pure functions behind that class, one for each method",
}


def python_files(*folders: Path) -> Iterator[Path]:
    for folder in folders:
        yield from sorted(folder.rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Top-level names of all modules a file imports, wherever in the file."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.split(".")[0])
    return found


def imports_at_load(statement: str) -> set[str]:
    """Top-level names of all modules loaded after ``statement`` ran in a fresh interpreter."""
    code = f"import sys\n{statement}\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def offenders(files: Iterator[Path], forbidden: set[str]) -> dict[str, set[str]]:
    return {str(f.relative_to(ROOT)): bad for f in files if (bad := imports(f) & forbidden)}


def core_files() -> Iterator[Path]:
    return (f for f in python_files(CORE) if CORE / "testing" not in f.parents)


def public_names() -> list[str]:
    return sorted(f"{name}.{public}" for name in PUBLIC_MODULES for public in exported(name))


def exported(name: str) -> list[str]:
    """``__all__`` of a module, or nothing while the module holds only its docstring or does not exist."""
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        return []
    module = importlib.import_module(name)
    if not hasattr(module, "__all__"):
        assert _is_only_a_docstring(module), f"{name} holds code but no __all__: list its public names there"
        return []
    return list(module.__all__)


def _is_only_a_docstring(module: ModuleType) -> bool:
    body = ast.parse(Path(str(module.__file__)).read_text()).body
    return all(isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) for node in body)


# --- who may import whom -------------------------------------------------------------------------


def test_core_imports_no_plugin() -> None:
    forbidden = {"tensornet_moe", "tensornet_hf", "hypothesis"} | HUGGING_FACE
    assert offenders(core_files(), forbidden) == {}


def test_testing_imports_no_plugin() -> None:
    assert offenders(python_files(CORE / "testing"), {"tensornet_moe", "tensornet_hf"} | HUGGING_FACE) == {}


def test_moe_imports_no_hugging_face() -> None:
    assert offenders(python_files(MOE), {"tensornet_hf"} | HUGGING_FACE) == {}


def test_plugins_import_no_private_name_of_another_package() -> None:
    found = {
        f"{path.relative_to(ROOT)}: {node.module}.{alias.name}"
        for root in (MOE, HF)
        for path in python_files(root)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("tensornet")
        for alias in node.names
        if node.module.split(".")[0] != root.name
        and any(part.startswith("_") for part in (*node.module.split("."), alias.name))
    }
    assert found == set()


def test_the_hugging_face_plugin_registers_one_extension() -> None:
    calls = [
        path.name
        for path in python_files(HF, MOE)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "register_extension"
    ]
    assert calls == ["__init__.py"]


@pytest.mark.parametrize("package", ["tensornet", "tensornet_moe"])
def test_loading_a_package_loads_nothing_optional(package: str) -> None:
    plugins = {"tensornet_hf", "tensornet_moe"} - {package}
    forbidden = plugins | HUGGING_FACE | LAZY | {"hypothesis", "pytest"}
    assert imports_at_load(f"import {package}") & forbidden == set()


def test_only_the_entry_names_a_plugin_in_a_string() -> None:
    """An import by string would escape the tests above; the console script needs exactly one."""
    plugin = re.compile(r"tensornet_(hf|moe)(\.\w+)*")
    naming = {
        str(path.relative_to(ROOT))
        for path in core_files()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and plugin.fullmatch(node.value)
    }
    assert naming == {"tensornet/_entry.py"}


def test_entry_checks_for_all_that_the_extra_brings() -> None:
    needed = _packages_of_extra("cli") - _packages_of_extra("")
    assert {name.lower() for name in needed} == set(CLI_MODULES)


def _packages_of_extra(extra: str) -> set[str]:
    """Names of the requirements of an extra, extras it refers to included."""
    names: set[str] = set()
    for line in requires("tensornet-torch") or []:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        if requirement.name == "tensornet-torch":
            for inner in requirement.extras:
                names |= _packages_of_extra(inner)
        else:
            names.add(requirement.name)
    return names


# --- what is public ------------------------------------------------------------------------------


def test_public_names_are_the_snapshot() -> None:
    recorded = SNAPSHOT.read_text().split()
    current = public_names()
    added, gone = sorted(set(current) - set(recorded)), sorted(set(recorded) - set(current))
    assert (added, gone) == ([], []), (
        f"public names changed: added {added}, gone {gone}. If that is meant, run "
        "`python tests/project/test_architecture.py --update` and say so in CHANGELOG.md."
    )


def test_every_public_name_has_a_docstring() -> None:
    assert [name for name in public_names() if not _has_docstring(name)] == []


def _has_docstring(name: str) -> bool:
    module, _, attribute = name.rpartition(".")
    value = getattr(importlib.import_module(module), attribute)
    if not (inspect.isclass(value) or inspect.isroutine(value) or inspect.ismodule(value)):
        return True  # a constant or a type alias has no docstring of its own
    text = (value.__doc__ or "").strip()
    # A dataclass without a docstring gets its signature as one.
    return bool(text) and not text.startswith(f"{attribute}(")


# --- how it is written ---------------------------------------------------------------------------


def test_files_are_short() -> None:
    folders = (CORE, MOE, HF, ROOT / "tests", ROOT / "benchmarks")
    lengths = {str(f.relative_to(ROOT)): len(f.read_text().splitlines()) for f in python_files(*folders)}
    long = {path for path, lines in lengths.items() if lines > MAX_LINES}
    assert long == set(LONG_FILES), f"over {MAX_LINES} lines, or listed as such without need"


def test_library_prints_nothing() -> None:
    printing = {
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in python_files(CORE, MOE, HF)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    }
    assert printing == set()


def test_every_folder_of_code_is_a_package() -> None:
    folders = {path.parent for path in python_files(CORE, MOE, HF)}
    assert [str(f.relative_to(ROOT)) for f in folders if not (f / "__init__.py").is_file()] == []


def test_every_package_is_typed() -> None:
    assert [p.name for p in (CORE, MOE, HF) if not (p / "py.typed").is_file()] == []


if __name__ == "__main__":
    if sys.argv[1:] != ["--update"]:
        raise SystemExit("usage: python tests/project/test_architecture.py --update")
    SNAPSHOT.write_text("".join(f"{name}\n" for name in public_names()))
