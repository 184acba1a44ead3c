"""Banks of experts of every network: one bank for each matrix, or shared cores across layers."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tensornet._util import progress_bar
from tensornet.errors import BudgetError, NonFiniteError, ShapeError, TargetError, TopologyError
from tensornet.topologies import topology_family
from tensornet.topologies.registry import topology_of_shape
from tensornet.topology import Topology
from tensornet_hf.moe.feed_forward import FeedForward
from tensornet_hf.moe.upcycle_config import MoEConfig
from tensornet_moe import SharedCoreExperts, SharedCores, share_across_layers

#: Attribute of a model that holds the cores its layers share.
OWNERS = "shared_cores"


def alone(
    network: FeedForward, config: MoEConfig, seed: int, made: Mapping[str, SharedCoreExperts]
) -> dict[str, SharedCoreExperts]:
    """Return the banks of one network by name, built unless another layer shares them."""
    banks = dict(made)
    for position, name in enumerate(network.matrices):
        if name in made:
            continue
        with _errors_name(f"{network.name}.{name}"):
            banks[name] = SharedCoreExperts.from_dense(
                network.matrix(name),
                num_experts=config.num_experts,
                topology=_topology(config, network.matrix(name), name),
                shared=config.shared,
                noise=config.noise,
                seed=seed * 3 + position,
                max_bond=config.max_bond,
                rel_error=config.rel_error,
                param_ratio=config.param_ratio,
                **_family_options(config, is_down=name == network.matrices[-1]),
            )
    return {name: banks[name] for name in network.matrices}


def across_layers(
    networks: Sequence[FeedForward], config: MoEConfig, place: nn.Module | None, *, progress: bool = False
) -> tuple[list[SharedCores], list[dict[str, SharedCoreExperts]]]:
    """Build banks whose shared cores serve all layers with a matrix of the same name and shape.

    Args:
        networks: of the model.
        config: what to make of them.
        place: see `owner_place`; None shares nothing across layers.
        progress: show a progress bar.

    Returns:
        Owners of the shared cores, and for each network its banks by name. A matrix that no other layer
        matches has no bank among them.

    Raises:
        TargetError: layers that would share lie on different devices.
    """
    owners: list[SharedCores] = []
    made: list[dict[str, SharedCoreExperts]] = [{} for _ in networks]
    groups = [] if place is None else _groups(networks)
    for group in progress_bar(groups, desc="fitting layers jointly", disable=not progress, unit="matrix"):
        weights = [networks[index].matrix(group.name) for index in group.networks]
        if len(devices := {str(w.device) for w in weights}) > 1:
            raise TargetError(
                f"share_across_layers=True keeps the cores that layers share in one place, and {group.name} "
                f"of these layers lies on {', '.join(sorted(devices))}: put the model on one device, or "
                "share within each layer alone."
            )
        label = _free_label(place, owners, group)
        with _errors_name(f"{group.name} of {len(weights)} layers"):
            owner, banks = share_across_layers(
                torch.stack([w.to(weights[0]) for w in weights]),
                num_experts=config.num_experts,
                label=label,
                topology=_topology(config, weights[0], group.name),
                shared=config.shared,
                noise=config.noise,
                seed=config.seed,
                max_bond=config.max_bond,
                **_family_options(config, is_down=group.is_down),
            )
        owners.append(owner)
        for index, bank in zip(group.networks, banks, strict=True):
            made[index][group.name] = bank
    return owners, made


def owner_place(model: nn.Module) -> nn.Module:
    """Return the module that owns shared cores: the base model, with or without a head.

    Raises:
        TargetError: the model is a bare container, which would run the owner as one of its layers.
    """
    place = model.base_model if isinstance(model, PreTrainedModel) else model
    if isinstance(place, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        raise TargetError(
            f"share_across_layers=True needs a place for the shared cores, and a {type(place).__name__} "
            "would take them for a layer. Put it into a module of its own, and upcycle that."
        )
    return place


def put_owners(place: nn.Module, owners: Mapping[str, nn.Module]) -> None:
    """Register the owners of shared cores, by label, in the module of `owner_place`."""
    if owners and OWNERS not in place._modules:
        place.add_module(OWNERS, nn.ModuleDict())
    for label, owner in owners.items():
        place.get_submodule(OWNERS).add_module(label, owner)


def make_room(model: PreTrainedModel, layers: Iterable[str]) -> None:
    """Add empty owners of shared cores where a saved model had them, since no transformers class builds them.

    Args:
        model: a skeleton.
        layers: names of described modules in the model that was saved.
    """
    for layer in layers:
        parent, _, label = layer.rpartition(".")
        if parent.rpartition(".")[2] == OWNERS:
            put_owners(model.base_model, {label: nn.Module()})


@dataclass(frozen=True)
class _Group:
    """Matrices of one name and shape.

    Args:
        name: of the matrix.
        shape: `(out, in)`.
        is_down: whether it maps back to the width of the model.
        networks: positions of its networks.
    """

    name: str
    shape: tuple[int, int]
    is_down: bool
    networks: tuple[int, ...]


def _groups(networks: Sequence[FeedForward]) -> list[_Group]:
    found: dict[tuple[str, tuple[int, int], bool], list[int]] = {}
    for index, network in enumerate(networks):
        for name in network.matrices:
            rows, columns = network.matrix(name).shape
            found.setdefault((name, (rows, columns), name == network.matrices[-1]), []).append(index)
    return [_Group(*key, tuple(where)) for key, where in found.items() if len(where) > 1]


def _free_label(place: nn.Module | None, owners: Sequence[SharedCores], group: _Group) -> str:
    taken = {owner.label for owner in owners} | set(getattr(place, OWNERS, {}))
    label = f"{group.name}_{group.shape[0]}x{group.shape[1]}"
    return next(x for x in (label, *(f"{label}_{k}" for k in range(2, len(taken) + 3))) if x not in taken)


@contextmanager
def _errors_name(what: str) -> Iterator[None]:
    try:
        yield
    except (BudgetError, NonFiniteError, ShapeError, TopologyError) as error:
        raise type(error)(f"{what}: {error}") from error


def _topology(config: MoEConfig, matrix: Tensor, name: str) -> Topology | str:
    """Select the topology for one matrix, or the family that chooses it."""
    if config.fixed:
        return topology_of_shape(config.fixed, (matrix.shape[0], matrix.shape[1]), name)
    assert isinstance(config.topology, str)
    return config.topology


def _family_options(config: MoEConfig, *, is_down: bool) -> dict[str, Any]:
    """Select the options of the family for one matrix; invalid dims pass, so that the family raises."""
    if config.fixed:
        return {}
    assert isinstance(config.topology, str)
    family = topology_family(config.topology)
    dims = (config.model_dims, config.hidden_dims)
    options: dict[str, Any] = {"sites": config.sites}
    if {"out_dims", "in_dims"} <= set(family.options):
        options["out_dims"], options["in_dims"] = dims if is_down else dims[::-1]
    else:
        options["model_dims"], options["hidden_dims"] = dims
    if config.sites is None and all(d is None for d in dims):
        options |= family.mixture_options
    return {key: value for key, value in options.items() if value is not None}
