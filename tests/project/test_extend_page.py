"""The contract tests of docs/guides/extend.md pass, collected by pytest as a reader would have it."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from page_blocks import python_blocks

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "guides" / "extend.md"


@pytest.mark.slow
def test_contract_tests_pass(tmp_path: Path) -> None:
    code = "\n\n".join(block.code for block in python_blocks(GUIDE))
    (tmp_path / "test_page.py").write_text(code)
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "test_page.py"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-4_000:]
    classes = re.findall(r"^class (Test\w+)", code, re.MULTILINE)
    assert len(classes) == 8
    passed = Counter(re.findall(r"::(Test\w+)::\S+ PASSED", run.stdout))
    assert passed.keys() == set(classes)
    assert min(passed.values()) >= 3
    assert passed.total() > 8 * 5
