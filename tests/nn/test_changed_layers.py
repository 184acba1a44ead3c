"""Layers of stock types that are changed from outside: by hooks that recompute their weight."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import prune, remove_weight_norm, spectral_norm

import tensornet as tn
from tensornet.nn.stock_layers import kind_of

INT8 = tn.CompressionConfig(bits_per_weight=9, formats=("int8",), objective="weight", target_modules="all")
X = torch.randn(3, 24, generator=torch.Generator().manual_seed(0))


def weight_norm(layer: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # models still use what torch advises against
        return nn.utils.weight_norm(layer)


def pruned_bias(layer: nn.Module) -> nn.Module:
    return prune.random_unstructured(layer, "bias", 0.5)


RECOMPUTED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "weight_norm": weight_norm,
    "spectral_norm": spectral_norm,
    "prune": lambda layer: prune.random_unstructured(layer, "weight", 0.5),
    "prune_bias": pruned_bias,
}


@pytest.mark.parametrize("name", RECOMPUTED)
def test_a_weight_that_a_hook_recomputes_stays_dense(name: str) -> None:
    """Loading changes the parameters that the hook reads, and not the attribute `weight`."""
    model, other = (
        nn.Sequential(RECOMPUTED[name](nn.Linear(24, 24)), nn.Linear(24, 24, bias=False)).eval()
        for _ in range(2)
    )
    state = {key: 3 * value for key, value in model.state_dict().items()}
    for x in (model, other):
        x.load_state_dict(state)
    with torch.no_grad():
        expected = other(X)
    reach = tn.compress(model, INT8, progress=False).reach
    assert type(model[0]) is nn.Linear
    assert isinstance(model[1], tn.nn.NetworkModule)
    assert "Linear (weight recomputed by a hook)" in reach.unknown
    with torch.no_grad():
        torch.testing.assert_close(model(X), expected, rtol=0.05, atol=0.05 * float(expected.abs().max()))


def test_a_table_that_a_hook_recomputes_stays_dense() -> None:
    model = nn.Sequential(weight_norm(nn.Embedding(50, 24)), nn.Linear(24, 24))
    tn.compress(model, INT8, progress=False)
    assert type(model[0]) is nn.Embedding


def test_errors_name_such_layers_and_say_how_to_mend_them() -> None:
    model = nn.Sequential(weight_norm(nn.Linear(24, 24)))
    with pytest.raises(tn.TargetError, match=r"Nothing to compress.*recomputes the weight of 0:.*remove"):
        tn.compress(model, INT8, progress=False)
    model.append(nn.Linear(24, 24))
    with pytest.raises(tn.TargetError, match=r"Pattern '0' matches no.*recomputes the weight of 0:"):
        tn.plan(model, tn.CompressionConfig(target_modules="0", param_ratio=0.5, objective="weight"))
    with pytest.raises(tn.TargetError, match=r"got Linear \(weight recomputed by a hook\)"):
        tn.nn.TensorNetworkLinear.from_linear(model[0], max_bond=2)
    remove_weight_norm(model[0])
    assert kind_of(model[0]) is not None
