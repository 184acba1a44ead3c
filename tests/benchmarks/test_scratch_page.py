"""The page of training from scratch shows what the records say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def script(load_benchmark: Callable[[str], Any]) -> Any:
    return load_benchmark("scratch_page")


def run(name: str, kind: str, parameters: int, losses: dict[float, float], **changes: Any) -> dict[str, Any]:
    flops = changes.get("flops", 1_000_000)
    return {
        "row": {"name": name, "kind": kind, "options": changes.get("options", {})},
        "sizes": {"layers": changes.get("layers", 2)},
        "recipe": {"rate": changes.get("rate", 0.012)},
        "seed": changes.get("seed", 0),
        "expert_parameters": parameters,
        "bytes": 4 * parameters,
        "flops_per_token": flops,
        "tokens": 4_000_000,
        "seconds": 100.0,
        "history": [
            {
                "tokens": mark * 1e6 + 320,
                "loss": loss,
                "tune_loss": loss - 1,
                "flops": mark * 1e6 * flops,
                "entropy": None if kind == "dense" else 0.98,
            }
            for mark, loss in losses.items()
        ],
    }


@pytest.fixture
def runs() -> list[dict[str, Any]]:
    return [
        run("dense", "dense", 52_941, {1: 4.0, 2: 3.5}),
        run("dense x2", "dense", 132_352, {1: 3.9, 2: 3.4}, flops=1_400_000),
        run("Switch", "switch", 529_408, {1: 4.1, 2: 3.3, 3: 3.2}),
        run("young", "delta", 52_941, {1: 3.8}),
        run("dense", "dense", 52_941, {1: 4.2}, rate=0.003),
        run("never tuned", "scaled", 52_941, {1: 4.1}, rate=0.003),
        run("dense x2", "dense", 132_352, {1: 3.7}, layers=4),
        run("unborn", "delta", 52_941, {}),
    ]


def test_the_pages_are_made_of_the_records(script: ModuleType) -> None:
    records = {name: script.read(name) for name in script.RECORDS_READ}
    page, short = (path.read_text(encoding="utf-8") for path in script.PAGES)
    assert script.fill(page, records) == page
    assert "| fine, scaled |" in page
    assert script.fill(short, records) == short
    assert all(script.long_table(records["moe_from_scratch"]["rows"]) in text for text in (page, short))


def test_long_runs_are_compared_at_the_last_mark_that_all_have(script: ModuleType, runs: list[Any]) -> None:
    head, _, *lines = script.long_table(runs).splitlines()
    assert "| 1 M | 2 M | 3 M | to dense | to dense x2 | at 2.00 TFLOP |" in head
    assert [line.split(" | ")[0] for line in lines] == ["| Switch", "| dense x2", "| dense"]
    assert "| 0.012 | 529,408 | 1.000 | 2,118 | 1.00 | 4.100 | 3.300 | 3.200 | -0.200 | -0.100 |" in lines[0]
    assert lines[0].endswith("| 0.98 |")
    assert "| 0.012 | 132,352 | 0.250 | 529 | 1.40 | 3.900 | 3.400 |  | -0.100 | +0.000 | 3.643 |" in lines[1]
    assert "| 3.500 |  | +0.000 | +0.100 | 3.500 |" in lines[2]


def test_losses_between_marks_follow_the_logarithm_of_arithmetic(script: ModuleType) -> None:
    one = run("any", "dense", 1, {1: 4.0, 4: 3.0})
    assert script.loss_at(one, 2e12) == pytest.approx(3.5)
    assert script.loss_at(one, 4.01e12) == 3.0
    assert script.loss_at(one, 4.2e12) is None
    assert script.loss_at(one, 0.5e12) is None


def test_all_runs_are_compared_after_a_million_tokens(script: ModuleType, runs: list[Any]) -> None:
    _, _, *lines = script.forms_table(script.compared(runs, 1)).splitlines()
    assert [line.split(" | ")[0] for line in lines] == [
        "| dense x2, 4 layers",
        "| young",
        "| dense x2",
        "| dense",
        "| Switch",
    ]
    assert lines[1] == "| young | 0.012 | 52,941 | 0.100 | 212 | 1.00 | 3.800 | -0.200 | -0.100 |"
    runs.append(run("dense x2", "dense", 132_352, {1: 4.4}, rate=0.003))
    _, _, *lines = script.forms_table(script.untuned(runs)).splitlines()
    assert [line.split(" | ")[0] for line in lines] == ["| never tuned", "| dense", "| dense x2"]
    assert lines[1] == "| dense | 0.003 | 52,941 | 0.100 | 212 | 1.00 | 4.200 | +0.000 | -0.200 |"


def test_a_row_has_the_rate_that_is_best_on_the_tuning_part(script: ModuleType, runs: list[Any]) -> None:
    better = run("dense", "dense", 52_941, {1: 4.5}, rate=0.006)
    better["history"][0]["tune_loss"] = 2.0
    assert script.compared([*runs, better], 1)["dense"] is better
    assert script.compared(runs, 1)["dense"] is runs[0]
    assert script.compared([*runs, better], 2)["dense"] is runs[0]  # the other has not come so far
    assert "never tuned" not in script.compared(runs, 1)
    slow = run("Switch", "switch", 1, {1: 4.0, 2: 3.0}, rate=0.003)
    assert script.compared([slow, run("Switch", "switch", 1, {1: 4.5})], 2)["Switch"] is slow


def test_rates_are_compared_on_the_tuning_part(script: ModuleType, runs: list[Any]) -> None:
    assert script.rates_table(runs).splitlines() == [
        "| row | tokens | rate 0.003 | rate 0.012 |",
        "|---|--:|--:|--:|",
        "| dense | 1 M | 3.200 | 3.000 |",
    ]


def test_seeds_are_compared_at_the_last_mark_of_all(script: ModuleType, runs: list[Any]) -> None:
    more = [
        run("dense", "dense", 52_941, {1: 4.2, 2: 3.6}, seed=1),
        run("Switch", "switch", 529_408, {1: 4.0}, seed=2),
    ]
    assert script.seeds_table([*runs, *more]).splitlines() == [
        "| row | rate | tokens | seed 0 | seed 1 | seed 2 | mean |",
        "|---|--:|--:|--:|--:|--:|--:|",
        "| Switch | 0.012 | 1 M | 4.1000 |  | 4.0000 | 4.0500 |",
        "| dense | 0.012 | 2 M | 3.5000 | 3.6000 |  | 3.5500 |",
    ]


def test_earlier_runs_are_compared_with_their_own_dense_run(script: ModuleType) -> None:
    earlier = [
        run("dense", "dense", 52_941, {1: 3.0, 3: 2.5}),
        run("worse", "scaled", 52_941, {1: 3.25}),
        run("better", "mpoe", 264_704, {1: 2.95, 3: 2.4, 4: 2.3}),
    ]
    assert script.earlier_table(earlier).splitlines()[2:] == [
        "| better | 264,704 | 0.500 | -0.050 | -0.100 |",
        "| dense | 52,941 | 0.100 | +0.000 | +0.000 |",
        "| worse | 52,941 | 0.100 | +0.250 |  |",
    ]


def test_formats_are_compared_with_the_float_model(script: ModuleType) -> None:
    common = {"row": "a", "tokens": 1_001_000, "rate": 0.003, "seed": 0}
    rows = [
        {**common, "format": kind, "feed_forward_bytes": size, "loss": loss}
        for kind, size, loss in (("float", 4000, 4.0), ("int8", 1100, 4.25))
    ]
    rows += [{**rows[0], "seed": 1, "loss": 1.0}, {**rows[0], "rate": 0.1, "loss": 1.0}]
    assert script.formats_table(rows).splitlines()[2:] == [
        "| a | 1 M | float | 4 | 4.000 | +0.0000 |",
        "| a | 1 M | int8 | 1 | 4.250 | +0.2500 |",
    ]


def test_the_picture_shows_both_panels(script: ModuleType, runs: list[Any], tmp_path: Path) -> None:
    script.draw(runs, tmp_path / "picture.svg")
    text = (tmp_path / "picture.svg").read_text()
    assert "held-out loss minus that of the dense model" in text
    assert text.count("Switch") == 2


def test_causes_are_compared_with_runs_of_the_common_record(script: ModuleType) -> None:
    common = [
        run("dense", "dense", 66_176, {1: 4.0, 2: 3.8}, rate=0.006),
        run("dense", "dense", 66_176, {1: 4.5, 2: 4.5}, rate=0.003),
        run("dense", "dense", 66_176, {1: 4.6, 2: 4.6}, rate=0.006, seed=1),
        run("another", "mpoe", 66_176, {1: 3.0}, rate=0.006),
    ]
    causes = [
        run("wide", "mpoe", 264_704, {1: 3.9}, rate=0.006),
        run("begun", "mpoe", 264_704, {0.5: 4.9}, rate=0.006),
    ]
    assert script.causes_table(causes, common).splitlines()[2:] == [
        "| wide | 264,704 | 0.500 | 3.900 |  | -0.100 |  |",
        "| dense | 66,176 | 0.125 | 4.000 | 3.800 | +0.000 | +0.000 |",
    ]


def test_masks_are_compared_with_none_at_the_same_rate(script: ModuleType) -> None:
    sgd = {"options": {"optimizer": "sgd"}}
    common = [
        run("fine, MPOE", "mpoe", 1, {0.5: 4.0}, rate=0.006),
        run("dense", "dense", 1, {1: 3.0}, rate=0.006),
    ]
    masks = [
        run("fine, MPOE, mask 0.5", "mpoe", 1, {0.5: 4.1, 1: 3.9}, rate=0.006),
        run("SGD, fine, MPOE", "mpoe", 1, {0.5: 5.0}, rate=0.1, **sgd),
        run("SGD, fine, MPOE", "mpoe", 1, {0.5: 5.5}, rate=1.0, **sgd),
        run("SGD, fine, MPOE, center frozen", "mpoe", 1, {0.5: 4.9}, rate=0.1, **sgd),
    ]
    assert script.mask_table(masks, common).splitlines()[2:] == [
        "| AdamW | fine, MPOE | 0.006 | 0.5 M | 4.000 | +0.000 |",
        "| AdamW | fine, MPOE, mask 0.5 | 0.006 | 0.5 M | 4.100 | +0.100 |",
        "| SGD | fine, MPOE, center frozen | 0.1 | 0.5 M | 4.900 | -0.100 |",
        "| SGD | fine, MPOE | 0.1 | 0.5 M | 5.000 | +0.000 |",
        "| SGD | fine, MPOE | 1 | 0.5 M | 5.500 | +0.000 |",
    ]


def test_t5_rows_have_their_best_rate_at_the_last_mark_of_all(script: ModuleType) -> None:
    rows = [
        run("dense", "dense", 100, {1: 4.0, 2: 3.5}, rate=0.003),
        run("dense", "dense", 100, {1: 3.9}, rate=0.006),
        run("dense x2", "dense", 200, {1: 3.8, 2: 3.25}),
        run("dense x2", "dense", 200, {1: 3.6, 2: 3.05}, seed=1),
        run("Switch, prob", "switch", 800, {1: 3.7, 2: 3.0, 4: 2.0}),
        run("Switch, prob", "switch", 800, {1: 3.5, 2: 2.9}, rate=0.003, seed=1),
    ]
    head, _, *lines = script.table_of_a_record(rows).splitlines()
    assert head.endswith("| 1 M | 2 M | 4 M | to dense, 2 M | to dense x2, 2 M |")
    assert lines == [  # means over seeds with the rate that is best for the first one
        "| Switch, prob | 0.012 | 1 | 800 | 1.000 | 1.00 | 3.700 | 3.000 | 2.000 | -0.500 | -0.150 |",
        "| dense x2 | 0.012 | 2 | 200 | 0.250 | 1.00 | 3.700 | 3.150 |  | -0.350 | +0.000 |",
        "| dense | 0.003 | 1 | 100 | 0.125 | 1.00 | 4.000 | 3.500 |  | +0.000 | +0.350 |",
    ]


def test_a_shorter_run_of_another_seed_leaves_the_last_mark_as_it_is(script: ModuleType) -> None:
    long = [
        run(name, kind, 100, {1: 4.0, 2: 3.5}, seed=1)
        for name, kind in (("dense", "dense"), ("dense x2", "dense"), ("Switch, prob", "switch"))
    ]
    short = [run("dense", "dense", 100, {1: 3.0}, seed=0)]
    assert script.table_of_a_record([*short, *long]) == script.table_of_a_record(long)


def test_compressed_experts_are_shown_by_what_is_kept(script: ModuleType) -> None:
    rows = [
        {
            "method": "a",
            "weighting": "none",
            "keep": keep,
            "error": 1 - keep,
            "loss": 5 - keep,
            "dense_loss": 4.0,
        }
        for keep in (0.4, 0.8)
    ]
    rows.append({**rows[0], "method": "b", "weighting": "inputs", "error": 0.125})
    assert script.stacks_table(rows).splitlines() == [
        "| method | weights | error, 80% | loss added, 80% | error, 40% | loss added, 40% |",
        "|---|---|--:|--:|--:|--:|",
        "| a | none | 0.20 | +0.2000 | 0.60 | +0.6000 |",
        "| b | inputs |  |  | 0.12 | +0.6000 |",
    ]


def test_the_speed_of_a_step_by_form(script: ModuleType) -> None:
    rows = [
        {"threads": 1, "what": "training step", "ratio": 9.0},
        {"threads": 1, "what": "training step, two-sided ends", "ratio": 1.25},
        {"threads": 1, "what": "training step with AdamW, two-sided ends", "ratio": 1.2},
        {"threads": 1, "what": "training step, dense experts, compiled", "ratio": 0.99},
        {"threads": 1, "what": "training step, two-sided ends, compiled", "ratio": 1.0},
        {"threads": 2, "what": "training step, two-sided ends", "ratio": 1.5},
        {"threads": 1, "what": "inference", "ratio": 8.0},
    ]
    lines = script.speed_table(rows).splitlines()[2:]
    assert lines == [
        "| two-sided ends | 1 | 1.25 | 1.20 | 1.00 |",
        "| dense experts | 1 |  |  | 0.99 |",
        "| two-sided ends | 2 | 1.50 |  |  |",
    ]
