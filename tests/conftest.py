"""What holds for every test: offline, one thread, seeded, and a hypothesis profile by name."""

from __future__ import annotations

import ipaddress
import os
import random
import socket
from collections.abc import Callable, Iterator

os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when huggingface_hub is imported
os.environ.setdefault("MPLBACKEND", "Agg")

import numpy as np
import pytest
import torch
from hypothesis import settings

from tensornet.testing.strategies import register_profiles

# Two test workers on two cores: more threads each would only wait for one another.
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))

# TENSORNET_TEST_SEED=1, 2, ... moves every seed that tests and code set, since a law holds for any of them.
SEED = int(os.environ.get("TENSORNET_TEST_SEED", "0"))


class _MovedGenerator(torch.Generator):
    def manual_seed(self, seed: int) -> torch.Generator:
        return super().manual_seed(seed + SEED)


if SEED:
    _manual_seed = torch.manual_seed
    torch.manual_seed = lambda seed: _manual_seed(seed + SEED)
    torch.Generator = _MovedGenerator  # type: ignore[misc]

register_profiles()
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


class NetworkBlockedError(RuntimeError):
    """A test tried to leave this machine. Not an OSError, so that no retry loop swallows it."""


def _is_local(address: object) -> bool:
    """True for a path of a unix socket and for a loopback host."""
    if not isinstance(address, tuple):
        return True
    host = str(address[0])
    if host in ("localhost", ""):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _guard(original: Callable[..., object]) -> Callable[..., object]:
    def connect(self: socket.socket, address: object) -> object:
        if not _is_local(address):
            raise NetworkBlockedError(f"tests are offline: connection to {address!r} refused")
        return original(self, address)

    return connect


def _guarded_getaddrinfo(original: Callable[..., object]) -> Callable[..., object]:
    def getaddrinfo(host: object, *args: object, **kwargs: object) -> object:
        name = host.decode() if isinstance(host, bytes) else host
        if name is not None and not _is_local((name,)):
            raise NetworkBlockedError(f"tests are offline: look-up of {name!r} refused")
        return original(host, *args, **kwargs)

    return getaddrinfo


@pytest.fixture(scope="session", autouse=True)
def _no_network() -> Iterator[None]:
    """Refuse every connection and name look-up that would leave this machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", _guard(socket.socket.connect))
        patch.setattr(socket.socket, "connect_ex", _guard(socket.socket.connect_ex))
        patch.setattr(socket, "getaddrinfo", _guarded_getaddrinfo(socket.getaddrinfo))
        yield


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Every test starts from the same random state and without compiled code, alone or in any order."""
    torch.compiler.reset()  # what earlier tests compiled counts against the limit of recompilations
    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _same_threads() -> Iterator[None]:
    """No test leaves another number of threads to those that follow."""
    before = torch.get_num_threads()
    yield
    after = torch.get_num_threads()
    torch.set_num_threads(before)
    assert after == before, f"The test left torch.set_num_threads({after}) behind; it began with {before}."
