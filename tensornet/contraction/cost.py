"""Predicted time of a planned contraction on a machine.

Cores and weights are read from memory once. The time of a matrix product is that of its arithmetic, at a rate
that is lower for small sizes. The time of a permuting copy is a sum over its elements and contiguous runs.
Each operation has a fixed overhead. Counting only floating-point operations would be wrong by more than an
order of magnitude for few tokens, where memory, copies and overheads matter most.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

# --- machine constants, built in or measured ------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """Machine constants of the cost model, in seconds and single-precision elements unless stated otherwise.

    Args:
        name: name in reports.
        peak: multiply-adds per second of a large matrix product.
        half_peak: the same in a 16-bit dtype.
        bandwidth: bytes per second for reading weights from memory; in a model of many layers weights are
            never in a cache.
        overhead: time per operation (a matrix product or a permuting copy).
        copy_element: time per element of a permuting copy.
        copy_run: additional time per contiguous run of a copy; a run is one element if the innermost index
            changes.
        copy_far: additional time per element of a copy that does not fit the cache of a core.
        half_size: rows, columns or summed indices at which a product reaches half of its peak.
        unpack_pass: time per element of one pass over a block of integers in unpacking.
        kernel_peak: multiply-adds per second of torch's kernels that read integer codes; 0 without them.

    Example:
        >>> import dataclasses
        >>> from tensornet.contraction.cost import default_machine
        >>> machine = dataclasses.replace(default_machine("cpu"), name="mine", bandwidth=40e9)
        >>> machine.efficiency(64, 64, 64) < 1
        True
    """

    name: str
    peak: float
    half_peak: float
    bandwidth: float
    overhead: float
    copy_element: float
    copy_run: float
    copy_far: float
    half_size: float
    unpack_pass: float = 0.1e-9
    kernel_peak: float = 30e9

    def efficiency(self, rows: int, inner: int, columns: int) -> float:
        """Compute the fraction of the peak that a matrix product of this size can reach."""
        # A vector-matrix product takes the time to read the matrix, which is counted separately.
        sizes = (inner,) if rows == 1 else (rows, inner, columns)
        reached = 1.0
        for size in sizes:
            reached *= size / (size + self.half_size)
        return reached


#: One thread of a server CPU of 2023 (AVX-512), fitted by `benchmarks/fit_machine.py` to timings of every
#: route for 27 layers and 1 to 1024 tokens. Constants of 16-bit and integer products are from a CPU of 2024
#: with bfloat16 in AVX-512, for layers of four shapes in seven formats.
CPU = Machine(
    name="cpu",
    peak=50e9,
    half_peak=190e9,
    bandwidth=13e9,
    overhead=5e-6,
    copy_element=0.06e-9,
    copy_run=0.5e-9,
    copy_far=0.55e-9,
    half_size=5,
    unpack_pass=0.25e-9,
    kernel_peak=80e9,
)

#: A data-centre GPU similar to an A100, from its data sheet; not measured.
GPU = Machine(
    name="gpu",
    peak=8e12,
    half_peak=100e12,
    bandwidth=1.2e12,
    overhead=10e-6,
    copy_element=8e-12,
    copy_run=20e-12,
    copy_far=0.0,
    half_size=24,
    unpack_pass=8e-12,
    kernel_peak=0.0,
)

#: Speed that each further thread adds to products and to copies, relative to the first.
_PRODUCT_GAIN, _COPY_GAIN = 0.9, 0.5

#: Additional seconds for every multi-threaded operation, for synchronization.
_SYNCHRONIZE = 8e-6


@lru_cache(maxsize=64)
def machine_with_threads(machine: Machine, threads: int) -> Machine:
    """Scale machine constants to a number of threads."""
    if threads == 1:
        return machine
    products, copies = (1 + gain * (threads - 1) for gain in (_PRODUCT_GAIN, _COPY_GAIN))
    return replace(
        machine,
        name=f"{machine.name} x{threads}",
        peak=machine.peak * products,
        half_peak=machine.half_peak * products,
        overhead=machine.overhead + _SYNCHRONIZE,
        copy_element=machine.copy_element / copies,
        copy_run=machine.copy_run / copies,
        copy_far=machine.copy_far / copies,
        unpack_pass=machine.unpack_pass / copies,
        kernel_peak=machine.kernel_peak * products,
    )


def check_machine(machine: object) -> None:
    """Raise TypeError unless `machine` is a Machine or None.

    Raises:
        TypeError: another type; the message names the functions that return machines.
    """
    if machine is not None and not isinstance(machine, Machine):
        raise TypeError(
            "machine must be a Machine, as tensornet.contraction.cost.measure_machine() returns, got "
            f"{machine!r}. Without one the shipped constants of the device count."
        )


def default_machine(device: torch.device | str) -> Machine:
    """Return the built-in constants for a device: `CPU` with the current number of threads, else `GPU`."""
    if torch.device(device).type in ("cpu", "meta"):
        return machine_with_threads(CPU, torch.get_num_threads())
    return GPU


@torch.no_grad()
def measure_machine(device: torch.device | str = "cpu", *, repeats: int = 5) -> Machine:
    """Measure the machine constants of a device with the current number of threads, in about a second.

    Pass the result to `tensornet.nn.set_strategy(model, machine=...)`. `half_size`, `unpack_pass` and
    `kernel_peak` are not measured but taken from the built-in machine, since they depend on the kernels.

    Args:
        device: the device to measure.
        repeats: number of repetitions of each measurement; the fastest counts.

    Example:
        >>> tn.contraction.cost.measure_machine(repeats=1).peak > 1e6
        True
    """
    where = torch.device(device)
    base = default_machine(where)

    def synchronize() -> None:
        if where.type == "cuda":
            torch.cuda.synchronize(where)

    def fastest(function: Callable[[], object], calls: int = 1) -> float:
        function()
        seconds = []
        for _ in range(repeats):
            synchronize()
            start = time.perf_counter()
            for _ in range(calls):
                function()
            synchronize()
            seconds.append((time.perf_counter() - start) / calls)
        return min(seconds)

    def ones(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.ones(shape, device=where, dtype=dtype)

    def copying(count: int, run: int) -> float:
        """Measure seconds per element of a copy with runs of this length, 4,096 elements or more."""
        operand = ones(count, 64, run).permute(1, 0, 2)
        whole = fastest(lambda: operand.reshape(-1), calls=20 if count * run < 2**18 else 1)
        return max(whole - overhead, 1e-9) / operand.numel()

    small, vector, large = ones(8, 8), ones(1, 4096), ones(1024, 1024)
    tall = ones(4096, 8192)  # 128 MiB: larger than any cache
    half = ones(1024, 1024, dtype=torch.bfloat16)
    overhead = fastest(lambda: (small @ small.reshape(8, 8)).reshape(64), calls=50)
    # Divide by the built-in efficiency of this product to get the peak.
    volume = 1024**3 / base.efficiency(1024, 1024, 1024)
    element, strided, far = copying(4, 1024), copying(4096, 1), copying(64, 1024)
    return replace(
        base,
        name=f"{where.type}, measured",
        peak=volume / max(fastest(lambda: large @ large) - overhead, 1e-9),
        half_peak=volume / max(fastest(lambda: half @ half) - overhead, 1e-9),
        bandwidth=4 * tall.numel() / max(fastest(lambda: vector @ tall) - overhead, 1e-9),
        overhead=overhead,
        copy_element=element,
        copy_run=max(strided - element, 0.0),
        copy_far=max(far - element, 0.0),
    )


# --- times ----------------------------------------------------------------------------------------

#: Operands larger than this, in bytes, do not fit the cache of one core.
_FAR = 2**20


@dataclass(frozen=True)
class Copy:
    """Permutation that is copied before its operand enters a matrix product.

    Args:
        elements: elements moved, for each token if `per_token`.
        run: elements that stay together; 1 if the innermost index changes.
        per_token: whether the operand has the token index.
    """

    elements: int
    run: int
    per_token: bool


@dataclass(frozen=True)
class Product:
    """Sizes of a batched matrix product `(batch, rows, inner) @ (batch, inner, columns)`.

    Args:
        batch, rows, inner, columns: sizes, without the token index.
        tokens_in: the group with the token index: `"batch"`, `"rows"`, `"inner"`, `"columns"`, or None.
    """

    batch: int
    rows: int
    inner: int
    columns: int
    tokens_in: str | None

    @property
    def is_linear(self) -> bool:
        """True for a product of tokens and a matrix as in `torch.nn.functional.linear`."""
        return (self.batch, self.rows, self.tokens_in) == (1, 1, "rows")

    def at(self, tokens: int) -> tuple[int, int, int, int]:
        """Return `(batch, rows, inner, columns)` for a token count."""
        return (
            self.batch * (tokens if self.tokens_in == "batch" else 1),
            self.rows * (tokens if self.tokens_in == "rows" else 1),
            self.inner * (tokens if self.tokens_in == "inner" else 1),
            self.columns * (tokens if self.tokens_in == "columns" else 1),
        )


def product_seconds(product: Product, tokens: int, machine: Machine, itemsize: int = 4) -> float:
    """Predict the time of one (batched) matrix product whose operands are in a cache."""
    batch, rows, inner, columns = product.at(tokens)
    peak = machine.half_peak if itemsize == 2 else machine.peak * 4 / itemsize
    return machine.overhead + batch * rows * inner * columns / (
        peak * machine.efficiency(rows, inner, columns)
    )


def copy_seconds(copy: Copy, tokens: int, machine: Machine, itemsize: int = 4) -> float:
    """Predict the time of one permuting copy."""
    elements = copy.elements * (tokens if copy.per_token else 1)
    each = machine.copy_element + machine.copy_run / copy.run
    if elements * itemsize > _FAR:
        each += machine.copy_far
    return machine.overhead + elements * each * max(itemsize, 2) / 4


def dense_seconds(
    out_features: int,
    in_features: int,
    tokens: int,
    machine: Machine,
    itemsize: int = 4,
    *,
    from_memory: bool = True,
) -> float:
    """Predict the time of `nn.Linear`; a weight that was just rebuilt is assumed to be in a cache."""
    product = Product(1, 1, in_features, out_features, "rows")
    read = out_features * in_features * itemsize / machine.bandwidth if from_memory else 0.0
    return read + product_seconds(product, tokens, machine, itemsize)
