"""transformers' `DistributedConfig` and models made of cores: what fits is the same, the rest is refused."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import distributed_hf_tasks as tasks
import pytest
import torch
from distributed_tasks import PRELOADED, in_processes
from hf_models import ARCHITECTURES

import tensornet as tn
import tensornet_hf as th


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A compressed model, one of whose layers a plan names only some, and a mixture."""
    folder = tmp_path_factory.mktemp("distributed")
    for name, target in (("compressed", None), ("attention", ["*self_attn.o_proj"])):
        model = ARCHITECTURES["llama"].dense
        config = tn.CompressionConfig(target_modules=target, param_ratio=0.5, method="svd")
        tn.compress(model, config, progress=False)
        model.save_pretrained(folder / name)
    model = ARCHITECTURES["llama"].dense
    model.resize_token_embeddings(102)  # transformers before 5.21 cannot split 101 rows in two
    th.upcycle(model, experts=4, router="switch", noise=0.1, balance_coef=0.0)
    model.save_pretrained(folder / "mixture")
    return {path.name: str(path) for path in folder.iterdir()}


@pytest.fixture(scope="module", autouse=True)
def preloaded() -> None:
    PRELOADED.append("tensornet_hf")  # before the first process is forked, where this file comes first
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)


@pytest.mark.slow
def test_what_fits_and_what_is_refused(folders: dict[str, str], tmp_path: Path) -> None:
    sizes = {
        "fsdp": {"fsdp_size": 2},
        "tensors": {"tp_size": 2},
        "experts": {"ep_size": 2, "fsdp_size": 2},
    }
    for found in in_processes(tasks.distributed_config, 2, tmp_path, folders, sizes, str(tmp_path)):
        for name, folder in folders.items():
            with torch.no_grad():
                truth = th.load(folder).eval()(tasks.X).logits
            for how in ("fsdp", *(["tensors"] if name == "mixture" else [])):
                torch.testing.assert_close(found[name, how], truth, rtol=1e-5, atol=1e-5)
            with torch.no_grad():
                again = th.load(tmp_path / name).eval()(tasks.X).logits  # one logical checkpoint
            torch.testing.assert_close(again, truth)
        for name in ("compressed", "attention"):
            assert "model.layers.0." in found[name, "tensors"]
            assert "fsdp_size" in found[name, "tensors"]
        assert "model.layers.0.mlp is a tensor network" in found["mixture", "experts"]
        assert "shard_experts(model)" in found["mixture", "experts"]
        assert "ep_plan" in found["compressed", "experts"]  # transformers' own answer


@pytest.mark.slow
def test_training_a_saved_mixture_in_both_ways(folders: dict[str, str], tmp_path: Path) -> None:
    """FSDP2 by `DistributedConfig`, and experts spread by us: losses and checkpoint of one process."""
    model = th.load(folders["mixture"]).train()
    optimizer, expected = torch.optim.SGD(model.parameters(), lr=0.1), []
    for _ in range(3):
        optimizer.zero_grad()
        loss = sum(model(x, labels=x).loss / 2 for x in tasks.X.chunk(2))
        loss.backward()
        optimizer.step()
        expected.append(float(loss.detach()))
    for task in (tasks.fsdp_steps, tasks.expert_steps):
        saved = tmp_path / task.__name__
        for losses in in_processes(task, 2, tmp_path, folders["mixture"], str(saved)):
            assert losses == pytest.approx(expected, rel=1e-5)
        state = th.load(saved).state_dict()
        assert state.keys() == model.state_dict().keys()
        for key, value in model.state_dict().items():
            torch.testing.assert_close(state[key], value, rtol=1e-4, atol=1e-5)
    assert expected[2] < 0.99 * expected[0]
