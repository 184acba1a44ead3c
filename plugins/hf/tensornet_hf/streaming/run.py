"""Compress a model folder weight by weight, without holding the model in memory."""

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

import tensornet.compression
from tensornet._util import progress_bar
from tensornet.calibration import CalibrationStats
from tensornet.compression import CompressionConfig, CompressionPlan, CompressionReport
from tensornet.compression.reach import Reach, measure_reach
from tensornet.compression.report import layer_reports
from tensornet.errors import DestinationError, FormatError, TensorNetError
from tensornet.io import CHUNK, ShardTask, Slice, Written, file_digest, write_file, write_shard
from tensornet.nn.targets import list_weights
from tensornet.nn.unfuse import ExpertMatrix, unfused
from tensornet.streaming.pool import run_tasks
from tensornet.streaming.worker import (
    Piece,
    PieceTask,
    StackTask,
    Use,
    compress_piece,
    compress_stack,
    copy_matrix,
    one_thread,
    peak_memory,
)
from tensornet_hf.checkpoint.folders import check_free
from tensornet_hf.checkpoint.headers import INDEX
from tensornet_hf.checkpoint.model_card import CARD, write_card
from tensornet_hf.streaming.checkpoint_report import CheckpointReport
from tensornet_hf.streaming.expert_slices import ExpertSource, take_experts_apart
from tensornet_hf.streaming.journal import Staging, staging, staging_folder
from tensornet_hf.streaming.manifest import MANIFEST, manifest_text
from tensornet_hf.streaming.mapped_model import mapped_model
from tensornet_hf.streaming.resume import Past, identity, take_over
from tensornet_hf.streaming.shards import Part, collect_parts, config_text, guards, index_text, layout
from tensornet_hf.streaming.skeleton import model_skeleton
from tensornet_hf.streaming.source import Source, check_unchanged, marks_now, open_source
from tensornet_hf.streaming.tasks import find_stack_tasks, find_tasks

_T = TypeVar("_T")
_R = TypeVar("_R")

#: Files are filled up to this size. Space on the disk is needed for the result and one more of them.
MAX_SHARD_BYTES = 5_000_000_000


def compress_checkpoint(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    config: CompressionConfig,
    *,
    workers: int = 1,
    executor: Executor | None = None,
    device: str = "cpu",
    resume: bool = True,
    plan: CompressionPlan | None = None,
    stats: str | os.PathLike[str] | CalibrationStats | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    force: bool = False,
    progress: bool = False,
) -> CheckpointReport:
    """Compress a model folder into a new one, tensor by tensor, without ever loading the model.

    The new folder is the one that `tensornet.compress` and `save_pretrained` would give, and `load` reads
    it. Which process computed what, in which order, and how often a run was interrupted leaves no trace in
    it: the bytes are the same on one kind of processor. It appears at `dst` when it is complete; until then
    everything is in `.NAME.partial` beside it. A run that was interrupted, by whatever, is continued by the
    same call; only the weights that were being worked on are done again.

    Memory: each worker holds one weight, in double precision a few times over; see `CheckpointReport`. Where
    experts may share a core (`share_experts`), it holds those of one stack.

    Args:
        src: a folder with `config.json` and safetensors files; it is only read.
        dst: the new folder.
        config: options of the compression.
        workers: processes. With 1, everything happens in this one.
        executor: runs the work instead: any `concurrent.futures.Executor` whose workers see the same file
            system, for example `dask.distributed.Client(...).get_executor()`.
        device: where weights are decomposed.
        resume: continue an interrupted run; otherwise its work is thrown away.
        plan: to carry out, instead of planning; layers it does not name stay dense.
        stats: from `calibrate_checkpoint` or `tensornet.calibrate`, better as a file. With them and without
            a plan, one is made here, in this process, over all layers together. Without, each layer is
            planned by the error of its weight alone.
        max_shard_bytes: files of weights are filled up to this size; one tensor may be larger.
        force: replace a model folder that is at the destination, once the new one is complete.
        progress: show progress bars.

    Raises:
        DestinationError: the destination exists, another run writes it, or writing failed (full disk);
            what is finished is kept.
        FormatError: the source is damaged or contradictory, or changed since the interrupted run.
        TargetError, BudgetError, NonFiniteError, TopologyError: a layer cannot be compressed so; the message
            names it.
        WorkerError: workers die again and again.
        ValueError: `workers` or `max_shard_bytes` below 1, or a device that is not there.

    Example:
        >>> config = tn.CompressionConfig(topology="low_rank", param_ratio=0.5)
        >>> report = th.compress_checkpoint(th.embedded.gpt2_path(), "small", config)
        >>> type(th.load("small").transformer.h[0].mlp.c_fc).__name__
        'MPOLinear'
    """
    start = time.perf_counter()
    options = _Options(config, workers, executor, device, resume, max_shard_bytes, progress)
    folder, target = Path(src), Path(os.path.abspath(Path(dst).expanduser()))
    check_free(target, force=force, sources=(folder,))
    if target.resolve().is_relative_to(folder.resolve()):
        raise DestinationError(f"{target} lies inside the source {folder}; choose another destination.")
    dense = _open_dense(folder)
    with _told_apart(folder, target), staging(target) as work:
        measured = _stats_file(stats, work)
        if plan is None and (measured is not None or options.config.plans_formats):
            plan = _make_plan(folder, measured, options, work)
        made = _compress(dense, plan, measured, options, work)
        check_unchanged(dense.source, marks_now(dense.source), since="this run began")
        work.publish(target)
    plan = plan or CompressionPlan((), topology_options=config.topology_options)
    return _report(dense, plan, made, time.perf_counter() - start)


@dataclass(frozen=True)
class _Options:
    """Options of `compress_checkpoint` that hold for the whole run."""

    config: CompressionConfig
    workers: int
    executor: Executor | None
    device: str
    resume: bool
    max_shard_bytes: int
    progress: bool

    def __post_init__(self) -> None:
        if self.workers < 1 or self.max_shard_bytes < 1:
            raise ValueError(
                "workers and max_shard_bytes must be at least 1, got "
                f"{self.workers} and {self.max_shard_bytes}."
            )
        if self.executor is None:  # whose workers may have what this machine lacks
            _check_device(self.device)

    def run(
        self,
        function: Callable[[_T], _R],
        tasks: Iterable[tuple[str, _T]],
        done: Callable[[str, _R], None],
    ) -> None:
        """Run tasks in worker processes or by the given executor."""
        run_tasks(function, tasks, done, workers=self.workers, executor=self.executor)


@dataclass(frozen=True)
class _Dense:
    """Source model: its folder, its skeleton, and the locations of its parameters."""

    source: Source
    skeleton: PreTrainedModel
    stored: Mapping[str, str]
    experts: ExpertSource
    names: tuple[str, ...]  # of all tensors of the dense model


@dataclass(frozen=True)
class _Made:
    """Files written so far, in the staging folder."""

    pieces: Mapping[str, Piece]
    tensors: Mapping[str, Slice]
    files: list[Written]
    left_out: list[str]
    reach: Reach
    resumed: int


def _open_dense(folder: Path) -> _Dense:
    source = open_source(folder)
    skeleton, stored = model_skeleton(source.config, source.tensors)
    names = tuple(skeleton.state_dict())
    return _Dense(source, skeleton, stored, take_experts_apart(skeleton, source.tensors, stored), names)


def _make_plan(folder: Path, measured: Path | None, options: _Options, work: Staging) -> CompressionPlan:
    """Plan all layers together, in this process."""
    with one_thread():
        stats = None if measured is None else CalibrationStats.load(measured)
        model = mapped_model(folder, spill=work.folder)
        return tensornet.compression.plan(model, options.config, stats, progress=options.progress)


def _compress(
    dense: _Dense, plan: CompressionPlan | None, measured: Path | None, options: _Options, work: Staging
) -> _Made:
    """Write all contents of the new folder into the staging folder."""
    source, config = dense.source, options.config
    stored = {name: source.tensors[key] for name, key in dense.stored.items()}
    tasks = find_tasks(
        dense.skeleton,
        stored,
        dense.experts.matrices,
        config,
        plan,
        measured,
        device=options.device,
        folder=work.pieces,
    )
    stacks = find_stack_tasks(dense.skeleton, tasks, config, plan)
    with unfused(dense.skeleton):
        weights = list_weights(dense.skeleton)
    reach = measure_reach(weights, tasks, unseen=() if plan is None else plan.unseen)
    decisive: dict[str, Any] = {"device": options.device, "shard": options.max_shard_bytes}
    if measured is not None:
        decisive["stats"] = file_digest(measured).sha256
    if plan is not None:
        decisive["plan"] = plan.to_dict()
    me = identity(source, config.to_dict() | decisive)
    past = take_over(work, me, source) if options.resume else Past({}, {})
    work.begin([me, *past.entries()])
    pieces = _make_all_pieces(work, tasks, stacks, past, options)
    beside = _make_pieces(copy_matrix, work, _left_dense(dense.experts, pieces, config, work), past, options)
    layer_of = {f"{use.name}.weight": name for name, task in tasks.items() for use in task.uses}
    parts, left_out = collect_parts(
        source, dense.stored, dense.experts, dense.skeleton.state_dict(), layer_of, pieces | beside
    )
    rest = {"config.json": config_text(source.config, dense.skeleton, pieces.values(), config)}
    parts.append(guards(dense.names, dense.skeleton, pieces.values(), source.tensors.values()))
    shards = layout(parts, options.max_shard_bytes)
    if len(shards) > 1:
        rest[INDEX] = index_text(shards)
    files = _write_shards(work, shards, past, options)
    written = _finish(work, source, type(dense.skeleton).__name__, files, rest)
    tensors = {name: x for part in parts for name, x in part.tensors.items()}
    return _Made(pieces, tensors, written, left_out, reach, len(past.pieces))


def _unpacked(piece: Piece) -> int:
    """Count the integers of a layer beyond the bytes they are packed in."""
    if piece.plan.topology is None or not piece.plan.storage.quantized:
        return 0
    return piece.plan.params_after - sum(part.numel for part in piece.tensors.values())


def _report(dense: _Dense, plan: CompressionPlan, made: _Made, seconds: float) -> CheckpointReport:
    pieces, source = made.pieces.values(), dense.source.tensors
    done = replace(plan, layers=tuple(piece.plan for piece in pieces))
    kept = [source[key] for key in source if key not in made.left_out]
    compression = CompressionReport(
        layers=layer_reports(done, {name: piece.error for name, piece in made.pieces.items()}),
        model_params_before=sum(part.numel for part in kept),
        model_params_after=sum(part.numel for part in made.tensors.values()) + sum(map(_unpacked, pieces)),
        model_bytes_before=sum(part.nbytes for part in kept),
        model_bytes_after=sum(part.nbytes for part in made.tensors.values()),
        seconds=seconds,
        plan=done,
        reach=made.reach,
    )
    remote = {x.worker: x.peak_memory for x in pieces if x.worker not in (0, os.getpid())}
    read = [matrix.nbytes for matrix in dense.experts.matrices.values()]
    read += [part.nbytes for key, part in source.items() if key not in dense.experts.layers]
    return CheckpointReport(
        compression=compression,
        files={file.name: file.sha256 for file in made.files},
        left_out=tuple(made.left_out),
        resumed=made.resumed,
        workers=max(1, len(remote)),
        largest_tensor=max(read, default=0),
        peak_memory=peak_memory(),
        worker_memory=max((x.peak_memory for x in pieces if x.worker in remote), default=0),
    )


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # unknown, absent, or not built in
        raise ValueError(
            f"device={device!r} cannot be used here: {str(error).splitlines()[0]:.200} Use device='cpu', or "
            "one that torch.accelerator finds."
        ) from error


def _stats_file(stats: str | os.PathLike[str] | CalibrationStats | None, work: Staging) -> Path | None:
    """Return the file in which workers find the statistics."""
    if not isinstance(stats, CalibrationStats):
        return None if stats is None else Path(stats)
    path = work.folder / "stats.safetensors"
    stats.save(path)
    return path


def _make_all_pieces(
    work: Staging,
    tasks: Mapping[str, PieceTask],
    stacks: Mapping[str, StackTask],
    past: Past,
    options: _Options,
) -> dict[str, Piece]:
    """Run the unfinished tasks of stacks of experts, each as a whole, and then those of all other weights."""
    made: dict[str, Piece] = {}
    todo: dict[str, StackTask] = {}
    for first, stack in stacks.items():
        names = [task.uses[0].name for task in stack.members]
        if all(name in past.pieces for name in names):
            made |= {name: past.pieces[name] for name in names}
        else:
            todo[first] = stack
    with progress_bar(
        total=len(stacks),
        initial=len(stacks) - len(todo),
        desc="compressing stacks",
        disable=not options.progress or not stacks,
        unit="stack",
    ) as bar:

        def done(name: str, pieces: list[Piece]) -> None:
            for piece in pieces:
                made[piece.plan.name] = piece
                work.note({"piece": piece.to_dict()})
            bar.update()

        options.run(compress_stack, todo.items(), done)
    alone = replace(options.config, share_experts=False)
    inside = {task.uses[0].name for stack in stacks.values() for task in stack.members}
    single = {name: replace(task, config=alone) for name, task in tasks.items() if name not in inside}
    made |= _make_pieces(compress_piece, work, single, past, options)
    return {name: made[name] for name in tasks}


def _make_pieces(
    make: Callable[[PieceTask], Piece],
    work: Staging,
    tasks: dict[str, PieceTask],
    past: Past,
    options: _Options,
) -> dict[str, Piece]:
    """Run unfinished tasks, large weights first, so that workers finish at about the same time."""
    pieces = {name: past.pieces[name] for name in tasks if name in past.pieces}
    if make is copy_matrix:
        pieces = {name: piece for name, piece in pieces.items() if piece.written is not None}
    todo = [(name, task) for name, task in tasks.items() if name not in pieces]
    with progress_bar(
        total=len(tasks),
        initial=len(pieces),
        desc="compressing",
        disable=not options.progress,
        unit="layer",
    ) as bar:

        def done(name: str, piece: Piece) -> None:
            pieces[name] = piece
            work.note({"piece": piece.to_dict()})
            bar.update()

        options.run(make, sorted(todo, key=lambda x: -x[1].weight.nbytes), done)
    return {name: pieces[name] for name in tasks}


def _left_dense(
    experts: ExpertSource, pieces: Mapping[str, Piece], config: CompressionConfig, work: Staging
) -> dict[str, PieceTask]:
    """Create copy tasks for matrices that stay dense in a stack whose other matrices are compressed."""
    changed = {experts.modules[name] for name in experts.matrices if name in pieces and pieces[name].specs}
    tasks = {}
    for index, (name, matrix) in enumerate(experts.matrices.items()):
        if experts.modules[name] in changed and not (name in pieces and pieces[name].specs):
            path = work.pieces / f"dense-{index:06d}.safetensors"
            use = Use(name, "expert", registered_in=ExpertMatrix.__module__)
            tasks[name] = PieceTask((use,), matrix, config, None, None, "cpu", path)
    return tasks


def _write_shards(
    work: Staging, shards: dict[str, list[Part]], past: Past, options: _Options
) -> list[Written]:
    """Assemble the weight shards, and remove the pieces that were copied into them."""
    keys = {file: [part.key for part in parts] for file, parts in shards.items()}
    if strange := sorted(file for file, (_, old) in past.shards.items() if keys.get(file) != old):
        raise FormatError(
            f"{work.folder} holds {', '.join(strange)} with other layers than this run would put there. "
            "Start again with resume=False."
        )
    written = {file: done for file, (done, _) in past.shards.items()}
    todo = {
        file: ShardTask(work.out / file, {name: x for part in parts for name, x in part.tensors.items()})
        for file, parts in shards.items()
        if file not in written
    }
    with progress_bar(
        total=len(shards), initial=len(written), desc="writing", disable=not options.progress, unit="file"
    ) as bar:

        def done(file: str, result: Written) -> None:
            written[file] = result
            work.note({"file": file, "sha256": result.sha256, "nbytes": result.nbytes, "parts": keys[file]})
            for used in {
                part.file for part in todo[file].tensors.values() if part.file.parent == work.pieces
            }:
                used.unlink(missing_ok=True)
            bar.update()

        if options.executor is None:  # copying leaves the interpreter free: threads do, and start at once
            with ThreadPoolExecutor(options.workers) as threads:
                run_tasks(write_shard, todo.items(), done, executor=threads)
        else:
            options.run(write_shard, todo.items(), done)
    return [written[file] for file in shards]


def _finish(
    work: Staging, source: Source, architecture: str, files: list[Written], rest: dict[str, str]
) -> list[Written]:
    """Add all files but weights, and the manifest."""
    for file in work.out.rglob("*"):
        if file.is_file() and file.name not in {done.name for done in files}:
            file.unlink()  # of an earlier run that did not come to its end
    written = list(files)
    for name in source.others:
        if name == MANIFEST:
            continue
        (work.out / name).parent.mkdir(parents=True, exist_ok=True)
        with (source.folder / name).open("rb") as opened:
            copied = write_file(work.out / name, iter(partial(opened.read, CHUNK), b""))
        written.append(replace(copied, name=name))
    written += [write_file(work.out / name, [text.encode()]) for name, text in rest.items()]
    if CARD not in source.others:
        write_card(work.out, architecture)
        written.append(file_digest(work.out / CARD))
    write_file(work.out / MANIFEST, [manifest_text(written).encode()])
    return written


@contextmanager
def _told_apart(source: Path, target: Path) -> Iterator[None]:
    """Distinguish failures of reading from failures of writing."""
    try:
        yield
    except TensorNetError:
        raise
    except OSError as error:
        if str(error.filename or "").startswith(str(source)):
            raise FormatError(f"Reading {source} failed: {error}. What is finished is kept.") from error
        raise DestinationError(
            f"Writing {target} failed: {error}. What is finished is kept in {staging_folder(target)}: free "
            "some space and run the same command again, or delete that folder."
        ) from error
