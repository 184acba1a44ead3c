"""Description of a compressed model: its tensor-network modules and the parameters that they share."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from tensornet.nn.serialization import module_spec
from tensornet_hf.checkpoint.quantization_config import TensorNetworkConfig


def describe(model: nn.Module, *, compression: Mapping[str, Any] | None = None) -> TensorNetworkConfig:
    """Return the description with which a model is stored; `layers` is empty for an ordinary model.

    Args:
        model: any model.
        compression: options to record, see `TensorNetworkConfig`.
    """
    layers = layer_descriptions(model)
    tensors = model.state_dict(keep_vars=True)
    ties = shared_tensors(tensors, layers, base=getattr(model, "base_model_prefix", ""))
    dtypes = {
        name: str(tensor.dtype).removeprefix("torch.")
        for name, tensor in tensors.items()
        if name not in ties and is_inside(name, layers)
    }
    counted = list(dtypes.values())
    main = max(sorted(set(counted)), key=counted.count) if counted else None
    return TensorNetworkConfig(
        layers=layers,
        ties=ties,
        dtype=main,
        other_dtypes={name: dtype for name, dtype in dtypes.items() if dtype != main},
        compression=compression,
    )


def layer_descriptions(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Describe the outermost tensor-network modules; a module used twice is listed under both names."""
    found: dict[str, dict[str, Any]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        spec = module_spec(module)
        if spec is not None and name and not is_inside(name, found):
            found[name] = spec
    return found


def shared_tensors(tensors: Mapping[str, Tensor], layers: Iterable[str], *, base: str) -> dict[str, str]:
    """Map every parameter or buffer of a compressed module that another name owns to that name.

    The owner is the first name outside the compressed modules, or else the first inside. Names of the base
    model come before those of a head, so that the base model finds its own tensors when it is loaded alone.

    Args:
        tensors: state dict of the model, with the parameters themselves.
        layers: names of the compressed modules.
        base: name of the base model in the model; empty if it has none.
    """
    names = set(layers)
    named = [(name, id(tensor)) for name, tensor in tensors.items()]
    base_first = sorted(named, key=lambda item: not item[0].startswith(f"{base}."))
    owners: dict[int, str] = {}
    for inside in (False, True):
        for name, key in base_first:
            if is_inside(name, names) is inside:
                owners.setdefault(key, name)
    return {name: owners[key] for name, key in named if is_inside(name, names) and owners[key] != name}


def is_inside(name: str, layers: Iterable[str]) -> bool:
    """Return True if a dotted name lies below one of the named modules."""
    names = layers if isinstance(layers, set | dict | frozenset) else set(layers)
    end = name.rfind(".")
    while end > 0:
        if name[:end] in names:
            return True
        end = name.rfind(".", 0, end)
    return False
