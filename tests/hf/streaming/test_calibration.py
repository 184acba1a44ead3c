"""Calibration, planning and compression of a model that is never in memory, against one that is."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from folder_runs import compress_files
from hf_models import ARCHITECTURES, VOCAB
from safetensors.torch import load_file
from sharded_folders import save
from torch import Tensor
from transformers import T5Config, T5EncoderModel

import tensornet as tn
import tensornet_hf as th
from tensornet.calibration.blockwise import joined, moments_by_block
from tensornet.calibration.calibrate import MomentRecorder, observed
from tensornet.calibration.losses import TokenLosses, cosine_losses, label_losses
from tensornet.calibration.walk import Walk, find_blocks
from tensornet.errors import BudgetError, TargetError
from tensornet.nn.extension import ProvidedData
from tensornet.topologies import mpo
from tensornet_hf.lazy_model import open_model

ONE_STACK = ["gpt2", "llama", "qwen2", "opt", "bert"]


def batches(name: str, count: int = 3) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(4)
    made = []
    for _ in range(count):
        ids = torch.randint(3, VOCAB, (2, 9), generator=generator)
        mask = torch.ones_like(ids)
        mask[1, 6:] = 0  # padding counts nowhere
        made.append({"input_ids": ids, "attention_mask": mask})
        if name in ("bert", "t5_relu"):
            made[-1]["labels"] = ids
    return made


def streamed(
    source: Path, given: list[dict[str, Tensor]], loss_fn: TokenLosses = label_losses
) -> tn.CalibrationStats:
    """The moments of a model whose weights are loaded block by block."""
    lazy, recorder, found = open_model(source), MomentRecorder(), []
    with observed(lazy.model, recorder, tn.CompressionConfig(topology_options={"max_bond": 1})):
        walk = Walk(lazy.model, find_blocks(lazy.model, given[0], lazy.loaded), given, {}, lazy.loaded)
        found = [stats for _, stats in moments_by_block(walk, recorder, loss_fn)]
    return functools.reduce(joined, found)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_model_opened_lazily_computes_what_a_loaded_one_does(name: str, tmp_path: Path) -> None:
    model, inputs = ARCHITECTURES[name].dense, ARCHITECTURES[name].inputs()
    save(name, tmp_path / "dense")
    lazy = open_model(tmp_path / "dense")
    with torch.no_grad():
        for _ in range(2):  # mapped, then read
            state = lazy.model.state_dict()
            assert all(torch.equal(x, model.state_dict()[key]) for key, x in state.items())
            torch.testing.assert_close(lazy.model(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("name", [*ONE_STACK, "t5_relu"])  # T5 has two stacks, so it is one block
def test_same_moments_as_in_memory(name: str, tmp_path: Path) -> None:
    source, config = save(name, tmp_path / "dense"), tn.CompressionConfig(topology_options={"max_bond": 1})
    expected = tn.calibrate(ARCHITECTURES[name].dense, batches(name), config=config)
    ours = streamed(source, batches(name))
    assert ours.loss == pytest.approx(expected.loss, rel=1e-6)
    assert (dict(ours.counts), ours.scored) == (dict(expected.counts), expected.scored)
    assert ours.coherence == pytest.approx(expected.coherence, rel=1e-4)
    for side in ("rows", "columns"):
        mine, theirs = getattr(ours, side), getattr(expected, side)
        assert mine.keys() == theirs.keys()
        for layer in mine:
            torch.testing.assert_close(
                mine[layer], theirs[layer], rtol=1e-4, atol=1e-7 * float(theirs[layer].max())
            )


def test_a_calibrated_run_is_that_of_a_loaded_model(tmp_path: Path) -> None:
    source, config = save("gpt2", tmp_path / "dense"), tn.CompressionConfig(param_ratio=0.6)
    data = ProvidedData(batches("gpt2"), "made up")
    report = compress_files(source, tmp_path / "ours", config, calibration=data)
    model = th.load(source)
    expected = tn.compress(model, config, calibration=data, progress=False)
    model.save_pretrained(tmp_path / "reference")
    assert [(x.name, x.topology) for x in report.plan] == [(x.name, x.topology) for x in expected.plan]
    assert (report.plan.objective, report.plan.calibration) == ("curvature", "made up")
    assert report.measured is not None
    ours, reference = (load_file(tmp_path / x / "model.safetensors") for x in ("ours", "reference"))
    assert ours.keys() == reference.keys()
    inputs = ARCHITECTURES["gpt2"].inputs()
    with torch.no_grad():  # one model is decomposed from its file by one thread, the other one in memory
        found, wanted = (th.load(tmp_path / x)(**inputs).logits for x in ("ours", "reference"))
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))
    with pytest.raises(BudgetError, match="made with made up"):
        compress_files(source, tmp_path / "none", expected.plan)
    other = th.load(source)
    for parameter in other.parameters():
        parameter.data *= 2
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(TargetError, match="another model"):
        compress_files(tmp_path / "other", tmp_path / "planned", report.plan, calibration=data)
    assert not (tmp_path / "planned").exists()


@pytest.mark.parametrize(
    "options",
    [
        {"method": "gptq", "param_ratio": 0.6},
        {"target_modules": "*.down_proj", "topology": "mpo", "topology_options": {"max_bond": 4}},
        {
            "target_modules": ["*embed_tokens", "*o_proj"],
            "topology": "low_rank",
            "bits_per_weight": 16,
        },
        {"topology": mpo(out_dims=(6, 4), in_dims=(4, 6), max_bond=3), "target_modules": "*self_attn.q_proj"},
    ],
    ids=str,
)
def test_networks_of_every_kind_are_those_of_a_loaded_model(options: Any, tmp_path: Path) -> None:
    source, config = save("llama", tmp_path / "dense"), tn.CompressionConfig(**options)
    data = ProvidedData(batches("llama"), "made up")
    report = compress_files(source, tmp_path / "ours", config, calibration=data)
    model = th.load(source)
    expected = tn.compress(model, config, calibration=data, progress=False)
    assert [x.scheme for x in report.plan] == [x.scheme for x in expected.plan]
    inputs = ARCHITECTURES["llama"].inputs()
    with torch.no_grad():
        found, wanted = th.load(tmp_path / "ours")(**inputs).logits, model(**inputs).logits
    assert (found - wanted).norm() < 0.03 * wanted.norm()  # one walk may run in bfloat16


def test_half_precision_is_calibrated_in_single(tmp_path: Path) -> None:
    source = save("llama", tmp_path / "dense", dtype=torch.bfloat16)
    ours = streamed(source, batches("llama"))
    expected = tn.calibrate(
        th.load(source).float(),
        batches("llama"),
        config=tn.CompressionConfig(topology_options={"max_bond": 1}),
    )
    for layer, moment in expected.rows.items():
        torch.testing.assert_close(ours.rows[layer], moment, rtol=1e-3, atol=1e-5 * float(moment.max()))


def test_blocks_get_the_arguments_of_their_own_batch(tmp_path: Path) -> None:
    """The first block of T5 hands on a position bias, which holds the padding of the batch."""
    torch.manual_seed(0)
    model = T5EncoderModel(T5Config(d_model=16, d_ff=24, num_layers=2, num_heads=2, d_kv=8, vocab_size=VOCAB))
    model.eval().save_pretrained(tmp_path / "dense")
    given = [{k: v[:, : 9 - n] for k, v in x.items()} for n, x in enumerate(batches("t5"))]
    expected = tn.calibrate(model, given, loss_fn=cosine_losses)
    ours = streamed(tmp_path / "dense", given, cosine_losses)
    assert math.isnan(ours.loss)  # a random projection has no value that means something
    assert math.isnan(expected.loss)
    for layer, moment in ours.columns.items():
        torch.testing.assert_close(moment, expected.columns[layer], rtol=1e-4, atol=1e-5)


def test_models_that_cannot_be_streamed(tmp_path: Path) -> None:
    save("gpt2", tmp_path / "gpt2")
    one = [{"input_ids": torch.ones(2, 1, dtype=torch.long)}]
    config = tn.CompressionConfig(param_ratio=0.5)
    for given, message in ((one, "No token"), ([], "no batches?")):
        with pytest.raises(TargetError, match=message):
            compress_files(tmp_path / "gpt2", tmp_path / "out", config, calibration=ProvidedData(given, ""))
