"""Experts on disk: the same outputs, a cache that keeps what was used last, and counted bytes."""

from __future__ import annotations

import copy

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor, nn

import tensornet_moe as tm
from tensornet.contraction.plan import RECONSTRUCT
from tensornet.errors import TargetError
from tensornet_moe.experts_on_disk import banks_of, expert_bytes


def mixtures(share: str, **options: object) -> nn.Sequential:
    torch.manual_seed(0)
    layers = (
        tm.mixture(d_model=16, d_ff=32, experts=5, top_k=2, share=share, **options)  # type: ignore[arg-type]
        for _ in range(3)
    )
    return nn.Sequential(*layers).eval().double()


class Pooled(nn.Module):
    """Two layers that use the odd and the even experts of a pool."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.pool = tm.ExpertPool(tm.mixture(d_model=16, d_ff=32, experts=6, share="none").experts)
        self.layers = nn.ModuleList(
            tm.SharedCoreMoE(tm.SwitchRouter(16, 3), tm.PooledExperts(self.pool, range(k, 6, 2)))
            for k in (0, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.layers
        y: Tensor = second(first(x))
        return y


def pooled() -> nn.Module:
    return Pooled().eval().double()


MODELS = {
    "center": lambda: mixtures("center"),
    "none": lambda: mixtures("none", gated=True),
    "base": lambda: mixtures("base"),
    "int4": lambda: rounded(mixtures("center")),
    "pool": pooled,
}


def rounded(model: nn.Sequential) -> nn.Sequential:
    for bank in [x for x in model.modules() if isinstance(x, tm.SharedCoreExperts)]:
        bank.quantize("int4")
    return model


@pytest.mark.parametrize("max_bytes", [0, 9000, 10**6])
@pytest.mark.parametrize("name", MODELS)
def test_the_outputs_are_those_of_the_model(name: str, max_bytes: int) -> None:
    model, x = MODELS[name](), torch.randn(2, 7, 16, dtype=torch.float64)
    expected = model(x)
    cached = copy.deepcopy(model)
    cache = tm.cache_experts(cached, max_bytes=max_bytes)
    for _ in range(2):
        torch.testing.assert_close(cached(x), expected)
        assert cache.num_bytes <= max_bytes
    for t in range(7):  # routers compute in single precision, which depends on the number of tokens
        torch.testing.assert_close(cached(x[:, t : t + 1]), expected[:, t : t + 1], rtol=1e-6, atol=1e-6)
    if max_bytes == 0:
        assert cache.hits == 0
        assert cache.bytes_read > 0
    if max_bytes == 10**6:  # every matrix was built once
        banks = {id(bank): bank for layer in layers_of(cached) for bank in banks_of(layer)}
        assert cache.misses <= sum(bank.num_experts for bank in banks.values())
        assert cache.hits > cache.misses


def layers_of(model: nn.Module) -> list[tm.SharedCoreMoE]:
    return [x for x in model.modules() if isinstance(x, tm.SharedCoreMoE)]


@given(
    uses=st.lists(st.integers(0, 6), max_size=40),
    sizes=st.lists(st.integers(1, 5), min_size=7, max_size=7),
    limit=st.integers(0, 12),
)
def test_the_cache_keeps_what_was_used_last(uses: list[int], sizes: list[int], limit: int) -> None:
    cache, kept = tm.ExpertCache(limit), list[int]()
    for hits, key in enumerate(uses):
        before = cache.hits
        found = cache.use(key, sizes[key], 10 * sizes[key])
        assert found == (key in kept) == (cache.hits > before)
        if key in kept:
            kept.remove(key)
            kept.append(key)
        elif sizes[key] <= limit:
            kept.append(key)
            while sum(sizes[k] for k in kept) > limit:
                kept.pop(0)
        assert cache.hits + cache.misses == hits + 1
        assert cache.num_bytes == sum(sizes[k] for k in kept)
        assert all((k in cache) == (k in kept) for k in range(7))


def test_bytes_read_are_those_of_the_chosen_experts() -> None:
    for name, make in MODELS.items():
        model = make()
        layers = layers_of(model)
        x = torch.randn(3, 4, 16, dtype=torch.float64)
        found = tm.bytes_read(model, [x[:2], x[2:]])
        top_k = layers[0].router.experts_per_token
        each = sum(expert_bytes(bank) for layer in layers for bank in banks_of(layer))
        assert found.per_token == top_k * each, name
        assert found.hits == 0
        whole = {id(t): t.nbytes for t in (*model.parameters(), *model.buffers())}
        assert found.resident + found.private == sum(whole.values())
        assert tm.describe(model, resident="shared").read == found
        # A cache of all matrices reads every expert that is used once.
        cached = tm.bytes_read(model, [x], cache_bytes=10**7)
        assert tm.describe(model, resident="shared", batches=[x], cache_bytes=10**7).read == cached
        counted = tm.cache_experts(model, max_bytes=10**7)
        model(x)
        assert cached.per_token * 12 == pytest.approx(counted.bytes_read)
        assert tm.bytes_read(model, [x], cache_bytes=10**7) == cached


def test_padding_and_dropped_choices_read_nothing() -> None:
    model = mixtures("none", capacity_factor=0.4)
    layer = layers_of(model)[0]
    x = torch.randn(1, 10, 16, dtype=torch.float64)
    layer(x)
    assert layer.stats is not None
    computed = int(layer.stats.load.sum())
    assert computed < 20
    alone = nn.Sequential(layer)
    each = sum(expert_bytes(bank) for bank in banks_of(layer))
    assert tm.bytes_read(alone, [x]).per_token * 10 == pytest.approx(computed * each)


def test_sharing_reads_fewer_bytes() -> None:
    read = {name: tm.describe(MODELS[name](), resident="shared").read for name in ("none", "center", "base")}
    sizes = {name: found.per_token for name, found in read.items() if found is not None}
    assert sizes["center"] < sizes["none"]
    assert sizes["base"] < sizes["none"]


def test_one_expert_is_applied_core_by_core() -> None:
    torch.manual_seed(0)
    for topology, shared in (("mpo", "center"), ("dense", "none")):
        weight = torch.randn(512, 256)
        options = {"out_dims": (4, 32, 4), "in_dims": (4, 16, 4)} if topology == "mpo" else {}
        bank = tm.SharedCoreExperts.from_dense(
            weight, num_experts=3, topology=topology, shared=shared, noise=0.5, **options
        )
        # For one row, applying the cores of the chain is faster than building the matrix.
        assert (bank._route(weight[:1], 1) == RECONSTRUCT) == (topology == "dense")
        for rows in (1, 300):
            x = torch.randn(rows, 256)
            expected = x @ bank.expert_matrices()[1].T
            with torch.no_grad():
                kept = [tensor.clone() for tensor in bank.private_tensors()]
                for tensor in bank.private_tensors():
                    tensor[[0, 2]] = torch.nan
                torch.testing.assert_close(bank.apply_expert(x, 1), expected, rtol=1e-4, atol=1e-3)
                for tensor, before in zip(bank.private_tensors(), kept, strict=True):
                    tensor.copy_(before)


def test_refusals() -> None:
    model = mixtures("center")
    with pytest.raises(ValueError, match="max_bytes"):
        tm.cache_experts(model, max_bytes=-1)
    with pytest.raises(TargetError, match="private cores"):
        tm.cache_experts(nn.Linear(3, 3), max_bytes=10)
    up, down = (
        tm.SharedCoreExperts.from_dense(torch.randn(shape), num_experts=3, shared="all")
        for shape in ((32, 16), (16, 32))
    )
    equal = tm.SharedCoreMoE(tm.SwitchRouter(16, 3), tm.ExpertFFN({"up": up, "down": down}))
    with pytest.raises(TargetError, match="private cores"):
        tm.cache_experts(equal, max_bytes=10)
    for batches, missing in (([], "no batches"), ([torch.ones(1, 3)], "no mixture")):
        with pytest.raises(TargetError, match=missing):
            tm.bytes_read(nn.Linear(3, 3), batches)
    with pytest.raises(ValueError, match="'shared'"):
        tm.describe(model, resident="none")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="batches"):
        tm.describe(model, resident="shared", cache_bytes=10)
    with pytest.raises(ValueError, match="batches"):
        tm.describe(model, batches=[torch.ones(1, 1, 16)])
    tm.cache_experts(model, max_bytes=10)
    with pytest.raises(TargetError, match="saved"):
        model.state_dict()
    with pytest.raises(TargetError, match="trained"):
        model.train()
    with pytest.raises(TargetError, match="nothing to cache"):
        tm.cache_experts(model, max_bytes=10)
