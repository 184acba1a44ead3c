"""Reach of a compression: the parameters of a model that it considers, and the holders of the rest."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from tensornet.nn.layer_kinds import layer_bias, type_and_reason
from tensornet.nn.targets import Target, all_targets, split_by_adapters, users_outside
from tensornet.nn.unfuse import Compound, unfused
from tensornet.nn.weight_readers import weight_readers

#: Entry for the biases of layers whose matrices are reached or left out.
BIASES = "biases"
#: Why a layer stays dense whose owner computes with its weight: no call of the layer could do that instead.
READ = "weight read past the layer"
#: Why a layer stays dense that never ran in calibration.
UNSEEN = "never ran in calibration"
ADAPTER = "of an adapter"
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


def measure_reach(
    model: nn.Module, layers: Collection[str], *, readers: Iterable[str] = (), unseen: Iterable[str] = ()
) -> Reach:
    """Count the parameters of a dense model that a plan considers, and list the others by type.

    Args:
        model: before the plan is carried out; may be on the meta device.
        layers: names of the layers in the plan.
        readers: names of layers whose weight is known to be read past them, beside those that
            `weight_readers` finds.
        unseen: names of layers that never ran in calibration.

    >>> model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    >>> print(measure_reach(model, ["0"]))
    reached 72.7 % of 88 parameters; not reached: LayerNorm 16, biases 8
    """
    names = set(layers)
    excluded: Counter[str] = Counter()
    unknown: Counter[str] = Counter()
    reached = 0
    with unfused(model):
        seen: set[int] = set()
        biases: set[int] = set()
        left = []
        for target in (targets := all_targets(model)):
            seen.add(id(target.weight))
            biases |= {id(layer_bias(module)) for module in target.modules}
            if names.isdisjoint(target.names):
                left.append(target)
            else:
                reached += target.weight.numel()
        reasons = dict.fromkeys(unseen, UNSEEN) | _reasons(model, left, targets, readers)
        for target in left:
            reason = reasons.get(target.name)
            label = target.type_name if reason is None else f"{target.type_name} ({reason})"
            (excluded if reason is None else unknown)[label] += target.weight.numel()
        for module in model.modules():
            for parameter in module._parameters.values():
                if parameter is None or id(parameter) in seen:
                    continue
                seen.add(id(parameter))
                bias = id(parameter) in biases or isinstance(module, Compound)
                unknown[BIASES if bias else type_and_reason(module)] += parameter.numel()
    total = reached + excluded.total() + unknown.total()
    return Reach(total, reached, _by_size(excluded), _by_size(unknown))


def _reasons(
    model: nn.Module, left: list[Target], targets: list[Target], readers: Iterable[str]
) -> dict[str, str]:
    """Find the layers that cannot be compressed among those that no plan names, each with the reason."""
    if not left:
        return {}
    past = weight_readers(model).union(readers)
    reasons = {x.name: READ for x in left if not past.isdisjoint((*x.names, *x.owners))}
    for name, owner in users_outside(model, targets).items():
        reasons[name] = f"tied to {type(model.get_submodule(owner)).__name__}"
    own, _ = split_by_adapters(model, (name for x in left for name in x.names))
    return reasons | {x.name: ADAPTER for x in left if not own.isdisjoint(x.names)}


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
