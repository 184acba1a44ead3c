"""Every type of GGUF that is written is read back bit for bit by the decoder of the package `gguf`."""

from __future__ import annotations

import numpy as np
import pytest

from tensornet.errors import FormatError
from tensornet_hf.exporters.gguf_blocks import LEVELS, TYPES, write_blocks

pytestmark = pytest.mark.slow  # needs the extra `gguf`


def spread(x: np.ndarray) -> np.ndarray:
    return np.repeat(x, 32, axis=1)


def decoded(kind: str, points: np.ndarray, scales: np.ndarray) -> np.ndarray:
    import gguf

    data = write_blocks(kind, points, scales)
    return gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind])


def in_codebook(kind: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """All points of a codebook in random order, with signs and scales that the type stores."""
    import gguf

    rng, quants = np.random.default_rng(seed), getattr(gguf.quants, kind)
    quants.init_grid()
    points = rng.permutation(quants.grid.reshape(-1, quants.grid_shape[1])).reshape(-1, 256)
    signs = rng.choice([-1.0, 1.0], points.shape)
    if kind in ("IQ2_XXS", "IQ2_XS", "IQ3_XXS"):  # the number of negative weights in a run is even
        runs = signs.reshape(len(signs), -1, 8)
        runs[..., 7] = runs[..., :7].prod(-1)
    steps = rng.random((len(points), 1)).astype(np.float16).astype(np.float32)
    steps[0] = 0
    unit = {"IQ3_S": 1.0, "IQ3_XXS": 0.25}.get(kind, 0.125)
    integers = rng.choice(np.arange(1, 32, 2), (len(points), 8))
    integers[:, 3] = 31  # formats use most of the range
    scales = steps * integers * unit
    return points * signs, scales.astype(np.float32)


def matrix(kind: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Points that fill the range of a type, and scales that it stores."""
    if TYPES[kind].codebook is not None:
        return in_codebook(kind, seed)
    if TYPES[kind].fp4 is not None:
        rng = np.random.default_rng(seed)
        points = rng.choice([-12, -8, -6, -4, -3, -2, -1, 0, 1, 2, 3, 4, 6, 8, 12], (6, 512))
        if kind == "MXFP4":
            return points, np.ldexp(np.float32(1), rng.integers(-60, 60, (6, 16)))
        scales = rng.integers(0, 15, (6, 16)) / 512 * 2.0 ** rng.integers(0, 14, (6, 16))
        return points, (scales / 2).astype(np.float32)
    rng, found = np.random.default_rng(seed), TYPES[kind]
    shape = (6, 512)
    codes = rng.integers(0, 2**found.bits, shape)
    if found.sub is None:
        scales = rng.normal(size=(6, 16)).astype(np.float16).astype(np.float32)
    else:  # integers times one step in 256 weights
        least, most = found.sub[1:]
        steps = np.abs(rng.normal(size=(6, 2))).astype(np.float16).astype(np.float32)
        steps = np.ldexp(np.frexp(steps)[0].astype(np.float16).astype(np.float32), -6)
        scales = np.repeat(steps, 8, axis=1) * rng.integers(least, most + 1, (6, 16))
    if found.table:
        return LEVELS[codes], scales.astype(np.float32)
    if found.offset is not None:
        return codes - found.offset, scales.astype(np.float32)
    if found.sub is None:  # small integers, so that scale times zero fits float16
        scales = (rng.integers(1, 8, scales.shape) * 2.0 ** rng.integers(-9, 3, scales.shape)).astype(
            np.float32
        )
        return codes - spread(rng.integers(0, 2**found.bits, scales.shape)), scales
    return codes - (1.5 if found.bits == 2 else 2 ** (found.bits - 1)), np.abs(scales).astype(np.float32)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kind", TYPES)
def test_decoder_of_gguf_gives_back_the_matrix(kind: str, seed: int) -> None:
    points, scales = matrix(kind, seed)
    if kind in ("Q4_K", "Q5_K", "Q2_K"):  # both factors of a minimum must fit
        scales = np.ldexp(
            np.float32(1), np.floor(np.log2(np.maximum(scales, 2.0**-8))).astype(int).clip(-8, -6)
        )
    np.testing.assert_array_equal(decoded(kind, points, scales), (points * spread(scales)).astype(np.float32))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("kind", "bits", "group", "most"), [("Q2_K", 2, 16, 15), ("Q4_K", 4, 32, 63), ("Q5_K", 5, 32, 63)]
)
def test_minima_in_multiples_of_a_step(kind: str, bits: int, group: int, most: int, seed: int) -> None:
    import gguf

    rng, shape = np.random.default_rng(seed), (4, 2, 256 // group)
    steps = (rng.random((2, 4, 2, 1)) / 100).astype(np.float16).astype(np.float32)
    integers = rng.integers(0, most + 1, (2, *shape))
    integers[..., -1] = most
    scales, minima = (steps * integers).reshape(2, 4, -1)
    codes = rng.integers(0, 2**bits, (4, 512))
    data = write_blocks(kind, codes, scales, minima)
    found = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind])
    expected = codes.astype(np.float32) * scales.repeat(group, 1) - minima.repeat(group, 1)
    np.testing.assert_array_equal(found, expected.astype(np.float32))
    with pytest.raises(FormatError, match="minima"):
        write_blocks("Q6_K", codes, scales, minima)
    with pytest.raises(FormatError, match="step"):
        write_blocks(kind, codes, scales, minima * rng.random(minima.shape).astype(np.float32))


@pytest.mark.parametrize("kind", ["Q3_K", "Q4_0", "Q5_0", "Q8_0"])
def test_half_steps_are_odd_numbers_of_half_scales(kind: str) -> None:
    points = np.random.default_rng(0).integers(0, 4, (2, 256)) - 1.5
    scales = np.full((2, 8), 0.25, np.float32)
    np.testing.assert_array_equal(decoded(kind, points, scales), points * 0.25)


@pytest.mark.parametrize(
    ("kind", "points", "scale", "word"),
    [
        ("Q4_0", np.full((1, 48), 1), 1.0, "multiple"),
        ("Q4_K", np.full((1, 288), 1), 1.0, "multiple"),
        ("Q4_0", np.full((1, 256), 8), 1.0, "bits"),
        ("Q8_0", np.full((1, 256), 1), 1e-9, "float16"),
        ("Q8_0", np.full((1, 256), 1), 1 + 2.0**-12, "float16"),
        ("IQ4_NL", np.full((1, 256), 2), 1.0, "levels"),
        ("MXFP4", np.full((1, 256), 5), 1.0, "levels"),
        ("MXFP4", np.full((1, 256), 1), 1.5, "powers"),
        ("NVFP4", np.full((1, 96), 1), 1.0, "multiple"),
        ("NVFP4", np.full((1, 256), 1), -1.0, "E4M3"),
        ("NVFP4", np.full((1, 256), 1), 17 / 16, "E4M3"),
        ("IQ2_S", np.full((1, 256), 9), 1.0, "levels"),
        ("IQ3_S", np.full((1, 256), 15), 1.0, "codebook"),
        ("IQ3_S", np.full((1, 256), 1), 1 / 3, "float16"),
    ],
)
def test_what_a_type_cannot_hold_is_refused(kind: str, points: np.ndarray, scale: float, word: str) -> None:
    scales = np.full((1, points.shape[1] // 32), scale, np.float32)
    with pytest.raises(FormatError, match=word):
        write_blocks(kind, points, scales)


@pytest.mark.parametrize("kind", ["Q3_K", "IQ4_XS", "Q6_K", "Q4_K"])
def test_scales_that_differ_too_much_are_refused(kind: str) -> None:
    points = np.full((1, 256), LEVELS[9] if TYPES[kind].table else 1)
    for last in (2.0**-10, 2.0**-40):
        scales = np.array([[1.0] * 7 + [last]], np.float32)
        with pytest.raises(FormatError, match="256"):
            write_blocks(kind, points, scales)


@pytest.mark.parametrize("kind", ["Q3_K", "Q6_K", "Q4_0"])
def test_scales_of_16_weights(kind: str) -> None:
    """Whose greatest common divisor has more digits than the step that float16 holds."""
    rng, steps = np.random.default_rng(0), np.array([[2047.0], [1023.0 / 64]], np.float32)
    scales = steps * 6 * rng.integers(-5, 5, (2, 16))
    points = rng.integers(-4, 4, (2, 256))
    if kind == "Q4_0":
        with pytest.raises(FormatError, match="32"):
            write_blocks(kind, points, scales)
        return
    powers = np.ldexp(np.float32(1), np.arange(16) % (6 if kind == "Q3_K" else 8))  # 32 is stored as -32
    for each in (scales, powers[None].repeat(2, axis=0)):
        np.testing.assert_array_equal(decoded(kind, points, each), points * each.repeat(16, axis=1))
