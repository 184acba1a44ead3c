"""Residual form: a dense matrix, meant for integers, plus a network fitted to its rounding error.

To explain why the sum pays: rounding leaves an error whose largest singular values, whitened by the moments
of the loss, stand out of the rest. A few ranks in eight bits or more take them for less than one more bit
would cost. The matrix and the network are fitted alternately: the matrix is rounded without the network's
part, then the network is fitted to the rounding error.

Reference:
    Zhang et al. 2024, "LQER"; Guo et al. 2024, "LQ-LoRA" (one side, alternated).
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tensornet.budget import Budget
from tensornet.errors import BudgetError, TopologyError
from tensornet.linalg.svd import check_finite, result_dtype
from tensornet.linalg.weighted_svd import Weighting
from tensornet.network import TensorNetwork
from tensornet.quantization import NumberFormat, RoundedWeight
from tensornet.topologies.base import (
    Decomposition,
    Ladder,
    RoundTrip,
    TopologyFamily,
    check_options,
    check_request,
    check_topology,
)
from tensornet.topologies.registry import register_topology, topology_family
from tensornet.topologies.rounded_cores import StoredCores, matrix_view
from tensornet.topology import CoreSpec, Topology

#: Name of the core that holds the dense matrix.
BASE = "base"
#: Most bits of a matrix that is worth a network beside it, and fewest bits of that network's cores.
_BASE_BITS, _CORE_BITS = 4, 8
#: Bonds of candidates are multiples of this, up to this part of the shorter side.
_STEP, _PART = 8, 4
#: Bond at which candidates are rounded; the others are predicted from the rounding error that it leaves.
_TRIED = 16
#: How often the matrix is rounded and the network fitted.
_ALTERNATIONS = 2


def residual(
    *,
    out_features: int,
    in_features: int,
    rank: int | None = None,
    network: str = "low_rank",
    network_options: Mapping[str, Any] | None = None,
) -> Topology:
    """Build the sum of a dense core `base` and a network of another family.

    Args:
        out_features: rows.
        in_features: columns.
        rank: largest bond of the network; that of an exact one if absent.
        network: name of the family of the network.
        network_options: of its `build`. Where it pads legs, the dense core is padded as well.

    Raises:
        TopologyError: an unknown family, options that do not fit, or a sum as the network.

    Example:
        >>> tn.topologies.residual(out_features=6, in_features=4, rank=2).core_shapes
        {'base': (6, 1, 1, 4), '0': (1, 6, 1, 2), '1': (2, 1, 4, 1)}
    """
    family = topology_family(network)
    inner = family.build(out_features, in_features, max_bond=rank, **dict(network_options or {}))
    if inner.terms or BASE in inner.core_names:
        raise TopologyError(f"The network of a residual form is a single one, not a sum; got {network!r}.")
    return _beside(inner)


class ResidualFamily(TopologyFamily):
    """Dense matrix plus a network: worth its bytes where the matrix is stored in few bits.

    Example:
        >>> topology = tn.topologies.topology_family("residual").build(6, 4, max_bond=2)
        >>> topology.family, topology.core_names
        ('residual', ('base', '0', '1'))
    """

    name = "residual"

    def build(
        self,
        out_features: int,
        in_features: int,
        *,
        max_bond: int | Sequence[int] | None = None,
        network: str = "low_rank",
        network_options: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Topology:
        """See `residual`; `max_bond` caps the bonds of the network."""
        check_options(self.name, options, ("network", "network_options"))
        made = residual(
            out_features=out_features,
            in_features=in_features,
            rank=max_bond,  # type: ignore[arg-type]
            network=network,
            network_options=network_options,
        )
        return replace(made, family=self.name)

    def options_of(self, topology: Topology) -> dict[str, Any]:
        """Return the family of the network and the options of its legs."""
        _, part = topology.parts[1]
        return {"network": part.family, "network_options": topology_family(part.family).options_of(part)}

    def encodings(
        self, formats: Sequence[NumberFormat]
    ) -> list[tuple[NumberFormat, dict[str, NumberFormat]]]:
        """Pair each integer format of at most four bits with the smallest accurate one for the network."""
        accurate = [x for x in formats if x.bits is None or x.bits >= _CORE_BITS]
        if not accurate:
            return []
        cores = min(accurate, key=lambda x: x.nbytes((64, 64)))
        return [(cores, {BASE: x}) for x in formats if x.bits is not None and x.bits <= _BASE_BITS]

    def decompose(self, matrix: Tensor, budget: Budget, **options: Any) -> Decomposition:
        """Copy the matrix, beside a network that adds nothing yet, of the largest bond that fits.

        Raises:
            BudgetError: fewer parameters than those of the matrix and the smallest network are allowed.
        """
        shape = check_request(self.name, matrix, budget)
        # Nothing is lost at any bond: the smallest keeps a relative error.
        topology = self.build(
            *shape, max_bond=1 if budget.rel_error is not None else budget.max_bond, **options
        )
        bound_by = "exact" if budget.unlimited else "max_bond" if budget.rel_error is None else "rel_error"
        if budget.param_ratio is not None and topology.num_params > budget.param_ratio * matrix.numel():
            allowed = int(budget.param_ratio * matrix.numel())
            largest = max(topology.bond_dims.values(), default=1)
            bond = bisect_right(
                range(1, largest),
                allowed,
                key=lambda cap: self.build(*shape, max_bond=cap, **options).num_params,
            )
            if bond < 1:
                least = self.build(*shape, max_bond=1, **options).num_params
                raise BudgetError(
                    f"param_ratio={budget.param_ratio} allows {allowed} parameters, and the topology "
                    f"{self.name!r} has {least} at bond 1: the matrix and a network. A number format makes "
                    "it smaller, or take another topology."
                )
            topology, bound_by = self.build(*shape, max_bond=bond, **options), "param_ratio"
        return replace(self.decompose_to(matrix, topology), bound_by=bound_by)

    def decompose_to(self, matrix: Tensor, topology: Topology) -> Decomposition:
        """Copy the matrix, beside a network whose last core is zero: training starts as from an adapter."""
        check_topology(self.name, topology, matrix)
        check_finite(matrix, "The matrix")
        _, part = topology.parts[1]
        cores = list(topology_family(part.family).decompose_to(matrix, part).network.cores)
        cores[-1] = torch.zeros_like(cores[-1])
        base = _padded(matrix.detach().to(result_dtype(matrix.dtype), copy=True), topology)
        base = base.reshape(topology.core_shapes[BASE]).contiguous()
        return Decomposition(TensorNetwork(topology, (base, *cores)), 0.0, "exact")

    def fit(self, matrix: Tensor, topology: Topology, weighting: Weighting) -> Decomposition:
        """Copy the matrix, whatever the weighting: the network is fitted when the matrix is rounded."""
        return self.decompose_to(matrix, topology)

    def ladder(
        self,
        matrix: Tensor,
        weightings: Sequence[Weighting],
        *,
        max_bond: int | None = None,
        round_trip: RoundTrip | None = None,
        **options: Any,
    ) -> Ladder:
        """List bonds in steps of eight, with losses predicted from the rounding error of a single bond.

        The candidates of the network's own family for that error tell what each bond takes of it. Rounding
        the network and a matrix rounded for another bond add to that: losses are rescaled through the one
        that was measured.
        """
        shape = (matrix.shape[0], matrix.shape[1])
        top = max(1, min(max_bond or min(shape), min(shape) // _PART))
        bonds = sorted({*range(_STEP, top + 1, _STEP), top})
        topologies = [self.build(*shape, max_bond=bond, **options) for bond in bonds]
        if round_trip is None:
            nothing = torch.zeros(len(bonds), dtype=torch.float64)
            return Ladder(
                tuple(topologies), torch.stack([nothing] * len(weightings)), nothing, complete=False
            )
        place = min(range(len(bonds)), key=lambda k: abs(bonds[k] - _TRIED))
        kept = round_trip(self.decompose_to(matrix, topologies[place]).network)
        base = kept.cores[0].reshape(kept.topology.padded_shape)
        rest = matrix.double() - base[: shape[0], : shape[1]].double()
        error = matrix.double() - kept.to_matrix().double()
        part = topologies[place].parts[1][1]
        family, inner = topology_family(part.family), dict(options.get("network_options") or {})
        found = family.ladder(rest, (*weightings, Weighting()), max_bond=top, **inner)
        sizes = torch.tensor([x.num_params for x in found.topologies])
        chosen = [int((sizes - x.parts[1][1].num_params).abs().argmin()) for x in topologies]
        rows = []
        for weighting, losses in zip((*weightings, Weighting()), found.losses, strict=True):
            predicted, measured = losses[chosen], weighting.cost(error)
            rows.append(predicted * (measured / predicted[place]) if predicted[place] > 0 else predicted)
        energy = matrix.double().square().sum().cpu().clamp_min(1e-300)
        return Ladder(
            tuple(topologies), torch.stack(rows[:-1]), (2 * rows[-1] / energy).sqrt(), complete=False
        )

    def round_cores(self, stored: StoredCores, weighting: Weighting) -> dict[str, Tensor | RoundedWeight]:
        """Round the matrix and fit the network to its rounding error, alternately; keep the best turn."""
        (_, base), (_, part) = stored.topology.parts
        target, whole = stored.matrix(), stored.topology
        if BASE not in stored.formats:  # in floating point it takes what rounding the network leaves
            given = {name: stored.tensors[name] for name in part.core_names}
            done, product = _round_part(part, given, stored, weighting)
            base_core = _padded(target - product, whole).reshape(stored.tensors[BASE].shape)
            return done | {BASE: base_core}

        seen = Weighting(
            _padded_moment(weighting.rows, whole.padded_shape[0]),
            _padded_moment(weighting.columns, whole.padded_shape[1]),
        )

        # The matrix is rounded without the network's part, then the network is fitted to what is left. The
        # turn of least loss is kept: rounding the network may undo what fitting it gained.
        best: tuple[float, dict[str, Tensor | RoundedWeight]] | None = None
        network = torch.zeros_like(target)
        for _ in range(_ALTERNATIONS):
            done, matrix = _round_part(base, {BASE: _padded(target - network, whole)}, stored, seen)
            rest = target - matrix
            fitted = topology_family(part.family).fit(rest, part, weighting).network
            given = dict(zip(part.core_names, fitted.to(target.dtype).cores, strict=True))
            others, network = _round_part(part, given, stored, weighting)
            loss = weighting.cost(rest - network)
            if best is None or loss < best[0]:
                best = loss, done | others
        assert best is not None
        return best[1]

    def gauge_bonds(self, topology: Topology) -> dict[str, str]:
        """Fix no gauge: the network is small, and its rows are chosen after the matrix has been rounded."""
        return {}

    def with_rank(self, topology: Topology, rank: int) -> Topology | None:
        """Build the topology whose network holds the added rank; the matrix stays as it is."""
        _, part = topology.parts[1]
        wider = topology_family(part.family).with_rank(part, rank)
        return None if wider is None else replace(_beside(wider), family=self.name)


def _beside(network: Topology) -> Topology:
    """Build the topology of a dense core plus a network."""
    base = CoreSpec(BASE, (*network.out_labels, *network.in_labels))
    return replace(
        network,
        family=ResidualFamily.name,
        cores=(base, *network.cores),
        terms=(("dense", (BASE,)), (network.family, network.core_names)),
    )


def _padded(matrix: Tensor, topology: Topology) -> Tensor:
    """Pad a matrix with zeros to the legs of a topology."""
    (rows, columns), (tall, wide) = matrix.shape, topology.padded_shape
    return torch.nn.functional.pad(matrix, (0, wide - columns, 0, tall - rows))


def _padded_moment(moment: Tensor | None, size: int) -> Tensor | None:
    """Pad a second moment with zeros."""
    if moment is None:
        return None
    more = size - len(moment)
    return torch.nn.functional.pad(moment, (0, more) if moment.ndim == 1 else (0, more, 0, more))


def _round_part(
    part: Topology, given: Mapping[str, Tensor], whole: StoredCores, weighting: Weighting
) -> tuple[dict[str, Tensor | RoundedWeight], Tensor]:
    """Round the integer cores of one term by the rule of its family; return them and the matrix they give."""
    wanted = {name: whole.formats[name] for name in part.core_names if name in whole.formats}
    work = {
        name: tensor.reshape(matrix_view(part, name) if name in wanted else part.core_shapes[name])
        for name, tensor in given.items()
    }

    def assemble(found: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        return tuple(found[name].reshape(part.core_shapes[name]) for name in part.core_names)

    stored = StoredCores(part, work, wanted, {}, assemble, whole.rounding)
    done: dict[str, Tensor | RoundedWeight] = dict(work)
    if wanted:
        done |= topology_family(part.family).round_cores(stored, weighting)
    dtype = next(iter(work.values())).dtype
    values = {
        name: core if isinstance(core, Tensor) else core.dequantize(dtype) for name, core in done.items()
    }
    return done, stored.matrix(values)


register_topology(ResidualFamily())
