"""Save and load compressed PyTorch models, as files with weights and descriptions of the layers.

For Hugging Face models use `tensornet_hf`, which saves folders that transformers can load.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn

from tensornet.compression.apply import replaced
from tensornet.errors import FormatError, TargetError
from tensornet.io import write_tensors
from tensornet.nn.extension import extensions, structure_changed
from tensornet.nn.layer_kinds import has_own_forward, kind_of
from tensornet.nn.module import NetworkModule, build_module
from tensornet.nn.storage import PackedCore, tie
from tensornet.nn.unfuse import fuse, unfuse

FILE_VERSION = 1


def save_model(model: nn.Module, path: str | Path) -> None:
    """Write the weights of a model and a description of its compressed layers to one safetensors file.

    Shared parameters are written once. An existing file is replaced when the new file is complete.

    Args:
        model: any module; to load the file, `load_model` needs another instance of the same class.
        path: path of the file.

    Raises:
        TargetError: the model is on the meta device; its state dict contains something other than tensors; or
            the model uses parameters outside of it (see `tensornet.nn.ModelExtension.check_whole`).
        DestinationError: the file cannot be written.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 16))
        >>> _ = tn.compress(model, tn.CompressionConfig(param_ratio=0.5, method="svd"), progress=False)
        >>> tn.save_model(model, "model.safetensors")
    """
    state = model.state_dict(keep_vars=True)
    if odd := [name for name, value in state.items() if not isinstance(value, Tensor) or value.is_meta]:
        raise TargetError(
            f"{type(model).__name__} cannot be written: {odd[0]!r} in its state_dict() is not a tensor with "
            "values. Load the model first, or leave this entry out of its state."
        )
    for extension in extensions():
        extension.check_whole(model)
    owners: dict[int, str] = {}
    ties = {name: owner for name, x in state.items() if (owner := owners.setdefault(id(x), name)) != name}
    tensors, taken = {}, set()
    for name in (x for x in state if x not in ties):
        tensor = state[name].detach().cpu().contiguous()
        memory = tensor.untyped_storage().data_ptr()
        # Distinct tensors may still overlap in memory, which safetensors does not accept.
        tensors[name] = tensor.clone() if memory in taken else tensor
        taken.add(memory)
    named = model.named_modules(remove_duplicate=False)
    layers = {name: module.spec() for name, module in named if name and isinstance(module, NetworkModule)}
    header = {"version": FILE_VERSION, "layers": layers, "ties": ties}
    write_tensors(path, tensors, {"tensornet": json.dumps(header)}, what="The model")


@torch.no_grad()
def load_model(model: nn.Module, path: str | Path) -> nn.Module:
    """Load a file of `save_model` into a dense model; compressed layers replace dense layers of the model.

    Args:
        model: a new dense instance of the saved class. Compressed layers replace its layers, on the same
            devices and in the same dtypes, and all its weights are overwritten.
        path: path of the file.

    Returns:
        The same model.

    Raises:
        FormatError: the file is missing, damaged, or of another model; `model` is then unchanged.
        TargetError: the model is on the meta device, or it uses parameters outside of the model; the file
            lacks such parameters.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 16))
        >>> _ = tn.compress(model, tn.CompressionConfig(param_ratio=0.5, method="svd"), progress=False)
        >>> tn.save_model(model, "model.safetensors")
        >>> loaded = tn.load_model(torch.nn.Sequential(torch.nn.Linear(16, 16)), "model.safetensors")
        >>> torch.equal(loaded(torch.ones(16)), model(torch.ones(16)))
        True
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        raise TargetError("load_model needs a model that is in memory; this model is on the meta device.")
    for extension in extensions():
        extension.check_whole(model)
    header, state = _read(Path(path))
    apart = unfuse(model, inside=header["layers"])
    try:
        _fill(model, header, state, path)
    finally:  # restores the stock modules, also after a failure
        fuse(model, apart)
    structure_changed(model)
    return model


def _fill(model: nn.Module, header: Mapping[str, Any], state: Mapping[str, Tensor], path: str | Path) -> None:
    """Insert the compressed layers into an unfused model, and load all tensors."""
    made: dict[int, nn.Module] = {}  # keys: ids of stock layers, since one may have several names
    places: dict[str, nn.Module] = {}
    for name, spec in header["layers"].items():
        try:
            stock = model.get_submodule(name)
        except AttributeError:
            raise FormatError(
                f"{path} is of another model: {type(model).__name__} has no module {name!r}, which is "
                "compressed in the file."
            ) from None
        if isinstance(stock, NetworkModule) and stock.spec() == spec:
            continue
        places[name] = made.setdefault(id(stock), _built(name, spec, stock, path))
    with replaced(model, places):
        _check_state(model, state, path)
    for name, owner in header["ties"].items():
        tie(model, name, owner)
    model.load_state_dict(state)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read the header and the tensors of a file; a tied tensor is returned under each of its names.

    Raises:
        FormatError: the file is missing or damaged, or was not written by `save_model`.
    """
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            text = (file.metadata() or {}).get("tensornet")
            if text is None:
                raise FormatError(
                    f"{path} was not written by tensornet.save_model: it has no list of compressed layers."
                )
            header = json.loads(text)
            if header["version"] != FILE_VERSION:
                raise FormatError(
                    f"{path} is a model of version {header['version']}, this library reads version "
                    f"{FILE_VERSION}; use the library that wrote it."
                )
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        state |= {name: state[owner] for name, owner in header["ties"].items()}
        if not isinstance(header["layers"], dict):
            raise TypeError("layers must be a dictionary")
    except FormatError:
        raise
    except (OSError, KeyError, ValueError, TypeError, AttributeError, safetensors.SafetensorError) as error:
        raise FormatError(f"Cannot read a model from {path}: {error}") from error
    return header, state


def _built(name: str, spec: Mapping[str, Any], stock: nn.Module, path: str | Path) -> nn.Module:
    """Build an uninitialized compressed layer from its description, to replace a stock layer.

    Raises:
        FormatError: the stock layer has another type or shape.
        TargetError: the `forward` of the stock layer was replaced.
    """
    kind = kind_of(stock)
    if kind is None or kind.name != spec.get("source"):
        raise FormatError(
            f"{path} is of another model: {name!r} is a {type(stock).__name__} in the model, and a "
            f"layer of the kind {spec.get('source')!r} in the file."
        )
    if has_own_forward(stock):
        raise TargetError(
            f"{name!r} has its own forward, which a compressed layer would lose: delete it first "
            "(`del layer.forward`), and set it again afterwards."
        )
    matrix = kind.matrix(stock)
    module = build_module(spec, device=matrix.device, dtype=matrix.dtype)
    assert isinstance(module, NetworkModule)
    if module.topology.shape != tuple(matrix.shape):
        raise FormatError(
            f"{path} is of another model: {name!r} has shape {tuple(matrix.shape)} in the model, "
            f"{module.topology.shape} in the file (out_features, in_features)."
        )
    return module


def _check_state(model: nn.Module, state: Mapping[str, Tensor], path: str | Path) -> None:
    """Check that the tensors of a file fit a model, and that scales are finite.

    Raises:
        FormatError: names, shapes or dtypes differ from those of the model, or packed cores are damaged.
    """
    own = model.state_dict()
    for what, names in (("lacks", own.keys() - state.keys()), ("has", state.keys() - own.keys())):
        if names:
            raise FormatError(
                f"{path} is of another model: it {what} {', '.join(sorted(names)[:5])}"
                f"{' and more' if len(names) > 5 else ''}."
            )
    for name, tensor in own.items():
        if tensor.shape != state[name].shape:
            raise FormatError(
                f"{path} is of another model: {name} has shape {tuple(tensor.shape)} in the model, "
                f"{tuple(state[name].shape)} in the file."
            )
    for name, module in model.named_modules():
        if not isinstance(module, PackedCore):
            continue
        for part, tensor in module.named_buffers():
            if (found := state[f"{name}.{part}"].dtype) != tensor.dtype:
                raise FormatError(
                    f"{path} is damaged: {name}.{part} is stored as {str(found).removeprefix('torch.')}, but "
                    f"the number format of its layer needs {str(tensor.dtype).removeprefix('torch.')}. Copy "
                    "the file again, or save the model again."
                )
        stored = {part: state[f"{name}.{part}"] for part in module.names}
        PackedCore(module.number_format, module.shape, module.columns, stored, module.axis).check_finite(
            f"{path}: {name}"
        )
