"""Dense packing of integers of 2 to 8 bits into bytes, row by row.

To explain the layout: with 3 bits, 8 codes fill 3 bytes. A row of `n` codes is split into 8 segments of
`ceil(n / 8)` codes, and the k-th codes of all segments fill the k-th bytes of 3 byte planes. So packing and
unpacking are shifts of whole segments, which processors do many at a time, and rows can be sliced without
unpacking. Generally `8 / gcd(8, bits)` segments fill `bits / gcd(8, bits)` planes. The last segment may be
short: at most one code short of a full set of segments is wasted a row, and nothing where the number of
segments divides the row.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor

from tensornet._util import is_exporting
from tensornet.errors import ShapeError


def packed_bytes(size: int, bits: int) -> int:
    """Count the bytes of a packed row: `ceil(size / segments) * planes`.

    Example:
        >>> from tensornet.quantization import packed_bytes
        >>> packed_bytes(64, 3), packed_bytes(65, 3)
        (24, 27)
    """
    segments, planes = _layout(bits)
    return math.ceil(size / segments) * planes


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes along the last dimension.

    Args:
        codes: `torch.uint8`, from 0 to `2**bits - 1`, shape `(..., size)`.
        bits: of each code, 2 to 8.

    Returns:
        `torch.uint8`, shape `(..., packed_bytes(size, bits))`.

    Raises:
        ShapeError: codes of another dtype, without a dimension, or too large.

    Example:
        >>> from tensornet.quantization import pack, unpack
        >>> packed = pack(torch.tensor([1, 2, 3, 0, 1], dtype=torch.uint8), 2)
        >>> packed.shape, unpack(packed, 2, 5).tolist()
        (torch.Size([2]), [1, 2, 3, 0, 1])
    """
    segments, planes = _layout(bits)
    if not isinstance(codes, Tensor) or codes.dtype != torch.uint8 or codes.ndim == 0:
        got = f"{codes.dtype} of shape {tuple(codes.shape)}" if isinstance(codes, Tensor) else type(codes)
        raise ShapeError(f"pack needs codes as torch.uint8 with at least one dimension, got {got}.")
    if codes.numel() and int(codes.max()) >> bits:
        raise ShapeError(f"pack got a code of {int(codes.max())}; {bits} bits hold 0 to {2**bits - 1}.")
    size = codes.shape[-1]
    length = math.ceil(size / segments)
    padded = torch.nn.functional.pad(codes, (0, length * segments - size))
    parts = padded.reshape(*codes.shape[:-1], segments, length)
    packed = codes.new_zeros(*codes.shape[:-1], planes, length)
    for segment in range(segments):
        plane, offset = divmod(segment * bits, 8)
        code = parts[..., segment, :]
        packed[..., plane, :] |= code << offset
        if offset + bits > 8:
            packed[..., plane + 1, :] |= code >> (8 - offset)
    return packed.reshape(*codes.shape[:-1], planes * length)


def unpack(packed: Tensor, bits: int, size: int) -> Tensor:
    """Unpack codes: the inverse of `pack`.

    Args:
        packed: `torch.uint8`, shape `(..., packed_bytes(size, bits))`.
        bits: of each code.
        size: number of codes in a row.

    Returns:
        `torch.uint8`, shape `(..., size)`.

    Raises:
        ShapeError: bytes of another dtype or length.

    Example:
        >>> from tensornet.quantization import pack, unpack
        >>> codes = torch.tensor([[3, 0, 15, 7]], dtype=torch.uint8)
        >>> unpack(pack(codes, 4), 4, size=4).tolist()
        [[3, 0, 15, 7]]
    """
    segments, planes = _layout(bits)
    expected = packed_bytes(size, bits)
    if packed.dtype != torch.uint8 or packed.ndim == 0 or packed.shape[-1] != expected:
        raise ShapeError(
            f"unpack got {packed.dtype} of shape {tuple(packed.shape)}; {size} codes of {bits} bits are "
            f"packed as torch.uint8 of shape (..., {expected}). The file is damaged or belongs to another "
            "format."
        )
    length = math.ceil(size / segments)
    parts = packed.reshape(*packed.shape[:-1], planes, length)
    # ONNX exporters shift bytes as signed ones.
    parts = parts.to(torch.int32) if is_exporting() else parts
    whole = _stacked if torch.compiler.is_compiling() else _shifted
    codes = whole(parts, bits).bitwise_and_(2**bits - 1).to(torch.uint8)
    return codes.reshape(*packed.shape[:-1], segments * length)[..., :size]


def _stacked(parts: Tensor, bits: int) -> Tensor:
    """Shift the planes segment by segment, without constants and views to write into: for compilers."""
    found = []
    for segment in range(_layout(bits)[0]):
        plane, offset = divmod(segment * bits, 8)
        code = parts[..., plane, :] >> offset
        if offset + bits > 8:
            code = code | (parts[..., plane + 1, :] << (8 - offset))
        found.append(code)
    return torch.stack(found, -2)


def _shifted(parts: Tensor, bits: int) -> Tensor:
    """Shift the planes of all segments at once, in few passes over memory."""
    first, down, up, runs = _shifts(bits, parts.device)
    if parts.shape[-2] == 1:
        return parts >> down
    codes = parts.index_select(-2, first).bitwise_right_shift_(down)
    rest = parts[..., 1:, :] << up
    for into, read in runs:
        codes[..., into, :] |= rest[..., read, :]
    return codes


@lru_cache(maxsize=64)
def _shifts(bits: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, list[tuple[slice, slice]]]:
    """Return the planes and shifts that `_shifted` uses.

    Returns:
        The first plane and the shift of each segment; the shift of every plane but the first for the segment
        that starts in the plane before and ends in it; and where those segments are, in evenly spaced runs.
    """
    segments, planes = _layout(bits)
    starts = [divmod(segment * bits, 8) for segment in range(segments)]
    crossing = [k for k, (_, offset) in enumerate(starts) if offset + bits > 8]
    assert len(crossing) == planes - 1
    runs: list[tuple[slice, slice]] = []
    done = 0
    while done < planes - 1:
        step = crossing[done + 1] - crossing[done] if done + 1 < planes - 1 else 1
        stop = done + 1
        while stop < planes - 1 and crossing[stop] - crossing[stop - 1] == step:
            stop += 1
        runs.append((slice(crossing[done], crossing[stop - 1] + 1, step), slice(done, stop)))
        done = stop
    with torch.inference_mode(False):
        first = torch.tensor([plane for plane, _ in starts], device=device)
        down = torch.tensor([[offset] for _, offset in starts], dtype=torch.uint8, device=device)
        up = torch.tensor([[8 - starts[k][1]] for k in crossing], dtype=torch.uint8, device=device)
    return first, down, up, runs


def _layout(bits: int) -> tuple[int, int]:
    """Return the numbers of segments and of byte planes.

    Raises:
        ShapeError: other than 2 to 8 bits.
    """
    if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 8:
        raise ShapeError(f"Codes have 2 to 8 bits, got {bits!r}.")
    common = math.gcd(8, bits)
    return 8 // common, bits // common
