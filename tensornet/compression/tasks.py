"""Compress several matrices, or find their candidates, in this process or with an executor.

Without error feedback between the outputs, the rows of a dense matrix are rounded independently. So a large
matrix is split into parts of its rows, which several processes can round at the same time. The parts depend
only on the shape of the matrix, so the result does not depend on the number of processes.
"""

import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import chain, groupby, islice
from multiprocessing import get_context, parent_process
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tensornet._util import remembering
from tensornet.compression.allocate import Candidate
from tensornet.compression.apply import compress_layer
from tensornet.compression.candidates import Priced, candidates_of_group
from tensornet.compression.config import CompressionConfig
from tensornet.compression.plan import LayerPlan
from tensornet.errors import WorkerError
from tensornet.linalg.svd import energy, singular_values
from tensornet.linalg.weighted_svd import Weighting
from tensornet.nn.linear import TensorNetworkLinear, linear_from_stored
from tensornet.nn.storage import PackedCore
from tensornet.quantization import Rounding
from tensornet.topologies import dense

#: A layer without a bias that contains the cores of a matrix, and the relative error of the matrix.
Made = tuple[TensorNetworkLinear, float]
#: Number of rows of a part. Every part factorizes the moment of the inputs again in its process; with so many
#: rows, this takes a few percent of the time of rounding.
PART_ROWS = 4096


class Task(NamedTuple):
    """Arguments of `compress_layer`.

    Args:
        matrix: the weight, shape `(out, in)`.
        layer: its plan.
        weighting: sensitivity of the loss to errors of the weight.
        rounding: rounding method for integers.
    """

    matrix: Tensor
    layer: LayerPlan
    weighting: Weighting
    rounding: Rounding


def compress_tasks(
    tasks: Sequence[Task], compress: Callable[..., Made], executor: Executor | None = None
) -> list[Made]:
    """Compress matrices, and return a layer and the relative error of each.

    Args:
        tasks: the matrices and how to compress them.
        compress: function that compresses one matrix, like `compress_layer`.
        executor: executor that calls the function; by default, this process does.

    Raises:
        WorkerError: a process of the executor died.
    """
    parts = [row_parts(task) for task in tasks]
    made = iter(results(list(chain(*parts)), compress, executor))
    return [join_rows(x, some, list(islice(made, len(some)))) for x, some in zip(tasks, parts, strict=True)]


def compress_alone(matrix: Tensor, layer: LayerPlan, weighting: Weighting, rounding: Rounding) -> Made:
    """Compress a layer with a single thread (see `tensornet.compression.apply.compress_layer`).

    The result must not depend on the order of summation, and other workers need the processor cores.
    """
    with one_thread():
        return compress_layer(matrix, layer, weighting, rounding)


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use a single thread within a `with` block."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def worker_processes(count: int) -> Iterator[Executor | None]:
    """Start processes that run tasks, and yield their executor; None for a single worker.

    Workers import only the modules of the functions that they call.
    """
    if count == 1:
        yield None
        return
    # A forked process would copy the locks of torch's threads, and could wait for them forever.
    context = get_context("spawn")
    with ProcessPoolExecutor(count, mp_context=context, initializer=_end_with_parent) as executor:
        yield executor


def _end_with_parent() -> None:
    """Start a thread that ends this worker process if the parent dies; it would otherwise wait forever."""
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def results(tasks: Sequence[Task], compress: Callable[..., Any], executor: Executor | None) -> list[Any]:
    """Call a function for each task, and return the results in the order of the tasks."""
    if executor is None:
        found: list[Any] = []
        for _, some in groupby(tasks, _inputs):
            with remembering():  # tasks with the same inputs share the factorized moment
                found += [compress(*task) for task in some]
        return found
    return Calls(compress, tasks, [x.matrix.numel() for x in tasks], executor).results()


class Calls:
    """Calls of a function that an executor has begun, or that this process has finished.

    Args:
        function: the function; for an executor with processes, it must be at the top level of a module.
        arguments: arguments of each call.
        sizes: number of weights of each call. The largest calls begin first, so that no worker is left with
            one of them when all others have finished.
        executor: executor that calls the function; if None, this process does so at once.

    Raises:
        WorkerError: a process of the executor died.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        arguments: Sequence[Sequence[Any]],
        sizes: Sequence[int],
        executor: Executor | None,
    ) -> None:
        self.done = [] if executor is not None else [function(*x) for x in arguments]
        self.futures: dict[int, Future[Any]] = {}
        if executor is not None:
            with self._watched():
                for k in sorted(range(len(arguments)), key=lambda k: sizes[k], reverse=True):
                    self.futures[k] = executor.submit(function, *arguments[k])

    def results(self) -> list[Any]:
        """Wait for the calls, and return their results in the order of the arguments.

        Raises:
            WorkerError: a process of the executor died.
        """
        try:
            with self._watched():
                return self.done + [self.futures[k].result() for k in range(len(self.futures))]
        finally:
            self.cancel()

    def cancel(self) -> None:
        """Cancel the calls that have not begun."""
        for future in self.futures.values():
            future.cancel()

    @contextmanager
    def _watched(self) -> Iterator[None]:
        try:
            yield
        except BrokenExecutor as error:
            raise WorkerError(
                f"A worker died ({error}), most likely because memory ran out. Use fewer workers. Finished "
                "layers are kept; run the same command again to continue."
            ) from error


def price_group(
    group: Sequence[Priced],
    config: CompressionConfig,
    objective: str,
    families: Sequence[str],
    alone: bool,
) -> list[tuple[list[Candidate], list[float]]]:
    """Find the candidates of layers with the same inputs, and the singular values of their weights.

    Args:
        group: the layers.
        config, objective: see `find_candidates`.
        families: families of the networks among the candidates; without any, no singular values are computed.
        alone: whether to use a single thread (see `compress_alone`).
    """
    with one_thread() if alone else nullcontext():
        found = candidates_of_group(group, config, objective, families)
        spectra = [singular_values(x.matrix).tolist() if families else [] for x in group]
    return list(zip(found, spectra, strict=True))


def _inputs(task: Task) -> int:
    """Return a key that tasks with the same moment of the inputs share; without one, each has its own."""
    columns = task.weighting.columns
    return id(task if columns is None else columns)


def row_parts(task: Task) -> list[Task]:
    """Split a task into tasks for parts of the rows; return it alone if its rows depend on each other."""
    matrix, layer, weighting, rounding = task
    rows = weighting.rows
    rounded = layer.topology is not None and layer.topology.family == "dense" and layer.storage.quantized
    if not rounded or (rows is not None and rows.ndim == 2) or len(matrix) <= PART_ROWS:
        return [task]
    return [
        Task(
            part,
            replace(
                layer,
                shape=(len(part), part.shape[1]),
                topology=dense(out_features=len(part), in_features=part.shape[1]),
            ),
            replace(weighting, rows=None if rows is None else rows[k * PART_ROWS : (k + 1) * PART_ROWS]),
            rounding,
        )
        for k, part in enumerate(matrix.split(PART_ROWS))
    ]


def join_rows(task: Task, parts: Sequence[Task], made: Sequence[Made]) -> Made:
    """Join the layers and relative errors that `compress_layer` returned for the parts of a task."""
    if len(parts) == 1:
        return made[0]
    assert task.layer.topology is not None
    cores = [core for layer, _ in made for core in layer.stored_cores if isinstance(core, PackedCore)]
    tensors = {name: torch.cat([core.tensors[name] for core in cores]) for name in cores[0].names}
    core = PackedCore(cores[0].number_format, task.matrix.shape, cores[0].columns, tensors)
    layer = linear_from_stored(
        task.layer.topology,
        {"core_matrix": core},
        source="linear",
        storage=task.layer.storage,
        like=made[0][0].compute_like,
    )
    energies = [float(energy(part.matrix)) for part in parts]
    squares = sum(error**2 * own for (_, error), own in zip(made, energies, strict=True))
    return layer, math.sqrt(squares / max(sum(energies), 1e-300))
