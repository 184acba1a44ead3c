"""Selection of the parameters that healing trains."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tensornet.errors import TargetError
from tensornet.healing.config import Parameters
from tensornet.nn.module import NetworkModule
from tensornet.quantization import TrainedCodes

#: Learning rate of gains and biases in units of that of cores, which would hardly move them in some hundred
#: steps. The loss increase of the embedded GPT-2 in 2.25 bits, 0.116, falls in 150 steps to 0.109 at 1, to
#: 0.105 at 6 and to 0.103 at 20. SmolLM2-135M at a fifth of its bytes comes closer at a smaller rate:
#: its distance is 0.236 in the last ten of 60 steps at 20, and 0.225 at 8. (One run each, in no record; so
#: are those below.)
VECTOR_RATE = 6.0

#: Learning rate of codes, in units of the grid, in units of that of cores. With 0.02 units a step 150 steps
#: of the embedded GPT-2 in 2.25 bits give 0.082, with 0.03 0.078, with 0.05 0.099; 600 steps with 0.015 give
#: 0.067, with 0.03 0.075. All codes start in the middle of their cells, so that none changes before its
#: movements add up to half a unit, and then very many change within a few steps: 60 steps of 0.05 take
#: SmolLM2-135M at a fifth of its bytes from 0.25 to 0.90, while 60 of 0.02 change hardly any.
CODE_RATE = 40.0


def compressed_layers(model: nn.Module) -> dict[str, NetworkModule]:
    """Collect the tensor-network layers of a model by name; a layer with several names comes once."""
    return {name: module for name, module in model.named_modules() if isinstance(module, NetworkModule)}


def trainable_cores(layers: Mapping[str, NetworkModule]) -> dict[str, nn.Parameter]:
    """Collect the floating-point tensors that hold cores by name, tied ones once.

    Raises:
        TargetError: no layer has any.
    """
    found: dict[int, tuple[str, nn.Parameter]] = {}
    for name, module in layers.items():
        for part, core in _float_cores(module).items():
            found.setdefault(id(core), (f"{name}.{part}", core))
    if not found:
        raise TargetError(
            "Nothing to heal: the model has no layer made of trainable cores. Compress it first. Integers "
            "with scales of eight bits are not trained: use parameters='vectors' or 'codes', or formats such "
            "as 'int4', whose scales have 16 bits."
        )
    return dict(found.values())


def _float_cores(module: NetworkModule) -> dict[str, nn.Parameter]:
    """Collect the stored tensors of one layer that can be trained."""
    return {part: x for part, x in module.stored.items() if isinstance(x, nn.Parameter)}


def cores_and_vectors(model: nn.Module, layers: Mapping[str, NetworkModule]) -> dict[str, nn.Parameter]:
    """Collect trainable cores and the gains and biases of a model by name, tied ones once.

    Raises:
        TargetError: the model has no compressed layer, or nothing to train.
    """
    cores = {id(core) for layer in layers.values() for core in _float_cores(layer).values()}
    named = dict(model.named_parameters())
    found = {
        name: p for name, p in named.items() if p.is_floating_point() and (id(p) in cores or p.dim() < 2)
    }
    if not layers or not found:
        raise TargetError(
            "Nothing to heal: the model has no compressed layer, or no cores, gains or biases that can be "
            "trained. Compress it first; add adapters and use parameters='trainable'."
        )
    return found


def row_orders(layers: Mapping[str, NetworkModule]) -> dict[str, Tensor]:
    """Collect the row permutations of pivoted cores by name, tied ones once."""
    found: dict[int, tuple[str, Tensor]] = {}
    for name, module in layers.items():
        for part, tensor in module.stored.items():
            if tensor.dtype == torch.int32:
                found.setdefault(id(tensor), (f"{name}.{part}", tensor))
    return dict(found.values())


def trained_parameters(
    model: nn.Module, teacher: nn.Module, parameters: Parameters, layer_steps: int
) -> dict[str, nn.Parameter]:
    """Collect the parameters that healing trains, by name.

    Args:
        model: the student.
        teacher: shares no parameter with those that are trained.
        parameters: see `HealingConfig`.
        layer_steps: number of layer-wise steps, which train cores alone.

    Raises:
        TargetError: nothing can be trained, the teacher would be trained too or lies on another device, or no
            core takes part in the layer-wise steps.
    """
    layers = compressed_layers(model)
    if parameters == "auto":
        parameters = "cores" if all(_float_cores(layer) for layer in layers.values()) else "vectors"
    if parameters == "cores":
        trained = trainable_cores(layers)
    elif parameters in ("vectors", "codes"):
        trained = cores_and_vectors(model, layers)
        if parameters == "codes" and not any(isinstance(x, TrainedCodes) for x in trained.values()):
            raise TargetError(
                "Nothing of parameters='codes': no layer has integers in a number format. Compress with "
                "bits_per_weight= or formats=(...), or train parameters='cores'."
            )
    else:
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trained:
        raise TargetError(
            "Nothing to heal: no parameter requires gradients. Add adapters, or train the cores."
        )
    own = {id(parameter) for parameter in teacher.parameters()}
    if any(id(parameter) in own for parameter in trained.values()):
        raise TargetError(
            "The teacher holds the very parameters that are trained. compress changes a model in place: "
            "keep the dense one before, teacher = copy.deepcopy(model)."
        )
    devices = [next(iter(each.parameters())).device for each in (model, teacher)]
    if devices[0] != devices[1]:
        raise TargetError(
            f"The model lies on {devices[0]} and its teacher on {devices[1]}, and each batch runs "
            f'through both; move one, as by teacher.to("{devices[0]}").'
        )
    stored = {id(tensor) for layer in layers.values() for tensor in layer.stored.values()}
    if layer_steps and not any(id(parameter) in stored for parameter in trained.values()):
        raise TargetError(
            "Layer-wise steps train cores, and none of them requires gradients; use layer_steps=0."
        )
    return trained


def relative_groups(trained: Iterable[nn.Parameter]) -> list[dict[str, Any]]:
    """Build one optimizer group for each parameter, with what its learning rate is relative to as `size`.

    That is the root mean square of the entries of a core, `VECTOR_RATE` times that of a gain or a bias, and
    `CODE_RATE` units of the grid for codes.
    """
    groups: list[dict[str, Any]] = []
    for parameter in trained:
        size = float(parameter.detach().float().square().mean().sqrt())
        # A bias may start at zero and has to move all the same.
        size = max(size, 1e-6) if parameter.dim() > 1 else VECTOR_RATE * max(size, 1e-2)
        size = CODE_RATE if isinstance(parameter, TrainedCodes) else size
        groups.append({"params": [parameter], "size": size})
    return groups


@contextmanager
def only_training(model: nn.Module, trained: Collection[nn.Parameter]) -> Iterator[None]:
    """Require gradients of some parameters alone inside the block; restore the flags after it."""
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
            parameter.grad = None
