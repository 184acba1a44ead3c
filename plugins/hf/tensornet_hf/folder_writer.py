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
    write_file,
)
from tensornet.nn.linear import empty_linear
from tensornet.nn.module import NetworkModule, build_module
from tensornet.nn.targets import list_weights
from tensornet.nn.unfuse import Compound, unfused
from tensornet_hf.checkpoint import CARD, INDEX, WEIGHT_SUFFIXES, write_card
from tensornet_hf.lazy_model import LazyModel
from tensornet_hf.quantizer import GUARD_SHAPE, TensorNetworkConfig, config_of, is_inside, replaced_names
from tensornet_hf.report import compact_bytes

#: Names of dtypes in the headers of safetensors files.
NAMES = {dtype: name for name, dtype in MAPPED.items()} | {torch.uint32: "U32"}
#: File with the relative error of each finished layer, a line of JSON for each.
ERRORS = "errors.jsonl"
#: Modules that replace those that use a weight, and the relative error of the weight.
NewLayers = tuple[list[nn.Module], float]


@dataclass(frozen=True)
class Contents:
    """All tensors of a folder to be written.

    Args:
        tensors: dtype as named in the header of a safetensors file, shape, and length in bytes of each tensor
            by name.
        copied: function that yields the bytes of each tensor that is taken from the source, by name.
        modules: names of the modules that use the weight of each planned layer.
        described: description of the compressed layers for config.json.
    """

    tensors: Mapping[str, tuple[str, tuple[int, ...], int]]
    copied: Mapping[str, Callable[[], Iterator[bytes]]]
    modules: Mapping[str, tuple[str, ...]]
    described: TensorNetworkConfig


def planned_contents(lazy: LazyModel, plan: CompressionPlan) -> Contents:
    """Find out which tensors a folder of this library will contain, by applying a plan on the meta device.

    Args:
        lazy: the dense model.
        plan: the plan.

    Raises:
        TargetError: the model has no layer of a planned name, shape or dtype.
    """
    # Copy the model without weights, and replace the planned layers.
    memo: dict[int, Any] = {}
    for x in (*lazy.model.parameters(), *lazy.model.buffers()):
        empty = torch.empty_like(x, device="meta")
        memo[id(x)] = nn.Parameter(empty, requires_grad=False) if isinstance(x, nn.Parameter) else empty
    model = copy.deepcopy(lazy.model, memo)
    before, modules = model.state_dict(), {}
    with unfused(model):
        targets = {target.name: target for target in list_weights(model) if target.kinds}
        for layer in plan:
            if layer.topology is None:
                continue
            check_fits(model, layer, targets.get(layer.name))
            target = targets[layer.name]
            options: dict[str, Any] = {"storage": layer.storage, "device": "meta", "dtype": layer.dtype}
            new = with_cores(target, empty_linear(layer.topology, bias=False, **options))
            for name, module in zip(target.names, new, strict=True):
                set_submodule(model, name, module)
            modules[layer.name] = target.names
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
        if name in described.ties or (name in before and name not in copied):
            continue
        origin = lazy.origins.get(name)
        dtype = NAMES[x.dtype] if origin is None else origin.dtype
        nbytes = x.nbytes
        if origin is not None and origin.change is None:  # torch may not have the dtype
            nbytes = sum(part.nbytes for part in origin.parts)
        tensors[name] = dtype, tuple(x.shape), nbytes
    for name in replaced_names(before, after, described.layers):
        tensors[name] = NAMES[lazy.model.dtype], GUARD_SHAPE, 0
    for name, part in lazy.others.items():
        tensors[name] = part.dtype, part.shape, part.nbytes
        copied[name] = partial(contents, [part])
    return Contents(tensors, copied, modules, described)


def _row(origin: Any, number: int, count: int, columns: int, transposed: bool) -> Iterator[bytes]:
    """Yield the bytes of one matrix of several in a tensor (see `StackedMatrices`)."""
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
        self.errors: dict[str, float] = {}
        log = work / ERRORS
        for line in log.read_bytes().splitlines() if log.is_file() else ():
            try:
                name, error = json.loads(line)
            except ValueError:  # the run was killed while it wrote this line
                continue
            self.errors[name] = error

    def finished(self, layer: LayerPlan) -> NewLayers | None:
        """Read the new modules of a layer back from the unfinished files; None if they are incomplete.

        Biases, which belong to the source, are not read: they are on the meta device.
        """
        if layer.name not in self.errors or self._missing & {*self._own(layer.name)}:
            return None
        made: list[nn.Module] = []
        for name in self.found.modules[layer.name]:
            module = build_module(self.found.described.layers[name], device="meta", dtype=layer.dtype)
            assert isinstance(module, NetworkModule)
            if made:
                module.share_cores(made[0])  # type: ignore[arg-type]
            else:
                keys = {key: f"{name}.{key}" for key in module.stored}
                module.load_state_dict(
                    {key: self._read(full) for key, full in keys.items()}, strict=False, assign=True
                )
            made.append(module)
        return made, self.errors[layer.name]

    def _own(self, layer: str) -> list[str]:
        """List the names of the tensors that store the cores of a layer."""
        first = self.found.modules[layer][0]
        return [x for x in self._places if x.startswith(f"{first}.") and x not in self.found.copied]

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
            if self._missing.isdisjoint(self._own(name)):
                continue
            with (self.work / ERRORS).open("ab") as log:
                log.write(json.dumps([name, error]).encode() + b"\n")
                log.flush()
                os.fsync(log.fileno())
            self.errors[name] = error
            for full, module in zip(self.found.modules[name], modules, strict=True):
                for key, tensor in module.state_dict().items():
                    self._write(f"{full}.{key}", tensor)
        if block:
            self._copy([name for name in self._missing if is_inside(name, (block,))])

    def _write(self, name: str, tensor: Tensor) -> None:
        if name in self._missing and name not in self.found.copied:
            dtype = MAPPED[self.found.tensors[name][0]]
            tensor = tensor.to(dtype) if tensor.is_floating_point() else tensor
            self._files[self.index[name]].write(name, [_bytes(tensor)])
            self._missing.discard(name)

    def _copy(self, names: Sequence[str]) -> None:
        for name in sorted(names, key=lambda x: (self.index[x], self._places[x])):
            if name in self.found.copied:
                self._files[self.index[name]].write(name, self.found.copied[name]())
                self._missing.discard(name)

    def finish(
        self, source: Path, config: Mapping[str, Any], others: Sequence[str], architecture: str
    ) -> None:
        """Copy the remaining tensors, write config.json, the index and the model card, and copy other files.

        Args:
            source: folder of the source.
            config: content of its config.json.
            others: relative paths of the other files to copy.
            architecture: class of the model, for the card.

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
        for name in others:
            (self.out / name).parent.mkdir(parents=True, exist_ok=True)
            with (source / name).open("rb") as opened:
                write_file(self.out / name, iter(partial(opened.read, CHUNK), b""))
        content = {**config, "quantization_config": self.found.described.to_dict()}
        text = json.dumps(content, indent=2, sort_keys=True) + "\n"
        write_file(self.out / "config.json", [text.encode()])
        if len(self._files) > 1:
            total = sum(nbytes for _, _, nbytes in self.found.tensors.values())
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(self.index.items()))}
            write_file(self.out / INDEX, [json.dumps(index, indent=2).encode() + b"\n"])
        if CARD not in others:
            write_card(self.out, architecture)
        for name, file in self._files.items():
            file.finish(self.out / name)


def other_files(folder: Path) -> list[str]:
    """Return the relative paths of all files except config.json, index, weight files and hidden files."""
    found = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        written = name == "config.json" or name.endswith(INDEX) or path.suffix in WEIGHT_SUFFIXES
        if path.is_file() and not written and not any(x.startswith(".") for x in name.split("/")):
            found.append(name)
    return found
