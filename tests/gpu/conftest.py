"""Devices of this folder: its tests run on the CPU everywhere, and on a GPU where there is one."""

from __future__ import annotations

import pytest
from devices import DEVICES


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """Each device in turn."""
    return str(request.param)
