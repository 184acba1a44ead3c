"""Every Python block of README.md and docs/ runs, and prints what the page shows.

The blocks of one file run in order in one namespace, in an empty working directory, offline, with
warnings as errors; page_blocks.py says how blocks are left out and how printed output is compared.

Pictures below ``docs/pictures`` are made by the blocks of the page that shows them: a block writes `name.svg`
into the working directory. ``make docs-pictures`` copies them.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from page_blocks import check_output, python_blocks, run_blocks, with_outputs

from tensornet import _util
from tensornet.errors import MissingDependencyError
from tensornet.quantization import formats
from tensornet.quantization.menus import MENUS
from tensornet_hf.exporters.target import EXPORT_TARGETS

ROOT = Path(__file__).resolve().parents[2]
PICTURE = re.compile(r"!\[[^\]]*\]\((?:\.\./)?pictures/(?P<name>[\w.-]+)\)")
PICTURES = ROOT / "docs" / "pictures"
LARGEST_PICTURE = 100_000


def documents() -> list[Path]:
    """The files with blocks to run, of those that exist."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [page for page in pages if page.is_file() and python_blocks(page)]


def shown_pictures(path: Path) -> list[str]:
    """List the pictures of a page that its own code makes."""
    return [match["name"] for match in PICTURE.finditer(path.read_text())]


@pytest.fixture
def restored() -> Iterator[None]:
    """Restore what a page may change: the hypothesis profile, torch's dtype, and tables of formats."""
    tables: tuple[dict[Any, Any], ...] = (formats.POINTS, formats.FORMATS, MENUS._items, EXPORT_TARGETS)
    before = [dict(table) for table in tables]
    yield
    torch.set_default_dtype(torch.float32)
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))
    for table, entries in zip(tables, before, strict=True):
        table.clear()
        table.update(entries)


@pytest.mark.slow
@pytest.mark.usefixtures("restored")
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT's use of it
@pytest.mark.parametrize("path", [pytest.param(p, id=str(p.relative_to(ROOT))) for p in documents()])
def test_blocks_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = python_blocks(path)
    for block, printed in zip(blocks, run_blocks(path, blocks), strict=True):
        if block.output is not None:
            check_output(path, block.output, printed)
        else:
            assert not printed or path.parent.name != "notebooks", (
                f"{path.name}:{block.line} prints, and the page does not show it: make docs-pictures"
            )
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
    monkeypatch.setattr(_util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="needs matplotlib"):
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
    with pytest.raises(AssertionError, match=r"page\.md:3.*closed"):
        python_blocks(path)


# --- printed output ------------------------------------------------------------------------------

SHOWN = """\
```python
for name, value in (("loss", 0.1234), ("rank", 12.5)):
    print(f"{name:6} {value:.3f} of 1,024 bytes")
```

%s```output
loss   0.120 of 1,024 bytes
rank   12.500 of 1,024 bytes
```
"""


def _check(path: Path, text: str) -> None:
    path.write_text(text)
    blocks = python_blocks(path)
    (printed,) = run_blocks(path, blocks)
    assert blocks[0].output is not None
    check_output(path, blocks[0].output, printed)


def test_output_may_differ_in_decimals_alone(page: Path) -> None:
    _check(page, SHOWN % "")
    for wrong, right in (("0.120", "0.112"), ("1,024 b", "1,025 b"), ("bytes", "bits"), ("12.500", "14.000")):
        code, fence, output = (SHOWN % "").partition("```output")
        with pytest.raises(AssertionError, match=r"page\.md:7: make docs-pictures"):
            _check(page, code + fence + output.replace(wrong, right))
    with pytest.raises(AssertionError, match="Printed:"):
        _check(page, (SHOWN % "").replace("rank   12.500 of 1,024 bytes\n", ""))


def test_a_page_may_say_how_far_output_differs(page: Path) -> None:
    _check(
        page,
        SHOWN.replace("12.500", "14.000") % "<!-- output within 20 %: rounding adds up -->\n",
    )
    with pytest.raises(AssertionError, match="First difference"):
        _check(page, SHOWN.replace("12.500", "16.000") % "<!-- output within 20 %: trained -->\n")
    words = SHOWN.replace("12.500 of", "many") % "<!-- output varies: written by a model -->\n"
    _check(page, words)
    with pytest.raises(AssertionError, match="First difference"):
        _check(page, words.replace("\nrank   many", "\nbond   many"))
    with pytest.raises(AssertionError, match=r"page\.md:6: say why"):
        _check(page, SHOWN % "<!-- output varies: -->\n")


@pytest.mark.parametrize(
    ("shown", "printed", "same"),
    [
        ("0.02", "0.01", True),  # one in the last digit
        ("0.03", "0.01", False),
        ("1.50e-03", "1.55e-03", True),
        ("1.50e-03", "1.60e-03", False),
        ("-1.5", "1.5", False),
        ("int4 3", "int5 3", False),  # a digit in a name is no number
        ("(32, 64)", "(32, 63)", False),
        ("{'a': 0.105}", "{'a': 0.104}", True),
    ],
)
def test_numbers_that_agree(tmp_path: Path, shown: str, printed: str, same: bool) -> None:
    path = tmp_path / "page.md"
    text = f"```python\nprint({printed!r})\n```\n```output\n{shown}\n```\n"
    if same:
        _check(path, text)
    else:
        with pytest.raises(AssertionError, match="First difference"):
            _check(path, text)


def test_output_belongs_to_the_block_right_above(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text("```python\nprint(1)\n```\n\nA paragraph between.\n\n```output\n1\n```\n")
    with pytest.raises(AssertionError, match=r"page\.md:7"):
        python_blocks(path)


def test_outputs_are_written_anew(page: Path) -> None:
    page.write_text("```python\nprint('old')\n```\n\n```python\nx = 1\n```\n\n```py\nprint('é')\n```\ntext\n")
    for content in ("old", "new\ntwo"):
        page.write_text(page.read_text().replace("print('old')", f"print({content!r})"))
        blocks = python_blocks(page)
        page.write_text(with_outputs(page, blocks, run_blocks(page, blocks)))
        assert page.read_text() == (
            f"```python\nprint({content!r})\n```\n\n```output\n{content}\n```\n\n```python\nx = 1\n```\n\n"
            "```py\nprint('é')\n```\n\n```output\né\n```\ntext\n"
        )


# --- pictures and output, made anew --------------------------------------------------------------


def update_pages(pages: list[Path]) -> None:
    """Run pages, keep the pictures that they show, and write what notebooks print into them."""
    import matplotlib as mpl  # only here: the tests above must not need it

    mpl.rcParams["svg.hashsalt"] = "docs"  # the same picture gives the same bytes
    os.environ["SOURCE_DATE_EPOCH"] = "0"
    PICTURES.mkdir(exist_ok=True)
    for page in pages:
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            blocks = python_blocks(page)
            printed = run_blocks(page, blocks)
            os.chdir(ROOT)
            if page.parent.name == "notebooks":
                page.write_text(with_outputs(page, blocks, printed))
            for name in shown_pictures(page):
                shutil.copyfile(Path(folder, name), PICTURES / name)


if __name__ == "__main__":
    wanted = [Path(name).resolve() for name in sys.argv[1:]]
    update_pages(wanted or [page for page in documents() if shown_pictures(page)])
