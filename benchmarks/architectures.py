"""Which architectures of transformers are compressed, saved, loaded and trained correctly?

    python benchmarks/architectures.py [--record [NAME ...]]

Writes docs/architectures.md and benchmarks/records/architectures.md from the table of the tests and the
record of the last run. With `--record` the named architectures (all by default, which takes some minutes) are
tested first, and the record is updated.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(Path(__file__).parent)]
import architecture_steps as steps
from harness import table
from hf_architectures import EXCEPTIONS, GROUPS, PAGE_ARCHITECTURES

RECORD = ROOT / "benchmarks" / "records" / "architectures.json"
PAGE = ROOT / "docs" / "architectures.md"

TABLES = ROOT / "benchmarks" / "records" / "architectures.md"

HEADER = "# Architectures"
METHOD = (
    "For each class, the tests run the [steps below](#the-steps) on a small model with random weights. This "
    "shows that the code of the class is handled correctly, not how well a trained model can be compressed."
)
COVERAGE = (
    'The numbers in brackets are percentages of the bytes that `target_modules="all"` covers. Most others '
    "are vectors: biases and norms. They are a large part only of models as small as these."
)
WRITTEN = (
    "This page is generated, so do not edit it. Edit the table in `tests/hf_architectures.py`, then run "
    "`python benchmarks/architectures.py`."
)
#: Why the types of modules that hold most of the rest stay dense, by a pattern of their names.
REASONS = {
    "*PositionalEmbedding": "Embeddings of positions compute their rows from a mask or a length. At the "
    "default sizes of these classes, they are at most 1.3 % of the bytes.",
    "*MambaMixer": "`A_log` is not a factor of a matrix product.",
    "Conv?d (groups too small for low rank)": "A group of the convolution has too few inputs for a low rank.",
    "Linear (weight read outside of the layer)": "transformers reads the weight without calling the layer.",
    "*QuantLinear": "The layers already store integers.",
    "QuantEmbedding": "The layers already store integers.",
    "Linear (tied to QuantEmbedding)": "The head shares the weight of a table that stores integers.",
    "ParametrizationList": "A convolution computes its weight from other parameters in each pass.",
    "XLNetRelativeAttention": "The projections of attention are bare parameters, used without a layer.",
    "FunnelRelMultiheadAttention": "The projections of positions are bare parameters, used without a layer.",
}
#: Outcomes of a step, from worst to best.
ORDER = ("fails", "refused", "transformers", "right")


def page(record: Mapping[str, Any]) -> str:
    """Render the page of the documentation: names, steps, and architectures with a problem."""
    counts = Counter(outcome(name) for name in PAGE_ARCHITECTURES)
    tried = len(PAGE_ARCHITECTURES) - counts["transformers"]
    summary = (
        f"Of {tried} architectures of transformers, **{counts['right']} pass every step of our tests**. "
        f"In {counts['refused']} a step is refused, and in {counts['fails']} a step fails. "
        f"{counts['transformers']} more fail even without this library."
    )
    names = [
        {
            "group": title,
            "architectures": ", ".join(f"{x.name} {percent(record[x.name])}".strip() for x in group),
        }
        for title, group in GROUPS.items()
    ]
    way = "\n".join(
        f"- **{name}**: {(step.__doc__ or '').splitlines()[0]}" for name, step in steps.STEPS.items()
    )
    rows = [row(name, record[name]) for name in PAGE_ARCHITECTURES if outcome(name) != "right"]
    others = [{x: each[x] for x in ("architecture", "class", "result")} for each in rows]
    low = [name for name in PAGE_ARCHITECTURES if record[name].get("left")]
    dense: dict[str, list[str]] = {}
    for name in low:
        for label in record[name]["left"]:
            dense.setdefault(reason(label), []).append(name)
    whys = [{"why": why, "architectures": ", ".join(dict.fromkeys(found))} for why, found in dense.items()]
    parts = [
        HEADER,
        summary,
        METHOD,
        COVERAGE,
        table(names),
        "## The steps",
        way,
        "## Architectures that do not pass every step",
        table(others),
        "## What stays dense",
        f"In {len(low)} of these models, less than 95 % of the bytes of matrices are in layers that can be "
        "compressed. [The record](../benchmarks/records/architectures.md) gives shares and types of modules.",
        table(whys),
        "## Limits",
        "- Other classes may work too, since linear layers are found by their type. The report of a "
        "compression counts the parameters that stay dense.",
        WRITTEN,
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def tables(record: Mapping[str, Any]) -> str:
    """Render the record: one row for each architecture."""
    columns = (
        "`parameters` are those of the model in the test. `default` is their share in layers that are "
        "considered for compression with `target_modules=None`, `all` the share with "
        '`target_modules="all"`, `matrices` the same share without vectors. If `matrices` is below 95 %, '
        "`not covered` lists the types of modules with the "
        "rest. No kind of layer describes these types, unless a reason is given in brackets."
    )
    parts = ["# Architectures, one by one", columns, WRITTEN]
    for title, group in GROUPS.items():
        parts += [f"## {title}", table([row(x.name, record[x.name]) for x in group])]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def percent(measured: Mapping[str, Any]) -> str:
    """Return the covered share of the bytes in whole percent, in brackets; empty if it was not measured."""
    return "" if measured.get("all") is None else f"({100 * measured['all']:.0f})"


def reason(label: str) -> str:
    """Return why modules of a type stay dense.

    Raises:
        KeyError: `REASONS` has no reason for this type.
    """
    pattern = next((x for x in REASONS if fnmatchcase(label, x)), None)
    if pattern is None:
        raise KeyError(f"Say in REASONS why {label!r} stays dense.")
    return REASONS[pattern]


def outcome(name: str) -> str:
    """Return the worst outcome of all steps for one architecture."""
    found = {exception.outcome for exception in EXCEPTIONS.get(name, {}).values()} or {"right"}
    return next(x for x in ORDER if x in found)


def row(name: str, measured: Mapping[str, Any]) -> dict[str, Any]:
    by_reason: dict[tuple[str, str], list[str]] = {}
    for step, exception in EXCEPTIONS.get(name, {}).items():
        by_reason.setdefault((exception.outcome, exception.reason), []).append(step)
    notes = [f"{kind} ({', '.join(found)}): {reason}" for (kind, reason), found in by_reason.items()]
    return {
        "architecture": name,
        "class": PAGE_ARCHITECTURES[name].model,
        "parameters": f"{measured['parameters']:,}",
        "default": share(measured.get("usual")),
        "all": share(measured.get("all")),
        "matrices": share(measured.get("matrices")),
        "result": " ".join(notes) or "right",
        "not covered": ", ".join(measured.get("left", ())),
    }


def share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


def measure(names: Sequence[str]) -> dict[str, Any]:
    """Run all steps of some architectures, and return their records.

    Raises:
        SystemExit: a step failed unexpectedly, or succeeded although `EXCEPTIONS` says it always fails.
    """
    record, wrong = {}, []
    for name in names:
        trial = steps.Trial(PAGE_ARCHITECTURES[name])
        for step in steps.steps_of(trial.architecture):
            error = steps.attempt(trial, step)
            expected = EXCEPTIONS.get(name, {}).get(step)
            if expected is None if error is not None else expected is not None and expected.always:
                wrong.append(f"{name}: {step}: {error!r}")
        record[name] = steps.reached(trial)
        trial.close()
        print(name, record[name], flush=True)
    if wrong:
        raise SystemExit("\n".join(wrong))
    return record


def main(arguments: Sequence[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", nargs="*", metavar="NAME")
    if (named := parser.parse_args(arguments).record) is not None:
        record = json.loads(RECORD.read_text()) | measure(named or list(PAGE_ARCHITECTURES))
        rows = [f" {json.dumps(name)}: {json.dumps(record[name])}" for name in PAGE_ARCHITECTURES]
        RECORD.write_text("{\n" + ",\n".join(rows) + "\n}\n")
    record = json.loads(RECORD.read_text())
    TABLES.write_text(tables(record))
    PAGE.write_text(page(record))
    return PAGE


if __name__ == "__main__":
    print(main())
