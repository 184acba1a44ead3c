"""The shipped laws must be able to fail: each is shown a decomposition that breaks it, and only it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

import tensornet as tn
from tensornet.errors import NonFiniteError
from tensornet.network import random_cores
from tensornet.testing import laws, reference, register_profiles, strategies
from tensornet.topologies import Budget, TopologyFamily, topology_family
from tensornet.topologies.mpo import MPOFamily


def honest(matrix: Tensor, budget: Budget) -> laws.Outcome:
    found = tn.truncated_svd(matrix, max_rank=budget.max_bond, rel_error=budget.rel_error, method="exact")
    product = (found.U * found.S.to(found.U.dtype)) @ found.Vh
    return laws.Outcome(product, found.error, bonds=tuple(found.S.shape), tensors=(found.U, found.Vh))


MATRIX = strategies.matrix_with_spectrum((12, 10), "power", seed=0)


def test_undefined_decomposition_says_what_to_do() -> None:
    class Empty(laws.DecompositionLaws):
        pass

    with pytest.raises(NotImplementedError, match="decompose"):
        Empty().test_exact()


def test_tensors_that_repeat_their_elements_share_nothing() -> None:
    def repeating(matrix: Tensor, budget: Budget) -> laws.Outcome:
        return replace(honest(matrix, budget), tensors=(torch.ones(1, dtype=matrix.dtype).expand(3),))

    laws.check_input_kept(repeating, MATRIX, Budget())


def test_loose_certificates_are_true_and_other_words_of_refusal_are_allowed() -> None:
    def refusing(matrix: Tensor, budget: Budget) -> laws.Outcome:
        raise NonFiniteError("Bitte nur endliche Zahlen.")

    laws.check_refuses_non_finite(refusing, MATRIX, float("nan"))
    for error in (1.5, float("inf")):
        laws.check_certificate(
            lambda matrix, budget, error=error: replace(honest(matrix, budget), error=error),
            MATRIX,
            Budget(max_bond=1),
        )


def test_what_a_suite_switched_off_or_replaced_stays_so_in_its_subclasses() -> None:
    class Parent(laws.DecompositionLaws):
        test_monotone = None

        def test_caps(self) -> str:
            return "mine"

    class Child(Parent):
        matrices = strategies.matrices(spectrum="flat")

    assert Child.test_monotone is None
    assert Child().test_caps() == "mine"  # type: ignore[func-returns-value]
    assert Child.test_exact is not Parent.test_exact  # draws from the strategies of the child


@settings(max_examples=50)
@given(matrix=strategies.matrices(rank=2, shape=(6, 5), dtype=torch.float64, scales=False))
def test_rank_asked_for_leaves_out_spectra_with_a_rank_of_their_own(matrix: Tensor) -> None:
    assert int(torch.linalg.matrix_rank(matrix)) == 2


def test_unknown_spectrum_lists_those_that_exist() -> None:
    with pytest.raises(ValueError, match="'flatt'"):
        strategies.matrix_with_spectrum((3, 3), "flatt", seed=0)


@pytest.mark.slow
def test_missing_hypothesis_names_the_extra() -> None:
    code = (
        "import tensornet as tn\n"
        "import tensornet._util as optional\n"
        "optional.find_spec = lambda name: None\n"
        "try:\n    tn.testing\n"
        "except tn.errors.MissingDependencyError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "tensornet.testing needs hypothesis, not installed here" in done.stdout
    assert "pip install 'tensornet-torch[testing]'" in done.stdout


def test_centers_that_count_from_the_end_are_centers() -> None:
    operator = tn.MPO.from_matrix(MATRIX, max_bond=3)
    for center in range(-3, 3):
        laws.check_canonical(operator, center=center)


@pytest.mark.slow
def test_suite_is_collected_by_pytest(tmp_path: Path) -> None:
    """As a user would run it: a file of ten lines, here with a decomposition that proves too much."""
    (tmp_path / "conftest.py").write_text(
        "from hypothesis import settings\n"
        "settings.register_profile('few', max_examples=50, derandomize=True, database=None)\n"
        "settings.load_profile('few')\n"
    )
    (tmp_path / "test_mine.py").write_text(
        "import tensornet as tn\n"
        "from tensornet.testing import laws, strategies\n\n"
        "class TestMine(laws.DecompositionLaws):\n"
        "    matrices = strategies.matrices(max_size=8)\n\n"
        "    def decompose(self, matrix, budget):\n"
        "        result = tn.topologies.topology_family('mpo').decompose(matrix, budget)\n"
        "        outcome = laws.Outcome.of(result)\n"
        "        return laws.Outcome(outcome.matrix, outcome.error * 0.8, outcome.params, outcome.bonds)\n"
    )
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "--rootdir",
            str(tmp_path),
            str(tmp_path),
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert "exceeds the certificate" in done.stdout
    assert "1 failed, 9 passed" in done.stdout


# --- laws of networks ----------------------------------------------------------------------------


class Skewed(tn.TensorNetwork):
    """A network whose `apply` is off by a little, and so are its gradients."""

    def apply(self, x: Tensor) -> Tensor:
        return super().apply(x) * 1.001

    def to_matrix(self) -> Tensor:
        return super().to_matrix().flip(0)


@pytest.mark.parametrize("check", [laws.check_matrix, laws.check_apply])
def test_wrong_network_is_caught(check: Callable[[tn.TensorNetwork], None]) -> None:
    topology = topology_family("tucker").build(6, 5, max_bond=2)
    cores = random_cores(topology, dtype=torch.float64)
    check(tn.TensorNetwork(topology, cores))
    with pytest.raises(AssertionError, match="tolerance"):
        check(Skewed(topology, cores))


def test_wrong_gradient_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    topology = topology_family("block_tt").build(6, 5, max_bond=2)
    network = tn.TensorNetwork(topology, random_cores(topology, dtype=torch.float64))
    laws.check_gradients(network)
    straight = tn.TensorNetwork.apply

    def without_the_last(self: tn.TensorNetwork, x: Tensor) -> Tensor:
        cores = [*self.cores[:-1], 0.5 * self.cores[-1] + 0.5 * self.cores[-1].detach()]
        return straight(tn.TensorNetwork(self.topology, cores), x)

    monkeypatch.setattr(tn.TensorNetwork, "apply", without_the_last)
    with pytest.raises(AssertionError, match="core '1'"):
        laws.check_gradients(network)


def test_wrong_canonical_form_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    operator = tn.MPO([torch.randn(1, 2, 2, 3), torch.randn(3, 2, 2, 1)])
    laws.check_canonical(operator, 1)
    monkeypatch.setattr(tn.MPO, "canonicalize", lambda self, center: self)
    with pytest.raises(AssertionError, match="core 0"):
        laws.check_canonical(operator, 1)


def test_wrong_norm_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    operator = tn.MPO([torch.randn(1, 2, 2, 3), torch.randn(3, 2, 2, 1)])
    laws.check_gauge(operator, 0)
    monkeypatch.setattr(tn.MPO, "norm", lambda self: self.cores[-1].norm())
    with pytest.raises(AssertionError):
        laws.check_gauge(operator, 0)


# --- strategies and references -------------------------------------------------------------------


@given(matrix=strategies.matrices(shape=(3, 4), dtype=strategies.dtypes(complex=False, half=True)))
def test_matrices_have_the_shape_and_dtype_asked_for(matrix: Tensor) -> None:
    assert matrix.shape == (3, 4)
    assert matrix.is_floating_point()
    assert bool(torch.isfinite(matrix).all())


@pytest.mark.parametrize("spectrum", strategies.SPECTRA)
def test_spectra_are_what_they_are_called(spectrum: str) -> None:
    S = torch.linalg.svdvals(strategies.matrix_with_spectrum((6, 9), spectrum, seed=0))
    expected = {
        "flat": torch.ones(6),
        "power": 1 / torch.arange(1.0, 7),
        "exponential": torch.exp(-torch.arange(6.0)),
        "zero": torch.zeros(6),
        "constant": torch.tensor([54**0.5, 0, 0, 0, 0, 0]),
    }
    if spectrum in expected:
        torch.testing.assert_close(S, expected[spectrum].double(), rtol=1e-6, atol=1e-6)
    elif spectrum == "low_rank":
        assert int((S > 1e-9).sum()) == 2


def test_references_agree_with_each_other() -> None:
    operator = tn.MPO([torch.randn(1, 2, 3, 2), torch.randn(2, 3, 2, 1)])
    by_elements = reference.chain_matrix(operator.cores)
    np.testing.assert_allclose(by_elements, reference.network_matrix(operator.topology, operator.cores))


def test_profiles() -> None:
    register_profiles()
    assert [settings.get_profile(name).max_examples for name in ("default", "ci", "nightly")] == [
        50,
        15,
        1000,
    ]
    assert settings.get_profile("ci").derandomize


class Nosy(MPOFamily):
    """Asks for its own name, as nobody should."""

    def build(self, *shape: int, max_bond: int | None = None, **options: object) -> tn.Topology:
        larger = max_bond if max_bond is None or self.name == "nosy" else max_bond + 1
        return super().build(*shape, max_bond=larger, **options)  # type: ignore[arg-type]

    name = "nosy"


class Ungauged(MPOFamily):
    """Has another encoding under another name."""

    name = "ungauged"

    def gauge_bonds(self, topology: tn.Topology) -> dict[str, str]:
        return super().gauge_bonds(topology) if self.name == "ungauged" else {}


@pytest.mark.parametrize(("family", "said"), [(Nosy(), "nosy"), (Ungauged(), "storage")])
def test_a_family_that_asks_for_its_name_is_found_out(family: TopologyFamily, said: str) -> None:
    matrix = torch.randn(24, 18, generator=torch.Generator().manual_seed(0))
    with pytest.raises(AssertionError, match=said):
        laws.check_name_does_not_matter(family, matrix)
    laws.check_name_does_not_matter(MPOFamily(), matrix)


def test_loose_certificates_may_exceed_the_error_by_the_root_of_the_number_of_bonds() -> None:
    matrix = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))

    def decompose(bonds: int, factor: float) -> laws.Decompose:
        found = laws.Outcome.of(tn.decompose(matrix, "low_rank", max_bond=2))
        loose = replace(found, error=factor * found.error, bonds=(1,) * bonds)
        return lambda matrix, budget: loose

    laws.check_tight(decompose(16, 3.9), matrix, Budget(max_bond=2))
    laws.check_tight(decompose(1, 1.9), matrix, Budget(max_bond=2))
    for bonds, factor in ((16, 4.1), (1, 2.1)):
        with pytest.raises(AssertionError, match="more than"):
            laws.check_tight(decompose(bonds, factor), matrix, Budget(max_bond=2))
