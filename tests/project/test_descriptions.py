"""Names, linked files and commands on pages exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

import tensornet
import tensornet_hf
import tensornet_moe
from tensornet_hf.cli import main

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {"tn": tensornet, "tm": tensornet_moe, "th": tensornet_hf}


@pytest.mark.parametrize("page", ["llms.txt", "README.md", "AGENTS.md", "CONTRIBUTING.md"])
def test_names_and_links_exist(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for package, path in re.findall(r"\b(tn|tm|th)((?:\.[A-Za-z_]\w*)+)", text):
        found = PACKAGES[package]
        for name in path[1:].split("."):
            assert hasattr(found, name), f"{package}{path} in {page}"
            found = getattr(found, name)
    links = [x for x in re.findall(r"\]\(([^)#]+)", text) if "://" not in x]
    assert links
    assert [x for x in links if not (ROOT / x).exists()] == []


COMMAND = re.compile(r"^(?:\$ | {4})tensornet (.*(?:\\\n.*)*)", re.MULTILINE)


def test_commands_on_pages_can_be_parsed() -> None:
    program: Any = typer.main.get_command(main._program())
    pages = [ROOT / "README.md", ROOT / "llms.txt", *sorted((ROOT / "docs").rglob("*.md"))]
    shown = [(page.name, found) for page in pages for found in COMMAND.findall(page.read_text())]
    assert len(shown) > 20
    for page, line in shown:
        name, *arguments = shlex.split(line.replace("\\\n", " "), comments=True)
        command = program.commands[name]
        try:
            _, rest, _ = command.make_parser(command.context_class(command)).parse_args(arguments)
        except Exception as error:
            raise AssertionError(f"{page}: tensornet {line}: {error}") from error
        assert rest == [], f"{page}: tensornet {line}: {rest} is too much"
