"""The constants of a machine that decide how fast a contraction runs, shipped or measured on request."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import torch


@dataclass(frozen=True)
class Machine:
    """Constants of a machine, in seconds and single-precision elements unless said otherwise.

    Args:
        name: for reports.
        peak: multiply-adds per second of a large matrix product.
        half_peak: the same in a 16-bit dtype.
        bandwidth: bytes per second at which weights arrive from memory; in a model of many layers they are
            never in a cache when they are needed.
        fresh_byte: per byte of a large result, for pages the system hands out anew.
        overhead: per matrix product, the reshapes around it included.
        batch_overhead: per matrix of a batched product.
        copy_overhead: per permuting copy.
        copy_element: per element copied in long runs.
        copy_run: per contiguous run of a copy.
        copy_strided: per element of a copy whose innermost index changes.
        half_rows, half_inner: sizes at which a product reaches half of its peak.
        half_columns: the same for columns; the rate falls with the square below it.
    """

    name: str
    peak: float
    half_peak: float
    bandwidth: float
    fresh_byte: float
    overhead: float
    batch_overhead: float
    copy_overhead: float
    copy_element: float
    copy_run: float
    copy_strided: float
    half_rows: float
    half_inner: float
    half_columns: float

    def efficiency(self, rows: int, inner: int, columns: int) -> float:
        """Share of the peak that a product of this size can reach."""
        share = inner / (inner + self.half_inner)
        if rows == 1:  # a vector times a matrix takes what reading the matrix takes, which is counted apart
            return share
        share *= rows / (rows + self.half_rows)
        return share * columns**2 / (columns**2 + self.half_columns**2)


#: One thread of a server processor of 2023 (AVX-512), measured by `measure_machine`.
CPU = Machine(
    name="cpu",
    peak=51e9,
    half_peak=51e9,
    bandwidth=12e9,
    fresh_byte=0.25e-9,
    overhead=7e-6,
    batch_overhead=0.06e-6,
    copy_overhead=3e-6,
    copy_element=0.1e-9,
    copy_run=1.8e-9,
    copy_strided=1.0e-9,
    half_rows=3.5,
    half_inner=4,
    half_columns=15,
)

#: A data-centre GPU of the class of an A100, from its data sheet; not measured.
GPU = Machine(
    name="gpu",
    peak=8e12,
    half_peak=100e12,
    bandwidth=1.2e12,
    fresh_byte=0.0,
    overhead=10e-6,
    batch_overhead=0.0,
    copy_overhead=8e-6,
    copy_element=8e-12,
    copy_run=20e-12,
    copy_strided=20e-12,
    half_rows=32,
    half_inner=16,
    half_columns=32,
)

#: A second thread brings this much of the first; memory is shared, so less for what is bound by it.
_THREAD_SHARE, _THREAD_SHARE_MEMORY = 0.9, 0.5


@lru_cache(maxsize=64)
def machine_with_threads(machine: Machine, threads: int) -> Machine:
    """The machine with more threads at work."""
    if threads == 1:
        return machine
    compute = 1 + _THREAD_SHARE * (threads - 1)
    memory = 1 + _THREAD_SHARE_MEMORY * (threads - 1)
    return replace(
        machine,
        name=f"{machine.name} x{threads}",
        peak=machine.peak * compute,
        half_peak=machine.half_peak * compute,
        bandwidth=machine.bandwidth * memory,
        copy_element=machine.copy_element / memory,
        copy_run=machine.copy_run / memory,
        copy_strided=machine.copy_strided / memory,
    )


def default_machine(device: torch.device | str) -> Machine:
    """Shipped constants for a device: `CPU` with the current number of threads, `GPU` for all else."""
    if torch.device(device).type in ("cpu", "meta"):
        return machine_with_threads(CPU, torch.get_num_threads())
    return GPU


@torch.no_grad()
def measure_machine(device: torch.device | str = "cpu", *, repeats: int = 5) -> Machine:
    """Measure the constants of a device with the current number of threads; takes about a second.

    Pass the result to `tensornet.nn.set_strategy(model, machine=...)`. The sizes at which products reach half
    of their peak, and the price of fresh pages, are those of the shipped machine: they belong to the kernels
    and the allocator, not to the clock.

    Args:
        device: where to measure.
        repeats: of each measurement, of which the fastest counts.
    """
    where = torch.device(device)
    base = default_machine(where)

    def fastest(function: Callable[[], object], calls: int = 1) -> float:
        function()
        seconds = []
        for _ in range(repeats):
            _synchronize(where)
            start = time.perf_counter()
            for _ in range(calls):
                function()
            _synchronize(where)
            seconds.append((time.perf_counter() - start) / calls)
        return min(seconds)

    def ones(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.ones(shape, device=where, dtype=dtype)

    small, vector, large = ones(8, 8), ones(1, 4096), ones(1024, 1024)
    tall, long = ones(4096, 8192), ones(64, 64, 256)  # 128 MiB: no cache holds it
    half = ones(1024, 1024, dtype=torch.bfloat16)
    overhead = fastest(lambda: (small @ small.reshape(8, 8)).reshape(64), calls=50)
    copy_overhead = fastest(lambda: small.permute(1, 0).reshape(64), calls=50)
    # The shipped efficiencies say how far this product stays below the peak.
    volume = 1024**3 / base.efficiency(1024, 1024, 1024)
    traffic = 4 * tall.numel()
    together = fastest(lambda: long.permute(1, 0, 2).reshape(-1)) - copy_overhead
    runs = fastest(lambda: long.reshape(64, 2048, 8).permute(1, 0, 2).reshape(-1)) - copy_overhead
    strided = fastest(lambda: long.reshape(64, 64, 16, 16).permute(0, 3, 1, 2).reshape(-1)) - copy_overhead
    element = max(together, 1e-9) / long.numel()
    batched = ones(256, 1, 8)
    batch_overhead = (fastest(lambda: batched @ batched.mT, calls=5) - overhead) / 256
    return replace(
        base,
        name=f"{where.type}, measured",
        peak=volume / max(fastest(lambda: large @ large) - overhead, 1e-9),
        half_peak=volume / max(fastest(lambda: half @ half) - overhead, 1e-9),
        bandwidth=traffic / max(fastest(lambda: vector @ tall) - overhead, 1e-9),
        overhead=overhead,
        batch_overhead=max(batch_overhead, 0.0),
        copy_overhead=copy_overhead,
        copy_element=element,
        copy_run=max((runs / long.numel() - element) * 8, 0.0),
        copy_strided=max(strided / long.numel() - element, 0.0),
    )


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
