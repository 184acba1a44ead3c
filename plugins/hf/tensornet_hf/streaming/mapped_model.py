"""Memory-map the weights of a model from the disk: only touched pages are resident."""

import mmap
import tempfile
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from tensornet.errors import TargetError
from tensornet.io import FLOATS, contents, load_slice
from tensornet.streaming.stored_matrix import StoredMatrix
from tensornet_hf.streaming.expert_slices import take_experts_apart
from tensornet_hf.streaming.skeleton import model_skeleton
from tensornet_hf.streaming.source import open_source
from tensornet_hf.streaming.tasks import untie_different

_T = TypeVar("_T", bound=torch.Tensor)


def mapped_model(folder: str | Path, *, spill: str | Path | None = None) -> PreTrainedModel:
    """Build a model whose weights are mapped from a folder, in the dtype in which they are stored.

    It computes as a loaded model does, at the speed of the disk where memory does not hold it. Changing
    its weights in place does not change the files. Experts are taken apart
    (`tensornet_hf.checkpoint.stacked_experts`).

    Args:
        folder: of the model.
        spill: folder for matrices of experts that are stored in several parts; they are joined there, in
            files without a name that go with the model. The system's temporary folder if absent.

    Raises:
        FormatError: the folder is damaged or contradictory, or transformers does not have the model.
        TargetError: the model keeps weights in another form than stored.
    """
    source = open_source(Path(folder))
    model, stored = model_skeleton(source.config, source.tensors)
    experts = take_experts_apart(model, source.tensors, stored).matrices
    slices = {name: source.tensors[key] for name, key in stored.items()}
    untie_different(model, slices)
    owners: dict[int, nn.Parameter] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        part, matrix = slices.get(name), experts.get(name.removesuffix(".matrix"))
        if matrix is not None:
            joined = matrix.load() if len(matrix.parts) == 1 else _join(matrix, spill)
            owners[id(parameter)] = nn.Parameter(joined, requires_grad=False)
        elif part is not None and part.dtype in FLOATS:
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


def _join(matrix: StoredMatrix, spill: str | Path | None) -> torch.Tensor:
    with tempfile.TemporaryFile(dir=spill) as file:
        for chunk in contents(matrix.parts):
            file.write(chunk)
        file.flush()
        mapped = mmap.mmap(file.fileno(), matrix.nbytes, access=mmap.ACCESS_COPY)
    rows = torch.frombuffer(mapped, dtype=FLOATS[matrix.dtype]).reshape(-1, matrix.parts[0].shape[1])
    return rows.T if matrix.transposed else rows


def _final(tensor: _T) -> _T:
    tensor._is_hf_initialized = True  # type: ignore[attr-defined]  # what transformers looks for
    return tensor
