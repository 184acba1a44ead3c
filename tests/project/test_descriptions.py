"""Names in llms.txt and README.md exist, and so do the files that they link."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import tensornet
import tensornet_hf
import tensornet_moe

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
