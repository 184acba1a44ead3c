"""The class `TensorNetwork`: a linear operator given by a topology and its cores."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tensornet import interop
from tensornet._util import check_memory, check_size, import_optional
from tensornet.contraction.cost import default_machine
from tensornet.contraction.plan import (
    TOKEN,
    check_input,
    contract_with_input,
    plan_apply,
    plan_matrix,
    plan_operator,
    run,
)
from tensornet.contraction.search import Optimizer
from tensornet.contraction.slicing import plan_slices, run_slices
from tensornet.errors import ShapeError, TopologyError
from tensornet.topology import Topology

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class TensorNetwork:
    """Linear operator `(out_features, in_features)` stored as the cores of a tensor network.

    Args:
        topology: names, shapes and connections of the cores.
        cores: tensors in the order of `topology.cores`, or a dictionary of tensors by core name.

    Raises:
        ShapeError: a core is missing or unknown or has the wrong shape, or the cores differ in dtype or
            device.

    Example:
        >>> topology = tn.topologies.low_rank(out_features=8, in_features=6, rank=2)
        >>> shapes = topology.core_shapes.values()
        >>> network = tn.TensorNetwork(topology, [torch.randn(shape) for shape in shapes])
        >>> network.apply(torch.randn(5, 6)).shape, network.to_matrix().shape
        (torch.Size([5, 8]), torch.Size([8, 6]))
    """

    def __init__(self, topology: Topology, cores: Sequence[Tensor] | Mapping[str, Tensor]) -> None:
        self.topology = topology
        self.cores = check_cores(topology, cores)

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name}{list(shape)}" for name, shape in self.topology.core_shapes.items())
        return (
            f"TensorNetwork({self.topology.family}, {self.shape}, {self.num_params:,} parameters: {shapes})"
        )

    @property
    def shape(self) -> tuple[int, int]:
        """Shape `(out_features, in_features)`."""
        return self.topology.shape

    @property
    def num_params(self) -> int:
        """Number of stored elements, padding included."""
        return self.topology.num_params

    def to_matrix(self, *, optimize: Optimizer = "auto", max_bytes: int | None = None) -> Tensor:
        """Contract the cores to the dense matrix, shape `(out_features, in_features)`.

        Args:
            optimize: what finds the contraction order: `"auto"`, `"cotengra"`, a name or an optimizer object
                of opt_einsum or cotengra, or a path; see `tensornet.contraction.search.find_path`.
            max_bytes: largest size of an intermediate result in bytes, the matrix included. Larger ones are
                computed in slices, for one value of some bonds at a time, which takes more time.

        Raises:
            ContractionError: there is no such optimizer, or its path is invalid.
            MemoryLimitError: the matrix and the intermediate results do not fit in memory; or not even
                65,536 slices keep `max_bytes`.
            ValueError: `max_bytes` is not a positive integer.

        Example:
            >>> network = tn.decompose(torch.randn(64, 64), "mpo", sites=3).network
            >>> dense = network.to_matrix(max_bytes=4 * 64 * 64)
            >>> torch.allclose(dense, network.to_matrix(), atol=1e-5)
            True
        """
        if max_bytes is not None:
            return self._in_slices(None, optimize, max_bytes)
        plan = plan_matrix(self.topology, optimize=optimize)
        size = max(plan.largest_intermediate(1), math.prod(self.topology.padded_shape))
        what = f"The dense matrix of shape {self.shape}"
        check_memory(size, self.cores[0], what, "use `apply` to multiply by vectors without the matrix")
        dense = run(plan, self.cores)
        return dense[: self.shape[0], : self.shape[1]]

    def apply(self, x: Tensor, *, optimize: Optimizer = "auto", max_bytes: int | None = None) -> Tensor:
        """Apply the operator to `x: (..., in_features)` without building its matrix.

        Args:
            x: the input.
            optimize: what finds the contraction order, as for `to_matrix`; `"auto"` chooses among orders by
                the predicted time.
            max_bytes: largest size of an intermediate result in bytes, the output included, as for
                `to_matrix`.

        Returns:
            Tensor of shape `(..., out_features)`.

        Raises:
            ContractionError: there is no such optimizer, or its path is invalid.
            ValueError: `max_bytes` is not a positive integer.
            ShapeError: `x` is not a tensor, its last dimension is not `in_features`, or its dtype (except
                under autocast) or device differs from that of the cores.
            MemoryLimitError: the output and the intermediate results do not fit in memory; or not even
                65,536 slices keep `max_bytes`.
        """
        if not isinstance(x, Tensor) or x.ndim == 0:
            got = "a number without dimensions" if isinstance(x, Tensor) else type(x).__name__
            raise ShapeError(
                f"apply needs a torch.Tensor of shape (..., in_features={self.shape[1]}), got {got}."
            )
        core = self.cores[0]
        if x.dtype != core.dtype and not torch.is_autocast_enabled(x.device.type):
            raise ShapeError(
                f"apply needs an input of the dtype of the cores, {core.dtype}, got {x.dtype}; cast it with "
                f"x.to({core.dtype}), or cast the operator with its .to method."
            )
        if x.device != core.device:
            raise ShapeError(
                f"The input of apply is on {x.device}, but the cores are on {core.device}; "
                f'move it with x.to("{core.device}").'
            )
        if max_bytes is not None:
            check_input(x, self.shape[1])
            rows = self._in_slices(x.reshape(-1, self.shape[1]), optimize, max_bytes)
            return rows.reshape(*x.shape[:-1], self.shape[0])
        plan, tokens = plan_operator(self.topology), max(x.numel() // max(x.shape[-1], 1), 1)
        if isinstance(optimize, str) and optimize == "auto":
            machine = default_machine(core.device)
            route = plan.fastest(tokens, machine, core.element_size(), rebuild=False)
        else:
            plan = replace(plan, applies=(plan_apply(self.topology, tokens, optimize),))
            route = 0
        size = max(plan.applies[route].largest_intermediate(tokens), tokens * plan.padded_shape[0])
        what = f"Applying the operator of shape {self.shape} to {tokens} vector{'s' if tokens > 1 else ''}"
        check_memory(size, core, what, "apply it to fewer vectors at once, or round the operator")
        return contract_with_input(plan, self.cores, x, route=route)

    def _in_slices(self, x: Tensor | None, optimize: Optimizer, max_bytes: int) -> Tensor:
        """Contract to the matrix, or apply to `x` of shape `(tokens, in_features)`, in slices."""
        most = check_size("max_bytes", max_bytes, error=ValueError) // self.cores[0].element_size()
        topology, total = self.topology, None
        rows, columns = topology.padded_shape
        for positions, part in topology.parts:
            operands, output, sizes = [core.labels for core in part.cores], part.out_labels, part.size_of
            tensors = [self.cores[k] for k in positions]
            if x is None:
                output, shape = (*output, *part.in_labels), (rows, columns)
            else:
                padded = torch.nn.functional.pad(x, (0, columns - x.shape[1]))
                operands, output = [(TOKEN, *part.in_labels), *operands], (TOKEN, *output)
                tensors, sizes = (
                    [padded.reshape(-1, *part.in_dims), *tensors],
                    {**sizes, TOKEN: max(len(x), 1)},
                )
                shape = (len(x), rows)
            sliced = plan_slices(operands, output, sizes, most, optimize=optimize)
            result = run_slices(sliced, tensors).reshape(shape)
            total = result if total is None else total + result
        assert total is not None
        return total[: self.shape[0], : self.shape[1]] if x is None else total[:, : self.shape[0]]

    def flops(self, tokens: int) -> int:
        """Count the floating-point operations of `apply` on `tokens` vectors; a multiply-add counts as two.

        Raises:
            ValueError: `tokens` is negative or not an integer.
        """
        check_size("tokens", tokens, least=0, error=ValueError)
        return 2 * min(plan.multiply_adds(tokens) for plan in plan_operator(self.topology).applies)

    def draw(self) -> "Figure":
        """Draw the network as a `matplotlib.figure.Figure`. See `draw_topology`."""
        return draw_topology(self.topology)

    def to_quimb(self) -> Any:
        """Convert the network to a quimb `TensorNetwork`, whose indices are the labels of the topology.

        The names of the cores become tags, and the arrays are NumPy copies. Padding is kept.

        Raises:
            MissingDependencyError: quimb is not installed.
            ShapeError: the network is a sum of networks.

        Example:
            >>> network = tn.decompose(torch.randn(8, 8), "tucker", max_bond=3).network
            >>> there = network.to_quimb()
            >>> back = tn.TensorNetwork.from_quimb(
            ...     there, network.topology.out_labels, network.topology.in_labels
            ... )
            >>> torch.allclose(back.to_matrix(), network.to_matrix(), atol=1e-5)
            True
        """
        return interop.network_to_quimb(self.topology, self.cores)

    @classmethod
    def from_quimb(
        cls, network: Any, out_inds: Sequence[str], in_inds: Sequence[str] = ()
    ) -> "TensorNetwork":
        """Convert a quimb `TensorNetwork` to a network; its `exponent` is distributed over the cores.

        Args:
            network: the network, with NumPy arrays or torch tensors.
            out_inds: names of the indices that are the out-legs, most significant first.
            in_inds: names of the indices that are the in-legs; none for a state, which has one column.

        Raises:
            ShapeError: an index does not exist, or an open index is in neither list.
        """
        topology, cores = interop.network_from_quimb(network, out_inds, in_inds)
        return cls(topology, cores)

    def to(self, dtype: torch.dtype) -> "TensorNetwork":
        """Copy the network with every core cast to `dtype`."""
        return TensorNetwork(self.topology, [core.to(dtype) for core in self.cores])


def check_cores(topology: Topology, cores: Sequence[Tensor] | Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """Check the shapes, dtypes and devices of cores, and return them in the order of the topology.

    Raises:
        ShapeError: a core is missing or unknown, or has the wrong type, shape, dtype or device.
        TopologyError: the first argument is not a `Topology`.
    """
    if not isinstance(topology, Topology):
        raise TopologyError(
            f"A network needs a Topology, got {topology!r}; make one with a builder such as topologies.mpo."
        )
    if isinstance(cores, Mapping):
        if missing := [name for name in topology.core_names if name not in cores]:
            raise ShapeError(f"Cores {missing} are missing; the topology has {list(topology.core_names)}.")
        if surplus := sorted(cores.keys() - set(topology.core_names)):
            raise ShapeError(f"Unknown cores {surplus}; the topology has {list(topology.core_names)}.")
        ordered = tuple(cores[name] for name in topology.core_names)
    else:
        ordered = tuple(cores)
        if len(ordered) != len(topology.cores):
            raise ShapeError(f"Got {len(ordered)} cores, but the topology has {list(topology.core_names)}.")
    for name, core in zip(topology.core_names, ordered, strict=True):
        expected = topology.core_shapes[name]
        if not isinstance(core, Tensor):
            raise ShapeError(f"Core {name!r} must be a torch.Tensor, got {type(core).__name__}.")
        if tuple(core.shape) != expected:
            raise ShapeError(
                f"Core {name!r} has shape {tuple(core.shape)}, but the topology requires {expected}."
            )
        if (core.dtype, core.device) != (ordered[0].dtype, ordered[0].device):
            raise ShapeError(
                f"Core {name!r} is {core.dtype} on {core.device}, but the first core is "
                f"{ordered[0].dtype} on {ordered[0].device}; all cores must have the same dtype and device."
            )
    return ordered


def random_cores(
    topology: Topology,
    *,
    gain: float = 1.0,
    generator: torch.Generator | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> tuple[Tensor, ...]:
    """Draw Gaussian cores so that each matrix element has mean 0 and variance `gain^2 / in_features`.

    Let `B` be the product of all bond sizes. A matrix element is a sum of `B` products of `n` independent
    core elements. If all core elements have standard deviation `s`, the matrix element has the variance
    `B * s^(2n)`. Hence `s = (gain^2 / (in_features * B))^(1 / (2n))`. For a sum of networks, all terms get
    the same variance.

    Args:
        topology: the topology whose cores are drawn.
        gain: factor on the standard deviation of the matrix; 1 preserves the variance of activations.
        generator: random number generator; torch's global generator if absent.
        dtype: dtype of the cores, torch's default if absent.
        device: device of the cores. If absent, it is the device of the generator, or torch's default device.
    """
    if device is None and generator is not None:
        device = generator.device
    deviations = {}
    for positions, part in topology.parts:
        bonds = math.prod(part.bond_dims.values())
        variance = gain**2 / (topology.in_features * bonds * len(topology.parts))
        deviations.update(dict.fromkeys(positions, variance ** (0.5 / len(positions))))
    return tuple(
        torch.randn(shape, generator=generator, dtype=dtype, device=device) * deviations[k]
        for k, shape in enumerate(topology.core_shapes.values())
    )


# --- drawing: cores as discs, bonds as lines, out-legs up, in-legs down --------------------

Point = tuple[float, float]

_CORE, _BOND, _OUT, _IN, _SHARED = "#2b5c8a", "#444444", "#b3541e", "#3a7d44", "#999999"


def draw_topology(topology: Topology) -> "Figure":
    """Draw a topology as a diagram with the size of every index; indices of size 1 are omitted.

    The area of a disc grows with the logarithm of the number of parameters of the core. A leg that belongs to
    several cores, as in block tensor trains, is drawn at each of these cores, and dotted lines join the
    copies. The lines of a bond between more than two cores are dashed.

    Returns:
        A `matplotlib.figure.Figure`, not registered with pyplot; save it with `savefig`.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    figure_module = import_optional("matplotlib.figure", extra="viz", user="draw")
    places = _places(topology)
    xs, ys = [x for x, _ in places.values()], [y for _, y in places.values()]
    figure: Figure = figure_module.Figure(
        figsize=(1.3 * (max(xs) - min(xs)) + 2, 1.3 * (max(ys) - min(ys)) + 2.6), layout="constrained"
    )
    axes = figure.add_subplot()
    axes.set_aspect("equal")
    axes.axis("off")
    rows, columns = topology.shape
    axes.set_title(f"{topology.family}  {rows} x {columns}  {topology.num_params:,} parameters", fontsize=12)
    _draw_bonds(axes, topology, places)
    _draw_legs(axes, topology, places)
    _draw_cores(axes, topology, places)
    axes.set_xlim(min(xs) - 1.0, max(xs) + 1.0)
    axes.set_ylim(min(ys) - 1.2, max(ys) + 1.2)
    return figure


def _places(topology: Topology) -> dict[str, Point]:
    """Place the cores on a line if bonds join only neighbours, otherwise on a circle.

    If one core has all bonds, it is placed at the centre of the circle.
    """
    names = topology.core_names
    count = len(names)
    carriers = [_carriers(topology, label) for label, size in topology.bond_dims.items() if size > 1]
    positions = [[names.index(name) for name in carrier] for carrier in carriers]
    if all(max(p) - min(p) <= 1 for p in positions):
        return {name: (1.6 * k, 0.0) for k, name in enumerate(names)}
    hubs = [name for name in names if all(name in carrier for carrier in carriers)]
    ring = [name for name in names if not hubs or name != hubs[0]]
    radius = max(1.3, 0.35 * count)
    angles = [math.pi / 2 - 2 * math.pi * k / len(ring) - math.pi / len(ring) for k in range(len(ring))]
    around = {n: (radius * math.cos(a), radius * math.sin(a)) for n, a in zip(ring, angles, strict=True)}
    return around if not hubs else {hubs[0]: (0.0, 0.0), **around}


def _carriers(topology: Topology, label: str) -> list[str]:
    return [core.name for core in topology.cores if label in core.labels]


def _draw_bonds(axes: "Axes", topology: Topology, places: dict[str, Point]) -> None:
    seen: dict[tuple[str, ...], int] = {}
    for label, size in topology.bond_dims.items():
        names = _carriers(topology, label)
        if size == 1 or len(names) < 2:
            continue
        ends = [places[name] for name in names]
        middle = (sum(x for x, _ in ends) / len(ends), sum(y for _, y in ends) / len(ends))
        again = seen[tuple(sorted(names))] = seen.get(tuple(sorted(names)), -1) + 1
        middle = (middle[0], middle[1] - 0.4 * again)  # further bonds between the same cores are drawn lower
        style = "-" if len(names) == 2 else "--"
        for x, y in ends:
            axes.plot([x, middle[0]], [y, middle[1]], style, color=_BOND, linewidth=_width(size), zorder=1)
        ground = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none"}
        axes.annotate(str(size), middle, ha="center", va="center", fontsize=10, zorder=4, bbox=ground)


def _draw_legs(axes: "Axes", topology: Topology, places: dict[str, Point]) -> None:
    tilt = _tilt(topology, places)
    for labels, direction, color in ((topology.out_labels, 1, _OUT), (topology.in_labels, -1, _IN)):
        for label in labels:
            size = topology.size_of[label]
            if size == 1:
                continue
            tips = []
            for core in topology.cores:
                legs = [x for x in core.labels if x in labels and topology.size_of[x] > 1]
                if label not in legs:
                    continue
                x, y = places[core.name]
                fan = 0.3 * (legs.index(label) - (len(legs) - 1) / 2)
                tip = (x + fan + tilt * direction, y + 0.75 * direction)
                axes.plot([x, tip[0]], [y, tip[1]], color=color, linewidth=_width(size), zorder=1)
                axes.annotate(
                    str(size),
                    tip,
                    textcoords="offset points",
                    xytext=(0, 3 * direction),
                    ha="center",
                    va="bottom" if direction > 0 else "top",
                    fontsize=10,
                )
                tips.append(tip)
            for (x, y), (u, v) in pairwise(tips):
                axes.plot([x, u], [y, v], ":", color=_SHARED, linewidth=1, zorder=0)


def _tilt(topology: Topology, places: dict[str, Point]) -> float:
    """Choose how far legs lean sideways to avoid the bonds; 0 if the cores are on a line."""
    if len({y for _, y in places.values()}) == 1:
        return 0.0
    carriers = (_carriers(topology, label) for label, size in topology.bond_dims.items() if size > 1)
    bonds = [(places[a], places[b]) for names in carriers for a, b in pairwise(names)]
    angles = [math.atan2(v - y, u - x) for (x, y), (u, v) in bonds]

    def distance(tilt: float) -> float:
        return min((abs(math.sin(angle - math.atan2(0.75, tilt))) for angle in angles), default=1.0)

    return max((0.4, 0.2, 0.0, 0.6, 0.8), key=distance)


def _draw_cores(axes: "Axes", topology: Topology, places: dict[str, Point]) -> None:
    for name, shape in topology.core_shapes.items():
        x, y = places[name]
        size = 350 + 70 * math.log2(math.prod(shape) + 1)
        axes.scatter([x], [y], s=size, color=_CORE, zorder=3)
        axes.annotate(name, (x, y), color="white", ha="center", va="center", fontsize=10, zorder=5)


def _width(size: int) -> float:
    return 0.8 + 0.35 * math.log2(size)
