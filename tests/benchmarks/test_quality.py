"""The quality benchmarks run at toy size, resume, and their page says what their records say."""

from __future__ import annotations

import importlib
import json
import math
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from transformers import BertConfig, BertModel, BertTokenizerFast

from tensornet_hf.embedded import calibration_text, gpt2_path, heldout_text

ROOT = Path(__file__).resolve().parents[2]
TABLES = ("quality", "forecast", "sources", "healing", "samples", "encoder", "encoder forecast")
WORDS = ["the", "river", "runs", "past", "a", "mill", "and", "two", "old", "trees", "to", "sea", "of", "corn"]
TOY = [
    "--windows",
    "6",
    "--calibration",
    "24",
    "--length",
    "64",
    "--heal-seconds",
    "2",
    "--refine-windows",
    "8",
]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a benchmark; what it replaces in the library is put back."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    module = importlib.import_module("tensornet.topologies.low_rank")
    monkeypatch.setattr(module, "weighted_svd", module.weighted_svd)
    monkeypatch.setattr(module.LowRankFamily, "ladder", module.LowRankFamily.ladder)

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


def page(path: Path, paragraphs: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("<html><body>" + "".join(f"<p>{text}</p>" for text in paragraphs) + "</body></html>")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """The embedded GPT-2 and a random encoder in place of the real models, and three texts."""
    shutil.copytree(gpt2_path(), tmp_path / "smollm2")
    encoder = tmp_path / "minilm"
    encoder.mkdir()
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (encoder / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizerFast(vocab=str(encoder / "vocab.txt")).save_pretrained(encoder)
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 44}
    BertModel(BertConfig(vocab_size=len(vocabulary), **sizes)).save_pretrained(encoder)
    docs = tmp_path / "texts" / "usr" / "share" / "doc"
    known = calibration_text()[:40_000].split("\n")
    page(docs / "python3.13/html/tutorial/a.html", known[: len(known) // 2] + phrases(60))
    page(docs / "debian-handbook/html/en-US/a.html", heldout_text()[:20_000].split("\n") + phrases(40))
    page(docs / "postgresql-doc-17/html/a.html", known[len(known) // 2 :] + phrases(3))
    for part in ("admin-guide", "process", "filesystems"):
        page(docs / f"linux-doc-6.12/html/{part}/a.html", calibration_text()[40_000:50_000].split("\n"))
    return tmp_path


def phrases(count: int) -> list[str]:
    """Paragraphs long enough for the encoder's task."""
    return [
        " ".join((WORDS[k % 14 :] + WORDS[: k % 14])[: 5 + k % 9] * 12)[:600].ljust(300) for k in range(count)
    ]


def test_rows_are_measured_once_and_kept(cache: Path, load: Any) -> None:
    quality = load("quality")
    table = [
        quality.Job("dense", "-", 1.0),
        *quality.jobs("ours", "all", 80),
        *quality.jobs("ours", "mlp", 80, 40),
        *quality.jobs("svd_llm", "mlp", 40),
        *quality.jobs("svd", "mlp", 40),
        *quality.jobs("ours", "mlp", 40, after="refined"),
        *quality.jobs("ours", "mlp", 40, after="healed"),
        *quality.jobs("mpo2", "mlp", 80),
    ]
    command = [str(cache), *TOY, "--out", str(cache / "out")]
    path = quality.main(command, table[:2])
    first = json.loads(path.read_text())["rows"]
    assert quality.main(command, table) == path
    rows = json.loads(path.read_text())["rows"]
    assert rows[:2] == first  # not measured again
    assert [(row["method"], row["layers"], row["ratio"], row["after"]) for row in rows] == [
        (job.method, job.layers, job.ratio, job.after) for job in table
    ]
    found = {(row["method"], row["ratio"], row["after"]): row for row in rows if row["layers"] != "all"}
    dense, ours = found["dense", 1.0, ""], found["ours", 0.4, ""]
    assert dense["perplexity"] == pytest.approx(math.exp(dense["loss"]))
    assert dense["perplexity"] < found["ours", 0.8, ""]["perplexity"] < ours["perplexity"]
    assert ours["perplexity"] < found["svd", 0.4, ""]["perplexity"]
    healed = found["ours", 0.4, "healed"]  # two seconds change little, but do no harm
    assert healed["perplexity"] != ours["perplexity"]
    assert healed["perplexity"] < 1.05 * ours["perplexity"]
    assert healed["heal_seconds"] >= 2
    assert all(row["kept"] <= row["ratio"] + 1e-9 for row in rows[1:])
    assert all((row["predicted_rise"] is not None) == _has_forecast(row) for row in rows[1:])
    assert all(len(row["sample"]) > len("To install a package") for row in rows)


def test_moments_of_two_texts_then_refitted_then_healed(cache: Path, load: Any) -> None:
    quality = load("quality")
    table = quality.jobs("ours_two_texts", "mlp", 40, after="refined, healed")
    path = quality.main([str(cache), *TOY, "--out", str(cache / "out")], table)
    (row,) = json.loads(path.read_text())["rows"]
    assert row["heal_steps"] > 0
    assert row["refine_tokens"] == 8 * 64
    stats = quality.tn.CalibrationStats.load(cache / "moments-calibration-kernel-24.safetensors")
    assert stats.tokens == 24 * 64
    assert stats.source.count("12 x 64 tokens") == 2


def _has_forecast(row: dict[str, Any]) -> bool:
    return row["method"] not in ("svd", "svd_llm") and not row["after"]


def test_the_table_has_every_row_once(load: Any) -> None:
    quality = load("quality")
    assert len(set(quality.TABLE)) == len(quality.TABLE)
    assert all(job.method in quality.METHODS for job in quality.TABLE[1:])


def test_part_of_a_preparation_is_that_of_the_part(cache: Path, load: Any) -> None:
    quality = load("quality")
    bench = quality.Bench(cache, 2, 4, 0.0, 2, 64)
    model = bench.model()
    alone = bench.prepare(quality.Job("ours", "mlp", 0.5), model).plan()
    bench.prepared.clear()
    bench.prepare(quality.Job("ours", "all", 0.5), model)
    assert bench.prepare(quality.Job("ours", "mlp", 0.5), model).plan(param_ratio=0.5) == alone


def test_encoder(cache: Path, load: Any) -> None:
    encoder = load("encoder")
    command = [str(cache), "--pairs", "20", "--calibration", "32", "--ratios", "0.6", "--heal-seconds", "1"]
    rows = json.loads(encoder.main([*command, "--out", str(cache / "out")]).read_text())["rows"]
    kinds = [(row["layers"], row["method"], row["after"]) for row in rows]
    corrected = [("all", "ours", after) for after in ("", "refined", "healed")]
    others = [("all", "svd_llm", ""), ("all", "svd", ""), ("mlp", "ours", ""), ("mlp", "svd_llm", "")]
    assert kinds == [("-", "dense", ""), *corrected, *others]
    assert rows[0]["cosine"] == 1
    assert all(0 < row["cosine"] < 1 and row.get("kept", 0) <= 0.6 for row in rows[1:])
    by_kind = dict(zip(kinds, rows, strict=True))
    ours = by_kind["all", "ours", ""]
    assert ours["cosine"] > by_kind["all", "svd", ""]["cosine"]
    assert all(ours[name] > 0 for name in ("price", "foreseen here", "foreseen elsewhere"))


def rows_of_a_record() -> list[dict[str, Any]]:
    def row(
        method: str, layers: str, ratio: float, loss: float, after: str = "", **more: Any
    ) -> dict[str, Any]:
        told = {"method": method, "layers": layers, "ratio": ratio, "after": after, "loss": loss}
        return {**told, "perplexity": math.exp(loss), "tokens": 100, "sample": f"a | {method}", **more}

    return [
        row("dense", "-", 1.0, 3.0),
        row("ours", "mlp", 0.8, 3.2, predicted_rise=0.25),
        row("ours", "mlp", 0.4, 5.0, predicted_rise=1.5),
        row("ours", "mlp", 0.4, 4.0, "healed", heal_steps=9, heal_tokens=4608, heal_seconds=600.4),
        row("svd_llm", "all", 0.8, 12.0, predicted_rise=None),
    ]


def test_page_shows_the_record(load: Any, tmp_path: Path) -> None:
    page = load("quality_page")
    (tmp_path / "quality.json").write_text(json.dumps({"rows": rows_of_a_record()}))
    foreseen: dict[str, Any] = {"method": "ours", "layers": "mlp", "ratio": 0.8, "price": 0.25}
    for source, value in (("heldout", 0.19), ("training", 0.1), ("calibration", 0.05)):
        foreseen |= {f"foreseen {source}": value, f"rise {source}": 2 * value}
    rows = [foreseen, {**foreseen, "ratio": 0.4}]
    (tmp_path / "forecast.json").write_text(json.dumps({"rows": rows}))
    small = {"method": "ours", "layers": "all", "ratio": 0.6, "after": "", "cosine": 0.9, "top1": 0.4}
    encoder = [{**small, "price": 0.05, "foreseen here": 0.11}]
    (tmp_path / "encoder.json").write_text(json.dumps({"rows": encoder}))
    over = {"chosen divergence over base": 0.98, "reported divergence over base": 1.031}
    choices = [{"variant": name, "ratio": ratio, **over} for name in ("base", "b") for ratio in (0.8, 0.6)]
    (tmp_path / "low_rank_choices.json").write_text(json.dumps({"rows": choices}))
    names = (*TABLES, "choices")
    text = page.filled("\n".join(f"<!-- table {name} -->\nold\n<!-- end -->" for name in names), tmp_path)
    assert "old" not in text
    assert "Dense: 20.09 on 100 tokens." in text
    assert "| MLPs | low rank by curvature (ours) |  | 24.5 |  | 148.4 |  |" in text
    name = "SVD whitened by inputs (SVD-LLM)"
    assert f"| all linear layers | {name} |  | 2e+05 |" in text
    assert "| 80% | 0.200 | 0.250 (+25%) | 0.190 (-5%) |" in text
    line = "| MLPs | 80% | PostgreSQL manual | 0.200 | 0.250 (+25%) | 0.190 (-5%) | **0.100 (-50%)** |"
    assert f"{line} 0.050 (-75%) |" in text
    assert "| MLPs | 40% | PostgreSQL" not in text
    assert "1.500" not in text  # smaller than what forecasts are held to
    assert "| MLPs | 40% | 148.4 | 54.6 | 9 | 4,608 | 600 |" in text
    assert "a \\| svd_llm" in text
    assert "| all linear layers | low rank by curvature (ours) |  |  | 0.900 |  |  |" in text
    assert "| 60% | 0.100 | 0.050 (-50%) | 0.110 (+10%) |  |" in text
    assert "| change | 80%, chosen | 80%, reported | 60%, chosen | 60%, reported |" in text
    assert "| b | -2.0% | +3.1% | -2.0% | +3.1% |" in text
    assert "| base |" not in text
    assert page.filled(text, tmp_path) == text
    page.draw(rows_of_a_record(), tmp_path / "picture.svg")
    assert (tmp_path / "picture.svg").read_text().startswith("<?xml")


def test_the_page_is_that_of_the_records(load: Any) -> None:
    page = load("quality_page")
    text = page.PAGE.read_text()
    assert page.filled(text, page.RECORDS) == text
    assert page.PICTURE.is_file()
    for name in (*TABLES, "choices"):
        assert f"<!-- table {name} -->" in text


def test_forecasts_from_every_source(cache: Path, load: Any) -> None:
    forecast = load("forecast")
    command = [str(cache), "--length", "64", "--calibration", "16", "--windows", "10", "--shares", "0.5"]
    path = forecast.main([*command, "--ratios", "0.6", "--out", str(cache / "out")])
    rows = json.loads(path.read_text())["rows"]
    assert [row["layers"] for row in rows] == ["mlp", "all"]
    for row in rows:
        for source in ("heldout", "training", "calibration"):
            assert row[f"foreseen {source}"] > 0
            assert math.isfinite(row[f"rise {source}"])
