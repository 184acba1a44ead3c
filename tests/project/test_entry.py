"""The console script and the hint it gives, and the ground rules of conftest."""

from __future__ import annotations

import os
import random
import socket
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import settings

from tensornet import _entry
from tensornet._util import missing_hint, require
from tensornet.errors import MissingDependencyError


def test_nothing_missing_gives_no_hint() -> None:
    assert missing_hint(["torch"], extra="hf", user="this") is None
    require(["torch"], extra="hf", user="this")


def test_hint_names_what_is_missing_and_the_command() -> None:
    hint = missing_hint(["torch", "absent_one", "absent_two"], extra="hf", user="tensornet_hf")
    assert hint is not None
    assert hint.startswith("tensornet_hf needs absent_one, absent_two,")
    assert hint.endswith("pip install 'tensornet-torch[hf]'")


def test_require_raises_an_import_error() -> None:
    with pytest.raises(MissingDependencyError, match=r"pip install 'tensornet-torch\[viz\]'") as caught:
        require(["absent"], extra="viz", user="the report")
    assert isinstance(caught.value, ImportError)


def test_command_without_its_extra_is_one_line_and_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_entry, "CLI_MODULES", ("absent",))
    with pytest.raises(SystemExit, match=r"^tensornet: .*pip install 'tensornet-torch\[cli\]'$") as caught:
        _entry.main()
    assert isinstance(caught.value.code, str)  # printed on stderr, status 1


def test_command_starts_the_app(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[bool] = []
    cli = ModuleType("tensornet_hf.cli")
    cli.app = lambda: started.append(True)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensornet_hf.cli", cli)
    _entry.main()
    assert started == [True]


def test_network_is_blocked() -> None:
    with pytest.raises(RuntimeError, match="tests are offline"), socket.socket() as outside:
        outside.connect(("192.0.2.1", 80))  # reserved for documentation, never routed
    with pytest.raises(RuntimeError, match="tests are offline"):
        socket.create_connection(("example.org", 80), timeout=1)


def test_loopback_works() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname(), timeout=5).close()


@pytest.mark.skipif("TENSORNET_TEST_SEED" in os.environ, reason="another seed was asked for")
@pytest.mark.parametrize("_repeat", [1, 2])
def test_every_test_starts_from_the_same_seed(_repeat: int) -> None:
    drawn = (random.random(), float(np.random.rand()), float(torch.rand(())))
    assert drawn == pytest.approx((0.8444218515250481, 0.5488135039273248, 0.49625658988952637))


def test_profile_is_the_one_asked_for() -> None:
    name = os.environ.get("HYPOTHESIS_PROFILE", "default")
    assert settings.default.max_examples == {"default": 50, "ci": 15, "nightly": 1000}[name]
    assert settings.default.derandomize is (name == "ci")
    assert torch.get_num_threads() == int(os.environ.get("OMP_NUM_THREADS", "1"))
