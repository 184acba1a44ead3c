"""Convert matrix product operators to and from quimb and TensorLy.

Both libraries store the same cores; quimb orders the indices differently and omits the end bonds. Neither
supports padding, so padding becomes a part of the converted operator; `MPO` sets it to zero first.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tensornet._util import import_optional
from tensornet.errors import ShapeError


def to_quimb(cores: Sequence[Tensor]) -> Any:
    """Convert cores to a quimb `MatrixProductOperator` with out-legs `k0, k1, ...` and in-legs `b0, b1, ...`.

    The arrays are NumPy copies of the cores; bfloat16 is converted to float32. If out- and in-legs differ in
    size, pass the names of the out-legs and of the in-legs to quimb's `to_dense`.
    """
    quimb = import_optional("quimb.tensor", extra="interop", user="to_quimb")
    if cores[0].dtype == torch.bfloat16:
        cores = [core.float() for core in cores]
    arrays = [
        core.detach().cpu().resolve_conj().permute(0, 3, 1, 2).numpy().copy() for core in cores
    ]  # quimb's axis order: left bond, right bond, out-leg, in-leg
    if len(arrays) == 1:
        arrays = [arrays[0][0, 0]]
    else:
        arrays[0], arrays[-1] = arrays[0][0], arrays[-1][:, 0]
    return quimb.MatrixProductOperator(arrays, shape="lrud", upper_ind_id="k{}", lower_ind_id="b{}")


def from_quimb(operator: Any) -> tuple[Tensor, ...]:
    """Extract the cores of a quimb `MatrixProductOperator` with open ends; NumPy arrays are copied.

    quimb can keep a power of ten apart from its tensors, in `exponent`. It is distributed over all cores.

    Raises:
        ShapeError: the operator is not a `MatrixProductOperator`, is cyclic, or has sites without a tensor.
    """
    if not all(hasattr(operator, name) for name in ("cyclic", "upper_ind", "lower_ind")):
        raise ShapeError(f"Expected a quimb MatrixProductOperator, got {type(operator).__name__}.")
    if operator.cyclic:
        raise ShapeError("A cyclic quimb operator is not an open chain; use the topology 'tensor_ring'.")
    if missing := [site for site in range(operator.L) if operator.site_tag(site) not in operator.tags]:
        raise ShapeError(
            f"The quimb operator has no tensor at site {missing[0]}; call its fill_empty_sites first."
        )
    cores = []
    for site in range(operator.L):
        tensor = operator[site]
        legs = (operator.upper_ind(site), operator.lower_ind(site))
        bonds = [
            *((operator.bond(site - 1, site),) if site > 0 else ()),
            *((operator.bond(site, site + 1),) if site < operator.L - 1 else ()),
        ]
        order = [*bonds[: 1 if site > 0 else 0], *legs, *bonds[1 if site > 0 else 0 :]]
        data = tensor.transpose(*order).data
        data = data if isinstance(data, Tensor) else torch.from_numpy(np.array(data))  # copies read-only data
        data = data if site > 0 else data.unsqueeze(0)
        cores.append(data if site < operator.L - 1 else data.unsqueeze(-1))
    exponent = float(operator.exponent)
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
