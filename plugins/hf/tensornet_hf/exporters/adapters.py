"""Write low-rank changes of layers as a folder with a LoRA adapter, for PEFT and for mlx-lm."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from tensornet.errors import DestinationError, TargetError
from tensornet.io import new_folder
from tensornet.nn.layer_kinds import kind_of
from tensornet_hf.exporters.base import LowRank
from tensornet_hf.exporters.compressed_tensors import peft_adapter
from tensornet_hf.exporters.mlx import mlx_adapter

#: File by which PEFT and mlx-lm recognize an adapter.
CONFIG = "adapter_config.json"


def export_peft_adapter(
    model: PreTrainedModel,
    low_ranks: Mapping[str, LowRank],
    destination: Path,
    *,
    source: Path | None = None,
    force: bool = False,
) -> None:
    """Write low-rank changes of layers as an adapter for PEFT and vLLM.

    Args:
        model: the model without the changes.
        low_ranks: the change of each layer by name.
        destination: the new folder.
        source: folder of the model's tokenizer, which is not used here.
        force: replace an existing adapter.

    Raises:
        DestinationError: the destination contains something else, exists and `force` is not set, or cannot be
            written.
    """
    dtypes: dict[str, Any] = {name: model.get_submodule(name).weight.dtype for name in low_ranks}
    tensors, config = peft_adapter(low_ranks, dtypes)
    origin = getattr(getattr(model, "config", None), "name_or_path", None) or None
    transposed = bool(_transposed(model, low_ranks))
    config |= {"base_model_name_or_path": origin, "fan_in_fan_out": transposed}
    _write(destination, "adapter_model.safetensors", tensors, config, force=force)


def export_mlx_adapter(
    model: PreTrainedModel,
    low_ranks: Mapping[str, LowRank],
    destination: Path,
    *,
    source: Path | None = None,
    force: bool = False,
) -> None:
    """Write low-rank changes of layers as an adapter for mlx-lm; see `export_peft_adapter`.

    Raises:
        TargetError: mlx-lm has no adapters for a layer.
        DestinationError: as for `export_peft_adapter`.
    """
    if transposed := _transposed(model, low_ranks):
        raise TargetError(
            f"mlx-lm has no adapters for layers of the type Conv1D, such as {transposed[0]}. Export to peft "
            "or gguf."
        )
    _write(destination, "adapters.safetensors", *mlx_adapter(low_ranks), force=force)


def _transposed(model: PreTrainedModel, names: Mapping[str, Any]) -> list[str]:
    """List the layers that store a transposed weight."""
    return [x for x in names if getattr(kind_of(model.get_submodule(x)), "name", "") == "conv1d"]


def _write(
    folder: Path, file: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any], *, force: bool
) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        if not (folder / CONFIG).is_file():
            raise DestinationError(f"{folder} is not the folder of an adapter. Choose another name.")
        if not force:
            raise DestinationError(f"{folder} exists already. Choose another name, or use force=True.")
    # Layers may share a factor, but safetensors refuses tensors that share memory.
    copies = {key: x.clone(memory_format=torch.contiguous_format) for key, x in tensors.items()}
    with new_folder(folder, force=force) as made:
        save_file(copies, made / file, {"format": "pt"})
        (made / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
