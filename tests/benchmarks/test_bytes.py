"""The benchmark of bytes runs, goes on where a run ended, and turning a residual stream changes no output."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast


def test_toy_run_writes_a_record_and_resumes(load_benchmark: Any, tmp_path: Path) -> None:
    module = load_benchmark("bytes")
    path = module.main(["--toy", "--records", str(tmp_path)])
    record = json.loads(path.read_text())
    assert {(row["method"], row["bits"]) for row in record["rows"]} == {
        (method, bits) for method in module.OURS for bits in (4.25, 3.25)
    }
    for row in record["rows"]:
        assert {
            "commit",
            "dirty",
            "device",
            "threads",
            "seed",
            "seconds",
            "unit",
            "dense_loss",
            "standard_error",
        } <= row.keys()
        assert row["bits_per_weight"] <= row["bits"]
        assert row["loss_increase"] == row["loss_increase"]
        assert len(row["sample"].split()) > 2
        assert row["dense_sample"] == record["rows"][0]["dense_sample"]
    assert {"dtype", "device", "versions"} <= record.keys()
    record["rows"] = [{**row, "loss_increase": 7.0} for row in record["rows"][1:]]
    path.write_text(json.dumps(record))
    module.main(["--toy", "--records", str(tmp_path)])
    rows = json.loads(path.read_text())["rows"]
    assert len(rows) == 8
    assert sum(row["loss_increase"] == 7.0 for row in rows) == 7
    assert torch.get_num_threads() == 1


def test_turning_the_residual_stream_changes_weights_and_no_output(
    load_benchmark: Any, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.normal_(1.0 if "norm" in name else 0.0, 0.2)
    model.save_pretrained(tmp_path / "model")
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path / "model")
    load_benchmark("bytes_models").turn(tmp_path / "model", tmp_path / "turned")
    turned = AutoModelForCausalLM.from_pretrained(tmp_path / "turned").eval()
    tokens = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        torch.testing.assert_close(turned(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-4)
    before = model.model.layers[0].mlp.up_proj.weight
    assert (turned.model.layers[0].mlp.up_proj.weight - before).norm() > 0.5 * before.norm()


MEASURED = {"value": 0.005, "standard_error": 0.0001}
NOISE = {"value": 0.0001, "standard_error": 0.001}


def a_row(method: str, bits: float, loss: float, seed: int = 0, **more: Any) -> dict[str, Any]:
    row = {"model": "gpt2", "method": method, "bits": bits, "seed": seed, "loss_increase": loss}
    origin = {"unit": "nats a token", "commit": "c" * 40, "dirty": False, "device": "AMD EPYC"}
    tokens = {"calibration_tokens": 64_000, "judged_tokens": 25_344}
    return {**row, "standard_error": 0.001, **origin, **tokens, **more}


def test_page_shows_the_record(load_benchmark: Any, tmp_path: Path) -> None:
    page = load_benchmark("bytes_page")
    rows = [
        a_row("plan", 4.25, 0.004, predicted={"alone": 0.01}, validation={"judged source": MEASURED}),
        a_row("plan", 4.25, 0.006, seed=1, predicted={"alone": 0.01}, validation={"judged source": MEASURED}),
        a_row("gptq", 4.25, 0.02, peak_mib=900, seconds={"all": 12.0}),
        a_row("hqq", 4.25, 0.03),
        a_row("nearest", 4.25, 0.025),
        a_row("plan", 8.25, 0.0001, predicted={"alone": 0.0001}, validation={"judged source": NOISE}),
        a_row("gptq", 8.25, -0.0001),
        a_row("nearest", 8.25, 0.0002),
    ]
    rows.append({**a_row("autoround", 8.25, 0.0), "refused": "ValueError: 8 bits"})
    del rows[-1]["loss_increase"]
    record = {"rows": rows, "dtype": "float32"}
    names = ("why", "result", "bytes", "forecast", "time", "origin")
    text = page.filled("\n".join(f"<!-- table {name} -->\nold\n<!-- end -->" for name in names), record)
    assert "old" not in text
    assert "plan less best package (standard error) | 0.00020 (0.0014)" in text
    assert "(not measured: round to nearest (torchao))" in text
    assert "0.25x at 4.25 bits (0.0050, 0.020)" in text
    assert "| **one plan (ours)** | 0.00010 |  | 0.0050 ± 0.0010 |" in text
    assert "| auto-round | refused |" in text
    assert "rises by 0.0050 nats; 0.020 by GPTQ (llmcompressor), 0.030 by hqq." in text
    assert "| embedded GPT-2 | 4.25 | 0.0050 (0.0010) | 2.00x | 1.00x |" in text
    assert "| embedded GPT-2 | GPTQ (llmcompressor) | AMD EPYC | 12 in all |  |  |  | 900 |" in text
    assert "not measured yet: two-sided rounding" in text
    written = [
        {
            **a_row("plan", 3.25, 0.1),
            "model": "smollm2",
            "sample": "it\nruns | well",
            "dense_sample": "it ran",
        }
    ]
    assert page.samples_table(written).splitlines()[2:] == [
        "| 32 | dense | it ran |",
        "| 3.25 | **one plan (ours)** | it runs \\| well |",
    ]
    whole = {"share": 0.25, "file_bytes": 8.1e7, "after": "", "perplexity": 27.5, "perplexity_ratio": 1.0571}
    assert page.whole_table([]) == "Not measured yet."
    assert page.whole_table([whole]).endswith("| 25 % | 81.0 | calibration alone | 27.50 | 1.057 |")
    fast = {"device": "EPYC", "threads": 1, "tokens": 16, "mode": "eager"}
    speeds = [
        {**fast, "side": "int4", "times_bfloat16": 1.138, "held_MiB": 111.02},
        {**fast, "side": "bfloat16", "times_bfloat16": 1.0, "held_MiB": 256.567},
        {**fast, "side": "planned", "times_bfloat16": 0.977, "held_MiB": 126.623},
        {**fast, "side": "planned", "mode": "compiled", "times_bfloat16": 0.9, "held_MiB": 126.623},
        {**fast, "side": "int8:row", "times_bfloat16": 0.868, "held_MiB": 155.614},
    ]
    assert page.speed_table(speeds).splitlines()[2:] == [
        "| EPYC | 1 | 16 | 1.14x | 0.98x | 0.87x |",
        "| EPYC | 1 | 16, both compiled |  | 0.90x |  |",
        "| held, MiB (dense 257) | | | 111 | 127 | 156 |",
    ]
    page.draw(rows, tmp_path / "picture.svg")
    assert "<svg" in (tmp_path / "picture.svg").read_text()
