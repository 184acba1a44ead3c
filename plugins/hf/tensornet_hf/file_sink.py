"""Write the files of a compressed model tensor by tensor, in any order.

After planning, the name, dtype and shape of every tensor of the result are known, and so is its position in
a file. The files are described before the first layer is compressed (`Files`), and every tensor is written as
soon as its layers are compressed (`FileSink`). A run that was killed or stopped by a full disk is continued
by making the same `FileSink` again.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import dot_natural_key

from tensornet._util import compact_bytes
from tensornet.compression.apply import NewLayers, check_fits, set_submodule, with_cores
from tensornet.compression.loss_increase import light_copy
from tensornet.compression.plan import CompressionPlan
from tensornet.compression.sinks import Sink
from tensornet.errors import DestinationError
from tensornet.io import MAPPED, ResumableFile, safetensors_layout, take_place, write_file
from tensornet.nn.linear import empty_linear
from tensornet.nn.storage import put_core
from tensornet.nn.targets import list_weights
from tensornet.nn.unfuse import unfused
from tensornet_hf.checkpoint import INDEX
from tensornet_hf.lazy_model import LazyModel
from tensornet_hf.staging import OUT

#: Dtypes of tensors that are written, by their names in the headers of safetensors files.
DTYPES = MAPPED | {"F8_E4M3": torch.float8_e4m3fn}  # which other files use with scales of their own
#: Names of these dtypes.
NAMES = {dtype: name for name, dtype in DTYPES.items()}
#: File with the relative error of each finished layer, a line of JSON for each.
ERRORS = "errors.jsonl"
#: Default limit on the size of a weight file in bytes.
MAX_SHARD_BYTES = 2_000_000_000

#: Function that yields the bytes of a tensor.
Chunks = Callable[[], Iterable[Any]]
#: New modules of the weights that a tensor needs, by name of the weight.
New = Mapping[str, Sequence[nn.Module]]


@dataclass(frozen=True)
class PlannedModel:
    """A model with compressed layers, which may still have to be computed; its files can be described.

    Args:
        model: the model. Layers that have not been computed yet have tensors on the meta device.
        targets: for each weight that has not been compressed yet, the names of the layers that replace it.
        folder: folder of the tokenizer and of other small files; None if there is none.
        lazy: the dense model, if its weights are read from files; None if all weights are in memory.
        networks: how to write layers that are not a single matrix of integers (see `tensornet_hf.export`).
        title: name of the model.
        max_shard_bytes: largest size of a weight file in bytes.
    """

    model: PreTrainedModel
    targets: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    folder: Path | None = None
    lazy: LazyModel | None = None
    networks: Any = "dense"
    title: str = "model"
    max_shard_bytes: int = MAX_SHARD_BYTES

    @classmethod
    def of(cls, lazy: LazyModel, plan: CompressionPlan, **options: Any) -> "PlannedModel":
        """Replace the planned layers in a copy of a dense model by layers on the meta device.

        Raises:
            TargetError: the model has no layer of a planned name, shape or dtype.
        """
        model = light_copy(lazy.model)
        assert isinstance(model, PreTrainedModel)
        found = {}
        with unfused(model):
            targets = {target.name: target for target in list_weights(model) if target.kinds}
            for layer in plan:
                if layer.topology is None:
                    continue
                check_fits(model, layer, targets.get(layer.name))
                target = targets[layer.name]
                found[layer.name] = target.names
                like: dict[str, Any] = {"storage": layer.storage, "device": "meta", "dtype": layer.dtype}
                new = with_cores(target, empty_linear(layer.topology, bias=False, **like))
                for name, module in zip(target.names, new, strict=True):
                    set_submodule(model, name, module)
            for first, *others in plan.stacks:
                core = f"core_{plan[first].shared_core[0]}"  # type: ignore[index]
                stored = getattr(model.get_submodule(first), core)
                for name in others:
                    put_core(model.get_submodule(name), core, stored)
        return cls(model, found, lazy=lazy, **options)


class Layout(NamedTuple):
    """Positions of the tensors in a file.

    Args:
        header: first bytes of the file.
        places: offset and length in bytes of each tensor, by name.
        nbytes: length of the file in bytes.
        what: subject of error messages.
    """

    header: bytes
    places: Mapping[str, tuple[int, int]]
    nbytes: int
    what: str = "The model"


class Made(NamedTuple):
    """Tensors that are made of compressed layers.

    Args:
        layers: names of the weights whose compressed layers are needed.
        names: names of the tensors in the files.
        make: function that returns the bytes of these tensors, by name.
    """

    layers: tuple[str, ...]
    names: tuple[str, ...]
    make: Callable[[New], Mapping[str, Chunks]]


@dataclass(frozen=True)
class Files:
    """Description of all files of a compressed model, made before its layers are compressed.

    Args:
        layouts: layout of each weight file, by name.
        made: tensors that are made of compressed layers.
        copied: bytes of all other tensors, by name.
        complete: function that writes all other files into the folder; None if there are none.
        places: function of the destination that returns the final path of each weight file, by name; None if
            the destination is a folder that contains all of them.
        packed, dense, ranks: see `ExportReport`.
    """

    layouts: Mapping[str, Layout]
    made: Sequence[Made]
    copied: Mapping[str, Chunks]
    complete: Callable[[Path], None] | None = None
    places: Callable[[Path], Mapping[str, Path]] | None = None
    packed: Mapping[str, str] = field(default_factory=dict)
    dense: Mapping[str, str] = field(default_factory=dict)
    ranks: Mapping[str, int] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of all weight files."""
        return sum(x.nbytes for x in self.layouts.values())

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors, without headers."""
        return sum(length for x in self.layouts.values() for _, length in x.places.values())


def sharded(
    tensors: Mapping[str, tuple[str, tuple[int, ...], int]], max_shard_bytes: int
) -> dict[str, Layout]:
    """Divide tensors into safetensors files as `save_pretrained` does, and return the layout of each file.

    Args:
        tensors: dtype as named in the header, shape, and length in bytes of each tensor by name.
        max_shard_bytes: largest size of a file; a larger tensor becomes a file of its own.
    """
    # `save_pretrained` sorts names in this order, and puts all empty tensors into one file.
    split = split_state_dict_into_shards_factory(
        {name: tensors[name] for name in sorted(tensors, key=dot_natural_key)},
        get_storage_size=lambda tensor: tensor[2],
        get_storage_id=lambda tensor: None if tensor[2] else "empty",
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_bytes,
    )
    found = {}
    for file, names in split.filename_to_tensors.items():
        header, places = safetensors_layout({name: tensors[name] for name in names})
        found[file] = Layout(header, places, len(header) + sum(length for _, length in places.values()))
    return found


def tensor_bytes(tensor: Tensor, dtype: str | None = None) -> Chunks:
    """Return a function that yields the bytes of a tensor; floating-point values get the named dtype."""

    def chunks() -> Iterator[bytes]:
        own = tensor.detach()
        found = own.to(DTYPES[dtype]) if dtype is not None and own.is_floating_point() else own
        yield found.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()

    return chunks


class FileSink(Sink):
    """Sink that writes the tensors of the result into weight files.

    Args:
        files: the files.
        destination: the new file or folder.
        work: staging folder, locked by this process. The files are in its subfolder `out` until all of them
            are complete.
        key: text that identifies everything that the content depends on.
        force: replace an existing destination.
        check: function that is called when all files are complete, before they are moved to the destination.
            It raises an error if the destination may not be written.

    Raises:
        DestinationError: the disk has no room for the files.
        FormatError: the unfinished files are those of a run with another plan or other options.
    """

    def __init__(
        self,
        files: Files,
        destination: Path,
        work: Path,
        *,
        key: str = "",
        force: bool = False,
        check: Callable[[], object] = lambda: None,
    ) -> None:
        self.files, self.destination, self.work = files, destination, work
        self.force, self.check = force, check
        self.out = work / OUT
        room = shutil.disk_usage(work).free
        # Blocks that an earlier run has reserved count as room.
        room += sum((self.out / x).stat().st_blocks * 512 for x in files.layouts if (self.out / x).exists())
        if files.nbytes > room:
            raise DestinationError(
                f"The result will have {compact_bytes(files.nbytes)}, but the disk of {work.parent} has "
                f"{compact_bytes(room)} left. Free some space, or choose another destination."
            )
        self.key = key
        self.errors: dict[str, float] = read_errors(work)
        self._file_of = {name: file for file, x in files.layouts.items() for name in x.places}
        self._open: dict[str, ResumableFile] = {}
        self._missing = set(self._file_of)
        self._waiting = list(files.made)
        self._needed = {name for made in self._waiting for name in made.layers}
        self._new: dict[str, Sequence[nn.Module]] = {}
        if self.out.is_dir():
            self._reserve()

    def _reserve(self) -> None:
        """Create the unfinished files, or continue those of an interrupted run."""
        self.out.mkdir(exist_ok=True)
        for file, x in self.files.layouts.items():
            parts = {name: place for name, place in x.places.items() if place[1]}
            path = self.out / file
            self._open[file] = ResumableFile(
                path, x.header, parts, nbytes=x.nbytes, key=self.key, what=x.what
            )
        self._missing = {name for file in self._open.values() for name in file.missing()}
        self._waiting = [x for x in self.files.made if not self._missing.isdisjoint(x.names)]
        self._needed = {name for made in self._waiting for name in made.layers}

    def written(self, name: str) -> bool:
        """Return True if the tensors that need the new layers of a weight have been written."""
        return name in self.errors and name not in self._needed

    def put(self, block: str, layers: Mapping[str, NewLayers]) -> None:
        """Write all tensors whose layers are known; those that were written before are skipped.

        Raises:
            DestinationError: the disk is full; finished tensors are kept.
            TargetError: a weight cannot be stored as planned.
        """
        if not self._open:  # a run that is refused before its first layer leaves no files
            self._reserve()
        for name, (modules, error) in layers.items():
            record_error(self.work, self.errors, name, error)  # it may be all that a killed run lost
            self._new[name] = modules
        ready = [x for x in self._waiting if self._new.keys() >= set(x.layers)]
        self._waiting = [x for x in self._waiting if not self._new.keys() >= set(x.layers)]
        for made in ready:
            self._write(made.make(self._new))
        self._needed = {name for made in self._waiting for name in made.layers}
        self._new = {name: x for name, x in self._new.items() if name in self._needed}

    def _write(self, tensors: Mapping[str, Chunks]) -> None:
        for name in sorted(self._missing & tensors.keys(), key=self._position):
            self._open[self._file_of[name]].write(name, tensors[name]())
            self._missing.discard(name)

    def _position(self, name: str) -> tuple[str, int]:
        file = self._file_of[name]
        return file, self.files.layouts[file].places[name][0]

    def finish(self) -> None:
        """Write the remaining tensors and all other files, and move the result to its destination.

        Raises:
            DestinationError: the disk is full, or the destination cannot be written.
            ValueError: `put` did not get all planned layers.
        """
        if not self._open:
            self._reserve()
        self._write(self.files.copied)
        if self._missing:
            raise ValueError(f"{len(self._missing)} tensors have not been written: {min(self._missing)}, ...")
        journals = {file.journal.name for file in self._open.values()}
        for path in self.out.rglob("*"):
            if path.is_file() and path.name not in self._open.keys() | journals:
                path.unlink()  # remains of an interrupted run
        if self.files.complete is not None:
            self.files.complete(self.out)
        if self.files.places is not None:
            self.check()
            for name, path in self.files.places(self.destination).items():
                if name in self._open:
                    self._open[name].finish(path, force=self.force)
                elif self.force:
                    path.unlink(missing_ok=True)  # it belongs to the file that was replaced
            return
        if len(self._open) > 1:
            index = {
                "metadata": {"total_size": self.files.tensor_bytes},
                "weight_map": dict(sorted(self._file_of.items())),
            }
            write_file(self.out / INDEX, [json.dumps(index, indent=2).encode() + b"\n"])
        for name, file in self._open.items():
            file.finish(self.out / name)
        self.check()
        take_place(self.out, self.destination, force=self.force)


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


def chunks_of(tensors: Mapping[str, Tensor], dtypes: Mapping[str, str]) -> dict[str, Chunks]:
    """Return the bytes of tensors (see `tensor_bytes`), by name."""
    return {name: tensor_bytes(x, dtypes.get(name)) for name, x in tensors.items()}
