"""What happens where the plugin was not imported: nothing is written that nobody could load."""

from __future__ import annotations

import copy
import pickle
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


class Owner(nn.Module):
    """Holds a part that is compressed alone, and saves its tensors in its own way."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Sequential(nn.Linear(12, 12))
        self.other = nn.Linear(12, 12)

    def save_pretrained(self, folder: str) -> list[str]:
        return list(self.state_dict())


def owner_of_a_compressed_part() -> Owner:
    owner = Owner()
    tn.compress(owner.part, tn.CompressionConfig(max_bond=4), progress=False)
    return owner


def test_saving_the_owner_of_a_compressed_part_is_refused() -> None:
    owner = owner_of_a_compressed_part()
    told = r"A part of this Owner, part, holds .*import tensornet_hf.*prepare_for_saving\(model\)"
    for each in (owner, copy.deepcopy(owner), pickle.loads(pickle.dumps(owner))):
        with pytest.raises(TargetError, match=told):
            each.save_pretrained("x")
    tn.decompress(owner.part)
    assert owner.save_pretrained("x") == list(Owner().state_dict())


def test_tensors_of_such_an_owner_are_read_and_loaded_as_ever() -> None:
    owner = owner_of_a_compressed_part()
    state = owner.state_dict()
    assert state.keys() == {name for name, _ in owner.named_parameters()}
    again = owner_of_a_compressed_part()
    again.load_state_dict(state)
    assert torch.equal(again.part(torch.ones(1, 12)), owner.part(torch.ones(1, 12)))


def test_an_extension_that_describes_the_owner_is_trusted() -> None:
    class Describing(Saving):
        def is_described(self, model: nn.Module) -> bool:
            return isinstance(model, Owner)

    extensions.register_extension(Describing())
    assert "other.weight" in owner_of_a_compressed_part().save_pretrained("x")


def test_models_that_nobody_saves_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(12, 12))
    tn.compress(model, tn.CompressionConfig(max_bond=4), progress=False)
    assert not hasattr(model, "save_pretrained")
    assert model(torch.ones(1, 12)).shape == (1, 12)


def test_importing_the_plugin_after_compressing_is_early_enough(tmp_path: Path) -> None:
    code = f"""
import copy, torch, transformers, tensornet as tn
dense = transformers.GPT2LMHeadModel(transformers.GPT2Config(
    n_layer=1, n_embd=24, n_head=2, vocab_size=101, n_positions=16, bos_token_id=1, eos_token_id=2)).eval()
model = copy.deepcopy(dense)
tn.compress(model, tn.CompressionConfig(target_modules="all"), progress=False)
try:
    model.save_pretrained({str(tmp_path)!r})
except tn.TargetError:
    pass
else:
    raise SystemExit("saved without the plugin")
import os
assert os.listdir({str(tmp_path)!r}) == []
part = copy.deepcopy(dense)
tn.compress(part.transformer.h[0], tn.CompressionConfig(max_bond=4), progress=False)
try:
    part.save_pretrained({str(tmp_path / "part")!r})
except tn.TargetError:
    pass
else:
    raise SystemExit("a part saved without the plugin")
import tensornet_hf as th
model.save_pretrained({str(tmp_path)!r})
ids = torch.arange(6)[None]
assert torch.equal(th.load({str(tmp_path)!r})(ids).logits, model(ids).logits)
th.save_model(part, {str(tmp_path / "whole")!r})
assert torch.equal(th.load({str(tmp_path / "whole")!r})(ids).logits, part(ids).logits)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
