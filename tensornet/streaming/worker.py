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
from tensornet.io.atomic import Written, file_digest
from tensornet.io.safetensors_files import Slice, read_header, write_tensors
from tensornet.nn.serialization import module_spec
from tensornet.nn.stock_layers import layer_kind
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
class Piece:
    """Result of one task.

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
        root = _stand_in(task)
        made, decomposed = _planned(root, task)
        stats = None if task.stats is None else CalibrationStats.load(task.stats)
        errors = apply_plan(root, made, stats, decomposed=decomposed)
        layer = replace(made.layers[0], singular_values=())
        written, specs, tensors = None, {}, {}
        if layer.topology is not None:
            specs = {use.name: module_spec(root.get_submodule(use.name)) or {} for use in task.uses}
            write_tensors(task.path, _cores(root, task.uses[0].name))
            written, tensors = file_digest(task.path), read_header(task.path)
    error = errors.get(layer.name, 0.0)
    return Piece(layer, error, specs, written, tensors, peak_memory(), getpid())


def _planned(root: nn.Module, task: PieceTask) -> tuple[CompressionPlan, dict[str, Decomposition]]:
    """Plan the only weight of a model, unless the task holds its plan."""
    if task.planned is not None:
        return task.planned, {}
    everything = replace(task.config, target_modules="all", exclude_modules=None)
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
    import resource  # absent there

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


def _stand_in(task: PieceTask) -> nn.Module:
    """Build a model that contains only the layers that use the weight."""
    root, shared = nn.Module(), None
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
    return root


def _cores(root: nn.Module, name: str) -> dict[str, Tensor]:
    own = root.get_submodule(name).state_dict().items()
    return {f"{name}.{key}": tensor.cpu().contiguous() for key, tensor in own if key != "bias"}
