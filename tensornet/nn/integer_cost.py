"""Predicted time of products with integers: by a kernel of torch, or unpacked first."""

import math
from dataclasses import dataclass

from tensornet.contraction.cost import dense_seconds
from tensornet.contraction.machine import Machine
from tensornet.nn.integer_product import INT8_TOKENS, WIDE_TOKENS, has_int8_kernel
from tensornet.nn.kernel_layout import KERNEL_TOKENS, has_layout
from tensornet.nn.storage import Storage, kept_shapes
from tensornet.quantization import NumberFormat
from tensornet.topology import Topology


@dataclass(frozen=True)
class IntegerCost:
    """Predicted cost of reading integers in one forward pass.

    Args:
        kernel: that multiplies: `"int4 kernel"`, `"int8 kernel"`, or `"unpacked"`.
        seconds: of the product, or of unpacking alone where something else multiplies.
        unpacked: elements that are unpacked.
        read_bytes: stored bytes that are read from memory.
        multiplies: whether `seconds` include the product.
    """

    kernel: str
    seconds: float
    unpacked: int
    read_bytes: int
    multiplies: bool

    @property
    def summary(self) -> tuple[str, int, int]:
        """Kernel, unpacked elements and bytes read."""
        return self.kernel, self.unpacked, self.read_bytes


def product_cost(
    number_format: NumberFormat, shape: tuple[int, int], tokens: int, machine: Machine, itemsize: int
) -> IntegerCost:
    """Predict the cost of multiplying by an integer matrix, the way `tensornet.nn.integer_product` does.

    Args:
        number_format: of the matrix.
        shape: `(out, in)`.
        tokens: number of input vectors.
        machine: whose constants count.
        itemsize: bytes of an element of the input; the kernels take inputs of 2 bytes.

    Example:
        >>> from tensornet.contraction.machine import CPU
        >>> product_cost(NumberFormat.parse("int8:row"), (512, 512), 1, CPU, 2).kernel
        'int8 kernel'
        >>> product_cost(NumberFormat.parse("int3"), (512, 512), 1, CPU, 2).kernel
        'unpacked'
    """
    elements, size = shape[0] * shape[1], number_format.nbytes(shape)
    if (kernel := _kernel(number_format, shape, tokens, machine, itemsize)) is not None:
        seconds = machine.overhead + size / machine.bandwidth + tokens * elements / machine.kernel_peak
        return IntegerCost(kernel, seconds, 0, size, True)
    wide = 4 if itemsize == 2 and tokens <= WIDE_TOKENS else itemsize
    seconds = size / machine.bandwidth + unpack_seconds(number_format, elements, machine, wide)
    seconds += dense_seconds(*shape, tokens, machine, wide, from_memory=False)
    return IntegerCost("unpacked", seconds, elements, size, True)


def unpacking_cost(topology: Topology, storage: Storage, machine: Machine, itemsize: int) -> IntegerCost:
    """Predict the cost of unpacking the integer cores of a network before it is contracted.

    Args:
        topology: the network.
        storage: how its cores are kept.
        machine: whose constants count.
        itemsize: bytes of an element of the unpacked cores.
    """
    seconds, elements, size = 0.0, 0, 0
    for name, shape, _ in kept_shapes(topology, storage):
        number_format = storage.format_of(name)
        if storage.int8:
            number_format = NumberFormat(bits=8)
        if number_format.is_integer:
            count = math.prod(shape)
            elements += count
            size += number_format.nbytes((math.prod(shape[:-1]), shape[-1]))
            seconds += unpack_seconds(number_format, count, machine, itemsize)
    return IntegerCost("unpacked", seconds, elements, size, False)


def unpack_seconds(number_format: NumberFormat, elements: int, machine: Machine, itemsize: int) -> float:
    """Predict the time to unpack codes that are in a cache.

    Args:
        number_format: of the codes.
        elements: how many.
        machine: whose constants count.
        itemsize: bytes of an unpacked element.
    """
    # Passes over elements of four bytes; those over single bytes count half.
    bits = number_format.bits or 8
    passes = 2.0 + (0.0 if bits == 8 else 1.0 if 8 % bits == 0 else 2.5)
    return machine.overhead + elements * machine.unpack_pass * (passes + (1.0 if itemsize == 2 else 0.0))


def _kernel(
    number_format: NumberFormat, shape: tuple[int, int], tokens: int, machine: Machine, itemsize: int
) -> str | None:
    """Name the kernel that multiplies, if one does."""
    if machine.kernel_peak <= 0 or itemsize != 2:
        return None
    if tokens <= KERNEL_TOKENS and has_layout(number_format, shape):
        return "int4 kernel"
    return "int8 kernel" if tokens <= INT8_TOKENS and has_int8_kernel(number_format, shape) else None
