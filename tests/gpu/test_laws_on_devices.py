"""Every law of decompositions, networks and chains holds on the device.

On the CPU a few examples show that this file works: its other tests draw many.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from devices import DEVICES
from torch import Tensor

import tensornet as tn
from tensornet.testing import laws, strategies
from tensornet.topologies import Budget, topology_family, topology_names

EXAMPLES = {"cpu": 2, "cuda": 25}


def on_device(device: str, base: type, name: str, **members: Any) -> type:
    """A class of laws whose examples lie on a device."""

    def limited(cls: type) -> laws.Laws:
        found = base._laws.__func__(cls)  # type: ignore[attr-defined]
        return {law: entry._replace(examples=EXAMPLES[device]) for law, entry in found.items()}

    made = type(name, (base,), {**members, "_laws": classmethod(limited), "__module__": __name__})
    for mark in next(parameter for parameter in DEVICES if parameter.values == (device,)).marks:
        made = mark(made) if callable(mark) else made
    return made


def moved(network: tn.TensorNetwork, device: str) -> tn.TensorNetwork:
    return tn.TensorNetwork(network.topology, [core.to(device) for core in network.cores])


class ChainLaws(laws.DecompositionLaws):
    """Chains as `MPO`, whose certificate counts complex matrices too."""

    def decompose(self, matrix: Tensor, budget: Budget) -> laws.Outcome:
        caps = {"max_bond": budget.max_bond, "rel_error": budget.rel_error, "param_ratio": budget.param_ratio}
        return laws.Outcome.of(tn.MPO.from_matrix(matrix, **caps))


for _device in ("cpu", "cuda"):
    _matrices = strategies.matrices(max_size=8).map(lambda matrix, device=_device: matrix.to(device))
    for _family in topology_names():
        _name = f"TestFamily_{_family}_{_device}"
        globals()[_name] = on_device(
            _device, laws.FamilyLaws, _name, family=topology_family(_family), matrices=_matrices
        )
    _name = f"TestChains_{_device}"
    globals()[_name] = on_device(_device, ChainLaws, _name, matrices=_matrices)
    _name = f"TestNetworks_{_device}"
    _networks = strategies.networks().map(lambda network, device=_device: moved(network, device))
    globals()[_name] = on_device(_device, laws.NetworkLaws, _name, networks=_networks)


def chain(device: str) -> tn.MPO:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(24, 24, generator=generator, dtype=torch.float64).to(device)
    return tn.MPO.from_matrix(matrix, out_dims=(2, 3, 4), in_dims=(4, 3, 2))


@pytest.mark.parametrize("site", [0, 1, 2])
def test_canonical_form(device: str, site: int) -> None:
    laws.check_canonical(chain(device), site)


@pytest.mark.parametrize("bond", [0, 1])
def test_gauge(device: str, bond: int) -> None:
    laws.check_gauge(chain(device), bond)


@pytest.mark.parametrize("method", ["exact", "gram", "randomized"])
def test_decompositions_repeat_to_the_bit_and_agree_with_the_cpu(device: str, method: str) -> None:
    generator = torch.Generator().manual_seed(0)
    columns = torch.logspace(0, -3, 40)
    matrix = torch.randn(60, 40, generator=generator) * columns
    first, second = (tn.truncated_svd(matrix.to(device), max_rank=8, method=method) for _ in range(2))
    for part in ("U", "S", "Vh"):
        assert torch.equal(getattr(first, part), getattr(second, part)), part
    there = tn.truncated_svd(matrix, max_rank=8, method="exact")
    assert first.S.device.type == device
    torch.testing.assert_close(first.S.cpu(), there.S, rtol=1e-3, atol=1e-4)
    # Signs are fixed, so the leading vectors are those of any machine.
    torch.testing.assert_close(first.U[:, :2].cpu(), there.U[:, :2], rtol=1e-2, atol=1e-2)
