"""From a folder to a GGUF file and back to a number: compress, export and eval."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from tensornet_hf.embedded import calibration_text, gpt2_path, heldout_text

pytestmark = pytest.mark.slow  # needs the extra `gguf`
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def texts(tensornet: Run) -> None:
    """Files with a calibration and a held-out text in the folder of the run."""
    Path("text.txt").write_text(calibration_text()[:40_000])
    Path("held.txt").write_text(heldout_text()[:20_000])


def test_compress_to_a_file_of_a_given_size(tensornet: Run, texts: None) -> None:
    data = ("--calibration", "text.txt", "--calibration-tokens", 4096)
    status, out, err = tensornet("compress", gpt2_path(), "small.gguf", "--max-bytes", "0.7MB", *data)
    assert status == 0, err
    assert Path("small.gguf").stat().st_size == pytest.approx(700_000, rel=0.01)
    assert "small.gguf" in out
    status, out, err = tensornet(
        "eval", "small.gguf", "--reference", gpt2_path(), "--text", "held.txt", "--json"
    )
    assert status == 0, err
    found = json.loads(out)["divergence"]
    assert 0 < found["median"][0] < found["mean"][0] < found["percentile_99"][0] < 0.2
    assert 0.8 < found["same_top"][0] < 1
    assert all(value[1] > 0 for name, value in found.items() if isinstance(value, list))


@pytest.mark.parametrize("target", ["mlx", "compressed-tensors"])
def test_compress_to_a_folder_of_a_given_size(tensornet: Run, texts: None, target: str) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 1024, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4)).to(torch.bfloat16)
    model.save_pretrained("dense")
    AutoTokenizer.from_pretrained(gpt2_path()).save_pretrained("dense")
    how = ("--to", target, "--calibration", "text.txt", "--calibration-tokens", 2048)
    size = 300_000 if target == "mlx" else 700_000
    status, out, err = tensornet("compress", "dense", "small", "--max-bytes", size, *how)
    assert status == 0, err
    assert "is dense in the file" not in out + err
    assert Path("small/model.safetensors").stat().st_size == pytest.approx(size, rel=0.01)
    assert target in json.dumps(json.loads(Path("small/config.json").read_text())) or target == "mlx"
    status, out, err = tensornet("plan", "dense", "--json", "--bits", 4.3, *how)
    assert status == 0, err
    assert {layer["target"] for layer in json.loads(out)["layers"]} == {target}


def test_exported_folder_predicts_the_same(tensornet: Run, texts: None) -> None:
    how = ("--bits", 5.5, "--formats", "gguf", "--method", "nearest", "--exclude", "transformer.wpe")
    assert tensornet("compress", gpt2_path(), "small", *how)[0] == 0
    status, out, err = tensornet("export", "small", "small.gguf", "--json")
    assert status == 0, err
    assert json.loads(out)["dense"] == {}
    measured = []
    for path in ("small", "small.gguf"):
        how = ("--reference", gpt2_path(), "--text", "held.txt", "--json")
        status, out, err = tensornet("eval", path, *how)
        assert status == 0, err
        measured.append(json.loads(out))
    ours, theirs = measured
    assert theirs["loss"] == pytest.approx(ours["loss"], rel=1e-4)
    assert theirs["divergence"]["mean"] == pytest.approx(ours["divergence"]["mean"], rel=1e-4)
    how = ("In the beginning", "--max-new-tokens", 5, "--json")
    written = [json.loads(tensornet("generate", path, *how)[1])["text"] for path in ("small", "small.gguf")]
    assert written[0] == written[1] != ""
    status, _, err = tensornet("inspect", "small.gguf")
    assert status != 0
    assert "GGUF file" in err


def test_bad_requests(tensornet: Run, texts: None) -> None:
    for arguments, word in (
        (
            ("compress", gpt2_path(), "x.gguf", "--max-bytes", "20kB", "--calibration", "text.txt"),
            "vocabulary",
        ),
        (("export", gpt2_path(), "x"), "gguf"),
        (("compress", gpt2_path(), "x.gguf", "--bits", 5, "--to", "mlx"), "end in .gguf"),
        (("compress", gpt2_path(), "x", "--bits", 5, "--to", "onnx"), "onnx"),
        (("compress", gpt2_path(), "hf://a/b", "--bits", 5, "--to", "mlx"), "--to"),
        (("upcycle", gpt2_path(), "x.gguf"), "folder"),
        (("export", gpt2_path(), "x.gguf", "--networks", "keep"), "refuse"),
        (("eval", gpt2_path(), "--reference", gpt2_path()), "--text"),
        (("eval", "text.txt", "--text", "held.txt"), "text.txt"),
    ):
        status, out, err = tensornet(*arguments)
        assert (status != 0, out) == (True, ""), arguments
        assert word in err
    assert not Path("x.gguf").exists()


def test_a_recipe_is_written_with_its_importance_matrix(tensornet: Run, texts: None) -> None:
    """A recipe from a text, and another from the importance matrix of the first."""
    data = ("--calibration", "text.txt", "--calibration-tokens", 1024)
    how = ("--formats", "q8_0,q6_k,q4_0", "--max-bytes", "0.9MB")
    status, out, err = tensornet("recipe", gpt2_path(), "plan.txt", *how, *data)
    assert status == 0, err
    lines = Path("plan.txt").read_text().splitlines()
    command = "--pure --imatrix plan.imatrix.gguf --tensor-type-file plan.txt --token-embedding-type q"
    assert command in out
    assert "25716" in out
    assert lines[0].startswith(r"^blk\.0\.attn_qkv\.weight$=q")
    how = (*how, "--imatrix", "plan.imatrix.gguf", "--json")
    status, out, err = tensornet("recipe", gpt2_path(), "other.txt", *how)
    assert status == 0, err
    found = json.loads(out)
    assert found["file_bytes"] <= 900_000
    assert len(Path("other.txt").read_text().splitlines()) == len(lines) == len(found["types"]) - 1
    assert not Path("other.imatrix.gguf").exists()
