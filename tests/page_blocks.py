"""Python blocks of Markdown pages, and the printed output that pages show below them.

The blocks of one file run in order in one namespace. A block that cannot run is preceded by a line
``<!-- no-run: why -->``.

A fence ``output`` right below a Python block shows what it prints, and is compared line by line. Words and
whole numbers must be equal; numbers with a decimal point may differ by 5 %, or by one in their last digit:
machines round differently. A line above the fence says where that is not enough, and why:
``<!-- output within 20 %: why -->`` for decimals, ``<!-- output varies: why -->`` where only the number of
lines and their first words are the same on every machine.
"""

from __future__ import annotations

import io
import re
import sys
import textwrap
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

FENCE = re.compile(r"^(?P<indent>\s*)(?P<fence>`{3,}|~{3,})(?P<language>[\w-]*)")
NO_RUN = re.compile(r"^\s*<!-- no-run:(?P<reason>.*)-->\s*$")
RULE = re.compile(r"^\s*<!-- output (?:(?P<varies>varies)|within (?P<share>\d+) ?%):(?P<reason>.*)-->\s*$")
NUMBER = re.compile(r"(?<![\w.])[-+]?\d[\d,]*(?P<decimals>\.\d+)?(?:e[-+]?\d+)?(?![\w.]*\w)")
#: How far decimals may differ where a page says nothing.
SHARE = 0.05


@dataclass(frozen=True)
class Output:
    """Printed output as a page shows it: its text, the line of its first line, and how it is compared.

    `share` is how far decimals may differ; None compares first words alone.
    """

    text: str
    line: int
    share: float | None = SHARE


@dataclass
class Block:
    """A Python block: its code, the line of the file its first line stands on, and its output."""

    code: str
    line: int
    output: Output | None = None
    #: Line after the closing fence.
    end: int = 0


def python_blocks(path: Path) -> list[Block]:
    """The Python blocks of a Markdown file that are to run, in order."""
    blocks: list[Block] = []
    last: Block | None = None  # the block that an output would belong to
    rule: float | None = SHARE
    skip = False
    lines = iter(enumerate(path.read_text().splitlines(), start=1))
    for number, line in lines:
        where = f"{path.name}:{number}"
        if marker := NO_RUN.match(line) or RULE.match(line):
            assert marker["reason"].strip(), f"{where}: say why"
            skip = marker.re is NO_RUN
            rule = _share(marker) if marker.re is RULE else SHARE
        elif opening := FENCE.match(line):
            code = _until_closed(lines, opening["fence"], where)
            if opening["language"] == "output":
                assert last is not None, f"{where}: no Python block that runs stands right above this output"
                last.output = Output(textwrap.dedent("\n".join(code)), number + 1, rule)
                last.end = number + len(code) + 2
            last = None
            if opening["language"] in ("python", "py") and not skip:
                last = Block(textwrap.dedent("\n".join(code)), number + 1, end=number + len(code) + 2)
                blocks.append(last)
            skip, rule = False, SHARE
        elif line.strip():
            skip, rule, last = False, SHARE, None  # a marker speaks for what stands right below it
    return blocks


def _share(marker: re.Match[str]) -> float | None:
    return None if marker["varies"] else int(marker["share"]) / 100


def _until_closed(lines: Iterator[tuple[int, str]], fence: str, where: str) -> list[str]:
    code: list[str] = []
    for _, line in lines:
        if line.strip().startswith(fence) and set(line.strip()) == {fence[0]}:
            return code
        code.append(line)
    raise AssertionError(f"{where}: this code block is never closed")


def run_blocks(path: Path, blocks: list[Block]) -> list[str]:
    """Run the blocks as one module, and return what each prints. Tracebacks show the line of the file."""
    # A real module, so that dataclasses, pickle and inspect find the names the blocks define.
    module = ModuleType("documentation")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module
    printed = []
    try:
        for block in blocks:
            padded = "\n" * (block.line - 1) + block.code
            with redirect_stdout(io.StringIO()) as out:
                exec(compile(padded, str(path), "exec", dont_inherit=True), module.__dict__)
            printed.append("\n".join(line.rstrip() for line in out.getvalue().strip("\n").splitlines()))
    finally:
        del sys.modules[module.__name__]
    return printed


def check_output(path: Path, output: Output, printed: str) -> None:
    """Compare the output that a page shows with what its block prints now."""
    shown, found = output.text.splitlines(), printed.splitlines()
    where = f"{path.name}:{output.line}: make docs-pictures writes the output anew.\nShown:\n{output.text}"
    assert len(shown) == len(found), f"{where}\nPrinted:\n{printed}"
    for one, other in zip(shown, found, strict=True):
        assert _agree(one, other, output.share), f"{where}\nPrinted:\n{printed}\nFirst difference: {other!r}"


def _agree(shown: str, printed: str, share: float | None) -> bool:
    if share is None:
        return shown.split()[:1] == printed.split()[:1]
    words = [NUMBER.sub("#", " ".join(line.split())) for line in (shown, printed)]
    numbers = [list(NUMBER.finditer(line)) for line in (shown, printed)]
    return words[0] == words[1] and all(_close(*pair, share) for pair in zip(*numbers, strict=True))


def _close(shown: re.Match[str], printed: re.Match[str], share: float) -> bool:
    if shown["decimals"] is None or printed["decimals"] is None:
        return shown[0] == printed[0]
    one, other = (float(number[0].replace(",", "")) for number in (shown, printed))
    last = 10.0 ** (1 - len(shown["decimals"])) if "e" not in shown[0] else 0.0
    return abs(one - other) <= max(share * abs(one), 1.001 * last)


def with_outputs(path: Path, blocks: list[Block], printed: list[str]) -> str:
    """Return the text of a page whose outputs are those of now; a block that prints gets one."""
    lines = path.read_text().splitlines()
    for block, text in reversed(list(zip(blocks, printed, strict=True))):
        if block.output is not None:
            first = block.output.line - 1
            lines[first : block.end - 2] = text.splitlines()
        elif text:
            lines[block.end - 1 : block.end - 1] = ["", "```output", *text.splitlines(), "```"]
    return "\n".join(lines) + "\n"
