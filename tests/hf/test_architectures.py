"""Any model is right or refused: a table of architectures, each on the same way through the library."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import pytest
from architecture_steps import Trial, attempt, reached, steps_of
from hf_architectures import EXCEPTIONS, PAGE_ARCHITECTURES, RELATIVES

from tensornet.errors import TensorNetError

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import architectures as document  # noqa: E402

pytestmark = pytest.mark.slow

NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"
NAMES = [name for name in PAGE_ARCHITECTURES if NIGHTLY or name not in RELATIVES]
RECORD = json.loads(document.RECORD.read_text())
SHARES = ("all", "matrices", "usual")


@pytest.mark.parametrize("name", NAMES)
def test_every_step_is_right_or_its_exception_is_listed(name: str) -> None:
    trial = Trial(PAGE_ARCHITECTURES[name])
    try:
        for step in steps_of(trial.architecture):
            error, exception = attempt(trial, step), EXCEPTIONS.get(name, {}).get(step)
            if exception is None:
                if error is not None:
                    raise error
                continue
            if error is None and not exception.always:
                continue
            assert error is not None, f"{step} works now: take it out of EXCEPTIONS"
            assert re.search(exception.message, str(error)), f"{step}: {error!r}"
            assert isinstance(error, TensorNetError) == (exception.outcome == "refused"), repr(error)
        # Versions of transformers differ by a few vectors of parameters.
        found = {
            key: pytest.approx(x, abs=0.005) if key in SHARES and x else x for key, x in RECORD[name].items()
        }
        assert reached(trial) == found, "run python benchmarks/architectures.py --record"
    finally:
        trial.close()


def test_tables_name_architectures() -> None:
    assert len(PAGE_ARCHITECTURES) >= 60
    assert RELATIVES | EXCEPTIONS.keys() <= PAGE_ARCHITECTURES.keys() == RECORD.keys()
    for name, steps in EXCEPTIONS.items():
        assert steps.keys() <= set(steps_of(PAGE_ARCHITECTURES[name]))


def test_the_page_is_current() -> None:
    for path, text in ((document.PAGE, document.page(RECORD)), (document.TABLES, document.tables(RECORD))):
        assert path.read_text() == text, "run python benchmarks/architectures.py"
