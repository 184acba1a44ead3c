"""`tensornet compare`: folders side by side, in numbers and as a picture, and folders it cannot load."""

import json
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

import tensornet as tn
import tensornet_hf as th
from tensornet_hf.checkpoint import weight_bytes
from tensornet_hf.compare import compare_folders, count_weights, load_any, quantization_method
from tensornet_hf.embedded import calibration_text, gpt2_path, heldout_text
from tensornet_hf.text import load_tokenizer

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four layers in int4, rounded to nearest."""
    folder = tmp_path_factory.mktemp("small") / "small"
    model = th.load(gpt2_path())
    config = tn.CompressionConfig(formats=("int4",), bits_per_weight=5, objective="weight")
    tn.compress(model, config, progress=False)
    th.save(model, folder, source=gpt2_path())
    return folder


@pytest.mark.slow
def test_folders_side_by_side(tensornet: Run, small: Path) -> None:
    Path("text.txt").write_text(heldout_text()[:6_000])
    arguments = ("compare", gpt2_path(), small, "--text", "text.txt", "--new-tokens", 5)
    status, out, _ = tensornet(*arguments, "--json")
    assert status == 0
    data = json.loads(out)
    dense, ours = data["models"]
    assert [(x["name"], x["scheme"]) for x in (dense, ours)] == [("gpt2", "dense"), ("small", "tensornet")]
    assert (dense["bytes"], ours["bytes"]) == (weight_bytes(gpt2_path()), weight_bytes(small))
    assert ours["bits_per_weight"] == pytest.approx(8 * ours["bytes"] / 940_800)
    assert dense["parameters"] == 940_800 < ours["parameters"]  # the scales are numbers too
    assert ours["milliseconds"] > 0
    measured = json.loads(tensornet("eval", small, "--text", "text.txt", "--json")[1])
    assert ours["quality"]["loss"] == pytest.approx(measured["loss"], abs=1e-4)
    prompt = " ".join(heldout_text().split()[:12])
    assert data["prompt"] == prompt
    again = json.loads(tensornet("generate", small, "--prompt", prompt, "--max-new-tokens", 5, "--json")[1])
    assert ours["sample"] == again["text"]

    status, out, _ = tensornet(*arguments)
    assert status == 0
    assert [x.split()[0] for x in out.splitlines()[1:3]] == ["gpt2", "small"]
    assert f"{ours['quality']['loss'] - dense['quality']['loss']:+.4f}" in out
    assert f"{ours['quality']['kl']:.4f}" in out
    assert dense["quality"]["kl"] == pytest.approx(0, abs=1e-6)
    assert ours["quality"]["kl"] > 1e-6
    assert "small writes:" in out


def quantized_by(folder: Path, method: object) -> Path:
    """A folder that says that another quantizer wrote it."""
    shutil.copytree(gpt2_path(), folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.skipif(find_spec("gptqmodel") is not None, reason="gptqmodel is installed")
def test_a_quantizer_that_is_not_installed(tensornet: Run, tmp_path: Path) -> None:
    status, out, err = tensornet("compare", quantized_by(tmp_path / "theirs", "gptq"), gpt2_path())
    assert (status, out) == (1, "")
    assert "theirs is quantized by 'gptq'" in err
    assert "not installed" in err


@pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is not installed")
def test_a_folder_of_torchao(tensornet: Run, tmp_path: Path) -> None:
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    scheme = TorchAoConfig(Int8WeightOnlyConfig(version=2))
    model = AutoModelForCausalLM.from_pretrained(gpt2_path(), quantization_config=scheme)
    model.save_pretrained(tmp_path / "theirs")
    load_tokenizer(gpt2_path()).save_pretrained(tmp_path / "theirs")
    Path("text.txt").write_text(heldout_text()[:3_000])
    status, out, err = tensornet("compare", gpt2_path(), "./theirs", "--text", "text.txt", "--json")
    assert (status, err) == (0, "")
    dense, theirs = json.loads(out)["models"]
    assert theirs["scheme"] == "torchao"
    assert theirs["quality"]["loss"] == pytest.approx(dense["quality"]["loss"], abs=0.1)


@pytest.mark.skipif(find_spec("compressed_tensors") is None, reason="compressed-tensors is not installed")
def test_a_folder_of_compressed_tensors(tensornet: Run) -> None:
    """Our own int4 layers, exported: the same model in the format of another quantizer."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=1024, max_position_embeddings=64, **sizes)).save_pretrained(
        "dense"
    )
    load_tokenizer(gpt2_path()).save_pretrained("dense")
    how = ("--bits", 5, "--formats", "int4", "--objective", "weight")
    assert tensornet("compress", "dense", "small", *how)[0] == 0
    assert tensornet("export", "small", "theirs", "--target", "compressed-tensors")[0] == 0
    Path("text.txt").write_text(heldout_text()[:3_000])
    status, out, _ = tensornet("compare", "small", "./theirs", "--text", "text.txt", "--json")
    assert status == 0
    ours, theirs = json.loads(out)["models"]
    assert theirs["scheme"] == "compressed-tensors"
    assert theirs["quality"]["loss"] == pytest.approx(ours["quality"]["loss"], abs=1e-3)


#: Written by llmcompressor 0.14.0 (compressed-tensors 0.19.0, transformers 5.17): OPT of one layer, linear
#: layers by GPTQ in int4, groups of 64, and the logits of ids 0 to 15 in that process.
GPTQ = Path(__file__).parents[2] / "fixtures" / "gptq_by_llmcompressor"


def test_a_gptq_folder_is_recognised() -> None:
    assert quantization_method(GPTQ) == "compressed-tensors"
    assert weight_bytes(GPTQ) == (GPTQ / "model.safetensors").stat().st_size
    assert count_weights(GPTQ) == 64 * 64 + 34 * 64 + 6 * (64 * 64 + 64) + 3 * 2 * 64


@pytest.mark.skipif(find_spec("compressed_tensors") is None, reason="compressed-tensors is not installed")
def test_a_gptq_folder_gives_the_logits_of_its_writer(tensornet: Run) -> None:
    model = load_any(GPTQ)
    expected = load((GPTQ / "logits.outputs").read_bytes())["logits"]
    with torch.no_grad():
        found = model(torch.arange(16)[None]).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    status, out, _ = tensornet("compare", GPTQ, "--json")
    assert status == 0
    (facts,) = json.loads(out)["models"]
    assert (facts["scheme"], facts["parameters"]) == ("compressed-tensors", count_weights(GPTQ))
    assert 8 < facts["bits_per_weight"] < 16  # embeddings and scales in float32, and 4 bits


def test_folders_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for parent in ("a", "b"):
        shutil.copytree(gpt2_path(), tmp_path / parent / "model")
    found = compare_folders([tmp_path / "a" / "model", tmp_path / "b" / "model"])
    assert [folder.name for folder in found] == ["a/model", "b/model"]
    assert count_weights(tmp_path / "a" / "model") == 940_800


@pytest.mark.slow
def test_held_out_text_measures_plain_methods_of_the_same_bytes(tensornet: Run) -> None:
    Path("cal.txt").write_text(calibration_text()[:8_000])
    Path("held.txt").write_text(heldout_text()[:6_000])
    how = ("--bits", 4.25, "--formats", "int5,int4,int3", "--target", "*.h.[01].mlp.c_fc")
    arguments = ("compress", gpt2_path(), "small", *how, "--calibration", "cal.txt", "--held-out", "held.txt")
    status, out, _ = tensornet(*arguments, "--report", "r.html")
    assert status == 0
    measured = {x.split()[2]: x for x in out.splitlines() if x.startswith("held out")}
    assert list(measured) == ["original", "compressed", "round", "GPTQ", "plain"]
    page = Path("r.html").read_text()
    assert "measured</em>" in page
    assert "gpt2, compressed" in page
    assert str(gpt2_path()) not in page
    loss = float(json.loads(tensornet("eval", "small", "--text", "held.txt", "--json")[1])["loss"])
    dense = float(json.loads(tensornet("eval", gpt2_path(), "--text", "held.txt", "--json")[1])["loss"])
    increase = float(measured["compressed"].partition("loss increase ")[2].split(",")[0])
    assert loss - dense == pytest.approx(increase, abs=2e-4)


@pytest.mark.parametrize("kind", ["encoder", "classifier"])
def test_a_text_says_nothing_about_models_that_write_none(
    tensornet: Run, kind: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(kind)
    Path("cal.txt").write_text("\n\n".join(["rain falls a cat", "the sun shines warm"] * 8))
    Path("held.txt").write_text("the wet kitten\n\na warm rain shines\n")
    texts = ("--calibration", "cal.txt", "--held-out", "held.txt")
    status, _, err = tensornet("compress", folder, "small", "--bits", 5, *texts)
    assert status == 1
    assert "no loss can be measured on text without labels" in err
    assert not Path("small").exists()
    status, _, err = tensornet("compare", folder, "--text", "held.txt")
    assert status == 1
    assert "cannot generate text" in err
