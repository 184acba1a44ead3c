"""Open a model folder lazily, as a transformers model with memory-mapped weights.

The operating system only loads the pages of the files that are accessed, so the model may be larger than
memory. It can be planned, calibrated and compressed by the usual functions.
"""

import mmap
import re
import tempfile
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from tensornet.errors import FormatError
from tensornet.io import FLOATS, MAPPED, Slice, contents, load_slice
from tensornet_hf.checkpoint import Checkpoint, empty_model, read_dense

_COUNT = re.compile(r"(^|_)(num|n)_(\w+_)?(layers?|blocks?|experts?|heads?|groups?)($|_)|^n_(layer|head)$")
_SIZES = ("_size", "_dim", "d_model", "d_ff", "n_embd", "n_positions", "n_inner")
#: Largest allowed value of a size in a configuration; real values are far smaller.
_LARGEST = 2**31


@dataclass(frozen=True)
class LazyModel:
    """A model whose weights are memory-mapped from the files of its folder.

    Args:
        model: the model in eval mode. Weights are on the meta device if they cannot be mapped because
            transformers converts the stored tensors when it loads the model.
        stored: for each parameter and buffer, the names of its stored tensors. There are several for a stack
            of experts and for other conversions.
        renamed: names of parameters and buffers that are stored as a single tensor of the same shape,
            possibly under another name.
        surplus: names of stored tensors that the model does not have.
    """

    model: PreTrainedModel
    stored: Mapping[str, tuple[str, ...]]
    renamed: frozenset[str]
    surplus: tuple[str, ...]


def open_lazily(
    source: Checkpoint, *, only: Collection[str] | None = None, spill: str | Path | None = None
) -> LazyModel:
    """Build the model of a folder, with weights memory-mapped from the folder's files in the stored dtype.

    Layers, ties and names are those of the model that transformers loads, since the class is the same.
    Code in the folder is never run. In-place changes of a mapped weight do not change the file.

    Args:
        source: contents of the folder of a dense model, from `read_dense`.
        only: names of the parameters and buffers to map; the others stay on the meta device. None maps all.
        spill: folder for temporary files, which are deleted with the model. If the matrices of experts are
            stored one by one, such a file contains their stack. None uses the system's temporary folder.

    Raises:
        FormatError: transformers does not have the model's class, or the configuration is invalid or
            contradicts the stored tensors.
    """
    check_values(source.config, tensors=len(source.tensors))
    model = empty_model(source)
    state = model.state_dict(keep_vars=True)
    transforms = get_model_conversion_mapping(model)
    renamings = [x for x in transforms if isinstance(x, WeightRenaming)]
    converters = [x for x in transforms if isinstance(x, WeightConverter)]
    renamed: dict[str, str] = {}
    stacked: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for key in sorted(source.tensors, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        if pattern is not None:
            stacked[name][pattern].append(key)
        elif name in renamed:
            raise FormatError(
                f"{renamed[name]!r} and {key!r} are both stored, although they are the same parameter."
            )
        else:
            renamed[name] = key

    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name in renamed:
            parts = [source.tensors[renamed[name]]]
            if tuple(tensor.shape) != parts[0].shape:
                raise _contradiction(name, tensor.shape, parts[0].shape)
        elif name in stacked:
            parts = _stack_parts(name, tensor, stacked[name], converters, source.tensors)
        else:
            continue
        of_weights = isinstance(tensor, nn.Parameter)
        if not parts or parts[0].dtype not in (FLOATS if of_weights else MAPPED):
            continue
        if of_weights:
            tensor.data = tensor.data.to(FLOATS[parts[0].dtype])
        if only is None or name in only:
            found[name] = load_slice(parts[0]) if name in renamed else _joined(parts, tensor.shape, spill)
    _untie_different(model, {name: source.tensors[key] for name, key in renamed.items()})
    _put_in_place(model, found)
    stored: dict[str, tuple[str, ...]] = {name: (key,) for name, key in renamed.items() if name in state}
    stored |= {name: tuple(chain(*by_pattern.values())) for name, by_pattern in stacked.items()}
    surplus = tuple(key for name, key in renamed.items() if name not in state)
    return LazyModel(model.eval(), stored, frozenset(renamed) & state.keys(), surplus)


def mapped_model(folder: str | Path, *, spill: str | Path | None = None) -> PreTrainedModel:
    """Build the model of a folder with memory-mapped weights, ready to run.

    If the model is larger than memory, it runs at the speed of the disk.

    Args:
        folder: folder of the model.
        spill: see `open_lazily`.

    Raises:
        FormatError: the folder is invalid (see `read_dense` and `open_lazily`), or a weight cannot be mapped
            because transformers converts the stored tensor when it loads the model.
        TargetError: the model is compressed already.
    """
    model = open_lazily(read_dense(folder), spill=spill).model
    if absent := [name for name, parameter in model.named_parameters() if parameter.is_meta]:
        raise FormatError(
            f"{folder} stores {absent[0]} in another form than the model uses, so the weight cannot be "
            "mapped. Load the model and use tensornet.compress."
        )
    for module in model.modules():
        for key, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_meta:
                setattr(module, key, torch.empty_like(buffer, device="cpu"))
    model.initialize_weights()  # computes buffers that are not stored, such as rotary frequencies
    return model


def check_values(config: Mapping[str, Any], *, tensors: int) -> None:
    """Raise FormatError for sizes so large that even an empty model could not be built.

    Args:
        config: the configuration, possibly nested.
        tensors: number of stored tensors. Numbers of layers, experts and heads may be at most four times this
            number, or 1,024 if that is more.
    """
    open_entries: list[tuple[str, Any]] = list(config.items())
    while open_entries:
        key, value = open_entries.pop()
        if isinstance(value, Mapping):
            open_entries += [(f"{key}.{inner}", entry) for inner, entry in value.items()]
        elif isinstance(value, list):
            open_entries += [(key, entry) for entry in value]
        elif isinstance(value, int) and not isinstance(value, bool):
            leaf = key.rpartition(".")[2]
            counts = _COUNT.search(leaf) is not None
            limit = max(1024, 4 * tensors) if counts else _LARGEST
            if abs(value) > limit or (value < 0 and (counts or leaf.endswith(_SIZES))):
                raise FormatError(
                    f"config.json sets {key} to {value!r:.40}, but for a checkpoint of {tensors} tensors it "
                    f"must be from 0 to {limit}. The file is damaged or malicious."
                )


def _stack_parts(
    name: str,
    stack: Tensor,
    by_pattern: Mapping[str, Sequence[str]],
    converters: Sequence[WeightConverter],
    tensors: Mapping[str, Slice],
) -> list[Slice]:
    """List the stored matrices whose bytes, concatenated in this order, are a stack of experts.

    Returns:
        The headers; empty if loading does more than joining the matrices of each expert by rows and stacking
        the experts.

    Raises:
        FormatError: the number or the sizes of the stored matrices contradict the configuration.
    """
    using = next(x for x in converters if by_pattern.keys() <= set(x.source_patterns))
    match using.operations:
        case [MergeModulelist(dim=0)] if len(using.source_patterns) == 1:
            pass
        case [MergeModulelist(dim=0), Concatenate(dim=1)]:
            pass
        case _:
            return []
    columns = [by_pattern.get(pattern, ()) for pattern in using.source_patterns]
    if stack.ndim != 3 or any(len(x) != stack.shape[0] for x in columns):
        raise FormatError(
            f"config.json describes {stack.shape[0]} experts in {name}, but {min(map(len, columns))} are "
            "stored. Files are missing, or belong to another model."
        )
    parts = []
    for number, expert in enumerate(zip(*columns, strict=True)):
        matrices = [tensors[key] for key in expert]
        rows, width = sum(x.shape[0] for x in matrices), matrices[0].shape[1:]
        if any(x.shape[1:] != width for x in matrices) or (rows, *width) != tuple(stack.shape[1:]):
            path, _, leaf = name.rpartition(".")
            raise _contradiction(f"{path}.{number}.{leaf}", stack.shape[1:], (rows, *width))
        parts += matrices
    return parts if len({x.dtype for x in parts}) == 1 else []


def _contradiction(name: str, described: Sequence[int], stored: Sequence[int]) -> FormatError:
    return FormatError(
        f"config.json describes {name} with shape {list(described)}, but it is stored with shape "
        f"{list(stored)}. Either config.json or the weight file belongs to another model."
    )


def _joined(parts: Sequence[Slice], shape: torch.Size, spill: str | Path | None) -> Tensor:
    """Write the bytes of stored matrices to a temporary file in `spill`, and memory-map it as a tensor."""
    with tempfile.TemporaryFile(dir=spill) as file:
        for chunk in contents(parts):
            file.write(chunk)
        file.flush()
        mapped = mmap.mmap(file.fileno(), sum(part.nbytes for part in parts), access=mmap.ACCESS_COPY)
    return torch.frombuffer(mapped, dtype=FLOATS[parts[0].dtype]).reshape(shape)


def _untie_different(model: PreTrainedModel, stored: Mapping[str, Slice]) -> None:
    """Untie layers whose stored weights differ (T5 v1.1), as `from_pretrained` does."""
    for target, source in model.all_tied_weights_keys.items():
        if target in stored and source in stored and not _equal(stored[target], stored[source]):
            path, _, name = target.rpartition(".")
            own = torch.empty_like(model.get_parameter(target))
            setattr(model.get_submodule(path), name, nn.Parameter(own))


def _equal(first: Slice, second: Slice) -> bool:
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    return all(a == b for a, b in zip(contents([first]), contents([second]), strict=True))


def _put_in_place(model: PreTrainedModel, found: Mapping[str, Tensor]) -> None:
    """Replace parameters and buffers of a model by mapped tensors, given by name; ties are kept."""
    made: dict[int, nn.Parameter] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in found and id(parameter) not in made:
            made[id(parameter)] = nn.Parameter(found[name], requires_grad=False)
    for name, tensor in _named_tensors(model):
        new = made.get(id(tensor), found.get(name)) if isinstance(tensor, nn.Parameter) else found.get(name)
        if new is not None:
            new._is_hf_initialized = True  # type: ignore[attr-defined]  # so initialize_weights skips it
            path, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(path), leaf, new)


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from list(model.named_parameters(remove_duplicate=False))
    yield from list(model.named_buffers(remove_duplicate=False))
