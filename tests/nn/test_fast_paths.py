"""PyTorch's own encoders, which in eval hand weights to one fused operation and call no layer."""

from __future__ import annotations

import copy

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
def test_compressed_encoders_run_in_eval(gradients: bool, padded: Tensor | None) -> None:
    model = encoder()
    batch = ({"x": X} if padded is None else {"x": X, "padded": padded}, Y)
    config = tn.CompressionConfig(param_ratio=0.5, target_modules=["*.linear1", "*.linear2"])
    stats = tn.calibrate(model, [batch], config=config)
    assert set(stats.columns) == {f"stack.layers.{k}.linear{i}" for k in (0, 1) for i in (1, 2)}
    tn.compress(model, config, calibration=stats, progress=False)
    training = copy.deepcopy(model).train()
    with torch.set_grad_enabled(gradients):
        torch.testing.assert_close(model(X, padded), training(X, padded), rtol=1e-4, atol=1e-5)
