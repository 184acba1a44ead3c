"""Compressing the experts of a trained mixture: within the budget, by moments of each expert's own tokens."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import tensornet_hf

TEXT = Path(tensornet_hf.__file__).parent / "data" / "heldout.txt"
ROW = "fine, E = 5"


@pytest.fixture
def script(load_benchmark: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    return load_benchmark("trained_stacks")


def test_the_script_compresses_a_trained_mixture(script: ModuleType, tmp_path: Path) -> None:
    state = tmp_path / "state"
    bench = importlib.import_module("moe_from_scratch")
    folders = ["--state", str(state), "--out", str(tmp_path)]
    bench.main([str(TEXT), "--toy", *folders, "--rows", ROW, "--tokens", "0.0001"])
    call = [str(TEXT), "--toy", *folders, "--row", ROW, "--batches", "4", "--sweeps", "3"]
    rows = json.loads(script.main(call).read_text())["rows"]
    stored = json.loads(next(state.glob("*.json")).read_text())
    found = {(row["keep"], row["method"], row["weighting"]): row for row in rows}
    assert len(found) == len(rows)
    assert {weighting for _, _, weighting in found} == {"none", "inputs", "two sides"}
    for row in rows:
        assert row["parameters"] <= row["keep"] * row["of"]
        assert row["of"] == 2 * 2 * 5 * 64 * 64
        assert row["dense_loss"] == pytest.approx(stored["history"][-1]["loss"], abs=1e-6)
    for keep in script.KEEP:
        # What is minimised is least, and a choice is no worse than what it chooses from.
        plain, weighted = (found[keep, "SVD of each", weighting] for weighting in ("none", "two sides"))
        assert plain["error"] < weighted["error"]
        assert weighted["predicted"] < plain["predicted"]
        assert found[keep, "best of these", "two sides"]["predicted"] <= weighted["predicted"]
    errors = [found[keep, "SVD of each", "none"]["error"] for keep in script.KEEP]
    assert errors == sorted(errors)


def test_refuses_a_row_that_was_not_trained(script: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"no run of 'fine, E = 5'.*train it"):
        script.main([str(TEXT), "--toy", "--state", str(tmp_path), "--row", ROW])


def test_moments_are_those_of_the_tokens_of_each_expert(script: ModuleType) -> None:
    rows = importlib.import_module("scratch_rows")
    sizes = rows.Sizes(width=64, hidden=256, layers=1, heads=2, context=8, vocabulary=300)
    model = rows.build(script.ROWS[ROW], sizes, seed=0).eval()
    ids = torch.randint(300, (6, 8), generator=torch.Generator().manual_seed(0))
    layer, seen = model.transformer.h[0].mlp, []
    hook = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    with torch.no_grad():
        model(input_ids=ids)
    hook.remove()
    tokens = seen[0].reshape(-1, 64)
    chosen = layer.router(tokens).expert_indices
    (up, down) = script.stacks_of(model, [ids])
    assert (up.place, down.place) == ("transformer.h.0.mlp.experts.up", "transformer.h.0.mlp.experts.down")
    for e, weighting in enumerate(up.weightings):
        own = tokens[(chosen == e).any(1)].double()
        want = own.T @ own / len(own)
        want.diagonal().add_(script.COLUMN_DAMPING * want.diagonal().mean())
        assert torch.allclose(weighting.columns.double(), want, atol=1e-5), e
    assert torch.equal(up.weights, layer.experts.bank("up").expert_matrices().detach())
