"""Which parameters of a model a plan covers, and which it does not, by type of module."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from tensornet._util import compact_count
from tensornet.nn.targets import BIAS, UNKNOWN, UNSEEN, Target

#: Key under which the biases of compressible layers are counted.
BIASES = "biases"
#: Largest number of types named in one line; further types are summed.
_NAMED = 5


class SourceTensor(NamedTuple):
    """Tensor of the source, and what became of it.

    Args:
        name: name in the files of the source.
        shape: shape there.
        dtype: dtype there, as named in the header of a safetensors file.
        num_bytes: its bytes there.
        became: scheme of the layer, `"dense"` or `"left out"`; several for a stack of matrices.
        reason: why it was not compressed or left out; otherwise empty.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    num_bytes: int
    became: str
    reason: str = ""


@dataclass(frozen=True)
class Coverage:
    """Number of parameters that a plan covers, and of those that it does not; tied parameters count once.

    Args:
        total: number of elements of all parameters.
        covered: number of elements of all planned matrices, including those that stay dense.
        excluded: number of elements of matrices that the configuration excludes, by type of module.
        unknown: number of elements of parameters that cannot be compressed, by type of module, with the
            reason in brackets if the type is known.
    """

    total: int
    covered: int
    excluded: Mapping[str, int]
    unknown: Mapping[str, int]

    @property
    def share(self) -> float:
        """Covered parameters as a fraction of all parameters."""
        return self.covered / self.total if self.total else 0.0

    def __str__(self) -> str:
        parts = [f"covers {self.share:.1%} of {compact_count(self.total)} parameters".replace("%", " %")]
        for label, sizes in (("excluded", self.excluded), ("skipped", self.unknown)):
            if sizes:
                parts.append(f"{label}: {_listed(sizes)}")
        return "; ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """Convert to a JSON-ready dict."""
        return asdict(self) | {"share": self.share}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Coverage":
        """Restore the result of `to_dict`.

        Raises:
            KeyError, TypeError, ValueError: the data is no coverage.
        """
        counts = {name: {str(k): int(n) for k, n in data[name].items()} for name in ("excluded", "unknown")}
        return cls(int(data["total"]), int(data["covered"]), **counts)


def measure_coverage(
    targets: Iterable[Target], layers: Collection[str], *, unseen: Iterable[str] = ()
) -> Coverage:
    """Count the parameters of a dense model that a plan covers, and all others by type of module.

    Args:
        targets: every weight of the model, from `find_targets` or `list_weights`.
        layers: names of the layers in the plan.
        unseen: names of layers that never ran in calibration.
    """
    planned, never_ran = set(layers), set(unseen)
    excluded: Counter[str] = Counter()
    unknown: Counter[str] = Counter()
    covered = 0
    for target in targets:
        size = target.weight.numel()
        if not planned.isdisjoint(target.names):
            covered += size
        elif target.name in never_ran:
            unknown[f"{target.type_name} ({UNSEEN})"] += size
        elif target.by_choice or not target.skip:
            excluded[target.type_name] += size
        elif target.skip == BIAS:
            unknown[BIASES] += size
        else:
            reason = "" if target.skip == UNKNOWN else f" ({target.skip})"
            unknown[f"{target.type_name}{reason}"] += size
    total = covered + excluded.total() + unknown.total()
    return Coverage(total, covered, _by_size(excluded), _by_size(unknown))


def _by_size(sizes: Counter[str]) -> dict[str, int]:
    return dict(sorted(sizes.items(), key=lambda item: (-item[1], item[0])))


def _listed(sizes: Mapping[str, int]) -> str:
    named = [f"{name} {compact_count(size)}" for name, size in list(sizes.items())[:_NAMED]]
    if rest := sum(list(sizes.values())[_NAMED:]):
        named.append(f"{len(sizes) - _NAMED} other types {compact_count(rest)}")
    return ", ".join(named)
