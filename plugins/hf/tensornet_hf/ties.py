"""Parameters used under several names: what transformers ties itself, and what it must leave to us.

transformers keeps ties as pairs of names, `{target: source}`, and makes them with `setattr`. A pair that
names the weight of a compressed module would put a core where a weight was, or cut the bias of an output
layer to the length of a core's first dimension (`_adjust_bias`). So pairs that touch a compressed module are
taken out of its lists, and the shared cores are put in place here.
"""

from collections.abc import Iterable, Mapping

from torch import nn
from transformers import PreTrainedModel

from tensornet_hf.structure import is_inside


def hand_over(model: PreTrainedModel, layers: Iterable[str], ties: Mapping[str, str]) -> None:
    """Take pairs that touch compressed modules from transformers' lists, and list the shared cores instead.

    Args:
        model: changed in place; `take_back` undoes it.
        layers: names of the compressed modules.
        ties: shared parameters, `{name: owner}`; they are listed in `all_tied_weights_keys`, which says
            what is stored once and belongs on one device, and not in `_tied_weights_keys`, from which
            `tie_weights` works.
    """
    names = set(layers)
    for prefix, part in _parts(model):
        part.__dict__.pop("_tied_weights_keys", None)
        stock = part.get_expanded_tied_weights_keys()
        kept = _apart_from(stock, names, prefix)
        if kept != stock:
            part._tied_weights_keys = kept
    listed = {target: source for target, source in ties.items() if not _has_bias(model, target)}
    model.all_tied_weights_keys = _apart_from(model.all_tied_weights_keys, names) | listed


def take_back(model: PreTrainedModel) -> None:
    """Give transformers its own lists again, once no compressed module is left."""
    for _, part in _parts(model):
        part.__dict__.pop("_tied_weights_keys", None)
    pairs = model.get_expanded_tied_weights_keys(all_submodels=True)
    get = model.get_parameter_or_buffer
    # Only what is one tensor now: a configuration may claim ties that the weights do not have (T5 v1.1).
    model.all_tied_weights_keys = {t: s for t, s in pairs.items() if get(t) is get(s)}


def detach_targets(model: nn.Module, ties: Mapping[str, str]) -> None:
    """Remove the parameters that are stored under another name, so that loading does not look for them."""
    for target in ties:
        module, name = _owner(model, target)
        del module._parameters[name]


def attach_targets(model: nn.Module, ties: Mapping[str, str]) -> None:
    """Put the shared parameters in place."""
    for target, source in ties.items():
        module, name = _owner(model, target)
        module.register_parameter(name, model.get_parameter(source))


def _parts(model: PreTrainedModel) -> list[tuple[str, PreTrainedModel]]:
    named = model.named_modules(remove_duplicate=False)
    return [(name, part) for name, part in named if isinstance(part, PreTrainedModel)]


def _apart_from(pairs: Mapping[str, str], layers: set[str], prefix: str = "") -> dict[str, str]:
    full = f"{prefix}." if prefix else ""
    return {
        target: source
        for target, source in pairs.items()
        if not is_inside(full + target, layers) and not is_inside(full + source, layers)
    }


def _has_bias(model: nn.Module, parameter: str) -> bool:
    return getattr(_owner(model, parameter)[0], "bias", None) is not None


def _owner(model: nn.Module, parameter: str) -> tuple[nn.Module, str]:
    path, _, name = parameter.rpartition(".")
    return model.get_submodule(path), name
