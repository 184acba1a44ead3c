"""Plans give what einsum gives, strategies agree, choices follow the cost model."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace

import opt_einsum
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

import tensornet as tn
from tensornet.contraction.cost import CPU, GPU, default_machine, machine_with_threads, measure_machine
from tensornet.contraction.plan import (
    RECONSTRUCT,
    TOKENS,
    contract_to_matrix,
    contract_with_input,
    plan_contraction,
    plan_operator,
    run,
)
from tensornet.errors import TargetError
from tensornet.nn.strategy import CACHED, STRATEGIES
from tensornet.topologies import low_rank, mpo

TOPOLOGIES = {
    "mpo": mpo(out_dims=(2, 3, 4), in_dims=(4, 2, 2), max_bond=5),
    "padded": mpo(out_dims=(3, 4), in_dims=(4, 3), max_bond=4, out_features=11, in_features=10),
    "one site": mpo(out_dims=(6,), in_dims=(8,)),
    "low rank": low_rank(out_features=12, in_features=8, rank=3),
}


def layer_for(name: str, **options: object) -> tn.nn.TensorNetworkLinear:
    return tn.nn.TensorNetworkLinear(TOPOLOGIES[name], **options)  # type: ignore[arg-type]


def small(**options: object) -> tn.nn.MPOLinear:
    return tn.nn.MPOLinear(16, 24, topology=TOPOLOGIES["mpo"], **options)  # type: ignore[arg-type]


# --- the contraction ----------------------------------------------------------------------------


@st.composite
def contractions(draw: st.DrawFn) -> tuple[list[tuple[str, ...]], tuple[str, ...], dict[str, int]]:
    """Random networks: hyperedges, outer products, size-1 labels, tokens on one operand."""
    labels = [f"l{k}" for k in range(draw(st.integers(2, 6)))]
    sizes = {label: draw(st.integers(1, 3)) for label in labels}
    groups = st.lists(st.sampled_from(labels), min_size=1, max_size=3, unique=True).map(tuple)
    operands = draw(st.lists(groups, min_size=1, max_size=4))
    operands[0] = (TOKENS, *operands[0])
    used = [x for x in labels if any(x in labels_of for labels_of in operands)]
    single = [x for x in used if sum(x in labels_of for labels_of in operands) == 1]
    kept = draw(st.permutations(sorted(set(single) | set(draw(st.lists(st.sampled_from(used)))))))
    return operands, (TOKENS, *kept), {TOKENS: 3} | {x: sizes[x] for x in used}


# Both indices of the second operand are summed, in another order than the first has them.
@example(
    case=([(TOKENS, "l0", "l1"), ("l1", "l0")], (TOKENS,), {TOKENS: 3, "l0": 2, "l1": 2}),
    seed=0,
)
@given(contractions(), st.integers(0, 2**31))
def test_lowered_contraction_is_the_einsum(
    case: tuple[list[tuple[str, ...]], tuple[str, ...], dict[str, int]], seed: int
) -> None:
    operands, output, sizes = case
    generator = torch.Generator().manual_seed(seed)
    tensors = [
        torch.randn([sizes[x] for x in labels], generator=generator, dtype=torch.float64)
        for labels in operands
    ]
    symbol = {label: opt_einsum.get_symbol(k) for k, label in enumerate(sizes)}
    terms = ",".join("".join(symbol[x] for x in labels) for labels in operands)
    expected = torch.einsum(terms + "->" + "".join(symbol[x] for x in output), *tensors)
    torch.testing.assert_close(run(plan_contraction(operands, output, sizes), tensors), expected)


def test_no_candidate_builds_the_matrix() -> None:
    topology = mpo(out_dims=(8, 8, 8), in_dims=(8, 8, 8), max_bond=32)
    for plan in plan_operator(topology).applies:
        assert any(0 in step for step in plan.path[:-1])


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_every_candidate_gives_the_dense_result(name: str) -> None:
    layer = layer_for(name, dtype=torch.float64)
    nn.init.normal_(layer.bias)
    x = torch.randn(2, 3, layer.in_features, dtype=torch.float64)
    expected = nn.functional.linear(x, layer.to_matrix(), layer.bias)
    for candidate in range(len(layer.plan.applies)):
        y = contract_with_input(layer.plan, layer.cores, x, candidate=candidate, bias=layer.bias)
        torch.testing.assert_close(y, expected)


BLOCKED = {
    "mpo": mpo(out_dims=(8, 8, 12), in_dims=(12, 8, 8), max_bond=6),
    "two legs": mpo(out_dims=(3, 4, 64), in_dims=(4, 4, 64), max_bond=3),
    "padded": mpo(out_dims=(24, 32), in_dims=(32, 24), max_bond=4, out_features=761, in_features=765),
    "ring": tn.topologies.tensor_ring(out_dims=(8, 8, 12), in_dims=(12, 8, 8), max_bond=3),
    "kronecker": tn.topologies.kronecker(out_dims=(24, 32), in_dims=(32, 24)),
    "block tt": tn.topologies.block_tt(out_dims=(8, 96), in_dims=(96, 8), max_bond=4),
}


@pytest.mark.parametrize("name", BLOCKED)
def test_a_matrix_rebuilt_in_blocks_is_the_matrix(name: str) -> None:
    plan = plan_operator(BLOCKED[name])
    assert plan.blocked, "large enough to be built in blocks"
    cores = tn.network.random_cores(BLOCKED[name], dtype=torch.float64)
    torch.testing.assert_close(
        contract_to_matrix(plan, cores), tn.TensorNetwork(BLOCKED[name], cores).to_matrix()
    )
    tracked = [core.requires_grad_() for core in cores]
    assert contract_to_matrix(plan, tracked).requires_grad, "with gradients it is built at once"


@pytest.mark.filterwarnings("ignore:.torch.jit.trace", "ignore::torch.jit.TracerWarning")
def test_shortcuts_are_taken_only_while_parameters_are_the_same() -> None:
    layer = layer_for("low rank").eval()
    x = torch.randn(1, 8)

    def check() -> None:
        with torch.no_grad():
            for _ in range(3):
                torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.to_matrix(), layer.bias))
        assert layer(x).requires_grad

    check()
    assert layer._quick is not None
    for change in (
        lambda p: p.data.mul_(2),
        lambda p: setattr(p, "data", p.data + 1),
        lambda p: setattr(layer, "core_0", nn.Parameter(p.detach() * 3)),
        lambda p: layer.double().float(),
        lambda p: nn.utils.parametrize.register_parametrization(layer, "core_0", _Twice()),
    ):
        with torch.no_grad():
            change(layer.core_0)
        check()
    assert layer._quick(x) is None


class _Twice(nn.Module):
    def forward(self, core: torch.Tensor) -> torch.Tensor:
        return 2 * core


# --- strategies ---------------------------------------------------------------------------------


SWEPT = {
    **TOPOLOGIES,
    "one sided": mpo(out_dims=(12, 1), in_dims=(2, 4), max_bond=2),
    "four sites": mpo(out_dims=(2, 3, 2, 2), in_dims=(3, 2, 2, 2), max_bond=3),
    "block tt": tn.topologies.block_tt(out_dims=(4, 3), in_dims=(2, 4), max_bond=2),
    "tucker": tn.topologies.tucker(out_dims=(3, 4), in_dims=(2, 4), max_bond=2),
    "ring": tn.topologies.tensor_ring(out_dims=(4, 3), in_dims=(2, 4), max_bond=2),
    "kronecker": tn.topologies.kronecker(out_dims=(3, 4), in_dims=(2, 4)),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", SWEPT)
def test_strategies_agree_with_the_dense_layer(name: str, strategy: str, training: bool) -> None:
    """In the first pass and in later ones, which may take a shortcut; also after other cores are loaded."""
    layer = tn.nn.TensorNetworkLinear(SWEPT[name], dtype=torch.float64, strategy=strategy).train(training)  # type: ignore[arg-type]
    nn.init.normal_(layer.bias)
    for shape in ((), (1,), (7,), (2, 3), (0,)):
        x = torch.randn(*shape, layer.in_features, dtype=torch.float64)
        expected = nn.functional.linear(x, layer.to_matrix(), layer.bias)
        for recording in (True, False, False):
            with torch.set_grad_enabled(recording):
                torch.testing.assert_close(layer(x), expected)
    with torch.no_grad():
        with pytest.raises((ValueError, RuntimeError), match="shape"):
            layer(torch.randn(6, layer.in_features * 2, dtype=torch.float64))
        layer.load_state_dict(tn.nn.TensorNetworkLinear(SWEPT[name], dtype=torch.float64).state_dict())
        x = torch.randn(3, layer.in_features, dtype=torch.float64)
        torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.to_matrix(), layer.bias))


def test_unknown_options_are_refused() -> None:
    with pytest.raises(ValueError, match="Unknown strategy 'fast'; choose one of auto, factorized"):
        small(strategy="fast")
    for limit in (-1, "64MB", 1.5):
        with pytest.raises(ValueError, match="cache_limit must be a number of bytes"):
            tn.nn.set_strategy(small(), "cached", cache_limit=limit)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Unknown strategy 'fast'"):
        tn.nn.set_strategy(small(), "fast")  # type: ignore[arg-type]


def test_embedding_strategies_agree() -> None:
    topology = mpo(out_dims=(3, 4), in_dims=(2, 4), max_bond=4, out_features=11)
    layer = tn.nn.MPOEmbedding(topology, dtype=torch.float64).eval()
    indices = torch.tensor([[0, 10], [3, 3]])
    with torch.no_grad():
        expected = layer.to_matrix()[indices]
        for strategy in STRATEGIES:
            tn.nn.set_strategy(layer, strategy)  # type: ignore[arg-type]
            torch.testing.assert_close(layer(indices), expected)
            assert (layer.kept.nbytes > 0) == (strategy == "cached")


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


# --- kept matrices ------------------------------------------------------------------------------


def kept(layer: tn.nn.MPOLinear) -> torch.Tensor:
    """Run the layer so that it keeps a matrix, and return that matrix."""
    layer.eval()
    with torch.no_grad():
        layer(torch.randn(3, 16))
    assert layer.kept.matrix is not None
    return layer.kept.matrix


def _optimizer_step(layer: tn.nn.MPOLinear) -> None:
    for parameter in layer.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(layer.parameters(), lr=0.1).step()


def _in_inference_mode(layer: tn.nn.MPOLinear) -> None:
    with torch.inference_mode():
        layer.cores[1].mul_(2)


def _data(layer: tn.nn.MPOLinear) -> None:
    for _ in range(4):  # the allocator likes to give a freed address again
        layer.cores[1].data = torch.randn_like(layer.cores[1])


CHANGES: dict[str, Callable[[tn.nn.MPOLinear], object]] = {
    "optimizer": _optimizer_step,
    "inference mode": _in_inference_mode,
    "a detached view": lambda layer: layer.cores[1].detach().mul_(2),
    "load": lambda layer: layer.load_state_dict(small().state_dict()),
    "load by assignment": lambda layer: layer.load_state_dict(small().state_dict(), assign=True),
    "data": _data,
    "set_cores": lambda layer: layer.set_cores(small().cores),
    "new parameter": lambda layer: setattr(layer, "core_1", nn.Parameter(torch.randn_like(layer.core_1))),
    "dtype": lambda layer: layer.double(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_a_core_is_seen(change: str) -> None:
    layer = small(strategy="cached")
    first = kept(layer)
    assert kept(layer) is not first, "eval() frees it"
    before = kept(layer).clone()
    CHANGES[change](layer)
    x = torch.randn(3, 16, dtype=layer.weight.dtype)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.to_matrix(), layer.bias))
        if change != "dtype":
            assert not torch.allclose(layer.to_matrix(), before), "the change changed nothing"


def test_the_matrix_is_kept_between_passes_and_used_only_where_it_may_be() -> None:
    layer = small(strategy="cached")
    first, x = kept(layer), torch.randn(3, 16)
    other = {f"core_{k}": torch.randn_like(core) for k, core in enumerate(layer.cores)}
    with torch.no_grad():
        layer(x)
        assert layer.kept.matrix is first
        expected = x @ tn.TensorNetwork(layer.topology, list(other.values())).to_matrix().T + layer.bias
        torch.testing.assert_close(torch.func.functional_call(layer, other, (x,)), expected)
        torch.testing.assert_close(torch.func.vmap(layer)(x), x @ first.T + layer.bias)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            low = layer(x)
            assert (low.dtype, layer.kept.nbytes) == (torch.bfloat16, 16 * 24 * 2)
        torch.testing.assert_close(low.float(), layer(x), rtol=3e-2, atol=3e-2)
        assert layer.kept.nbytes == 16 * 24 * 4
    assert layer(x).requires_grad
    layer.train()
    assert layer.kept.nbytes == 0
    layer(x)
    assert layer.kept.nbytes == 0, "training"
    layer.eval()(x)
    assert layer.kept.nbytes == 0, "gradients of the cores are recorded"


def test_it_serves_frozen_layers_whose_input_wants_a_gradient() -> None:
    layer = small(strategy="cached", dtype=torch.float64).eval().requires_grad_(False)
    with torch.inference_mode():
        layer(torch.randn(3, 16, dtype=torch.float64))  # built here, used outside
    x = torch.randn(3, 16, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x).sum(), x)
    torch.testing.assert_close(grad, layer.to_matrix().sum(0).expand(3, -1))
    assert layer.kept.nbytes > 0


def test_a_kept_matrix_is_no_state() -> None:
    layer = small(strategy="cached")
    kept(layer)
    assert set(layer.state_dict()) == {"core_0", "core_1", "core_2", "bias"}
    again = pickle.loads(pickle.dumps(layer))
    assert copy.deepcopy(layer).kept.nbytes == again.kept.nbytes == 0
    x = torch.randn(3, 16)
    with torch.no_grad():
        torch.testing.assert_close(again(x), layer(x))


# --- choices ------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 3, 16, 100, 1024, 4096, 10**6])
@pytest.mark.parametrize("machine", [CPU, GPU], ids=["cpu", "gpu"])
def test_auto_takes_the_cheapest_by_the_model(tokens: int, machine: tn.contraction.cost.Machine) -> None:
    layer = tn.nn.MPOLinear(768, 768, max_bond=24)
    layer.machine = machine
    routes = [*range(len(layer.plan.applies)), RECONSTRUCT]
    seconds = {r: layer.plan.seconds(r, tokens, machine) for r in routes}
    # Where the fastest route changes, the token count is known to within a tenth.
    assert seconds[layer.route(tokens)] <= 1.15 * min(seconds.values())


def test_few_tokens_are_contracted_and_many_rebuild() -> None:
    layer = tn.nn.MPOLinear(768, 768, max_bond=16)
    assert layer.route(1) >= 0
    assert layer.route(4096) == RECONSTRUCT
    layer.eval()
    with torch.no_grad():
        assert layer.route(4096) == RECONSTRUCT
        layer.strategy = "cached"
        assert layer.route(4096) == CACHED


def test_explanation() -> None:
    layer = small()
    told = layer.explain(tokens=7)
    assert told.choice == ("reconstruct" if layer.route(7) == RECONSTRUCT else "factorized")
    assert "needs memory" in told["cached"].refused
    assert told["cached"].multiply_adds == 7 * 16 * 24
    assert told["cached"].memory_bytes == 16 * 24 * 4
    layer.strategy = "cached"
    assert layer.explain(7)["cached"].refused == "only in eval"
    layer.eval()
    assert "gradients" in layer.explain(7)["cached"].refused
    with torch.no_grad():
        assert layer.explain(7)["cached"].refused == ""
    text = str(told)
    assert "7 tokens" in text
    assert all(name in text for name in ("factorized", "reconstruct", "cached", "dense layer"))
    for tokens in (1.5, "a"):
        with pytest.raises(ValueError, match=f"tokens must be an integer of at least 1, got {tokens!r}"):
            layer.explain(tokens)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="tokens must be an integer of at least 1, got 0"):
        layer.explain(0)
    with pytest.raises(KeyError, match="No strategy 'fast'"):
        told["fast"]


def test_limit_of_a_model_goes_where_it_gains_most() -> None:
    model = nn.Sequential(
        tn.nn.MPOLinear(256, 256, max_bond=64), tn.nn.MPOLinear(256, 256, max_bond=1), nn.Linear(2, 2)
    )
    allowed = tn.nn.set_strategy(model, "cached", cache_limit=256 * 256 * 4 + 100)
    assert allowed == {"0": 256 * 256 * 4}
    assert tn.nn.set_strategy(model, cache_limit=0) == {}
    assert tn.nn.set_strategy(model, "cached", cache_limit=10**9) == {"0": 262144, "1": 262144}
    with torch.no_grad():
        model[:2].eval()(torch.randn(1, 256))
    assert tn.nn.cached_bytes(model) == 2 * 262144
    with pytest.raises(TargetError, match="no compressed layer"):
        tn.nn.set_strategy(nn.Linear(2, 2))
    layer = tn.nn.MPOLinear(16, 16, max_bond=4)
    with pytest.raises(TypeError, match="measure_machine"):
        tn.nn.set_strategy(layer, "cached", machine="cpu")  # type: ignore[arg-type]
    assert layer.strategy == "auto"


def test_machines() -> None:
    assert default_machine("cuda") == GPU
    assert default_machine("cpu") == machine_with_threads(CPU, torch.get_num_threads())
    two = machine_with_threads(CPU, 2)
    assert 1 < two.peak / CPU.peak <= 2
    measured = measure_machine(repeats=1)
    numbers = {name: value for name, value in vars(measured).items() if name != "name"}
    assert all(value >= 0 for value in numbers.values())
    assert measured.peak > 1e8
    assert replace(measured, name="x").name == "x"
