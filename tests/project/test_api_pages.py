"""The API pages of the documentation hold every public name, and nothing else."""

from __future__ import annotations

import inspect
import pkgutil
import re
from pathlib import Path

import pytest
from public_surface import PAGES, public_objects

API = Path(__file__).resolve().parents[2] / "docs" / "api"
DIRECTIVE = re.compile(r"^::: (?P<path>[\w.]+)$", re.MULTILINE)


def documented() -> dict[str, str]:
    """Map the dotted path of every directive to its page."""
    return {
        match["path"]: page.name
        for page in sorted(API.glob("*.md"))
        for match in DIRECTIVE.finditer(page.read_text())
    }


def resolved(path: str) -> object:
    """Import what a directive names, as the generator of the pages does: a module before a function."""
    try:
        return pkgutil.resolve_name(path)
    except (ImportError, AttributeError) as error:
        raise AssertionError(f"docs/api documents {path}, which does not exist") from error


def test_every_public_name_stands_on_a_page() -> None:
    shown = {id(resolved(path)) for path in documented()}
    absent = sorted(name for name, found in public_objects() if id(found) not in shown)
    assert absent == [], "add `::: name` to a page below docs/api"


def test_every_name_on_a_page_is_public() -> None:
    public = {id(found) for _, found in public_objects()}
    private = sorted(path for path in documented() if id(resolved(path)) not in public)
    assert private == [], "not in `__all__` of a documented package: export it, or leave it out"


def test_no_directive_names_a_module() -> None:
    """A function hidden by a module of its name would be documented as that module."""
    assert [path for path in documented() if inspect.ismodule(resolved(path))] == []


def test_every_name_stands_on_one_page() -> None:
    paths = [m["path"] for page in API.glob("*.md") for m in DIRECTIVE.finditer(page.read_text())]
    objects = [id(resolved(path)) for path in paths]
    assert sorted(p for p, o in zip(paths, objects, strict=True) if objects.count(o) > 1) == []


@pytest.mark.parametrize("package", sorted(PAGES))
def test_every_package_has_a_page_in_the_overview(package: str) -> None:
    assert (API / PAGES[package]).is_file()
    assert f"]({PAGES[package]})" in (API / "index.md").read_text()
