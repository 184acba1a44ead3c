"""Compress a folder with options as keywords, and return the report of the compression."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import tensornet as tn
import tensornet_hf as th


def compress_files(
    source: str | Path, destination: str | Path, config: Any, **options: Any
) -> tn.CompressionReport:
    """Without data, the errors of the weights are minimized, as `tn.compress` does."""
    if (
        isinstance(config, tn.CompressionConfig)
        and config.objective == "auto"
        and "calibration" not in options
    ):
        config = replace(config, objective="weight")
    return th.compress_folder(source, destination, config, th.CompressOptions(**options))
