"""The words for the argument `share` of mixtures, banks and specialists, and the cores that each word names.

Each word says which cores of the matrices `W_e` are the same for all experts `e`. In a chain, the first core
writes the outputs, and the last core reads the inputs.

| `share` | matrix | what is shared |
|---|---|---|
| `"none"` | `W_e` | nothing |
| `"in"` | `W_e = A_e B` | the last core of a chain, which projects the inputs |
| `"out"` | `W_e = A B_e` | the first core of a chain, a basis of the outputs |
| `"ends"` | `W_e = A S_e B` | the first and the last core |
| `"center"` | `W_e = A_e S B_e` | the core with the most parameters, as in MPOE (Gao et al. 2022) |
| `"base"` | `W_e = W_0 + A_e B_e` | the matrix `W_0`, with all of its cores |
"""

from collections.abc import Sequence
from typing import Literal

from tensornet.errors import ShapeError, TopologyError
from tensornet.topologies import mpo
from tensornet.topology import Topology

Share = Literal["none", "in", "out", "ends", "center", "base"]
SHARES = ("none", "in", "out", "ends", "center", "base")

#: Largest leg (mode size) of the first and last core in `center_chain`. With 64, rebuilding a matrix costs at
#: most as much as multiplying `64 + 64` tokens by it.
_LONGEST_END = 64


def check_share(share: object, known: Sequence[str] = SHARES, *, instead: str = "") -> None:
    """Raise ValueError unless `share` is one of the known words.

    Args:
        share: what the caller gave.
        known: the words of `SHARES` that the function supports.
        instead: a sentence that says how to share something else.
    """
    if share not in known:
        raise ValueError(f"Unknown share={share!r}; choose one of {', '.join(known)}. {instead}".rstrip())


def shared_cores(topology: Topology, share: str | Sequence[str]) -> tuple[str, ...]:
    """Return the names of the shared cores, in the order of the topology.

    Args:
        topology: topology of the matrix of one expert.
        share: a word of `SHARES`, or a sequence of core names.

    Raises:
        ValueError: an unknown word.
        TopologyError: an unknown core name, or the topology is a sum of networks.
    """
    names = topology.core_names
    if topology.terms:
        raise TopologyError(
            f"Experts that share cores must be single networks, but {topology.family!r} is a sum; use 'mpo', "
            "'low_rank' or another family. Its cores may be stored in number formats, too."
        )
    if isinstance(share, str):
        check_share(share, instead=f"Or give a list of cores, such as [{names[0]!r}], of {', '.join(names)}.")
        words: dict[str, Sequence[str]] = {
            "none": (),
            "in": names[-1:],
            "out": names[:1],
            "ends": (names[0], names[-1]),
            "center": (topology.central_core,),
            "base": names,
        }
        share = words[share]
    if unknown := [name for name in share if name not in names]:
        raise TopologyError(f"No core is named {unknown}; the topology has {', '.join(names)}.")
    return tuple(name for name in names if name in share)


def center_chain(out_features: int, in_features: int, *, max_bond: int | None = None) -> Topology:
    """Return the chain of three cores whose middle core `"1"` is shared with `share="center"`.

    The first core has a leg only for rows, and the last core only for columns. Cores with legs for both train
    equally well. But a matrix that is built from them must be copied to bring its rows and columns into
    order, which makes a training step a third slower.

    Args:
        out_features, in_features: shape of the matrix.
        max_bond: largest size of the bonds; full bonds if absent.

    Raises:
        ShapeError: a side has no divisor that can be a leg.
    """
    first, last = end_leg(out_features), end_leg(in_features)
    if first == 1 or last == 1:
        raise ShapeError(
            f"A matrix of shape {out_features} x {in_features} has no legs for a shared center: each side "
            f"needs a factor in 2..{_LONGEST_END}. Choose sizes with small factors, or another share=."
        )
    outs, ins = (first, out_features // first, 1), (1, in_features // last, last)
    return mpo(out_dims=outs, in_dims=ins, max_bond=max_bond)


def end_leg(size: int) -> int:
    """Choose the size of the leg of the first or last core.

    It is the largest divisor of `size` that is at most 64 and at most four times the leg of the middle core.
    """
    return max(a for a in range(1, _LONGEST_END + 1) if size % a == 0 and a * a <= 4 * size)
