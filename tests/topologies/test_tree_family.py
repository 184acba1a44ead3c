"""A third party's family, no subclass of ours, all the way: the class of examples/tree_topology.py."""

from __future__ import annotations

import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModelForCausalLM

import tensornet as tn
import tensornet_hf as th
import tensornet_moe as tm
from tensornet.compression.report import ModelFacts
from tensornet.errors import BudgetError, TopologyError
from tensornet.testing import laws, reference, strategies
from tensornet.topologies import Budget, registered
from tensornet_hf.checkpoint import read_checkpoint
from tensornet_hf.embedded import gpt2_path
from tensornet_hf.report import Page, write_report

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "tree_topology.py"
TREE = runpy.run_path(str(EXAMPLE))["TreeFamily"]()


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    with registered(TREE):
        yield


class TestTree(laws.FamilyLaws):
    family = TREE
    matrices = strategies.matrices(max_size=12)


class TestTreeOfThree(laws.FamilyLaws):
    family = TREE
    matrices = strategies.matrices(max_size=12)
    options = {"sites": 3}  # noqa: RUF012


class TestNetworks(laws.NetworkLaws):
    networks = strategies.networks(
        topology=st.builds(TREE.build, st.integers(1, 9), st.integers(1, 9), max_bond=st.just(3))
    )


def test_the_error_is_exact_and_a_promise_is_kept() -> None:
    matrix = torch.randn(24, 36, dtype=torch.float64)
    for promise in (0.2, 0.5, 0.8):
        made = TREE.decompose(matrix, Budget(rel_error=promise))
        assert 0.3 * promise < made.error <= promise
        assert made.bound_by == "rel_error"
        true = reference.relative_error(matrix, made.network.to_matrix())
        assert true == pytest.approx(made.error, rel=1e-9)
    made = TREE.decompose(matrix, Budget(max_bond=(2, 3, 4, 5), param_ratio=0.9), sites=3)
    assert list(made.network.topology.bond_dims.values()) == [2, 3, 4, 5]
    with pytest.raises(BudgetError, match="'tree' needs"):
        TREE.decompose(matrix, Budget(param_ratio=1e-4))


def gpt2() -> tuple[nn.Module, list[torch.Tensor]]:
    model = AutoModelForCausalLM.from_pretrained(gpt2_path())
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, model.config.vocab_size, (4, 24), generator=generator)
    return model, [tokens[:2], tokens[2:]]


TARGETS = ["h.0.mlp.c_fc", "h.1.mlp.c_fc"]
OPTIONS = {
    "target_modules": TARGETS,
    "topology": "tree",
    "topology_options": {"sites": 3},
    "param_ratio": 0.5,
}


@pytest.mark.slow
def test_compress_save_load_and_report(tmp_path: Path) -> None:
    model, batches = gpt2()
    report = tn.compress(model, tn.CompressionConfig(**OPTIONS), calibration=batches, progress=False)
    plan = report.plan
    assert {layer.topology.family for layer in plan if layer.topology is not None} == {"tree"}
    assert all(layer.storage.pivoted for layer in plan if layer.topology is not None)
    assert plan.predicted_loss_increase is not None
    assert plan.predicted_loss_increase > 0
    assert plan.params_after <= 0.5 * plan.params_before
    plan.save(tmp_path / "plan.json")
    assert tn.CompressionPlan.load(tmp_path / "plan.json") == plan
    expected = model.eval()(batches[0]).logits

    tn.save_model(model, tmp_path / "model.safetensors")
    again = tn.load_model(gpt2()[0], tmp_path / "model.safetensors")
    torch.testing.assert_close(again.eval()(batches[0]).logits, expected)
    th.save(model, tmp_path / "folder")
    torch.testing.assert_close(th.load(tmp_path / "folder").eval()(batches[0]).logits, expected)

    facts = [ModelFacts(n, p) for n, p in (("original", 10), ("compressed", 5))]
    page = write_report(Page("A tree", report, facts), tmp_path / "r.html")
    assert "tree " in page.read_text()


def test_options_are_saved_with_a_model_compressed_while_loading(tmp_path: Path) -> None:
    config = th.TensorNetworkConfig(compression={**OPTIONS, "method": "svd"})
    model = AutoModelForCausalLM.from_pretrained(gpt2_path(), quantization_config=config)
    model.save_pretrained(tmp_path)
    saved = read_checkpoint(tmp_path).compression
    assert saved is not None
    assert saved.compression_config.topology_options == {"sites": 3}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    layer = loaded.get_submodule("transformer.h.0.mlp.c_fc")
    assert layer.topology.family == "tree"
    assert len(layer.topology.out_dims) == 3


def test_mixtures_share_cores_of_a_tree() -> None:
    weight = torch.randn(24, 36)
    bank = tm.SharedCoreExperts.from_dense(weight, num_experts=3, topology="tree", share=["root"], sites=3)
    torch.testing.assert_close(bank.expert_matrices()[2], weight, atol=1e-4, rtol=1e-4)
    stack = weight + 0.2 * torch.randn(3, 24, 36)
    for shared in ("center", ["root", "leaf0"], "base"):
        joint = tm.SharedCoreExperts.from_experts(
            stack, topology="tree", share=shared, max_bond=6, sites=3, max_sweeps=12
        )
        error = float((joint.expert_matrices().detach() - stack).norm() / stack.norm())
        assert error == pytest.approx(joint.error, rel=1e-4, abs=1e-6)
        assert joint.fit is not None
        assert joint.fit.alone_error is None or joint.error <= joint.fit.alone_error * (1 + 1e-6)


def test_a_tree_is_embedded() -> None:
    table = nn.Embedding(40, 24)
    layer = tn.nn.MPOEmbedding.from_embedding(table, topology="tree", sites=3)
    tokens = torch.tensor([[0, 39, 7]])
    torch.testing.assert_close(layer(tokens), table(tokens), atol=1e-4, rtol=1e-4)


def test_unknown_options_are_refused_with_those_of_the_family() -> None:
    with pytest.raises(TopologyError, match=r"'tree'.*depth"):
        tn.CompressionConfig(topology="tree", topology_options={"depth": 2}, param_ratio=0.5)
    with pytest.raises(TopologyError, match="name of a family"):
        tn.CompressionConfig(topology_options={"sites": 2}, param_ratio=0.5)
    with pytest.raises(TopologyError, match="mapping"):
        tn.CompressionConfig(topology="tree", topology_options="sites", param_ratio=0.5)  # type: ignore[arg-type]


def test_a_model_is_upcycled_with_a_shared_root(tmp_path: Path) -> None:
    model, batches = gpt2()
    expected = model.eval()(batches[0]).logits

    def trees(weights: torch.Tensor) -> tm.SharedCoreExperts:
        options = {"topology": "tree", "share": ["root"], "sites": 3}
        return tm.SharedCoreExperts.from_dense(weights[0], num_experts=2, **options)  # type: ignore[arg-type]

    th.upcycle(model, experts=trees)
    torch.testing.assert_close(model.eval()(batches[0]).logits, expected, atol=1e-3, rtol=1e-3)
    banks = [module for module in model.modules() if isinstance(module, tm.SharedCoreExperts)]
    assert {bank.topology.family for bank in banks} == {"tree"}
    th.save(model, tmp_path / "mixture")
    loaded = th.load(tmp_path / "mixture").eval()
    torch.testing.assert_close(loaded(batches[0]).logits, model(batches[0]).logits)
