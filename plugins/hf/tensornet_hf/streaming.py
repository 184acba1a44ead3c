"""Compress a checkpoint of any size: plan on a lazily loaded model, then compress shard by shard.

A shard is a sequence of stored tensors with a total size of at most `max_shard_bytes`. Each shard is
compressed and written separately, in this process or in workers. A resumed run skips finished shards. These
files are written:

    .NAME.partial/lock           locked while a run writes to this folder
    .NAME.partial/run.json       everything that the result depends on: source, options, versions
    .NAME.partial/plan.json      the plan
    .NAME.partial/shards/        a description of each finished shard, with the checksum of its file
    .NAME.partial/out/           the new model folder, which is renamed to NAME when it is complete
"""

import hashlib
import json
import os
import shutil
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from tqdm.auto import tqdm

import tensornet as tn
import tensornet.compression
from tensornet.calibration.stats import CalibrationStats
from tensornet.compression.apply import apply_plan
from tensornet.compression.compress import calibration_config
from tensornet.compression.config import CompressionConfig
from tensornet.compression.plan import CompressionPlan
from tensornet.compression.report import CompressionReport, measure_coverage
from tensornet.errors import DestinationError, FormatError, TargetError, TensorNetError
from tensornet.io import (
    CHUNK,
    FLOATS,
    Written,
    file_digest,
    intact,
    read_header,
    take_place,
    write_file,
    write_shard,
    write_tensors,
)
from tensornet.nn.targets import find_targets, list_weights
from tensornet.nn.unfuse import unfused
from tensornet_hf.checkpoint import (
    CARD,
    INDEX,
    WEIGHT_SUFFIXES,
    WEIGHTS,
    Checkpoint,
    check_free,
    read_dense,
    read_json,
    weight_files,
    write_card,
)
from tensornet_hf.lazy_model import LazyModel, open_lazily
from tensornet_hf.quantizer import GUARD_SHAPE, TensorNetworkConfig, config_of, replaced_names

#: Default limit on the size of a shard in the source, in bytes; the compressed shard must fit into memory.
MAX_SHARD_BYTES = 2_000_000_000


class WorkerError(TensorNetError, RuntimeError):
    """Raised if a worker process died."""


def compress_checkpoint(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    config: CompressionConfig | CompressionPlan,
    *,
    workers: int = 1,
    executor: Executor | None = None,
    device: str = "cpu",
    resume: bool = True,
    stats: str | os.PathLike[str] | CalibrationStats | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    force: bool = False,
    progress: bool = False,
) -> CompressionReport:
    """Compress a model folder into a new folder, shard by shard, without loading the whole model.

    The result equals that of `tensornet.compress` and `save_pretrained`. Until it is complete, all files are
    in the staging folder `.NAME.partial`, which is then renamed to `dst`. To resume an interrupted run,
    repeat the call: finished shards are skipped, and the result has the same bytes as without interruption.

    Weights are memory-mapped, so each process needs memory for the compressed layers of a shard and for a few
    copies of a single weight in double precision. Stacks of experts that are stored matrix by matrix are
    assembled in the staging folder, which needs disk space for them.

    Args:
        src: a folder with `config.json` and safetensors files; it is only read.
        dst: the new folder.
        config: compression options, or a plan (which may have been edited or loaded). Layers that are not in
            the plan stay dense.
        workers: number of processes that compress shards. With more than one, protect the code of a script by
            `if __name__ == "__main__":`, as usual with multiprocessing.
        executor: executor that compresses the shards; `workers` is then ignored. Any
            `concurrent.futures.Executor` can be used if its workers have access to the same file system, such
            as `dask.distributed.Client(...).get_executor()`.
        device: device on which weights are compressed.
        resume: continue an interrupted run; if False, delete the files of that run.
        stats: statistics from `calibrate_checkpoint` or `tensornet.calibrate`, or a file of statistics.
        max_shard_bytes: largest size of a shard in the source, in bytes. A larger module becomes a shard of
            its own.
        force: replace an existing model folder, once the new folder is complete.
        progress: show progress bars.

    Returns:
        A report like that of `tensornet.compress`.

    Raises:
        DestinationError: the destination exists, another run is writing it, or writing failed (full disk);
            finished shards are kept.
        FormatError: the source is damaged or contradictory, or has changed since the interrupted run.
        TargetError: the source is compressed already.
        TargetError, BudgetError, NonFiniteError, TopologyError: a layer cannot be compressed as requested;
            the message names the layer.
        WorkerError: a worker died, most likely because memory ran out.
        ValueError: `workers` or `max_shard_bytes` is below 1.

    Example:
        >>> config = tn.CompressionConfig(topology="low_rank", param_ratio=0.5)
        >>> report = th.compress_checkpoint(th.embedded.gpt2_path(), "small", config)
        >>> type(th.load("small").transformer.h[0].mlp.c_fc).__name__
        'MPOLinear'
    """
    started = time.perf_counter()
    for name, number in (("workers", workers), ("max_shard_bytes", max_shard_bytes)):
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}.")
    if executor is None:
        torch.empty(0, device=device)  # raises if the device is not available
    folder, target = Path(src), Path(dst).expanduser().resolve()
    check_free(target, force=force, sources=(folder,))
    if target.resolve().is_relative_to(folder.resolve()):
        raise DestinationError(f"{target} is inside the source {folder}; choose another destination.")
    source = read_dense(folder)
    marks = file_marks(folder)
    open_lazily(source, only=())  # raises for an invalid model before anything is written
    plan = config if isinstance(config, CompressionPlan) else None
    options = calibration_config(config) if isinstance(config, CompressionPlan) else config
    with _reading_or_writing(folder, target), staging(target) as work:
        check_free(target, force=force, sources=(folder,))  # another run may have written the destination
        stats_file = work / "stats.safetensors" if isinstance(stats, CalibrationStats) else stats
        if isinstance(stats, CalibrationStats):
            stats.save(work / "stats.safetensors")
        stats_file = None if stats_file is None else Path(stats_file)
        decisive = {
            "config": config.to_dict(),
            "device": device,
            "bytes": max_shard_bytes,
            "stats": None if stats_file is None else file_digest(stats_file).sha256,
        }
        _begin(work, folder, marks, decisive, resume=resume)

        # Make a plan for the whole model, unless an interrupted run has already saved it.
        lazy = open_lazily(source, spill=work)
        _check_mapped(lazy, source, options)
        if plan is None and (work / "plan.json").is_file():
            plan = CompressionPlan.load(work / "plan.json")
        if plan is None:
            with one_thread():
                loaded = None if stats_file is None else CalibrationStats.load(stats_file)
                plan = tensornet.plan(lazy.model, options, loaded, progress=progress)
            write_file(work / "plan.json", [json.dumps(plan.to_dict()).encode()])
        with unfused(lazy.model):
            weights = list_weights(lazy.model)

        # Compress every unfinished shard in this process, in worker processes or with the executor.
        shards = _cut(lazy, source, plan, max_shard_bytes)
        done: dict[str, Any] = {name: _finished(work, name) for name in shards}
        tasks = [
            (folder, work, name, *shards[name], stats_file, device)
            for name, made in done.items()
            if made is None
        ]
        bar = tqdm(
            total=len(shards),
            initial=len(shards) - len(tasks),
            desc="compressing",
            disable=not progress,
            unit="shard",
        )
        with bar:
            for made in _run(tasks, workers, executor):
                done[made["file"]] = made
                bar.update()

        # Write config.json and the index, copy the other files, and move the new folder to the destination.
        parts = list(done.values())
        _finish(work, source, type(lazy.model).__name__, parts)
        _check_unchanged(folder, marks, file_marks(folder), since="this run began")
        check_free(target, force=force, sources=(folder,))
        take_place(work / "out", target, force=force)
        shutil.rmtree(work, ignore_errors=True)  # another run may have opened the lock file in this folder
    if lazy.surplus:
        warnings.warn(
            f"Tensors were not copied because the model does not have them: {', '.join(lazy.surplus)}.",
            stacklevel=2,
        )
    kept = [part for key, part in source.tensors.items() if key not in lazy.surplus]
    params = sum(part.numel for part in kept)
    return CompressionReport(
        model_params_before=params,
        model_params_after=params - plan.params_before + plan.params_after,
        model_bytes_before=sum(part.nbytes for part in kept),
        model_bytes_after=sum(size for part in parts for size in part["tensors"].values()),
        seconds=time.perf_counter() - started,
        plan=plan.with_errors({name: x for part in parts for name, x in part["errors"].items()}),
        coverage=measure_coverage(weights, [layer.name for layer in plan], unseen=plan.unseen),
    )


@contextmanager
def staging(destination: Path) -> Iterator[Path]:
    """Create the staging folder of a destination if necessary, and lock it within a `with` block.

    The operating system releases the lock when the process ends, even if the process is killed.

    Raises:
        DestinationError: another run has locked the folder.
    """
    folder = staging_folder(destination)
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise DestinationError(
            f"Another run is writing {destination} (it has locked {folder / 'lock'}). Wait until it has "
            "finished, or choose another destination."
        ) from error
    try:
        yield folder
    finally:
        lock.release()


def staging_folder(destination: Path) -> Path:
    """Return the staging folder of a destination; both have the same parent folder."""
    return destination.with_name(f".{destination.name}.partial")


def digest(content: Any) -> str:
    """Return the SHA-256 of JSON-ready content; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def file_marks(folder: Path) -> dict[str, str]:
    """Return the size and modification time of each file that is read from a model folder, by relative path.

    A resumed run compares them with the sizes and times that the interrupted run recorded.
    """
    marks = {}
    for name in ["config.json", *(file.name for file in weight_files(folder)[0]), *_other_files(folder)]:
        stat = (folder / name).stat()
        marks[name] = f"{stat.st_size} bytes, {stat.st_mtime_ns} ns"
    return marks


def _other_files(folder: Path) -> list[str]:
    """Return the relative paths of all files except config.json, index, weight files and hidden files."""
    found = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        written = name == "config.json" or name.endswith(INDEX) or path.suffix in WEIGHT_SUFFIXES
        if path.is_file() and not written and not any(x.startswith(".") for x in name.split("/")):
            found.append(name)
    return found


def _check_unchanged(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any], *, since: str) -> None:
    """Raise FormatError if `before` and `now` differ; `since` says in words when `before` was recorded."""
    if changed := sorted(x for x in before.keys() | now.keys() if before.get(x) != now.get(x)):
        raise FormatError(
            f"{', '.join(changed)} in {folder} changed since {since}, so finished shards belong to the old "
            "content. Restore the old files, or start again with resume=False (--no-resume)."
        )


def _begin(
    work: Path, folder: Path, marks: Mapping[str, str], decisive: Mapping[str, Any], *, resume: bool
) -> None:
    """Record what the result depends on; when resuming, compare it with the record of the interrupted run.

    Raises:
        FormatError: the source has changed, or the interrupted run had other options or library versions.
    """
    record = {
        "library": f"tensornet {tn.__version__}, torch {torch.__version__}",
        "options": digest(decisive),
        "marks": dict(marks),
    }
    path = work / "run.json"
    if resume and path.is_file():
        earlier = read_json(path)
        _check_unchanged(folder, earlier.get("marks") or {}, marks, since="the interrupted run")
        for key, what in (("options", "other options"), ("library", "other versions of the library")):
            if earlier.get(key) != record[key]:
                raise FormatError(
                    f"The interrupted run in {work} had {what}. Use the same to continue it, or start again "
                    "with resume=False (--no-resume)."
                )
    else:
        (work / "plan.json").unlink(missing_ok=True)
        for name in ("shards", "out"):
            shutil.rmtree(work / name, ignore_errors=True)
        write_file(path, [json.dumps(record).encode()])
    for name in ("shards", "out"):
        (work / name).mkdir(exist_ok=True)


def _check_mapped(lazy: LazyModel, source: Checkpoint, config: CompressionConfig) -> None:
    """Check that the weight of each layer to compress can be memory-mapped from the files.

    Raises:
        TargetError: a weight cannot be memory-mapped.
    """
    with unfused(lazy.model), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # planning repeats these warnings
        targets = [x for x in find_targets(lazy.model, config) if not x.skip]
    for target in targets:
        if target.weight.is_meta:
            keys = [key for name in target.names for key in lazy.stored.get(f"{name}.weight", ())]
            dtype = source.tensors[keys[0]].dtype if keys else None
            form = "stored in another form than the model uses"
            how = form if dtype in (None, *FLOATS) else f"stored as {dtype}"
            raise TargetError(
                f"The weight of {target.name!r} is {how}, so it cannot be mapped. Use the model before "
                f"quantization, exclude the layer (exclude_modules=[{target.name!r}]), or load the model and "
                "use tensornet.compress."
            )


def _cut(
    lazy: LazyModel, source: Checkpoint, plan: CompressionPlan, max_bytes: int
) -> dict[str, tuple[list[str], CompressionPlan]]:
    """Divide the stored tensors into shards in the order of the files, with each module in a single shard.

    Returns:
        `{name of a file to write: (names of its parameters and buffers, plan of their layers)}`.
    """
    places = {key: (part.file.name, part.start) for key, part in source.tensors.items()}
    units: dict[str, list[str]] = {}  # maps modules to the names of their tensors
    for name in sorted(lazy.stored, key=lambda name: min(places[key] for key in lazy.stored[name])):
        units.setdefault(name.rpartition(".")[0], []).append(name)
    groups: list[list[str]] = []
    filled = max_bytes
    for unit, names in units.items():
        size = sum(source.tensors[key].nbytes for name in names for key in lazy.stored[name])
        if not groups or filled + size > max_bytes:
            groups, filled = [*groups, []], 0
        groups[-1].append(unit)
        filled += size

    # A layer belongs to the shard that contains its weight (under any of its tied names). If its matrix is
    # part of a stack of experts, the layer belongs to the shard that contains the stack.
    weights = [x for x in lazy.model.named_parameters(remove_duplicate=False) if x[1].ndim > 1]
    owner = {id(p): name.rpartition(".")[0] for name, p in weights if name in lazy.stored}
    home = {name.rpartition(".")[0]: owner[id(p)] for name, p in weights if id(p) in owner}
    for module in list(home):  # the stack may belong to a child of the unfused module
        home.setdefault(module.rpartition(".")[0], home[module])
    layers: dict[str, list[Any]] = {}
    for layer in plan:
        parts = layer.name.split(".")
        around = [".".join(parts[:end]) for end in range(len(parts), 0, -1)]
        layers.setdefault(next(home[x] for x in around if x in home), []).append(layer)
    shards = {}
    for number, group in enumerate(groups, start=1):
        file = WEIGHTS if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        chosen = tuple(layer for unit in group for layer in layers.get(unit, ()))
        shards[file] = [name for unit in group for name in units[unit]], replace(plan, layers=chosen)
    return shards


@torch.no_grad()
def _compress_shard(
    folder: Path,
    work: Path,
    file: str,
    names: list[str],
    plan: CompressionPlan,
    stats: Path | None,
    device: str,
) -> dict[str, Any]:
    """Compress the layers of a shard, and write its file.

    The function uses a single thread: the result must not depend on the order of summation, and other workers
    need the processor cores.

    Args:
        folder: the source.
        work: the staging folder.
        file: name of the file to write.
        names: names of the parameters and buffers in this file.
        plan: plan of the layers in this file.
        stats: file of the statistics with which the plan was made.
        device: device on which weights are compressed.

    Returns:
        The description of the finished shard, which is also written to `shards/`.
    """
    with one_thread(), tempfile.TemporaryDirectory(dir=work, prefix="cores.") as scratch:
        source = read_dense(folder)
        lazy = open_lazily(source, only=names, spill=scratch)
        model = lazy.model
        if torch.device(device).type != "cpu":
            for name in names:
                tensor = model.get_parameter_or_buffer(name)
                tensor.data = tensor.data.to(device)
        before = model.state_dict(keep_vars=True)
        errors = apply_plan(model, plan, None if stats is None else CalibrationStats.load(stats))
        after, described = model.state_dict(keep_vars=True), config_of(model)

        # Collect the tensors of compressed layers and, for each replaced weight, a guard (`replaced_names`).
        new = {n: x.detach().cpu().contiguous() for n, x in after.items() if n not in before}
        new = {name: x for name, x in new.items() if name not in described.ties}
        guards = replaced_names(before, after, described.layers)
        new |= {name: torch.empty(GUARD_SHAPE, dtype=model.dtype) for name in guards}
        cores = Path(scratch, "cores.safetensors")
        write_tensors(cores, new)
        tensors = dict(read_header(cores))
        for name in names:
            if name in after:
                for key in lazy.stored[name]:
                    tensors[name if name in lazy.renamed else key] = source.tensors[key]
        written = write_shard(work / "out" / file, tensors)
    made = {
        "file": file,
        "bytes": written.nbytes,
        "sha256": written.sha256,
        "tensors": {name: x.nbytes for name, x in tensors.items()},
        "errors": errors,
        "layers": dict(described.layers),
        "ties": described.ties,
    }
    write_file(work / "shards" / f"{file}.json", [json.dumps(made).encode()])
    return made


def _finished(work: Path, file: str) -> dict[str, Any] | None:
    """Read the description of a shard; return None if the shard is unfinished or its file has changed."""
    record = work / "shards" / f"{file}.json"
    if not record.is_file():
        return None
    made = read_json(record)
    return made if intact(work / "out" / file, Written(file, made["bytes"], made["sha256"])) else None


def _run(
    tasks: Sequence[tuple[Any, ...]], workers: int, executor: Executor | None
) -> Iterator[dict[str, Any]]:
    """Compress shards in this process, in worker processes or with an executor, and yield their descriptions.

    Raises:
        WorkerError: a worker died.
        Exception: the first exception of a shard; shards that have not started are cancelled.
    """
    if executor is None and (workers == 1 or len(tasks) <= 1):
        for task in tasks:
            yield _compress_shard(*task)
        return
    with ExitStack() as stack:
        if executor is None:
            # A forked process would copy the locks of torch's threads, and could wait for them forever.
            executor = ProcessPoolExecutor(
                min(workers, len(tasks)), mp_context=get_context("spawn"), initializer=_end_with_parent
            )
            stack.callback(executor.shutdown, wait=True, cancel_futures=True)
        futures = [executor.submit(_compress_shard, *task) for task in tasks]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BrokenProcessPool as error:
            raise WorkerError(
                f"A worker died ({error}), most likely because memory ran out. Use fewer workers or a "
                "smaller max_shard_bytes. Finished shards are kept; run the same command again to continue."
            ) from error
        finally:
            for future in futures:
                future.cancel()


def _end_with_parent() -> None:
    """Start a thread that ends this worker process if the parent dies; it would otherwise wait forever."""
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _finish(work: Path, source: Checkpoint, architecture: str, parts: list[dict[str, Any]]) -> None:
    """Write configuration, index and model card of a compressed checkpoint, and copy all other files."""
    out = work / "out"
    for file in out.rglob("*"):
        if file.is_file() and file.name not in {part["file"] for part in parts}:
            file.unlink()  # remains of an interrupted run
    others = _other_files(source.folder)
    for name in others:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        with (source.folder / name).open("rb") as opened:
            write_file(out / name, iter(partial(opened.read, CHUNK), b""))
    described = TensorNetworkConfig(
        layers={name: spec for part in parts for name, spec in part["layers"].items()},
        ties={name: owner for part in parts for name, owner in part["ties"].items()},
    )
    content = {**source.config, "quantization_config": described.to_dict()}
    write_file(out / "config.json", [json.dumps(content, indent=2, sort_keys=True).encode() + b"\n"])
    if len(parts) > 1:
        weight_map = {name: part["file"] for part in parts for name in part["tensors"]}
        total = sum(size for part in parts for size in part["tensors"].values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_file(out / INDEX, [json.dumps(index, indent=2).encode() + b"\n"])
    if CARD not in others:
        write_card(out, architecture)


@contextmanager
def _reading_or_writing(source: Path, target: Path) -> Iterator[None]:
    """Convert OSError within a `with` block to errors that say what failed and which files are kept."""
    try:
        yield
    except TensorNetError:
        raise
    except OSError as error:
        if str(error.filename or "").startswith(str(source)):
            raise FormatError(f"Reading {source} failed: {error}. Finished shards are kept.") from error
        raise DestinationError(
            f"Writing {target} failed: {error}. Finished shards are kept in {staging_folder(target)}. Free "
            "some space and run the same command again, or delete this folder."
        ) from error


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use a single thread within a `with` block."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
