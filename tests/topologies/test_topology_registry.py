"""Families of other packages: registered by hand, or found by the entry points of what is installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tensornet as tn
from tensornet.errors import TopologyError
from tensornet.topologies import registered, topology_family, topology_names
from tensornet.topologies.low_rank import LowRankFamily
from tensornet.topologies.registry import register_topology


def test_registering_a_name_twice_is_refused() -> None:
    family = topology_family("mpo")
    assert register_topology(family) is family  # the same object may be registered again
    with pytest.raises(TopologyError, match="replace=True"):
        register_topology(type(family)())
    register_topology(family, replace=True)


def test_a_block_registers_a_family_and_puts_back_the_one_of_this_name() -> None:
    class New(LowRankFamily):
        name = "new"

    before, names = topology_family("low_rank"), topology_names()
    with registered(LowRankFamily()) as mine, registered(New()) as new:
        assert topology_family("low_rank") is mine is not before
        assert topology_family("new") is new
    assert topology_family("low_rank") is before
    assert topology_names() == names


def test_registering_something_else_is_refused() -> None:
    class Nameless(LowRankFamily):
        name = None  # type: ignore[assignment]

    with pytest.raises(TopologyError, match="LowRankFamily"):
        register_topology(LowRankFamily, replace=True)  # type: ignore[arg-type]
    with pytest.raises(TopologyError, match="got 'mpo'"):
        register_topology("mpo")  # type: ignore[arg-type]
    with pytest.raises(TopologyError, match="Nameless"):
        register_topology(Nameless())


PLUGIN = """
from tensornet.topologies.low_rank import LowRankFamily

class Fancy(LowRankFamily):
    name = "fancy"

family = Fancy()
"""


def install(folder: Path, package: str, code: str, target: str) -> None:
    """What pip would leave behind: a module and a dist-info with an entry point."""
    (folder / f"{package}.py").write_text(code)
    info = folder / f"{package}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[tensornet.topologies]\n{target}\n")


def run(folder: Path, code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(folder)!r})\n{code}"],
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout + done.stderr


@pytest.mark.slow
def test_installed_package_adds_a_topology(tmp_path: Path) -> None:
    install(tmp_path, "fancy_networks", PLUGIN, "fancy = fancy_networks:family")
    said = run(
        tmp_path,
        "import tensornet as tn\n"
        "assert 'fancy_networks' not in sys.modules, 'loaded before it was asked for'\n"
        "print(tn.topologies.topology_family('fancy').build(4, 3).shape)\n"
        "print(tn.topologies.topology_names())",
    )
    assert "(4, 3)" in said
    assert "'fancy'" in said
    assert "Warning" not in said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "trouble"),
    [
        ("raise ImportError('no such compiler')", "ImportError: no such compiler"),
        ("family = 3", "got 3"),
        ("raise SystemExit('wrong machine')", "SystemExit: wrong machine"),
        (PLUGIN.replace("fancy", "mpo"), "'mpo' is already registered"),
    ],
    ids=["import", "type", "exit", "taken"],
)
def test_broken_package_is_named_and_does_no_harm(tmp_path: Path, code: str, trouble: str) -> None:
    install(tmp_path, "broken_networks", code, "broken = broken_networks:family")
    said = run(
        tmp_path,
        "import tensornet as tn\nprint(tn.topologies.topology_names())\n"
        "print(type(tn.topologies.topology_family('mpo')))",
    )
    assert "RuntimeWarning: The topology 'broken' could not be loaded from 'broken_networks:family'" in said
    assert trouble in said
    assert "MPOFamily" in said


def test_a_family_stands_for_its_name() -> None:
    import tensornet_moe as tm

    family = tn.topologies.topology_family("low_rank")
    assert tn.CompressionConfig(topology=family, topology_options={"max_bond": 2}).topology == "low_rank"
    layer, weight = torch.nn.Linear(6, 4), torch.randn(4, 6)
    made = tn.nn.TensorNetworkLinear.from_linear(layer, topology=family, max_bond=2)
    assert made.topology.family == "low_rank"
    bank = tm.SharedCoreExperts.from_dense(weight, num_experts=2, topology=family, share="none", max_bond=2)
    assert bank.topology.family == "low_rank"
    stranger = type(family)()
    for use in (
        lambda: tn.CompressionConfig(topology=stranger),
        lambda: tn.nn.TensorNetworkLinear.from_linear(layer, topology=stranger),
    ):
        with pytest.raises(TopologyError, match="register_topology"):
            use()
