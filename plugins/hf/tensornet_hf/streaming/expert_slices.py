"""Locate the single matrices of modules that own several, such as experts, in a checkpoint.

A checkpoint holds the matrices of a mixture as the stacks `(experts, ...)` of the model, so that every expert
is a stretch of bytes; or one by one under other names (`experts.3.w1.weight`), which loading joins and
stacks. Either way a matrix is a few slices of files, and no stack is ever read.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    dot_natural_key,
)

from tensornet.errors import FormatError
from tensornet.io import FLOATS, Slice
from tensornet.nn.layer_kinds import compound_of
from tensornet.nn.unfuse import Compound, Stack, unfuse
from tensornet.streaming.stored_matrix import StoredMatrix
from tensornet_hf.streaming.skeleton import as_loaded


@dataclass(frozen=True)
class ExpertSource:
    """Locations of the matrices of modules that own several.

    Args:
        matrices: by the name of the layer, such as `layers.0.mlp.experts.3.down_proj`.
        layers: `{stored name: layers that take something of it}`.
        modules: the module that was taken apart, by the name of the layer.
    """

    matrices: Mapping[str, StoredMatrix]
    layers: Mapping[str, tuple[str, ...]]
    modules: Mapping[str, str]


def take_experts_apart(
    skeleton: PreTrainedModel, tensors: Mapping[str, Slice], stored: Mapping[str, str]
) -> ExpertSource:
    """Split modules in place whose matrices can be located in the checkpoint.

    Those whose parameters another module has as well stay whole.

    Args:
        skeleton: the model on the meta device.
        tensors: the stored tensors.
        stored: `{parameter of the skeleton: stored name}` of those that are stored as they are.

    Raises:
        FormatError: a mixture has another size than `config.json` says.
    """
    joined = _joined_when_loaded(skeleton, tensors)
    matrices: dict[str, StoredMatrix] = {}
    keys: dict[str, tuple[str, ...]] = {}
    modules: dict[str, str] = {}
    users = Counter(id(p) for _, p in skeleton.named_parameters(remove_duplicate=False))
    for name, module in skeleton.named_modules():
        kind = compound_of(module)
        if kind is None or not name or any(users[id(p)] > 1 for p in module.parameters()):
            continue
        compound = kind.unfuse(module, {})
        assert isinstance(compound, Compound)
        found = [
            (stack, _of_stack(f"{name}.{stack.parameter}", stack, tensors, stored, joined))
            for stack in compound.stacks
        ]
        for stack, parts in found if all(parts for _, parts in found) else ():
            for layer, (matrix, names) in zip(stack.names, parts or (), strict=True):
                matrices[f"{name}.{layer}"], keys[f"{name}.{layer}"] = matrix, names
                modules[f"{name}.{layer}"] = name
    unfuse(skeleton, inside=matrices)
    for layer, matrix in matrices.items():
        target = skeleton.get_submodule(layer).get_parameter("matrix")
        if tuple(target.shape) != matrix.shape:
            raise FormatError(
                f"config.json describes {layer} with shape {list(target.shape)}, it is stored with shape "
                f"{list(matrix.shape)}. One of the two belongs to another model."
            )
        target.data = target.data.to(FLOATS[matrix.dtype])
    return ExpertSource(matrices, _users(keys), modules)


_Found = list[tuple[StoredMatrix, tuple[str, ...]]]


def _of_stack(
    name: str,
    stack: Stack,
    tensors: Mapping[str, Slice],
    stored: Mapping[str, str],
    joined: Mapping[str, list[tuple[str, ...]]],
) -> _Found | None:
    """Return matrix and stored names of every layer of one stack; None if it is stored in an unknown form."""
    transposed = stack.transposed
    whole = tensors.get(stored.get(name, ""))
    if whole is not None:
        parts = _stretches(whole, len(stack.names), stack.columns)
        return [(StoredMatrix((x,), transposed), (stored[name],)) for x in parts]
    experts = joined.get(name, [])
    if experts and len(experts) != len(stack.names):
        raise FormatError(
            f"config.json describes {len(stack.names)} experts in {name}, {len(experts)} are stored: files "
            "are missing, or belong to another model."
        )
    joint = [tuple(tensors[key] for key in keys) for keys in experts]
    if not joint or not all(_can_join(slices) for slices in joint):
        return None
    return [(StoredMatrix(x, transposed), keys) for x, keys in zip(joint, experts, strict=True)]


def _stretches(whole: Slice, count: int, columns: int) -> list[Slice]:
    """Split a floating-point tensor into equal matrices `(rows, columns)`; empty for other dtypes."""
    size = whole.nbytes // count
    if whole.dtype not in FLOATS or not size:
        return []
    shape = (whole.numel // (count * columns), columns)
    return [
        replace(whole, shape=shape, start=start, stop=start + size)
        for start in range(whole.start, whole.stop, size)
    ]


def _can_join(slices: tuple[Slice, ...]) -> bool:
    first = slices[0]
    fits = all(len(x.shape) == 2 and (x.dtype, x.shape[1:]) == (first.dtype, first.shape[1:]) for x in slices)
    return fits and first.dtype in FLOATS


def _joined_when_loaded(model: PreTrainedModel, tensors: Iterable[str]) -> dict[str, list[tuple[str, ...]]]:
    """Return `{stack: stored names of the parts of each expert}`, as transformers collects them."""
    collected: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for key, name, pattern in as_loaded(model, sorted(tensors, key=dot_natural_key)):
        if pattern is not None:
            collected[name][pattern].append(key)
    converters = [x for x in get_model_conversion_mapping(model) if isinstance(x, WeightConverter)]
    found = {}
    for name, by_pattern in collected.items():
        using = next(x for x in converters if by_pattern.keys() <= set(x.source_patterns))
        parts = [by_pattern[pattern] for pattern in using.source_patterns if pattern in by_pattern]
        complete = len(parts) == len(using.source_patterns) and len({len(x) for x in parts}) == 1
        if complete and _stacks(using):
            found[name] = list(zip(*parts, strict=True))
    return found


def _stacks(converter: WeightConverter) -> bool:
    """Return True if a converter stacks experts, each of one matrix or of several concatenated ones."""
    match converter.operations:
        case [MergeModulelist(dim=0)]:
            return len(converter.source_patterns) == 1
        case [MergeModulelist(dim=0), Concatenate(dim=1)]:
            return True
    return False


def _users(keys: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    users: dict[str, list[str]] = defaultdict(list)
    for layer, names in keys.items():
        for name in names:
            users[name].append(layer)
    return {name: tuple(layers) for name, layers in users.items()}
