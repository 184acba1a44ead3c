"""Cross approximation finds functions and matrices from few of their values."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import tensornet as tn
from tensornet.errors import BudgetError, MemoryLimitError, NonFiniteError, ShapeError, TopologyError

X = torch.linspace(-1, 1, 6, dtype=torch.float64)


def table(function: Callable[[Tensor], Tensor], dims: tuple[int, ...]) -> Tensor:
    """All values of a function of indices, as a column."""
    return function(torch.cartesian_prod(*map(torch.arange, dims)).reshape(-1, len(dims)))[:, None]


def matrix(function: Callable[[Tensor, Tensor], Tensor], shape: tuple[int, int]) -> Tensor:
    i, j = (x.flatten() for x in torch.meshgrid(*map(torch.arange, shape), indexing="ij"))
    return function(i, j).reshape(shape)


def error(found: tn.MPO, truth: Tensor) -> float:
    return float(torch.linalg.norm(found.to_matrix() - truth) / torch.linalg.norm(truth))


STATES: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda i: X[i].sum(1) + 3,
    "sine": lambda i: torch.sin(3 * X[i].sum(1)),
    "gaussian": lambda i: torch.exp(-(X[i].sum(1) ** 2) - X[i].square().sum(1)),
    "rational": lambda i: 1 / (1.1 + (X[i] ** 2).sum(1)),
    "wave": lambda i: torch.exp(2j * X[i].sum(1)) + X[i][:, 0],
    "peak": lambda i: (i == 2).all(1).double() + 1e-3,
}


@pytest.mark.parametrize("name", STATES)
def test_states_agree_with_the_table_of_all_values(name: str) -> None:
    dims = (6, 4, 5, 6)
    start = torch.full((1, 4), 2)
    found, report = tn.MPO.from_function(STATES[name], out_dims=dims, start=start)
    assert found.out_dims == dims
    assert found.in_dims == (1,) * 4
    assert error(found, table(STATES[name], dims)) < 1e-10
    assert report.estimated_error < 1e-10


@pytest.mark.parametrize(
    ("shape", "sites"), [((64, 64), 6), ((48, 36), 3), ((61, 47), 3), ((8, 5), 1), ((1, 40), 2)]
)
def test_matrices_of_any_size_agree_and_are_called_inside_their_shape_only(
    shape: tuple[int, int], sites: int
) -> None:
    def hilbert(i: Tensor, j: Tensor) -> Tensor:
        assert int(i.max()) < shape[0]
        assert int(j.max()) < shape[1]
        assert min(int(i.min()), int(j.min())) >= 0
        return 1 / (i + 2 * j + 1).double()

    found, _ = tn.MPO.from_function(hilbert, shape, sites=sites)
    assert found.shape == shape
    assert len(found) == sites
    assert error(found, matrix(hilbert, shape)) < 1e-10
    whole = tn.MPO(found.cores).norm()
    torch.testing.assert_close(whole, found.norm())  # the padding is zero


def test_float32_values_give_float32_cores() -> None:
    found, _ = tn.MPO.from_function(lambda i, j: torch.exp(-(i + j) / 20), (32, 32), sites=5)
    assert found.dtype == torch.float32
    assert max(found.bond_dims) == 1
    assert error(found, matrix(lambda i, j: torch.exp(-(i + j) / 20), (32, 32))) < 1e-5


def test_few_values_of_a_large_matrix_are_needed() -> None:
    def kernel(i: Tensor, j: Tensor) -> Tensor:
        return 1 / ((i - j).abs() + 1).double()

    size = 2**12
    found, report = tn.MPO.from_function(kernel, (size, size), sites=12, rel_error=1e-6)
    assert report.evaluations < 200_000
    middle = size // 2
    vector = torch.zeros(size, dtype=torch.float64)
    vector[middle] = 1
    column = kernel(torch.arange(size), torch.tensor(middle))
    assert torch.linalg.norm(found @ vector - column) < 1e-4 * torch.linalg.norm(column)


def test_the_error_is_estimated_and_not_certified() -> None:
    found, report = tn.MPO.from_function(
        lambda i, j: torch.cos(0.3 * (i - j).double() ** 2), (32, 32), sites=5, max_bond=3
    )
    assert found.error == math.inf
    assert max(found.bond_dims) == 3
    truth = error(found, matrix(lambda i, j: torch.cos(0.3 * (i - j).double() ** 2), (32, 32)))
    assert report.estimated_error == pytest.approx(truth, rel=0.2)
    assert (found + found).error == math.inf
    assert found.round(max_bond=2).error == math.inf
    assert report.points == 1000


def test_evaluations_are_those_of_the_function() -> None:
    calls: list[int] = []

    def counted(i: Tensor) -> Tensor:
        calls.append(len(i))
        return X[i].sum(1)

    _, report = tn.MPO.from_function(counted, out_dims=(6,) * 5)
    assert report.evaluations == sum(calls)


def test_the_generator_decides_everything() -> None:
    def state(seed: int) -> tuple[tn.MPO, object]:
        generator = torch.Generator().manual_seed(seed)
        return tn.MPO.from_function(STATES["rational"], out_dims=(6,) * 5, generator=generator)

    (first, one), (second, two) = state(3), state(3)
    assert one == two
    assert all(map(torch.equal, first.cores, second.cores))


def test_a_peak_between_random_indices_is_found_if_it_is_named() -> None:
    def peak(i: Tensor) -> Tensor:
        return (i == 1).all(1).double()

    missed, report = tn.MPO.from_function(peak, out_dims=(2,) * 30)
    assert missed.norm() == 0
    assert (report.estimated_error, report.sweeps) == (0, 0)
    found, _ = tn.MPO.from_function(peak, out_dims=(2,) * 30, start=torch.ones(1, 30, dtype=torch.int64))
    assert found.norm() == 1
    assert max(found.bond_dims) == 1


def parametric(i: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.exp(-a * X[i].square().sum(1)) / (2 + torch.sin(b * X[i].sum(1)))


def energy(a: Tensor, b: Tensor) -> Tensor:
    found, _ = tn.MPO.from_function(lambda i: parametric(i, a, b), out_dims=(6, 5, 6, 4), rel_error=1e-9)
    weights = tn.MPO([torch.arange(1.0, d + 1).double().sqrt().reshape(1, d, 1, 1) for d in (6, 5, 6, 4)])
    return found.inner(weights)


def exact_energy(a: Tensor, b: Tensor) -> Tensor:
    values = table(lambda i: parametric(i, a, b), (6, 5, 6, 4))[:, 0]
    weights = table(lambda i: (i + 1.0).double().prod(1).sqrt(), (6, 5, 6, 4))[:, 0]
    return values @ weights


def test_parameters_of_the_function_have_gradients() -> None:
    place = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (0.7, 1.3)]
    torch.testing.assert_close(energy(*place), exact_energy(*place), rtol=1e-7, atol=0)
    expected = torch.autograd.grad(exact_energy(*place), place)
    torch.testing.assert_close(torch.autograd.grad(energy(*place), place), expected, rtol=1e-6, atol=0)
    frozen = [x.detach() for x in place]
    torch.testing.assert_close(torch.func.grad(energy, (0, 1))(*frozen), expected, rtol=1e-6, atol=0)
    tangents = (torch.tensor(0.5).double(), torch.tensor(-2.0).double())
    _, along = torch.func.jvp(energy, tuple(frozen), tangents)
    torch.testing.assert_close(along, 0.5 * expected[0] - 2 * expected[1], rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_value_that_is_not_finite_is_named(bad: float) -> None:
    def broken(i: Tensor, j: Tensor) -> Tensor:
        return torch.where((i == 3) & (j == 2), bad, (i + j).double())

    with pytest.raises(NonFiniteError, match="row 3, column 2"):
        tn.MPO.from_function(broken, (4, 4), sites=2)
    with pytest.raises(NonFiniteError, match=r"index \(3, 2\)"):
        tn.MPO.from_function(lambda i: broken(*i.T), out_dims=(4, 4))


@pytest.mark.parametrize(
    ("function", "options", "kind", "word"),
    [
        (lambda i: i.sum(1), {"out_dims": (4, 4)}, ShapeError, "int64"),
        (lambda i: X[i], {"out_dims": (4, 4)}, ShapeError, "one floating-point"),
        (lambda i: 1.0, {"out_dims": (4, 4)}, ShapeError, "1.0"),
        (STATES["sum"], {}, ShapeError, "out_dims"),
        (STATES["sum"], {"out_dims": (4, 4), "in_dims": (2, 2)}, ShapeError, "shape="),
        (STATES["sum"], {"out_dims": (4, 0)}, TopologyError, "at least 1"),
        (STATES["sum"], {"out_dims": (4, 4), "max_bond": 0}, BudgetError, "max_bond"),
        (STATES["sum"], {"out_dims": (4, 4), "rel_error": 2}, BudgetError, "rel_error"),
        (STATES["sum"], {"out_dims": (4, 4), "sweeps": 0}, TopologyError, "sweeps"),
        (STATES["sum"], {"out_dims": (4, 4), "start": torch.tensor([[4, 0]])}, ShapeError, "start"),
        (STATES["sum"], {"out_dims": (4, 4), "start": torch.ones(2, 2)}, ShapeError, "int64"),
        (STATES["sine"], {"out_dims": (6,) * 4, "max_bond": 1, "rel_error": 1e-3}, BudgetError, "estimated"),
        (lambda i: i.double().sum(1), {"out_dims": (2**40, 2**40)}, MemoryLimitError, "max_bond"),
        (lambda i, j: X[0] * i, {"shape": (2**64, 2**64), "sites": 64}, ShapeError, "int64"),
    ],
)
def test_bad_input_is_refused_in_words(
    function: Callable[..., Tensor], options: dict[str, object], kind: type[Exception], word: str
) -> None:
    with pytest.raises(kind, match=word):
        tn.MPO.from_function(function, **options)  # type: ignore[arg-type]
