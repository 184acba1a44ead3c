"""Laws of specialists: named changes of a frozen trunk that share cores."""

import copy
import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import tensornet as tn
import tensornet_moe as tm
from tensornet.errors import ShapeError, TargetError
from tensornet_moe.specialist_layers import change_form

RANK, SIZE, HIDDEN = 4, 12, 24
FORMS = ["ends", "in", "out", "center", "none"]


class Model(nn.Module):
    """Two pairs of linear layers, of equal shapes, around a nonlinearity."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(SIZE, HIDDEN), "down": nn.Linear(HIDDEN, SIZE)}) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block["down"](block["up"](x).tanh())
        return x


def tucker(rows: int, columns: int) -> tuple[tn.Topology, tuple[str, ...]]:
    topology = tn.topologies.tucker(out_dims=(4, rows // 4), in_dims=(columns // 4, 4), max_bond=3)
    return topology, topology.core_names[1:]


def long_chain(rows: int, columns: int) -> tuple[tn.Topology, tuple[str, ...]]:
    """Product of four matrices, of which the first two are shared."""
    dims = {"out_dims": (rows, 1, 1, 1), "in_dims": (1, 1, 1, columns)}
    return tn.topologies.mpo(**dims, bond_dims=(4, 3, 2)), ("0", "1")


def prepared(
    share: object = "ends", pool: str | None = None, names: str = "abc"
) -> tuple[nn.Module, tm.Specialists]:
    """Model with specialists whose cores are all random, so that no change is zero."""
    model = Model()
    s = tm.specialists(model, rank=RANK, share=share, pool=pool)
    for name in names:
        s.add(name)
    randomize(s, names)
    return model, s


def randomize(s: tm.Specialists, names: str) -> None:
    for name in names:
        for core in s.tensors(name).values():
            nn.init.normal_(core, std=0.3)


def outputs(model: nn.Module, s: tm.Specialists, x: Tensor, which: object) -> Tensor:
    with torch.no_grad(), s.use(which):
        return model(x)


def train(model: nn.Module, s: tm.Specialists, which: str, x: Tensor) -> None:
    optimizer = torch.optim.AdamW(s.parameters(which), lr=0.05, weight_decay=0.1)
    for _ in range(4):
        optimizer.zero_grad()
        with s.use(which):
            (model(x) - 1).square().mean().backward()
        optimizer.step()


def named(share: object) -> str:
    """Name a form for pytest; the text of a function contains its address."""
    return getattr(share, "__name__", str(share))


@pytest.mark.parametrize("share", [*FORMS, tucker], ids=named)
def test_a_new_specialist_changes_nothing(share: object) -> None:
    model = Model()
    x = torch.randn(3, 5, SIZE)
    before = model(x)
    s = tm.specialists(model, rank=RANK, share=share)
    assert torch.equal(model(x), before)
    s.add("law")
    assert torch.equal(outputs(model, s, x, "law"), before)
    with s.use("law"):
        model(x).square().sum().backward()
    # The first private core is zero, and gets a gradient, so that the specialist can learn.
    moving = [name for name, p in s.tensors("law").items() if p.grad is not None and bool(p.grad.any())]
    assert len(moving) == len(s.layers)


@pytest.mark.parametrize("pool", [None, "shape"])
@pytest.mark.parametrize("share", [*FORMS, tucker], ids=named)
def test_a_later_specialist_leaves_the_others_equal_bit_for_bit(share: object, pool: str | None) -> None:
    model, s = prepared(share, pool)
    x = torch.randn(3, 5, SIZE)
    which = ["a", {"b": 0.5, "c": 2.0}, ["c", None, "a"], None]
    before = [outputs(model, s, x, each) for each in which]
    snapshot = s.snapshot()
    s.freeze()
    s.add("new")
    train(model, s, "new", x)
    assert not torch.equal(outputs(model, s, x, "new"), before[-1])
    for each, expected in zip(which, before, strict=True):
        assert torch.equal(outputs(model, s, x, each), expected)
    assert s.movement(snapshot) == {"a": 0.0, "b": 0.0, "c": 0.0}
    s.remove("new")
    s.remove("b")
    assert s.names == ["a", "c"]
    assert torch.equal(outputs(model, s, x, "a"), before[0])
    assert torch.equal(outputs(model, s, x, ["c", None, "a"]), before[2])


@pytest.mark.parametrize("share", [*FORMS, tucker], ids=named)
def test_each_row_is_computed_as_if_it_were_alone(share: object) -> None:
    model, s = prepared(share)
    x = torch.randn(5, 3, SIZE)
    names = ["b", None, "a", "b", "c"]
    together = outputs(model, s, x, names)
    for row, name in enumerate(names):
        torch.testing.assert_close(together[row : row + 1], outputs(model, s, x[row : row + 1], name))


def dense_change(layer: tm.SpecialistLinear, name: str) -> Tensor:
    """Contract the cores of a chain, core by core, without this library."""
    whole = torch.ones(1, 1, 1, dtype=torch.float64)  # rows, columns, bond
    for core in layer.cores(name).values():
        whole = torch.einsum("xyb,boic->xoyic", whole, core.detach().double())
        rows, o, columns, i, bond = whole.shape
        whole = whole.reshape(rows * o, columns * i, bond)
    return whole[..., 0]


@pytest.mark.parametrize("share", [*FORMS, long_chain], ids=named)
def test_a_weighted_sum_equals_merged_matrices(share: object) -> None:
    model, s = prepared(share)
    weights = {"a": 0.7, "c": -1.5}
    x = torch.randn(4, 3, SIZE)
    merged = Model()
    merged.load_state_dict(
        {k.replace(".base_layer", ""): v for k, v in model.state_dict().items() if "base_layer" in k}
    )
    for name, layer in s.layers.items():
        change = sum(w * dense_change(layer, each) for each, w in weights.items())
        torch.testing.assert_close(s.changes(weights)[name].double(), change, rtol=1e-4, atol=1e-5)
        merged.get_submodule(name).weight.data += change.float()
    torch.testing.assert_close(outputs(model, s, x, weights), merged(x), rtol=1e-4, atol=1e-4)


def test_weights_of_rows_and_tokens_scale_the_changes() -> None:
    layer = nn.Sequential(nn.Linear(SIZE, SIZE))
    s = tm.specialists(layer, rank=RANK)
    for name in "ab":
        s.add(name)
    randomize(s, "ab")
    x = torch.randn(3, 5, SIZE)
    for shape in ((3,), (3, 5)):
        weights = {name: torch.randn(shape) for name in "ab"}
        expected = outputs(layer, s, x, None)
        for name, w in weights.items():
            change = outputs(layer, s, x, name) - outputs(layer, s, x, None)
            expected = expected + w.reshape(*shape, *[1] * (3 - len(shape))) * change
        torch.testing.assert_close(outputs(layer, s, x, weights), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("share", ["ends", "in", "none"], ids=named)
def test_factors_multiply_to_the_change(share: str | None) -> None:
    _, s = prepared(share)
    for layer in s.layers.values():
        left, right = layer.factors("b")
        assert left.shape[1] == right.shape[0] == RANK
        torch.testing.assert_close((left @ right).double(), dense_change(layer, "b"), rtol=1e-4, atol=1e-5)
    with pytest.raises(TargetError, match="low rank"):
        next(iter(prepared("center")[1].layers.values())).factors("b")


@pytest.mark.parametrize("share", ["ends", "center"])
def test_truncated_factors_are_the_closest_ones(share: str) -> None:
    """By Eckart and Young, the squared error is the sum of the other squared singular values."""
    _, s = prepared(share)
    for layer in s.layers.values():
        left, right = layer.factors("b", 2)
        exact = dense_change(layer, "b")
        assert left.shape[1] == right.shape[0] == 2
        others = torch.linalg.svdvals(exact)[2:].square().sum()
        error = (exact - (left @ right).double()).square().sum()
        assert float(error) == pytest.approx(float(others), rel=1e-3, abs=1e-6)


def test_layers_of_one_shape_share_their_ends() -> None:
    model, s = prepared("ends", "shape")
    assert len(s.shared_parameters()) == 2 * 2  # two shapes, two ends
    assert s.bytes()["shared"] == 2 * 4 * RANK * (SIZE + HIDDEN)
    first, second = (s.layers[f"blocks.{k}.up"] for k in range(2))
    assert first.cores("a")["0"] is second.cores("a")["0"]
    assert sum("shared_cores" in key for key in model.state_dict()) == 4
    twin = copy.deepcopy(model)
    layers = tm.Specialists(twin).layers
    assert layers["blocks.0.up"].cores("a")["0"] is layers["blocks.1.up"].cores("a")["0"]
    x = torch.randn(2, 3, SIZE)
    assert torch.equal(outputs(twin, tm.Specialists(twin), x, "a"), outputs(model, s, x, "a"))


def test_shared_cores_have_lower_rates_and_can_be_masked() -> None:
    model, s = prepared("ends", "shape")
    groups = tm.parameter_groups(model, lr=0.1)
    sharers = {group["sharers"]: group for group in groups}
    assert sorted(sharers) == [1, 6]  # three specialists in two layers
    assert {id(p) for p in sharers[6]["params"]} == {id(p) for p in s.shared_parameters()}
    assert sharers[6]["lr"] == pytest.approx(0.1 / math.sqrt(6))
    assert {id(p) for p in tm.shared_parameters(model)} == {id(p) for p in s.shared_parameters()}
    x, snapshot = torch.randn(3, 5, SIZE), s.snapshot()
    optimizer = torch.optim.AdamW(groups)
    mask = tm.GradientMask(model, p=1.0)
    for steps, moved in ((mask.apply, False), (lambda: 0, True)):
        with s.use("a"):
            model(x).square().mean().backward()
        steps()
        optimizer.step()
        optimizer.zero_grad()
        movement = s.movement(snapshot)
        assert movement["a"] > 0
        assert (movement["b"] > 0) == (movement["c"] > 0) == moved


def test_threads_use_their_own_specialists() -> None:
    model, s = prepared()
    x = torch.randn(3, 5, SIZE)
    expected = {which: outputs(model, s, x, which) for which in (None, "a", "b", "c")}
    together = threading.Barrier(4)

    def run(which: str | None) -> bool:
        same = True
        for _ in range(20):
            with torch.no_grad(), s.use(which):
                together.wait()  # all blocks are open
                same &= torch.equal(model(x), expected[which])
                together.wait()
        return same

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(run, expected))
    assert torch.equal(model(x), expected[None])


def test_blocks_of_several_models_nest() -> None:
    (first, s), (second, t) = prepared(), prepared()
    x = torch.randn(3, 5, SIZE)
    expected = outputs(first, s, x, "a"), outputs(second, t, x, "b"), outputs(first, s, x, "c")
    with torch.no_grad(), s.use("a"), t.use("b"):
        assert torch.equal(first(x), expected[0])
        assert torch.equal(second(x), expected[1])
        with s.use("c"):
            assert torch.equal(first(x), expected[2])
        assert torch.equal(first(x), expected[0])


def test_specialists_that_are_unknown_where_a_layer_runs_are_refused() -> None:
    model, s = prepared()
    x = torch.randn(3, 5, SIZE, requires_grad=True)
    for reentrant in (True, False):
        with s.use("a"):
            y = checkpoint(model, x, use_reentrant=reentrant)
        with pytest.raises(TargetError, match="inside of the function"):
            y.sum().backward()

    def inside(x: Tensor) -> Tensor:
        with s.use("a"):
            return model(x)

    checkpoint(inside, x, use_reentrant=True).sum().backward()
    assert all(p.grad is not None for p in s.tensors("a").values())
    # `nn.DataParallel` runs copies of the layers in other threads.
    replica = next(iter(s.layers.values()))._replicate_for_data_parallel()
    with pytest.raises(TargetError, match="DistributedDataParallel"):
        replica(x)


@pytest.mark.slow
def test_a_compiled_model_follows_the_specialists_in_use() -> None:
    model, s = prepared()
    compiled, x = torch.compile(model, backend="eager"), torch.randn(3, 5, SIZE)
    for which in (None, "a", "b", ["a", None, "c"], {"a": 0.5}, "a"):
        torch.testing.assert_close(outputs(compiled, s, x, which), outputs(model, s, x, which))


def test_movement_is_the_relative_change_of_the_matrices() -> None:
    _, s = prepared("ends", names="ab")
    snapshot = s.snapshot()
    for core in s.tensors("a").values():
        core.data *= 1.5
    assert s.movement(snapshot) == {"a": pytest.approx(0.5), "b": 0.0}
    s.restore(snapshot)
    assert s.movement(snapshot) == {"a": 0.0, "b": 0.0}


def test_describe_counts_what_is_shared_and_what_the_next_specialist_needs() -> None:
    model, _ = prepared("ends")
    costs = tm.describe(model)
    sides = SIZE + HIDDEN
    assert costs.specialists == {
        "shared": 4 * 4 * RANK * sides,
        **dict.fromkeys("abc", 4 * 4 * RANK**2),
        "next": 4 * 4 * RANK**2,
    }
    assert costs.parts["specialists"].stored == 4 * (RANK * sides + 3 * RANK**2)
    assert costs.parts["specialists"].multiply_adds == 4 * (RANK * sides + RANK**2)
    assert costs.total.stored == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("config", ["int4", "low_rank"])
def test_the_trunk_may_be_compressed(config: str) -> None:
    model = Model()
    options = (
        {"formats": ("int4",), "method": "nearest"}
        if config == "int4"
        else {"topology": "low_rank", "param_ratio": 0.5, "method": "svd"}
    )
    tn.compress(model, tn.CompressionConfig(**options), progress=False)
    x = torch.randn(2, 3, SIZE)
    before = model(x)
    s = tm.specialists(model, rank=RANK)
    assert any(isinstance(layer.base_layer, tn.nn.TensorNetworkLinear) for layer in s.layers.values())
    s.add("law")
    train(model, s, "law", x)
    assert torch.equal(outputs(model, s, x, None), before)
    assert not torch.equal(outputs(model, s, x, "law"), before)
    s.detach()
    assert torch.equal(model(x), before)
    assert not any(isinstance(part, tm.SpecialistLinear) for part in model.modules())


def test_bad_input_raises_and_changes_nothing() -> None:
    model = Model()
    keys = list(model.state_dict())
    with pytest.raises(ShapeError, match=r"blocks.0.up: rank=13 exceeds"):
        tm.specialists(model, rank=13)
    with pytest.raises(ValueError, match="Unknown share"):
        tm.specialists(model, share="middle")
    with pytest.raises(ValueError, match="Unknown pool"):
        tm.specialists(model, pool="all")
    with pytest.raises(TargetError, match="matches no linear layer"):
        tm.specialists(model, target_modules="attn")
    with pytest.raises(TargetError, match="not prepared"):
        tm.Specialists(model)
    with pytest.raises(TargetError, match="must own a core"):
        tm.specialists(model, share=lambda *s: (change_form("ends", *s, rank=2)[0], ("0", "1", "2")))
    assert list(model.state_dict()) == keys
    assert all(p.requires_grad for p in model.parameters())
    model, s = prepared()
    x = torch.randn(3, 5, SIZE)
    before = outputs(model, s, x, "a")
    for name in ("a", "A", "a.b", "", "keys", "shared", "trunk", 3, "x" * 300):
        with pytest.raises(ValueError, match="named"):
            s.add(name)
    with pytest.raises(TargetError, match="already has specialists"):
        tm.specialists(model)
    for which in ("law", ["a", "law"], {"law": 1.0}):
        with pytest.raises(TargetError, match="no specialist named 'law'"):
            outputs(model, s, x, which)
    with pytest.raises(ShapeError, match="for 2 rows"):
        outputs(model, s, x, ["a", "b"])
    with pytest.raises(ShapeError, match="weights of 'a'"):
        outputs(model, s, x, {"a": torch.ones(4)})
    with pytest.raises(TargetError, match="no specialist named"):
        s.remove("law")
    assert s.names == ["a", "b", "c"]
    assert torch.equal(outputs(model, s, x, "a"), before)
