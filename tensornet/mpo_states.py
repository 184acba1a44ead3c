"""Compute entries, expectation values, entropies, samples and partial traces of chains.

All functions take cores `(left, out, in, right)`, as `tensornet.mpo_algebra` does, and build no matrix. A
state (MPS) is a chain whose in-legs have size 1.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from tensornet._util import outside_autocast
from tensornet.errors import ShapeError
from tensornet.linalg.svd import result_dtype, working_dtype
from tensornet.mpo_algebra import (
    Cores,
    bond_entropy,
    canonicalize,
    needs_gradient,
    tamed,
    times_power_of_two,
)


@outside_autocast
def entries(cores: Sequence[Tensor], rows: Sequence[Tensor], columns: Sequence[Tensor]) -> Tensor:
    """Compute single elements of the matrix, differentiably.

    Args:
        cores: the chain.
        rows: for each site, the digits of the row indices, integer tensors that can be broadcast.
        columns: the digits of the column indices.
    """
    dtype = result_dtype(cores[0].dtype)
    exponent: Tensor | float = 0.0
    vectors = torch.ones(1, 1, dtype=dtype, device=cores[0].device)
    for core, row, column in zip(cores, rows, columns, strict=True):
        chosen = core.to(dtype).permute(1, 2, 0, 3)[row, column]  # shape: (*batch, left, right)
        vectors, more = tamed(vectors @ chosen)  # shape: (*batch, 1, right)
        exponent = exponent + more
    return times_power_of_two(vectors[..., 0, 0], exponent)


@outside_autocast
def expectation(state: Sequence[Tensor], operator: Sequence[Tensor]) -> Tensor:
    """Compute `<state| operator |state> / <state|state>` differentiably; its parts cannot overflow."""
    dtype = result_dtype(torch.promote_types(state[0].dtype, operator[0].dtype))
    sandwich = torch.ones(1, 1, 1, dtype=dtype, device=state[0].device)  # bonds: bra, operator, ket
    overlap = torch.ones(1, 1, dtype=dtype, device=state[0].device)
    exponent: Tensor | float = 0.0
    for core, middle in zip(state, operator, strict=True):
        (ket, _), (middle, of_middle) = tamed(core.to(dtype)), tamed(middle.to(dtype))
        (_, o, i, d), (w, p, _, v) = ket.shape, middle.shape
        a, bra = len(overlap), ket.flatten(0, 2).mH  # shape: (bond, bond * out * in)
        half = (sandwich.flatten(0, 1) @ ket.flatten(1)).reshape(a, w, o, i, d).permute(0, 3, 4, 1, 2)
        half = half.reshape(-1, w * o) @ middle.transpose(1, 2).reshape(w * o, -1)
        half = half.reshape(a, i, d, p, v).permute(0, 3, 1, 4, 2).reshape(a * p * i, -1)
        sandwich, more = tamed((bra @ half).reshape(-1, v, d))
        overlap, less = tamed(bra @ (overlap @ ket.flatten(1)).reshape(-1, d))
        exponent = exponent + of_middle + more - less
    return times_power_of_two(sandwich[0, 0, 0] / overlap[0, 0], exponent)


@outside_autocast
def entropies(cores: Sequence[Tensor]) -> Tensor:
    """Compute the entropy at every bond in nats, in one sweep, or differentiably bond by bond."""
    if needs_gradient(cores):
        found = [bond_entropy(cores, bond) for bond in range(len(cores) - 1)]
        return torch.stack(found) if found else cores[0].new_zeros(0, dtype=torch.float64)
    work = list(canonicalize([core.to(working_dtype(core.dtype)) for core in cores], 0))
    found = []
    for k in range(len(work) - 1):
        _, S, Vh = torch.linalg.svd(work[k].flatten(0, 2), full_matrices=False)
        work[k + 1] = torch.tensordot(S.to(Vh.dtype)[:, None] * Vh, work[k + 1], dims=1)
        energies = S.square()
        p = energies / energies.sum() if float(energies.sum()) > 0 else energies
        found.append(torch.special.entr(p).sum().abs())  # `abs` turns -0 into 0
    return torch.stack(found) if found else torch.zeros(0, dtype=torch.float64, device=cores[0].device)


@outside_autocast
@torch.no_grad()
def sample(cores: Sequence[Tensor], count: int, generator: torch.Generator | None) -> Tensor:
    """Draw basis states with the probabilities `|amplitude|^2 / norm^2`; see `MPO.sample`.

    The chain is made right-orthonormal. The probability of the digits so far is then the squared norm of the
    vector that these digits leave at the bond, so each site needs one product.

    Reference:
        Ferris and Vidal 2012, "Perfect sampling with unitary tensor networks".
    """
    work = list(canonicalize([core.to(working_dtype(core.dtype)) for core in cores], 0))
    if float(torch.linalg.vector_norm(work[0])) == 0:
        raise ValueError("The zero state has no probabilities to sample from.")
    vectors = work[0].new_ones(count, 1)
    everyone = torch.arange(count, device=vectors.device)
    digits = []
    for core in work:
        parts = torch.einsum("na,aob->nob", vectors, core[:, :, 0])
        weights = parts.abs().square().sum(dim=2)  # shape: (count, out)
        digit = torch.multinomial(weights / weights.amax(dim=1, keepdim=True), 1, generator=generator)[:, 0]
        vectors = parts[everyone, digit]
        vectors = vectors / torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
        digits.append(digit)
    return torch.stack(digits, dim=1)


@outside_autocast
def partial_trace(cores: Sequence[Tensor], keep: Sequence[int]) -> Cores:
    """Trace out all sites of an operator except `keep`; the chain gets one core for each kept site."""
    kept: list[Tensor] = []
    pending: Tensor | None = None  # the product of the traced sites before the first kept site
    for k, core in enumerate(cores):
        if k in keep:
            kept.append(core if pending is None else torch.tensordot(pending, core, dims=1))
            pending = None
            continue
        traced = core.diagonal(dim1=1, dim2=2).sum(dim=2)  # shape: (left, right)
        if kept:
            kept[-1] = torch.tensordot(kept[-1], traced, dims=1)
        else:
            pending = traced if pending is None else pending @ traced
    return tuple(kept)


@outside_autocast
def reduced_state(cores: Sequence[Tensor], keep: Sequence[int]) -> Cores:
    """Compute `tr |state><state|` over all sites except `keep`; bonds are squares of the bonds of the state.

    The two layers are contracted one after the other, so a traced site costs a power of the bond less than in
    `partial_trace` of the density matrix.
    """
    like = cores[0]
    pending: Tensor | None = torch.ones(1, 1, 1, dtype=like.dtype, device=like.device)
    kept: list[Tensor] = []  # shape: (fused left bond, out, in, bond of the ket, bond of the bra)
    for k, core in enumerate(cores):
        ket = core[:, :, 0]
        bra = ket.conj()
        if k not in keep:
            if pending is not None:
                pending = torch.einsum("fac,aob,cod->fbd", pending, ket, bra)
            else:
                kept[-1] = torch.einsum("foiac,axb->foixbc", kept[-1], ket).flatten(3, 3)
                kept[-1] = torch.einsum("foixbc,cxd->foibd", kept[-1], bra)
            continue
        if pending is None:
            bonds = core.shape[0]
            pending = torch.eye(bonds * bonds, dtype=like.dtype, device=like.device)
            pending = pending.reshape(bonds * bonds, bonds, bonds)
        kept.append(torch.einsum("fac,aob,cid->foibd", pending, ket, bra))
        pending = None
    return tuple(core.flatten(3) for core in kept)


def digits_of(value: object, size: int, dims: Sequence[int], name: str) -> list[Tensor]:
    """Write one index, or an integer tensor of indices, in mixed radix: one tensor of digits per site.

    Raises:
        IndexError: an index is out of range.
        ShapeError: the value is neither an integer nor integers.
    """
    if isinstance(value, slice) or value is None or value is Ellipsis:
        raise ShapeError(
            f"H[row, column] takes an integer or a tensor of integers as its {name}, got {value!r}; build "
            "rows with `basis_vector @ H`, and core k is H.cores[k]."
        )
    if isinstance(value, int) and not isinstance(value, bool):  # may exceed 64 bits
        if not -size <= value < size:
            raise IndexError(f"The {name} {value} is out of range; there are {size}.")
        rest: int | Tensor = value % size
    else:
        rest = torch.as_tensor(value)
        if rest.is_floating_point() or rest.is_complex() or rest.dtype == torch.bool:
            raise ShapeError(f"The {name} of an entry must be an integer or integers, got {rest.dtype}.")
        rest = rest.long()
        if rest.numel() and not (-size <= int(rest.min()) and int(rest.max()) < size):
            raise IndexError(f"A {name} in [{rest.min()}, {rest.max()}] is out of range; there are {size}.")
        rest = torch.where(rest < 0, rest + min(size, 2**63 - 1), rest)
    digits = []
    for dim in reversed(dims):
        digits.append(torch.as_tensor(rest % dim))
        rest = rest // dim
    return digits[::-1]


def diagram(cores: Sequence[Tensor], width: int = 100) -> str:
    """Draw a chain as text: a disc for each core with the sizes of its legs and bonds; legs of 1 are omitted.

    A chain wider than `width` continues in further rows.
    """
    blocks: list[list[str]] = [["", "", "", "", ""]]
    for k, core in enumerate(cores):
        _, out, in_, right = core.shape
        out_leg, in_leg = (str(size) if size > 1 else "" for size in (out, in_))
        room = max(len(out_leg), len(in_leg), 1)
        bond = f"─{right}─" if k < len(cores) - 1 else ""
        column = [
            out_leg.ljust(room),
            ("│" if out_leg else "").ljust(room),
            "●" + "─" * (room - 1 if bond else 0),
            ("│" if in_leg else "").ljust(room),
            in_leg.ljust(room),
        ]
        if blocks[-1][2] and len(blocks[-1][2]) + room + len(bond) > width:
            blocks.append(["", "", "", "", ""])
        block = blocks[-1]
        for line, part in enumerate(column):
            block[line] += part + (bond if line == 2 else " " * len(bond))
    drawn = [[line.rstrip() for line in block] for block in blocks]
    return "\n\n".join("\n".join(line for line in block if line) for block in drawn)
