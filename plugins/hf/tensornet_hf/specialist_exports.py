"""Take specialists elsewhere: one as a LoRA adapter or as a model, or all as a mixture of experts."""

import copy
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME

from tensornet._util import check_size
from tensornet.compression.apply import set_submodule
from tensornet.errors import BudgetError, TargetError
from tensornet.nn.layer_kinds import kind_of
from tensornet_hf.checkpoint import decompress, save
from tensornet_hf.exporters.adapters import export_peft_adapter
from tensornet_hf.exporters.base import GGUF, LowRank
from tensornet_hf.exporters.target import EXPORT_TARGETS, export, find_target
from tensornet_hf.feed_forwards import find_feed_forwards
from tensornet_hf.upcycling import UpcycleReport, upcycle
from tensornet_moe import LowRankDeltaExperts, SharedCoreMoE, Specialists
from tensornet_moe.changed_layers import changes_of

#: Target for LoRA adapters only; whole models cannot be exported to it.
PEFT = "peft"


def adapter_targets() -> dict[str, Callable[..., None]]:
    """Map the name of each target for LoRA adapters to the function that writes an adapter for it.

    The targets are PEFT, and all export targets that define such a function (`ExportTarget.adapter`).
    """
    found = {name: target.adapter for name, target in EXPORT_TARGETS.items() if target.adapter is not None}
    return {PEFT: export_peft_adapter, **found}


@torch.no_grad()
def export_specialist(
    specialists: Specialists,
    name: str,
    destination: str | os.PathLike[str],
    *,
    target: str | None = None,
    rank: int | None = None,
    source: str | os.PathLike[str] | None = None,
    force: bool = False,
) -> Path:
    """Write one specialist as a LoRA adapter; see `PretrainedSpecialists.export`."""
    path = Path(destination).expanduser().absolute()
    name_of_target = target or ("gguf" if path.suffix == GGUF else PEFT)
    write = adapter_targets().get(name_of_target)
    if write is None:
        known = ", ".join(adapter_targets())
        raise ValueError(f"Unknown target={target!r} of adapters; choose one of {known}.")
    low_ranks = _low_ranks(specialists, [name], rank)[name]
    trunk: Any = specialists.model
    plain = copy.deepcopy(trunk, {id(x): x for x in (*trunk.parameters(), *trunk.buffers())})
    Specialists(plain).detach()
    write(plain, low_ranks, path, source=None if source is None else Path(source), force=force)
    return path


@torch.no_grad()
def unpack_specialist(
    specialists: Specialists,
    name: str,
    destination: str | os.PathLike[str],
    *,
    target: str | None = None,
    source: str | os.PathLike[str] | None = None,
    force: bool = False,
) -> Path:
    """Write one specialist as a dense model; see `PretrainedSpecialists.unpack`."""
    target = find_target(destination, target)
    model = _alone(specialists, name)
    place = source or getattr(model.config, "name_or_path", None)
    folder = Path(place) if place and Path(place).is_dir() else None
    if folder is not None and (folder / GENERATION_CONFIG_NAME).is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    if target is None:
        save(model, destination, source=folder, force=force)
    else:
        export(model, destination, target=target, source=folder, force=force)
    return Path(destination)


def _alone(specialists: Specialists, name: str) -> Any:
    """Build a dense copy of the trunk with the weights of one specialist."""
    specialists.tensors(name)  # raises an error if the name is unknown
    model: Any = copy.deepcopy(specialists.model)
    copied = Specialists(model)
    layers, changes = copied.layers, changes_of(copied).get(name, {})
    copied.detach()
    decompress(model)
    for layer, change in changes.items():
        for key, value in change.values.items():
            getattr(model.get_submodule(layer), key).copy_(value)
    done: set[int] = set()  # of tied weights
    for layer, part in layers.items():
        dense = model.get_submodule(layer)
        kind, moved = kind_of(dense), part.change(name)
        if moved is not None and kind is not None and id(dense.weight) not in done:
            done.add(id(dense.weight))
            matrix = kind.matrix(dense)
            matrix.copy_((matrix.float() + moved.to(matrix.device).float()).to(matrix.dtype))
    return model


def _low_ranks(
    specialists: Specialists, names: Sequence[str], rank: int | None = None
) -> dict[str, dict[str, LowRank]]:
    """Return the changes of specialists by name and layer, as products of two matrices in float32.

    Args:
        specialists: the specialists.
        names: those whose changes are wanted.
        rank: largest rank, to which changes are truncated; None for exact changes.

    Raises:
        TargetError: an unknown name, or changes that are not of low rank.
    """
    if rank is not None:
        check_size("rank", rank, error=BudgetError)
    found: dict[str, dict[str, LowRank]] = {}
    for name in names:
        specialists.tensors(name)  # raises an error if the name is unknown
        found[name] = {}
        for layer_name, layer in specialists.layers.items():
            try:
                factors = layer.factors(name, rank)
            except TargetError as error:
                raise TargetError(f"{name!r}, layer {layer_name}: {error}") from None
            if factors is not None:
                left, right = (x.detach().float().cpu() for x in factors)
                found[name][layer_name] = LowRank(left, right)
    return found


@torch.no_grad()
def merge_specialists(
    specialists: Specialists, names: Sequence[str] | None = None, **options: Any
) -> UpcycleReport:
    """Make specialists the experts of mixtures; see `PretrainedSpecialists.merge`."""
    model, chosen, layers = specialists.model, list(names or specialists.names), dict(specialists.layers)
    low_ranks = _low_ranks(specialists, chosen)
    if len(chosen) < 2:
        raise TargetError(f"A mixture needs at least two specialists; there are {chosen or 'none'}.")
    rank = max(low_rank.rank for each in low_ranks.values() for low_rank in each.values())
    for name, layer in layers.items():
        set_submodule(model, name, layer.base_layer)
    try:
        networks = find_feed_forwards(model)
        places = {f"{x.names[0]}.{path}": (x, k) for x in networks for k, path in enumerate(x.paths)}
        if outside := [name for name in layers if name not in places]:
            raise TargetError(
                f"{len(outside)} of the layers with specialists, such as {outside[0]}, are not in dense "
                "feed-forward networks, which are all that a mixture replaces. Train specialists of these "
                f"only: target_modules={sorted({path for x in networks for path in x.paths})}."
            )
        touched = {places[name][0].names[0]: places[name][0] for name in layers}
        words = {"experts": len(chosen), "share": "base", "rank": rank, "target_modules": list(touched)}
        report = upcycle(model, **{"top_k": 1, **options, **words})
    except Exception:
        for name, layer in layers.items():
            set_submodule(model, name, layer)
        raise
    for network_name, network in touched.items():
        path = network_name if network.inside is None else f"{network_name}.{network.inside[0]}"
        mixture = model.get_submodule(path)
        assert isinstance(mixture, SharedCoreMoE)
        experts: Any = mixture.experts
        for matrix, layer_path in zip(network.matrices, network.paths, strict=True):
            bank = experts.bank(matrix)
            assert isinstance(bank, LowRankDeltaExperts)
            bank.left.zero_()
            for expert, name in enumerate(chosen):
                low_rank = low_ranks[name].get(f"{network_name}.{layer_path}")
                if low_rank is not None:
                    bank.left[expert, :, : low_rank.rank] = low_rank.left.to(bank.left)
                    bank.right[expert, : low_rank.rank] = low_rank.right.to(bank.right)
    specialists.detach()
    model.requires_grad_(True)
    return report
