"""A specialist leaves as a LoRA adapter, which other tools add to the trunk; all leave as a mixture."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

import tensornet as tn
import tensornet_hf as th
import tensornet_moe as tm
from tensornet.errors import DestinationError, TargetError
from tensornet_hf.exporters.target import EXPORT_TARGETS
from tensornet_hf.peft import load_adapters
from tests.hf.export.test_gguf import model_of

# PEFT uses a name that transformers will rename.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
IDS = torch.arange(5, 17)[None]


def trunk() -> PreTrainedModel:
    return th.load(th.embedded.gpt2_path()).eval()


def prepared(model: PreTrainedModel, *names: str, **options: Any) -> th.PretrainedSpecialists:
    s = th.specialists(model, **{"rank": 4, **options})
    for name in names:
        s.add(name)
        for core in s.tensors(name).values():
            torch.nn.init.normal_(core, std=0.3)
    return s


@torch.no_grad()
def logits(model: torch.nn.Module, s: th.PretrainedSpecialists | None = None, which: Any = None) -> Tensor:
    if s is None:
        return model(IDS).logits[0]  # type: ignore[no-any-return]
    with s.use(which):
        return model(IDS).logits[0]  # type: ignore[no-any-return]


def assert_same(found: Tensor, expected: Tensor, base: Tensor) -> None:
    """The change of the logits is that of the specialist, to the rounding of float32."""
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert float((expected - base).abs().max()) > 0.05 * float(base.abs().max())


@pytest.mark.parametrize(
    ("share", "pool"), [("ends", None), ("ends", "shape"), ("in", "shape"), ("out", None), ("none", None)]
)
def test_peft_reads_the_adapter(share: Any, pool: Any, tmp_path: Path) -> None:
    s = prepared(trunk(), "law", "code", share=share, pool=pool)
    expected = logits(s.model, s, "law")
    folder = s.export("law", tmp_path / "law")
    assert sorted(x.name for x in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    read = PeftModel.from_pretrained(trunk(), str(folder)).eval()
    assert type(read.base_model) is peft.LoraModel
    assert_same(logits(read), expected, logits(trunk()))
    merged = read.merge_and_unload()
    assert_same(logits(merged), expected, logits(trunk()))


def test_an_adapter_of_a_compressed_trunk_loads_on_this_trunk(tmp_path: Path) -> None:
    model = trunk()
    config = tn.CompressionConfig(bits_per_weight=4.25, formats=("int4",), method="nearest")
    tn.compress(model, config, progress=False)
    th.save(model, tmp_path / "int4")
    s = prepared(model, "law")
    s.export("law", tmp_path / "law")
    read = load_adapters(th.load(tmp_path / "int4"), tmp_path / "law").eval()
    assert_same(logits(read), logits(model, s, "law"), logits(th.load(tmp_path / "int4").eval()))


# Llama has permuted rows, GPT-2 transposed weights, phi3 fused ones.
@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
def test_llama_cpp_reads_the_adapter(name: str, tmp_path: Path) -> None:
    from tests.hf.export.llama_cpp import logits as computed

    th.export(model_of(name), tmp_path / "trunk.gguf")
    s = prepared(model_of(name), "law")
    adapter = s.export("law", tmp_path / "law.gguf")
    found = computed(tmp_path / "trunk.gguf", IDS[0], adapter)
    expected, base = logits(s.model, s, "law"), logits(model_of(name))
    # llama.cpp rounds its KV cache to float16.
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.01 * float(expected.abs().max()))
    assert float((expected - base).abs().max()) > 0.05 * float(base.abs().max())


@pytest.mark.slow
def test_mlx_reads_the_adapter(tmp_path: Path) -> None:
    pytest.importorskip("mlx_lm")
    model = model_of("llama")
    config = tn.CompressionConfig(bits_per_weight=8.5, formats=("int8",), method="nearest")
    tn.compress(model, config, progress=False)
    th.export(model, tmp_path / "trunk", target="mlx")
    s = prepared(model, "law")
    s.export("law", tmp_path / "law", target="mlx")
    code = """
import pathlib, sys
import mlx.core as mx, numpy, torch
from mlx_lm.tuner.utils import load_adapters
from mlx_lm.utils import load_model
model = load_model(pathlib.Path(sys.argv[1]))[0]
load_adapters(model, sys.argv[2]).eval()
found = model(mx.arange(5, 17).reshape(1, 12)).astype(mx.float32)
torch.save(torch.from_numpy(numpy.array(found)[0]), sys.argv[3])
"""
    arguments = [str(tmp_path / x) for x in ("trunk", "law", "logits")]
    subprocess.run([sys.executable, "-c", code, *arguments], check=True)
    expected = logits(s.model, s, "law")
    found = torch.load(tmp_path / "logits")
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max()))


def test_a_registered_target_writes_its_own_adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(model: Any, low_ranks: Any, destination: Path, *, source: Any, force: bool) -> None:
        assert not any(isinstance(part, tm.SpecialistLinear) for part in model.modules())
        torch.save({name: x.left @ x.right for name, x in low_ranks.items()}, destination)

    monkeypatch.setitem(EXPORT_TARGETS, "mine", EXPORT_TARGETS["mlx"]._replace(adapter=write))
    monkeypatch.setitem(EXPORT_TARGETS, "plain", EXPORT_TARGETS["mlx"]._replace(adapter=None))
    s = prepared(trunk(), "law")
    found = torch.load(s.export("law", tmp_path / "law", target="mine"))
    for name, change in s.changes("law").items():
        torch.testing.assert_close(found[name], change.detach(), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"peft.*mine"):
        s.export("law", tmp_path / "other", target="plain")
    with_peft = s.export("law", tmp_path / "peft", target="compressed-tensors")
    assert (with_peft / "adapter_model.safetensors").is_file()


def test_what_cannot_leave_is_refused(tmp_path: Path) -> None:
    center = prepared(trunk(), "law", share="center")
    s = prepared(trunk(), "law")
    for target, place in (("peft", "a"), ("gguf", "a.gguf"), ("mlx", "a")):
        with pytest.raises(TargetError, match="not of low rank"):
            center.export("law", tmp_path / place, target=target)
    with pytest.raises(TargetError, match="Conv1D"):
        s.export("law", tmp_path / "a", target="mlx")
    with pytest.raises(TargetError, match="no specialist named"):
        s.export("code", tmp_path / "a")
    with pytest.raises(ValueError, match="Unknown target"):
        s.export("law", tmp_path / "a", target="onnx")
    assert not list(tmp_path.iterdir())
    folder = s.export("law", tmp_path / "a")
    with pytest.raises(DestinationError, match="exists already"):
        s.export("law", folder)
    assert s.export("law", folder, force=True) == folder
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "note").write_text("x")
    with pytest.raises(DestinationError, match="not the folder of an adapter"):
        s.export("law", tmp_path / "mine", force=True)
    assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "LORA"


FEED_FORWARD = {"target_modules": ["mlp.c_fc", "mlp.c_proj"]}


@pytest.mark.parametrize("options", [FEED_FORWARD, {"target_modules": ["c_fc"], "share": "in", "rank": 2}])
def test_specialists_become_the_experts_of_mixtures(options: dict[str, Any], tmp_path: Path) -> None:
    s = prepared(trunk(), "law", "code", "perl", **options)
    expected = {name: logits(s.model, s, name) for name in ("code", "law")}
    model = s.model
    report = s.merge(["code", "law"], top_k=1)
    assert report.num_experts == 2
    mixtures = [part for part in model.modules() if isinstance(part, tm.SharedCoreMoE)]
    assert len(mixtures) == 4
    assert all(p.requires_grad for p in model.parameters())
    th.save(model, tmp_path / "mixture")
    for expert, name in enumerate(("code", "law")):
        read = th.load(tmp_path / "mixture").eval()
        for part in read.modules():
            if isinstance(part, tm.SharedCoreMoE):  # choose this expert for every token
                part.router.select = lambda logits, probs, mask, e=expert: always(logits, probs, mask, e)
        assert_same(logits(read), expected[name], logits(trunk()))


def always(logits: Tensor, probs: Tensor, mask: Tensor | None, expert: int) -> Any:
    """Route every token to one expert."""
    return tm.Routing(torch.full((len(probs), 1), expert), torch.ones(len(probs), 1), probs, logits, mask)


def test_a_refused_merge_changes_nothing() -> None:
    s = prepared(trunk(), "law", "code")
    expected = logits(s.model, s, "law")
    with pytest.raises(TargetError, match="not in dense feed-forward networks"):
        s.merge()
    with pytest.raises(TargetError, match="at least two"):
        s.merge(["law"])
    assert torch.equal(logits(s.model, s, "law"), expected)
    s = prepared(trunk(), "law", "code", **FEED_FORWARD)
    expected = logits(s.model, s, "law")
    with pytest.raises(ValueError, match="top_k"):
        s.merge(top_k=5)
    assert torch.equal(logits(s.model, s, "law"), expected)
    center = prepared(trunk(), "law", "code", share="center", **FEED_FORWARD)
    with pytest.raises(TargetError, match="not of low rank"):
        center.merge()
