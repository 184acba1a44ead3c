"""The shape of the house: rooms without circles, names that tell, functions a reader holds in the head."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent
while not (ROOT / "pyproject.toml").is_file():
    ROOT = ROOT.parent
PACKAGES = {
    "tensornet": ROOT / "tensornet",
    "tensornet_moe": ROOT / "plugins" / "moe" / "tensornet_moe",
    "tensornet_hf": ROOT / "plugins" / "hf" / "tensornet_hf",
}
FAMILIES = {"mpo", "low_rank", "tucker", "tensor_ring", "kronecker", "block_tt", "residual"}

MAX_FUNCTION, MAX_PARAMETERS = 60, 10
#: Function -> why a reader is better served by its length than by its parts.
LONG_FUNCTIONS: dict[str, str] = {
    "plugins/hf/tensornet_hf/cli/compress.py:run": "the options of the command, with their help",
    "plugins/hf/tensornet_hf/cli/upcycle.py:run": "likewise",
    "plugins/hf/tensornet_hf/cli/evaluate.py:run": "likewise",
}
#: Function -> why it takes more than ten parameters.
MANY_PARAMETERS: dict[str, str] = {
    "tensornet/calibration/calibrate.py:calibrate": "documented keyword arguments",
    "plugins/hf/tensornet_hf/cli/compress.py:run": "the options of the command",
    "plugins/hf/tensornet_hf/cli/upcycle.py:run": "the options of the command",
    "plugins/hf/tensornet_hf/cli/evaluate.py:run": "the options of the command",
    "plugins/hf/tensornet_hf/streaming/run.py:compress_checkpoint": "documented keyword arguments",
    "tensornet/nn/linear.py:MPOLinear.__init__": "the documented arguments of nn.Linear and of a chain",
    "plugins/moe/tensornet_moe/experts.py:SharedCoreExperts.from_dense": "documented keyword arguments",
}
#: File name -> why it stands in two rooms of one package with one meaning.
SAME_NAME: dict[str, str] = {
    "config.py": "the options of a package's work",
    "mpo.py": "the operator, and the family of its topologies",
    "demo.py": "the job, and its command in cli/",
    "export.py": "likewise",
    "upcycle.py": "likewise",
}


def files(package: str) -> list[Path]:
    return sorted(PACKAGES[package].rglob("*.py"))


def functions(path: Path) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    def walk(node: ast.AST, prefix: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                yield prefix + child.name, child
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield from walk(child, f"{prefix}{child.name}.")

    for name, node in walk(ast.parse(path.read_text()), ""):
        yield f"{path.relative_to(ROOT)}:{name}", node


def code_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its docstring."""
    doc = ast.get_docstring(node, clean=False)
    return (node.end_lineno or 0) - node.lineno + 1 - (len(doc.splitlines()) + 1 if doc else 0)


def room(module: str) -> str:
    """Folder or file directly below the package."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


@pytest.mark.parametrize("package", PACKAGES)
def test_no_circle_between_rooms(package: str) -> None:
    base = PACKAGES[package].parent
    names = {
        ".".join(path.relative_to(base).with_suffix("").parts).removesuffix(".__init__"): path
        for path in files(package)
    }
    uses: dict[str, set[str]] = defaultdict(set)
    for module, path in names.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
                found = [f"{node.module}.{alias.name}" for alias in node.names]
                targets = [full if full in names else node.module for full in found]
            elif isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            else:
                continue
            for target in targets:
                if target.split(".")[0] == package and room(target) != room(module):
                    uses[room(module)].add(room(target))
    try:
        tuple(TopologicalSorter(uses).static_order())
    except CycleError as error:
        pytest.fail(f"{package}: the rooms {' -> '.join(error.args[1])} import one another")


@pytest.mark.parametrize("package", PACKAGES)
def test_no_file_name_twice(package: str) -> None:
    places = defaultdict(list)
    for path in files(package):
        if path.name != "__init__.py":
            places[path.name].append(str(path.relative_to(ROOT)))
    twice = {name: where for name, where in places.items() if len(where) > 1 and name not in SAME_NAME}
    assert twice == {}, "a name that tells is told once"


@pytest.mark.parametrize("package", PACKAGES)
def test_functions_are_short(package: str) -> None:
    sizes = {name: code_lines(node) for path in files(package) for name, node in functions(path)}
    long = {name: size for name, size in sizes.items() if size > MAX_FUNCTION and name not in LONG_FUNCTIONS}
    assert long == {}, f"over {MAX_FUNCTION} lines without a reason in LONG_FUNCTIONS"


@pytest.mark.parametrize("package", PACKAGES)
def test_functions_take_few_parameters(package: str) -> None:
    counts = {
        name: len(node.args.posonlyargs + node.args.args + node.args.kwonlyargs)
        for path in files(package)
        for name, node in functions(path)
    }
    many = {n: count for n, count in counts.items() if count > MAX_PARAMETERS and n not in MANY_PARAMETERS}
    assert many == {}, f"over {MAX_PARAMETERS} parameters without a reason in MANY_PARAMETERS"


def test_nobody_asks_a_family_for_its_name() -> None:
    asked = []
    for package in PACKAGES:
        for path in files(package):
            if path.parent.name in ("topologies", "testing"):
                continue
            for node in ast.walk(ast.parse(path.read_text())):
                if not isinstance(node, ast.Compare):
                    continue
                parts = [part for side in (node.left, *node.comparators) for part in ast.walk(side)]
                values = {part.value for part in parts if isinstance(part, ast.Constant)}
                names = {value for value in values if isinstance(value, str)}
                # "dense" alone may also be a form, or a model that was not compressed.
                family = any(isinstance(part, ast.Attribute) and part.attr == "family" for part in parts)
                if names & FAMILIES or (names and family):
                    asked.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert asked == [], "what a family knows is a method of TopologyFamily"


@pytest.mark.parametrize("package", ["tensornet_moe", "tensornet_hf"])
def test_plugins_import_no_private_name_of_the_core(package: str) -> None:
    private = [
        f"{path.relative_to(ROOT)}: {node.module}.{alias.name}"
        for path in files(package)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "tensornet"
        for alias in node.names
        if alias.name.startswith("_") or any(part.startswith("_") for part in node.module.split("."))
    ]
    assert private == []
