"""PyTorch's own encoders, which in eval hand weights to one fused operation and call no layer."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import tensornet as tn

X, Y = torch.randn(12, 6, 32, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 5
PADDED = torch.arange(6)[None] >= torch.arange(12)[:, None] % 5 + 2


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0)
        self.stack = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor, padded: Tensor | None = None) -> Tensor:
        return self.head(self.stack(x, src_key_padding_mask=padded).mean(1))


def encoder() -> Encoder:
    torch.manual_seed(0)
    return Encoder().eval()


@pytest.mark.parametrize("padded", [None, PADDED], ids=["whole", "padded"])
@pytest.mark.parametrize("gradients", [False, True])
def test_compressed_encoders_run_in_eval(gradients: bool, padded: Tensor | None, tmp_path: Path) -> None:
    model = encoder()
    batch = ({"x": X} if padded is None else {"x": X, "padded": padded}, Y)
    config = tn.CompressionConfig(param_ratio=0.5, target_modules=["*.linear1", "*.linear2"])
    stats = tn.calibrate(model, [batch], config=config)
    assert set(stats.columns) == {f"stack.layers.{k}.linear{i}" for k in (0, 1) for i in (1, 2)}
    tn.compress(model, config, calibration=stats, progress=False)
    training = copy.deepcopy(model).train()
    with torch.set_grad_enabled(gradients):
        torch.testing.assert_close(model(X, padded), training(X, padded), rtol=1e-4, atol=1e-5)
    tn.save_model(model, tmp_path / "m")
    with torch.set_grad_enabled(gradients):
        loaded = tn.load_model(encoder(), tmp_path / "m")
        torch.testing.assert_close(loaded(X, padded), model(X, padded))


def test_dense_encoders_are_fused_again() -> None:
    model, asked = encoder(), ("activation_relu_or_gelu", "use_nested_tensor")

    def answers() -> list[object]:
        return [getattr(module, x) for module in model.modules() for x in asked if hasattr(module, x)]

    before = answers()
    assert all(before)
    tn.compress(model, tn.CompressionConfig(param_ratio=0.5, objective="weight"), progress=False)
    assert not any(answers())
    tn.decompress(model)
    assert answers() == before


def test_calibration_leaves_the_switch_alone() -> None:
    tn.calibrate(encoder(), [(X, Y)])
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("gradients", [False, True])
def test_every_pass_in_float16_is_contracted_in_float32(gradients: bool) -> None:
    layer = tn.nn.TensorNetworkLinear(tn.topologies.low_rank(out_features=8, in_features=512, rank=4)).eval()
    few, whole = torch.full((1, 512), 2.0), torch.full((64, 512), 2.0)
    with torch.no_grad():
        layer.core_0.fill_(2**-13)
        layer.core_1.fill_(100.0)  # between the cores are 102400s, more than float16 holds
        expected = layer(few)  # and a fast path for float32
    with torch.set_grad_enabled(gradients):
        for _ in range(2):
            torch.testing.assert_close(layer(few.half()), expected.half())
        half = copy.deepcopy(layer).half()
        for x in (few, few, whole, few):
            torch.testing.assert_close(half(x.half()), expected.half().expand(len(x), -1))
