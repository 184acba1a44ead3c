"""Write the weight files of a compressed model tensor by tensor, in any order, without a second copy.

After planning, the name, dtype and shape of every tensor of the result are known. So each safetensors file is
laid out first, and every tensor is written at its offset as soon as it is known. A run that was killed or
stopped by a full disk is continued by making the same `FolderWriter` again.
"""

import copy
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import dot_natural_key

from tensornet.compression.apply import check_fits, set_submodule, with_cores
from tensornet.compression.plan import CompressionPlan, LayerPlan
from tensornet.errors import DestinationError
from tensornet.io import (
    CHUNK,
    MAPPED,
    ResumableFile,
    Slice,
    contents,
    read_slices,
    safetensors_layout,
    take_place,
    write_file,
)
from tensornet.nn.linear import empty_linear
from tensornet.nn.module import build_module
from tensornet.nn.targets import Target, list_weights
from tensornet.nn.unfuse import Compound, unfused
from tensornet_hf.checkpoint import CARD, INDEX, WEIGHT_SUFFIXES, Checkpoint, write_card
from tensornet_hf.lazy_model import LazyModel
from tensornet_hf.quantizer import GUARD_SHAPE, config_of, is_inside, replaced_names
from tensornet_hf.report import compact_bytes

#: Dtypes of tensors that are written, by their names in the headers of safetensors files, and these names.
#: F8_E4M3 is only written: in other files, the scales of such weights are tensors of their own.
_DTYPES = MAPPED | {"F8_E4M3": torch.float8_e4m3fn}
NAMES = {dtype: name for name, dtype in _DTYPES.items()}
#: File with the relative error of each finished layer, a line of JSON for each.
ERRORS = "errors.jsonl"
#: Modules that replace those that use a weight, and the relative error of the weight.
NewLayers = tuple[list[nn.Module], float]


@dataclass(frozen=True)
class Contents:
    """All files of a folder to be written.

    Args:
        tensors: dtype as named in the header of a safetensors file, shape, and length in bytes of each tensor
            by name.
        copied: function that yields the bytes of each tensor that is taken from the source, by name.
        own: names of the tensors that are written for each planned layer.
        pack: function of the name of a layer and its new modules that returns these tensors, by name.
        unpack: function of a planned layer and a function that reads a tensor; it returns the new modules, or
            None if they do not follow from the tensors.
        finish: function that writes all other files into the folder.
    """

    tensors: Mapping[str, tuple[str, tuple[int, ...], int]]
    copied: Mapping[str, Callable[[], Iterator[bytes]]]
    own: Mapping[str, tuple[str, ...]]
    pack: Callable[[str, list[nn.Module]], Mapping[str, Tensor]]
    unpack: Callable[[LayerPlan, Callable[[str], Tensor]], list[nn.Module] | None]
    finish: Callable[[Path], None]


def planned_model(model: PreTrainedModel, plan: CompressionPlan) -> tuple[PreTrainedModel, dict[str, Target]]:
    """Copy a model to the meta device, and replace the planned layers of the copy.

    Args:
        model: the dense model; it is not changed.
        plan: the plan.

    Returns:
        The copy, and the planned weights of the copy before the replacement, by name.

    Raises:
        TargetError: the model has no layer of a planned name, shape or dtype.
    """
    memo: dict[int, Any] = {}
    for x in (*model.parameters(), *model.buffers()):
        empty = torch.empty_like(x, device="meta")
        memo[id(x)] = nn.Parameter(empty, requires_grad=False) if isinstance(x, nn.Parameter) else empty
    model = copy.deepcopy(model, memo)
    found = {}
    with unfused(model):
        targets = {target.name: target for target in list_weights(model) if target.kinds}
        for layer in plan:
            if layer.topology is None:
                continue
            check_fits(model, layer, targets.get(layer.name))
            found[layer.name] = target = targets[layer.name]
            options: dict[str, Any] = {"storage": layer.storage, "device": "meta", "dtype": layer.dtype}
            new = with_cores(target, empty_linear(layer.topology, bias=False, **options))
            for name, module in zip(target.names, new, strict=True):
                set_submodule(model, name, module)
    return model, found


def planned_contents(source: Checkpoint, lazy: LazyModel, plan: CompressionPlan) -> Contents:
    """Find out which files and tensors the folder of a compressed model will contain.

    Args:
        source: contents of the folder of the dense model.
        lazy: the dense model.
        plan: the plan.

    Raises:
        TargetError: the model has no layer of a planned name, shape or dtype.
    """
    before = lazy.model.state_dict()
    model, targets = planned_model(lazy.model, plan)
    after, described = model.state_dict(keep_vars=True), config_of(model)

    # Tensors of the source keep their bytes. Matrices of an unfused module whose other matrices were replaced
    # are stored one by one.
    copied: dict[str, Callable[[], Iterator[bytes]]] = {
        name: origin.contents for name, origin in lazy.origins.items() if name in after
    }
    for name, compound in model.named_modules():
        for _, _, number, stack in compound.rows() if isinstance(compound, Compound) else ():
            origin = lazy.origins.get(f"{name}.{stack.parameter}")
            full = f"{name}.{stack.names[number]}.matrix"
            if compound.compressed and full not in before and origin is not None:
                copied[full] = partial(
                    _row, origin, number, len(stack.names), stack.columns, stack.transposed
                )

    tensors: dict[str, tuple[str, tuple[int, ...], int]] = {}
    for name, x in after.items():
        if name not in described.ties and (name not in before or name in copied):
            tensors[name] = entry(lazy, name, x)
    for name in replaced_names(before, after, described.layers):
        tensors[name] = NAMES[lazy.model.dtype], GUARD_SHAPE, 0
    for name, part in lazy.others.items():
        tensors[name] = part.dtype, part.shape, part.nbytes
        copied[name] = partial(contents, [part])
    own = {
        layer: tuple(x for x in tensors if x.startswith(f"{target.name}.") and x not in copied)
        for layer, target in targets.items()
    }

    def pack(layer: str, modules: list[nn.Module]) -> dict[str, Tensor]:
        pairs = zip(targets[layer].names, modules, strict=True)
        return {f"{name}.{key}": x for name, module in pairs for key, x in module.state_dict().items()}

    def unpack(layer: LayerPlan, read: Callable[[str], Tensor]) -> list[nn.Module]:
        made: list[Any] = []
        for name in targets[layer.name].names:
            module: Any = build_module(described.layers[name], device="meta", dtype=layer.dtype)
            if made:
                module.share_cores(made[0])
            else:
                stored = {key: read(f"{name}.{key}") for key in module.stored}
                module.load_state_dict(stored, strict=False, assign=True)
            made.append(module)
        return made

    def finish(folder: Path) -> None:
        others = other_files(source.folder)
        for name in others:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            with (source.folder / name).open("rb") as opened:
                write_file(folder / name, iter(partial(opened.read, CHUNK), b""))
        content = {**source.config, "quantization_config": described.to_dict()}
        text = json.dumps(content, indent=2, sort_keys=True) + "\n"
        write_file(folder / "config.json", [text.encode()])
        if CARD not in others:
            write_card(folder, type(lazy.model).__name__)

    return Contents(tensors, copied, own, pack, unpack, finish)


def entry(lazy: LazyModel, name: str, x: Tensor) -> tuple[str, tuple[int, ...], int]:
    """Return the dtype, the shape and the length in bytes of a tensor to write (see `Contents`).

    Args:
        lazy: the dense model.
        name: name of the tensor.
        x: tensor of this shape and, unless it is copied from the source, of this dtype.
    """
    origin = lazy.origins.get(name)
    if origin is None:
        return NAMES[x.dtype], tuple(x.shape), x.nbytes
    if origin.change is None:  # torch may not have the dtype
        return origin.dtype, tuple(x.shape), sum(part.nbytes for part in origin.parts)
    return origin.dtype, tuple(x.shape), x.numel() * MAPPED[origin.dtype].itemsize


def _row(origin: Any, number: int, count: int, columns: int, transposed: bool) -> Iterator[bytes]:
    """Yield the bytes of one of the matrices that a tensor contains (see `StackedMatrices`)."""
    matrix = origin.read(number, count).reshape(-1, columns)
    yield _bytes(matrix.T if transposed else matrix)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


class FolderWriter:
    """Unfinished weight files of a model folder, into which the tensors of the result are written.

    Args:
        work: staging folder, locked by this process. The files are in its subfolder `out`.
        found: the tensors to write (see `planned_contents`).
        max_shard_bytes: largest size of a file; a larger tensor becomes a file of its own.
        key: text that identifies all that the content depends on.

    Raises:
        DestinationError: the disk has no room for the files.
        FormatError: the unfinished files are those of a run with another plan or other options.
    """

    def __init__(self, work: Path, found: Contents, *, max_shard_bytes: int, key: str) -> None:
        self.work, self.found = work, found
        self.out = work / "out"
        self.out.mkdir(exist_ok=True)
        # `save_pretrained` sorts names in this order, and puts all empty tensors into one file.
        names = sorted(found.tensors, key=dot_natural_key)
        split = split_state_dict_into_shards_factory(
            {name: found.tensors[name] for name in names},
            get_storage_size=lambda tensor: tensor[2],
            get_storage_id=lambda tensor: None if tensor[2] else "empty",
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=max_shard_bytes,
        )
        layouts = {
            file: safetensors_layout({name: found.tensors[name] for name in names})
            for file, names in split.filename_to_tensors.items()
        }
        self.index: dict[str, str] = split.tensor_to_filename
        self.nbytes = sum(len(header) + sum(n for _, n in x.values()) for header, x in layouts.values())
        room = shutil.disk_usage(self.out).free
        # Blocks that an earlier run has reserved count as room.
        room += sum((self.out / x).stat().st_blocks * 512 for x in layouts if (self.out / x).exists())
        if self.nbytes > room:
            raise DestinationError(
                f"The weight files will have {compact_bytes(self.nbytes)}, but the disk of {work.parent} has "
                f"{compact_bytes(room)} left. Free some space, or choose another destination."
            )
        #: Bytes of all tensors, without the headers.
        self.tensor_bytes = sum(nbytes for _, _, nbytes in found.tensors.values())
        self._places = {name: place for _, places in layouts.values() for name, place in places.items()}
        self._files = {
            file: ResumableFile(
                self.out / file,
                header,
                {name: place for name, place in places.items() if place[1]},
                key=key,
                what="The model",
            )
            for file, (header, places) in layouts.items()
        }
        self._missing = {name for file in self._files.values() for name in file.missing()}
        #: Relative errors of the finished layers.
        self.errors = read_errors(work)

    def has_all(self, layer: str) -> bool:
        """Return True if the tensors of a layer have been written."""
        return layer in self.errors and self._missing.isdisjoint(self.found.own[layer])

    def finished(self, layer: LayerPlan) -> NewLayers | None:
        """Read the new modules of a layer back from the unfinished files; None if they are incomplete.

        Biases, which belong to the source, are not read: they are on the meta device.
        """
        if not self.has_all(layer.name):
            return None
        made = self.found.unpack(layer, self._read)
        return None if made is None else (made, self.errors[layer.name])

    def _read(self, name: str) -> Tensor:
        (dtype, shape, _), (start, nbytes) = self.found.tensors[name], self._places[name]
        part = Slice(self.out / self.index[name], dtype, shape, start, start + nbytes)
        return read_slices([part]).reshape(shape)

    def put(self, block: str, layers: Mapping[str, NewLayers]) -> None:
        """Write the new layers of a block, and copy the other tensors of the block from the source.

        Tensors that were written before are skipped.

        Args:
            block: name of the block; if it is empty, only the layers are written.
            layers: new modules and relative error of each layer, by name. Floating-point cores are converted
                to the dtype of the plan.

        Raises:
            DestinationError: the disk is full; finished tensors are kept.
            FormatError: a file of the source was truncated.
        """
        for name, (modules, error) in layers.items():
            record_error(self.work, self.errors, name, error)  # it may be all that a killed run lost
            if self._missing.isdisjoint(self.found.own[name]):
                continue
            for full, tensor in self.found.pack(name, modules).items():
                self._write(full, tensor)
        if block:
            self._copy([name for name in self._missing if is_inside(name, (block,))])

    def _write(self, name: str, tensor: Tensor) -> None:
        if name in self._missing and name not in self.found.copied:
            dtype = _DTYPES[self.found.tensors[name][0]]
            tensor = tensor.to(dtype) if tensor.is_floating_point() else tensor
            self._files[self.index[name]].write(name, [_bytes(tensor)])
            self._missing.discard(name)

    def _copy(self, names: Sequence[str]) -> None:
        for name in sorted(names, key=lambda x: (self.index[x], self._places[x])):
            if name in self.found.copied:
                self._files[self.index[name]].write(name, self.found.copied[name]())
                self._missing.discard(name)

    def finish(self) -> None:
        """Copy the remaining tensors, and write all other files.

        Raises:
            DestinationError, FormatError: see `put`.
            ValueError: a layer has not been written.
        """
        self._copy([*self._missing])
        if self._missing:
            raise ValueError(f"{len(self._missing)} tensors have not been written: {min(self._missing)}, ...")
        journals = {file.journal.name for file in self._files.values()}
        for path in self.out.rglob("*"):
            if path.is_file() and path.name not in self._files.keys() | journals:
                path.unlink()  # remains of an interrupted run
        self.found.finish(self.out)
        if len(self._files) > 1:
            total = sum(nbytes for _, _, nbytes in self.found.tensors.values())
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(self.index.items()))}
            write_file(self.out / INDEX, [json.dumps(index, indent=2).encode() + b"\n"])
        for name, file in self._files.items():
            file.finish(self.out / name)

    def take_place(self, destination: Path, *, force: bool) -> None:
        """Rename the complete folder to its final path (see `tensornet.io.take_place`)."""
        take_place(self.out, destination, force=force)


def read_errors(work: Path) -> dict[str, float]:
    """Read the relative errors of the layers that an interrupted run has finished, by name."""
    log, found = work / ERRORS, {}
    for line in log.read_bytes().splitlines() if log.is_file() else ():
        try:
            name, error = json.loads(line)
        except ValueError:  # the run was killed while it wrote this line
            continue
        found[name] = error
    return found


def record_error(work: Path, errors: dict[str, float], name: str, error: float) -> None:
    """Add the relative error of a layer to `errors` and to the file that `read_errors` reads."""
    if name not in errors:
        with (work / ERRORS).open("ab") as log:
            log.write(json.dumps([name, error]).encode() + b"\n")
            log.flush()
            os.fsync(log.fileno())
    errors[name] = error


def other_files(folder: Path) -> list[str]:
    """Return the relative paths of all files except config.json, index, weight files and hidden files."""
    found = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        written = name == "config.json" or name.endswith(INDEX) or path.suffix in WEIGHT_SUFFIXES
        if path.is_file() and not written and not any(x.startswith(".") for x in name.split("/")):
            found.append(name)
    return found
