"""Layers on the device: strategies, integers, autocast, memory held, training, mixtures, default device."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from hf_models import gpt2
from torch import Tensor, nn

import tensornet as tn
import tensornet_hf as th
import tensornet_moe as tm
from tensornet.nn.strategy import STRATEGIES
from tensornet.topologies import low_rank, mpo

LAYERS = {
    "mpo": mpo(out_dims=(8, 8), in_dims=(8, 8), max_bond=12),
    "padded": mpo(out_dims=(8, 9), in_dims=(8, 9), max_bond=12, out_features=70, in_features=64),
    "low rank": low_rank(out_features=64, in_features=64, rank=16),
}
FORMATS = ("int8:row", "int8", "int4", "int3", "int2")
TOKENS = (1, 5, 300)


def layer_on(device: str, name: str = "mpo", dtype: torch.dtype = torch.float32) -> tn.nn.TensorNetworkLinear:
    torch.manual_seed(0)
    layer = tn.nn.TensorNetworkLinear(LAYERS[name])
    nn.init.normal_(layer.bias)
    return layer.to(device, dtype).eval()


def dense(layer: tn.nn.TensorNetworkLinear, x: Tensor) -> Tensor:
    """The output in double precision on the CPU."""
    matrix, bias = layer.to_matrix().double().cpu(), layer.bias.double().cpu()
    return nn.functional.linear(x.double().cpu(), matrix, bias).to(torch.float32)


def classifier(device: str) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64)).to(device)


def batches(device: str) -> list[Tensor]:
    seeded = (torch.Generator().manual_seed(k) for k in range(2))
    return [torch.randn(64, 64, generator=each, device="cpu").to(device) for each in seeded]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", LAYERS)
def test_every_strategy_gives_the_dense_output(device: str, name: str, strategy: str) -> None:
    layer = layer_on(device, name)
    tn.nn.set_strategy(layer, strategy)  # type: ignore[arg-type]
    for tokens in TOKENS:
        x = torch.randn(tokens, 64).to(device)
        for recording in (True, False):
            with torch.set_grad_enabled(recording):
                y = layer(x)
            assert y.device.type == device
            torch.testing.assert_close(y.cpu(), dense(layer, x), rtol=1e-3, atol=1e-3)


def test_the_plan_is_explained_for_the_device(device: str) -> None:
    layer = layer_on(device)
    text = str(layer.explain(tokens=16))
    assert "factorized" in text
    assert layer.route(16, on_cpu=device == "cpu") in range(-2, len(layer.plan.applies))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(device: str, dtype: torch.dtype) -> None:
    layer = layer_on(device)
    x = torch.randn(5, 64).to(device)
    for strategy in STRATEGIES:
        tn.nn.set_strategy(layer, strategy)
        with torch.autocast(device, dtype=dtype):
            y = layer(x)
        assert y.dtype == dtype
        torch.testing.assert_close(y.float().cpu(), dense(layer, x), rtol=5e-2, atol=1e-1)
        (gradient,) = torch.autograd.grad(y.float().square().sum(), next(iter(layer.stored.values())))
        assert gradient.isfinite().all()


@pytest.mark.parametrize("number_format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_integers_multiply_as_their_matrix_does(device: str, number_format: str, dtype: torch.dtype) -> None:
    model = classifier(device).to(dtype).eval()
    plan = tn.plan(
        model, tn.CompressionConfig(topology_options={"max_bond": 4}, target_modules="all", method="svd")
    )
    for name in ("0", "2"):
        plan = plan.replace_layer(name, None, number_format)
    tn.apply_plan(model, plan)
    layer = model[0]
    held = sum(t.nbytes for t in model.state_dict().values())
    for tokens in TOKENS:
        x = torch.randn(tokens, 64).to(device, dtype)
        with torch.no_grad():
            y = layer(x)
        close = 1e-3 if dtype is torch.float32 else 5e-2
        torch.testing.assert_close(y.float().cpu(), dense(layer, x), rtol=close, atol=close)
        x.requires_grad_()
        (gradient,) = torch.autograd.grad(layer(x).sum(), x)
        expected = layer.to_matrix().float().sum(0).expand_as(gradient)
        torch.testing.assert_close(gradient.float(), expected, rtol=close, atol=10 * close)
    assert sum(t.nbytes for t in model.state_dict().values()) == held


def allocated(device: str) -> int:
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated(device)


@pytest.mark.parametrize("strategy", ["auto", "factorized", "reconstruct"])
def test_a_pass_leaves_no_matrix_behind(device: str, strategy: str) -> None:
    model = classifier(device).eval()
    config = tn.CompressionConfig(param_ratio=0.5, target_modules="all", method="svd")
    tn.compress(model, config, progress=False)
    tn.nn.set_strategy(model, strategy)  # type: ignore[arg-type]
    x = torch.randn(32, 64).to(device)
    with torch.no_grad():
        model(x)  # libraries take their workspaces
        before = allocated(device) if device == "cuda" else 0
        for tokens in TOKENS:
            model(x[:tokens])
        after = allocated(device) if device == "cuda" else 0
    assert after == before


def test_a_loaded_model_holds_what_its_file_holds(device: str, tmp_path: object) -> None:
    model = gpt2()
    config = tn.CompressionConfig(param_ratio=0.5, method="svd")
    tn.compress(model, config, progress=False)
    model.save_pretrained(tmp_path)
    before = allocated(device) if device == "cuda" else 0
    again = th.load(tmp_path).to(device)
    tensors = {t.data_ptr(): t.nbytes for t in [*again.parameters(), *again.buffers()]}
    if device == "cuda":
        # The allocator rounds each block up to 512 bytes.
        assert allocated(device) - before <= sum(tensors.values()) + 512 * len(tensors)
    ids = torch.arange(3, 15).reshape(2, 6)
    with torch.no_grad():
        got, expected = again.eval()(ids.to(device)).logits, model.eval()(ids).logits
    torch.testing.assert_close(got.cpu(), expected, rtol=1e-3, atol=1e-3)


def test_calibrated_compression_and_healing(device: str) -> None:
    teacher, model = classifier(device), classifier(device)
    data = batches(device)
    report = tn.compress(
        model, tn.CompressionConfig(param_ratio=0.4, target_modules="all"), calibration=data, progress=False
    )
    assert report.layers
    assert {p.device.type for p in model.parameters()} == {device}

    def distance() -> float:
        with torch.no_grad():
            return float((model(data[0]) - teacher(data[0])).square().mean())

    before = distance()
    tn.heal(model, teacher, data, steps=20, lr=1e-2)
    assert distance() < before


@pytest.mark.parametrize("granularity", ["core", "element"])
def test_a_masked_training_step_of_a_mixture(device: str, granularity: str) -> None:
    model = gpt2()
    th.upcycle(model, experts=4, router="switch", noise=0.1)
    model.to(device).train()
    mask = tm.GradientMask(model, p=1.0, granularity=granularity)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    ids = torch.arange(3, 15, device=device).reshape(2, 6)
    model(ids, labels=ids).loss.backward()
    mask.apply()
    optimizer.step()
    kept = {name for name, p in model.named_parameters() if torch.equal(p, before[name])}
    masked = {name for name in before if name in kept and ".experts." in name}
    assert masked, "p = 1 masks every core that experts share"
    assert len(kept) < len(before), "the rest has moved"


@pytest.mark.parametrize("training", [False, True])
def test_mixtures_agree_with_the_cpu(device: str, training: bool) -> None:
    torch.manual_seed(0)
    banks = {
        "up": tm.SharedCoreExperts.from_dense(torch.randn(64, 32) / 8, num_experts=4, noise=0.1),
        "down": tm.SharedCoreExperts.from_dense(torch.randn(32, 64) / 8, num_experts=4, noise=0.1),
    }
    moe = tm.SharedCoreMoE(tm.TopKRouter(32, 4, top_k=2), tm.ExpertFFN(banks)).train(training)
    x = torch.randn(10, 32)
    expected = moe(x)
    torch.testing.assert_close(moe.to(device)(x.to(device)).cpu(), expected, rtol=1e-3, atol=1e-3)


@pytest.fixture
def default_device(device: str) -> Iterator[str]:
    torch.set_default_device(device)
    try:
        yield device
    finally:
        torch.set_default_device(None)


def on_the_default_device() -> dict[str, Callable[[], Tensor]]:
    matrix = torch.randn(24, 16)
    return {
        "svd": lambda: tn.truncated_svd(matrix, max_rank=3).S,
        "chain": lambda: tn.MPO.from_matrix(matrix, max_bond=3).to_matrix(),
        "layer": lambda: tn.nn.TensorNetworkLinear(LAYERS["mpo"])(torch.randn(3, 64)),
        "experts": lambda: tm.SharedCoreExperts.from_dense(matrix, num_experts=2).expert_matrices(),
    }


def test_what_is_made_lies_on_the_default_device(default_device: str) -> None:
    for name, make in on_the_default_device().items():
        assert make().device.type == default_device, name


def test_compression_under_a_default_device(default_device: str) -> None:
    model = classifier(default_device)
    config = tn.CompressionConfig(param_ratio=0.5, target_modules="all")
    tn.compress(model, config, calibration=batches(default_device), progress=False)
    assert {p.device.type for p in model.parameters()} == {default_device}


def test_masks_stay_where_the_batch_lies(device: str) -> None:
    """As in a model that is spread over devices: each layer takes the mask to its own."""
    torch.manual_seed(0)
    up, down = (tm.SharedCoreExperts.from_dense(torch.randn(32, 32), num_experts=3) for _ in range(2))
    moe = tm.SharedCoreMoE(tm.TopKRouter(32, 3), tm.ExpertFFN({"up": up, "down": down})).to(device).eval()
    x, mask = torch.randn(2, 5, 32).to(device), torch.ones(2, 5, dtype=torch.bool)
    mask[1, 3:] = False
    moe.token_mask = mask
    y = moe(x)
    assert y.device.type == device
    torch.testing.assert_close(moe(x, mask.to(device)), y)
