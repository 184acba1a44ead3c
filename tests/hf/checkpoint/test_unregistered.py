"""What happens where the plugin was not imported: nothing is written that nobody could load."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import tensornet as tn
from tensornet.errors import TargetError
from tensornet.nn import extension as extensions


class Model(nn.Module):
    """Saves itself in its own way, as models of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 12)

    def save_pretrained(self, folder: str) -> str:
        return f"saved in {folder}"


@pytest.fixture(autouse=True)
def no_extensions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extensions, "_EXTENSIONS", [])


class Saving(extensions.ModelExtension):
    def layers_replaced(self, model: nn.Module) -> bool:
        return True


def test_saving_is_refused_until_the_model_is_dense_again() -> None:
    model = Model()
    tn.compress(model, tn.CompressionConfig(max_bond=4), progress=False)
    with pytest.raises(TargetError, match=r"save_pretrained does not know.*import tensornet_hf.*decompress"):
        model.save_pretrained("x")
    tn.decompress(model)
    assert model.save_pretrained("x") == "saved in x"


def test_an_extension_that_comes_later_is_asked() -> None:
    model = Model()
    tn.compress(model, tn.CompressionConfig(max_bond=4), progress=False)
    extensions.register_extension(Saving())
    assert model.save_pretrained("x") == "saved in x"
    assert "save_pretrained" not in vars(model)


def test_models_that_nobody_saves_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(12, 12))
    tn.compress(model, tn.CompressionConfig(max_bond=4), progress=False)
    assert not hasattr(model, "save_pretrained")
    assert model(torch.ones(1, 12)).shape == (1, 12)


def test_importing_the_plugin_after_compressing_is_early_enough(tmp_path: Path) -> None:
    code = f"""
import torch, transformers, tensornet as tn
model = transformers.GPT2LMHeadModel(transformers.GPT2Config(
    n_layer=1, n_embd=24, n_head=2, vocab_size=101, n_positions=16, bos_token_id=1, eos_token_id=2)).eval()
tn.compress(model, tn.CompressionConfig(target_modules="all"), progress=False)
try:
    model.save_pretrained({str(tmp_path)!r})
except tn.TargetError:
    pass
else:
    raise SystemExit("saved without the plugin")
import os
assert os.listdir({str(tmp_path)!r}) == []
import tensornet_hf as th
model.save_pretrained({str(tmp_path)!r})
ids = torch.arange(6)[None]
assert torch.equal(th.load({str(tmp_path)!r})(ids).logits, model(ids).logits)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
