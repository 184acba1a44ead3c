"""What the commands do, called in this process."""

import copy
import json
import math
import re
import shutil
import warnings
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from hf_architectures import PAGE_ARCHITECTURES
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForConditionalGeneration,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
)

import tensornet as tn
from tensornet.compression.report import model_size
from tensornet_hf import CompressOptions, load, save
from tensornet_hf.checkpoint import weight_bytes
from tensornet_hf.cli import commands
from tensornet_hf.cli.options import help_of, spelled
from tensornet_hf.embedded import gpt2_path, heldout_text, t5_path
from tensornet_hf.text import load_tokenizer

FEW = ("--calibration-tokens", 2_000)
TWO_LAYERS = ("--target", "h.0.mlp.c_fc", "--target", "h.2.attn.c_attn")
CHAIN = ("--param-ratio", 0.5, "--topology", "mpo", "--target", "h.0.mlp.c_fc", "--method", "svd")
Run = Callable[..., tuple[int, str, str]]


@torch.no_grad()
def logits(model: GPT2LMHeadModel) -> torch.Tensor:
    return model(torch.arange(40)[None]).logits


def test_a_gguf_file_that_does_not_exist_is_no_hub_id(tensornet: Run) -> None:
    Path("text.txt").write_text(heldout_text()[:500])
    status, _, err = tensornet("eval", "missing.gguf", "--text", "text.txt")
    assert (status, "There is no file missing.gguf" in err) == (1, True)


@pytest.mark.slow
def test_layers_that_the_text_does_not_reach_are_named(tensornet: Run, tmp_path: Path) -> None:
    options = copy.deepcopy(dict(PAGE_ARCHITECTURES["Gemma 3"].options))
    options["text_config"]["vocab_size"] = 1200  # of the tokenizer
    model = Gemma3ForConditionalGeneration(Gemma3ForConditionalGeneration.config_class(**options))
    model.save_pretrained(tmp_path / "dense")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(gpt2_path() / name, tmp_path / "dense")
    (tmp_path / "text.txt").write_text(heldout_text()[:3000])
    with warnings.catch_warnings():  # the command sets filters of its own
        status, out, err = tensornet(
            "compress", "dense", "small", "--param-ratio", 0.6, "--calibration", "text.txt"
        )
    assert status == 0, err
    assert "Linear (never ran in calibration)" in out
    (note,) = [line for line in err.splitlines() if "note:" in line]
    assert "Left dense, because they never ran during calibration: model.vision_tower." in note


@pytest.mark.slow
def test_compress_inspect_decompress(tensornet: Run) -> None:
    status, out, err = tensornet(
        "compress",
        gpt2_path(),
        "small",
        "--param-ratio",
        0.5,
        *TWO_LAYERS,
        "--calibration",
        "default",
        *FEW,
        "--report",
        "r.html",
    )
    assert status == 0
    bits = float(out.partition("layers      2, ")[2].partition(" bits a weight")[0])
    assert 0 < bits <= 16  # half of float32; within the keep ratio of 0.5
    assert "written to  small" in out
    assert "tokens of the package's text" in out
    assert "measured    loss increase" in out
    page = Path("r.html").read_text()
    assert "predicted</em>" in page  # no held-out text was given
    assert "measured</em>" not in page
    assert "round to nearest" in page
    assert len({path.stat().st_mode for path in Path("small").iterdir()}) == 1  # weights readable as the rest
    small = load("small")
    changed = {n for n, m in small.named_modules() if isinstance(m, tn.nn.TensorNetworkLinear)}
    assert changed == {"transformer.h.0.mlp.c_fc", "transformer.h.2.attn.c_attn"}

    status, out, _ = tensornet("inspect", "small", "--json")
    found = json.loads(out)
    assert (status, found["format_version"], found["architecture"]) == (0, 1, "GPT2LMHeadModel")
    assert found["params"] == model_size(small)[0]
    assert {layer["name"] for layer in found["layers"]} == changed
    sizes = {layer["name"]: layer["params"] for layer in found["layers"]}
    for name in changed:
        assert sizes[name] == small.get_submodule(name).num_params
    held = {layer["name"]: layer["bytes"] for layer in found["layers"]}
    for name in changed:
        assert held[name] == sum(x.nbytes for x in small.get_submodule(name).state_dict().values())
    assert found["bytes"] == Path("small/model.safetensors").stat().st_size
    status, out, _ = tensornet("inspect", "small")
    assert status == 0
    assert "transformer.h.0.mlp.c_fc" in out
    assert "512 x 128" in out
    name = "transformer.h.0.mlp.c_fc"
    assert f"{held[name]:,}" in out
    assert f"{8 * held[name] / (512 * 128):.2f}" in out

    assert tensornet("decompress", "small", "dense")[0] == 0
    dense = GPT2LMHeadModel.from_pretrained("dense")  # by transformers alone
    assert not any(isinstance(m, tn.nn.TensorNetworkLinear) for m in dense.modules())
    assert torch.allclose(logits(dense), logits(small), atol=1e-4)
    status, _, err = tensornet("compress", "small", "again", "--topology-option", "rel_error=0.5")
    assert status == 1
    assert "compressed already" in err


def test_json_is_all_that_stdout_holds(tensornet: Run) -> None:
    how = ("--topology-option", "rel_error=0.3", "--method", "svd")
    status, out, _ = tensornet(
        "compress", gpt2_path(), "small", *how, *TWO_LAYERS, "--json", "--dtype", "bfloat16"
    )
    data = json.loads(out)
    assert status == 0
    assert all(layer["error"] <= 0.3 for layer in data["layers"])
    assert data["file_bytes_after"] == Path("small/model.safetensors").stat().st_size
    assert load("small").dtype == torch.bfloat16
    status, out, _ = tensornet("generate", "small", "In the", "--max-new-tokens", 5, "--json")
    assert (status, json.loads(out)["prompt"]) == (0, "In the")


def test_bits_are_planned_and_shown_in_bytes(tensornet: Run) -> None:
    """Without calibration text one format is all that a plan can choose."""
    how = ("--bits", 5, "--formats", "int8,int4", *TWO_LAYERS, "--method", "nearest")
    status, out, _ = tensornet("plan", gpt2_path(), *how)
    assert status == 0
    assert "int4 dense" in out
    assert "bytes, 4.25 bits a weight" in out
    status, out, _ = tensornet("compress", gpt2_path(), "small", *how, "--json")
    data = json.loads(out)
    assert (status, data["bits_per_weight"]) == (0, 4.25)
    assert {layer["scheme"] for layer in data["layers"]} == {"int4 dense"}
    assert data["file_bytes_after"] == Path("small/model.safetensors").stat().st_size


def test_a_plan_can_be_edited_and_applied(tensornet: Run) -> None:
    how = ("--param-ratio", 0.25, *TWO_LAYERS, "--method", "svd")
    arguments = ("plan", gpt2_path(), *how)
    status, out, _ = tensornet(*arguments)
    assert status == 0
    assert "transformer.h.0.mlp.c_fc" in out
    assert list(Path().iterdir()) == []
    status, out, _ = tensornet(*arguments, "--json")
    data = json.loads(out)
    planned = tn.CompressionPlan.from_dict(data).replace_layer("transformer.h.0.mlp.c_fc", None)
    planned.save("plan.json")
    assert tensornet("compress", gpt2_path(), "small", "--plan", "plan.json")[0] == 0
    small = load("small")
    changed = {n for n, m in small.named_modules() if isinstance(m, tn.nn.TensorNetworkLinear)}
    assert changed == {"transformer.h.2.attn.c_attn"}
    cut = data["model_params_before"] - data["model_params_after"]
    kept = {layer.name: layer.params_before - layer.params_after for layer in planned}
    dense = tn.CompressionPlan.from_dict(data)["transformer.h.0.mlp.c_fc"]
    assert cut == kept["transformer.h.2.attn.c_attn"] + dense.params_before - dense.params_after
    assert small.num_parameters() == data["model_params_before"] - kept["transformer.h.2.attn.c_attn"]


def test_workers_stream_to_the_same_model(tensornet: Run) -> None:
    arguments = ("--param-ratio", 0.5, *TWO_LAYERS, "--method", "svd")
    assert tensornet("compress", gpt2_path(), "whole", *arguments)[0] == 0
    status, out, err = tensornet("compress", gpt2_path(), "streamed", *arguments, "--workers", 1, "--json")
    assert (status, err) == (0, "")
    assert json.loads(out)["file_bytes_after"] == Path("streamed/model.safetensors").stat().st_size
    assert torch.allclose(logits(load("streamed")), logits(load("whole")), atol=1e-5)


def test_all_cores_work_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """On another device, processes would compete for it, so one is the default."""
    cases: list[tuple[dict[str, object], int | None]]
    cases = [({}, 3), ({"workers": 5}, 5), ({"device": "mps"}, None)]
    with monkeypatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: 3)
        for given, workers in cases:
            assert commands._compress_options(given)[0].workers == workers
    assert CompressOptions().workers is None


@pytest.mark.slow
def test_survey_is_kept_in_a_file(tensornet: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("text.txt").write_text(heldout_text()[:20_000])
    how = ("compress", gpt2_path(), *TWO_LAYERS, "--survey", "survey.safetensors")
    text = ("--calibration", "text.txt", *FEW)
    assert tensornet("plan", *how[1:], *text, "--bits", 4.25)[0] == 0

    def never(*_: object, **__: object) -> None:
        raise AssertionError("surveyed again")

    monkeypatch.setattr("tensornet.compression.surveying.survey_model", never)
    status, plan, _ = tensornet("plan", *how[1:], *text, "--bits", 3.25, "--json")
    assert status == 0
    assert "tokens of text.txt" in json.loads(plan)["calibration"]
    status, out, _ = tensornet(*how, *text, "--bits", 3.25, "small")
    assert status == 0
    assert re.search(r"measured    loss increase .* on [0-9,]+ tokens of text.txt", out)
    Path("plan.json").write_text(plan)
    status, _, err = tensornet(*how[:2], *how[-2:], *text, "--plan", "plan.json", "same")
    assert (status, err) == (0, "")
    assert Path("same/model.safetensors").read_bytes() == Path("small/model.safetensors").read_bytes()
    wider = json.loads(plan)
    wider["layers"].append({**wider["layers"][0], "name": "transformer.h.1.mlp.c_fc"})
    Path("plan.json").write_text(json.dumps(wider))
    status, _, err = tensornet(*how[:2], *how[-2:], *text, "--plan", "plan.json", "other")
    assert status == 1
    assert "says nothing" in err
    status, _, err = tensornet(*how, "--bits", 3.25, "--calibration", "default", "other")
    assert status == 1
    assert "other text" in err
    status, _, err = tensornet(*how, *text, "--bits", 3.25, "--formats", "int8,int4", "other")
    assert status == 1
    assert "formats" in err
    assert not Path("other").exists()


@pytest.mark.slow
@pytest.mark.parametrize("budget", [("--formats", "float,int8,int4,int3"), ("--topology", "low_rank")])
def test_the_weight_file_keeps_a_budget_of_bytes(tensornet: Run, budget: tuple[object, ...]) -> None:
    Path("text.txt").write_text(heldout_text()[:20_000])
    how = ("--calibration", "text.txt", *FEW)
    status, _, err = tensornet("compress", gpt2_path(), "small", "--max-bytes", "700KB", *budget, *how)
    assert status == 0, err
    assert 0.97 * 700_000 <= weight_bytes("small") <= 700_000


def test_survey_of_another_model(tensornet: Run) -> None:
    Path("text.txt").write_text(heldout_text()[:20_000])
    how = ("--bits", 4.25, *TWO_LAYERS, "--calibration", "text.txt", *FEW, "--survey", "survey")
    model = load(gpt2_path())
    for parameter in model.parameters():
        parameter.data *= 1.5
    save(model, "other", source=gpt2_path())
    assert tensornet("plan", gpt2_path(), *how)[0] == 0
    status, _, err = tensornet("compress", "other", "small", *how)
    assert status == 1
    assert "another model" in err
    assert not Path("small").exists()


def test_experts_share_cores(tensornet: Run) -> None:
    model = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=1024, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, num_local_experts=4, max_position_embeddings=64,
        )
    )  # fmt: skip
    model.save_pretrained("dense")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(gpt2_path() / name, "dense")
    how = (
        "compress",
        "dense",
        "small",
        "--param-ratio",
        0.6,
        "--target",
        "*experts*",
        "--share-experts",
    )
    status, out, err = tensornet(*how, "--calibration", "default", *FEW, "--json")
    assert status == 0, err
    report = json.loads(out)
    assert report["predicted_loss_increase"] > 0
    cut = sum(x["bytes_before"] - x["bytes_after"] for x in report["layers"])
    assert report["model_bytes_before"] - report["model_bytes_after"] == cut
    load("small")


def test_eval_states_its_windows_and_agrees_with_transformers(tensornet: Run) -> None:
    text = heldout_text()[:3000]
    Path("text.txt").write_text(text)
    status, out, _ = tensornet("eval", gpt2_path(), "--text", "text.txt", "--context", 100, "--json")
    data = json.loads(out)
    model = AutoModelForCausalLM.from_pretrained(gpt2_path())
    ids = load_tokenizer(gpt2_path())(text, return_tensors="pt").input_ids
    losses = [
        model(chunk, labels=chunk).loss.item() * (chunk.shape[1] - 1) for chunk in ids.split(100, dim=1)
    ]
    count = sum(chunk.shape[1] - 1 for chunk in ids.split(100, dim=1))
    assert (status, data["tokens"], data["windows"]) == (0, count, len(losses))
    assert data["perplexity"] == pytest.approx(math.exp(sum(losses) / count), rel=1e-4)


def test_generate_agrees_with_transformers(tensornet: Run) -> None:
    words = ("generate", gpt2_path(), "And God said", "--max-new-tokens", 12)
    status, out, _ = tensornet(*words)
    tokenizer, model = load_tokenizer(gpt2_path()), AutoModelForCausalLM.from_pretrained(gpt2_path())
    inputs = tokenizer("And God said", return_tensors="pt")
    expected = model.generate(**inputs, max_new_tokens=12, do_sample=False, pad_token_id=0)[0]
    assert (status, out.rstrip("\n")) == (0, tokenizer.decode(expected).rstrip("\n"))
    status, out, _ = tensornet("generate", t5_path(), "n th bgnnng")
    assert (status, out.startswith("n th")) == (0, False)  # an encoder-decoder answers, it does not continue


def test_help_lists_every_command(tensornet: Run) -> None:
    status, out, _ = tensornet("--help")
    assert status == 0
    for name in ("compress", "inspect", "eval", "generate", "decompress", "demo"):
        assert name in out
        assert tensornet(name, "--help")[0] == 0
    shown = tensornet("compress", "--help")[1]
    assert all(
        spelled(x) in shown for x in fields(tn.CompressionConfig) if x.metadata and x.default is not True
    )
    described = [(kind, x) for kind in (tn.CompressionConfig, CompressOptions) for x in fields(kind)]
    assert [x.name for kind, x in described if x.metadata and len(help_of(kind, x.name)) < 10] == []


def test_options_of_a_family(tensornet: Run) -> None:
    outs, ins = [64, 8], [8, 16]
    chosen = ("--topology-option", f"out_dims={outs}", "--topology-option", f"in_dims={ins}")
    status, out, _ = tensornet("plan", gpt2_path(), *CHAIN, *chosen, "--json")
    assert status == 0
    (layer,) = json.loads(out)["layers"]
    topology = tn.Topology.from_dict(layer["topology"])
    assert (topology.out_dims, topology.in_dims) == (tuple(outs), tuple(ins))
