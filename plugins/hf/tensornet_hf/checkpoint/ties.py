"""Parameters used under several names: ties that transformers makes, and ties that we make.

transformers keeps ties as pairs of names, `{target: source}`, and makes them with `setattr`. A pair that
names the weight of a compressed module would put a core where a weight was, or cut the bias of an output
layer to the length of a core's first dimension (`_adjust_bias`). So pairs that touch a compressed module are
taken out of its lists, and the shared cores are put in place here.
"""

from collections.abc import Iterable, Mapping

from torch import nn
from transformers import PreTrainedModel

from tensornet.nn.encoding import hold
from tensornet_hf.checkpoint.describe import is_inside

#: Where the pairs that transformers knows of the dense model are kept meanwhile, on the model.
DENSE = "_dense_ties"


def hand_over(
    model: PreTrainedModel, layers: Iterable[str], ties: Mapping[str, str], *, loading: bool = False
) -> None:
    """Remove pairs with compressed modules from transformers' list of ties, and list shared cores instead.

    Args:
        model: changed in place; `take_back` undoes it. May have been handed over before.
        layers: names of the compressed modules.
        ties: shared parameters, `{name: owner}`; they are listed in `all_tied_weights_keys`, which says
            what is stored once and belongs on one device, and not in `_tied_weights_keys`, from which
            `tie_weights` works.
        loading: the model is a skeleton, in which nothing is tied yet.
    """
    names = set(layers)
    dense = model.__dict__.setdefault(DENSE, dict(model.all_tied_weights_keys))
    kept = {t: s for t, s in dense.items() if not is_inside(t, names) and not is_inside(s, names)}
    if not loading:
        kept = _one_tensor(model, kept)
    for part in model.modules():
        if isinstance(part, PreTrainedModel) and type(part)._tied_weights_keys:
            part._tied_weights_keys = kept if part is model else {}
    listed = {target: source for target, source in ties.items() if _may_be_listed(model, target)}
    model.all_tied_weights_keys = kept | listed


def take_back(model: PreTrainedModel) -> None:
    """Restore transformers' own lists of ties, once no compressed module is left."""
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            part.__dict__.pop("_tied_weights_keys", None)
    if (dense := model.__dict__.pop(DENSE, None)) is not None:
        model.all_tied_weights_keys = _one_tensor(model, dense)


def detach_targets(model: nn.Module, ties: Mapping[str, str]) -> None:
    """Remove tensors that are stored under another name, so that loading does not expect them."""
    for target in ties:
        module, name = _owner(model, target)
        absent = getattr(module, name).detach()
        delattr(module, name)
        # Initialisation looks at `weight` of every layer, and passes by what is marked as loaded.
        absent._is_hf_initialized = True
        vars(module)[name] = absent


def attach_targets(model: PreTrainedModel, ties: Mapping[str, str]) -> None:
    """Assign the shared tensors to their other names."""
    for target, source in ties.items():
        module, name = _owner(model, target)
        vars(module).pop(name, None)
        hold(module, name, model.get_parameter_or_buffer(source))


def _one_tensor(model: PreTrainedModel, pairs: Mapping[str, str]) -> dict[str, str]:
    """Select the pairs that share one tensor: a configuration may claim ties that weights lack (T5 v1.1)."""
    get = model.get_parameter_or_buffer
    return {target: source for target, source in pairs.items() if get(target) is get(source)}


def _may_be_listed(model: nn.Module, target: str) -> bool:
    """Return True if transformers can tie a tensor: a parameter of a module without a bias."""
    module, name = _owner(model, target)
    return name in module._parameters and getattr(module, "bias", None) is None


def _owner(model: nn.Module, parameter: str) -> tuple[nn.Module, str]:
    path, _, name = parameter.rpartition(".")
    return model.get_submodule(path), name
