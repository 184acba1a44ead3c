"""Convert the targets of a skeleton to tasks: the stored weight of each, and the modules that use it."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from tensornet.compression import CompressionConfig, CompressionPlan
from tensornet.compression.shared_stacks import stacks_of_experts
from tensornet.errors import TargetError
from tensornet.io import FLOATS, Slice, contents
from tensornet.nn.layer_kinds import layer_bias
from tensornet.nn.targets import Target, all_targets, find_targets
from tensornet.streaming.stored_matrix import StoredMatrix
from tensornet.streaming.worker import PieceTask, StackTask, Use


def find_tasks(
    skeleton: PreTrainedModel,
    stored: Mapping[str, Slice],
    experts: Mapping[str, StoredMatrix],
    config: CompressionConfig,
    plan: CompressionPlan | None,
    stats: Path | None,
    *,
    device: str,
    folder: Path,
) -> dict[str, PieceTask]:
    """Create a task for each weight to compress, by the name of its layer.

    Args:
        skeleton: the model on the meta device.
        stored: where its parameters lie, by their names in the skeleton.
        experts: where the matrices of its experts lie, by the names of their layers.
        config: options of the compression.
        plan: to carry out, instead of planning; layers it does not name stay dense.
        stats: file of the statistics that the plan was made with.
        device: where to compute.
        folder: where the pieces are written.

    Raises:
        TargetError: a pattern matches nothing, the plan names no layer of this model, or a weight is stored
            in another form than its layer's.
    """
    untie_different(skeleton, stored)
    targets = [x for x in find_targets(skeleton, config) if not x.skip]
    if plan is not None:
        targets = _planned(all_targets(skeleton), plan)
    tasks = {}
    for index, target in enumerate(targets):
        weight = experts.get(target.name) or _stored_weight(target, stored)
        path = folder / f"{index:06d}.safetensors"
        planned = replace(plan, layers=(plan[target.name],)) if plan is not None else None
        tasks[target.name] = PieceTask(_uses(target), weight, config, planned, stats, device, path)
    return tasks


def find_stack_tasks(
    skeleton: PreTrainedModel,
    tasks: Mapping[str, PieceTask],
    config: CompressionConfig,
    plan: CompressionPlan | None,
) -> dict[str, StackTask]:
    """Join the tasks of experts that may share a core, by the name of the first layer.

    With a plan these are the layers that it lets share one, else all experts of every stack.

    Args:
        skeleton: the model on the meta device.
        tasks: of single layers, from `find_tasks`.
        config: options of the compression.
        plan: to carry out, instead of planning.

    Raises:
        TargetError: cores are to be shared, and there is no stack of experts.
    """
    found: dict[str, list[str]] = {}
    if plan is not None:
        for layer in plan:
            if layer.shared_core:
                found.setdefault(layer.shared_with, []).append(layer.name)
    elif config.share_experts:
        targets = [x for x in find_targets(skeleton, config) if not x.skip]
        for members in stacks_of_experts(targets):
            names = [targets[place].name for place in members]
            found[names[0]] = names
    stacks = {}
    for first, names in found.items():
        planned = None if plan is None else replace(plan, layers=tuple(plan[name] for name in names))
        stacks[first] = StackTask(tuple(tasks[name] for name in names), planned)
    return stacks


def untie_different(skeleton: PreTrainedModel, stored: Mapping[str, Slice]) -> None:
    """Untie tied layers whose stored weights differ.

    A configuration may claim a tie that the weights do not have (T5 v1.1); loading decides as we do here.
    """
    for target, source in skeleton.all_tied_weights_keys.items():
        if target in stored and source in stored and not _equal(stored[target], stored[source]):
            path, _, name = target.rpartition(".")
            own = torch.empty_like(skeleton.get_parameter(target))
            setattr(skeleton.get_submodule(path), name, nn.Parameter(own))


def _planned(targets: list[Target], plan: CompressionPlan) -> list[Target]:
    known = {target.name: target for target in targets}
    for layer in plan:
        target = known.get(layer.name)
        if target is None:
            raise TargetError(f"The plan names a layer {layer.name!r} that this checkpoint does not have.")
        if tuple(target.matrix.shape) != layer.shape:
            raise TargetError(
                f"The plan was made for {layer.name!r} of shape {layer.shape}, this checkpoint has shape "
                f"{tuple(target.matrix.shape)} there."
            )
    return [known[layer.name] for layer in plan]


def _uses(target: Target) -> tuple[Use, ...]:
    return tuple(
        Use(
            name,
            kind.name,
            type(kind).__module__,
            layer_bias(module) is not None,
            getattr(module, "padding_idx", None),
        )
        for name, module, kind in zip(target.names, target.modules, target.kinds, strict=True)
    )


def _stored_weight(target: Target, stored: Mapping[str, Slice]) -> StoredMatrix:
    found = [stored[name] for use in target.names if (name := f"{use}.weight") in stored]
    if not found:
        raise TargetError(
            f"The weight of {target.name!r} is not stored under its own name: this checkpoint keeps it in "
            f"another form, or lacks it. Exclude the layer (exclude_modules=[{target.name!r}]), or load the "
            "model and use tensornet.compress."
        )
    if found[0].dtype not in FLOATS:
        raise TargetError(
            f"The weight of {target.name!r} is stored as {found[0].dtype}; weights of dtype "
            f"{', '.join(FLOATS)} can be compressed. Use the model before quantization, or exclude the layer."
        )
    return StoredMatrix((found[0],), transposed=target.kinds[0].name == "conv1d")


def _equal(first: Slice, second: Slice) -> bool:
    chunks = zip(contents([first]), contents([second]), strict=True)
    return (first.dtype, first.shape) == (second.dtype, second.shape) and all(a == b for a, b in chunks)
