"""Recipes from published measurements of single tensors, without the model.

Some people measure the KL divergence of a model in which one tensor is stored in a few bits, for every
tensor, and that of whole files for every type. Such a map is a CSV file of the GGUF-Tool-Suite: each row is a
type, each column a tensor. Its sizes are in files with a line for each tensor of a GGUF file.

The divergence of a tensor in a type is forecast as its share in the sum over all tensors, times the
divergence of a whole file of this type. Shares hardly depend on the type, so one measured row is enough.
Forecasts of tensors are added up. So the forecast of a file with a single type is its published divergence.
"""

import csv
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tensornet.compression.config import CompressionConfig
from tensornet.errors import FormatError, TargetError
from tensornet_hf.recipes import (
    TYPES,
    PricedTensor,
    Recipe,
    budget_of_tensors,
    check_one_budget,
    choose_types,
    type_bytes,
    with_types,
)
from tensornet_hf.text import first_line

#: Column of the divergences of whole files.
WHOLE = "group0"
#: Sum over single tensors, divided by the divergence of the whole file, above which a map is doubtful.
DOUBTFUL = 2.0
#: Texts that stand for a divergence that was not measured.
MISSING = ("", "404")
#: Type of matrices that were not measured.
UNMEASURED = "Q8_0"
_LINE = re.compile(
    r"[^:]*:[^:]*:(?P<name>[^:]+):shape=\((?P<shape>[\d, ]*)\):dtype=(?P<kind>\w+):.*?bytes=(?P<size>\d+)"
)


@dataclass(frozen=True)
class DamageMap:
    """Published divergences of a model.

    Args:
        tensors: KL divergence with only one tensor in a type, by type and name of the tensor.
        files: KL divergence of files with one type for all tensors, by type.
    """

    tensors: Mapping[str, Mapping[str, float]]
    files: Mapping[str, float]

    def shares(self, kind: str) -> dict[str, float]:
        """Return the share of each tensor in the damage of a file of this type.

        They are those of the measured type whose whole file has the most similar divergence.
        """
        near = kind
        if kind not in self.tensors:
            known = self.files.get(kind, 0.0)

            def gap(other: str) -> float:
                found = self.files.get(other, 0.0)
                return abs(math.log(found / known)) if found > 0 and known > 0 else math.inf

            near = min(self.tensors, key=gap)
        row = self.tensors[near]
        total = sum(row.values())
        return {name: value / total if total > 0 else 0.0 for name, value in row.items()}

    def losses(self, kind: str) -> dict[str, float]:
        """Forecast the divergence that each tensor causes in a type; empty if the type is unknown."""
        if kind in self.files:
            return {name: share * self.files[kind] for name, share in self.shares(kind).items()}
        return dict(self.tensors.get(kind, {}))


def read_map(files: Sequence[str | Path]) -> DamageMap:
    """Read CSV files of divergences: of single tensors, and of whole files (column `group0`).

    Raises:
        FormatError: a file cannot be read or has another form, or no file has divergences of single tensors.
    """
    tensors: dict[str, dict[str, float]] = {}
    whole: dict[str, float] = {}
    for file in files:
        try:
            header, *rows = list(csv.reader(Path(file).read_text().splitlines()))
            if header[0] != "QTYPE" or len(header) < 2:
                raise ValueError(f"the first column is {header[0]!r:.40}")
            for row in rows:
                found = {
                    name: _divergence(text)
                    for name, text in zip(header[1:], row[1:], strict=True)
                    if text not in MISSING
                }
                if WHOLE in found:
                    whole[row[0].upper()] = found.pop(WHOLE)
                if found:
                    tensors.setdefault(row[0].upper(), {}).update(found)
        except (OSError, ValueError, IndexError) as error:
            raise FormatError(
                f"{file} is not a map of divergences: {first_line(error)}. Give a CSV file whose first "
                "column is QTYPE, with a row for each type and a column for each tensor."
            ) from error
    if not tensors:
        raise FormatError(
            f"{' and '.join(map(str, files))} contain no divergences of single tensors; give "
            "kld_results.csv of the model's folder too."
        )
    return DamageMap(tensors, whole)


def _divergence(text: str) -> float:
    """Parse a divergence; noise of the measurement may make it negative."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"a divergence is {text}")
    return max(value, 0.0)


def read_sizes(files: Sequence[str | Path]) -> dict[str, tuple[tuple[int, ...], dict[str, int]]]:
    """Read files with a line for each tensor, `file:hash:NAME:shape=(in, out):dtype=TYPE:...:bytes=N`.

    Returns:
        For each tensor its shape `(..., out, in)`, and its bytes by type.

    Raises:
        FormatError: a file cannot be read or has another form, or two files differ in a shape.
    """
    found: dict[str, tuple[tuple[int, ...], dict[str, int]]] = {}
    for file in files:
        try:
            for line in Path(file).read_text().splitlines():
                if not line.strip():
                    continue
                match = _LINE.fullmatch(line.partition(":imatrix=")[0].strip())
                if match is None:
                    raise ValueError(f"a line is {line:.60}")
                shape = tuple(int(x) for x in reversed(match["shape"].split(",")) if x.strip())
                while len(shape) > 1 and shape[0] == 1:  # files differ in whether they list these
                    shape = shape[1:]
                known = found.setdefault(match["name"], (shape, {}))
                if known[0] != shape:
                    raise ValueError(f"{match['name']} has the shapes {known[0]} and {shape}")
                known[1][match["kind"].upper()] = int(match["size"])
        except (OSError, ValueError) as error:
            raise FormatError(
                f"{file} does not list the tensors of this model: {first_line(error)}. Give a tensors.*.map "
                "file."
            ) from error
    return found


def price_map(
    damage: DamageMap, tensors: Mapping[str, tuple[tuple[int, ...], Mapping[str, int]]], kinds: Sequence[str]
) -> list[PricedTensor]:
    """Price each measured tensor in the types that fit its rows.

    Args:
        damage: the divergences.
        tensors: shapes and sizes (see `read_sizes`); sizes in other types of llama.cpp are computed.
        kinds: types of the recipe.

    Raises:
        TargetError: a measured tensor is not among `tensors`.
        FormatError: nothing is known of the divergence in any of these types, or none of them fits a tensor.
    """
    names = list(dict.fromkeys(name for row in damage.tensors.values() for name in row))
    if other := [name for name in names if name not in tensors]:
        raise TargetError(
            f"The map belongs to another model: it measures {other[0]!r} ({len(other)} of {len(names)} "
            "tensors), which the sizes do not list. Give the tensors.*.map of this model."
        )
    losses = {kind: damage.losses(kind) for kind in kinds}
    if not any(losses.values()):
        raise FormatError(
            f"The map says nothing about the types {', '.join(kinds).lower()}; it has measured "
            f"{', '.join({*damage.tensors, *damage.files}).lower()}. Give the divergences of whole files too "
            "(group0/kld_results.csv), or other types."
        )
    found = []
    for name in names:
        shape, known = tensors[name]
        sizes = {kind: known[kind] if kind in known else type_bytes(kind, shape) for kind in kinds}
        fitting = {kind: size for kind, size in sizes.items() if size is not None and name in losses[kind]}
        each = {kind: losses[kind][name] for kind in fitting}
        found.append(with_types(PricedTensor(name, fitting, each, each), kinds))
    return found


def plan_map(
    maps: Sequence[str | Path],
    sizes: Sequence[str | Path],
    config: CompressionConfig,
    types: Sequence[str] = (),
) -> Recipe:
    r"""Plan the types of a model's tensors from published measurements.

    Args:
        maps: CSV files of divergences (see `read_map`).
        sizes: files of sizes (see `read_sizes`); one is enough for the types of llama.cpp.
        config: a budget, `max_bytes` (of all tensors) or `bits_per_weight` (mean over the measured ones).
        types: types that the recipe may use; by default, those of llama.cpp whose divergence is known.

    Raises:
        OptionError: the configuration has another budget.
        FormatError, TargetError: see `read_map`, `read_sizes` and `price_map`.
        BudgetError: the budget cannot be met.
        MissingDependencyError: the package `gguf` is not installed.

    Example:
        >>> from pathlib import Path
        >>> _ = Path("kld_results.csv").write_text("QTYPE,a.weight,b.weight\nq4_0,0.2,0.01\nq8_0,0.01,0.0\n")
        >>> lines = [f"m.gguf:0:{x}.weight:shape=(64, 2):dtype=bf16:elements=128:bytes=256" for x in "ab"]
        >>> _ = Path("tensors.map").write_text("\n".join(lines))
        >>> config = tn.CompressionConfig(bits_per_weight=6.5)
        >>> th.plan_map(["kld_results.csv"], ["tensors.map"], config).types
        {'a.weight': 'Q8_0', 'b.weight': 'Q4_0'}
    """
    check_one_budget(config)
    damage, tensors = read_map(maps), read_sizes(sizes)
    known = {*damage.tensors, *damage.files}
    kinds = tuple(x.upper() for x in types) or tuple(x for x in TYPES if x in known) or TYPES
    priced = price_map(damage, tensors, kinds)
    measured = {x.name for x in priced}
    rest = {}
    for name, (shape, stored) in tensors.items():
        if name not in measured and len(shape) > 1 and "F32" not in stored:
            rest[name] = (UNMEASURED if type_bytes(UNMEASURED, shape) is not None else "BF16", shape)
    vectors = sum(
        min(stored.values())
        for name, (_, stored) in tensors.items()
        if name not in measured and name not in rest
    )
    more = {name: type_bytes(kind, shape) or 0 for name, (kind, shape) in rest.items()}
    fixed = vectors + sum(more.values())
    weights = sum(math.prod(tensors[name][0]) for name in measured)
    chosen = choose_types(priced, budget_of_tensors(config, fixed, weights))
    by_name = {x.name: x for x in priced}
    notes = ["metadata and vocabulary of the file, some megabytes, are not counted"]
    exact = [kind for kind, value in damage.files.items() if value == 0 and kind not in ("BF16", "F16")]
    if exact:
        notes.append(
            f"the map compares with a file of {exact[0]}; nothing is known of what such a file loses"
        )
    sums = {
        kind: sum(row.values()) / (damage.files.get(kind) or math.inf) for kind, row in damage.tensors.items()
    }
    most = max(sums.values())
    if most > DOUBTFUL:
        notes.append(
            f"single tensors add up to {most:.2g} times the divergence of a file; so their measurements "
            "have a floor, as in mixtures: the plan protects small tensors too much, the forecast is too low"
        )
    if rest:
        shown = ", ".join(list(rest)[:3]) + (", ..." if len(rest) > 3 else "")
        notes.append(f"{len(rest)} tensors were not measured and get {UNMEASURED}: {shown}")
    return Recipe(
        {**chosen, **{name: kind for name, (kind, _) in rest.items()}},
        {**{name: by_name[name].sizes[kind] for name, kind in chosen.items()}, **more},
        None,
        sum(by_name[name].losses[kind] for name, kind in chosen.items()),
        "KL divergence in nats per token, added up from published measurements",
        tuple(notes),
    )
