"""Layers whose weight is read outside their `forward`, so that they cannot be replaced.

To find them, a twin of the model is run with a *probe* in place of every weight. A layer's own `forward` sees
the weight itself; whoever else computes with the probe is noticed. The twin shares or lacks the numbers of
the model: on the meta device a run costs neither memory nor arithmetic.

The core cannot call a model without data. An extension brings runs of the models that it knows
(`ModelExtension.sample_runs`); `calibrate` adds one with the first batch.
"""

import copy
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tensornet._util import uncompiled
from tensornet.nn.extension import Run, sample_runs
from tensornet.nn.layer_kinds import kind_of
from tensornet.nn.unfuse import Compound, PartMatrix
from tensornet.nn.weight_facts import FACTS, LIKE


def weight_readers(model: nn.Module, runs: Iterable[Run] = ()) -> frozenset[str]:
    """Find layers whose weight is read outside their `forward`, by running the model.

    Mamba, for example, multiplies by `self.dt_proj.weight`, and Whisper takes rows of its position table.
    The registered runs are tried on the meta device. One that fails there, because it asks for values, is
    tried with the model's own weights.

    Args:
        model: is not changed.
        runs: taken where no run is registered, or one of those failed.
    """
    found: set[str] = set()
    registered = sample_runs(model)
    failed = _probe(model, registered, found, on_meta=True) if registered else []
    if not any(parameter.is_meta for parameter in model.parameters()):
        failed = _probe(model, failed, found, on_meta=False) if failed else []
        if failed or not registered:
            _probe(model, runs, found, on_meta=False)
    return frozenset(found)


def _probe(model: nn.Module, runs: Iterable[Run], found: set[str], *, on_meta: bool) -> list[Run]:
    """Add the readers that runs reveal to `found`; return the runs that failed."""
    try:
        made = _twin(model, on_meta=on_meta)
    except Exception:  # what a model holds need not be made to be copied
        return []
    failed = []
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), uncompiled(), _probes(made, found):
        warnings.simplefilter("ignore")
        for run in runs:
            try:
                with torch.inference_mode(False), torch.enable_grad():
                    run(made)
            except Exception:  # a model fails on data that do not suit it in every way there is
                failed.append(run)
    return failed


def _twin(model: nn.Module, *, on_meta: bool) -> nn.Module:
    """Copy the modules with shared parameters, or with parameters and buffers on the meta device."""
    memo: dict[int, Any] = {}
    for tensor in _tensors(model):
        is_parameter = isinstance(tensor, nn.Parameter)
        if on_meta or is_parameter:  # buffers with numbers are copied: training changes them
            bare = tensor.detach()
            bare = torch.empty_like(bare, device="meta") if on_meta else bare
            memo[id(tensor)] = nn.Parameter(bare, tensor.requires_grad) if is_parameter else bare
    made = copy.deepcopy(model, memo)
    for module in made.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks):
            hooks.clear()  # they belong to the model, and may keep what they see
    return made


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    """List all tensors that modules hold, unregistered ones included."""
    seen: set[int] = set()
    left: list[Any] = [model]
    while left:
        value = left.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, nn.Module):
            left += vars(value).values()
        elif isinstance(value, list | tuple | set):
            left += value
        elif isinstance(value, dict):
            left += value.values()


@contextmanager
def _probes(model: nn.Module, found: set[str]) -> Iterator[None]:
    """Replace every weight by a probe outside the layer's own `forward`, and collect names of its readers.

    Modules of the model are changed and not restored: it is a twin.
    """
    handles = []
    inside: set[int] = set()  # layers of compounds, whose own code may use them
    for name, module in model.named_modules():
        if isinstance(module, Compound):
            places = _places_of_compound(name, module, found)
            inside.update(id(holder) for holder, _, _ in places)
        elif id(module) not in inside:
            places = _places_of_layer(name, module, found)
        else:
            continue
        handles += _show_only_outside(module, places)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _places_of_layer(name: str, module: nn.Module, found: set[str]) -> list["_Place"]:
    kind = kind_of(module)
    if kind is None:
        return []
    weight = kind.matrix(module)
    keys = [key for key, p in module._parameters.items() if p is not None and _views(weight, p)]
    return [(module, key, _Probe.of(module._parameters[key], name, found)) for key in keys[:1]]


def _places_of_compound(name: str, module: Compound, found: set[str]) -> list["_Place"]:
    """List the layers of a compound, and the stock parameters that hold their matrices."""
    places: list[_Place] = []
    for stack in module.stacks:
        for layer_name in stack.names:
            layer = module.get_submodule(layer_name)
            if isinstance(layer, PartMatrix):
                places.append((layer, "matrix", _Probe.of(layer.matrix, f"{name}.{layer_name}", found)))
        owner, _, key = stack.parameter.rpartition(".")
        holder = module._stock[0].get_submodule(owner)
        places.append((holder, key, _Probe.of(holder._parameters[key], name, found)))
    return places


def _views(tensor: Tensor, parameter: nn.Parameter) -> bool:
    return tensor is parameter or tensor._base is parameter


def _show_only_outside(module: nn.Module, places: list["_Place"]) -> list[Any]:
    weights = [holder._parameters[key] for holder, key, _ in places]

    def enter(module: nn.Module, args: Any) -> None:
        for (holder, key, _), weight in zip(places, weights, strict=True):
            holder._parameters[key] = weight

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        for holder, key, probe in places:
            holder._parameters[key] = probe

    leave(module, (), None)
    return [
        module.register_forward_pre_hook(enter),
        module.register_forward_hook(leave, always_call=True),
    ]


class _Probe(nn.Parameter):
    """Stand-in for a weight: gives dtype and device, and records any other access by name."""

    _name: str
    _found: set[str]

    @classmethod
    def of(cls, weight: Tensor | None, name: str, found: set[str]) -> "_Probe":
        assert weight is not None
        probe = Tensor._make_subclass(cls, weight.detach(), weight.requires_grad)
        probe.__dict__.update(vars(weight))
        probe._name, probe._found = name, found
        return probe

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        values = [*args, *kwargs.values()]
        with torch._C.DisableTorchFunctionSubclass():
            if function in FACTS or (function in LIKE and not isinstance(args[0], cls)):
                return function(*args, **kwargs)
            for value in _flat(values):
                if isinstance(value, cls):
                    value._found.add(value._name)
            # What is written into the weight must not reach the model, whose weights these are.
            return function(*map(_own, args), **{key: _own(value) for key, value in kwargs.items()})


def _flat(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, list | tuple):
            yield from _flat(value)
        else:
            yield value


def _own(value: Any) -> Any:
    if isinstance(value, _Probe):
        return value.detach().clone().requires_grad_(value.requires_grad)
    return type(value)(map(_own, value)) if type(value) in (list, tuple) else value


#: A module, the name of one of its parameters, and the probe for it.
_Place = tuple[nn.Module, str, _Probe]
