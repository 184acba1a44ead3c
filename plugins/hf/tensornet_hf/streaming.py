"""Compress a checkpoint of any size: plan on a lazily opened model, then compress and write block by block.

The weights of one block are in memory at a time. Its layers are compressed in this process, in worker
processes or with an executor, and written to their places in the new files. These files are written:

    .NAME.partial/lock           locked while a run writes to this folder
    .NAME.partial/run.json       everything that the result depends on: source, options, versions
    .NAME.partial/plan.json      the plan
    .NAME.partial/errors.jsonl   the relative error of each finished layer
    .NAME.partial/out/           the new model folder, which is renamed to NAME when it is complete
"""

import hashlib
import json
import os
import shutil
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn

import tensornet as tn
import tensornet.compression
from tensornet.calibration.batches import Batch
from tensornet.calibration.losses import label_losses
from tensornet.calibration.walk import outer_stacks
from tensornet.compression.compress import calibration_config
from tensornet.compression.config import CompressionConfig
from tensornet.compression.loss_increase import LossIncrease
from tensornet.compression.plan import CompressionPlan
from tensornet.compression.prices import PriceList
from tensornet.compression.report import CompressionReport, measure_coverage
from tensornet.compression.survey import dense_only, survey_or_load
from tensornet.compression.survey import digest as text_digest
from tensornet.compression.tasks import compress_alone, one_thread, worker_processes
from tensornet.compression.write import batches_to_write, compress_blocks, read_enough
from tensornet.errors import (
    BudgetError,
    DestinationError,
    FormatError,
    TargetError,
    TensorNetError,
)
from tensornet.io import FLOATS, load_slice, read_header, write_file, write_tensors
from tensornet.nn.extension import ProvidedData
from tensornet.nn.targets import find_targets, list_weights
from tensornet.nn.unfuse import unfused
from tensornet_hf.checkpoint import check_free, read_json, weight_files
from tensornet_hf.exporters.compressed_tensors import compressed_tensors_contents
from tensornet_hf.exporters.gguf import check_files, gguf_layout
from tensornet_hf.exporters.gguf_writer import GGUFWriter
from tensornet_hf.exporters.mlx import mlx_contents
from tensornet_hf.folder_writer import ERRORS, FolderWriter, other_files, planned_contents
from tensornet_hf.lazy_model import LazyModel, open_lazily, open_model, read_source
from tensornet_hf.quantizer import is_inside

#: Price list in a staging folder. It is also valid for a later run with another budget.
PRICES = "prices.safetensors"
#: Functions that lay out a folder for another runtime.
PACKED = {"compressed-tensors": compressed_tensors_contents, "mlx": mlx_contents}
#: Default limit on the size of a weight file in bytes.
MAX_SHARD_BYTES = 2_000_000_000


def compress_checkpoint(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    config: CompressionConfig | CompressionPlan,
    *,
    workers: int = 1,
    executor: Executor | None = None,
    device: str = "cpu",
    resume: bool = True,
    calibration: ProvidedData | None = None,
    prices: str | os.PathLike[str] | None = None,
    tokens: int | None = None,
    weights: str | os.PathLike[str] | None = None,
    target: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    force: bool = False,
    progress: bool = False,
) -> CompressionReport:
    """Compress a model folder into a new folder, block by block, without loading the whole model.

    The result equals that of `tensornet.compress` and `save_pretrained`. Each tensor is written to its place
    in the new files as soon as it is known. Until the result is complete, all files are in the staging folder
    `.NAME.partial`, which is then renamed to `dst`. To resume an interrupted run, repeat the call: finished
    layers are skipped, and the result has the same bytes as without interruption.

    This process needs memory for the weights of one block, their compressed layers, and a few copies of a
    single weight in double precision.

    Args:
        src: a folder with `config.json` and safetensors files; it is only read.
        dst: the new folder.
        config: compression options, or a plan (which may have been edited or loaded). Layers that are not in
            the plan stay dense.
        workers: number of processes that compress layers. With more than one, protect the code of a script by
            `if __name__ == "__main__":`, as usual with multiprocessing.
        executor: executor that compresses the layers; `workers` is then ignored. Any
            `concurrent.futures.Executor` can be used, such as
            `dask.distributed.Client(...).get_executor()`. Weights and results are sent to and from its
            workers.
        device: device on which weights are compressed.
        resume: continue an interrupted run; if False, delete the files of that run.
        calibration: batches, needed unless the errors of the weights are minimized. The model is surveyed
            block by block, and each block is compressed for the inputs that it will get (see
            `tensornet.survey` and `compress_blocks`).
        prices: file of a price list: read if it exists, written otherwise.
        tokens: number of tokens on which the model is surveyed (see `tensornet.survey`).
        weights: GGUF file with the weights, in F32, F16 or BF16; by default, the safetensors files of `src`.
        target: write a file for another runtime, `"gguf"`, or a folder, `"compressed-tensors"` or `"mlx"`
            (see `tensornet_hf.export`); the number formats must be those of the target.
        max_shard_bytes: largest size of a weight file of the result, in bytes. A larger tensor becomes a file
            of its own.
        force: replace an existing model folder, once the new folder is complete.
        progress: show progress bars.

    Returns:
        A report like that of `tensornet.compress`.

    Raises:
        DestinationError: the destination exists, another run is writing it, the disk has no room for it, or
            writing failed; finished tensors are kept.
        FormatError: the source is damaged or contradictory, or has changed since the run began.
        TargetError: the source is compressed already.
        TargetError, BudgetError, NonFiniteError, TopologyError: a layer cannot be compressed as requested;
            the message names the layer.
        WorkerError: a worker died, most likely because memory ran out.
        ValueError: `workers` or `max_shard_bytes` is below 1, or an unknown target.

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
    if target not in (None, "gguf", *PACKED):
        raise ValueError(f"Unknown target {target!r}; choose one of gguf, {', '.join(PACKED)}.")
    if executor is None:
        torch.empty(0, device=device)  # raises if the device is not available
    folder, destination = Path(src), Path(dst).expanduser().resolve()
    _check_destination(destination, folder, target, force=force)
    if target != "gguf" and destination.resolve().is_relative_to(folder.resolve()):
        raise DestinationError(f"{destination} is inside the source {folder}; choose another destination.")
    source = read_source(folder, weights)
    marks = file_marks(folder, weights)
    reads_data = calibration is not None and config.reads_data
    if isinstance(config, CompressionPlan) and config.reads_data and calibration is None:
        raise TargetError(
            f"This plan was made with {config.calibration}, on which the new layers depend too: pass "
            "calibration=, or make a plan with objective='weight'."
        )
    if prices is not None and not reads_data:
        raise TargetError("prices need calibration, from which they were found; leave them out.")
    # An invalid model raises before anything is written. Only a model that runs needs its buffers.
    lazy = open_model(folder, weights) if reads_data else open_lazily(source)
    plan = config if isinstance(config, CompressionPlan) else None
    options = calibration_config(config) if isinstance(config, CompressionPlan) else config
    if plan is not None and prices is not None and Path(prices).is_file():
        options = _priced_config(Path(prices), plan)
    with _reading_or_writing(folder, destination), staging(destination) as work:
        _check_destination(destination, folder, target, force=force)  # another run may have written it
        batches: list[Batch] = []
        priced: PriceList | None = None
        measured: list[LossIncrease] = []
        if calibration is not None and reads_data:
            batches = read_enough(calibration.batches, lazy.model, options.survey_kind, tokens)
        decisive = {"text": text_digest(batches), "config": config.to_dict(), "device": device}
        _begin(work, folder, marks, decisive, resume=resume)

        # Survey the model, unless an interrupted run has already done so, and plan.
        loaded = lazy.loaded_on(device)
        if calibration is not None and reads_data and (plan is None or plan.objective == "curvature"):
            _check_readable(lazy, options)
            file = work / PRICES if prices is None else Path(prices)
            found = partial(
                survey_or_load,
                lazy.model,
                batches,
                options,
                file,
                loss_fn=calibration.loss_fn,
                source=calibration.source,
                tokens=tokens,
                loaded=loaded,
                device=torch.device(device),
                price=None if plan is None else dense_only,
                progress=progress,
            )
            earlier = prices is None and file.is_file()
            try:
                priced = found(states=fresh_states(work / "surveyed"))
            except (BudgetError, FormatError, TargetError):
                if not earlier:
                    raise
                file.unlink()  # an earlier run wrote these prices with other options
                priced = found(states=fresh_states(work / "surveyed"))
            shutil.rmtree(work / "surveyed", ignore_errors=True)
            plan = plan or priced.plan()
        if plan is None and (work / "plan.json").is_file():
            plan = CompressionPlan.load(work / "plan.json")
        if plan is None:
            _check_readable(lazy, options)
            # Matrices that cannot be mapped are in memory while the plan is made.
            unmapped = [
                x for x in lazy.model.modules() if any(map(lazy.only_read, x.parameters(recurse=False)))
            ]
            with one_thread(), lazy.loaded(unmapped, dtype=None):
                plan = tensornet.plan(lazy.model, options, progress=progress)
            write_file(work / "plan.json", [json.dumps(plan.to_dict()).encode()])
        with unfused(lazy.model):
            listed = list_weights(lazy.model)

        # Compress block by block, and write each block.
        work_left = [layer.name for layer in plan if layer.topology is not None]
        key = digest([plan.to_dict(), max_shard_bytes, target])
        out: FolderWriter | GGUFWriter
        if target == "gguf":
            formats = {x.name: x.storage.number_format for x in plan if x.topology is not None}
            layout = gguf_layout(lazy.model, folder, formats)
            for name, why in layout.dense.items():
                if name in layout.tensors:  # all others are dense in the plan
                    warnings.warn(f"{name} is not stored as integers: {why}.", stacklevel=2)
            out = GGUFWriter(work, layout, key=key)
        else:
            write = PACKED.get(target or "")
            # A model that ran may have left states in its modules, which cannot be copied.
            args = source, open_lazily(source) if reads_data else lazy, plan
            tensors = planned_contents(*args) if write is None else write(*args)[0]
            out = FolderWriter(work, tensors, max_shard_bytes=max_shard_bytes, key=key)
        with worker_processes(workers if executor is None else 1) as own:
            states = StatesOnDisk(work / "states")
            read = batches_to_write(batches, lazy.model, plan)
            start = states.complete(len(read))
            stacks = outer_stacks(lazy.model, nn.ModuleList, least=1).values()
            done = [name for names in stacks for name in names][:start]
            if not all(out.has_all(x) for x in work_left if is_inside(x, done)):
                states, start = fresh_states(work / "states"), 0
            blocks = compress_blocks(
                lazy.model,
                plan,
                read,
                states=states,
                start=start,
                loaded=loaded,
                device=torch.device(device),
                loss_fn=calibration.loss_fn or label_losses if calibration else None,
                losses=priced.losses if priced else (),
                factors=priced.factors if priced else None,
                measured=measured,
                finished=out.finished,
                executor=own if executor is None else executor,
                compress=compress_alone,
                progress=progress,
            )
            for block, layers in blocks:
                out.put(block, layers)
        out.finish()
        _check_unchanged(folder, marks, file_marks(folder, weights), since="this run began")
        _check_destination(destination, folder, target, force=force)
        out.take_place(destination, force=force)
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
        model_bytes_after=out.tensor_bytes,
        seconds=time.perf_counter() - started,
        plan=plan.with_errors({name: out.errors[name] for name in work_left}),
        coverage=measure_coverage(listed, [layer.name for layer in plan], unseen=plan.unseen),
        measured=next(iter(measured), None),
        measured_layers=next(iter(measured), None),
    )


def _priced_config(prices: Path, plan: CompressionPlan) -> CompressionConfig:
    """Return the configuration of a price list whose moments are used to compress the layers of a plan.

    Raises:
        BudgetError: the plan has layers that were not surveyed.
    """
    known = PriceList.load(prices)
    missing = sorted({x.name for x in plan} - {x.name for x in known.layers})
    if missing:
        raise BudgetError(
            f"The plan compresses {missing[0]} ({len(missing)} of {len(plan)} layers are missing), of which "
            f"{prices} says nothing. Give the prices from which the plan was made, or leave them out."
        )
    return known.config


class StatesOnDisk:
    """Hidden states in files, as a mapping from `(block, batch)` (see `tensornet.calibration.walk.Walk`)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)

    def __getitem__(self, key: tuple[int, int], /) -> Tensor:
        return load_slice(read_header(self._path(key))["x"])

    def __setitem__(self, key: tuple[int, int], value: Tensor, /) -> None:
        write_tensors(self._path(key), {"x": value.detach().float().cpu().contiguous()})

    def __delitem__(self, key: tuple[int, int], /) -> None:
        self._path(key).unlink()

    def complete(self, batches: int) -> int:
        """Return the largest index of a block before which the states of all batches are known, or 0."""
        found = Counter(int(file.name.partition("-")[0]) for file in self.folder.glob("*-*.safetensors"))
        return max((block for block, count in found.items() if count == batches), default=0)

    def _path(self, key: tuple[int, int]) -> Path:
        return self.folder / "{}-{}.safetensors".format(*key)


def _check_destination(destination: Path, source: Path, target: str | None, *, force: bool) -> None:
    """Raise DestinationError if the destination exists and `force` is not set, or cannot be written."""
    if target == "gguf":
        check_files(destination, force=force)
    else:
        check_free(destination, force=force, sources=(source,))


def fresh_states(folder: Path) -> StatesOnDisk:
    """Delete the content of a folder, and return an empty mapping that stores hidden states there."""
    shutil.rmtree(folder, ignore_errors=True)
    return StatesOnDisk(folder)


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
        if {x.name for x in folder.glob("*")} <= {"lock", "run.json", "states", "surveyed"}:
            shutil.rmtree(folder, ignore_errors=True)  # no run could continue from these files
        lock.release()


def staging_folder(destination: Path) -> Path:
    """Return the staging folder of a destination; both have the same parent folder."""
    return destination.with_name(f".{destination.name}.partial")


def digest(content: Any) -> str:
    """Return the SHA-256 of JSON-ready content; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def file_marks(folder: Path, weights: str | os.PathLike[str] | None = None) -> dict[str, str]:
    """Return the size and modification time of each file that is read from a model folder, by relative path.

    A resumed run compares them with the sizes and times that the interrupted run recorded.

    Args:
        folder: the model folder.
        weights: file that is read in place of the weight files of the folder.
    """
    files = weight_files(folder)[0] if weights is None else [Path(weights)]
    marks = {}
    for path in [folder / "config.json", *files, *(folder / name for name in other_files(folder))]:
        stat = path.stat()
        name = path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path)
        marks[name] = f"{stat.st_size} bytes, {stat.st_mtime_ns} ns"
    return marks


def _check_unchanged(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any], *, since: str) -> None:
    """Raise FormatError if `before` and `now` differ; `since` says in words when `before` was recorded."""
    if changed := sorted(x for x in before.keys() | now.keys() if before.get(x) != now.get(x)):
        raise FormatError(
            f"{', '.join(changed)} in {folder} changed since {since}, so finished tensors belong to the old "
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
    if not resume:
        (work / PRICES).unlink(missing_ok=True)
    if resume and path.is_file() and (work / "out").is_dir():
        earlier = read_json(path)
        _check_unchanged(folder, earlier.get("marks") or {}, marks, since="the interrupted run")
        for key, what in (("options", "other options"), ("library", "other versions of the library")):
            if earlier.get(key) != record[key]:
                raise FormatError(
                    f"The interrupted run in {work} had {what}. Use the same to continue it, or start again "
                    "with resume=False (--no-resume)."
                )
    else:
        for name in ("plan.json", ERRORS):
            (work / name).unlink(missing_ok=True)
        shutil.rmtree(work / "out", ignore_errors=True)
        write_file(path, [json.dumps(record).encode()])


def _check_readable(lazy: LazyModel, config: CompressionConfig) -> None:
    """Check that the weight of each layer to compress can be read from the files.

    Raises:
        TargetError: a weight cannot be read.
    """
    with unfused(lazy.model), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # planning repeats these warnings
        targets = [x for x in find_targets(lazy.model, config) if not x.skip]
    for target in targets:
        origin = lazy.origins.get(f"{target.name}.weight")
        dtypes = set() if origin is None else {part.dtype for part in origin.parts}
        if target.weight.is_meta and not target.owners and not (dtypes and dtypes <= FLOATS.keys()):
            form = (
                f"stored as {', '.join(dtypes)}" if dtypes else "stored in another form than the model uses"
            )
            raise TargetError(
                f"The weight of {target.name!r} is {form}, so it cannot be read. Use the model before "
                f"quantization, exclude the layer (exclude_modules=[{target.name!r}]), or load the model and "
                "use tensornet.compress."
            )


@contextmanager
def _reading_or_writing(source: Path, target: Path) -> Iterator[None]:
    """Convert OSError within a `with` block to errors that say what failed and which files are kept."""
    try:
        yield
    except (OSError, DestinationError) as error:
        known = isinstance(error, TensorNetError)
        if known and not isinstance(error.__cause__, OSError):
            raise
        if not known and str(error.filename or "").startswith(str(source)):
            raise FormatError(f"Reading {source} failed: {error}. Finished tensors are kept.") from error
        raise DestinationError(
            f"Writing {target} failed: {error}. Finished tensors are kept in {staging_folder(target)}. Free "
            "some space and run the same command again, or delete this folder."
        ) from error
