"""Hugging Face models in number formats: saved, loaded, sharded, refused if damaged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from folder_runs import compress_files
from hf_models import assert_generates_alike
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

import tensornet as tn
import tensornet_hf as th
from tensornet.compression.plan import LayerPlan
from tensornet.errors import FormatError, TargetError
from tensornet.nn.prepare import Int4Core
from tensornet.nn.storage import Storage
from tensornet.quantization import NumberFormat
from tensornet.topologies import topology_family
from tensornet_hf.embedded import gpt2_path
from tensornet_hf.inspect import inspect_folder

FORMATS = ["int8:row", "int5:g32", "int4:g32", "int3", "int2:g32:float8", "bf16"]
TABLE = "transformer.wte"


def plan_of(model: nn.Module, names: list[str]) -> tn.CompressionPlan:
    """Some layers dense in integers, one of low rank with a format for each core."""
    layers = []
    for k, name in enumerate(names):
        weight = model.get_submodule(name).weight
        shape = tuple(weight.shape) if name == TABLE else tuple(weight.shape[::-1])
        family = topology_family("low_rank" if k == 1 else "dense")
        storage = Storage(number_format=NumberFormat.parse(FORMATS[k % len(FORMATS)]))
        if k == 1:
            storage = Storage(pivoted=True, core_formats=(("0", NumberFormat.parse("int8")),))
        topology = family.build(*shape, max_bond=() if k != 1 else 16)
        if k == 2:  # a sum, with a format for each term
            topology = topology_family("residual").build(*shape, max_bond=4)
            storage = Storage(
                number_format=NumberFormat.parse("int8"), core_formats=(("base", NumberFormat.parse("int3")),)
            )
        layers.append(LayerPlan(name, shape, topology, "edited", None, storage=storage))
    return tn.CompressionPlan(tuple(layers))


def names_of(model: nn.Module) -> list[str]:
    blocks = [
        f"transformer.h.{k}.{part}" for k in (0, 1) for part in ("attn.c_attn", "mlp.c_fc", "mlp.c_proj")
    ]
    return [*blocks, TABLE]


def quantized() -> nn.Module:
    model = AutoModelForCausalLM.from_pretrained(gpt2_path()).eval()
    tn.apply_plan(model, plan_of(model, names_of(model)))
    return model


TOKENS = torch.arange(24).reshape(2, 12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("formats") / "model"
    th.save(quantized(), path)
    return path


def test_saved_and_loaded_by_every_door(folder: Path) -> None:
    model = quantized()
    expected = model(TOKENS).logits
    torch.testing.assert_close(th.load(folder).eval()(TOKENS).logits, expected, rtol=1e-4, atol=1e-4)
    again = AutoModelForCausalLM.from_pretrained(folder).eval()
    torch.testing.assert_close(again(TOKENS).logits, expected, rtol=1e-4, atol=1e-4)
    assert again.lm_head.core_matrix is again.transformer.wte.core_matrix  # the tied head once
    for name, tensor in model.state_dict().items():
        assert again.state_dict()[name].dtype == tensor.dtype, name
    tokens = again.generate(TOKENS[:1], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert tokens.shape == (1, 16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loaded_in_another_dtype(folder: Path, dtype: torch.dtype) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    expected = quantized().to(dtype).state_dict()
    found = model.state_dict()
    assert {k: x.dtype for k, x in found.items()} == {k: x.dtype for k, x in expected.items()}
    layer = model.transformer.h[0].attn.c_attn
    assert layer.weight.dtype == dtype
    assert model(TOKENS).logits.dtype == dtype
    codes = [x for name, x in model.named_buffers() if name.endswith(".codes")]
    assert codes
    assert all(x.data_ptr() % 16 == 0 for x in codes)  # kernels of torch 2.15 end the process otherwise


def test_counted_bytes_are_those_on_the_disk(folder: Path) -> None:
    (file,) = folder.glob("*.safetensors")
    data = file.read_bytes()
    tensors = load_file(file)
    assert len(data) - 8 - int.from_bytes(data[:8], "little") == sum(x.nbytes for x in tensors.values())
    for layer in quantized().transformer.h[0].modules():
        if isinstance(layer, tn.nn.module.NetworkModule):
            held = sum(x.nbytes for x in layer.stored.values())
            assert held == layer.storage.num_bytes(layer.topology, torch.float32)
    assert {x["dtype"] for x in inspect_folder(folder)["layers"]} >= {"uint8"}


def test_sharded_and_decompressed(folder: Path, tmp_path: Path) -> None:
    model = quantized()
    expected = model(TOKENS).logits
    model.save_pretrained(tmp_path / "sharded", max_shard_size="200KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    torch.testing.assert_close(
        th.load(tmp_path / "sharded").eval()(TOKENS).logits, expected, rtol=1e-4, atol=1e-4
    )
    tn.decompress(model)
    assert model.lm_head.weight is model.transformer.wte.weight
    torch.testing.assert_close(model(TOKENS).logits, expected, atol=1e-4, rtol=1e-4)


C_ATTN = "transformer.h.0.attn.c_attn"
CODES, SCALES, ZEROS = (f"{C_ATTN}.core_matrix.{part}" for part in ("codes", "scales", "zeros"))
Change = Callable[[dict[str, torch.Tensor], dict[str, Any]], object]


def huge(tensors: object, spec: dict[str, Any]) -> None:
    """4 EB of codes, which the headers refute before a byte is allocated."""
    spec["topology"] |= {"shape": [2**31, 2**31], "sizes": dict.fromkeys(spec["topology"]["sizes"], 2**31)}


#: Changes of the tensors and of the description of one layer, and the decisive words of the error.
BAD: dict[str, tuple[Change, str]] = {
    "short codes": (lambda x, _: x.update({CODES: x[CODES][..., :-1].contiguous()}), "stored with shape"),
    "no codes": (lambda x, _: x.pop(CODES), "codes is missing"),
    "no scales": (lambda x, _: x.pop(SCALES), "scales is missing"),
    "zeros": (lambda x, _: x.update({ZEROS: x[CODES].clone()}), "zeros, but config.json does not describe"),
    "wide codes": (lambda x, _: x.update({CODES: x[CODES].short()}), "stored as int16, .*uint8"),
    "float scales": (lambda x, _: x.update({SCALES: x[SCALES].float()}), "stored as float32, .*int16"),
    "NaN": (lambda x, _: x[SCALES].fill_(0x7FC0), "scales .*NaN"),
    "unknown": (lambda _, spec: spec.update(storage={"number_format": "int0"}), "Unknown number format"),
    "groups": (lambda _, spec: spec.update(storage={"number_format": "int4:g64"}), "stored with shape"),
    "scales": (lambda _, spec: spec["storage"].update(number_format="int8:row:float8"), "stored as int16"),
    "cores": (lambda _, spec: spec["storage"].update(core_formats={"left": "int4"}), "for cores left"),
    "huge": (huge, r"its description says \[2147483648"),
}


@pytest.mark.parametrize("case", BAD)
def test_folders_that_contradict_themselves(folder: Path, tmp_path: Path, case: str) -> None:
    change, message = BAD[case]
    (file,) = folder.glob("*.safetensors")
    tensors, config = load_file(file), json.loads((folder / "config.json").read_text())
    change(tensors, config["quantization_config"]["layers"][C_ATTN])
    save_file(tensors, tmp_path / file.name, metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match=message):
        th.load(tmp_path)


def test_a_file_of_a_plain_model(tmp_path: Path) -> None:
    def fresh() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(40, 24), nn.ReLU(), nn.Linear(24, 8))

    model = fresh()
    topology = topology_family("dense").build(24, 40)
    storage = Storage(number_format=NumberFormat.parse("int3:g32"))
    plan = tn.CompressionPlan((LayerPlan("0", (24, 40), topology, "edited", None, storage=storage),))
    plan.save(tmp_path / "plan.json")
    assert tn.CompressionPlan.load(tmp_path / "plan.json") == plan
    tn.apply_plan(model, plan)
    tn.save_model(model, tmp_path / "net.safetensors")
    x = torch.randn(3, 40)
    torch.testing.assert_close(
        tn.load_model(fresh(), tmp_path / "net.safetensors")(x), model(x), rtol=1e-4, atol=1e-4
    )
    bad = {
        k: v.int() if k == "0.core_matrix.scales" else v
        for k, v in load_file(tmp_path / "net.safetensors").items()
    }
    with safetensors.safe_open(tmp_path / "net.safetensors", framework="pt") as opened:
        save_file(bad, tmp_path / "half.safetensors", metadata=opened.metadata())
    with pytest.raises(FormatError, match=r"scales .*int32.*int16"):
        tn.load_model(fresh(), tmp_path / "half.safetensors")
    with torch.no_grad():
        model[0].core_matrix.scales[0, 0] = 0x7F80  # bits of infinity
    tn.save_model(model, tmp_path / "net.safetensors")
    with pytest.raises(FormatError, match=r"scales .*NaN"):
        tn.load_model(fresh(), tmp_path / "net.safetensors")


@pytest.mark.slow
def test_file_to_file_is_the_same_for_any_number_of_workers(tmp_path: Path) -> None:
    source = tmp_path / "dense"
    model = AutoModelForCausalLM.from_pretrained(gpt2_path())
    model.save_pretrained(source)
    plan = plan_of(model, names_of(model))
    for workers in (1, 2):
        compress_files(source, tmp_path / f"by{workers}", plan, workers=workers)
    one, two = (tmp_path / f"by{workers}" / "model.safetensors" for workers in (1, 2))
    assert one.read_bytes() == two.read_bytes()
    expected = quantized().state_dict()
    found = th.load(tmp_path / "by1").state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name].float(), tensor.float(), atol=0.02, rtol=0.02, msg=name)


def test_loaded_for_inference(folder: Path) -> None:
    model = th.load(folder, inference=True)
    expected = th.load(folder, dtype=torch.bfloat16)(TOKENS).logits
    torch.testing.assert_close(model(TOKENS).logits, expected, atol=0.2, rtol=0.1)
    if any(isinstance(x, Int4Core) for x in model.modules()):  # not every processor has the kernel
        with pytest.raises(TargetError, match="prepared for inference"):
            model.save_pretrained(folder / "again")


@pytest.mark.slow
def test_compiled_generation(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def eager(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr("tensornet_hf.checkpoint.lookup_backend", lambda _: eager)
    wanted = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    wanted |= {"return_dict_in_generate": True, "output_logits": True}
    # Two models of one class: neither may run the compiled step of the other.
    for count, path in enumerate((folder, gpt2_path()), 1):
        found = th.load(path, inference="compiled").generate(TOKENS, **wanted)
        assert len(graphs) == count, "one graph, of the step; prompts are not compiled"
        assert_generates_alike(found, th.load(path, inference=True).generate(TOKENS, **wanted), 0.05)
    with pytest.raises(ValueError, match="inference"):
        th.load(folder, inference="fast")
    AutoModel.from_pretrained(gpt2_path()).save_pretrained(folder / "encoder")
    with pytest.raises(TargetError, match="cannot generate"):
        th.load(folder / "encoder", inference="compiled")
