"""The command that packs fine-tuned models: its table, the folder that it adds to, and wrong options."""

import json
from pathlib import Path

import pytest
import torch

import tensornet_hf as th
from tests.hf.cli.conftest import Run

BASE = th.embedded.gpt2_path()
FEW = ("--bits", 3, "--formats", "int8:row,int4:row,int2:row", "--calibration-tokens", 1024)


@pytest.fixture(autouse=True)
def _models(tmp_path: Path) -> None:
    """Two models that differ from the base in one matrix each, and a text."""
    (tmp_path / "law.txt").write_text(th.embedded.heldout_text()[:8_000])
    for k, name in enumerate(("law", "code")):
        model = th.load(BASE)
        generator = torch.Generator().manual_seed(k)
        weight = model.transformer.h[k].mlp.c_fc.weight
        with torch.no_grad():
            weight.add_(0.02 * torch.randn(weight.shape, generator=generator))
        th.save(model, tmp_path / f"my-{name}", source=BASE)


def test_models_are_packed_inspected_and_used(tensornet: Run, tmp_path: Path) -> None:
    texts = ("--calibration", "law.txt")
    status, out, err = tensornet("pack", BASE, "pack", "--model", "law=my-law", *texts, *FEW)
    assert status == 0, err
    assert "written to  pack" in out
    status, out, err = tensornet(
        "pack", BASE, "pack", "--model", "code=my-code", "--calibration", "code=law.txt", *FEW, "--json",
        "--shared-budget", "--surveys", "kept",
    )  # fmt: skip
    assert status == 0, err
    report = json.loads(out)
    assert report["others"] == ["law"]
    assert (tmp_path / "kept" / "code.safetensors").is_file()
    assert report["models"]["code"]["bits_per_weight"] <= 3
    status, out, err = tensornet("inspect", "pack")
    assert status == 0, err
    assert "packed model" in out
    assert "the next one" not in out
    status, out, _ = tensornet("inspect", "pack", "--json")
    found = json.loads(out)
    assert (status, found["layers"], found["next"], found["shared"]) == (0, 2, None, 0)
    assert found["specialists"]["code"] == report["models"]["code"]["bytes"]
    status, out, err = tensornet("generate", "pack", "And", "--specialist", "law", "--max-new-tokens", 4)
    assert status == 0, err
    assert out.startswith("And")
    status, out, err = tensornet("export", "pack", "alone", "--specialist", "law", "--whole")
    assert (status, out.split()) == (0, ["written", "to", "alone"]), err
    status, out, err = tensornet("export", "pack", "lora", "--specialist", "law")
    assert status != 0
    assert "layer transformer.h.0.mlp.c_fc: its change is not of low rank" in err
    status, out, err = tensornet("export", "pack", "lora", "--specialist", "law", "--rank", 4, "--json")
    assert status == 0, err
    assert Path(json.loads(out)["adapter"]).name == "lora"
    for wrong in (("--whole", "--rank", 4), ("--whole", "--networks", "lora")):
        status, out, err = tensornet("export", "pack", "other", "--specialist", "law", *wrong)
        assert status != 0
        assert "leave" in err
    status, out, err = tensornet("export", BASE, "other", "--whole")
    assert status != 0
    assert "are for a folder of specialists" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--model", "my-law"), "--model takes KEY=VALUE"),
        (("--model", "law=my-law", "--calibration", "other=law.txt"), "for each of law; check law, other"),
        (("--model", "law=my-law", "--calibration", "none.txt", *FEW), "none.txt"),
        (("--model", f"law={BASE}", "--calibration", "law.txt", *FEW), "'law' is equal to its base"),
        (("--model", "law=my-law", "--max-bytes", 1, *FEW[2:]), "--max-bytes 1 is too small: biases"),
    ],
)
def test_wrong_options_write_nothing(
    tensornet: Run, tmp_path: Path, options: tuple[object, ...], message: str
) -> None:
    status, out, err = tensornet("pack", BASE, "pack", *options)
    assert status != 0
    assert not out
    assert message in err
    assert not (tmp_path / "pack").exists()
