"""The benchmark of training from scratch runs, resumes to the step, and refuses another configuration."""

from __future__ import annotations

import importlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import tensornet_hf

ROOT = Path(__file__).resolve().parents[2]
TEXT = Path(tensornet_hf.__file__).parent / "data" / "heldout.txt"


@pytest.fixture
def bench(load_benchmark: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    return load_benchmark("moe_from_scratch")


@pytest.fixture
def corpus(bench: ModuleType) -> Any:
    return bench.corpus_of(TEXT.read_text(encoding="utf-8"), vocabulary=300)


def start(bench: ModuleType, corpus: Any, name: str, folder: Path, *, seed: int = 0, **changes: Any) -> Any:
    recipe = bench.Recipe(windows=4, warmup=2, judge_windows=4)
    row = replace(bench.ROWS[name], **changes)
    return bench.Run(row, bench.toy_sizes(), recipe, corpus, seed, folder=folder)


def train(run: Any, steps: int) -> None:
    assert run.train(steps * 4 * 8, deadline=time.monotonic() + 600)


def test_the_script_writes_its_record(bench: ModuleType, tmp_path: Path) -> None:
    folders = ["--state", str(tmp_path / "state"), "--out", str(tmp_path)]
    rows = ["dense", "Switch", "base and deltas"]
    path = bench.main([str(TEXT), "--toy", *folders, "--rows", *rows, "--tokens", "0.0001"])
    written = json.loads(path.read_text())
    assert {line["row"]["name"] for line in written["rows"]} == set(rows)
    for line in written["rows"]:
        assert line["tokens"] >= 100
        (point,) = line["history"]
        assert point["loss"] > 0
        assert (point["entropy"] is None) == (line["row"]["name"] == "dense")
        assert line["bytes"] == 4 * line["parameters"] > 4 * line["expert_parameters"]
    sizes = {line["row"]["name"]: line["expert_parameters"] for line in written["rows"]}
    assert sizes["Switch"] == 8 * sizes["dense"]
    assert sizes["dense"] < sizes["base and deltas"] < sizes["Switch"] / 4


def test_no_run_ends_before_its_deadline(bench: ModuleType, tmp_path: Path) -> None:
    folders = ["--state", str(tmp_path), "--out", str(tmp_path)]
    assert (
        bench.main([str(TEXT), "--toy", *folders, "--rows", "dense", "--tokens", "1", "--minutes", "0"])
        is None
    )
    (state,) = tmp_path.glob("*.json")
    assert json.loads(state.read_text())["tokens"] == 32  # one step, on disk


@pytest.mark.parametrize("name", ["MPOE and delta 4", "fine, MPOE, mask 0.5"])
def test_a_resumed_run_repeats_the_uninterrupted_one(
    bench: ModuleType, corpus: Any, tmp_path: Path, name: str
) -> None:
    whole = start(bench, corpus, name, tmp_path / "whole")
    train(whole, 7)
    first = start(bench, corpus, name, tmp_path / "parts")
    train(first, 3)
    torch.manual_seed(99)  # whatever happened in between
    second = start(bench, corpus, name, tmp_path / "parts")
    assert second.step == 3
    train(second, 7)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[name], value), name
    assert all(torch.equal(a, b) for a, b in zip(whole.mean, second.mean, strict=True))
    assert second.history[-1]["loss"] == whole.history[-1]["loss"]


@pytest.mark.parametrize(
    ("changes", "said"), [({"balance": 0.1}, "'row'.*0.01.*0.1"), ({"private_rate": 0.5}, "private_rate")]
)
def test_refuses_to_resume_with_another_configuration(
    bench: ModuleType, corpus: Any, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    train(start(bench, corpus, "Switch", tmp_path), 1)
    with pytest.raises(SystemExit, match=f"(?s)another configuration.*{said}"):
        start(bench, corpus, "Switch", tmp_path, **changes)


def test_refuses_to_resume_on_another_text(bench: ModuleType, corpus: Any, tmp_path: Path) -> None:
    train(start(bench, corpus, "dense", tmp_path), 1)
    other = bench.corpus_of(TEXT.read_text(encoding="utf-8")[:20_000], vocabulary=300)
    with pytest.raises(SystemExit, match="corpus"):
        start(bench, other, "dense", tmp_path)


def test_every_row_trains_all_that_it_has(bench: ModuleType, corpus: Any, tmp_path: Path) -> None:
    for name in bench.ROWS:
        run = start(bench, corpus, name, tmp_path)
        before = [p.detach().clone() for p in run.model.parameters()]
        run._train_step()
        run._train_step()  # what starts at zero hides its partner from the first
        same = [
            n
            for (n, p), old in zip(run.model.named_parameters(), before, strict=True)
            if torch.equal(p, old) and "router" not in n and not ("mask" in run.row.options and "core_1" in n)
        ]
        assert not same, (name, same)


def test_rows_of_a_seed_start_alike_but_for_their_networks(
    bench: ModuleType, corpus: Any, tmp_path: Path
) -> None:
    first, second = (start(bench, corpus, name, tmp_path).model for name in ("dense", "Switch"))
    for name, value in first.state_dict().items():
        if ".mlp." not in name:
            assert torch.equal(second.state_dict()[name], value), name


def test_a_pass_visits_every_window_once(bench: ModuleType, corpus: Any) -> None:
    context, windows = 8, 5
    count = (len(corpus.parts["train"]) - 1) // context
    assert count % windows  # so that a batch lies across two passes
    batches = [
        corpus.batch(step, windows=windows, context=context, seed=0) for step in range(2 * count // windows)
    ]
    seen = torch.cat(batches)
    want = torch.stack([corpus.parts["train"][i * context : (i + 1) * context + 1] for i in range(count)])

    def rows(x: torch.Tensor) -> list[tuple[int, ...]]:
        return sorted(map(tuple, x.tolist()))

    assert rows(seen[:count]) == rows(want)
    assert not torch.equal(seen[:50], seen[count : count + 50])
    again = corpus.batch(3, windows=windows, context=context, seed=0)
    assert torch.equal(again, batches[3])
    assert not torch.equal(corpus.batch(3, windows=windows, context=context, seed=1), again)


def test_paragraphs_are_kept_once(bench: ModuleType) -> None:
    text = importlib.import_module("scratch_text")
    long, other = "a" * 300, "b" * 300
    assert list(text._distinct([long, f"{long}\n\n{other}", long])) == [long, other]
    parts = text.split(map(str, range(80)))
    assert (parts["tune"], parts["test"]) == (["3", "43"], ["23", "63"])
    assert len(parts["train"]) == 76


def test_a_mask_leaves_the_centers_alone(bench: ModuleType, corpus: Any, tmp_path: Path) -> None:
    frozen = start(bench, corpus, "fine, MPOE, mask 0.5", tmp_path, options={"mask": 1.0})
    before = {name: p.detach().clone() for name, p in frozen.model.named_parameters()}
    train(frozen, 2)
    moved = {name for name, p in frozen.model.named_parameters() if not torch.equal(p, before[name])}
    centers = {name for name in before if "mlp.experts" in name and name.endswith("core_1")}
    assert len(centers) == 4
    assert not centers & moved
    assert {name.replace("core_1", "core_0") for name in centers} <= moved


def test_scaled_experts_differ_from_the_start(bench: ModuleType, corpus: Any, tmp_path: Path) -> None:
    model = start(bench, corpus, "fine, 3 scaled bases", tmp_path).model
    bank = model.transformer.h[0].mlp.experts.bank("up")
    first, second, *_ = bank.expert_matrices().detach()
    assert float((first * second).sum() / (first.norm() * second.norm())) < 0.5
    assert float(first.square().mean() * first.shape[1]) == pytest.approx(1, abs=0.3)  # of unit gain


def test_routed_low_ranks_add_to_the_matrices_of_one_network(
    bench: ModuleType, corpus: Any, tmp_path: Path
) -> None:
    layer = start(bench, corpus, "low ranks in one network", tmp_path).model.transformer.h[0].mlp
    for name in ("up", "down"):
        torch.nn.init.normal_(layer.experts.bank(name).get_parameter("core_0"))
        torch.nn.init.normal_(layer.experts.get_parameter(f"{name}_bias"))
    x = torch.randn(2, 5, 64)
    flat = x.reshape(-1, 64)
    routing = layer.router(flat)
    want = []
    for token, experts, weights in zip(flat, routing.expert_indices, routing.weights, strict=True):
        hidden = token
        for name in ("up", "down"):
            matrix, bias = layer.shared_expert.bank(name).expert_matrices()[0], 0
            for e, w in zip(experts.tolist(), weights, strict=True):
                matrix = matrix + w * layer.experts.bank(name).expert_matrices([e])[0]
                bias = bias + w * layer.experts.get_parameter(f"{name}_bias")[e]
            hidden = matrix @ hidden + bias
            hidden = torch.nn.functional.gelu(hidden, approximate="tanh") if name == "up" else hidden
        want.append(hidden)
    assert torch.allclose(layer(x), torch.stack(want).reshape(x.shape), atol=1e-4)


def test_sigmoid_weights_are_about_one_each(bench: ModuleType, corpus: Any, tmp_path: Path) -> None:
    layers = {
        name: start(bench, corpus, name, tmp_path).model.transformer.h[0].mlp
        for name in ("fine, tied, E = 12, top 6", "fine, tied, E = 12, top 6, sigmoid", "fine, MPOE, sigmoid")
    }
    x, spread = torch.randn(500, 64), {}
    for name, layer in layers.items():
        routing = layer.router(x)
        want = 2 * routing.logits.gather(-1, routing.expert_indices).sigmoid() if "sigmoid" in name else None
        assert want is None or torch.equal(routing.weights, want)
        assert torch.equal(routing.expert_indices, routing.probs.topk(layer.router.top_k).indices)
        layer.shared_expert = None
        spread[name] = float(layer(x).detach().std())
    averaged, summed, alike = spread.values()
    assert averaged < 0.5 * summed  # a mean of six experts that start apart
    assert summed == pytest.approx(alike, rel=0.35)


def test_one_pool_serves_all_layers(bench: ModuleType, corpus: Any, tmp_path: Path) -> None:
    name = "one pool, E = 15, top 4, sigmoid"
    sizes = replace(bench.toy_sizes(), layers=4)
    run = bench.Run(bench.ROWS[name], sizes, bench.Recipe(windows=4), corpus, 0, folder=tmp_path)
    networks = [block.mlp.experts for block in run.model.transformer.h]
    matrices = [network.bank("up").expert_matrices() for network in networks]
    assert all(torch.equal(matrix, matrices[0]) for matrix in matrices)
    assert len(run.model.owner) == 1
    own = sum(p.numel() for n in networks for p in n.parameters())
    pool, biases = 15 * 2 * 32 * 64, 15 * (32 + 64)
    assert sum(p.numel() for p in run.model.owner.parameters()) == pool
    assert own == 4 * biases


def test_the_mask_of_a_row_fades_and_compensates(bench: ModuleType, corpus: Any, tmp_path: Path) -> None:
    fading = start(bench, corpus, "fine, MPOE, mask 0.9, fading", tmp_path).mask
    assert (fading.current_p, fading.compensate) == (0.9, False)
    fading.steps = bench.ROWS["fine, MPOE, mask 0.9, fading"].options["mask_fade"]
    assert fading.current_p == 0
    compensated = start(bench, corpus, "fine, MPOE, mask 0.5, compensated", tmp_path).mask
    assert (compensated.current_p, compensated.compensate) == (0.5, True)


def test_rows_with_sgd_take_steps_in_proportion_to_gradients(
    bench: ModuleType, corpus: Any, tmp_path: Path
) -> None:
    run = start(bench, corpus, "SGD, fine, MPOE, center rate 0.3", tmp_path)
    assert isinstance(run.optimizer, torch.optim.SGD)
    bank = run.model.transformer.h[0].mlp.experts.bank("up")
    before = {name: p.detach().clone() for name, p in bank.named_parameters()}
    batch = corpus.batch(0, windows=4, context=8, seed=0)
    run._loss(batch).backward()
    torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
    want = {
        name: before[name] - 0.5 * 3e-3 * (0.3 if name == "core_1" else 1.0) * p.grad
        for name, p in bank.named_parameters()
    }
    run.optimizer.zero_grad()
    run._train_step()  # the first of two steps of warm-up, and the first momentum is the gradient
    for name, p in bank.named_parameters():
        assert torch.allclose(p, want[name], atol=1e-9), name


def chain_matrices(cores: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.einsum("exoib,bpjc,ecqky->eopqijk", *cores).flatten(4).flatten(1, 3)


def chain_cores(experts: int) -> list[torch.Tensor]:
    shapes = ((experts, 1, 2, 2, 4), (4, 2, 2, 4), (experts, 4, 2, 2, 1))
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


def test_preconditioned_steps_do_not_depend_on_the_gauge(load_benchmark: Callable[[str], Any]) -> None:
    script = load_benchmark("scratch_precondition")
    torch.manual_seed(0)
    cores, target = chain_cores(3), torch.randn(3, 8, 8, dtype=torch.float64)

    def change(cores: list[torch.Tensor]) -> torch.Tensor:
        leaves = [torch.nn.Parameter(core) for core in cores]
        (chain_matrices(leaves) - target).square().sum().backward()
        found = script.scaled_gradients(leaves, 0.0)
        parts = [chain_matrices([*cores[:k], found[k], *cores[k + 1 :]]) for k in range(3)]
        return torch.stack(parts)

    gauge = torch.randn(4, 4, dtype=torch.float64)
    turned = [cores[0] @ gauge, torch.einsum("bB,Boic->boic", gauge.inverse(), cores[1]), cores[2]]
    assert torch.allclose(chain_matrices(turned), chain_matrices(cores))
    assert torch.allclose(change(turned), change(cores), rtol=1e-6)


@pytest.mark.parametrize("moved", [0, 1, 2])
def test_a_preconditioned_step_of_one_core_is_the_least_squares_one(
    load_benchmark: Callable[[str], Any], moved: int
) -> None:
    script = load_benchmark("scratch_precondition")
    torch.manual_seed(0)
    leaves = [torch.nn.Parameter(core) for core in chain_cores(1)]
    target = torch.randn(1, 8, 8, dtype=torch.float64)

    def gradient() -> torch.Tensor:
        loss = 0.5 * (chain_matrices(leaves) - target).square().sum()
        return torch.autograd.grad(loss, leaves[moved])[0]

    (0.5 * (chain_matrices(leaves) - target).square().sum()).backward()
    before, step = gradient(), script.scaled_gradients(leaves, 0.0)[moved]
    with torch.no_grad():
        leaves[moved].sub_(step)
    assert float(gradient().norm()) < 1e-6 * float(before.norm())


def test_preconditioning_keeps_the_size_of_gradients(bench: ModuleType, corpus: Any, tmp_path: Path) -> None:
    run = start(bench, corpus, "fine, MPOE, scaled gradients", tmp_path)
    run._loss(corpus.batch(0, windows=4, context=8, seed=0)).backward()
    before = {name: p.grad.clone() for name, p in run.model.named_parameters()}
    bench.precondition(run.model, 0.01)
    turned = {name for name, p in run.model.named_parameters() if not torch.equal(p.grad, before[name])}
    assert turned == {name for name in before if ".experts." in name and "core_" in name}
    for name in turned:
        assert float(run.model.get_parameter(name).grad.norm()) == pytest.approx(
            float(before[name].norm()), rel=1e-4
        )
