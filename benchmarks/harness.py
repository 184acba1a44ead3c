"""What all benchmarks share: timing both sides in one run, counting bytes, records that state their origin.

A record is one JSON file in `benchmarks/records/`, quoted by the documentation.
"""

from __future__ import annotations

import gc
import importlib.metadata
import json
import math
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
RECORDS = ROOT / "benchmarks" / "records"
PACKAGES = ("torch", "numpy", "opt_einsum", "transformers", "torchTT", "tensorly", "tensorly-torch", "quimb")


@dataclass(frozen=True)
class Timing:
    """Timings of one function in seconds.

    Args:
        median: over the repeats.
        low: fastest repeat.
        high: slowest repeat.
        repeats: how many.
    """

    median: float
    low: float
    high: float
    repeats: int


def paired_medians(
    functions: Mapping[str, Callable[[], Any]],
    repeats: int = 5,
    *,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time functions in turn, each once per repeat, so that a busy machine slows all of them equally.

    The order changes from repeat to repeat. Otherwise each function would always find in the caches what the
    same other one had left there. No function follows directly upon itself.

    Args:
        functions: calls by name.
        repeats: rounds that are counted.
        warmup: rounds before those.
        clock: seconds; `time.thread_time` counts what one thread works and not what others take from it.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    order, mixer = list(functions), random.Random(0)
    for turn in range(warmup + repeats):
        last = order[-1]
        mixer.shuffle(order)
        if order[0] == last:
            order.append(order.pop(0))
        for name in order:
            start = clock()
            functions[name]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn >= warmup:
                seconds[name].append(clock() - start)
    return {
        name: Timing(statistics.median(values), min(values), max(values), repeats)
        for name, values in seconds.items()
    }


def clock_for(threads: int) -> Callable[[], float]:
    """Choose processor time for one thread, which a busy machine distorts least, else wall time."""
    return time.thread_time if threads == 1 else time.perf_counter


def rounds(functions: Iterable[Callable[[], Any]], seconds: float) -> int:
    """Choose the number of repeats, 3 to 51, that take about this many seconds."""
    start = time.perf_counter()
    for function in functions:
        function()
    return max(3, min(51, int(seconds / max(time.perf_counter() - start, 1e-9)) | 1))


def with_threads(counts: Sequence[int], work: Callable[[int], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Collect the rows of `work(threads)` for each number of threads; restore the number afterwards."""
    before, rows = torch.get_num_threads(), []
    try:
        for threads in counts:
            torch.set_num_threads(threads)
            rows += work(threads)
    finally:
        torch.set_num_threads(before)
    return rows


def geometric_mean(values: Iterable[float]) -> float:
    """Compute the geometric mean, the right one for ratios."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


def processor_seconds() -> float:
    """Return the processor seconds that this process and its children have used."""
    used = (resource.getrusage(x) for x in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(x.ru_utime + x.ru_stime for x in used)


def peak_mib() -> int:
    """Return the peak memory of this process so far in MiB, and nothing of the one that started it."""
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage would count what the starting process had in use
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) // 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def held_bytes(root: object) -> int:
    """Count the bytes of all tensors reachable from an object: its own, cached ones, those of closures.

    Args:
        root: for example a module. Globals of functions and classes do not count as reached.
    """
    seen: dict[int, object] = {}
    storages: dict[int, int] = {}
    todo = [root]
    while todo:
        item = todo.pop()
        if id(item) in seen or isinstance(item, (type, ModuleType, CodeType)):
            continue
        seen[id(item)] = item
        if isinstance(item, torch.Tensor) and not item.is_meta:
            storages[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
            todo.append(item.grad_fn)
        if isinstance(item, FunctionType):
            todo += [cell.cell_contents for cell in item.__closure__ or ()]
        else:
            todo += gc.get_referents(item)
    return sum(storages.values())


def provenance(*, device: str = "cpu", dtype: str = "float32") -> dict[str, Any]:
    """Collect commit, dirty flag, device, dtype, threads, load of the machine and versions of packages."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else processor(),
        "dtype": dtype,
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
    }


def record(name: str, rows: Sequence[Mapping[str, Any]], *, folder: Path = RECORDS, **meta: Any) -> Path:
    """Write `folder/name.json` with rows, provenance and further entries of the benchmark.

    Args:
        name: of the benchmark; one record each, the newest replaces the one before.
        rows: one mapping for each measured case.
        folder: where records live.
        meta: `device=` and `dtype=` go to `provenance`, everything else into the record.

    Returns:
        The file written.

    Raises:
        SystemExit: a toy run would replace the record of a real one.
    """
    if "--toy" in sys.argv and folder.resolve() == RECORDS.resolve():
        raise SystemExit(f"A toy run does not replace {name}.json: name another folder by --records FOLDER.")
    where = {key: meta.pop(key) for key in ("device", "dtype") if key in meta}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    content = {"name": name, **provenance(**where), **meta, "rows": list(rows)}
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path


def processor() -> str:
    """Return the name of the processor that the system reports."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Render a Markdown table with a column for every key of any row."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(column.replace("_", " ") for column in columns) + " |"]
    lines.append("|" + "---|" * len(columns))
    lines += ["| " + " | ".join(cell(row.get(column)) for column in columns) + " |" for row in rows]
    return "\n".join(lines)


def cell(value: Any) -> str:
    """Format a value with four significant digits; escape what would end the cell or open a code block."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    return " ".join(str(value).replace("|", "/").replace("`", "'").split())
