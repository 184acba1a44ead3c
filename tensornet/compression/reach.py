"""Reach of a compression: the parameters of a model that it considers, and the holders of the rest."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tensornet.nn.targets import BIAS, UNKNOWN, UNSEEN, Target

#: Entry for the biases of layers whose matrices are reached or left out.
BIASES = "biases"
#: Types named in one line; the others are added up.
_NAMED = 5


@dataclass(frozen=True)
class Reach:
    """Parameters of a model by whether a compression considers them; tied ones count once.

    Args:
        total: elements of all parameters.
        reached: elements of the matrices that were planned, dense ones included.
        excluded: elements of other matrices that could be compressed, by type of module: the configuration
            leaves them out.
        unknown: elements of parameters that cannot be compressed, by type of module, with the reason in
            brackets unless it is that no kind of layer describes the type.

    >>> print(Reach(1000, 800, {"Embedding": 150}, {"LayerNorm": 50}))
    reached 80.0 % of 1.00k parameters; left out by choice: Embedding 150; not reached: LayerNorm 50
    """

    total: int
    reached: int
    excluded: Mapping[str, int]
    unknown: Mapping[str, int]

    @property
    def share(self) -> float:
        """Reached parameters as a ratio of all."""
        return self.reached / self.total if self.total else 0.0

    def __str__(self) -> str:
        parts = [f"reached {self.share:.1%} of {compact_count(self.total)} parameters".replace("%", " %")]
        for label, sizes in (("left out by choice", self.excluded), ("not reached", self.unknown)):
            if sizes:
                parts.append(f"{label}: {_listed(sizes)}")
        return "; ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """Convert to a JSON-ready form."""
        return asdict(self) | {"share": self.share}


def measure_reach(targets: Iterable[Target], layers: Collection[str], *, unseen: Iterable[str] = ()) -> Reach:
    """Count the parameters of a dense model that a plan considers, and list the others by type.

    Args:
        targets: every weight of the model, from `find_targets` or `list_weights`.
        layers: names of the layers in the plan.
        unseen: names of layers that never ran in calibration.

    >>> from tensornet.nn.targets import list_weights
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LayerNorm(8))
    >>> print(measure_reach(list_weights(model), ["0"]))
    reached 72.7 % of 88 parameters; not reached: LayerNorm 16, biases 8
    """
    planned, never_ran = set(layers), set(unseen)
    excluded: Counter[str] = Counter()
    unknown: Counter[str] = Counter()
    reached = 0
    for target in targets:
        size = target.weight.numel()
        if not planned.isdisjoint(target.names):
            reached += size
        elif target.name in never_ran:
            unknown[f"{target.type_name} ({UNSEEN})"] += size
        elif target.by_choice or not target.skip:
            excluded[target.type_name] += size
        elif target.skip == BIAS:
            unknown[BIASES] += size
        else:
            reason = "" if target.skip == UNKNOWN else f" ({target.skip})"
            unknown[f"{target.type_name}{reason}"] += size
    total = reached + excluded.total() + unknown.total()
    return Reach(total, reached, _by_size(excluded), _by_size(unknown))


def compact_count(value: float) -> str:
    """Format a count with three significant digits.

    >>> compact_count(940800)
    '941k'
    """
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{f'{value / size:#.3g}'.rstrip('.')}{unit}"
    return f"{value:g}"


def _by_size(sizes: Counter[str]) -> dict[str, int]:
    return dict(sorted(sizes.items(), key=lambda item: (-item[1], item[0])))


def _listed(sizes: Mapping[str, int]) -> str:
    named = [f"{name} {compact_count(size)}" for name, size in list(sizes.items())[:_NAMED]]
    if rest := sum(list(sizes.values())[_NAMED:]):
        named.append(f"{len(sizes) - _NAMED} other types {compact_count(rest)}")
    return ", ".join(named)
