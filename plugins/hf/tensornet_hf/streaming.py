"""Compress a checkpoint of any size: plan on a lazily loaded model, then loop over shards of the source.

A shard is a run of stored tensors of at most `max_shard_bytes`. Each is compressed and written by itself,
here or by the workers of an executor, and a finished one is skipped when an interrupted run goes on:

    .NAME.partial/lock           locked while a run writes here
    .NAME.partial/run.json       what the run depends on: source, options, versions
    .NAME.partial/plan.json      the plan
    .NAME.partial/shards/        one description for each finished shard, with the checksum of its file
    .NAME.partial/out/           becomes NAME by one rename, when everything is in it
"""

import copy
import hashlib
import json
import os
import shutil
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

import tensornet as tn
import tensornet.compression
from tensornet.calibration.stats import CalibrationStats
from tensornet.compression.apply import apply_plan, set_submodule
from tensornet.compression.config import CompressionConfig
from tensornet.compression.plan import CompressionPlan
from tensornet.compression.report import CompressionReport, Coverage, measure_coverage
from tensornet.errors import DestinationError, FormatError, TargetError, TensorNetError
from tensornet.io import (
    CHUNK,
    Written,
    file_digest,
    intact,
    read_header,
    take_place,
    write_file,
    write_shard,
    write_tensors,
)
from tensornet.nn.targets import READ, find_targets, list_weights, matches
from tensornet.nn.unfuse import unfused
from tensornet.nn.weight_facts import WeightReadError, weight_facts
from tensornet_hf.checkpoint import CARD, INDEX, WEIGHTS, check_free, read_json, write_card
from tensornet_hf.description import GUARD_SHAPE, TensorNetworkConfig, describe, replaced_names
from tensornet_hf.lazy_model import LazyModel, Source, check_unchanged, marks_now, open_lazily, open_source
from tensornet_hf.sample_batch import sample_batch

#: Bytes of the source that become one file; memory holds what they are compressed to.
MAX_SHARD_BYTES = 2_000_000_000


class WorkerError(TensorNetError, RuntimeError):
    """A worker process died.

    Example:
        >>> from tensornet_hf.streaming import WorkerError
        >>> issubclass(WorkerError, RuntimeError)
        True
    """


@dataclass(frozen=True)
class CheckpointReport:
    """Result of `compress_checkpoint`.

    Args:
        compression: layers, sizes and plan, as `tensornet.compress` reports them.
        surplus: stored tensors that the model does not have; they are not copied.
        resumed: shards taken over from an interrupted run.
        shards: how many there are.
        peak_memory: largest resident size of this process or of a worker, in bytes.

    Example:
        >>> config = tn.CompressionConfig(topology="low_rank", param_ratio=0.5)
        >>> report = th.compress_checkpoint(th.embedded.gpt2_path(), "small", config)
        >>> report.param_ratio <= 0.5, report.resumed
        (True, 0)
    """

    compression: CompressionReport
    surplus: tuple[str, ...]
    resumed: int
    shards: int
    peak_memory: int

    @property
    def param_ratio(self) -> float:
        """Fraction of the parameters of the targeted weights that is kept."""
        return self.compression.param_ratio

    def __str__(self) -> str:
        lines = [str(self.compression)]
        if self.resumed:
            lines.append(f"resumed: {self.resumed} of {self.shards} shards were finished before")
        if self.surplus:
            lines.append(f"not copied, since the model does not have them: {', '.join(self.surplus)}")
        return "\n".join([*lines, f"peak memory of a process: {self.peak_memory / 1e6:,.0f} MB"])

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready form."""
        counts = {"resumed": self.resumed, "shards": self.shards, "peak_memory": self.peak_memory}
        return self.compression.to_dict() | {"surplus": list(self.surplus)} | counts


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
    """Compress a model folder into a new one, shard by shard, without loading the model as a whole.

    The new model is the one that `tensornet.compress` and `save_pretrained` would give. It appears at `dst`
    when it is complete; until then everything is in `.NAME.partial`. A run that was interrupted is continued
    by the same call: finished shards are skipped, and the bytes are those of a run without interruption.

    Memory: weights are mapped from the files, so each process needs room for the compressed layers of one
    shard, and one weight in double precision a few times over. Stacks of experts that are stored matrix by
    matrix are joined in the staging folder, which needs their bytes on the disk.

    Args:
        src: a folder with `config.json` and safetensors files; it is only read.
        dst: the new folder.
        config: options of the compression.
        workers: processes that compress shards. With more than one, guard the code of a script by
            `if __name__ == "__main__":`, as for everything that starts processes.
        executor: runs the work instead: any `concurrent.futures.Executor` whose workers see the same file
            system, for example `dask.distributed.Client(...).get_executor()`.
        device: where weights are compressed.
        resume: continue an interrupted run; otherwise its work is thrown away.
        plan: to apply, instead of planning; layers it does not name stay dense.
        stats: from `calibrate_checkpoint` or `tensornet.calibrate`, or a file of them.
        max_shard_bytes: bytes of the source that become one file; one module may be larger.
        force: replace a model folder that is at the destination, once the new one is complete.
        progress: show progress bars.

    Raises:
        DestinationError: the destination exists, another run writes it, or writing failed (full disk);
            what is finished is kept.
        FormatError: the source is damaged or contradictory, or changed since the interrupted run.
        TargetError, BudgetError, NonFiniteError, TopologyError: a layer cannot be compressed so; the message
            names it.
        WorkerError: a worker died, most likely because memory ran out.
        ValueError: `workers` or `max_shard_bytes` below 1, or a device that is not there.

    Example:
        >>> config = tn.CompressionConfig(topology="low_rank", param_ratio=0.5)
        >>> report = th.compress_checkpoint(th.embedded.gpt2_path(), "small", config)
        >>> type(th.load("small").transformer.h[0].mlp.c_fc).__name__
        'MPOLinear'
    """
    started = time.perf_counter()
    if workers < 1 or max_shard_bytes < 1:
        raise ValueError(
            f"workers and max_shard_bytes must be at least 1, got {workers} and {max_shard_bytes}."
        )
    if executor is None:  # whose workers may have what this machine lacks
        _check_device(device)
    folder, target = Path(src), Path(os.path.abspath(Path(dst).expanduser()))
    check_free(target, force=force, sources=(folder,))
    if target.resolve().is_relative_to(folder.resolve()):
        raise DestinationError(f"{target} lies inside the source {folder}; choose another destination.")
    source = open_source(folder)
    open_lazily(source, only=())  # refuses what cannot be a model before anything is written
    with _reading_or_writing(folder, target), staging(target) as work:
        stats_file = None
        if stats is not None:
            stats_file = work / "stats.safetensors" if isinstance(stats, CalibrationStats) else Path(stats)
        if isinstance(stats, CalibrationStats):
            stats.save(work / "stats.safetensors")
        decisive: dict[str, Any] = {"config": config.to_dict(), "device": device, "bytes": max_shard_bytes}
        decisive["plan"] = None if plan is None else plan.to_dict()
        decisive["stats"] = None if stats_file is None else file_digest(stats_file).sha256
        _begin(work, source, decisive, resume=resume)

        # Stage 1: one plan for the whole model; an interrupted run has it already.
        lazy = open_lazily(source, spill=work)
        read = [] if plan is not None else _layers_read(lazy.model)
        excluded = config.exclude_modules or ()
        excluded = (excluded,) if isinstance(excluded, str) else tuple(excluded)
        read = [name for name in read if not any(matches(name, pattern) for pattern in excluded)]
        if read:
            config = replace(config, exclude_modules=(*excluded, *read))
            warnings.warn(
                f"Left dense, because the model's code reads their weights: {', '.join(read)}.", stacklevel=2
            )
        if plan is None and (work / "plan.json").is_file():
            plan = CompressionPlan.load(work / "plan.json")
        if plan is None:
            _check_mapped(lazy, source, config)
            with one_thread():
                loaded = None if stats_file is None else CalibrationStats.load(stats_file)
                plan = tensornet.plan(lazy.model, config, loaded, progress=progress)
            write_file(work / "plan.json", [json.dumps(plan.to_dict()).encode()])
        with unfused(lazy.model):
            weights = [replace(x, skip=READ) if x.name in read else x for x in list_weights(lazy.model)]
        coverage = measure_coverage(weights, [layer.name for layer in plan], unseen=plan.unseen)

        # Stage 2: compress every shard that is not finished.
        shards = _cut(lazy, source, plan, stats_file, device, work, max_shard_bytes)
        done = {shard.file.name: made for shard in shards if (made := _finished(shard)) is not None}
        resumed = len(done)
        todo = [shard for shard in shards if shard.file.name not in done]
        bar = tqdm(total=len(shards), initial=resumed, desc="compressing", disable=not progress, unit="shard")
        with bar:
            for made in _run(todo, workers, executor):
                done[made["file"]] = made
                bar.update()

        # Stage 3: the files that describe all shards, and one rename.
        parts = [done[shard.file.name] for shard in shards]
        _finish(work, source, type(lazy.model).__name__, parts, config)
        check_unchanged(source, marks_now(source), since="this run began")
        take_place(work / "out", target)
        shutil.rmtree(work)
    return _report(lazy, source, plan, parts, coverage, resumed, time.perf_counter() - started)


@contextmanager
def staging(destination: Path) -> Iterator[Path]:
    """Open the staging folder of a destination, made if absent, locked against other runs.

    The lock belongs to the process: the system drops it when the process ends, however it ends.

    Raises:
        DestinationError: another run holds the lock.
    """
    folder = staging_folder(destination)
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise DestinationError(
            f"Another run is writing {destination} (it holds {folder / 'lock'}). Wait for it, or choose "
            "another destination."
        ) from error
    try:
        yield folder
    finally:
        lock.release()


def staging_folder(destination: Path) -> Path:
    """Return the folder for unfinished work, on the file system of the destination."""
    return destination.with_name(f".{destination.name}.partial")


def digest(content: Any) -> str:
    """Return the SHA-256 of JSON-ready content, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _begin(work: Path, source: Source, decisive: Mapping[str, Any], *, resume: bool) -> None:
    """Record what the run depends on, or compare it with the record of the interrupted run.

    Raises:
        FormatError: the source changed since then, or the run had other options or library versions.
    """
    record = {
        "library": f"tensornet {tn.__version__}, torch {torch.__version__}",
        "options": digest(decisive),
        "marks": {name: list(mark) for name, mark in source.marks.items()},
    }
    path = work / "run.json"
    if resume and path.is_file():
        earlier = read_json(path)
        check_unchanged(source, earlier.get("marks") or {}, since="the interrupted run")
        for key, what in (("options", "other options"), ("library", "other versions of the library")):
            if earlier.get(key) != record[key]:
                raise FormatError(
                    f"The interrupted run in {work} had {what}. Repeat them to continue it, or start again "
                    "with resume=False (--no-resume)."
                )
    else:
        (work / "plan.json").unlink(missing_ok=True)
        for name in ("shards", "out"):
            shutil.rmtree(work / name, ignore_errors=True)
        write_file(path, [json.dumps(record).encode()])
    for name in ("shards", "out"):
        (work / name).mkdir(exist_ok=True)


class _OnlyCalled(nn.Module):
    """Layer that computes as the stock layer does, and whose weight cannot be read, as if compressed."""

    def __init__(self, stock: nn.Module) -> None:
        super().__init__()
        self._stock = (stock,)
        self.register_forward_hook(lambda *_: None)  # so that unfused modules call it

    @property
    def weight(self) -> Tensor:
        stock = self._stock[0].weight
        assert isinstance(stock, Tensor)
        return weight_facts(stock, stock.shape, layer=self)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._stock[0](*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_stock"][0], name)


@torch.no_grad()
def _layers_read(model: PreTrainedModel) -> list[str]:
    """Find the layers whose weight the code of a model reads, by running a copy of zeros on one batch.

    Every weight of the copy takes the memory of one number.
    """
    zeros: dict[int, Any] = {}
    for parameter in model.parameters():
        zero = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
        zeros[id(parameter)] = nn.Parameter(zero, False)
    for buffer in model.buffers():
        zeros[id(buffer)] = torch.zeros_like(buffer, device="cpu")
    model = copy.deepcopy(model, zeros)
    batch: Any = sample_batch(model)
    found: list[str] = []
    if batch is None:
        return found
    with unfused(model):
        targets = [x for x in list_weights(model) if x.kinds and not x.skip]
        stock = {name: x for target in targets for name, x in zip(target.names, target.modules, strict=True)}
        placed = {name: _OnlyCalled(module) for name, module in stock.items()}
        names = {id(placed[name]): target.names for target in targets for name in target.names}
        for name, module in placed.items():
            set_submodule(model, name, module)
        for training in (False, True):
            while True:
                try:
                    model.train(training)(**batch)
                    break
                except WeightReadError as error:
                    read = names[id(error.layer)]
                    found.append(read[0])
                    for name in read:
                        set_submodule(model, name, stock[name])
                        for parameter in stock[name].parameters():  # it may be written into
                            parameter.data = torch.zeros_like(parameter)
                except Exception:  # its code asks for values, or takes no such batch
                    break
    return found


def _check_mapped(lazy: LazyModel, source: Source, config: CompressionConfig) -> None:
    """Raise TargetError for targets whose weights the files keep in another form than the model."""
    with unfused(lazy.model):
        targets = [x for x in find_targets(lazy.model, config) if not x.skip]
    for target in targets:
        if target.weight.is_meta:
            keys = [key for name in target.names for key in lazy.stored.get(f"{name}.weight", ())]
            how = f"as {source.tensors[keys[0]].dtype}" if keys else "in another form"
            raise TargetError(
                f"The weight of {target.name!r} is stored {how}, so that it cannot be mapped. Use the model "
                f"before quantization, exclude the layer (exclude_modules=[{target.name!r}]), or load the "
                "model and use tensornet.compress."
            )


@dataclass(frozen=True)
class _Shard:
    """Part of the source that becomes one file.

    Args:
        source: the folder.
        file: to write, in the staging folder.
        names: parameters and buffers of the model.
        plan: of their layers alone.
        stats: file of the statistics that the plan was made with.
        device: where to compute.
    """

    source: Path
    file: Path
    names: tuple[str, ...]
    plan: CompressionPlan
    stats: Path | None
    device: str

    @property
    def record(self) -> Path:
        """File that describes the finished shard."""
        return self.file.parent.parent / "shards" / f"{self.file.name}.json"


def _cut(
    lazy: LazyModel,
    source: Source,
    plan: CompressionPlan,
    stats: Path | None,
    device: str,
    work: Path,
    max_bytes: int,
) -> list[_Shard]:
    """Cut the stored tensors into shards, in the order of the files, without dividing a module.

    Raises:
        TargetError: the plan names a layer of which this checkpoint stores nothing.
    """
    unit_of = {name: _unit(lazy.model, name) for name in lazy.stored}
    units: dict[str, list[str]] = {}
    places = {key: (part.file.name, part.start) for key, part in source.tensors.items()}
    for name in sorted(lazy.stored, key=lambda name: min(places[key] for key in lazy.stored[name])):
        units.setdefault(unit_of[name], []).append(name)
    groups: list[list[str]] = []
    filled = max_bytes
    for unit, names in units.items():
        size = sum(source.tensors[key].nbytes for name in names for key in lazy.stored[name])
        if not groups or filled + size > max_bytes:
            groups, filled = [*groups, []], 0
        groups[-1].append(unit)
        filled += size

    # A layer belongs to the shard that has its weight, under whichever of its tied names.
    owner = {
        id(p): unit_of[n] for n, p in lazy.model.named_parameters(remove_duplicate=False) if n in unit_of
    }
    layers: dict[str, list[Any]] = {}
    for layer in plan:
        layers.setdefault(_unit_of_layer(lazy.model, layer.name, units, owner), []).append(layer)
    shards = []
    for number, group in enumerate(groups, start=1):
        name = WEIGHTS if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        chosen = replace(plan, layers=tuple(layer for unit in group for layer in layers.get(unit, ())))
        inside = tuple(tensor for unit in group for tensor in units[unit])
        shards.append(_Shard(source.folder, work / "out" / name, inside, chosen, stats, device))
    return shards


def _unit(model: PreTrainedModel, name: str) -> str:
    """Return the outermost module that has parameters of its own and no list of blocks around a tensor."""
    parts = name.split(".")[:-1]
    for end in range(1, len(parts)):
        module = model.get_submodule(".".join(parts[:end]))
        own = next(iter(module.parameters(recurse=False)), None) is not None
        if own and not any(isinstance(x, nn.ModuleList) for x in module.modules()):
            return ".".join(parts[:end])
    return ".".join(parts)


def _unit_of_layer(
    model: PreTrainedModel, layer: str, units: Mapping[str, Any], owner: Mapping[int, str]
) -> str:
    parts = layer.split(".")
    for end in range(len(parts), 0, -1):
        prefix = ".".join(parts[:end])
        if prefix in units:
            return prefix
        try:
            own = list(model.get_submodule(prefix).parameters())
        except AttributeError:  # an expert in a stack
            continue
        if found := [owner[id(x)] for x in own if id(x) in owner]:
            return found[0]
    raise TargetError(f"The plan names a layer {layer!r} that this checkpoint does not have.")


@torch.no_grad()
def _compress_shard(shard: _Shard) -> dict[str, Any]:
    """Compress the layers of one shard and write its file; a worker runs this.

    One thread computes: sums in another order would give other bits, and other workers need the processor.

    Returns:
        The description of the finished shard, which is written as well.
    """
    with (
        one_thread(),
        tempfile.TemporaryDirectory(dir=shard.record.parent.parent, prefix="cores.") as scratch,
    ):
        source = open_source(shard.source)
        lazy = open_lazily(source, only=shard.names, spill=scratch)
        model = lazy.model
        if torch.device(shard.device).type != "cpu":
            for name in shard.names:
                tensor = model.get_parameter_or_buffer(name)
                tensor.data = tensor.data.to(shard.device)
        before = model.state_dict(keep_vars=True)
        stats = None if shard.stats is None else CalibrationStats.load(shard.stats)
        errors = apply_plan(model, shard.plan, stats)
        after, described = model.state_dict(keep_vars=True), describe(model)

        # New are the tensors of compressed layers, and guards in place of the weights that they replace.
        new = {n: x.detach().cpu().contiguous() for n, x in after.items() if n not in before}
        new = {name: x for name, x in new.items() if name not in described.ties}
        guards = replaced_names(before, after, described.layers)
        new |= {name: torch.empty(GUARD_SHAPE, dtype=model.dtype) for name in guards}
        _refuse_readers(model)
        cores = Path(scratch, "cores.safetensors")
        write_tensors(cores, new)
        tensors = dict(read_header(cores))
        for name in shard.names:
            if name in after:
                for key in lazy.stored[name]:
                    tensors[name if name in lazy.renamed else key] = source.tensors[key]
        written = write_shard(shard.file, tensors)
    made = {
        "file": written.name,
        "bytes": written.nbytes,
        "sha256": written.sha256,
        "tensors": {name: x.nbytes for name, x in tensors.items()},
        "errors": errors,
        "layers": dict(described.layers),
        "ties": described.ties,
        "peak_memory": peak_memory(),
    }
    write_file(shard.record, [json.dumps(made).encode()])
    return made


def _refuse_readers(model: PreTrainedModel) -> None:
    """Run a model with replaced layers on the meta device, where its weights take no memory.

    Raises:
        TargetError: its code reads the weight of a replaced layer.
    """
    if (batch := sample_batch(model)) is None:
        return
    names = {id(module): name for name, module in model.named_modules()}
    nn.Module.to(model, "meta")
    try:
        model(**{name: x.to("meta") if isinstance(x, torch.Tensor) else x for name, x in batch.items()})
    except Exception as error:  # code that looks at values does not run without them
        if (reader := getattr(error, "layer", None)) is not None and id(reader) in names:
            name = names[id(reader)]
            raise TargetError(
                f"The code of {type(model).__name__} reads the weight of {name!r} outside of the layer, so "
                f"that it cannot be replaced. Exclude it: exclude_modules=[{name!r}] (--exclude)."
            ) from error


def _finished(shard: _Shard) -> dict[str, Any] | None:
    """Read the description of a shard that an earlier run finished; None if its file is not as written."""
    if not shard.record.is_file():
        return None
    made = read_json(shard.record)
    written = Written(made["file"], made["bytes"], made["sha256"])
    return made if intact(shard.file, written) else None


def _run(shards: list[_Shard], workers: int, executor: Executor | None) -> Iterator[dict[str, Any]]:
    """Compress shards, in no particular order: here, in worker processes, or by the executor of the caller.

    Raises:
        WorkerError: a worker died.
        Exception: the first that a shard raises; shards that have not begun are dropped.
    """
    if executor is None and (workers == 1 or len(shards) <= 1):
        yield from map(_compress_shard, shards)
        return
    with ExitStack() as stack:
        if executor is None:
            # A plain fork would copy the locks of torch's threads.
            context = get_context("spawn")
            count = min(workers, len(shards))
            executor = ProcessPoolExecutor(count, mp_context=context, initializer=_end_with_parent)
            stack.callback(executor.shutdown, wait=True, cancel_futures=True)
        futures = [executor.submit(_compress_shard, shard) for shard in shards]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BrokenProcessPool as error:
            raise WorkerError(
                f"A worker died ({error}). Most likely memory ran out: use fewer workers, or a smaller "
                "max_shard_bytes. Finished shards are kept; run again to continue."
            ) from error
        finally:
            for future in futures:
                future.cancel()


def _end_with_parent() -> None:
    """End this process when its parent has died, instead of waiting for tasks for ever."""
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _finish(
    work: Path, source: Source, architecture: str, parts: list[dict[str, Any]], config: CompressionConfig
) -> None:
    """Write configuration, index and model card, and copy all other files."""
    out = work / "out"
    for file in out.rglob("*"):
        if file.is_file() and file.name not in {part["file"] for part in parts}:
            file.unlink()  # of an earlier run that did not come to its end
    for name in source.others:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        with (source.folder / name).open("rb") as opened:
            write_file(out / name, iter(partial(opened.read, CHUNK), b""))
    described = TensorNetworkConfig(
        layers={name: spec for part in parts for name, spec in part["layers"].items()},
        ties={name: owner for part in parts for name, owner in part["ties"].items()},
        compression=config.to_dict(),
    )
    content = {**source.config, "quantization_config": described.to_dict()}
    write_file(out / "config.json", [json.dumps(content, indent=2, sort_keys=True).encode() + b"\n"])
    if len(parts) > 1:
        weight_map = {name: part["file"] for part in parts for name in part["tensors"]}
        total = sum(size for part in parts for size in part["tensors"].values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_file(out / INDEX, [json.dumps(index, indent=2).encode() + b"\n"])
    if CARD not in source.others:
        write_card(out, architecture)


def _report(
    lazy: LazyModel,
    source: Source,
    plan: CompressionPlan,
    parts: list[dict[str, Any]],
    coverage: Coverage,
    resumed: int,
    seconds: float,
) -> CheckpointReport:
    kept = [part for key, part in source.tensors.items() if key not in lazy.surplus]
    params = sum(part.numel for part in kept)
    errors = {name: error for part in parts for name, error in part["errors"].items()}
    compression = CompressionReport(
        model_params_before=params,
        model_params_after=params - plan.params_before + plan.params_after,
        model_bytes_before=sum(part.nbytes for part in kept),
        model_bytes_after=sum(size for part in parts for size in part["tensors"].values()),
        seconds=seconds,
        plan=plan.with_errors(errors),
        coverage=coverage,
    )
    peak = max([peak_memory(), *(part["peak_memory"] for part in parts)])
    return CheckpointReport(compression, lazy.surplus, resumed, len(parts), peak)


@contextmanager
def _reading_or_writing(source: Path, target: Path) -> Iterator[None]:
    """Turn errors of the system inside the block into errors that say what failed, and what is kept."""
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


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # unknown, absent, or not built in
        raise ValueError(
            f"device={device!r} cannot be used here: {str(error).splitlines()[0]:.200} Use device='cpu', or "
            "one that torch.accelerator finds."
        ) from error


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread inside the block."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def peak_memory() -> int:
    """Return the largest resident size of this process so far, in bytes; 0 where it is unavailable.

    Example:
        >>> from tensornet_hf.streaming import peak_memory
        >>> peak_memory() > 1e6
        True
    """
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage would count what the process that started this one held by then
        lines = [line for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
        if lines:
            return int(lines[0].split()[1]) * 1024
    try:
        import resource  # absent on Windows
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if os.uname().sysname == "Darwin" else peak * 1024
