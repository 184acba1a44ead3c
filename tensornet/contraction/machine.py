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
        far_byte: per byte of a result that the cache of a core does not hold.
        fresh_byte: per byte of a result so large that the system hands out pages anew for each.
        overhead: per matrix product, the reshapes around it included.
        batch_overhead: per matrix of a batched product.
        copy_overhead: per permuting copy.
        copy_element: per element copied in long runs.
        copy_run: per contiguous run of a copy.
        copy_strided: per element of a copy whose innermost index changes.
        copy_far: more for each element of a copy that the cache of a core does not hold.
        copy_far_strided: the same where the innermost index changes: one cache line for each element.
        half_rows, half_inner, half_columns: sizes at which a product reaches half of its peak.
        step_columns: columns that a kernel takes at once.
        rest_columns: the columns beyond the last full step are taken in powers of two, each of which takes as
            long as so many columns.
    """

    name: str
    peak: float
    half_peak: float
    bandwidth: float
    far_byte: float
    fresh_byte: float
    overhead: float
    batch_overhead: float
    copy_overhead: float
    copy_element: float
    copy_run: float
    copy_strided: float
    copy_far: float
    copy_far_strided: float
    half_rows: float
    half_inner: float
    half_columns: float
    step_columns: int
    rest_columns: float

    def efficiency(self, rows: int, inner: int, columns: int) -> float:
        """Share of the peak that a product of this size can reach."""
        share = inner / (inner + self.half_inner)
        if rows == 1:  # a vector times a matrix takes what reading the matrix takes, which is counted apart
            return share
        rest = columns % self.step_columns
        worked = columns - rest + self.rest_columns * rest.bit_count()
        return share * rows / (rows + self.half_rows) * columns / (worked + self.half_columns)


#: One thread of a server processor of 2023 (AVX-512). Sizes of products: timings of 2,000 products. The rest:
#: `benchmarks/fit_machine.py`, timings of every way to apply 18 layers to 1 to 1024 tokens.
CPU = Machine(
    name="cpu",
    peak=52e9,
    half_peak=52e9,
    bandwidth=13e9,
    far_byte=0.05e-9,
    fresh_byte=0.36e-9,
    overhead=7e-6,
    batch_overhead=0.07e-6,
    copy_overhead=5e-6,
    copy_element=0.1e-9,
    copy_run=6e-9,
    copy_strided=0.9e-9,
    copy_far=0.3e-9,
    copy_far_strided=0.25e-9,
    half_rows=4.7,
    half_inner=4.3,
    half_columns=5.6,
    step_columns=16,
    rest_columns=13.8,
)

#: A data-centre GPU of the class of an A100, from its data sheet; not measured.
GPU = Machine(
    name="gpu",
    peak=8e12,
    half_peak=100e12,
    bandwidth=1.2e12,
    far_byte=0.0,
    fresh_byte=0.0,
    overhead=10e-6,
    batch_overhead=0.0,
    copy_overhead=8e-6,
    copy_element=8e-12,
    copy_run=20e-12,
    copy_strided=20e-12,
    copy_far=0.0,
    copy_far_strided=0.0,
    half_rows=32,
    half_inner=16,
    half_columns=32,
    step_columns=1,
    rest_columns=0.0,
)

#: What a second thread brings, as a share of the first. Products: nearly all. Copies: memory is shared.
#: Reading weights: next to nothing, as a vector times a matrix is left to one thread. From forward passes
#: with two threads on a quiet machine, as is what follows.
_SHARE, _SHARE_COPY, _SHARE_READ = 0.9, 0.5, 0.1

#: More seconds for every product and copy that threads share, to start and to wait for each other.
_SYNCHRONIZE = 8e-6


@lru_cache(maxsize=64)
def machine_with_threads(machine: Machine, threads: int) -> Machine:
    """The machine with more threads at work."""
    if threads == 1:
        return machine
    more = threads - 1
    compute, copying = 1 + _SHARE * more, 1 + _SHARE_COPY * more
    return replace(
        machine,
        name=f"{machine.name} x{threads}",
        peak=machine.peak * compute,
        half_peak=machine.half_peak * compute,
        bandwidth=machine.bandwidth * (1 + _SHARE_READ * more),
        overhead=machine.overhead + _SYNCHRONIZE,
        copy_overhead=machine.copy_overhead + _SYNCHRONIZE,
        copy_element=machine.copy_element / copying,
        copy_run=machine.copy_run / copying,
        copy_strided=machine.copy_strided / copying,
        copy_far=machine.copy_far / copying,
        copy_far_strided=machine.copy_far_strided / copying,
    )


def check_machine(machine: object) -> None:
    """Refuse what is no machine, None aside.

    Raises:
        TypeError: saying where machines come from.
    """
    if machine is not None and not isinstance(machine, Machine):
        raise TypeError(
            f"machine must be a tensornet.Machine, as tensornet.measure_machine() returns, got {machine!r}. "
            "Without one the shipped constants of the device count."
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
    of their peak, and what memory of large results costs, are those of the shipped machine: they belong to
    the kernels and the allocator, not to the clock.

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

    def copying(far: bool, *shape: int, order: tuple[int, ...]) -> float:
        """Seconds for each element of a copy in another order, 4 MiB of them or 256 KiB."""
        operand = ones(16 * shape[0] if far else shape[0], *shape[1:]).permute(order)
        whole = fastest(lambda: operand.reshape(-1), calls=1 if far else 20)
        return max(whole - copy_overhead, 1e-9) / operand.numel()

    small, vector, large = ones(8, 8), ones(1, 4096), ones(1024, 1024)
    tall = ones(4096, 8192)  # 128 MiB: no cache holds it
    half = ones(1024, 1024, dtype=torch.bfloat16)
    overhead = fastest(lambda: (small @ small.reshape(8, 8)).reshape(64), calls=50)
    copy_overhead = fastest(lambda: small.permute(1, 0).reshape(64), calls=50)
    # The shipped efficiencies say how far this product stays below the peak.
    volume = 1024**3 / base.efficiency(1024, 1024, 1024)
    traffic = 4 * tall.numel()
    element, far_element = (copying(far, 8, 8, 1024, order=(1, 0, 2)) for far in (False, True))
    runs = copying(False, 8, 1024, 8, order=(1, 0, 2))
    strided, far_strided = (copying(far, 16, 16, 16, 16, order=(0, 3, 1, 2)) for far in (False, True))
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
        copy_run=max((runs - element) * 8, 0.0),
        copy_strided=max(strided - element, 0.0),
        copy_far=max(far_element - element, 0.0),
        copy_far_strided=max(far_strided - strided, 0.0),
    )


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
