"""Every Python block of README.md and docs/ runs.

The blocks of one file run in order in one namespace, in an empty working directory, offline, with
warnings as errors. A block that cannot run is preceded by a line ``<!-- no-run: why -->``.

Pictures below ``docs/pictures`` are made by the blocks of the page that shows them: a block writes `name.svg`
into the working directory. ``make docs-pictures`` copies them.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

import tensornet as tn
from tensornet import optional

ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(r"^(?P<indent>\s*)(?P<fence>`{3,}|~{3,})(?P<language>[\w-]*)")
PICTURE = re.compile(r"!\[[^\]]*\]\((?:\.\./)?pictures/(?P<name>[\w.-]+)\)")
PICTURES = ROOT / "docs" / "pictures"
LARGEST_PICTURE = 100_000
NO_RUN = re.compile(r"^\s*<!-- no-run:(?P<reason>.*)-->\s*$")


@dataclass(frozen=True)
class Block:
    """A Python block: its code, and the line of the file its first line stands on."""

    code: str
    line: int


def python_blocks(path: Path) -> list[Block]:
    """The Python blocks of a Markdown file that are to run, in order."""
    blocks: list[Block] = []
    skip = False
    lines = iter(enumerate(path.read_text().splitlines(), start=1))
    for number, line in lines:
        if marker := NO_RUN.match(line):
            assert marker["reason"].strip(), f"{path.name}:{number}: say why the block is not run"
            skip = True
        elif opening := FENCE.match(line):
            code = _until_closed(lines, opening["fence"], f"{path.name}:{number}")
            if opening["language"] in ("python", "py") and not skip:
                blocks.append(Block(textwrap.dedent("\n".join(code)), number + 1))
            skip = False
        elif line.strip():
            skip = False  # the marker speaks for the block right below it only
    return blocks


def _until_closed(lines: Iterator[tuple[int, str]], fence: str, where: str) -> list[str]:
    code: list[str] = []
    for _, line in lines:
        if line.strip().startswith(fence) and set(line.strip()) == {fence[0]}:
            return code
        code.append(line)
    raise AssertionError(f"{where}: this code block is never closed")


def run_blocks(path: Path, blocks: list[Block]) -> None:
    """Run the blocks as one module. Tracebacks show the line of the Markdown file."""
    # A real module, so that dataclasses, pickle and inspect find the names the blocks define.
    module = ModuleType("documentation")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module
    try:
        for block in blocks:
            padded = "\n" * (block.line - 1) + block.code
            exec(compile(padded, str(path), "exec", dont_inherit=True), module.__dict__)
    finally:
        del sys.modules[module.__name__]


def documents() -> list[Path]:
    """The files with blocks to run, of those that exist."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [page for page in pages if page.is_file() and python_blocks(page)]


def shown_pictures(path: Path) -> list[str]:
    """List the pictures of a page that its own code makes."""
    return [match["name"] for match in PICTURE.finditer(path.read_text())]


@pytest.mark.docs
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT's use of it
@pytest.mark.parametrize("path", [pytest.param(p, id=str(p.relative_to(ROOT))) for p in documents()])
def test_blocks_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_blocks(path, python_blocks(path))
    absent = [name for name in shown_pictures(path) if not (tmp_path / name).is_file()]
    assert absent == [], "pictures that the page shows and its code does not write"


def test_pictures_are_committed_small_and_shown() -> None:
    shown = [name for page in (ROOT / "docs").rglob("*.md") for name in shown_pictures(page)]
    sizes = {path.name: path.stat().st_size for path in PICTURES.iterdir()}
    assert sorted(shown) == sorted(sizes), "shown once, and made by `make docs-pictures`"
    assert {name: size for name, size in sizes.items() if size > LARGEST_PICTURE} == {}


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "notebooks").glob("*.md")), ids=lambda p: p.stem)
def test_notebook_without_matplotlib_says_what_to_install(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optional, "find_spec", lambda name: None)
    with pytest.raises(
        tn.MissingDependencyError, match=r"this notebook needs matplotlib.*tensornet-torch\[viz\]"
    ):
        run_blocks(path, python_blocks(path)[:1])


# --- the collector itself ------------------------------------------------------------------------

DOCUMENT = """\
# A page

```python
value = 1
```

```console
$ rm -rf everything
```

- in a list
  ```py
  assert value == 1
  ```

<!-- no-run: needs a network -->
```python
raise RuntimeError("must not run")
```

```python
first = 2
assert value == first, "they differ"
```
"""


@pytest.fixture
def page(tmp_path: Path) -> Path:
    path = tmp_path / "page.md"
    path.write_text(DOCUMENT)
    return path


def test_collects_python_only_and_skips_what_is_marked(page: Path) -> None:
    blocks = python_blocks(page)
    assert [(block.line, block.code.splitlines()[0]) for block in blocks] == [
        (4, "value = 1"),
        (13, "assert value == 1"),
        (22, "first = 2"),
    ]


def test_failing_block_is_reported_with_file_and_line(page: Path) -> None:
    with pytest.raises(AssertionError, match="they differ") as caught:
        run_blocks(page, python_blocks(page))
    last = caught.traceback[-1]
    assert (str(last.path), last.lineno + 1) == (str(page), 23)
    assert "documentation" not in sys.modules


def test_syntax_error_is_reported_with_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "broken.md"
    path.write_text("text\n```python\nx = 1\nx +\n```\n")
    with pytest.raises(SyntaxError) as caught:
        run_blocks(path, python_blocks(path))
    assert (caught.value.filename, caught.value.lineno) == (str(path), 4)


def test_marker_speaks_for_the_next_block_only(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text("<!-- no-run: why -->\n\nA paragraph between.\n\n```python\nrun = True\n```\n")
    assert [block.code for block in python_blocks(path)] == ["run = True"]


def test_marker_without_a_reason_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text("<!-- no-run: -->\n```python\n```\n")
    with pytest.raises(AssertionError, match=r"page\.md:1: say why"):
        python_blocks(path)


def test_block_never_closed_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text("text\n\n```python\nx = 1\n")
    with pytest.raises(AssertionError, match=r"page\.md:3: this code block is never closed"):
        python_blocks(path)


# --- pictures ------------------------------------------------------------------------------------


def update_pictures(pages: list[Path]) -> None:
    """Run pages and keep the pictures that they show."""
    import matplotlib as mpl  # only here: the tests above must not need it

    mpl.rcParams["svg.hashsalt"] = "docs"  # the same picture gives the same bytes
    os.environ["SOURCE_DATE_EPOCH"] = "0"
    PICTURES.mkdir(exist_ok=True)
    for page in pages:
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            run_blocks(page, python_blocks(page))
            os.chdir(ROOT)
            for name in shown_pictures(page):
                shutil.copyfile(Path(folder, name), PICTURES / name)


if __name__ == "__main__":
    wanted = [Path(name).resolve() for name in sys.argv[1:]]
    update_pictures(wanted or [page for page in documents() if shown_pictures(page)])
