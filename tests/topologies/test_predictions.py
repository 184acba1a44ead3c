"""Predictions of families are what decompositions give, in fewer eigendecompositions."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tensornet as tn
from tensornet.linalg.svd import MatrixSpectrum
from tensornet.topologies import topology_family

BUDGETS = [
    tn.Budget(param_ratio=0.5),
    tn.Budget(max_bond=7),
    tn.Budget(rel_error=0.3),
    tn.Budget(rel_error=0.05, max_bond=30),
    tn.Budget(),
]


def matrices() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    plain = torch.randn(48, 60, generator=generator)
    falling = plain * torch.logspace(0, -3, 60)
    return {
        "flat": plain,
        "falling": falling,
        "tall": falling.T.contiguous(),
        "half": falling.bfloat16(),
        "double": falling.double(),
        "low": torch.randn(48, 5, generator=generator) @ torch.randn(5, 60, generator=generator),
        "zero": torch.zeros(48, 60),
        "large": torch.randn(40, 300, generator=generator) @ torch.randn(300, 300, generator=generator),
    }


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
@pytest.mark.parametrize("name", matrices())
@pytest.mark.parametrize("family", ["low_rank", "mpo", "dense"])
def test_a_prediction_is_what_comes(family: str, name: str, budget: tn.Budget) -> None:
    matrix = matrices()[name]
    try:
        made = topology_family(family).decompose(matrix, budget)
    except tn.BudgetError as error:
        with pytest.raises(tn.BudgetError, match=str(error)[:20]):
            topology_family(family).predict(matrix, budget, MatrixSpectrum(matrix))
        return
    told = topology_family(family).predict(matrix, budget, MatrixSpectrum(matrix))
    assert told.topology == made.network.topology
    assert told.bound_by == made.bound_by
    assert told.error == pytest.approx(made.error, rel=1e-4, abs=1e-6)


def test_numbers_that_are_not_finite_are_refused_by_name() -> None:
    matrix = torch.eye(8)
    matrix[2, 3] = torch.nan
    with pytest.raises(tn.NonFiniteError, match="The matrix holds 1 NaN"):
        topology_family("low_rank").predict(matrix, tn.Budget(max_bond=2), MatrixSpectrum(matrix))


@pytest.mark.parametrize("budget", BUDGETS[:-1], ids=str)
@pytest.mark.parametrize("name", matrices())
@pytest.mark.parametrize("family", ["low_rank", "mpo"])
def test_a_prediction_decomposes_as_its_family_does(family: str, name: str, budget: tn.Budget) -> None:
    matrix = matrices()[name]
    made = topology_family(family).decompose(matrix, budget)
    told = topology_family(family).predict(matrix, budget, MatrixSpectrum(matrix, truncates=True))
    assert told.decompose is not None
    found = told.decompose()
    assert found.network.topology == told.topology
    assert found.error == pytest.approx(made.error, rel=1e-4, abs=1e-6)
    gap = (made.network.to_matrix() - found.network.to_matrix()).norm()
    assert float(gap) <= 1e-4 * max(float(matrix.norm()), 1e-30)


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        ({"param_ratio": 0.5}, ["eigh"]),
        ({"max_bond": 8}, ["eigh"]),
        ({"rel_error": 0.5}, ["eigvalsh", "eigh"]),
    ],
    ids=str,
)
def test_a_matrix_is_compressed_with_one_decomposition(
    monkeypatch: pytest.MonkeyPatch, budget: dict[str, float], expected: list[str]
) -> None:
    calls: list[str] = []
    for name in ("eigh", "eigvalsh", "svd"):
        real = getattr(torch.linalg, name)
        monkeypatch.setattr(
            torch.linalg,
            name,
            lambda x, *rest, _real=real, _name=name, **kw: (calls.append(_name), _real(x))[1],
        )
    model = nn.Sequential(nn.Linear(64, 48))
    config = tn.CompressionConfig(**budget, topology="low_rank", objective="weight")
    tn.compress(model, config, progress=False)
    assert calls == expected


def test_small_ranks_take_values_alone_and_an_iteration(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = torch.randn(256, 300, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, -2, 300)
    sizes: list[int] = []
    real = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda x: (sizes.append(len(x)), real(x))[1])
    found = topology_family("low_rank").predict(
        matrix, tn.Budget(max_bond=8), MatrixSpectrum(matrix, truncates=True)
    )
    assert found.decompose is not None
    found.decompose()
    assert sizes
    assert max(sizes) < 256
