"""Open a model folder lazily: a transformers model whose weights are in memory only while they are needed.

A weight that is stored as it is used is memory-mapped, so that the operating system loads the pages that are
accessed. Other weights are on the meta device: matrices of experts that are stored one by one, and weights
that are permuted in the file. `LazyModel.loaded` reads the weights of some modules, such as those of a block,
from the files.
"""

import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
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

from tensornet.calibration.walk import Loaded, walk_dtype
from tensornet.errors import FormatError
from tensornet.io import FLOATS, MAPPED, Slice, contents, load_slice, read_slices
from tensornet.nn.unfuse import Compound
from tensornet_hf.checkpoint import Change, Checkpoint, empty_model, read_dense
from tensornet_hf.gguf_source import read_gguf

_COUNT = re.compile(r"(^|_)(num|n)_(\w+_)?(layers?|blocks?|experts?|heads?|groups?)($|_)|^n_(layer|head)$")
_SIZES = ("_size", "_dim", "d_model", "d_ff", "n_embd", "n_positions", "n_inner")
#: Largest allowed value of a size in a configuration; real values are far smaller.
_LARGEST = 2**31


@dataclass(frozen=True)
class Origin:
    """The stored tensors that contain the values of a parameter or buffer.

    Args:
        parts: stored tensors whose elements, one after the other, are those of the parameter.
        change: how the parameter follows from the stored tensor, if they differ; there is then a single part.
    """

    parts: tuple[Slice, ...]
    change: Change | None = None

    @property
    def dtype(self) -> str:
        """Dtype of the values, as named in the header of a safetensors file."""
        return self.parts[0].dtype if self.change is None else self.change.dtype

    def read(self, number: int = 0, count: int = 1) -> Tensor:
        """Read the elements, or one of `count` equal pieces of them, as a flat tensor in the stored dtype.

        Raises:
            FormatError: a file was truncated, or the dtype cannot be read.
        """
        if self.change is not None:
            whole = read_slices(self.parts).reshape(self.parts[0].shape)
            return self.change.function(whole).flatten().chunk(count)[number]
        size = sum(part.nbytes for part in self.parts) // count
        first, pieces = number * size, []  # `first` counts bytes from the start of the current part
        for part in self.parts:
            start, stop = max(first, 0), min(first + size, part.nbytes)
            if start < stop:
                width = MAPPED[part.dtype].itemsize if part.dtype in MAPPED else 1
                shape = ((stop - start) // width,)
                pieces.append(Slice(part.file, part.dtype, shape, part.start + start, part.start + stop))
            first -= part.nbytes
        return read_slices(pieces or self.parts[:1])

    def contents(self) -> Iterator[bytes]:
        """Yield the bytes of the parameter, in chunks, without loading a tensor that is stored unchanged.

        Raises:
            FormatError: a file was truncated.
        """
        if self.change is None:
            yield from contents(self.parts)
        else:
            yield self.read().view(torch.uint8).numpy().tobytes()


@dataclass(frozen=True, eq=False)
class LazyModel:
    """Model of a folder that reads its weights only when they are needed.

    Args:
        model: the model in eval mode. A weight that cannot be mapped is on the meta device.
        origins: where each parameter and buffer is stored, by name. Tensors that transformers converts in
            other ways than joining them have none.
        others: stored tensors that are converted in such ways, by their stored name.
        surplus: names of stored tensors that the model does not have.
        source: contents of the folder.
    """

    model: PreTrainedModel
    origins: Mapping[str, Origin] = field(repr=False)
    others: Mapping[str, Slice] = field(repr=False)
    surplus: tuple[str, ...]
    source: Checkpoint = field(repr=False)
    # Maps the id of a tensor to the tensor and its origin. Keeping the tensor prevents reuse of its id.
    _known: dict[int, tuple[Tensor, Origin]] = field(init=False, repr=False)
    _marks: dict[Path, tuple[int, int]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        state = self.model.state_dict(keep_vars=True)
        known = {id(state[name]): (state[name], origin) for name, origin in self.origins.items()}
        object.__setattr__(self, "_known", known)
        files = {part.file for origin in self.origins.values() for part in origin.parts}
        object.__setattr__(self, "_marks", {file: _mark(file) for file in files})

    def only_read(self, tensor: Tensor) -> bool:
        """Return True if a parameter is in the files, but can only be read, not mapped."""
        known = self._known.get(id(tensor))
        return tensor.is_meta and known is not None and known[1].parts[0].dtype in FLOATS

    def loaded_on(self, device: torch.device | str) -> Loaded:
        """Return the function that loads the weights of modules for a walk on a device."""
        products = walk_dtype(self.model, self.loaded, torch.device(device))
        return partial(self.loaded, device=device, products=products)

    @contextmanager
    def loaded(
        self,
        modules: Iterable[nn.Module],
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = torch.float32,
        products: torch.dtype | None = None,
    ) -> Iterator[None]:
        """Within a `with` block, have the weights of modules in memory; afterwards, restore the old tensors.

        Tied weights stay tied. Parameters that are not those of the folder, such as the cores of layers that
        were compressed meanwhile, are moved and converted too.

        Args:
            modules: the modules, without their children. The model may be unfused.
            device: where the weights are needed.
            dtype: dtype of floating-point parameters, and of 16-bit buffers; None keeps the stored dtypes.
            products: dtype to which autocast converts the factors of matrix products. Linear layers and
                embeddings that are stored in this dtype keep it, which takes half of the memory of float32.
                The outputs of embeddings are converted instead of their tables.

        Raises:
            FormatError: a file was truncated or changed since the model was opened, or a weight is stored in
                a form that cannot be read.
        """
        views = {}
        for compound in (x for x in self.model.modules() if isinstance(x, Compound)):
            for layer, parameter, number, stack in compound.rows():
                if id(parameter) in self._known and layer.matrix is not parameter:
                    views[id(layer.matrix)] = self._known[id(parameter)][1], number, stack
        names = {id(module): name for name, module in self.model.named_modules()}
        modules = list(modules)
        multiply = (nn.Embedding.forward, nn.Linear.forward)  # these only look up rows, or only multiply
        others = [m for m in modules if type(m).forward not in multiply]
        converted = {id(x) for m in others for x in m.parameters(recurse=False)}
        before: list[tuple[nn.Module, str, Any]] = []
        held: dict[int, Tensor] = {}
        try:
            for module in modules:
                own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
                for name, tensor in own:
                    if id(tensor) not in held:
                        full = f"{names.get(id(module), '')}.{name}".lstrip(".")
                        found = self._read(full, tensor, views.get(id(tensor)))
                        wide = not isinstance(tensor, nn.Parameter) and found.dtype.itemsize > 2
                        kept = dtype is None or wide or not found.is_floating_point()
                        kept |= found.dtype == products and found.ndim == 2 and id(tensor) not in converted
                        found = found.to(device, None if kept else dtype)
                        is_weight = isinstance(tensor, nn.Parameter)
                        held[id(tensor)] = nn.Parameter(found, requires_grad=False) if is_weight else found
                    before.append((module, name, tensor))
                    setattr(module, name, held[id(tensor)])
                if isinstance(module, nn.Embedding) and dtype and module.weight.dtype != dtype:
                    before.append((module, "forward", vars(module).get("forward")))
                    setattr(module, "forward", partial(_looked_up, module.forward, dtype))  # noqa: B010
            yield
        finally:
            for module, name, value in reversed(before):
                delattr(module, name) if value is None else setattr(module, name, value)

    def _read(self, name: str, tensor: Tensor, view: tuple[Origin, int, Any] | None) -> Tensor:
        """Read a tensor of the model from the files, or return the tensor itself if it is not stored there.

        Args:
            name: name of the tensor, for messages.
            tensor: the mapped tensor, or one on the meta device.
            view: for a matrix of an unfused module, the origin of the parameter that contains the matrix, the
                number of the matrix in this parameter, and the location of all its matrices.
        """
        if view is not None:
            origin, number, stack = view
        elif id(tensor) in self._known:
            origin, number, stack = self._known[id(tensor)][1], 0, None
        elif tensor.is_meta:
            raise FormatError(
                f"{name} is stored in another form than the model uses, so it cannot be read alone. Load the "
                "model and use tensornet.compress."
            )
        else:
            return tensor.detach()
        dtypes = {origin.dtype} if origin.change else {part.dtype for part in origin.parts}
        if isinstance(tensor, nn.Parameter) and not dtypes <= FLOATS.keys():
            raise FormatError(
                f"{name} is stored as {', '.join(sorted(dtypes))}, but weights are read from "
                f"{', '.join(FLOATS)}. Use the model before quantization."
            )
        for file in {part.file for part in origin.parts}:
            if _mark(file) != self._marks[file]:
                raise FormatError(
                    f"{file} changed while it was being used. Restore the old file, or start again."
                )
        if stack is None:
            return origin.read().reshape(tensor.shape)
        matrix = origin.read(number, len(stack.names)).reshape(-1, stack.columns)
        return matrix.T if stack.transposed else matrix


def _looked_up(forward: Callable[..., Tensor], dtype: torch.dtype, *args: Any, **kwargs: Any) -> Tensor:
    return forward(*args, **kwargs).to(dtype)


def _mark(file: Path) -> tuple[int, int]:
    """Return the size and modification time of a file; both are -1 if the file does not exist."""
    try:
        stat = file.stat()
    except OSError:
        return -1, -1
    return stat.st_size, stat.st_mtime_ns


def read_source(
    folder: str | os.PathLike[str],
    weights: str | os.PathLike[str] | None = None,
    *,
    quantized: bool = False,
) -> Checkpoint:
    """Check the files of a dense model, and return their contents without reading weights.

    Args:
        folder: folder of the model.
        weights: GGUF file with the weights of the model; by default, the safetensors files of the folder.
        quantized: whether this file may be quantized.

    Raises:
        FormatError: a file is invalid (see `read_checkpoint` and `read_gguf`).
        TargetError: the model is compressed already.
    """
    if weights is None:
        return read_dense(Path(folder))
    return read_gguf(Path(folder), Path(weights), quantized=quantized)


def open_lazily(source: Checkpoint) -> LazyModel:
    """Build the model of a folder without reading its weights.

    Layers, ties and names are those of the model that transformers loads, since the class is the same.
    Code in the folder is never run. In-place changes of a mapped weight do not change the file.

    Args:
        source: contents of the folder of a dense model, from `read_source`.

    Raises:
        FormatError: transformers does not have the model's class, or the configuration is invalid or
            contradicts the stored tensors.
    """
    check_values(source.config, tensors=len(source.tensors))
    model = empty_model(source)
    dtype = getattr(torch, str(source.config.get("dtype")), None)
    if isinstance(dtype, torch.dtype):  # that of a GGUF file may differ from the folder's
        model.config.dtype = dtype
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

    there = {id(tensor) for name, tensor in state.items() if name in renamed or name in stacked}
    # This attribute is private, but only it names the weights that files of some architectures leave out.
    ignored = [re.compile(x) for x in model._keys_to_ignore_on_save or ()]
    absent = [name for name, x in model.named_parameters() if id(x) not in there]
    computed = {name for name in absent if any(x.search(name) for x in ignored)}
    if absent := [name for name in absent if name not in computed]:
        if stacked:  # transformers converts some stored tensors when it loads the model
            raise _other_form(source.folder, absent[0])
        raise FormatError(
            f"{source.folder} describes {absent[0]} and {len(absent) - 1} more weights that are not stored. "
            "Files are missing, or belong to another model."
        )
    found: dict[str, Tensor] = {}
    origins: dict[str, Origin] = {}
    for name, tensor in state.items():
        if name in renamed:
            parts = [source.tensors[renamed[name]]]
            change = source.changes.get(renamed[name])
            if tuple(tensor.shape) != (shape := parts[0].shape if change is None else change.shape):
                raise _contradiction(name, tensor.shape, shape)
        elif name in stacked:
            parts = _stack_parts(name, tensor, stacked[name], converters, source.tensors)
        else:
            continue
        if not parts:
            continue
        origins[name] = origin = Origin(tuple(parts), source.changes.get(renamed.get(name, "")))
        of_weights = isinstance(tensor, nn.Parameter)
        if origin.dtype not in (FLOATS if of_weights else MAPPED):
            continue
        if of_weights:
            tensor.data = tensor.data.to(FLOATS[origin.dtype])
        if origin.change is None and len(parts) == 1:
            found[name] = load_slice(parts[0])
    _untie_different(model, {name: source.tensors[key] for name, key in renamed.items()})
    _put_in_place(model, found)
    unread = {k for name, x in stacked.items() if name not in origins for k in chain(*x.values())}
    others = {key: source.tensors[key] for key in source.tensors if key in unread}
    surplus = tuple(key for name, key in renamed.items() if name not in state)
    # Compute what is not stored, such as tables of sinusoidal positions and rotary frequencies.
    for name, parameter in list(model.named_parameters()):
        if name in computed:
            path, _, leaf = name.rpartition(".")
            empty = nn.Parameter(torch.empty_like(parameter, device="cpu"), requires_grad=False)
            setattr(model.get_submodule(path), leaf, empty)
        else:
            parameter._is_hf_initialized = True  # type: ignore[attr-defined]  # so it is not computed
    for module in model.modules():
        for key, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_meta:
                setattr(module, key, torch.empty_like(buffer, device="cpu"))
    model.initialize_weights()
    for name in computed:  # initial values that differ in a second try are random: the weight is missing
        first = model.get_parameter(name).clone()
        # Private, but the method by which every model of transformers initializes one module.
        model._init_weights(model.get_submodule(name.rpartition(".")[0]))
        if not torch.equal(first, model.get_parameter(name)):
            raise _other_form(source.folder, name)
    return LazyModel(model.eval(), origins, others, surplus, source)


def open_model(
    folder: str | os.PathLike[str],
    weights: str | os.PathLike[str] | None = None,
    *,
    quantized: bool = False,
) -> LazyModel:
    """Open a model whose modules can be run within `LazyModel.loaded`.

    Args:
        folder: folder of the model.
        weights: GGUF file with the weights of the model; by default, the safetensors files of the folder.
        quantized: whether this file may be quantized; its weights are then float32.

    Raises:
        FormatError: the folder or the file is invalid (see `read_source` and `open_lazily`), or transformers
            converts a stored tensor in other ways than joining it with others when it loads the model.
        TargetError: the model is compressed already.
    """
    lazy = open_lazily(read_source(folder, weights, quantized=quantized))
    model = lazy.model
    for name, parameter in model.named_parameters():
        if parameter.is_meta and id(parameter) not in lazy._known:
            raise _other_form(folder, name)
    return lazy


def _other_form(folder: str | os.PathLike[str], name: str) -> FormatError:
    return FormatError(
        f"{folder} stores {name} in another form than the model uses, or does not store it, so it is only "
        "known when the whole model is loaded. Load the model, use tensornet.compress, and save it with "
        "tensornet_hf.save."
    )


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
    buffers = list(model.named_buffers(remove_duplicate=False))
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *buffers]:
        new = made.get(id(tensor), found.get(name)) if isinstance(tensor, nn.Parameter) else found.get(name)
        if new is not None:
            new._is_hf_initialized = True  # type: ignore[attr-defined]  # so initialize_weights skips it
            path, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(path), leaf, new)
