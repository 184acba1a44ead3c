"""Worker step: decompose one stored weight into the cores of one layer, in a file of its own.

A worker gets a `PieceTask` of a few hundred bytes and returns the plan, the descriptions and a checksum.
Tensors go through the file system only.
"""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from os import getpid
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tensornet.calibration import CalibrationStats
from tensornet.compression import CompressionConfig, CompressionPlan, LayerPlan, apply_plan, prepare
from tensornet.errors import FormatError
from tensornet.io import Slice, Written, file_digest, read_header, write_tensors
from tensornet.nn.layer_kinds import layer_kind
from tensornet.nn.serialization import module_spec
from tensornet.streaming.stored_matrix import StoredMatrix
from tensornet.topologies import Decomposition


@dataclass(frozen=True)
class Use:
    """Module that uses a weight.

    Args:
        name: of the module.
        kind: name of its layer kind.
        registered_in: module that registers this kind; workers import it and nothing else.
        bias: whether the module has one.
        padding_idx: of an embedding.
    """

    name: str
    kind: str
    registered_in: str
    bias: bool = False
    padding_idx: int | None = None


@dataclass(frozen=True)
class PieceTask:
    """Task to compress one weight.

    Args:
        uses: the modules that use it; they share what is made of the first.
        weight: where the weight lies.
        config: options of the compression.
        planned: a plan of this layer alone, instead of planning.
        stats: file of the statistics that the plan was made with.
        device: where to compute.
        path: file to write.
    """

    uses: tuple[Use, ...]
    weight: StoredMatrix
    config: CompressionConfig
    planned: CompressionPlan | None
    stats: Path | None
    device: str
    path: Path


@dataclass(frozen=True)
class StackTask:
    """Task to compress the experts of one stack together, which may share a core.

    Args:
        members: tasks of the single experts, in model order.
        planned: a plan of these layers alone, instead of planning.
    """

    members: tuple[PieceTask, ...]
    planned: CompressionPlan | None


@dataclass(frozen=True)
class Piece:
    """Result of one task, or of one member of a stack.

    Args:
        plan: the plan of the layer, without its spectrum; no topology means that it stays dense.
        error: certified relative Frobenius error.
        specs: description of the module for every use, by name.
        written: the file with the cores, None where the layer stays dense.
        tensors: where each core lies in it, by name.
        peak_memory: largest resident size of the worker so far, in bytes; 0 if taken over.
        worker: process id.
    """

    plan: LayerPlan
    error: float
    specs: Mapping[str, dict[str, Any]]
    written: Written | None
    tensors: Mapping[str, Slice]
    peak_memory: int = 0
    worker: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready form, for the journal; `from_dict` is the inverse."""
        return {
            "plan": CompressionPlan((self.plan,)).to_dict(),
            "error": self.error,
            "specs": dict(self.specs),
            "written": asdict(self.written) if self.written is not None else None,
            "tensors": {k: [x.dtype, list(x.shape), x.start, x.stop] for k, x in self.tensors.items()},
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], folder: Path) -> "Piece":
        """Rebuild a piece whose file lies in `folder`.

        Raises:
            FormatError: not a description of a piece.
        """
        try:
            (layer,) = CompressionPlan.from_dict(data["plan"])
            written = Written(**data["written"]) if data["written"] is not None else None
            path = folder / (written.name if written is not None else "")
            tensors = {
                k: Slice(path, d, tuple(shape), a, b) for k, (d, shape, a, b) in data["tensors"].items()
            }
            return cls(layer, float(data["error"]), dict(data["specs"]), written, tensors)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FormatError(f"Bad description of a finished layer: {error!s:.200}") from error


@torch.no_grad()
def compress_piece(task: PieceTask) -> Piece:
    """Plan and decompose one weight, and write its cores.

    One thread computes: sums in another order would give other bits, and other workers keep the processor
    busy.

    Raises:
        NonFiniteError, BudgetError, TopologyError: the layer cannot be compressed; the message names it.
        OSError: it cannot be read or written.
    """
    with one_thread():
        root = nn.Module()
        _put_stand_ins(root, task)
        made, decomposed = _planned(root, task.config, task.planned)
        errors = apply_plan(root, made, _statistics(task), decomposed=decomposed)
        return _written(root, task, made.layers[0], errors)


@torch.no_grad()
def compress_stack(task: StackTask) -> list[Piece]:
    """Plan and fit the experts of one stack together, and write the cores of each into a file of its own.

    A shared core is in the file of the layer that owns it. Raises as `compress_piece`.
    """
    with one_thread():
        root, first = nn.Module(), task.members[0]
        for member in task.members:
            _put_stand_ins(root, member)
        made, decomposed = _planned(root, first.config, task.planned)
        errors = apply_plan(root, made, _statistics(first), decomposed=decomposed)
        layers = {layer.name: layer for layer in made}
        return [_written(root, member, layers[member.uses[0].name], errors) for member in task.members]


def _statistics(task: PieceTask) -> CalibrationStats | None:
    return None if task.stats is None else CalibrationStats.load(task.stats)


def _written(root: nn.Module, task: PieceTask, layer: LayerPlan, errors: Mapping[str, float]) -> Piece:
    """Write the cores of a finished layer, unless it stays dense, and describe it."""
    written, specs, tensors = None, {}, {}
    if layer.topology is not None:
        specs = {use.name: module_spec(root.get_submodule(use.name)) or {} for use in task.uses}
        write_tensors(task.path, _cores(root, task.uses[0].name, layer))
        written, tensors = file_digest(task.path), read_header(task.path)
    kept = replace(layer, singular_values=())
    return Piece(kept, errors.get(layer.name, 0.0), specs, written, tensors, peak_memory(), getpid())


def _planned(
    root: nn.Module, config: CompressionConfig, planned: CompressionPlan | None
) -> tuple[CompressionPlan, dict[str, Decomposition]]:
    """Plan all weights of a model, unless there is a plan."""
    if planned is not None:
        return planned, {}
    everything = replace(config, target_modules="all", exclude_modules=None)
    return prepare(root, everything).plan_decomposed()


def copy_matrix(task: PieceTask) -> Piece:
    """Copy the matrix of an expert out of its stack, if other matrices of the mixture are compressed.

    Raises:
        OSError: it cannot be read or written.
    """
    use, matrix = task.uses[0], task.weight.load().contiguous()
    write_tensors(task.path, {f"{use.name}.matrix": matrix})
    layer = LayerPlan(use.name, task.weight.shape, None, "dense", 0.0, 0.0, ())
    return Piece(layer, 0.0, {}, file_digest(task.path), read_header(task.path), peak_memory(), getpid())


def place(root: nn.Module, name: str, module: nn.Module) -> None:
    """Insert a module at a dotted name, with the containers that it needs."""
    *path, last = name.split(".")
    for part in path:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    root.add_module(last, module)


def peak_memory() -> int:
    """Return the largest resident size of this process so far, in bytes; 0 where it is unavailable."""
    if sys.platform == "win32":
        return 0
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage would count what the process that started this one held by then
        lines = [line for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
        if lines:
            return int(lines[0].split()[1]) * 1024
    import resource  # absent on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread inside the block."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _put_stand_ins(root: nn.Module, task: PieceTask) -> None:
    """Add the layers that use a weight to a model that holds nothing else."""
    shared = None
    for use in task.uses:
        import_module(use.registered_in)
        kind = layer_kind(use.kind)
        if shared is None:
            matrix = task.weight.load().to(task.device)
        # Biases are copied from the source file; the layer only has to know that it has one.
        bias = torch.empty(matrix.shape[0], dtype=matrix.dtype, device="meta") if use.bias else None
        layer = kind.build(matrix, bias)
        if shared is None:
            shared = layer.weight
        if layer.weight is not shared:
            layer.weight = shared
        if isinstance(layer, nn.Embedding):
            layer.padding_idx = use.padding_idx
        place(root, use.name, layer)


def _cores(root: nn.Module, name: str, layer: LayerPlan) -> dict[str, Tensor]:
    """Collect the stored tensors of a layer, without those of a core that another layer owns."""
    stored = root.get_submodule(name).state_dict()
    elsewhere = layer.shared_core if layer.shared_with != layer.name else ""
    own = [key for key in stored if key != "bias" and not (elsewhere and is_of_core(key, elsewhere))]
    return {f"{name}.{key}": stored[key].cpu().contiguous() for key in own}


def is_of_core(key: str, core: str) -> bool:
    """Return True if a stored tensor, such as `scale_0`, belongs to a core.

    Example:
        >>> from tensornet.streaming.worker import is_of_core
        >>> is_of_core("scale_base", "base"), is_of_core("core_0", "base")
        (True, False)
    """
    return key.partition("_")[2] == core
