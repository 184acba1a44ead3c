"""Every benchmark runs at toy size, answers a question, and writes a record that states its origin."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
ORIGIN = {"name", "date", "commit", "dirty", "device", "dtype", "threads", "versions", "rows"}
#: Number of rows of the toy record, and keys of each row: time, memory or bytes, and what is compared.
SCRIPTS: dict[str, tuple[int, set[str]]] = {
    "bytes": (
        10,
        {"loss_increase", "standard_error", "bits_per_weight", "seconds", "peak_mib", "unit", "commit"},
    ),
    "gguf_files": (
        1,
        {
            "loss_increase",
            "kl",
            "bytes",
            "asked_bytes",
            "predicted",
            "types",
            "rounding",
            "counts",
            "seconds",
            "peak_mib",
        },
    ),
    "codebooks": (2, {"type", "method", "loss_increase", "kl", "bits_per_weight", "seconds", "commit"}),
    "fp4": (2, {"type", "method", "loss_increase", "kl", "bytes", "predicted", "seconds"}),
    "maps": (1, {"mix", "plan", "ratio", "sum_over_file", "rank_correlation", "cross_ratio", "seconds"}),
    "quality": (9, {"perplexity", "model_bytes", "model_params", "sample"}),
    "generation": (13, {"tokens_per_second", "times_bfloat16", "held_MiB", "file_MiB"}),
    "chains": (14, {"task", "sites", "milliseconds", "over_tensornet"}),
    "paths": (3, {"network", "over_cotengra", "width_over_cotengra", "sliced_over_cotengra"}),
    "cross": (2, {"case", "package", "error", "evaluations", "bytes", "seconds"}),
    "decomposition": (4, {"milliseconds", "bytes", "error", "speedup"}),
    "forward": (3, {"milliseconds", "bytes", "over_dense"}),
    "planning": (1, {"seconds", "losses", "peak_mib"}),
    "moe_step": (12, {"seconds", "ratio", "asked"}),
    "moe_from_scratch": (12, {"bytes", "seconds", "history", "flops_per_token"}),
    "mpoe_vs_switch": (9, {"loss", "bytes", "seconds_per_step", "expert_parameters"}),
    "scale": (5, {"question", "case"}),
    "schedule": (7, {"workers", "played", "clock", "ratio", "of_perfect", "main_process", "task_seconds"}),
    "fine_tunes": (3, {"bits", "bytes", "kl", "same_top", "seconds", "peak_mib"}),
    "specialists": (3, {"loss", "losses", "ninth", "lost", "rate", "seconds"}),
    "texts": (2, {"calibration", "judged", "kl", "loss_increase", "predicted", "bytes", "seconds"}),
    "speeds": (3, {"format", "bytes", "seconds"}),
    "any_size": (
        1,
        {"shape", "blocks", "workers", "block_seconds", "processor_seconds", "peak_gb", "disk_gb"},
    ),
}


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Run a script once, in a process of its own, and return its record."""
    folder = tmp_path_factory.mktemp("records")

    def run(name: str) -> dict[str, Any]:
        path = folder / f"{name}.json"
        if not path.is_file():
            command = [sys.executable, str(BENCHMARKS / f"{name}.py"), "--toy", "--records", str(folder)]
            if name in ("moe_from_scratch", "mpoe_vs_switch"):
                command += ["--state", str(folder / f"state-{name}")]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr[-3000:]
        return dict(json.loads(path.read_text()))

    return run


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_toy_run_writes_a_record(name: str, records: Any) -> None:
    docstring = (BENCHMARKS / f"{name}.py").read_text().removeprefix('"""')
    assert docstring.splitlines()[0].endswith("?")
    record = records(name)
    count, keys = SCRIPTS[name]
    assert record.keys() >= ORIGIN
    assert len(record["rows"]) == count
    assert all(row.keys() >= keys for row in record["rows"])


def test_bytes_are_kept_and_only_missing_rows_are_measured(
    records: Any, load_benchmark: Any, tmp_path: Path
) -> None:
    rows = records("bytes")["rows"]
    assert all(row["bits_per_weight"] <= row["bits"] for row in rows)
    (tmp_path / "bytes.json").write_text(
        json.dumps({"rows": [{**row, "loss_increase": 7.0} for row in rows[1:]]})
    )
    module = load_benchmark("bytes")
    path = module.main(["--toy", "--records", str(tmp_path)])
    again = json.loads(path.read_text())["rows"]
    assert [row["loss_increase"] == 7.0 for row in again] == [True] * 9 + [False]
    assert again[-1]["loss_increase"] == pytest.approx(rows[0]["loss_increase"], rel=1e-3)


def test_files_of_llama_cpp_have_the_size_that_was_asked_for(
    records: Any, load_benchmark: Any, tmp_path: Path
) -> None:
    (row,) = records("gguf_files")["rows"]
    assert row["bytes"] == pytest.approx(row["asked_bytes"], rel=0.01)
    assert row["bytes"] <= row["asked_bytes"]
    preset = {**row, "name": "Q4_0", "size": "Q4_0", "types": "preset", "rounding": "llama-quantize"}
    load_benchmark("gguf_files").picture([row, preset], ["gpt2"], tmp_path / "x.svg")
    assert "Q4_0" in (tmp_path / "x.svg").read_text()
    plan = {**row, "types": "plan", "rounding": "tensornet", "effort": "fast", "formats": "gguf"}
    files = [{**x, "size": size} for x in (plan, preset) for size in ("Q4_K_M", "Q2_K")]
    load_benchmark("gguf_files").bars(files, "gpt2", tmp_path / "bars.svg")
    assert (tmp_path / "bars.svg").read_text().count("tensornet") == 2


def test_feedback_into_codebooks_beats_llama_cpp(records: Any) -> None:
    theirs, ours = records("codebooks")["rows"]
    assert theirs["type"] == ours["type"]
    assert ours["kl"][0] < theirs["kl"][0]


def test_methods_of_quality_keep_their_budget_and_their_order(records: Any) -> None:
    rows = {(row["method"], row["ratio"], row["after"]): row for row in records("quality")["rows"]}
    assert all(row["kept"] <= row["ratio"] + 1e-9 for row in rows.values() if row["method"] != "dense")
    dense, ours = rows["dense", 1.0, ""], rows["ours", 0.4, ""]
    assert dense["perplexity"] < ours["perplexity"] < rows["svd", 0.4, ""]["perplexity"]
    assert rows["ours", 0.4, "healed"]["perplexity"] < 1.05 * ours["perplexity"]
    assert rows["ours_two_texts", 0.4, "refined, healed"]["refine_tokens"] == 8 * 64


def test_integers_take_fewer_bytes_and_are_compared_with_bfloat16(records: Any) -> None:
    rows = {row["side"]: row for row in records("generation")["rows"] if row["tokens"] == 1}
    assert rows["bfloat16"]["times_bfloat16"] == 1
    assert rows["int4"]["file_MiB"] < rows["int8:row"]["file_MiB"] < rows["bfloat16"]["file_MiB"]
    assert rows["int4"]["held_MiB"] < rows["bfloat16"]["held_MiB"] < rows["float32"]["held_MiB"]


def test_rounding_with_more_feedback_causes_less_loss(
    records: Any, load_benchmark: Any, tmp_path: Path
) -> None:
    (row,) = records("planning")["rows"]
    four, two = row["losses"]["4.25"], row["losses"]["2.25"]
    assert four["loss_increase"] < two["loss_increase"]
    for each in (four, two):
        assert each["predicted"] == pytest.approx(each["loss_increase"], rel=0.3)
    module = load_benchmark("planning")
    predicted_loss = module.measure_rounding(64, "int3", 1)["predicted_loss"]
    assert predicted_loss["two_sided"] < predicted_loss["one_sided"] < predicted_loss["nearest"]


def test_equal_bonds_give_equal_errors(records: Any) -> None:
    for row in records("decomposition")["rows"]:
        assert len({tuple(bonds) for bonds in row["bonds"].values()}) == 1
        assert row["error_ratio"] <= 1.01


def test_a_file_of_one_type_is_forecast_as_published(
    records: Any, load_benchmark: Any, tmp_path: Path
) -> None:
    module = load_benchmark("maps")
    folder = module.toy(tmp_path) / "models" / "toy"
    damage = module.read_map([folder / "kld_results.csv", folder / "group0" / "kld_results.csv"])
    tensors = module.read_sizes([folder / "group0" / "tensors.bf16.map"])
    for kind, published in damage.files.items():
        surveyed = module.forecast(damage, tensors, [kind])
        assert sum(x.losses[kind] for x in surveyed) == pytest.approx(published)
    (row,) = records("maps")["rows"]
    assert row["plan"] < row["mix"]
