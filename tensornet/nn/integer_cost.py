"""Predicted time of products with integers: by a kernel of torch, or unpacked first."""

import math
from dataclasses import dataclass

from tensornet.contraction.cost import Machine, dense_seconds
from tensornet.nn.int4_cpu import KERNEL_TOKENS, has_layout, layout_bytes, products_of
from tensornet.nn.integer_matmul import INT8_TOKENS, WIDE_TOKENS, has_int8_kernel, scales_by_row
from tensornet.nn.storage import Storage, kept_shapes
from tensornet.quantization import NumberFormat
from tensornet.topology import Topology

#: Names of the kernels, those of the int4 kernel by its products.
INT4_KERNELS = {1: "int4 kernel", 2: "int4 kernel twice"}
INT8_KERNEL = "int8 kernel"


@dataclass(frozen=True)
class IntegerCost:
    """Predicted cost of reading integers in one forward pass.

    Args:
        kernel: that multiplies: one of `INT4_KERNELS`, `"int8 kernel"`, or `"unpacked"`.
        seconds: of the product, or of unpacking alone where something else multiplies.
        unpacked: elements that are unpacked.
        read_bytes: that are read from memory.
    """

    kernel: str
    seconds: float
    unpacked: int
    read_bytes: int


def product_cost(
    number_format: NumberFormat,
    shape: tuple[int, int],
    tokens: int,
    machine: Machine,
    itemsize: int,
    *,
    prepared: bool = True,
) -> IntegerCost:
    """Predict the cost of multiplying by an integer matrix, the way `tensornet.nn.integer_matmul` does.

    Args:
        number_format: of the matrix.
        shape: `(out, in)`.
        tokens: number of input vectors.
        machine: whose constants count.
        itemsize: bytes of an element of the input; the kernels take inputs of 2 bytes.
        prepared: whether the layer is prepared for inference where that helps.

    Example:
        >>> from tensornet.contraction.cost import CPU
        >>> product_cost(NumberFormat.parse("int8:row"), (512, 512), 1, CPU, 2).kernel
        'int8 kernel'
        >>> product_cost(NumberFormat.parse("int3"), (512, 512), 256, CPU, 2).kernel
        'unpacked'
    """
    elements, size = shape[0] * shape[1], number_format.nbytes(shape)
    has_kernel = prepared and has_layout(number_format, shape)
    kernel = _kernel(number_format, shape, tokens, machine, itemsize, prepared=has_kernel)
    if kernel is not None:
        products = 1
        if kernel != INT8_KERNEL:
            size, products = layout_bytes(number_format, shape), products_of(number_format)
        seconds = products * (machine.overhead + tokens * elements / machine.kernel_peak)
        return IntegerCost(kernel, seconds + size / machine.bandwidth, 0, size)
    wide = 4 if itemsize == 2 and tokens <= WIDE_TOKENS else itemsize
    passes = unpack_passes(number_format, wide)
    if itemsize == 2 and machine.kernel_peak > 0 and has_kernel:
        passes = unpack_passes(number_format, 4)  # scales multiply numbers of either size
    elif scales_by_row(number_format, shape[1]):
        passes = 1.0  # codes are converted, and outputs scaled
    seconds = size / machine.bandwidth + machine.overhead + elements * machine.unpack_pass * passes
    seconds += dense_seconds(*shape, tokens, machine, wide, from_memory=False)
    return IntegerCost("unpacked", seconds, elements, size)


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
        if number_format.is_integer:
            count = math.prod(shape)
            elements += count
            size += number_format.nbytes((math.prod(shape[:-1]), shape[-1]))
            passes = unpack_passes(number_format, itemsize)
            seconds += machine.overhead + count * machine.unpack_pass * passes
    return IntegerCost("unpacked", seconds, elements, size)


def unpack_passes(number_format: NumberFormat, itemsize: int) -> float:
    """Count the passes over elements of four bytes that unpacking takes; those over single bytes count half.

    Args:
        number_format: of the codes.
        itemsize: bytes of an unpacked element.
    """
    bits = number_format.bits or 8
    passes = 2.0 + (0.0 if bits == 8 else 1.0 if 8 % bits == 0 else 2.5)
    return passes + (1.0 if itemsize == 2 else 0.0)


def _kernel(
    number_format: NumberFormat,
    shape: tuple[int, int],
    tokens: int,
    machine: Machine,
    itemsize: int,
    *,
    prepared: bool,
) -> str | None:
    """Name the kernel that multiplies, if one does."""
    if machine.kernel_peak <= 0 or itemsize != 2:
        return None
    if prepared:
        products = products_of(number_format)
        return INT4_KERNELS[products] if tokens <= KERNEL_TOKENS // products else None
    return INT8_KERNEL if tokens <= INT8_TOKENS and has_int8_kernel(number_format, shape) else None
