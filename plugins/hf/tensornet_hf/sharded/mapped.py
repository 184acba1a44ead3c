"""A model whose weights stay on the disk: they are mapped, and only what is touched is ever resident."""

from pathlib import Path
from typing import TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from tensornet.errors import TargetError
from tensornet_hf.sharded.header import FLOATS, load_slice
from tensornet_hf.sharded.skeleton import model_skeleton
from tensornet_hf.sharded.source import open_source
from tensornet_hf.sharded.targets import untie_different

_T = TypeVar("_T", bound=torch.Tensor)


def mapped_model(folder: str | Path) -> PreTrainedModel:
    """A model with the weights of a folder, in the dtype they are stored in, without reading them.

    It computes as a loaded model does, at the speed of the disk where memory does not hold it. Changing
    its weights in place does not change the files.

    Raises:
        FormatError: the folder is damaged or contradictory.
        TargetError: transformers does not have the model, or keeps weights in another form than stored.
    """
    source = open_source(Path(folder))
    model, stored = model_skeleton(source.config, source.tensors)
    if not isinstance(model, PreTrainedModel):
        raise TargetError(f"transformers does not have the model in {folder}; it cannot be run.")
    slices = {name: source.tensors[key] for name, key in stored.items()}
    untie_different(model, slices)
    owners: dict[int, nn.Parameter] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        part = slices.get(name)
        if part is not None and part.dtype in FLOATS:
            owners.setdefault(id(parameter), nn.Parameter(load_slice(part), requires_grad=False))
    for name, module in model.named_modules():
        for key, parameter in list(module._parameters.items()):
            if parameter is not None:
                if id(parameter) not in owners:
                    raise TargetError(
                        f"{folder} does not store {name}.{key} as the model uses it; load the model instead."
                    )
                module._parameters[key] = _final(owners[id(parameter)])
        for key, buffer in list(module._buffers.items()):
            if buffer is not None and buffer.is_meta:
                part = slices.get(f"{name}.{key}")
                module._buffers[key] = (
                    torch.empty_like(buffer, device="cpu") if part is None else _final(load_slice(part))
                )
    model.initialize_weights()  # computes the buffers that are not stored, such as rotary frequencies
    return model.eval()


def _final(tensor: _T) -> _T:
    tensor._is_hf_initialized = True  # type: ignore[attr-defined]  # what transformers looks for
    return tensor
