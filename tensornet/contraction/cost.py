"""Cost model: predict the time of a planned contraction on a machine.

The predicted time is a sum of four terms. The first is reading cores and weights from memory once. The second
is the arithmetic of matrix products, which is slower for small sizes. The third is copies that permute the
indices of a tensor, with a cost for each element and for each contiguous run. The fourth is a fixed overhead
for each operation. For few tokens, a model that counts only floating-point operations would be wrong by more
than an order of magnitude.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

# --- machine constants, built in or measured ------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """Machine constants of the cost model, in seconds and for single precision unless stated otherwise.

    Args:
        name: name of the machine in reports.
        peak: multiply-adds per second of a large matrix product.
        half_peak: multiply-adds per second of a large matrix product in a 16-bit dtype.
        bandwidth: bytes per second for reading weights from memory.
        overhead: additional time for each operation: a matrix product, or a copy that permutes dimensions.
        copy_element: time per element of such a copy.
        copy_run: additional time per run of elements that a copy keeps contiguous; a run is a single element
            if the copy moves the innermost index.
        copy_far: additional time per element of a copy that does not fit into the cache of one CPU core.
        half_size: number of rows, columns or summed indices at which a product reaches half of the peak.
        unpack_pass: time per element of each pass over a block of packed integers.
        kernel_peak: multiply-adds per second of torch's kernels for packed integers; 0 if there are none.
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
        """Compute the fraction of the peak that a product `(rows, inner) @ (inner, columns)` can reach."""
        # For a single row, the efficiency of the arithmetic depends only on `inner`. Reading the matrix takes
        # most of the time, but is counted separately.
        sizes = (inner,) if rows == 1 else (rows, inner, columns)
        reached = 1.0
        for size in sizes:
            reached *= size / (size + self.half_size)
        return reached


#: One thread of a server CPU of 2023 with AVX-512. The constants were fitted by `benchmarks/fit_machine.py`
#: to timings of 27 layers with 1 to 1024 tokens. The constants of 16-bit and integer products were measured
#: on a CPU of 2024 with bfloat16 instructions, for layers of four shapes in seven number formats.
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

#: A data-centre GPU similar to an A100. The constants are from its data sheet, not measured.
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

#: Speed that each further thread adds to products and to copies, as a fraction of the speed of one thread.
_PRODUCT_GAIN, _COPY_GAIN = 0.9, 0.5

#: Seconds that synchronization adds to every multi-threaded operation.
_SYNCHRONIZE = 8e-6


@lru_cache(maxsize=64)
def machine_with_threads(machine: Machine, threads: int) -> Machine:
    """Convert the constants of one thread to those of several threads."""
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
    """Raise TypeError unless `machine` is a `Machine` or None."""
    if machine is not None and not isinstance(machine, Machine):
        raise TypeError(
            f"machine must be a Machine or None, got {machine!r}. None selects built-in constants; "
            "tensornet.contraction.cost.measure_machine() returns a measured Machine."
        )


def default_machine(device: torch.device | str) -> Machine:
    """Return the built-in constants of a device: `CPU` with torch's number of threads, or `GPU`."""
    if torch.device(device).type in ("cpu", "meta"):
        return machine_with_threads(CPU, torch.get_num_threads())
    return GPU


@torch.no_grad()
def measure_machine(device: torch.device | str = "cpu", *, repeats: int = 5) -> Machine:
    """Measure the machine constants of a device, in about a second, with torch's number of threads.

    Pass the result to `tensornet.nn.set_strategy(model, machine=...)`. `half_size`, `unpack_pass` and
    `kernel_peak` are not measured; they are copied from the built-in constants.

    Args:
        device: the device to measure.
        repeats: number of repetitions of each measurement; the fastest one counts.
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
        """Measure the seconds per element of a copy that permutes `64 * count` runs of length `run`."""
        operand = ones(count, 64, run).permute(1, 0, 2)
        whole = fastest(lambda: operand.reshape(-1), calls=20 if count * run < 2**18 else 1)
        return max(whole - overhead, 1e-9) / operand.numel()

    small, vector, large = ones(8, 8), ones(1, 4096), ones(1024, 1024)
    tall = ones(4096, 8192)  # 128 MiB, larger than caches
    half = ones(1024, 1024, dtype=torch.bfloat16)
    overhead = fastest(lambda: (small @ small.reshape(8, 8)).reshape(64), calls=50)
    # The peak is the measured speed divided by the built-in efficiency of this product.
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

#: Size in bytes above which an operand does not fit into the cache of one CPU core.
_FAR = 2**20


@dataclass(frozen=True)
class Copy:
    """Copy that permutes the indices of an operand before a matrix product.

    Args:
        elements: number of elements, or number of elements per token if `per_token`.
        run: number of consecutive elements that stay together; 1 if the innermost index changes.
        per_token: whether the operand has the token index.
    """

    elements: int
    run: int
    per_token: bool


@dataclass(frozen=True)
class MatmulShape:
    """Sizes of a batched matrix product `(batch, rows, inner) @ (batch, inner, columns)`.

    Args:
        batch, rows, inner, columns: product of the sizes of the indices of each group, without the token
            index.
        tokens_in: the group that contains the token index: `"batch"`, `"rows"`, `"inner"`, `"columns"` or
            None.
    """

    batch: int
    rows: int
    inner: int
    columns: int
    tokens_in: str | None

    @property
    def is_linear(self) -> bool:
        """True for a product `(tokens, inner) @ (inner, columns)`, as in `torch.nn.functional.linear`."""
        return (self.batch, self.rows, self.tokens_in) == (1, 1, "rows")

    def at(self, tokens: int) -> tuple[int, int, int, int]:
        """Return the sizes `(batch, rows, inner, columns)` of the product for `tokens` tokens."""
        return (
            self.batch * (tokens if self.tokens_in == "batch" else 1),
            self.rows * (tokens if self.tokens_in == "rows" else 1),
            self.inner * (tokens if self.tokens_in == "inner" else 1),
            self.columns * (tokens if self.tokens_in == "columns" else 1),
        )


def product_seconds(product: MatmulShape, tokens: int, machine: Machine, itemsize: int = 4) -> float:
    """Predict the time in seconds of a matrix product whose operands are in a cache.

    An element has `itemsize` bytes.
    """
    batch, rows, inner, columns = product.at(tokens)
    peak = machine.half_peak if itemsize == 2 else machine.peak * 4 / itemsize
    return machine.overhead + batch * rows * inner * columns / (
        peak * machine.efficiency(rows, inner, columns)
    )


def copy_seconds(copy: Copy, tokens: int, machine: Machine, itemsize: int = 4) -> float:
    """Predict the time in seconds of a copy that permutes dimensions; an element has `itemsize` bytes."""
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
    """Predict the time in seconds of a dense `nn.Linear`; an element has `itemsize` bytes.

    By default the weight is read from memory. Pass `from_memory=False` if it was just rebuilt from cores and
    is still in a cache.
    """
    product = MatmulShape(1, 1, in_features, out_features, "rows")
    read = out_features * in_features * itemsize / machine.bandwidth if from_memory else 0.0
    return read + product_seconds(product, tokens, machine, itemsize)
