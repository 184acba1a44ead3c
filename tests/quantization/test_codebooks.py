"""Codebooks against a search of all points and signs, and rounding with them against slow computations."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from quantization.rounding_cases import moment, predicted_loss, unit_upper, weight
from torch import Tensor

from tensornet.errors import FormatError
from tensornet.linalg.weighted_svd import Weighting
from tensornet.quantization import NumberFormat, round_weight
from tensornet.quantization.codebooks import CODEBOOKS, RUN, Codebook
from tensornet.quantization.descent import sweep_runs
from tensornet.quantization.feedback import Grid, round_with_feedback
from tensornet.quantization.moments import Moment, loss_increase
from tensornet.quantization.parts import StepScales
from tensornet.quantization.rounding import ROUNDINGS
from tensornet.quantization.scales import search_scales
from tensornet.topologies.dense import round_dense

NAMES = st.sampled_from(sorted(CODEBOOKS))

#: Bytes of 256 weights, number of points, and their length, of the types in `ggml-common.h` of llama.cpp.
FACTS = {
    "iq3_s": (110, 512, 4),
    "iq3_xxs": (98, 256, 4),
    "iq2_s": (82, 1024, 8),
    "iq2_xs": (74, 512, 8),
    "iq2_xxs": (66, 256, 8),
}


def points_of(book: Codebook) -> Tensor:
    return book.tables(torch.device("cpu")).magnitudes.double()


def signed_vectors(book: Codebook, odd: bool | None) -> Tensor:
    """All points with all signs or, if `odd` is given, with an odd or even number of negative elements."""
    signs = torch.tensor(list(itertools.product((1.0, -1.0), repeat=book.length)), dtype=torch.float64)
    if odd is not None:
        signs = signs[(signs < 0).sum(1) % 2 == int(odd)]
    return (signs[:, None] * points_of(book)).flatten(0, 1)


def least_cost(book: Codebook, target: Tensor, factor: Tensor) -> float:
    """Smallest `|(t - q) F|^2` of a run, by trying everything; `factor` is diagonal for vectors of 4."""
    costs = []
    for odd in (False, True) if book.even and book.length < RUN else (False if book.even else None,):
        cost = 0.0
        for k in range(0, RUN, book.length):
            part = slice(k, k + book.length)
            error = (target[part] - signed_vectors(book, odd)) @ factor[part, part]
            cost += float(error.square().sum(1).min())
        costs.append(cost)
    return min(costs)


@pytest.mark.parametrize("name", FACTS)
def test_bytes_and_points(name: str) -> None:
    block, count, length = FACTS[name]
    number_format, book = NumberFormat.parse(name), CODEBOOKS[name]
    assert number_format.nbytes((3, 512)) == 6 * block
    assert points_of(book).shape == (count, length)
    assert len(points_of(book).unique(dim=0)) == count
    assert set(points_of(book).flatten().tolist()) == set(book.magnitudes)


@given(NAMES, st.integers(0, 1000))
def test_codes_are_in_the_codebook_and_packing_keeps_them(name: str, seed: int) -> None:
    number_format, book = NumberFormat.parse(name), CODEBOOKS[name]
    matrix = weight(3, 256, seed)
    scales, _ = search_scales(matrix, number_format)
    codes = number_format.encode(matrix, scales)
    levels = torch.tensor(book.levels, dtype=torch.float64)[codes.long()]
    vectors = levels.abs().reshape(-1, 1, book.length)
    assert bool((vectors == points_of(book)).all(2).any(1).all())
    if book.even:
        assert not bool(((levels < 0).reshape(-1, RUN).sum(1) % 2).any())
    packed = number_format.pack(codes)
    assert packed.shape == (3, number_format.points.packed_bytes(256))
    assert torch.equal(number_format.unpack(packed, 256), codes)
    torch.testing.assert_close(
        number_format.decode(codes, scales, dtype=torch.float64),
        levels * scales.repeat_interleave(number_format.group or 1, 1),
    )


@pytest.mark.parametrize("name", FACTS)
def test_rows_of_equal_weights_are_exact(name: str) -> None:
    """One point of every codebook has equal elements, but not always with the largest magnitude."""
    value = torch.tensor([[0.3], [-0.02], [1.0]])
    made = round_weight(value.expand(3, 256), name).dequantize()
    torch.testing.assert_close(made, value.expand(3, 256), rtol=2.0**-10, atol=0)
    around = value * (1 + 0.02 * torch.randn(3, 256, generator=torch.Generator().manual_seed(0)))
    error = torch.linalg.norm(round_weight(around, name).dequantize() - around, dim=1)
    assert bool((error < 0.08 * torch.linalg.norm(around, dim=1)).all())


@pytest.mark.parametrize("name", FACTS)
def test_no_vector_is_much_closer(name: str) -> None:
    """Only some points are compared, so the best one is not always found."""
    book, generator = CODEBOOKS[name], torch.Generator().manual_seed(0)
    target = torch.randn(1, 40, RUN, generator=generator, dtype=torch.float64) * book.magnitudes[-1] / 2
    factor = torch.diag(0.5 + torch.rand(RUN, generator=generator, dtype=torch.float64))
    error = (target - book.choose(target, factor[None])) @ factor
    least = torch.tensor([least_cost(book, t, factor) for t in target[0]], dtype=torch.float64)
    found = error.square().sum(2)[0]
    assert bool((found >= least * (1 - 1e-9)).all())
    assert float(found.mean()) <= 1.04 * float(least.mean())
    exact = book.choose(target)
    assert torch.equal(book.choose(exact, factor[None]), exact)


@pytest.mark.parametrize("name", FACTS)
def test_correlated_elements(name: str) -> None:
    """Comparing points under the factor costs less than the nearest points do."""
    book, generator = CODEBOOKS[name], torch.Generator().manual_seed(0)
    target = torch.randn(1, 200, RUN, generator=generator, dtype=torch.float64) * book.magnitudes[-1] / 2
    lower = torch.linalg.cholesky(moment(RUN, 0).flip(0, 1))
    factor = lower.flip(0, 1)[None]  # upper triangular
    costs = [
        ((target - x) @ factor).square().sum() for x in (book.choose(target, factor), book.choose(target))
    ]
    assert float(costs[0]) < 0.95 * float(costs[1])


@pytest.mark.parametrize(("seed", "name"), list(enumerate(FACTS)))
def test_feedback_run_by_run(seed: int, name: str) -> None:
    """Every run is close to its target, which contains the errors of all previous runs."""
    number_format, book = NumberFormat.parse(name), CODEBOOKS[name]
    matrix, inputs = weight(5, 512, seed), moment(512, seed)
    scales, _ = search_scales(matrix, number_format)
    columns = Moment(inputs[None]).in_runs(RUN)
    levels, losses = round_with_feedback(matrix[None], scales[None], None, number_format, None, columns)
    spread = number_format.spread(scales.double(), 512)
    error = matrix - levels[0] * spread
    assert losses is not None
    torch.testing.assert_close(losses[0], (error @ inputs * error).sum(1))
    order = columns.order[0]
    assert torch.equal(order.reshape(-1, RUN) % RUN, torch.arange(RUN).expand(64, -1))
    upper, lower = (
        unit_upper(inputs[order][:, order]),
        torch.linalg.cholesky(inputs[order][:, order].flip(0, 1)),
    )
    sizes, error, levels = lower.diagonal().flip(0), error[:, order], levels[0][:, order]
    found, nearest = 0.0, 0.0
    for k in range(0, 512, RUN):
        part = slice(k, k + RUN)
        block = upper[part, part]
        feedback = torch.linalg.solve_triangular(
            block, error[:, :k] @ upper[:k, part], upper=True, left=False
        )
        scale = spread[:, order][:, k : k + 1]
        target = (matrix[:, order][:, part] + feedback) / scale
        factor = block * sizes[part]
        weighed = scale.square().sum(1)
        found += float((((target - levels[:, part]) @ factor).square().sum(1) * weighed).sum())
        simple = book.choose(target[None])[0]
        nearest += float((((target - simple) @ factor).square().sum(1) * weighed).sum())
    assert found == pytest.approx(float(losses.sum()), rel=1e-9)
    assert found <= nearest


def one_after_another(
    matrix: torch.Tensor, scales: torch.Tensor, name: str, rows: Moment, columns: Moment
) -> torch.Tensor:
    """Round one run after another with two-sided feedback, without tiles."""
    number_format, book = NumberFormat.parse(name), CODEBOOKS[name]
    down, across = rows.order[0], columns.order[0]
    upper, right = unit_upper(rows.values[0][down][:, down]), unit_upper(columns.values[0][across][:, across])
    factors = columns.feedback_between_runs[1][0]
    w, s = (x[down][:, across] for x in (matrix, number_format.spread(scales.double(), matrix.shape[1])))
    error, half, levels = (torch.zeros_like(w) for _ in range(3))
    for i in range(len(w)):
        above = upper[:i, i] @ error[:i]
        for k in range(0, w.shape[1], RUN):
            part = slice(k, k + RUN)
            block = right[part, part]
            left = torch.linalg.solve_triangular(
                block.mT, right[:k, part].mT @ half[i, :k, None], upper=False
            )
            aim = (w[i, part] + above[part] + left[:, 0]) / s[i, k]
            levels[i, part] = book.choose(aim.view(1, 1, RUN), factors[None, k // RUN])[0, 0]
            error[i, part] = w[i, part] - levels[i, part] * s[i, part]
            half[i, part] = error[i, part] + above[part]
    return levels[down.argsort()][:, across.argsort()]


@pytest.mark.parametrize(("name", "out"), [*((x, 5) for x in FACTS), ("iq3_s", 40), ("iq2_xxs", 40)])
def test_two_sided_feedback(name: str, out: int) -> None:
    """Antidiagonals of tiles give the codes that one run after another gives."""
    number_format = NumberFormat.parse(name)
    matrices = torch.stack([weight(out, 256, seed) for seed in range(2)])
    scales, _ = search_scales(matrices, number_format)
    rows = Moment(torch.stack([moment(out, 2), moment(out, 3)]))
    columns = Moment(moment(256, 0)[None]).in_runs(RUN)
    levels, losses = round_with_feedback(matrices, scales, None, number_format, rows, columns)
    error = matrices - levels * number_format.spread(scales.double(), 256)
    assert losses is not None
    torch.testing.assert_close(losses, 2 * loss_increase(error, rows, columns))
    for k in range(2):
        expected = one_after_another(matrices[k], scales[k], name, Moment(rows.values[k : k + 1]), columns)
        assert torch.equal(levels[k], expected)


@pytest.mark.parametrize("name", FACTS)
def test_feedback_lowers_the_loss(name: str) -> None:
    matrix = weight(12, 512, 0)
    made = [
        round_weight(matrix, name, rows=moment(12, 1), columns=moment(512, 0), rounding=rounding, refits=0)
        for rounding in ROUNDINGS
    ]
    assert [x.rounding[0] for x in made] == list(ROUNDINGS)
    nearest, one_sided, two_sided = (float(x.loss_increase) for x in made)
    assert one_sided < 0.7 * nearest
    assert two_sided < 0.7 * one_sided
    assert made[2].nbytes == made[2].number_format.nbytes(matrix.shape)


@given(NAMES, st.integers(1, 12), st.booleans(), st.integers(0, 1000))
def test_sweeps_never_raise_the_loss(name: str, rows: int, diagonal: bool, seed: int) -> None:
    number_format = NumberFormat.parse(name)
    matrix, outputs, inputs = weight(rows, 256, seed), moment(rows, seed, tokens=2), moment(256, seed + 1)
    outputs = outputs.diagonal().diag() if diagonal else outputs
    scales, _ = search_scales(matrix, number_format)
    grid = Grid.of(number_format, number_format.spread(scales.double(), 256)[None])
    before = grid.codes(matrix[None])
    side = outputs.diagonal() if diagonal else outputs
    losses, told = [], [predicted_loss(matrix - grid.values(before)[0], outputs, inputs)]
    for _ in range(3):
        losses.append(predicted_loss(matrix - grid.values(before)[0], outputs, inputs))
        before, change = sweep_runs(matrix[None], before, grid, side[None], inputs[None])
        told.append(told[-1] + float(change))
        number_format.pack(number_format.points.to_codes(before[0]))  # all codes are in the codebook
    assert told[:3] == pytest.approx(losses, rel=1e-6)
    assert losses == sorted(losses, reverse=True)
    assert losses[2] < 0.9 * losses[0]


@pytest.mark.parametrize("name", FACTS)
def test_descent_knows_the_outputs(name: str) -> None:
    """Errors of correlated outputs are coupled, which feedback between the inputs does not know."""
    matrix, inputs, outputs = weight(24, 512, 0), moment(512, 0), moment(24, 1)
    moments = {"rows": outputs, "columns": inputs, "rounding": "one_sided", "refits": 0}
    losses = [float(round_weight(matrix, name, **moments, sweeps=k).loss_increase) for k in (0, 2)]
    assert losses[1] < 0.8 * losses[0]


def test_descent_where_feedback_is_not_two_sided() -> None:
    """Without the full moment of the inputs, only descent uses that of the outputs."""
    matrix, weighting = weight(24, 512, 0), Weighting(moment(24, 1), moment(512, 0).diagonal())
    descended, rounded = (
        round_dense(matrix, NumberFormat.parse("iq3_s"), weighting, most) for most in (None, 0)
    )
    assert float(descended.loss_increase) < 0.98 * float(rounded.loss_increase)


def test_stacks_are_rounded_matrix_by_matrix() -> None:
    matrices = torch.stack([weight(4, 256, k) for k in range(2)])
    inputs = torch.stack([moment(256, k) for k in range(2)])
    stacked = round_weight(matrices, "iq2_xs", columns=inputs, sweeps=1)
    for k in range(2):
        alone = round_weight(matrices[k], "iq2_xs", columns=inputs[k], sweeps=1)
        torch.testing.assert_close(stacked.loss_increase[k], alone.loss_increase)


@given(NAMES, st.integers(0, 1000), st.integers(-24, 8))
def test_scales_are_odd_integers_times_a_step(name: str, seed: int, power: int) -> None:
    number_format = NumberFormat.parse(name)
    assert number_format.group is not None
    scales = (
        torch.rand(3, 512 // number_format.group, generator=torch.Generator().manual_seed(seed)) * 2.0**power
    )
    scales[1] = 0
    assert isinstance(number_format.scales, StepScales)
    unit, (integers, steps) = number_format.scales.unit, number_format.scales.factored(scales)
    stored = number_format.storable(scales)
    assert steps.dtype == torch.float16
    assert int(integers.max()) <= 15
    odd = (2 * integers + 1).reshape(3, 2, -1).double()
    assert torch.equal(stored.double(), (odd * steps.double()[..., None] * unit).reshape(scales.shape))
    assert torch.equal(number_format.storable(stored), stored)
    largest = scales.reshape(3, 2, -1).amax(-1, keepdim=True)
    room = largest / 23 + 2.0**-11 * largest + 32 * 2.0**-24 * unit
    assert bool(((stored - scales).reshape(3, 2, -1).abs() <= room).all())
    assert not stored[1].any()


def test_codes_outside_the_codebook_are_refused() -> None:
    number_format = NumberFormat.parse("iq2_xxs")
    codes = number_format.encode(weight(1, 256, 0), torch.full((1, 8), 0.05))
    codes[0, 0] = number_format.points.top - codes[0, 0]  # an odd number of negative weights
    with pytest.raises(FormatError, match="codebook"):
        number_format.pack(codes)
    with pytest.raises(FormatError, match="codebook"):
        NumberFormat.parse("iq3_s").pack(
            torch.full((1, 256), 15, dtype=torch.uint8) * (torch.arange(256) % 2 == 0).byte()
        )


def test_rows_that_are_no_multiple_of_256_are_refused() -> None:
    with pytest.raises(FormatError, match="multiple of 256"):
        round_weight(weight(2, 96, 0), "iq3_s")
    with pytest.raises(FormatError, match="multiple of 256"):
        NumberFormat.parse("iq2_s").nbytes((2, 384))


def test_unknown_codebooks_are_refused() -> None:
    with pytest.raises(FormatError, match="iq3_s"):
        NumberFormat.parse("iq3_m")
