"""Compress a folder with options as keywords, and return the report of the compression."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import tensornet as tn
import tensornet_hf as th
from tensornet_hf.file_sink import FileSink


def compress_files(
    source: str | Path, destination: str | Path, config: Any, **options: Any
) -> tn.CompressionReport:
    """Without data, the errors of the weights are minimized, as `tn.compress` does."""
    if isinstance(config, tn.CompressionConfig) and config.method == "auto" and "calibration" not in options:
        config = replace(config, method="nearest" if config.formats else "svd")
    return th.compress_folder(source, destination, config, th.CompressOptions(**options))


def interrupted_in(block: str, run: Any) -> None:
    """Call a function, and interrupt it when the layers of a block have been compressed."""
    put = FileSink.put

    def stopping(self: FileSink, name: str, layers: Any) -> None:
        if name == block:
            raise KeyboardInterrupt
        put(self, name, layers)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FileSink, "put", stopping)
        with pytest.raises(KeyboardInterrupt):
            run()
