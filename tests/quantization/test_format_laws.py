"""One number format of every kind satisfies the laws of `tensornet.testing.laws.FormatLaws`."""

from __future__ import annotations

import pytest
import torch

from tensornet.testing import laws, strategies


class TestInt4(laws.FormatLaws):
    number_format = "int4:g32"


class TestEightBitScales(laws.FormatLaws):
    number_format = "int3:g32:float8"


class TestRows(laws.FormatLaws):
    number_format = "int8:row"


class TestLevels(laws.FormatLaws):
    number_format = "nl4:g32:float16"


class TestMxfp4(laws.FormatLaws):
    number_format = "mxfp4"


class TestNvfp4(laws.FormatLaws):
    number_format = "nvfp4"


WIDE = strategies.matrices(shape=(3, 512), dtype=torch.float32, spectrum="gaussian", scales=False)


@pytest.mark.slow
class TestSuperBlocks(laws.FormatLaws):
    number_format = "int3:g16:s6"
    matrices = WIDE


@pytest.mark.slow
class TestMinima(laws.FormatLaws):
    number_format = "int5:g32:s6:min"
    matrices = WIDE


@pytest.mark.slow
class TestCodebook(laws.FormatLaws):
    number_format = "iq2_s"
    matrices = WIDE


@pytest.mark.slow
class TestCodebookWithEvenSigns(laws.FormatLaws):
    number_format = "iq3_xxs"
    matrices = WIDE
