"""Menus of export targets: their formats, bytes and fused layers in a plan; a target without a menu."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tensornet as tn
from tensornet.errors import FormatError
from tensornet.quantization.menus import MENUS, Menu


@pytest.fixture(autouse=True)
def _own_menus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the menus that plugins have registered."""
    monkeypatch.setattr(MENUS, "_items", {})


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.last = (nn.Linear(64, 64) for _ in range(3))


@pytest.mark.parametrize("formats", ["other", ("other",), ("other", "int4")])
def test_a_target_without_a_menu(formats: str | tuple[str, ...]) -> None:
    with pytest.raises(FormatError, match="tensornet_hf"):
        tn.CompressionConfig(bits_per_weight=4, formats=formats)


def test_a_menu_of_ones_own() -> None:
    def group(name: str, stack: str) -> str:
        assert not stack
        return "both" if name in ("left", "right") else name

    menu = Menu(("int8", "int4:g32"), lambda *_: 1000, whole_model=True, group=group)
    MENUS.add("other", menu)
    torch.manual_seed(0)
    model = Block()
    with torch.no_grad():
        model.right.weight.mul_(100)
    config = tn.CompressionConfig(bits_per_weight=6, formats="other", method="nearest")
    assert config.target_modules == "all"
    plan = tn.plan(model, config)
    assert [layer.bytes_after for layer in plan] == [1000, 1000, 1000]
    by_name = {layer.name: layer.storage.number_format.name for layer in plan}
    assert by_name["left"] == by_name["right"]
    assert set(by_name.values()) <= set(menu.formats)
    MENUS.remove("other")
    with pytest.raises(FormatError, match="'other'"):
        _ = plan.bytes_after
