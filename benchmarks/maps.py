"""What does planning alone gain over llama.cpp's mix of types, by published divergences of single tensors?

    python benchmarks/maps.py FOLDER [--toy]

FOLDER is a clone of https://github.com/Thireus/GGUF-Tool-Suite (MIT licence). Each folder `models/NAME` has
the KL divergence of a model with one tensor in a few bits, for every tensor; that of whole files with one
type for all tensors; and the sizes of the tensors. No weights are needed, and none are rounded. Columns:

- `reference`: the file from which divergences are measured; `mix`: forecast divergence of the types that
  `llama-quantize` gives to Q4_K_M; `plan`: that of a plan of the same bytes; `ratio`: plan over mix, if the
  reference has more than 6 bits.
- `sum_over_file`: sum over all tensors in a measured type, divided by the divergence of the whole file of
  this type. It is 1 if divergences add up; it is far above 1 if single measurements have a floor.
- `adds_up`: False if the forecast means little: the reference has at most 6 bits, or no measured type has a
  `sum_over_file` below 2.
- `rank_correlation`: of tensors between two measured types (Spearman), for models with several types.
- `cross_ratio`: like `ratio`, but the plan is made from one measured type, and plan and mix are compared by
  another one. It shows how much of the gain is noise of one row, for models with several types.
- `seconds`: processor seconds of reading the map and planning.

The divergence of a tensor in a type is forecast as its share in the sum over all tensors, times the
divergence of a whole file of this type. Shares hardly depend on the type, so one measured row is enough.
Forecasts of tensors are added up, so the forecast of a file with a single type is its published divergence.
Nobody has measured the files of these plans. Writes `maps.json`.
"""

from __future__ import annotations

import argparse
import csv
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from scipy.stats import spearmanr

sys.path.insert(0, str(Path(__file__).parent))
from harness import RECORDS, processor_seconds, record

from tensornet_hf.recipes import TYPES, SurveyedTensor, choose_types, type_bytes

#: Column of the divergences of whole files, and texts that stand for a divergence that was not measured.
WHOLE, MISSING = "group0", ("", "404")
#: Sum over single tensors, divided by the divergence of the whole file, above which a map is doubtful.
DOUBTFUL = 2.0
_LINE = re.compile(
    r"[^:]*:[^:]*:(?P<name>[^:]+):shape=\((?P<shape>[\d, ]*)\):dtype=(?P<kind>\w+):.*?bytes=(?P<size>\d+)"
)
#: Types that llama.cpp takes if the rows of a tensor do not fit a type.
INSTEAD = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
#: Rows of maps whose files are hardly models any more are not compared.
MOST = 2.0


#: Shape `(..., out, in)` of each tensor, and its bytes by type.
Sizes = Mapping[str, tuple[tuple[int, ...], Mapping[str, int]]]


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
        """Forecast the divergence that each tensor causes in a type whose whole file was measured."""
        return {name: share * self.files[kind] for name, share in self.shares(kind).items()}


def read_map(files: Sequence[Path]) -> DamageMap:
    """Read CSV files of divergences, with a row for each type: of single tensors, and of whole files."""
    tensors: dict[str, dict[str, float]] = {}
    whole: dict[str, float] = {}
    for file in files:
        header, *rows = list(csv.reader(file.read_text().splitlines()))
        for row in rows:
            found = {
                name: max(float(text), 0.0)  # noise of the measurement may make a divergence negative
                for name, text in zip(header[1:], row[1:], strict=True)
                if text not in MISSING
            }
            if WHOLE in found:
                whole[row[0].upper()] = found.pop(WHOLE)
            if found:
                tensors.setdefault(row[0].upper(), {}).update(found)
    return DamageMap(tensors, whole)


def read_sizes(files: Sequence[Path]) -> Sizes:
    """Read files with a line for each tensor, `file:hash:NAME:shape=(in, out):dtype=TYPE:...:bytes=N`."""
    found: dict[str, tuple[tuple[int, ...], dict[str, int]]] = {}
    for file in files:
        for line in filter(str.strip, file.read_text().splitlines()):
            match = _LINE.fullmatch(line.partition(":imatrix=")[0].strip())
            if match is None:
                raise ValueError(f"{file} has the line {line:.60}.")
            shape = tuple(int(x) for x in reversed(match["shape"].split(",")) if x.strip())
            while len(shape) > 1 and shape[0] == 1:  # files differ in whether they list these
                shape = shape[1:]
            known = found.setdefault(match["name"], (shape, {}))
            if known[0] != shape:
                raise ValueError(f"{match['name']} has the shapes {known[0]} and {shape} in {file}.")
            known[1][match["kind"].upper()] = int(match["size"])
    return found


def forecast(damage: DamageMap, tensors: Sizes, kinds: Sequence[str]) -> list[SurveyedTensor]:
    """Forecast the divergence of each measured tensor in the types that fit its rows."""
    losses = {kind: damage.losses(kind) for kind in kinds}
    found = []
    for name in dict.fromkeys(name for row in damage.tensors.values() for name in row):
        shape, known = tensors[name]
        sizes = {kind: known[kind] if kind in known else type_bytes(kind, shape) for kind in kinds}
        fitting = {kind: size for kind, size in sizes.items() if size is not None and name in losses[kind]}
        each = {kind: losses[kind][name] for kind in fitting}
        found.append(SurveyedTensor(name, fitting, each, each))
    return found


def mixed_type(name: str, blocks: int, tied: bool) -> str:
    """Return the type of a tensor in Q4_K_M, by the rules of `llama-quantize` for models without 8 experts.

    Args:
        name: name of the tensor.
        blocks: number of blocks of the model.
        tied: True if the embedding is the head too.
    """
    found = re.match(r"blk\.(\d+)\.", name)
    index = int(found[1]) if found else 0
    more = index < blocks // 8 or index >= 7 * blocks // 8 or (index - blocks // 8) % 3 == 2
    if name == "output.weight" or (tied and name == "token_embd.weight"):
        return "Q6_K"
    if "attn_qkv" in name:
        return "Q5_K"
    return "Q6_K" if more and ("attn_v." in name or "ffn_down" in name) else "Q4_K"


def mix(tensors: Sizes, names: Sequence[str]) -> dict[str, str]:
    """Return the types of the measured tensors in Q4_K_M, with llama.cpp's fallbacks."""
    blocks = 1 + max(int(x[1]) for name in tensors if (x := re.match(r"blk\.(\d+)\.", name)))
    tied = "output.weight" not in tensors
    kinds = {name: mixed_type(name, blocks, tied) for name in names}
    return {
        name: kind if type_bytes(kind, tensors[name][0]) is not None else INSTEAD[kind]
        for name, kind in kinds.items()
    }


def compared(surveyed: Sequence[SurveyedTensor], mixed: Mapping[str, str]) -> tuple[dict[str, str], int]:
    """Return the plan of the bytes of a mix, and these bytes."""
    size = sum(x.sizes[mixed[x.name]] for x in surveyed)
    return choose_types(surveyed, size), size


def total(surveyed: Sequence[SurveyedTensor], kinds: Mapping[str, str]) -> float:
    return sum(x.losses[kinds[x.name]] for x in surveyed)


def _bits(kind: str, tensors: Sizes) -> float:
    """Return the bits per weight of a type in the first tensor that has it; 16 if none has."""
    for shape, stored in tensors.values():
        if kind in stored and len(shape) > 1:
            return 8 * stored[kind] / math.prod(shape)
    return 16.0


def measure(folder: Path) -> dict[str, Any]:
    """Compare the plan and the mix of one model."""
    start = processor_seconds()
    maps = [folder / "kld_results.csv", folder / "group0" / "kld_results.csv"]
    lists = sorted((folder / "group0").glob("tensors.*.map"))
    damage, tensors = read_map(maps), read_sizes(lists)
    kinds = [x for x in TYPES if x in damage.files]
    surveyed = forecast(damage, tensors, kinds)
    mixed = mix(tensors, [x.name for x in surveyed])
    plan, size = compared(surveyed, mixed)
    seconds = processor_seconds() - start
    counts = {x.name: math.prod(tensors[x.name][0]) for x in surveyed}
    rows = {k: row for k, row in damage.tensors.items() if 0 < damage.files.get(k, math.inf) <= MOST}
    zero = [kind for kind, value in damage.files.items() if value == 0]
    bits = {kind: _bits(kind, tensors) for kind in zero}
    reference = min(bits, key=bits.__getitem__, default="")
    adds = {
        kind: sum(found.values()) / damage.files[kind]
        for kind, found in damage.tensors.items()
        if damage.files.get(kind)
    }
    row: dict[str, Any] = {
        "model": folder.name,
        "weights": sum(counts.values()),
        "tensors": len(surveyed),
        "bytes": size,
        "bits_per_weight": 8 * size / sum(counts.values()),
        "mix": total(surveyed, mixed),
        "plan": total(surveyed, plan),
        "ratio": total(surveyed, plan) / total(surveyed, mixed) if bits.get(reference, 0) > 6 else None,
        "reference": reference,
        "measured": list(damage.tensors),
        "sum_over_file": adds,
        "adds_up": bits.get(reference, 0) > 6
        and min(adds.values(), key=lambda x: abs(math.log(x))) < DOUBTFUL,
        "seconds": seconds,
    }
    if len(rows) > 1:
        shared = [name for name in counts if all(name in x for x in rows.values())]
        row["rank_correlation"] = {
            f"{a} {b}": float(spearmanr([rows[a][x] for x in shared], [rows[b][x] for x in shared]).statistic)
            for a, b in permutations(rows, 2)
            if a < b
        }
        ratios = {}
        for a, b in permutations(rows, 2):
            first, second = (
                forecast(DamageMap({k: {x: rows[k][x] for x in shared}}, damage.files), tensors, kinds)
                for k in (a, b)
            )
            chosen, _ = compared(first, mixed)
            ratios[f"{a} by {b}"] = total(second, chosen) / total(second, mixed)
        row["cross_ratio"] = ratios
    return row


def toy(folder: Path) -> Path:
    """Make a small map in the form of the published ones."""
    model = folder / "models" / "toy"
    (model / "group0").mkdir(parents=True, exist_ok=True)
    names = [f"blk.{k}.{x}.weight" for k in range(4) for x in ("attn_q", "attn_v", "ffn_down")]
    rows = {"iq2_xs": 0.05, "q2_K": 0.08}
    lines = [
        ",".join(["QTYPE", *names]),
        *(
            ",".join([kind, *(f"{scale / (1 + place % 5):.6f}" for place in range(len(names)))])
            for kind, scale in rows.items()
        ),
    ]
    (model / "kld_results.csv").write_text("\n".join(lines))
    whole = {
        "bf16": 0.0,
        "iq2_xs": 0.5,
        "q2_K": 0.8,
        "q4_K": 0.07,
        "q5_K": 0.02,
        "q6_K": 0.005,
        "q8_0": 0.001,
    }
    (model / "group0" / "kld_results.csv").write_text(
        "\n".join(["QTYPE,group0", *(f"{kind},{value}" for kind, value in whole.items())])
    )
    (model / "group0" / "tensors.bf16.map").write_text(
        "\n".join(f"a:b:{x}:shape=(256, 256):dtype=bf16:elements=65536:bytes=131072" for x in names)
    )
    return folder


def main(arguments: Sequence[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, help="clone of the GGUF-Tool-Suite")
    parser.add_argument("--toy", action="store_true", help="a small map that is made here")
    parser.add_argument("--records", type=Path, default=RECORDS)
    given = parser.parse_args(arguments)
    source = toy(given.records / "maps-toy") if given.toy else given.folder
    if source is None:
        parser.error("give the folder of the maps")
    rows = []
    for folder in sorted((source / "models").iterdir()):
        if (folder / "group0" / "kld_results.csv").is_file() and (folder / "kld_results.csv").is_file():
            rows.append(measure(folder))
            print({key: value for key, value in rows[-1].items() if key != "measured"}, flush=True)
    print("geometric mean of the ratios", geometric_mean(row["ratio"] for row in rows if row["adds_up"]))
    return record("maps", sorted(rows, key=lambda row: row["weights"]), folder=given.records)


if __name__ == "__main__":
    print(main())
