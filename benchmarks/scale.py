"""Does compression block by block use all processors, need constant memory, and resume without loss of time?

1. The speed of two workers relative to one, on weights of equal size. Goal: 1.7 on two cores. The speed is
   measured with running workers (an executor of the caller), and with workers started for the run.
2. The peak memory of a worker for checkpoints of different sizes. Goal: it does not depend on the size.
3. The processor time of a run that is interrupted half way and resumed, relative to a run without
   interruption. Goal: at most 2 % more.

    python benchmarks/scale.py            # some minutes; writes benchmarks/records/scale.json
    python benchmarks/scale.py --toy      # seconds; only tests the script
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import tensornet as tn
import tensornet_hf as th
from tensornet.compression import road

sys.path.insert(0, str(Path(__file__).parent))
from harness import RECORDS, peak_mib, record

#: Workers are forked from a process that has imported all modules; the time of imports is not of interest.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tensornet_hf"])
HALF = tn.CompressionConfig(param_ratio=0.5, method="svd")


@dataclass(frozen=True)
class Sizes:
    """Sizes of the measurements.

    Args:
        width: rows and columns of each weight.
        weights: number of weights in the checkpoint for speed and resuming.
        growth: numbers of weights in the checkpoints for memory.
        repeats: number of repeats, whose median is reported.
        starts: whether to also measure runs that start their own workers.
    """

    width: int
    weights: int
    growth: tuple[int, ...]
    repeats: int
    starts: bool


FULL = Sizes(768, 28, (7, 35, 126), 3, True)
TOY = Sizes(32, 7, (7, 14), 1, False)


class Stop(Exception):
    """Exception that interrupts a run half way."""


@contextmanager
def interrupted_after(layers: int) -> Iterator[None]:
    """Return a context in which a run ends with `Stop` after it has compressed a number of layers."""
    original, done = road.compress_alone, iter(range(layers))

    def compress(*task: Any) -> Any:
        if next(done, None) is None:
            raise Stop
        return original(*task)

    with mock.patch.object(road, "compress_alone", compress), suppress(Stop):
        yield


def make_checkpoint(folder: Path, width: int, weights: int, files: int = 4) -> Path:
    """Save a random bfloat16 model of `weights` square matrices (a multiple of 7) in about `files` shards."""
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=weights // 7,
        num_attention_heads=4,
        vocab_size=8,
    )
    model = LlamaForCausalLM(config).bfloat16()
    model.save_pretrained(folder, max_shard_size=2 * width**2 * weights // files)
    return folder


def workers(folder: Path, sizes: Sizes) -> list[dict[str, Any]]:
    """Answer question 1: measure the speed of two workers relative to one."""
    source = make_checkpoint(folder / "speed", sizes.width, sizes.weights)
    seconds: dict[str, list[float]] = {}
    with (
        ProcessPoolExecutor(1, mp_context=PROCESSES) as one,
        ProcessPoolExecutor(2, mp_context=PROCESSES) as two,
    ):
        for number, pool in enumerate((one, two, two)):  # starts all workers, which then import modules
            th.compress_folder(source, folder / f"warm{number}", HALF, th.CompressOptions(executor=pool))
        for number in range(sizes.repeats):
            cases: dict[str, dict[str, Any]] = {"1 worker": {"executor": one}, "2 workers": {"executor": two}}
            if sizes.starts:
                cases["2 workers, started for the run"] = {"workers": 2}
            for name, options in cases.items():
                start = time.perf_counter()
                th.compress_folder(source, folder / f"{name}{number}", HALF, th.CompressOptions(**options))
                seconds.setdefault(name, []).append(time.perf_counter() - start)
    medians = {name: sorted(values)[len(values) // 2] for name, values in seconds.items()}
    return [
        {
            "question": 1,
            "case": name,
            "seconds": round(value, 3),
            "speed_up": round(medians["1 worker"] / value, 2),
        }
        for name, value in medians.items()
    ]


def memory(folder: Path, sizes: Sizes) -> list[dict[str, Any]]:
    """Answer question 2: measure the peak memory of a worker for checkpoints of different sizes."""
    rows = []
    for count in sizes.growth:
        source = make_checkpoint(folder / f"memory{count}", sizes.width, count)
        with ProcessPoolExecutor(1, mp_context=PROCESSES) as pool:
            before, after = pool.submit(_peak_of_a_run, source, folder / f"memory{count}-out").result()
        size = count * sizes.width**2 * 2
        rows.append(
            {
                "question": 2,
                "case": f"{count} weights",
                "width": sizes.width,
                "checkpoint_mb": round(size / 1e6, 1),
                "peak_mb": round(after / 1e6, 1),
                "above_idle_mb": round((after - before) / 1e6, 1),
            }
        )
    return rows


def _peak_of_a_run(source: Path, out: Path) -> tuple[float, float]:
    before = peak_mib() * 2**20
    th.compress_folder(source, out, HALF)
    return before, peak_mib() * 2**20


def resume(folder: Path, sizes: Sizes) -> list[dict[str, Any]]:
    """Answer question 3: time an interrupted and resumed run, relative to an uninterrupted one."""
    source = make_checkpoint(folder / "resume", sizes.width, sizes.weights)
    ratios = []
    for number in range(sizes.repeats):
        start = time.process_time()
        th.compress_folder(source, folder / f"whole{number}", HALF)
        whole = time.process_time() - start
        start = time.process_time()
        with interrupted_after(7 * (sizes.weights // 14)):  # seven layers in each block
            th.compress_folder(source, folder / f"parts{number}", HALF)
        th.compress_folder(source, folder / f"parts{number}", HALF)
        ratios.append((time.process_time() - start) / whole - 1)
    return [
        {
            "question": 3,
            "case": "interrupted half way",
            "overhead": round(sorted(ratios)[len(ratios) // 2], 4),
        }
    ]


def summary(rows: Sequence[dict[str, Any]], sizes: Sizes) -> dict[str, Any]:
    by_case = {row["case"]: row for row in rows}
    flat = [row["above_idle_mb"] for row in rows if row["question"] == 2]
    return {
        "speed-up of 2 workers (asked 1.7)": by_case["2 workers"]["speed_up"],
        "memory of the largest over the smallest checkpoint (asked flat)": round(
            flat[-1] / max(flat[0], 0.1), 2
        ),
        "size of the largest over the smallest checkpoint": sizes.growth[-1] // sizes.growth[0],
        "overhead of resuming (asked 0.02)": by_case["interrupted half way"]["overhead"],
    }


def main(arguments: Sequence[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--records", type=Path, default=RECORDS)
    options = parser.parse_args(arguments)
    sizes = TOY if options.toy else FULL
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for part in (workers, memory, resume):
            rows += part(Path(folder), sizes)
            print(*(row for row in rows if row["question"] == rows[-1]["question"]), sep="\n")
    answers = summary(rows, sizes)
    print(json.dumps(answers, indent=1))
    return record("scale", rows, folder=options.records, summary=answers, dtype="bfloat16")


if __name__ == "__main__":
    main()
