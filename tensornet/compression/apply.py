"""Carrying a plan out: stock layers become layers made of cores, and back."""

from collections.abc import Sequence

import torch
from torch import nn
from tqdm.auto import tqdm

from tensornet.compression.config import CompressionConfig
from tensornet.compression.hooks import structure_changed
from tensornet.compression.plan import CompressionPlan, LayerPlan
from tensornet.compression.targets import Target, find_targets
from tensornet.errors import TargetError
from tensornet.nn.adapters import layer_bias
from tensornet.nn.embedding import MPOEmbedding, embedding_from_network
from tensornet.nn.linear import TensorNetworkLinear, linear_from_network
from tensornet.nn.module import NetworkModule
from tensornet.topologies import topology_family


@torch.no_grad()
def apply_plan(model: nn.Module, plan: CompressionPlan, *, progress: bool = False) -> dict[str, float]:
    """Replace the planned layers in place. Nothing is replaced if any decomposition fails.

    Args:
        model: the model the plan was made for.
        plan: may have been edited or loaded.
        progress: show a progress bar.

    Returns:
        Certified relative Frobenius error of each replaced layer, by name.

    Raises:
        TargetError: the model has no layer of a planned name or shape.
    """
    work = [layer for layer in plan if layer.topology is not None]
    targets = {target.name: target for target in _all_targets(model)}
    for layer in work:
        _check_fits(layer, targets.get(layer.name))
    replacements: list[tuple[Sequence[str], list[nn.Module]]] = []
    errors = {}
    for layer in tqdm(work, desc="compressing", disable=not progress, unit="layer"):
        target = targets[layer.name]
        modules, errors[layer.name] = _compressed(target, layer)
        replacements.append((target.names, modules))
    for names, modules in replacements:
        for name, module in zip(names, modules, strict=True):
            set_submodule(model, name, module)
    structure_changed(model)
    return errors


def set_submodule(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` at the dotted name, keeping the training flag of what was there."""
    parent_name, _, child = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    module.train(parent.training)
    setattr(parent, child, module)


@torch.no_grad()
def decompress(model: nn.Module) -> nn.Module:
    """Put stock layers back in place of every layer made of cores; tied layers stay tied.

    Returns:
        The same model.
    """
    dense: dict[int, nn.Module] = {}  # by first core: tied layers share it
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if not isinstance(module, TensorNetworkLinear | MPOEmbedding):
            continue
        stock = module.to_embedding() if isinstance(module, MPOEmbedding) else module.to_linear()
        twin = dense.setdefault(id(module.cores[0]), stock)
        if twin is not stock:
            stock.weight = twin.weight
        if (bias := layer_bias(module)) is not None:
            stock.bias = bias  # the parameter itself, as in `apply_plan`
        set_submodule(model, name, stock)
    structure_changed(model)
    return model


def _all_targets(model: nn.Module) -> list[Target]:
    return find_targets(model, CompressionConfig(target_modules="all"))


def _check_fits(layer: LayerPlan, target: Target | None) -> None:
    if target is None:
        raise TargetError(f"The plan names a layer {layer.name!r} that this model does not have.")
    if tuple(target.matrix.shape) != layer.shape:
        raise TargetError(
            f"The plan was made for {layer.name!r} of shape {layer.shape}, the model's has shape "
            f"{tuple(target.matrix.shape)}."
        )


def _compressed(target: Target, layer: LayerPlan) -> tuple[list[nn.Module], float]:
    """New modules for every name of a target, sharing the cores, and the certified error."""
    assert layer.topology is not None
    matrix = target.matrix
    result = topology_family(layer.topology.family).decompose_to(matrix, layer.topology)
    network = result.network.to(matrix.dtype)
    trainable = target.weight.requires_grad
    made: dict[int, nn.Module] = {}  # one object used under several names stays one object
    first: NetworkModule | None = None
    for module, kind in zip(target.modules, target.kinds, strict=True):
        if id(module) in made:
            continue
        new: NetworkModule
        if isinstance(module, nn.Embedding):
            new = embedding_from_network(network, padding_idx=module.padding_idx)
        else:
            new = linear_from_network(network, bias=None, source=kind.name)
            new.bias = layer_bias(module)  # the parameter itself: another module may be tied to it
        if first is not None:
            new.set_cores(first.cores)
        first = first or new
        for core in new.cores:
            core.requires_grad_(trainable)
        made[id(module)] = new
    return [made[id(module)] for module in target.modules], result.error
