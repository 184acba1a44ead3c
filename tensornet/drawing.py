"""Drawing of a network: cores as discs, bonds as lines, out-legs up, in-legs down."""

import math
from itertools import pairwise
from typing import TYPE_CHECKING

from tensornet._util import import_optional
from tensornet.topology import Topology

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Point = tuple[float, float]

_CORE, _BOND, _OUT, _IN, _SHARED = "#2b5c8a", "#444444", "#b3541e", "#3a7d44", "#999999"


def draw_topology(topology: Topology) -> "Figure":
    """Draw a topology with sizes beside their lines; indices of size 1 are omitted.

    The area of a disc grows with the logarithm of the parameters of its core. A leg that several cores
    carry (block tensor trains) is drawn at each of them and tied together by a dashed line; so is a bond
    of more than two cores.

    Returns:
        A `matplotlib.figure.Figure`, not registered with pyplot; save it with `savefig`.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    figure_module = import_optional("matplotlib.figure", extra="viz", user="draw")
    places = _places(topology)
    xs, ys = [x for x, _ in places.values()], [y for _, y in places.values()]
    figure: Figure = figure_module.Figure(
        figsize=(1.5 * (max(xs) - min(xs)) + 2.5, 1.5 * (max(ys) - min(ys)) + 3), layout="constrained"
    )
    axes = figure.add_subplot()
    axes.set_aspect("equal")
    axes.axis("off")
    rows, columns = topology.shape
    axes.set_title(f"{topology.family}  {rows} x {columns}  {topology.num_params:,} parameters", fontsize=10)
    _draw_bonds(axes, topology, places)
    _draw_legs(axes, topology, places)
    _draw_cores(axes, topology, places)
    axes.set_xlim(min(xs) - 1.0, max(xs) + 1.0)
    axes.set_ylim(min(ys) - 1.2, max(ys) + 1.2)
    return figure


def _places(topology: Topology) -> dict[str, Point]:
    """Place the cores: on a line if bonds join neighbours, around a hub if one exists, else on a circle."""
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
        middle = (middle[0], middle[1] - 0.4 * again)  # two bonds between the same cores: the second sags
        style = "-" if len(names) == 2 else "--"
        for x, y in ends:
            axes.plot([x, middle[0]], [y, middle[1]], style, color=_BOND, linewidth=_width(size), zorder=1)
        ground = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none"}
        axes.annotate(str(size), middle, ha="center", va="center", fontsize=8, zorder=4, bbox=ground)


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
                    fontsize=8,
                )
                tips.append(tip)
            for (x, y), (u, v) in pairwise(tips):
                axes.plot([x, u], [y, v], ":", color=_SHARED, linewidth=1, zorder=0)


def _tilt(topology: Topology, places: dict[str, Point]) -> float:
    """Choose the tilt of the legs: 0 for cores on a line, else the tilt farthest from the bonds."""
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
        size = 250 + 60 * math.log2(math.prod(shape) + 1)
        axes.scatter([x], [y], s=size, color=_CORE, zorder=3)
        axes.annotate(name, (x, y), color="white", ha="center", va="center", fontsize=8, zorder=5)


def _width(size: int) -> float:
    return 0.8 + 0.35 * math.log2(size)
