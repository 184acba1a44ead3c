"""Parts of the benchmarks whose errors no toy run would show, against independent truths."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from tensornet.contraction.cost import CPU
from tensornet.testing import reference


def test_functions_are_timed_in_changing_order(load_benchmark: Any) -> None:
    seen: list[str] = []
    names = "abcd"
    load_benchmark("harness").paired_medians(
        {name: lambda name=name: seen.append(name) for name in names}, 50
    )
    rounds = [seen[i : i + 4] for i in range(0, len(seen), 4)]
    assert all(sorted(turn) == list(names) for turn in rounds)
    assert all(a != b for a, b in pairwise(seen))
    assert len(set(pairwise(seen))) == 12


def test_bytes_of_a_module_count_shared_and_hidden_tensors_once(load_benchmark: Any) -> None:
    held_bytes = load_benchmark("harness").held_bytes
    layer = torch.nn.Linear(4, 3)
    assert held_bytes(layer) == 4 * 15
    layer.tied = layer.weight  # type: ignore[assignment]
    hidden = torch.ones(100)
    layer.hook = lambda: hidden.sum()  # type: ignore[assignment]
    assert held_bytes(layer) == 4 * 115


def test_cells_of_a_table_are_escaped_and_short(load_benchmark: Any) -> None:
    found = load_benchmark("harness").table([{"x": 1.23456, "y_z": "p|q"}])
    assert found == "| x | y z |\n|---|---|\n| 1.235 | p/q |"


def test_a_record_states_its_origin_and_its_rows(load_benchmark: Any, tmp_path: Path) -> None:
    path = load_benchmark("harness").record("some", [{"a": 1}], folder=tmp_path, dtype="bfloat16", summary=2)
    content = json.loads(path.read_text())
    assert content.keys() >= {"date", "commit", "dirty", "device", "threads", "versions", "summary"}
    assert (content["dtype"], content["rows"]) == ("bfloat16", [{"a": 1}])


def test_a_copy_says_what_is_rotated_in_it(load_benchmark: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, **heads)).eval()
    model.save_pretrained(tmp_path / "model")
    rotate = load_benchmark("subjects").rotate
    assert rotate(tmp_path / "model", tmp_path / "model") == "residual stream"  # as older copies
    said = "residual stream and value heads"
    for _ in range(2):
        assert rotate(tmp_path / "model", tmp_path / "rotated") == said
    rotated = AutoModelForCausalLM.from_pretrained(tmp_path / "rotated").eval()
    tokens = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        torch.testing.assert_close(rotated(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-4)


def test_pages_give_their_prose_alone(load_benchmark: Any) -> None:
    html = "<head>x</head><h1>A  title</h1><p>One <b>bold</b> word.</p><pre>code</pre><nav><p>x</p></nav>"
    assert load_benchmark("subjects").plain_text(html) == "A title\n\nOne bold word."


def test_decaying_matrix_decays_across_the_last_bond(load_benchmark: Any) -> None:
    module = load_benchmark("decomposition")
    case = module.TOY[0]
    unfolded = reference.unfolding(module.matrix(case, "decaying"), case.out_dims, case.in_dims, 1)
    values = np.linalg.svd(unfolded, compute_uv=False)
    np.testing.assert_allclose(values, np.arange(1, len(values) + 1) ** -0.5, rtol=1e-4)


def test_plain_tt_svd_is_exact_at_full_bonds(load_benchmark: Any) -> None:
    module = load_benchmark("decomposition")
    case = module.TOY[1]
    w = module.matrix(case, "gaussian")
    cores = module.plain(w, case, [24])
    matrix = torch.einsum("aoib,bpjc->opij", *cores).reshape(w.shape)
    torch.testing.assert_close(matrix, w, rtol=1e-4, atol=1e-4)


def test_planned_formats_have_the_shares_of_the_plan(load_benchmark: Any) -> None:
    module = load_benchmark("generation")
    found = module.formats("planned", 210)
    assert {name: found.count(name) for name in module.PLANNED} == module.PLANNED
    made = module.integers(torch.nn.Linear(64, 64), "int4").eval()
    assert bool(made(torch.ones(1, 64, dtype=torch.bfloat16)).isfinite().all())


def test_fitted_constants_predict_better(load_benchmark: Any) -> None:
    module = load_benchmark("fit_machine")
    plans = [module.Case("", *shape).layer().plan for shape in module.SHAPES[:3]]
    truth = replace(CPU, bandwidth=5e9, copy_element=1e-9, overhead=30e-6)
    timed = [
        module.Timed(plan, tokens, {k: module.predict(plan, k, tokens, truth) for k in (0, -1, -2)})
        for plan in plans
        for tokens in (1, 4, 16, 256)
    ]
    fitted = module.fit(timed, CPU)
    assert max(module.choices(timed, fitted)) <= max(module.choices(timed, CPU))
    for name in ("bandwidth", "copy_element", "overhead"):
        before, after = (abs(math.log(getattr(m, name) / getattr(truth, name))) for m in (CPU, fitted))
        assert after < 0.3 * before


def test_fitted_constants_predict_integers(load_benchmark: Any) -> None:
    module = load_benchmark("fit_machine")
    truth = replace(CPU, half_peak=400e9, unpack_pass=1e-9, kernel_peak=5e9)
    formats = [None, *map(module.NumberFormat.parse, ("int8:row", "int3", "int4"))]
    empty = [module.TimedInteger(x, (512, 256), tokens, 0.0) for x in formats for tokens in (1, 16, 64, 1024)]
    timed = [replace(row, seconds=row.predicted(truth)) for row in empty]
    fitted = module.fit_integers(timed, CPU)
    for name in ("half_peak", "unpack_pass", "kernel_peak"):
        assert getattr(fitted, name) == pytest.approx(getattr(truth, name), rel=0.2), name


def test_the_machine_is_fitted_at_toy_size(load_benchmark: Any, capsys: pytest.CaptureFixture[str]) -> None:
    module = load_benchmark("fit_machine")
    fitted = module.main(["--toy"])
    assert min(fitted.peak, fitted.half_peak, fitted.kernel_peak) > 0
    assert "chosen over fastest" in capsys.readouterr().out
