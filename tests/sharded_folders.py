"""Model folders for the tests of sharded checkpoints: small, random, spread over several files."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from hf_models import ARCHITECTURES
from safetensors.torch import save_file
from torch import Tensor

from tensornet.io import file_digest

HALF = {"param_ratio": 0.5}


def save(name: str, folder: Path, *, shard: str = "8KB", dtype: torch.dtype | None = None) -> Path:
    """Save the dense model of an architecture in small shards, with a tokenizer's file beside it."""
    model = ARCHITECTURES[name].dense
    if dtype is not None:
        model = model.to(dtype)
    model.save_pretrained(folder, max_shard_size=shard)
    (folder / "tokenizer.json").write_text('{"made": "up"}')
    return folder


def save_tensors(tensors: dict[str, Tensor], folder: Path, config: dict[str, object]) -> Path:
    """A folder in one file, from nothing but tensors and a configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def contents(folder: Path) -> dict[str, str]:
    """Checksum of every file below a folder, by relative path."""
    files: Iterable[Path] = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): file_digest(path).sha256 for path in files}
