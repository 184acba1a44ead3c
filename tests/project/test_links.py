"""Links of all pages lead somewhere when the pages are read as plain Markdown, without the site."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(r"^(\s*)(`{3,}|~{3,}).*?^\1\2\s*$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?P<target>[^)\s#]*)(?:#(?P<anchor>[^)\s]*))?\)")
NAMED = re.compile(r"`(?P<name>\w+)` in\s+\[[^\]]*\]\((?P<file>[^)\s#]+\.py)\)")
HEADING = re.compile(r"^#+ +(?P<title>.+?)\s*$", re.MULTILINE)


def pages() -> list[Path]:
    return [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


def prose(path: Path) -> str:
    return re.sub(r"`[^`\n]*`", "", FENCE.sub("", path.read_text()))


def anchors(path: Path) -> set[str]:
    """The anchors of the headings of a page, as forges and the site make them."""
    titles = (match["title"].lower() for match in HEADING.finditer(FENCE.sub("", path.read_text())))
    return {re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", title)) for title in titles}


def broken(page: Path) -> Iterator[str]:
    for match in LINK.finditer(prose(page)):
        target, anchor = match["target"], match["anchor"]
        if "://" in target or target.startswith("mailto:"):
            continue
        file = (page.parent / target).resolve() if target else page
        if not file.exists():
            yield f"{target}: no such file"
        elif anchor and file.suffix == ".md" and anchor not in anchors(file):
            yield f"{target}#{anchor}: no such heading, of {sorted(anchors(file))}"


@pytest.mark.parametrize("page", pages(), ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    assert list(broken(page)) == []


def misnamed(page: Path) -> Iterator[str]:
    """Names that a page says are in a Python file, and that this file or not only this one defines.

    Only modules that tests share could be mistaken for one another, not the tests themselves.
    """
    for match in NAMED.finditer(page.read_text()):
        name, file = match["name"], page.parent / match["file"]
        others = [path for path in file.parent.glob("*.py") if not path.name.startswith("test_")]
        defined = re.compile(rf"^(?:class |def )?{name}\b", re.MULTILINE)
        found = {path.name for path in {file, *others} if defined.search(path.read_text())}
        if found != {file.name}:
            yield f"{name}: the page says {file.name}, it is in {sorted(found)}"


@pytest.mark.parametrize("page", pages(), ids=lambda p: str(p.relative_to(ROOT)))
def test_names_are_where_a_page_says(page: Path) -> None:
    assert list(misnamed(page)) == []


def test_misnamed_tables_are_found(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.py").write_text("TABLE = {}\n" + f"{name} = 1\n")
    page = tmp_path / "page.md"
    page.write_text("`TABLE` in [a](a.py), `a` in\n[b](b.py), `b` in [b](b.py)\n")
    assert [line.split(":")[0] for line in misnamed(page)] == ["TABLE", "a"]


def test_broken_links_are_found(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("# Why is it not faster?\n")
    page = tmp_path / "page.md"
    page.write_text("[a](absent.md) [b](other.md#absent) [c](other.md#why-is-it-not-faster) `[d](x)`\n")
    assert [line.split(":")[0] for line in broken(page)] == ["absent.md", "other.md#absent"]
