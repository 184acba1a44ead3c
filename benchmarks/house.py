"""Measure the size of the code base, and how many files and calls four common journeys enter.

    python benchmarks/house.py [--json] [--lines]

Question: how many lines are code, prose and examples, how many files does a reader enter, and how deep do
calls go, from `tn.compress`, from the forward pass of a layer, from `th.load` and from `th.upcycle`? Counted
in this process on a small random GPT-2, the second time each journey is made (imports and caches of plans are
behind it). The package that is measured is the one that Python imports, so that an older checkout is measured
by putting it on PYTHONPATH. With `--lines` the kinds of lines are printed for each package and each module.
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
import tempfile
import tokenize
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import tensornet as tn
import tensornet_hf as th
import tensornet_moe as tm

ROOMS = [Path(str(module.__file__)).parent for module in (tn, tm, th)]
KINDS = ("code", "docstrings", "examples", "comments", "blank")
FAMILIES = {"mpo", "low_rank", "tucker", "tensor_ring", "kronecker", "block_tt", "residual"}


def modules() -> list[Path]:
    """List the files of the three packages."""
    return [path for room in ROOMS for path in sorted(room.rglob("*.py"))]


def line_kinds(path: Path) -> Counter[str]:
    """Count the lines of a file by what they hold; examples are the runnable parts of docstrings."""
    text = path.read_text()
    kinds = dict.fromkeys(range(1, len(text.splitlines()) + 1), "blank")
    with path.open("rb") as file:
        for token in tokenize.tokenize(file.readline):
            if token.type == tokenize.COMMENT and not token.line[: token.start[1]].strip():
                kinds.update({token.start[0]: "comments"})
            elif token.string.strip() and token.type not in (tokenize.COMMENT, tokenize.ENCODING):
                kinds.update(dict.fromkeys(range(token.start[0], token.end[0] + 1), "code"))
    for node in ast.walk(ast.parse(text)):
        documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        if isinstance(node, documented) and ast.get_docstring(node) is not None:
            doc = node.body[0]
            kinds.update(docstring_kinds(text.splitlines(), doc.lineno, doc.end_lineno or doc.lineno))
    return Counter(kinds.values())


def docstring_kinds(lines: list[str], first: int, last: int) -> dict[int, str]:
    """Tell prose from examples: an example starts at `>>>` and ends at the next empty line."""
    kinds, example = {}, False
    for number in range(first, last + 1):
        line = lines[number - 1].strip()
        example = line.startswith(">>>") or (example and line not in ("", '"""'))
        kinds[number] = "examples" if example else "docstrings" if line else "blank"
    return kinds


def sizes() -> dict[str, Any]:
    """Count modules, lines, long functions, repeated names and comparisons with names of families."""
    files = modules()
    lines = {path: len(path.read_text().splitlines()) for path in files}
    kinds = sum(map(line_kinds, files), Counter())
    long, named = 0, 0
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                doc = ast.get_docstring(node, clean=False)
                own = (node.end_lineno or 0) - node.lineno + 1 - (len(doc.splitlines()) + 1 if doc else 0)
                long += own > 60
            if isinstance(node, ast.Compare) and path.parent.name not in ("topologies", "testing"):
                sides = [part for side in (node.left, *node.comparators) for part in ast.walk(side)]
                values = {part.value for part in sides if isinstance(part, ast.Constant)}
                named += any(isinstance(value, str) and value in FAMILIES for value in values)
    names = Counter(path.name for path in files if path.name != "__init__.py")
    return {
        "lines": sum(lines.values()),
        **{f"lines, {kind}": kinds[kind] for kind in KINDS},
        "modules": len(files),
        "modules under 50 lines": sum(count < 50 for count in lines.values()),
        "functions over 60 lines": long,
        "file names that occur twice": sum(count > 1 for count in names.values()),
        "comparisons with the name of a family": named,
    }


def journey(travel: Callable[[], Any]) -> dict[str, int]:
    """Count the files entered and the deepest nesting of calls inside the packages."""
    entered: set[str] = set()
    depth = deepest = 0
    rooms = tuple(map(str, ROOMS))

    def watch(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal depth, deepest
        if event not in ("call", "return") or not frame.f_code.co_filename.startswith(rooms):
            return
        if event == "call":
            entered.add(frame.f_code.co_filename)
            depth += 1
            deepest = max(deepest, depth)
        else:
            depth -= 1

    travel()
    sys.setprofile(watch)
    try:
        travel()
    finally:
        sys.setprofile(None)
    return {"files": len(entered), "depth": deepest}


def model() -> GPT2LMHeadModel:
    """Build a random GPT-2 of two layers."""
    torch.manual_seed(0)
    tokens = {"vocab_size": 101, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=24, n_head=4, n_positions=64, **tokens)).eval()


def journeys(folder: Path) -> dict[str, dict[str, int]]:
    """Run the four journeys."""
    batches = [torch.randint(0, 101, (2, 16), generator=torch.Generator().manual_seed(k)) for k in range(2)]

    def compress() -> Any:
        made = model()
        tn.compress(made, tn.CompressionConfig(param_ratio=0.6), calibration=batches, progress=False)
        return made

    th.save_model(compress(), folder / "small")
    layer = tn.nn.MPOLinear.from_linear(torch.nn.Linear(64, 64), max_bond=8).eval()
    x = torch.randn(3, 64)
    return {
        "compress": journey(compress),
        "layer forward": journey(lambda: layer(x)),
        "load": journey(lambda: th.load(folder / "small")),
        "upcycle": journey(lambda: th.upcycle(model(), th.MoEConfig(num_experts=2))),
    }


def table() -> str:
    """Tabulate the kinds of lines of each package and module, the most code first."""
    rows: dict[Path, Counter[str]] = {}
    for room in ROOMS:
        for path in sorted(room.rglob("*.py")):
            place = path.relative_to(room.parent)
            for name in (place, *place.parents[:-1]):
                rows.setdefault(name, Counter()).update(line_kinds(path))
    order = sorted(rows, key=lambda name: (name.suffix == ".py", -rows[name]["code"], str(name)))
    cells = {name: "".join(f"{rows[name][kind]:>12,}" for kind in KINDS) for name in order}
    head = "".join(f"{kind:>12}" for kind in KINDS)
    return "\n".join((f"{'':58}{head}", *(f"{name!s:58}{cells[name]}" for name in order)))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    parser.add_argument("--lines", action="store_true", help="print the kinds of lines of each module alone")
    options = parser.parse_args()
    if options.lines:
        print(table())
        return
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        found = {"sizes": sizes(), "journeys": journeys(Path(folder))}
    if options.json:
        print(json.dumps(found, indent=1))
        return
    for name, count in found["sizes"].items():
        print(f"{name:40} {count:>7,}")
    for name, counts in found["journeys"].items():
        print(f"{name:40} {counts['files']:>4} files, {counts['depth']:>3} calls deep")


if __name__ == "__main__":
    main()
