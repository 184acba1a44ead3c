"""Devices that tests run on; those on a GPU are marked `gpu`, and skipped where there is none."""

from __future__ import annotations

import pytest
import torch

GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=GPU)]
