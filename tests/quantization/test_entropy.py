"""Entropy-coded integers: bytes read back, sizes near the entropy, damage, steps, losses, bad input."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from quantization.rounding_cases import moment, price, weight
from torch import Tensor

import tensornet as tn
from tensornet.errors import FormatError, MissingDependencyError
from tensornet.linalg.weighted_svd import Weighting
from tensornet.quantization import NumberFormat, predict_losses, round_weight
from tensornet.quantization.entropy import decode, encode, tables


def normal_codes(rows: int, columns: int, seed: int, sizes: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """Rounded normal numbers whose deviation is a product over rows and columns, and these deviations."""
    generator = torch.Generator().manual_seed(seed)
    parts = (torch.randn(n, generator=generator, dtype=torch.float64) for n in (rows, columns))
    across, along = (torch.exp(size * part) for part, size in zip(parts, sizes, strict=True))
    deviations = 3 * across[:, None] * along
    found = deviations * torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return found.round().clamp(-128, 127).add(128).to(torch.uint8), deviations


@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    seed=st.integers(0, 99),
    size=st.sampled_from([0.0, 1.0, 4.0]),
)
@example(rows=1, columns=1, seed=0, size=4.0)
def test_codes_are_read_back_whatever_follows_them(rows: int, columns: int, seed: int, size: float) -> None:
    codes, _ = normal_codes(rows, columns, seed, (size, size))
    coded = encode(codes)
    assert torch.equal(decode(coded + b"\0" * (seed % 7), (rows, columns)), codes)


@pytest.mark.parametrize("value", [0, 128, 255])
def test_equal_codes(value: int) -> None:
    codes = torch.full((30, 50), value, dtype=torch.uint8)
    coded = encode(codes)
    assert torch.equal(decode(coded, (30, 50)), codes)
    assert value != 128 or len(coded) <= 16


@pytest.mark.parametrize("sizes", [(0.0, 0.0), (0.5, 0.0), (0.0, 0.7), (0.4, 0.4)])
def test_size_is_near_the_entropy(sizes: tuple[float, float]) -> None:
    codes, deviations = normal_codes(150, 100, 0, sizes)
    # The entropy of the rounded numbers, summed over their probabilities one by one.
    edges = torch.arange(-128, 129, dtype=torch.float64) - 0.5
    edges[0], edges[-1] = -math.inf, math.inf
    found = torch.special.ndtr(edges[:, None] / deviations.flatten()).diff(dim=0)
    entropy = float(-torch.special.xlogy(found, found).sum()) / math.log(2)
    levels = 5.5 * (150 + 100)
    assert entropy < 8 * len(encode(codes)) < 1.005 * entropy + levels


def test_distributions_do_not_depend_on_the_last_digits() -> None:
    """No probability is close to the middle of two integers, so that every machine rounds it alike."""
    edges = np.arange(-127, 128) - 0.5
    for level in range(0, 128, 8):
        scale = 2.0 ** ((level - 32) / 8) * math.sqrt(2)
        inside = np.diff([0.5 * math.erfc(-edge / scale) for edge in edges]) * 2**22
        assert np.abs(inside - tables()[level, 1:-1]).max() <= 0.5
    exact = np.stack(
        [
            np.diff([0, *(0.5 * math.erfc(-x / (2.0 ** ((k - 32) / 8) * math.sqrt(2))) for x in edges), 1])[
                1:-1
            ]
            for k in range(128)
        ]
    )
    assert np.abs(np.abs(exact * 2**22 % 1) - 0.5).min() > 1e-8


@given(place=st.integers(0, 10**6), change=st.integers(1, 255))
def test_damage_is_found(place: int, change: int) -> None:
    codes, _ = normal_codes(20, 30, 1, (0.2, 0.2))
    coded = bytearray(encode(codes))
    place %= len(coded)
    coded[place] ^= change
    try:
        same = torch.equal(decode(bytes(coded), (20, 30)), codes)
    except FormatError:
        return
    assert same  # the byte has no meaning


def test_too_few_bytes_and_another_shape() -> None:
    codes, _ = normal_codes(20, 30, 1, (0.2, 0.2))
    coded = encode(codes)
    for wrong, shape in ((coded[:40], (20, 30)), (coded[:3], (20, 30)), (coded, (30, 30)), (b"", (20, 30))):
        with pytest.raises(FormatError, match="damaged"):
            decode(wrong, shape)


@pytest.mark.parametrize("name", ["ec1", "ec2.5", "ec4", "ec6"])
def test_rounding_fills_the_bytes_and_knows_its_loss(name: str) -> None:
    number_format = NumberFormat.parse(name)
    matrix, rows, columns = weight(30, 45, 1), moment(30, 2), moment(45, 3)
    made = round_weight(matrix, name, rows=rows, columns=columns, row_damping=0.1, column_damping=0.01)
    assert made.column_scales is not None
    assert made.nbytes == number_format.coded_bytes((30, 45)) + 2 * 30 + 45
    used, limit = len(encode(made.codes)), number_format.coded_bytes((30, 45))
    assert limit - 0.05 * 30 * 45 / 8 <= used <= limit
    steps = made.scales.double() * made.column_scales.double()
    values = steps * (made.codes.double() - 128)
    assert torch.equal(made.dequantize(torch.float64), values)
    damped = [
        x + d * x.diagonal().mean() * torch.eye(len(x)).double() for x, d in ((rows, 0.1), (columns, 0.01))
    ]
    assert float(made.loss_increase) == pytest.approx(price(matrix - values, *damped), rel=1e-9)


def test_steps_are_small_where_the_loss_is_sensitive() -> None:
    """Diagonal moments, whose steps are known: the inverse square root."""
    matrix, diagonal = torch.randn(64, 96), torch.linspace(1, 50, 96)
    made = round_weight(matrix, "ec4", columns=diagonal, column_damping=0.0)
    assert made.column_scales is not None
    steps = made.column_scales.float() * diagonal.sqrt()
    assert float(steps.max() / steps.min()) < 1.27  # 8-bit scales are the multiples 1, 1.25, 1.5, 1.75
    plain = round_weight(matrix, "ec4")
    assert plain.column_scales is not None
    assert plain.column_scales.float().unique().numel() == 1

    def cost(x: Tensor) -> float:
        return float(((matrix - x).square() * diagonal).sum())

    assert cost(made.dequantize()) < 0.9 * cost(plain.dequantize())


def test_fewer_bytes_than_a_table_for_the_same_loss() -> None:
    torch.manual_seed(0)
    matrix, rows, columns = torch.randn(96, 256), moment(96, 1).float(), moment(256, 2).float()
    losses = {
        name: float(round_weight(matrix, name, rows=rows, columns=columns).loss_increase)
        for name in ("ec3.75", "nl4:g32:float8", "ec2.75", "nl3:g32:float8")
    }
    assert losses["ec3.75"] < losses["nl4:g32:float8"]
    assert losses["ec2.75"] < losses["nl3:g32:float8"]


@pytest.mark.parametrize("name", ["ec2", "ec3", "ec5"])
def test_predicted_losses_are_those_of_rounding(name: str) -> None:
    matrix, rows, columns = weight(96, 128, 3).float(), moment(96, 1).float(), moment(128, 2).float()
    seen = [Weighting(rows, columns), Weighting(rows.diagonal(), columns.diagonal())]
    (predicted,) = predict_losses(matrix, [name], seen, row_damping=0.1, column_damping=0.01)
    made = round_weight(matrix, name, rows=rows, columns=columns, row_damping=0.1, column_damping=0.01)
    error = matrix - made.dequantize()
    for value, each in zip(predicted.tolist(), seen, strict=True):
        assert value == pytest.approx(each.cost(error), rel=0.15)


def test_outliers_are_not_clamped() -> None:
    matrix = torch.randn(64, 64)
    matrix[3, 5], matrix[7], matrix[:, 9] = 1e3, 0.0, 0.0
    made = round_weight(matrix, "ec6")
    assert made.column_scales is not None
    steps = made.scales.float() * made.column_scales.float()
    assert bool(((matrix - made.dequantize()).abs() <= 0.501 * steps).all())
    (predicted,) = predict_losses(matrix, ["ec6"], [Weighting()])[:, 0].tolist()
    assert predicted == pytest.approx(float(0.5 * (matrix - made.dequantize()).square().sum()), rel=0.5)
    assert not bool(round_weight(torch.zeros(16, 16), "ec2").dequantize().any())


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ec7", "ec0.5", "ec3.3", "ec", "ec3:g32"):
        with pytest.raises(FormatError, match=r"ec3\.25"):
            NumberFormat.parse(name)
    with pytest.raises(FormatError, match=r"ec3\.25"):
        NumberFormat(4, None, rate=3.0)
    with pytest.raises(FormatError, match="not entropy-coded"):
        NumberFormat.parse("int4").coded_bytes((2, 2))
    with pytest.raises(FormatError, match="one matrix"):
        round_weight(torch.randn(2, 8, 8), "ec3")
    monkeypatch.setattr("tensornet._util.find_spec", lambda name: None)
    for call in (
        lambda: encode(torch.full((2, 2), 128, dtype=torch.uint8)),
        lambda: tn.CompressionConfig(formats="entropy", bits_per_weight=3.25),
        lambda: tn.CompressionConfig(formats=("float", "ec3.25"), bits_per_weight=3.25),
    ):
        with pytest.raises(MissingDependencyError, match=r"\[entropy\]"):
            call()
