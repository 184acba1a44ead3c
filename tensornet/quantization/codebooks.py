"""Codebooks: vectors to which formats such as `iq3_s` restrict the codes of neighbouring weights.

The absolute values of 4 or 8 neighbouring weights, divided by their scale, are together one point of a
codebook. The index of a point takes 8 to 10 bits, which is less than one code for each weight, since unlikely
combinations are left out. Every weight also has a sign. In some formats the number of negative weights among
8 is even, so that only 7 signs are stored. These formats are types of GGUF files.

Codes are positions in a table of levels, as in other formats with a table: first the negative levels, then
the positive ones. A codebook restricts which codes may occur together. So only rounding and packing differ
from formats without a codebook.

Reference:
    `ggml-common.h` (the points) and `ggml-quants.c` (the types IQ2 and IQ3) of llama.cpp.
"""

import base64
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tensornet.errors import FormatError
from tensornet.quantization.packing import pack, packed_bytes, unpack
from tensornet.quantization.parts import WIDEST, Levels

#: Number of weights whose indices and signs are packed together.
RUN = 8
#: Number of points that are compared for each element of a vector (see `Codebook.choose`).
_COMPARED = 2
#: Smallest range, and number of ranges, in the search for scales.
_NARROWEST, _TRIED = 0.76, 5
#: Groups whose smallest absolute value is at least this fraction of the largest one also try the scales of
#: points with equal elements.
_EVEN = 0.75
#: Number of codes that are packed at a time.
_PACKED = 1 << 22


class _Tables(NamedTuple):
    """Tables of a codebook on one device.

    A cell is a combination of magnitudes. Its number has their positions as digits, the least significant
    first.

    Args:
        points: digits of every point, uint8, shape `(points, length)`.
        inverse: index of the point in each cell; -1 for cells without a point, shape `(cells,)`.
        near: magnitudes of the points that are nearest to each cell, the nearest one first, float32, shape
            `(cells, compared, length)`.
        magnitudes: magnitudes of every point, int8, shape `(points, length)`.
        signs: factors 1 and -1 for every number that `split` returns as signs, int8, shape `(256, RUN)`. If
            only 7 signs are stored, the highest bit has no effect.
    """

    points: Tensor
    inverse: Tensor
    near: Tensor
    magnitudes: Tensor
    signs: Tensor


@dataclass(frozen=True)
class Codebook:
    """Set of points for the absolute values of neighbouring weights.

    Args:
        magnitudes: absolute values that one weight may have, as multiples of its scale, ascending.
        length: number of weights in a vector.
        even: True if the number of negative weights of each `RUN` weights is even.
        cells: which cells are points, one bit for each, compressed by zlib, in base 85.
    """

    magnitudes: tuple[int, ...]
    length: int
    even: bool
    cells: str
    center = 0.0
    run = RUN
    equal_steps = False
    symmetric = True

    @property
    def bits(self) -> int:
        """Number of bits of a code before packing."""
        return self.top.bit_length()

    @property
    def top(self) -> int:
        """Largest code."""
        return 2 * len(self.magnitudes) - 1

    @property
    def lowest(self) -> float:
        """Smallest value."""
        return float(-self.magnitudes[-1])

    @property
    def levels(self) -> tuple[int, ...]:
        """Values of all codes as multiples of the scale, ascending."""
        return (*(-x for x in reversed(self.magnitudes)), *self.magnitudes)

    @property
    def index_bits(self) -> int:
        """Number of bits of the index of a point."""
        return (len(self.tables(torch.device("cpu")).points) - 1).bit_length()

    @property
    def sign_bits(self) -> int:
        """Number of bits for the signs of `RUN` weights."""
        return RUN - 1 if self.even else RUN

    @property
    def _free(self) -> Levels:
        """The same levels without a restriction."""
        return Levels(self.levels)

    def tables(self, device: torch.device) -> _Tables:
        """Return the tables on a device."""
        return _tables(self, device)

    # --- rounding --------------------------------------------------------------------------------

    def ranges(self, least: float, like: Tensor) -> Tensor:
        """Return the shares of the range that the search for scales tries.

        They are few, since rounding takes more time than with other formats.
        """
        return torch.linspace(_NARROWEST, WIDEST, _TRIED, device=like.device).to(like)

    def scales_of_even(self, group: Tensor) -> Iterator[Tensor]:
        """Yield the scales of points with equal elements for groups of nearly equal weights.

        Such a point may have another magnitude than the largest. Random weights hardly ever have such groups.
        """
        sizes = group.abs()
        even = sizes.amin(0) >= _EVEN * sizes.amax(0)
        if bool(even.any()):
            points = self.tables(torch.device("cpu")).magnitudes
            for magnitude in points[(points == points[:, :1]).all(1), 0].tolist():
                yield torch.where(even, sizes.mean(0) / magnitude, 0.0)

    def nearest(self, x: Tensor, out: Tensor | None = None, offset: float = 0.0) -> Tensor:
        """Round to the nearest levels, without regard to the codebook."""
        return self._free.nearest(x, out)

    def closest(self, x: Tensor) -> Tensor:
        """Round rows of runs `(..., in)`, as multiples of their scale, to points and signs."""
        return self.choose(x.reshape(1, -1, RUN)).view(x.shape)

    def searched(self, x: Tensor) -> Tensor:
        """Round the columns of `x` approximately, since comparing points would take most of the time."""
        return self.choose(x.T.reshape(1, -1, RUN), compare=False).view(x.shape[::-1]).T

    def to_codes(self, found: Tensor) -> Tensor:
        """Convert levels to codes in `torch.uint8`."""
        return self._free.to_codes(found)

    def values(self, codes: Tensor) -> tuple[Tensor, float]:
        """Look up the levels of codes."""
        return self._free.values(codes)

    def trained_values(self, codes: Tensor) -> Tensor:
        """Look up the levels of rounded codes, with gradients."""
        return self._free.trained_values(codes)

    def choose(self, target: Tensor, factor: Tensor | None = None, compare: bool = True) -> Tensor:
        """Choose the points and signs of runs `t` so that the cost `|(t - q) F|^2` is small.

        Weights keep their signs, except for one weight of each run in which the number of negative weights
        must be changed. Of all points, those that are nearest to the cell of the target are compared. The
        weight that changes its sign is chosen for the nearest of them.

        Args:
            target: runs as multiples of their scale, shape `(stack, n, RUN)`.
            factor: upper triangular factors `F` of the cost, shape `(stack, RUN, RUN)`; the identity if
                absent.
            compare: whether points are compared. If not, the point that is nearest to the cell is taken, and
                `factor` has no effect.

        Returns:
            Levels in the dtype of the target, in its shape.
        """
        if not compare:
            sizes = target.abs()
            points = self._near(sizes.unflatten(-1, (-1, self.length)), 1).flatten(-3)
            return points * self._signs(target, points, sizes, False if self.even else None)
        if self.length == RUN:
            return self._closest(target, factor, False if self.even else None)[0]
        # The errors of the first vector change the targets of the second one. If the number of negative
        # weights must be even, both vectors may also have an odd number, which is tried too.
        half, count, odd = self.length, target.shape[1], None
        if self.even:
            odd = torch.arange(2 * count, device=target.device)[:, None] >= count
            target = torch.cat([target, target], 1)
        first, second = target[..., :half], target[..., half:]
        if factor is None:
            own = after = coupling = None
        else:
            own, after = factor[..., :half, :half], factor[..., half:, half:]
            coupling = torch.linalg.solve_triangular(after, factor[..., :half, half:], upper=True, left=False)
        before, cost = self._closest(first, own, odd)
        aim = second if coupling is None else second + (first - before) @ coupling
        behind, more = self._closest(aim, after, odd)
        found = torch.cat([before, behind], -1)
        if not self.even:
            return found
        cost += more
        other = cost[:, count:] < cost[:, :count]
        return torch.where(other[..., None], found[:, count:], found[:, :count])

    def _closest(
        self, target: Tensor, factor: Tensor | None, odd: Tensor | bool | None
    ) -> tuple[Tensor, Tensor]:
        """Choose a point and signs for each vector, and return the levels and their cost; see `choose`.

        Args:
            target, factor: as for `choose`, but for single vectors.
            odd: whether the number of negative weights must be odd, or even, shape `(n, 1)` or one for all;
                None without a restriction.
        """
        sizes = target.abs()
        points = self._near(sizes)  # shape: (stack, n, compared, length)
        gap = sizes if factor is None else sizes * factor.square().sum(-1).unsqueeze(-2)
        signs = self._signs(target, points[..., 0, :], gap, odd)
        error = points * signs.unsqueeze(-2)
        error -= target.unsqueeze(-2)
        if factor is not None:
            error = (error.flatten(1, 2) @ factor).view(error.shape)
        cost, best = error.square_().sum(-1).min(-1)
        place = best[..., None, None].expand(*best.shape, 1, self.length)
        return points.gather(-2, place).squeeze(-2).mul_(signs), cost

    def _near(self, sizes: Tensor, count: int | None = None) -> Tensor:
        """Find the points that are nearest to the cells of vectors.

        Args:
            sizes: absolute values, shape `(..., length)`.
            count: number of points; by default, the number of those that are compared.

        Returns:
            Magnitudes, shape `(..., count, length)`, in the dtype of `sizes`.
        """
        near = self.tables(sizes.device).near[:, :count]
        found = near.flatten(1).index_select(0, self._cells(sizes).flatten())
        return found.view(*sizes.shape[:-1], -1, self.length).to(sizes.dtype)

    @staticmethod
    def _signs(target: Tensor, points: Tensor, gap: Tensor, odd: Tensor | bool | None) -> Tensor:
        """Return the signs of vectors. If the number of negative elements must change, so does one sign.

        Args:
            target: vectors, shape `(..., n)`.
            points: magnitudes of the points that replace them.
            gap: increase of the cost if the sign of an element changes, divided by its magnitude in `points`,
                up to a factor.
            odd: whether the number of negative elements must be odd, or even; None without a restriction.
        """
        signs = torch.ones_like(target).copysign_(target)
        if odd is None:
            return signs
        wrong = ((signs < 0).sum(-1, keepdim=True) % 2 == 1) != odd
        place = (points * gap).argmin(-1, keepdim=True)
        return signs.scatter(-1, place, torch.where(wrong, -1.0, 1.0).to(signs) * signs.gather(-1, place))

    def _cells(self, size: Tensor) -> Tensor:
        """Compute the cell of each vector of absolute values, shape `(..., length)`."""
        count = len(self.magnitudes)
        # All magnitudes but the largest are equally spaced, up to rounding.
        pitch = self.magnitudes[1] - self.magnitudes[0]
        digits = (size / pitch).floor_().clamp_(max=count - 1)
        return (digits @ _bases(count, self.length, size)).long()

    # --- bytes -----------------------------------------------------------------------------------

    @property
    def _widths(self) -> tuple[int, ...]:
        """Number of bits in each byte of a run: all 8 except for the last."""
        total = RUN // self.length * self.index_bits + self.sign_bits
        return (8,) * (total // 8) + ((total % 8,) if total % 8 else ())

    def packed_bytes(self, size: int) -> int:
        """Compute the number of bytes of a packed row of `size` codes, a multiple of `RUN`."""
        return sum(packed_bytes(size // RUN, width) for width in self._widths)

    def split(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Split codes into indices of points and signs.

        Args:
            codes: codes in `torch.uint8`, shape `(..., in)`.

        Returns:
            Indices, shape `(..., in / length)`, and for each run the signs of its weights as the bits of a
            number, the first weight in the lowest bit, shape `(..., in / RUN)`, both as `torch.int32`.

        Raises:
            FormatError: the codes are not in the codebook.
        """
        half = len(self.magnitudes)
        negative = codes < half
        digits = torch.where(negative, half - 1 - codes, codes - half).unflatten(-1, (-1, self.length))
        cells = (digits.float() @ _bases(half, self.length, digits.float())).long()
        found = self.tables(codes.device).inverse[cells]
        runs = negative.unflatten(-1, (-1, RUN)).to(torch.int32)
        signs = (runs << torch.arange(RUN, dtype=torch.int32, device=codes.device)).sum(-1, dtype=torch.int32)
        if bool((found < 0).any()) or (self.even and bool((runs.sum(-1) % 2).any())):
            raise FormatError(
                "These codes are not points of the codebook; round the weight by round_weight, or encode it."
            )
        return found, signs

    def pack(self, codes: Tensor) -> Tensor:
        """Pack codes `(..., in)` to bytes, shape `(..., packed_bytes(in))`."""
        size = codes.shape[-1]
        rows = codes.reshape(math.prod(codes.shape[:-1]), size)
        # Splitting needs several times the memory of the codes.
        packed = [self._pack_rows(part) for part in rows.split(max(1, _PACKED // max(size, 1)))]
        return torch.cat(packed).reshape(*codes.shape[:-1], self.packed_bytes(size))

    def _pack_rows(self, codes: Tensor) -> Tensor:
        indices, signs = self.split(codes)
        each = indices.unflatten(-1, (-1, RUN // self.length))
        number = (signs & (2**self.sign_bits - 1)) << each.shape[-1] * self.index_bits
        for k in range(each.shape[-1]):
            number = number | each[..., k] << k * self.index_bits
        planes = []
        for k, width in enumerate(self._widths):
            planes.append(pack((number >> 8 * k & 2**width - 1).to(torch.uint8), width))
        return torch.cat(planes, -1)

    def unpack(self, packed: Tensor, size: int) -> Tensor:
        """Unpack rows of `size` codes: the inverse of `pack`."""
        tables, half = self.tables(packed.device), len(self.magnitudes)
        indices, signs = self._unpacked(packed, size)
        digits = tables.points.index_select(0, indices.reshape(-1)).view(*signs.shape, RUN)
        negative = tables.signs.index_select(0, signs.reshape(-1)).view(digits.shape) < 0
        return torch.where(negative, half - 1 - digits, half + digits).flatten(-2)

    def packed_values(self, packed: Tensor, size: int) -> tuple[Tensor, float]:
        """Unpack the levels of rows of `size` codes, as `torch.int8`."""
        tables, (indices, signs) = self.tables(packed.device), self._unpacked(packed, size)
        levels = tables.magnitudes.index_select(0, indices.reshape(-1)).view(*signs.shape, RUN)
        signed = levels * tables.signs.index_select(0, signs.reshape(-1)).view(levels.shape)
        return signed.flatten(-2), 1.0

    def _unpacked(self, packed: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """Unpack indices, shape `(..., in / length)`, and signs, shape `(..., in / RUN)`."""
        number: Tensor | None = None
        start = 0
        for k, width in enumerate(self._widths):
            length = packed_bytes(size // RUN, width)
            plane = unpack(packed[..., start : start + length], width, size // RUN).to(torch.int32) << 8 * k
            number = plane if number is None else number | plane
            start += length
        assert number is not None
        count = RUN // self.length
        each = [number >> k * self.index_bits & 2**self.index_bits - 1 for k in range(count)]
        signs = number >> count * self.index_bits & 2**self.sign_bits - 1
        return torch.stack(each, -1).flatten(-2) if count > 1 else each[0], signs


@lru_cache(maxsize=64)
def _tables(codebook: Codebook, device: torch.device) -> _Tables:
    with torch.inference_mode(False):
        count, length = len(codebook.magnitudes), codebook.length
        known = np.frombuffer(zlib.decompress(base64.b85decode(codebook.cells)), np.uint8)
        cells = torch.from_numpy(np.unpackbits(known)[: count**length].nonzero()[0])
        powers = count ** torch.arange(length)
        digits = torch.arange(count**length)[:, None] // powers % count
        inverse = torch.full((count**length,), -1, dtype=torch.int32)
        inverse[cells] = torch.arange(len(cells), dtype=torch.int32)
        magnitudes = torch.tensor(codebook.magnitudes, dtype=torch.float32)
        every = magnitudes[digits]
        points, values = digits[cells].to(torch.uint8), every[cells]
        near = values[torch.cdist(every, values).topk(_COMPARED * length, largest=False).indices]
        bits = torch.arange(2**RUN)[:, None] >> torch.arange(RUN) & 1
        if codebook.even:
            bits[:, -1] = bits[:, :-1].sum(1) % 2
        signs = (1 - 2 * bits).to(torch.int8)
        tables = (points, inverse, near, values.to(torch.int8), signs)
        return _Tables(*(x.to(device) for x in tables))


def _bases(count: int, length: int, like: Tensor) -> Tensor:
    """Return the powers of `count` that belong to the digits of a cell, in the dtype of `like`."""
    return torch.tensor([count**k for k in range(length)], dtype=like.dtype, device=like.device)


#: Codebooks by the names of their formats, in order of decreasing size.
CODEBOOKS = {
    "iq3_s": Codebook(
        tuple(range(1, 16, 2)),
        4,
        False,
        "c-k#dK}rKb5Ud?m7(7iN59ovqtiR~U2pdlmS^v`sIn3TR;sZue5Z@6$Amj-`@D=vV+J}a&>aMEU{rNq)_mDQ1)6rXa`g-zl6)-"
        "xV9&D<-%sLtw(&E+K!8jAZAn=FIh`{BX?s3iZ9eL!0y{saQwa{i<M_rV8i?Gza!ZNf5Tx$=B>&%}&x2aFnb2>I1DZfG3@eJJ?w"
        "}Hf9jj>U<u}qaX$V(Q{%bJZi0qBwX8+P2=0D&xpG^*kpx3aC_+^woo1gDy;frCMb5s>PfCelExhl@Z5=M_J&lZwQK<TIaOt1Nd"
        "_t_Z4Nkqr(Irw~QLK*sjOloy2EUU#sN3YKfvLC9pG+yhGG#kO><KBF1{I~{B$E!8AqIlE}-BNQAl`R33C|JNFjj93D(#a!oZud"
        "m_a(c~OHe<Yb)Y4R?AVbTWv01QA~hX",
    ),
    "iq3_xxs": Codebook(
        (4, 12, 20, 28, 36, 44, 52, 62),
        4,
        True,
        "c-l=-K?=h#3{ye}VW$qZd!FLL9+1HvWO^EVh1sdkoaHp#R7#szmgHo6m{j1}>~2z^o7e*jro|>W6f;suxGq5ThwwrH-tdy3S=*"
        "8VCKknJ;ww~xN=C-Lt2kc1f`n?I#<sN&{qc;xi`rsIog^>xCi>0vO72GEj+P?`#G30*;dkafo0(MD70~26E5oy)Fh-PS2J_iYx"
        "E!Gh>5A3e2Aw8l#Lz*UZ2xyz&!sE!Xy7=t?heopubnm$;UMyR4j1Wf!f;*xLWT6+u!rw*Hy!tqyDZ17JdzPtf@!~_J7yrh&WtZ"
        "i",
    ),
    "iq2_s": Codebook(
        (8, 25, 43),
        8,
        False,
        "c-n1JOKt@r42!agI0c#&;*=39#3>LflvCCTO#7-9jpk=;Y=fB%TefG%OIlXuE_Fz<Ougf=%xu>+l3Bq8hyjg~lMrunmZ<Wy`~Y"
        "GiEi#3On5vBd<vmKZSi%aW(psKWGWlAsphF>8rUC+;ZDfa(=s@_F#i0yss$-8fvv#Vf@jNV{kuiVLgA~66J1A2@4RVJKUxH}IH"
        "-$JpaZ^g})pmKjjd>lmojtPqGOJ!xqXVV(I)s3f1HneH&<4|id_Zsqi~d9|fZw$~1nHWO$bgs-@JBFei6qb36Asxo<#s4;BRhd"
        "~d<sfnbhG0<$t^)oE$@gK%zO1xyELVB%s1k`FAKZeJ@WjCtPZ6s4%XC=!ChZ<C{I5t%jB|RQ$q0^0H^%ZVVCdNfJ9HPfzZdmWS"
        "rg_I({bPgptf%^rJMcpz`hTS7u<>s9rVvW-WSa`T|j+oGk",
    ),
    "iq2_xs": Codebook(
        (8, 25, 43),
        8,
        True,
        "c-mc2ORj`4470L|dWwh@;*?QWh*MOoP)|Aew9xme83;|{*iP^L>UVu^J$f&9<)%0;rYcZH@zkTcz*1-`0#F4vd)cqIa~EY0S(m"
        "36us~sl4e+uqnt+xnD5p1ifdk&k2^cqyDKl&hVwLuN#<u{Y#82-D2r2AS*#~B;6>b%zZ?$An2Qav5OyP;?IjC1*OUa>YNXBOJs"
        "!l*N%2M9ag1pZ#qbS<pDODX)Ys@FiGwcn?g7z}ZUJ85J?WuXe7)kq!xj_MC=sehbo`f6hw91-EjVApg;SBK(#S-ctqy5bslAAu"
        "_xaBeODLPcR%XL4jpOCvsj1dP@iIwgyVBr<uBI!nKMuUZZ1qQNNP<bV}FGN4KvRv{ky>(2~*Gt;x6q$P={6Cb#@3Dfxx_wWh`v"
        "Wo0U*P",
    ),
    "iq2_xxs": Codebook(
        (8, 25, 43),
        8,
        True,
        "c-nPRORj`4470MbdWwiuj~R8vF<3s$DPNNQV8mEdDvh1mfzMz4@MsNM4-kL~Dg?0u3Z<Q}s#5&i%a^YL7=qILyw)W4Cso8iRnl"
        "pCLd`c4Du;C<RlH?aajd+e<FY7)k8>WSTt@47wX1jPqB41q=2e+&9hy;#r#nzQ(d`wV2I-N(E<X_7hks$x7)Do8!;TEvZcdv+$"
        ";Bf*s-;99+U-&7)=?KnsoS&M%ZZjW8ztGaG<oin^)>q~!#84@<5Q?C;cAe-jqH$lW6s<jvF<nQc*Z$~yKl@H%B$)D{-`Y{-_v~"
        "Aze0c0{sHUUCpi",
    ),
}
