"""Convert operators, states and networks to and from quimb, and operators to and from TensorLy.

Both libraries store the same cores; quimb orders the indices differently and omits the end bonds. Neither
supports padding, so padding becomes a part of the converted operator; `MPO` sets it to zero first.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tensornet._util import import_optional
from tensornet.errors import ShapeError
from tensornet.topology import CoreSpec, Topology


def to_quimb(cores: Sequence[Tensor]) -> Any:
    """Convert cores to a quimb `MatrixProductOperator` with out-legs `k0, k1, ...` and in-legs `b0, b1, ...`.

    If all in-legs have size 1, the result is a `MatrixProductState`. The arrays are NumPy copies of the
    cores; bfloat16 is converted to float32. If out- and in-legs differ in size, pass the names of the
    out-legs and of the in-legs to quimb's `to_dense`.
    """
    quimb = import_optional("quimb.tensor", extra="interop", user="to_quimb")
    arrays = [
        _array(core).transpose(0, 3, 1, 2) for core in cores
    ]  # quimb's axis order: left bond, right bond, out-leg, in-leg
    if len(arrays) == 1:
        arrays = [arrays[0][0, 0]]
    else:
        arrays[0], arrays[-1] = arrays[0][0], arrays[-1][:, 0]
    if all(core.shape[2] == 1 for core in cores):
        return quimb.MatrixProductState([array[..., 0] for array in arrays], shape="lrp", site_ind_id="k{}")
    return quimb.MatrixProductOperator(arrays, shape="lrud", upper_ind_id="k{}", lower_ind_id="b{}")


def from_quimb(operator: Any) -> tuple[Tensor, ...]:
    """Extract the cores of a quimb `MatrixProductOperator` or `MatrixProductState` with open ends.

    NumPy arrays are copied. The in-legs of a state have size 1.

    quimb can keep a power of ten apart from its tensors, in `exponent`. It is distributed over all cores.

    Raises:
        ShapeError: the argument is no operator or state of quimb, is cyclic, or has sites without a tensor.
    """
    is_state = hasattr(operator, "site_ind")
    if not hasattr(operator, "cyclic") or not (is_state or hasattr(operator, "lower_ind")):
        raise ShapeError(
            "Expected a quimb MatrixProductOperator or MatrixProductState, got "
            f"{type(operator).__name__}; for other networks there is TensorNetwork.from_quimb."
        )
    if operator.cyclic:
        raise ShapeError("A cyclic quimb operator is not an open chain; use the topology 'tensor_ring'.")
    if missing := [site for site in range(operator.L) if operator.site_tag(site) not in operator.tags]:
        raise ShapeError(
            f"The quimb operator has no tensor at site {missing[0]}; call its fill_empty_sites first."
        )
    cores = []
    for site in range(operator.L):
        tensor = operator[site]
        legs = (
            (operator.site_ind(site),) if is_state else (operator.upper_ind(site), operator.lower_ind(site))
        )
        bonds = [
            *((operator.bond(site - 1, site),) if site > 0 else ()),
            *((operator.bond(site, site + 1),) if site < operator.L - 1 else ()),
        ]
        order = [*bonds[: 1 if site > 0 else 0], *legs, *bonds[1 if site > 0 else 0 :]]
        data = tensor.transpose(*order).data
        data = _tensor(data)
        data = data.unsqueeze(-2 if site < operator.L - 1 else -1) if is_state else data
        data = data if site > 0 else data.unsqueeze(0)
        cores.append(data if site < operator.L - 1 else data.unsqueeze(-1))
    return _with_exponent(cores, operator)


def network_to_quimb(topology: Topology, cores: Sequence[Tensor]) -> Any:
    """Convert a network to a quimb `TensorNetwork`; see `TensorNetwork.to_quimb`."""
    quimb = import_optional("quimb.tensor", extra="interop", user="to_quimb")
    if topology.terms:
        raise ShapeError(
            f"A sum of networks such as {topology.family!r} is not one network of quimb; convert its terms."
        )
    tensors = [
        quimb.Tensor(_array(core), inds=spec.labels, tags=(spec.name,))
        for spec, core in zip(topology.cores, cores, strict=True)
    ]
    return quimb.TensorNetwork(tensors)


def network_from_quimb(
    network: Any, out_inds: Sequence[str], in_inds: Sequence[str]
) -> tuple[Topology, tuple[Tensor, ...]]:
    """Convert a quimb `TensorNetwork` to a topology and cores; see `TensorNetwork.from_quimb`."""
    if not all(hasattr(network, name) for name in ("tensors", "exponent", "ind_size")):
        raise ShapeError(f"Expected a quimb TensorNetwork, got {type(network).__name__}.")
    legs = (*out_inds, *in_inds)
    labels = dict.fromkeys(label for tensor in network.tensors for label in tensor.inds)
    if unknown := [label for label in legs if label not in labels]:
        raise ShapeError(f"The quimb network has no indices {unknown}; it has {list(labels)}.")
    # A topology sums over an index that only one core has, which changes nothing if its size is 1.
    if missing := [x for x in network.outer_inds() if x not in legs and network.ind_size(x) > 1]:
        raise ShapeError(
            f"The open indices {missing} of the quimb network must be in out_inds or in_inds, got "
            f"{list(out_inds)} and {list(in_inds)}."
        )
    sizes = {label: int(network.ind_size(label)) for label in labels}
    topology = Topology(
        family="quimb",
        cores=tuple(CoreSpec(str(k), tuple(tensor.inds)) for k, tensor in enumerate(network.tensors)),
        sizes=tuple(sizes.items()),
        out_labels=tuple(out_inds),
        in_labels=tuple(in_inds),
        out_features=math.prod(sizes[label] for label in out_inds),
        in_features=math.prod(sizes[label] for label in in_inds),
    )
    return topology, _with_exponent([_tensor(tensor.data) for tensor in network.tensors], network)


def _array(core: Tensor) -> Any:
    core = core.float() if core.dtype == torch.bfloat16 else core
    return core.detach().cpu().resolve_conj().resolve_neg().numpy().copy()


def _tensor(data: Any) -> Tensor:
    return data if isinstance(data, Tensor) else torch.from_numpy(np.array(data))  # copies read-only data


def _with_exponent(cores: Sequence[Tensor], network: Any) -> tuple[Tensor, ...]:
    """Distribute the power of ten that quimb keeps apart from its tensors."""
    exponent = float(network.exponent)
    return tuple(core * 10 ** (exponent / len(cores)) for core in cores) if exponent else tuple(cores)


def to_tensorly(cores: Sequence[Tensor]) -> Any:
    """Convert cores to a TensorLy `TTMatrix` of PyTorch tensors.

    Call `tensorly.set_backend("pytorch")` before you compute with the result.
    """
    tensorly = import_optional("tensorly.tt_matrix", extra="interop", user="to_tensorly")
    return tensorly.TTMatrix(list(cores))


def from_tensorly(operator: Any) -> tuple[Tensor, ...]:
    """Extract the cores of a TensorLy `TTMatrix`, a tltorch `BlockTT`, or a list of factors.

    Raises:
        ShapeError: the operator has another type.
    """
    if isinstance(operator, Tensor | str | bytes | dict) or not any(
        hasattr(operator, name) for name in ("factors", "__getitem__")
    ):
        raise ShapeError(f"Expected a TensorLy TTMatrix, got {type(operator).__name__}.")
    return tuple(torch.as_tensor(factor) for factor in getattr(operator, "factors", operator))
