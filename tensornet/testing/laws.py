"""Laws that decompositions and networks must satisfy, as functions to call and test classes to subclass.

Each law is a function `check_...` that raises `AssertionError` if an example violates the law. The classes at
the end of this module draw examples with hypothesis and call these functions. Subclass one of these classes
and define how your decomposition is called; pytest then runs all laws of the class.

A decomposition is a function `(matrix, budget) -> Outcome`.
"""

import copy
import json
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from hypothesis import currently_in_test_context, given, reject, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import Tensor, nn

from tensornet.budget import Budget
from tensornet.calibration.blockwise import calibrate
from tensornet.calibration.stats import CalibrationStats
from tensornet.compression.apply import apply_plan, decompress
from tensornet.compression.compress import compress
from tensornet.compression.config import CompressionConfig, Method
from tensornet.compression.plan import LayerPlan
from tensornet.compression.planning import plan
from tensornet.compression.serialization import load_model, save_model
from tensornet.errors import BudgetError, NonFiniteError
from tensornet.linalg.svd import result_dtype
from tensornet.mpo import MPO
from tensornet.network import TensorNetwork
from tensornet.nn.layer_kinds import kind_of, layer_bias
from tensornet.nn.module import NetworkModule, build_module, module_spec
from tensornet.quantization import NumberFormat, round_weight
from tensornet.testing import reference, strategies
from tensornet.topologies import Decomposition, TopologyFamily, low_rank, registered
from tensornet.topology import Topology


@dataclass(frozen=True)
class Outcome:
    """Result of the decomposition under test, in the form that the laws need.

    Args:
        matrix: dense matrix of the result, of the same shape as the input.
        error: certified upper bound of the relative Frobenius error.
        params: number of stored elements; None if `param_ratio` is not supported. It must be the number of
            elements of `tensors`, if these are given, and the number of parameters of `topology`.
        bonds: bond sizes.
        tensors: stored tensors, whose dtype and device are checked.
        topology: topology of the result, for `check_quality`. If absent, a result with one bond is compared
            with the best product of two factors, `(out, rank)` and `(rank, in)`. A result with several bonds
            must only have a smaller error than the zero matrix.

    Example:
        >>> from tensornet.testing import laws
        >>> outcome = laws.Outcome.of(tn.decompose(torch.randn(6, 4), "low_rank", max_bond=2))
        >>> outcome.matrix.shape, outcome.params, outcome.bonds
        (torch.Size([6, 4]), 20, (1, 2, 1))
    """

    matrix: Tensor
    error: float
    params: int | None = None
    bonds: tuple[int, ...] = ()
    tensors: tuple[Tensor, ...] = ()
    topology: Topology | None = None

    @classmethod
    def of(cls, result: Decomposition | MPO) -> "Outcome":
        """Make the outcome from a `Decomposition` or an `MPO` of this library."""
        network = result.network
        return cls(
            matrix=network.to_matrix(),
            error=result.error,
            params=network.num_params,
            bonds=tuple(network.topology.bond_dims.values()),
            tensors=network.cores,
            topology=network.topology,
        )


Decompose = Callable[[Tensor, Budget], Outcome]

#: Largest ratio of a certificate to the true error that `check_tight` allows for up to four bonds.
LOOSEST = 2.0
#: Number of examples for `check_name_does_not_matter`; few, since this law is slow to check.
_RENAMED = 2


def tolerance(dtype: torch.dtype) -> float:
    """Return the relative rounding error that the laws allow: 300 times the machine epsilon of a dtype.

    Example:
        >>> from tensornet.testing import laws
        >>> laws.tolerance(torch.float64) < 1e-12 < laws.tolerance(torch.float32)
        True
    """
    return 300 * torch.finfo(result_dtype(dtype)).eps


# --- decompositions ------------------------------------------------------------------------------


def check_exact(decompose: Decompose, matrix: Tensor) -> None:
    """Check that without a budget, neither the true nor the certified error exceeds `tolerance(dtype)`.

    Example:
        >>> from tensornet.testing import laws
        >>> def decompose(matrix, budget):
        ...     return laws.Outcome.of(tn.decompose(matrix, "low_rank", max_bond=budget.max_bond))
        >>> laws.check_exact(decompose, torch.randn(6, 4))
    """
    outcome = decompose(matrix, Budget())
    error = _true_error(matrix, outcome)
    assert error <= tolerance(matrix.dtype), f"relative error {error:.3g} without a budget"
    assert outcome.error <= tolerance(matrix.dtype), f"certificate {outcome.error:.3g} without a budget"


def check_certificate(decompose: Decompose, matrix: Tensor, budget: Budget) -> None:
    """Check that the certified error is at least the true error and at most `rel_error`.

    If the other limits of the budget do not allow an error of `rel_error`, a decomposition must raise
    `BudgetError`. See `check_tight` for certificates that are larger than necessary.

    Example:
        >>> from tensornet.testing import laws
        >>> def decompose(matrix, budget):
        ...     return laws.Outcome.of(tn.decompose(matrix, "low_rank", rel_error=budget.rel_error))
        >>> laws.check_certificate(decompose, torch.randn(6, 4), tn.topologies.Budget(rel_error=0.3))
    """
    outcome, budget = _within(decompose, matrix, budget)
    error = _true_error(matrix, outcome)
    slack = tolerance(matrix.dtype)
    assert error <= outcome.error * (1 + 1e-5) + slack, (
        f"true error {error:.6g} exceeds the certificate {outcome.error:.6g} under {budget}"
    )
    assert outcome.error >= 0, f"certificate {outcome.error} is not a number of at least 0"
    assert budget.rel_error is None or outcome.error <= budget.rel_error + slack, (
        f"certificate {outcome.error:.6g} exceeds rel_error under {budget}; raise BudgetError if the other "
        "limits do not allow this error"
    )


def check_tight(decompose: Decompose, matrix: Tensor, budget: Budget, factor: float | None = None) -> None:
    """Check that the certified error is at most `factor` times the true error, up to rounding errors.

    The default is the square root of the number of bonds, at least 2: each bond has at most the true error,
    and the certificate is the root of the sum of their squares.

    Errors in the padding of `Outcome.topology` count as true errors, since certificates include them.

    Example:
        >>> from tensornet.testing import laws
        >>> def decompose(matrix, budget):
        ...     return laws.Outcome.of(tn.decompose(matrix, "low_rank", max_bond=budget.max_bond))
        >>> laws.check_tight(decompose, torch.randn(6, 4), tn.topologies.Budget(max_bond=2))
    """
    outcome, budget = _within(decompose, matrix, budget)
    if factor is None:
        factor = max(LOOSEST, math.sqrt(len(outcome.bonds)))
    error, topology = _true_error(matrix, outcome), outcome.topology
    if topology is not None and not topology.terms and topology.padded_shape != topology.shape:
        rows, columns = topology.padded_shape
        padded = np.zeros((rows, columns), dtype=reference.to_numpy(matrix).dtype)
        padded[: matrix.shape[0], : matrix.shape[1]] = reference.to_numpy(matrix)
        whole = replace(topology, out_features=rows, in_features=columns)
        error = reference.relative_error(padded, reference.network_matrix(whole, outcome.tensors))
    assert outcome.error <= factor * error + tolerance(matrix.dtype), (
        f"the certificate {outcome.error:.6g} is more than {factor:g} times the true error {error:.6g} "
        f"under {budget}; a looser bound is useless, but legal: set test_tight = None"
    )


def check_caps(decompose: Decompose, matrix: Tensor, budget: Budget) -> None:
    """Check that bonds are at most `max_bond`, and that parameters are within `param_ratio`.

    The number of parameters must also be that of the stored tensors and of the topology, if these are given.

    Example:
        >>> from tensornet.testing import laws
        >>> def decompose(matrix, budget):
        ...     return laws.Outcome.of(tn.decompose(matrix, "low_rank", max_bond=budget.max_bond))
        >>> laws.check_caps(decompose, torch.randn(6, 4), tn.topologies.Budget(max_bond=2))
    """
    outcome, budget = _within(decompose, matrix, budget)
    if budget.max_bond is not None:
        caps = budget.max_bond
        bonds = outcome.bonds
        if isinstance(caps, Sequence) and len(bonds) == len(caps) + 2:
            bonds = bonds[1:-1]  # drop the outer bonds of an open chain
        each = caps if isinstance(caps, Sequence) else [caps] * len(bonds)
        over = [bond for bond, cap in zip(bonds, each, strict=True) if bond > cap]
        assert not over, f"bonds {outcome.bonds} under {budget}"
    stored = sum(tensor.numel() for tensor in outcome.tensors)
    for true, what in ((stored, "tensors"), (outcome.topology and outcome.topology.num_params, "topology")):
        assert outcome.params is None or not true or outcome.params == true, (
            f"{outcome.params} parameters are stated, but the {what} of the result have {true}"
        )
    if budget.param_ratio is not None and outcome.params is not None:
        allowed = budget.param_ratio * matrix.numel()
        assert outcome.params <= allowed, f"{outcome.params} parameters, {allowed:.1f} allowed by {budget}"


def check_monotone(decompose: Decompose, matrix: Tensor, caps: Sequence[int] = tuple(range(1, 9))) -> None:
    """Check that a larger `max_bond` never increases the certified or the true error.

    Example:
        >>> from tensornet.testing import laws
        >>> def decompose(matrix, budget):
        ...     return laws.Outcome.of(tn.decompose(matrix, "low_rank", max_bond=budget.max_bond))
        >>> laws.check_monotone(decompose, torch.randn(6, 4), caps=(1, 2, 4))
    """
    before: tuple[int, float, float] | None = None
    for cap in caps:
        outcome = decompose(matrix, Budget(max_bond=cap))
        error = _true_error(matrix, outcome)
        slack = tolerance(matrix.dtype)
        if before is not None:
            assert outcome.error <= before[1] + slack, (
                f"certificate {before[1]:.6g} at max_bond={before[0]}, but {outcome.error:.6g} at {cap}"
            )
            assert error <= before[2] + slack, (
                f"true error {before[2]:.6g} at max_bond={before[0]}, but {error:.6g} at {cap}"
            )
        before = (cap, outcome.error, error)


def check_quality(decompose: Decompose, matrix: Tensor, budget: Budget) -> None:
    """Check that the error is close to the best error that is possible with the same bonds.

    The true error must be at most the bound of `reference.error_bound`, plus one percent for iterative
    methods. For networks with loops no such bound is known; the error must then be smaller than that of the
    zero matrix.

    Example:
        >>> from tensornet.testing import laws
        >>> def decompose(matrix, budget):
        ...     return laws.Outcome.of(tn.decompose(matrix, "low_rank", max_bond=budget.max_bond))
        >>> laws.check_quality(decompose, torch.randn(6, 4), tn.topologies.Budget(max_bond=2))
    """
    outcome, budget = _within(decompose, matrix, budget)
    error, topology = _true_error(matrix, outcome), outcome.topology
    if topology is None and len(outcome.bonds) == 1:
        rank = min(outcome.bonds[0], *matrix.shape)
        topology = low_rank(out_features=matrix.shape[0], in_features=matrix.shape[1], rank=rank)
    bound = None if topology is None else reference.error_bound(matrix, topology)
    if bound is None and bool(matrix.any()):
        # Projecting onto the leading singular vectors of all unfoldings has at most this error.
        bound = math.sqrt(1 - 0.5 / matrix.numel())
        assert bool(outcome.matrix.any()), f"the result is the zero matrix under {budget}"
    assert error <= 1.01 * (bound or 0.0) + tolerance(matrix.dtype), (
        f"error {error:.6g} under {budget} with bonds {outcome.bonds}; truncated singular value "
        f"decompositions have {bound or 0.0:.6g}. If the bonds do not separate rows from columns, pass "
        "Outcome(topology=...)."
    )


def check_input_kept(decompose: Decompose, matrix: Tensor, budget: Budget) -> None:
    """Check that a decomposition does not change its input and returns no tensor that shares memory with it.

    Example:
        >>> from tensornet.testing import laws
        >>> def decompose(matrix, budget):
        ...     return laws.Outcome.of(tn.decompose(matrix, "low_rank", max_bond=budget.max_bond))
        >>> laws.check_input_kept(decompose, torch.randn(6, 4), tn.topologies.Budget(max_bond=2))
    """
    before = matrix.clone()
    outcome, _ = _within(decompose, matrix, budget)
    assert torch.equal(matrix, before), "the input was changed"
    for tensor in (outcome.matrix, *outcome.tensors):
        assert not _share_memory(tensor, matrix), "the result shares memory with the input"


def check_dtype_and_device(decompose: Decompose, matrix: Tensor, budget: Budget) -> None:
    """Check that stored tensors have the device and dtype of the input, or float32 for 16-bit inputs.

    Example:
        >>> from tensornet.testing import laws
        >>> def decompose(matrix, budget):
        ...     return laws.Outcome.of(tn.decompose(matrix, "low_rank", max_bond=budget.max_bond))
        >>> laws.check_dtype_and_device(decompose, torch.randn(6, 4).half(), tn.topologies.Budget(max_bond=2))
    """
    outcome, _ = _within(decompose, matrix, budget)
    for tensor in (outcome.matrix, *outcome.tensors):
        expected = (result_dtype(matrix.dtype), matrix.device)
        assert (tensor.dtype, tensor.device) == expected, (
            f"got {tensor.dtype} on {tensor.device}, expected {expected[0]} on {expected[1]}"
        )


def check_deterministic(decompose: Decompose, matrix: Tensor, budget: Budget) -> None:
    """Check that equal inputs give bit-identical matrices, certificates and tensors.

    Example:
        >>> from tensornet.testing import laws
        >>> def decompose(matrix, budget):
        ...     return laws.Outcome.of(tn.decompose(matrix, "low_rank", max_bond=budget.max_bond))
        >>> laws.check_deterministic(decompose, torch.randn(6, 4), tn.topologies.Budget(max_bond=2))
    """
    (first, _), (second, _) = _within(decompose, matrix, budget), _within(decompose, matrix, budget)
    assert float(first.error) == float(second.error), f"not reproducible: {first.error} and {second.error}"
    assert len(first.tensors) == len(second.tensors), "not reproducible: another number of tensors"
    pairs = zip((first.matrix, *first.tensors), (second.matrix, *second.tensors), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs), "not reproducible"


def check_refuses_non_finite(decompose: Decompose, matrix: Tensor, value: float) -> None:
    """Check that a matrix with NaN or infinity raises `NonFiniteError` with a message that is not empty.

    Example:
        >>> from tensornet.testing import laws
        >>> def decompose(matrix, budget):
        ...     return laws.Outcome.of(tn.decompose(matrix, "low_rank", max_bond=budget.max_bond))
        >>> laws.check_refuses_non_finite(decompose, torch.randn(6, 4), float("nan"))
    """
    broken = matrix.clone()
    broken[-1, 0] = value
    message = None
    try:
        decompose(broken, Budget(max_bond=1))
    except NonFiniteError as error:
        message = str(error)
    assert message is not None, f"a matrix with {value} was accepted; raise NonFiniteError"
    assert message.strip(), f"the error for a matrix with {value} has no message; say what was wrong"


def _within(decompose: Decompose, matrix: Tensor, budget: Budget) -> tuple[Outcome, Budget]:
    """Decompose within a budget; if the other limits do not allow its `rel_error`, drop this limit.

    In a hypothesis test, an example is skipped if the decomposition raises BudgetError both times.

    Returns:
        The outcome, and the budget that was used.
    """
    try:
        return decompose(matrix, budget), budget
    except BudgetError:
        rest = replace(budget, rel_error=None)
        if rest not in (budget, Budget()):
            return _within(decompose, matrix, rest)
        if currently_in_test_context():
            reject()
        raise


def _true_error(matrix: Tensor, outcome: Outcome) -> float:
    got = tuple(outcome.matrix.shape)
    assert got == matrix.shape, f"got {got} for {tuple(matrix.shape)}"  # NumPy would broadcast other shapes
    return reference.relative_error(matrix, outcome.matrix)


def _share_memory(one: Tensor, other: Tensor) -> bool:
    a, b = one.untyped_storage(), other.untyped_storage()
    first, last = max(a.data_ptr(), b.data_ptr()), min(a.data_ptr() + a.nbytes(), b.data_ptr() + b.nbytes())
    return one.device == other.device and first < last


# --- networks ------------------------------------------------------------------------------------


def check_matrix(network: TensorNetwork) -> None:
    """Check that `to_matrix` agrees with an explicit sum over all bonds.

    Example:
        >>> from tensornet.testing import laws
        >>> laws.check_matrix(tn.decompose(torch.randn(6, 4), "tucker", max_bond=2).network)
    """
    expected = reference.network_matrix(network.topology, network.cores)
    _assert_close(network, network.to_matrix(), expected, "the matrix")


def check_apply(network: TensorNetwork, batch: tuple[int, ...] = (3,)) -> None:
    """Check that `apply` multiplies the last dimension of an input of shape `(*batch, in)` by the matrix.

    Example:
        >>> from tensornet.testing import laws
        >>> laws.check_apply(tn.decompose(torch.randn(6, 4), "tucker", max_bond=2).network, batch=(2, 3))
    """
    core = network.cores[0]
    x = torch.randn(*batch, network.shape[1], dtype=core.dtype, device=core.device)
    y = network.apply(x)
    assert y.shape == (*batch, network.shape[0]), f"got {tuple(y.shape)}"
    expected = reference.to_numpy(x) @ reference.network_matrix(network.topology, network.cores).T
    _assert_close(network, y, expected, "the output")


def check_gradients(network: TensorNetwork, tokens: int = 3) -> None:
    """Check the gradients of the input and of all cores against those of the dense matrix (real dtypes only).

    Example:
        >>> from tensornet.testing import laws
        >>> laws.check_gradients(tn.decompose(torch.randn(6, 4), "tucker", max_bond=2).network)
    """
    cores = [core.detach().clone().requires_grad_() for core in network.cores]
    like: dict[str, Any] = {"dtype": cores[0].dtype, "device": cores[0].device}
    x = torch.randn(tokens, network.shape[1], requires_grad=True, **like)
    pull = torch.randn(tokens, network.shape[0], **like)
    TensorNetwork(network.topology, cores).apply(x).backward(pull)
    matrix = reference.network_matrix(network.topology, network.cores)
    assert x.grad is not None
    _assert_close(network, x.grad, reference.to_numpy(pull) @ matrix, "the gradient of the input")
    expected = reference.network_gradients(network.topology, network.cores, pull.mT @ x.detach())
    for name, core, gradient in zip(network.topology.core_names, cores, expected, strict=True):
        assert core.grad is not None, f"core {name!r} got no gradient"
        _assert_close(network, core.grad, gradient, f"the gradient of core {name!r}")


def _assert_close(network: TensorNetwork, actual: Tensor, expected: reference.Array, what: str) -> None:
    rounding = tolerance(network.cores[0].dtype)
    np.testing.assert_allclose(
        reference.to_numpy(actual),
        expected,
        rtol=rounding,
        atol=rounding * math.sqrt(network.shape[1]),
        err_msg=what,
    )


# --- chains --------------------------------------------------------------------------------------


def check_gauge(operator: MPO, bond: int, seed: int = 0) -> None:
    """Check that inserting `G` and `G^-1` at a bond preserves the matrix, its norm, and the bond spectrum.

    Example:
        >>> from tensornet.testing import laws
        >>> laws.check_gauge(tn.MPO.from_matrix(torch.randn(8, 8).double(), sites=3), bond=0)
    """
    left, right = operator.cores[bond], operator.cores[bond + 1]
    size = left.shape[3]
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(size, size, generator=generator, dtype=left.dtype, device="cpu").to(left.device)
    eye = torch.eye(size, dtype=left.dtype, device=left.device)
    gauge = 2 * eye + noise / torch.linalg.matrix_norm(noise, 2)  # condition number of at most 3
    cores = list(operator.cores)
    cores[bond] = left @ gauge
    cores[bond + 1] = torch.tensordot(torch.linalg.inv(gauge), right, dims=1)
    changed = MPO(cores, out_features=operator.shape[0], in_features=operator.shape[1])
    rounding = 100 * tolerance(left.dtype)
    size_of_it = float(operator.norm())
    assert reference.relative_error(operator.to_matrix(), changed.to_matrix()) <= rounding
    assert abs(float(changed.norm()) - size_of_it) <= rounding * max(size_of_it, 1)
    spectra = torch.stack([x.bond_spectrum(bond).double() for x in (operator, changed)])
    assert float((spectra[0] - spectra[1]).abs().max()) <= rounding * max(size_of_it, 1)


def check_canonical(operator: MPO, center: int) -> None:
    """Check that `canonicalize` preserves the operator and makes all cores but the center orthonormal.

    Example:
        >>> from tensornet.testing import laws
        >>> laws.check_canonical(tn.MPO.from_matrix(torch.randn(8, 8).double(), sites=3), center=1)
    """
    moved = operator.canonicalize(center=center)
    center %= len(operator.cores)
    rounding = tolerance(operator.cores[0].dtype)
    assert reference.relative_error(operator.to_matrix(), moved.to_matrix()) <= 10 * rounding
    for k, core in enumerate(moved.cores):
        block = core.flatten(0, 2) if k < center else core.flatten(1).mH
        if k != center:
            eye = torch.eye(block.shape[1], dtype=core.dtype, device=core.device)
            gap = float((block.mH @ block - eye).abs().max())
            assert gap <= rounding, f"core {k} misses orthonormality by {gap:.3g}"


# --- families ------------------------------------------------------------------------------------

#: Methods with which plans are made and compared: by the loss, by the outputs, and by the weights.
_METHODS: tuple[Method, ...] = ("auto", "gptq", "svd")


def check_name_does_not_matter(
    family: TopologyFamily,
    matrix: Tensor,
    *,
    param_ratio: float = 0.6,
    options: Mapping[str, Any] | None = None,
) -> None:
    """Check that a subclass of a family with another name gives the same plans and the same stored tensors.

    Args:
        family: the family, registered or not.
        matrix: weight of the layer to compress; it is scaled so that its elements are at most 1.
        param_ratio: budget of the compression.
        options: see `CompressionConfig.topology_options`.

    Example:
        >>> from tensornet.testing import laws
        >>> laws.check_name_does_not_matter(tn.topologies.topology_family("mpo"), torch.randn(12, 8))
    """
    child = copy.copy(family)
    child.__class__ = type(f"Renamed{type(family).__name__}", (type(family),), {})
    child.name = f"renamed_{family.name}"
    weight = (matrix.real if matrix.is_complex() else matrix).float()
    weight = weight / weight.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    generator = torch.Generator().manual_seed(0)
    samples = [torch.randn(2 * n, n, generator=generator, device="cpu") for n in weight.shape]
    scaled = [x * torch.logspace(0, 1, x.shape[1], device="cpu") for x in samples]
    rows, columns = ({"0": x.T @ x / len(x)} for x in scaled)
    stats = CalibrationStats(rows, columns, tokens=100, loss=1.0, source="random numbers")
    for method in _METHODS:
        found: list[tuple[LayerPlan, dict[str, Tensor]] | None] = []
        for member in (family, child):
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            layer.weight.data.copy_(weight)
            model = nn.Sequential(layer)
            known = None if method == "svd" else stats
            with registered(member):
                config = CompressionConfig(
                    topology=member.name, topology_options=options, param_ratio=param_ratio, method=method
                )
                try:
                    made = plan(model, config, known)
                    apply_plan(model, made, known)
                except BudgetError:
                    found.append(None)
                    continue
            found.append((made["0"], model.state_dict()))
        if found[0] is None or found[1] is None:
            assert found == [None, None], f"{child.name!r}, {method}: only one of the two fits the budget"
            continue
        (parent, tensors), (other, others) = found[0], found[1]
        if other.topology is not None:
            built = other.topology.family
            assert built == child.name, f"{child.name!r}, {method}: build records {built!r}"
            other = replace(other, topology=replace(other.topology, family=family.name))
        assert other == parent, f"{child.name!r}, {method}: planned {other}, its parent {parent}"
        assert others.keys() == tensors.keys(), f"{child.name!r}, {method}: other tensors"
        for key, tensor in tensors.items():
            assert torch.equal(tensor, others[key]), f"{child.name!r}, {method}: tensor {key!r} differs"


# --- number formats ------------------------------------------------------------------------------


def check_nearest(number_format: NumberFormat, matrix: Tensor) -> None:
    """Check that integer codes are the nearest grid points for given scales, and that packing preserves them.

    Formats with a codebook only need to preserve values that they can store.

    Example:
        >>> from tensornet.quantization import NumberFormat
        >>> from tensornet.testing import laws
        >>> laws.check_nearest(NumberFormat.parse("int4:g32"), torch.randn(3, 40))
    """
    rounded = round_weight(matrix, number_format, refits=0)
    scales, minima, size = rounded.scales.double(), rounded.minima, matrix.shape[1]
    codes = number_format.encode(matrix.double(), scales, minima)
    assert codes.dtype == torch.uint8, f"codes are {codes.dtype}, not torch.uint8"
    if number_format.points.run > 1:
        values = number_format.decode(codes, scales, dtype=torch.float64)
        again = number_format.decode(number_format.encode(values, scales), scales, dtype=torch.float64)
        assert torch.equal(values, again), "values change when they are rounded again"
    else:
        every = [torch.full_like(codes, code) for code in range(number_format.points.top + 1)]
        points = torch.stack([number_format.decode(x, scales, minima, torch.float64) for x in every])
        errors = (points - matrix.double()).abs()
        found = errors.gather(0, codes.long()[None])[0]
        steps = number_format.spread(scales.abs(), size).clamp_min(1e-30)
        over = float(((found - errors.amin(0)) / steps).max())
        assert over <= 1e-6, f"a code is {over:.3g} scales farther from its value than the nearest point"
    packed = number_format.unpack(number_format.pack(codes), size)
    assert torch.equal(packed, codes), "packing changes codes"


def check_stored_bytes(number_format: NumberFormat, matrix: Tensor) -> None:
    """Check that a layer takes the number of bytes that the format states, and that loading preserves it.

    Example:
        >>> from tensornet.quantization import NumberFormat
        >>> from tensornet.testing import laws
        >>> laws.check_stored_bytes(NumberFormat.parse("int4:g32"), torch.randn(3, 40))
    """
    assert NumberFormat.parse(number_format.name) == number_format, f"{number_format!r} has another name"
    layers: list[Any] = []
    for _ in range(2):
        linear = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False)
        linear.weight.data.copy_(matrix)
        model = nn.Sequential(linear)
        config = CompressionConfig(
            target_modules="all", topology_options={"max_bond": 1}, topology="low_rank", method="svd"
        )
        made = plan(model, config).replace_layer("0", None, number_format.name)
        apply_plan(model, made)
        layers.append(model[0])
    stored = sum(x.nbytes for x in layers[0].state_dict().values())
    stated = number_format.nbytes(matrix.shape)
    assert stored == stated == made["0"].bytes_after, f"stored {stored} bytes, stated {stated}"
    for tensor in layers[1].state_dict().values():
        tensor.zero_()
    layers[1].load_state_dict(layers[0].state_dict())
    assert torch.equal(layers[0].to_matrix(), layers[1].to_matrix()), "loading changes the matrix"


def check_scales(number_format: NumberFormat, matrix: Tensor) -> None:
    """Check that rounded scales can be stored exactly, that they have limits, and that the ranges tried fit.

    Example:
        >>> from tensornet.quantization import NumberFormat
        >>> from tensornet.testing import laws
        >>> laws.check_scales(NumberFormat.parse("int4:g32"), torch.randn(3, 40))
    """
    scales, groups = number_format.scales, number_format.groups(matrix.shape[1])
    wanted = number_format.grouped(matrix.abs()).amax(-1)
    for factor in (1.0, 1e30, -1e30):
        found = scales.storable((factor * wanted).clamp(-3e38, 3e38))
        sizes = found.double().abs()
        assert bool((sizes <= scales.largest).all()), (
            f"a scale of {sizes.max():.3g} is above {scales.largest}"
        )
        tensors = scales.tensors(found)
        layout = [(x.shape[-1], x.dtype) for x in tensors.values()]
        assert layout == [(length, kind) for _, length, kind, _ in scales.layout(groups)], "another layout"
        again = scales.values(tensors, groups)
        assert again.dtype == found.dtype, f"scales are stored as {again.dtype}"
        assert torch.equal(again.double(), found.double()), "storing changes scales"
        twice = scales.storable(again.float())
        assert torch.equal(twice.double(), found.double()), "rounding changes stored scales"
    assert 0 < scales.smallest <= scales.accurate < scales.largest, "limits of scales are not in order"
    ranges = number_format.points.ranges(scales.least_range, wanted)
    assert 0 < float(ranges[0]) <= scales.least_range, "the smallest range is above that of the scales"
    assert torch.equal(ranges, ranges.sort().values), "ranges are not ascending"


def check_rounded_loss(number_format: NumberFormat, matrix: Tensor) -> None:
    """Check that the stated loss increase equals `1/2 tr(R E C E^T)` for the rounding error `E`.

    Example:
        >>> from tensornet.quantization import NumberFormat
        >>> from tensornet.testing import laws
        >>> laws.check_rounded_loss(NumberFormat.parse("int4:g32"), torch.randn(3, 40))
    """
    generator = torch.Generator().manual_seed(0)
    samples = (torch.randn(2 * n, n, generator=generator, dtype=torch.float64) for n in matrix.shape)
    rows, columns = (x.T @ x / len(x) + torch.eye(x.shape[1]) for x in samples)
    both: dict[str, Any] = {"rows": rows, "columns": columns, "row_damping": 0, "column_damping": 0}
    rounded = round_weight(matrix.double(), number_format, **both)
    error = rounded.dequantize(torch.float64) - matrix.double()
    loss, stated = float(0.5 * torch.trace(rows @ error @ columns @ error.T)), float(rounded.loss_increase)
    gap = abs(loss - stated)
    assert gap <= 1e-6 * max(loss, stated), f"stated loss increase {stated:.6g}, true {loss:.6g}"


# --- classes to subclass -------------------------------------------------------------------------


class Law(NamedTuple):
    """A check, together with hypothesis strategies for its arguments.

    Args:
        check: function that raises `AssertionError` if the law is violated.
        drawn: strategies for the keyword arguments of `check`.
        subject: function that returns the leading arguments of `check` for an instance of the test class; by
            default, the method `subject` of the test class.
        examples: largest number of examples, for slow checks; by default, that of the hypothesis profile.

    Example:
        >>> from tensornet.testing import laws, strategies
        >>> law = laws.Law(laws.check_matrix, {"network": strategies.networks()}, subject=lambda _: ())
        >>> law.check.__name__
        'check_matrix'
    """

    check: Callable[..., None]
    drawn: dict[str, SearchStrategy[Any]]
    subject: Callable[[Any], tuple[Any, ...]] | None = None
    examples: int | None = None


Laws = dict[str, Law]


class _Laws:
    """Base class that adds the laws to each subclass as test methods."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for name, entry in cls._laws().items():
            law = Law(*entry)
            # Laws that this class or a base class overrides or disables are kept. All other laws are made
            # again, so that they draw from the strategies of this class.
            written = [vars(above)[name] for above in cls.__mro__ if name in vars(above)]
            if not written or getattr(written[0], "is_law", False):
                setattr(cls, name, _test(law))

    @classmethod
    def _laws(cls) -> Laws:
        return {}

    def subject(self) -> tuple[Any, ...]:
        """Return the leading arguments of every law; hypothesis draws the other arguments."""
        return ()


def _test(law: Law) -> Callable[..., None]:
    def test(self: _Laws, **example: Any) -> None:
        subject = self.subject() if law.subject is None else law.subject(self)
        law.check(*subject, **example)

    test.__doc__ = law.check.__doc__
    limits = settings(deadline=None)
    if law.examples is not None:
        limits = settings(limits, max_examples=law.examples)
    made = limits(given(**law.drawn)(test))
    made.is_law = True  # type: ignore[attr-defined]
    return made


class DecompositionLaws(_Laws):
    """Laws of decompositions. Subclass this, define `decompose`, and restrict the strategies if necessary.

    To disable a law that is not satisfied, set its test to None in the subclass, as in `test_monotone =
    None`. Subclasses of this subclass inherit the setting.

    Example:
        >>> from tensornet.testing import laws, strategies
        >>> class TestMine(laws.DecompositionLaws):
        ...     matrices = strategies.matrices(max_size=6)
        ...     def decompose(self, matrix, budget):
        ...         caps = {"max_bond": budget.max_bond, "rel_error": budget.rel_error}
        ...         return laws.Outcome.of(tn.decompose(matrix, "low_rank", **caps))
        >>> TestMine().test_exact()  # pytest runs every law
    """

    #: Matrices to decompose.
    matrices: SearchStrategy[Tensor] = strategies.matrices()
    #: Budgets of the decompositions; restrict them if not all limits are supported.
    budgets: SearchStrategy[Budget] = strategies.budgets()

    def decompose(self, matrix: Tensor, budget: Budget) -> Outcome:
        """Decompose a matrix with the decomposition under test."""
        raise NotImplementedError(f"{type(self).__name__} must define decompose(matrix, budget).")

    def subject(self) -> tuple[Any, ...]:
        """Return the decomposition under test."""
        return (self.decompose,)

    @classmethod
    def _laws(cls) -> Laws:
        matrix: dict[str, SearchStrategy[Any]] = {"matrix": cls.matrices}
        both = {**matrix, "budget": cls.budgets}
        caps = st.lists(st.integers(1, 8), min_size=2, max_size=5, unique=True).map(sorted)
        broken = {**matrix, "value": st.sampled_from((math.nan, math.inf, -math.inf))}
        return {
            "test_exact": Law(check_exact, matrix),
            "test_certificate": Law(check_certificate, both),
            "test_tight": Law(check_tight, both),
            "test_caps": Law(check_caps, both),
            "test_monotone": Law(check_monotone, {**matrix, "caps": caps}),
            "test_quality": Law(check_quality, both),
            "test_input_kept": Law(check_input_kept, both),
            "test_dtype_and_device": Law(check_dtype_and_device, both),
            "test_deterministic": Law(check_deterministic, both),
            "test_refuses_non_finite": Law(check_refuses_non_finite, broken),
        }


class FamilyLaws(DecompositionLaws):
    """Laws of a `TopologyFamily`. Subclass this, set `family` to an instance, and set `options` if needed.

    Example:
        >>> from tensornet.testing import laws, strategies
        >>> class TestTucker(laws.FamilyLaws):
        ...     family = tn.topologies.topology_family("tucker")
        ...     matrices = strategies.matrices(max_size=6)
        >>> TestTucker().test_exact()  # pytest runs every law
    """

    family: TopologyFamily
    #: Options that are passed to `decompose`.
    options: ClassVar[dict[str, Any]] = {}

    def decompose(self, matrix: Tensor, budget: Budget) -> Outcome:
        """Decompose a matrix with the family under test."""
        return Outcome.of(self.family.decompose(matrix, budget, **self.options))

    @classmethod
    def _laws(cls) -> Laws:
        drawn = {"matrix": cls.matrices, "options": st.just(cls.options)}
        name = Law(check_name_does_not_matter, drawn, lambda laws: (laws.family,), _RENAMED)
        return {**super()._laws(), "test_name_does_not_matter": name}


class FormatLaws(_Laws):
    """Laws of an integer `NumberFormat`. Subclass this, and set `number_format` to the name of the format.

    Example:
        >>> from tensornet.testing import laws
        >>> class TestInt4(laws.FormatLaws):
        ...     number_format = "int4:g32"
        >>> TestInt4().test_nearest()  # pytest runs every law
    """

    number_format: str
    #: Matrices to round. Formats with super-blocks of 256 weights need row lengths that are multiples of 256.
    matrices: SearchStrategy[Tensor] = strategies.matrices(
        max_size=70, dtype=torch.float32, spectrum="gaussian", scales=False
    )

    def subject(self) -> tuple[Any, ...]:
        """Return the format under test."""
        return (NumberFormat.parse(self.number_format),)

    @classmethod
    def _laws(cls) -> Laws:
        matrix: dict[str, SearchStrategy[Any]] = {"matrix": cls.matrices}
        return {
            "test_nearest": Law(check_nearest, matrix),
            "test_stored_bytes": Law(check_stored_bytes, matrix),
            "test_scales": Law(check_scales, matrix),
            "test_rounded_loss": Law(check_rounded_loss, matrix),
        }


class NetworkLaws(_Laws):
    """Laws of networks: matrix, application and gradients. Subclass this, and set the strategy `networks`.

    Example:
        >>> from tensornet.testing import laws, strategies
        >>> class TestSmallNetworks(laws.NetworkLaws):
        ...     networks = strategies.networks(topology=strategies.topologies(max_size=4))
        >>> TestSmallNetworks().test_matrix()  # pytest runs every law
    """

    networks: SearchStrategy[TensorNetwork] = strategies.networks()

    @classmethod
    def _laws(cls) -> Laws:
        network: dict[str, SearchStrategy[Any]] = {"network": cls.networks}
        batches = st.sampled_from(((), (1,), (3,), (0,), (2, 3)))
        return {
            "test_matrix": Law(check_matrix, network),
            "test_apply": Law(check_apply, {**network, "batch": batches}),
            "test_gradients": Law(check_gradients, network),
        }


class LayerKindLaws:
    """Laws of a `LayerKind`. Subclass this, and define `layer` and `inputs`.

    Example:
        >>> from tensornet.testing import laws
        >>> class TestTables(laws.LayerKindLaws):
        ...     def layer(self):
        ...         return torch.nn.Embedding(10, 6)
        ...     def inputs(self, tokens):
        ...         return torch.randint(10, (tokens,))
        >>> TestTables().test_compressed()  # pytest runs every law
    """

    #: Largest allowed difference between the outputs of two layers, relative to the largest output.
    tolerance: ClassVar[float] = 1e-5

    def layer(self) -> nn.Module:
        """Build a stock layer of the kind under test, in float32, with random weights."""
        raise NotImplementedError(f"{type(self).__name__} must define layer().")

    def inputs(self, tokens: int) -> Tensor:
        """Build the input of a layer for some tokens, of shape `(tokens, ...)`."""
        raise NotImplementedError(f"{type(self).__name__} must define inputs(tokens).")

    def _model(self, seed: int = 0) -> nn.Sequential:
        torch.manual_seed(seed)
        return nn.Sequential(self.layer()).eval()

    def _compressed(self) -> tuple[nn.Sequential, Tensor, Tensor]:
        model, x = self._model(), self.inputs(7)
        expected = model(x).detach()
        compress(model, _FULL_RANK, progress=False)
        return model, x, expected

    def _check(self, model: nn.Module, x: Tensor, expected: Tensor) -> None:
        difference = (model(x).detach() - expected).abs().max()
        assert float(difference) <= self.tolerance * float(expected.abs().max()), float(difference)

    def test_compressed(self) -> None:
        """Check that the layer is found, and that its network of full rank computes the same."""
        model, x, expected = self._compressed()
        assert isinstance(model[0], NetworkModule)
        self._check(model, x, expected)

    def test_matrix(self) -> None:
        """Check that outputs without the bias double if the matrix doubles."""
        model, x, expected = self._compressed()
        stock = self._model()[0]
        kind = kind_of(stock)
        assert kind is not None
        bias = layer_bias(stock)
        constant = torch.zeros(()) if bias is None else bias.detach()
        decompress(model, {"0": 2 * kind.matrix(stock).detach()})
        self._check(model, x, 2 * (expected - constant) + constant)

    def test_decompressed(self) -> None:
        """Check that decompressing restores a layer of the same kind that computes the same."""
        model, x, expected = self._compressed()
        kind = kind_of(decompress(model)[0])  # type: ignore[index]
        assert kind is not None
        assert kind is kind_of(self.layer())
        self._check(model, x, expected)

    def test_described(self) -> None:
        """Check that the description in JSON and the saved tensors rebuild the layer."""
        model, x, expected = self._compressed()
        spec = json.loads(json.dumps(module_spec(model[0])))
        again = build_module(spec)
        again.load_state_dict(model[0].state_dict())
        self._check(again, x, expected)

    def test_saved(self) -> None:
        """Check that a model is loaded as it was saved, into a model with other weights."""
        model, x, expected = self._compressed()
        with tempfile.TemporaryDirectory() as folder:
            save_model(model, f"{folder}/model.safetensors")
            again = load_model(self._model(seed=1), f"{folder}/model.safetensors")
        self._check(again.eval(), x, expected)

    def test_tied(self) -> None:
        """Check that layers that share a weight share their cores, and a weight again when decompressed."""
        model, x = self._model(), self.inputs(7)
        model.append(self.layer().eval())
        kind = kind_of(model[0])
        assert kind is not None
        weight = model[0].weight
        assert isinstance(weight, nn.Parameter)
        kind.share(model[1], weight)
        expected = [layer(x).detach() for layer in model]
        compress(model, _FULL_RANK, progress=False)
        first, second = model
        assert isinstance(first, NetworkModule)
        assert isinstance(second, NetworkModule)
        assert all(a is b for a, b in zip(first.stored_cores, second.stored_cores, strict=True))
        for layer, values in zip(model, expected, strict=True):
            self._check(layer, x, values)
        decompress(model)
        assert model[0].weight is model[1].weight

    def test_calibrated(self) -> None:
        """Check the statistics of one token: their traces multiply to the squared gradient of the matrix."""
        model, x = self._model(), self.inputs(1)
        target = torch.randn_like(model(x))

        def losses(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
            return (model(**batch) * target).sum(-1)

        stats = calibrate(model, [x], loss_fn=losses)
        losses(model, {"input": x}).sum().backward()
        weight = model[0].weight
        assert isinstance(weight, Tensor)
        assert weight.grad is not None
        traces = [
            float((x.diagonal() if x.ndim == 2 else x).sum()) for x in (stats.rows["0"], stats.columns["0"])
        ]
        expected = float(weight.grad.square().sum())
        assert math.isclose(traces[0] * traces[1], expected, rel_tol=1e-3), (traces, expected)


#: Without a budget, a network of full rank is made.
_FULL_RANK = CompressionConfig(target_modules="all", topology="mpo", method="svd")
