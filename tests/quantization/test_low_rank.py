"""Low-rank products in integers."""

from __future__ import annotations

import pytest
import torch
from quantization.rounding_cases import moment, weight

from tensornet.errors import ShapeError
from tensornet.linalg.weighted_svd import Weighting, damped, weighted_svd
from tensornet.quantization import NumberFormat, RoundedProduct, RoundedWeight, round_product, round_weight

INT4, INT8 = NumberFormat.parse("int4"), NumberFormat.parse("int8")


def values(made: RoundedProduct) -> torch.Tensor:
    factors = (
        x.dequantize(torch.float64) if isinstance(x, RoundedWeight) else x for x in (made.left, made.right)
    )
    left, right = factors
    return left @ right


@pytest.mark.parametrize("moments", [True, False])
def test_factors_see_their_own_moments(moments: bool) -> None:
    matrix = weight(40, 96, 0)
    weighting = Weighting(damped(moment(40, 0), 0.1), damped(moment(96, 1), 0.01)) if moments else Weighting()
    a, b = weighted_svd(matrix, weighting).factors(16)
    got = round_product(a, b, INT4, INT4, weighting, target=matrix)
    assert got.loss_increase == pytest.approx(weighting.cost(matrix - values(got)), rel=1e-9)
    blind = RoundedProduct(round_weight(a, INT4), round_weight(b, INT4), 0.0)
    floor = weighting.cost(matrix - a @ b)
    assert floor <= got.loss_increase < weighting.cost(matrix - values(blind))
    fine = round_product(a, b, INT8, INT8, weighting, target=matrix)
    assert floor <= fine.loss_increase < floor + 0.1 * (got.loss_increase - floor)


def test_factors_stand_for_their_product() -> None:
    a, b = weight(10, 3, 0), weight(3, 70, 1)
    got = round_product(a, b, INT8, INT8, Weighting())
    assert got.loss_increase == pytest.approx(0.5 * float((a @ b - values(got)).square().sum()))


def test_bad_input() -> None:
    with pytest.raises(ShapeError, match=r"\(out, rank\)"):
        round_product(weight(4, 6, 0), weight(4, 6, 0), INT4, INT4, Weighting())
    with pytest.raises(ShapeError, match="target= has shape"):
        round_product(weight(4, 2, 0), weight(2, 6, 0), INT4, INT4, Weighting(), target=weight(6, 4, 0))
