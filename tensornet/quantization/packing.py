"""Pack integer codes of 1 to 8 bits into bytes, row by row, and unpack them.

For example, 8 codes of 3 bits fill 3 bytes. So a row of `n` 3-bit codes is split into 8 segments of
`ceil(n / 8)` codes, and its bytes are split into 3 planes of the same length. The k-th codes of all segments
fill the k-th bytes of all planes. Packing and unpacking are then vectorized shifts of whole segments, and
rows can be selected without unpacking. In general, `8 / gcd(8, bits)` segments fill `bits / gcd(8, bits)`
planes; the last segment may be padded.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor

from tensornet._util import is_exporting
from tensornet.errors import ShapeError


def packed_bytes(size: int, bits: int) -> int:
    """Compute the number of bytes of a packed row of `size` codes: `ceil(size / segments) * planes`."""
    segments, planes = _layout(bits)
    return math.ceil(size / segments) * planes


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes into bytes along the last dimension.

    Args:
        codes: codes from 0 to `2**bits - 1` in `torch.uint8`, shape `(..., size)`.
        bits: number of bits of each code, 1 to 8.

    Returns:
        Bytes in `torch.uint8`, shape `(..., packed_bytes(size, bits))`.

    Raises:
        ShapeError: the codes have another dtype, no dimension, or are too large.
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
    """Unpack codes; this is the inverse of `pack`.

    Args:
        packed: bytes in `torch.uint8`, shape `(..., packed_bytes(size, bits))`.
        bits: number of bits of each code.
        size: number of codes in a row.

    Returns:
        Codes in `torch.uint8`, shape `(..., size)`.

    Raises:
        ShapeError: the bytes have another dtype or length.
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
    # ONNX exporters shift bytes as if they were signed, so 32-bit integers are shifted instead.
    parts = parts.to(torch.int32) if is_exporting() else parts
    whole = _stacked if torch.compiler.is_compiling() else _shifted
    codes = whole(parts, bits).bitwise_and_(2**bits - 1).to(torch.uint8)
    return codes.reshape(*packed.shape[:-1], segments * length)[..., :size]


def _stacked(parts: Tensor, bits: int) -> Tensor:
    """Extract the codes from byte planes, one segment at a time.

    Compiled code uses this function, since it does not write to views.
    """
    found = []
    for segment in range(_layout(bits)[0]):
        plane, offset = divmod(segment * bits, 8)
        code = parts[..., plane, :] >> offset
        if offset + bits > 8:
            code = code | (parts[..., plane + 1, :] << (8 - offset))
        found.append(code)
    return torch.stack(found, -2)


def _shifted(parts: Tensor, bits: int) -> Tensor:
    """Extract the codes from byte planes, all segments at once, with few passes over memory."""
    first, down, up, runs = _shifts(bits, parts.device)
    if parts.shape[-2] == 1:
        return parts >> down
    codes = parts.index_select(-2, first).bitwise_right_shift_(down)
    upper = parts[..., 1:, :] << up
    for into, read in runs:
        codes[..., into, :] |= upper[..., read, :]
    return codes


@lru_cache(maxsize=64)
def _shifts(bits: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, list[tuple[slice, slice]]]:
    """Compute the planes and shifts that `_shifted` needs.

    Returns:
        The first plane of each segment, and the right shift of this plane. For each segment that continues in
        a second plane, the left shift of that plane. Pairs of slices that select segments with a second
        plane, and these second planes.
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
    """Compute the number of segments and the number of byte planes for codes of `bits` bits.

    Raises:
        ShapeError: `bits` is not from 1 to 8.
    """
    if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 8:
        raise ShapeError(f"Codes have 1 to 8 bits, got {bits!r}.")
    common = math.gcd(8, bits)
    return 8 // common, bits // common
