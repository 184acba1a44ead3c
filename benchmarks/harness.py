"""Functions that all benchmarks share: paired timing, counting bytes, and writing records.

A record is a JSON file in `benchmarks/records/` with results, date, commit and machine.
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
PACKAGES = (
    "torch",
    "numpy",
    "opt_einsum",
    "transformers",
    "torchTT",
    "tensorly",
    "tensorly-torch",
    "quimb",
    "cotengra",
    "TensorKrowch",
    "tntorch",
)


@dataclass(frozen=True)
class Timing:
    """Timings of one function in seconds.

    Args:
        median: median of the repeats.
        low: fastest repeat.
        high: slowest repeat.
        repeats: number of repeats.
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
    """Time several functions in turn, each once per repeat, so that a busy machine slows all of them equally.

    The order changes from repeat to repeat, because the data in the caches depend on the function that ran
    before. No function directly follows itself.

    Args:
        functions: functions to call, by name.
        repeats: number of timed calls of each function.
        warmup: number of calls of each function that come first and are not timed.
        clock: function that returns seconds; `time.thread_time` counts only the time in which this thread
            runs.
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
    """Return the clock for a number of threads: processor time for one thread, else wall time.

    Processor time depends less on other users of the machine, but cannot measure several threads.
    """
    return time.thread_time if threads == 1 else time.perf_counter


def rounds(functions: Iterable[Callable[[], Any]], seconds: float) -> int:
    """Choose a number of repeats, 3 to 51, for which calling all functions takes about `seconds` in total."""
    start = time.perf_counter()
    for function in functions:
        function()
    return max(3, min(51, int(seconds / max(time.perf_counter() - start, 1e-9)) | 1))


def with_threads(counts: Sequence[int], work: Callable[[int], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Set each number of threads in torch in turn, call `work(threads)`, and join the returned rows."""
    before, rows = torch.get_num_threads(), []
    try:
        for threads in counts:
            torch.set_num_threads(threads)
            rows += work(threads)
    finally:
        torch.set_num_threads(before)
    return rows


def geometric_mean(values: Iterable[float]) -> float:
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


def processor_seconds() -> float:
    """Return the processor seconds that this process and its children have used."""
    used = (resource.getrusage(x) for x in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(x.ru_utime + x.ru_stime for x in used)


def peak_mib() -> int:
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage would include the memory of the process that started this one
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) // 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def held_bytes(root: object) -> int:
    """Count the bytes of all tensors that are reachable from an object, including caches and closures.

    Args:
        root: the object, for example a module. Globals of functions and classes are not followed.
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
    """Return date, commit, dirty flag, device, dtype, threads, load of the machine and package versions."""
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
    """Write a record `folder/name.json` with rows, provenance and further entries; it replaces an older one.

    Args:
        name: name of the record.
        rows: one mapping for each measured case.
        folder: folder of the records.
        meta: `device=` and `dtype=` are passed to `provenance`, all others are entries of the record.

    Returns:
        Path of the file.

    Raises:
        SystemExit: a toy run would replace the record of a real run.
    """
    if "--toy" in sys.argv and folder.resolve() == RECORDS.resolve():
        raise SystemExit(f"A toy run must not replace {name}.json: give another folder by --records FOLDER.")
    where = {key: meta.pop(key) for key in ("device", "dtype") if key in meta}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    content = {"name": name, **provenance(**where), **meta, "rows": list(rows)}
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path


def processor() -> str:
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
    """Format a value for a Markdown table: floats with four digits, `|` and backquotes replaced."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    return " ".join(str(value).replace("|", "/").replace("`", "'").split())
