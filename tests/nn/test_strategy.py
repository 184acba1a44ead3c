"""Plans give what einsum gives, strategies agree, choices follow the cost model."""

from __future__ import annotations

import copy
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
    TOKEN,
    contract_to_matrix,
    contract_with_input,
    plan_contraction,
    plan_operator,
    run,
)
from tensornet.errors import TargetError
from tensornet.nn.strategy import STRATEGIES
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
    operands[0] = (TOKEN, *operands[0])
    used = [x for x in labels if any(x in labels_of for labels_of in operands)]
    single = [x for x in used if sum(x in labels_of for labels_of in operands) == 1]
    kept = draw(st.permutations(sorted(set(single) | set(draw(st.lists(st.sampled_from(used)))))))
    return operands, (TOKEN, *kept), {TOKEN: 3} | {x: sizes[x] for x in used}


# Both indices of the second operand are summed, in another order than the first has them.
@example(
    case=([(TOKEN, "l0", "l1"), ("l1", "l0")], (TOKEN,), {TOKEN: 3, "l0": 2, "l1": 2}),
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
    for route in range(len(layer.plan.applies)):
        y = contract_with_input(layer.plan, layer.cores, x, route=route, bias=layer.bias)
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
    with pytest.raises(ValueError, match="'fast'"):
        small(strategy="fast")
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


def test_explanation() -> None:
    layer = small()
    told = layer.explain(tokens=7)
    assert told.choice == ("reconstruct" if layer.route(7) == RECONSTRUCT else "factorized")
    assert {cost.strategy for cost in told.costs} == {"factorized", "reconstruct"}
    assert {cost.refused for cost in told.costs} == {""}
    layer.strategy = "reconstruct"
    assert "reconstruct" in layer.explain(7)["factorized"].refused
    text = str(told)
    assert "7 tokens" in text
    assert all(name in text for name in ("factorized", "reconstruct", "dense layer"))
    for tokens in (1.5, "a"):
        with pytest.raises(ValueError, match=f"got {tokens!r}"):
            layer.explain(tokens)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"tokens.*got 0"):
        layer.explain(0)
    with pytest.raises(KeyError, match="No strategy 'fast'"):
        told["fast"]


def test_a_strategy_is_set_for_all_layers() -> None:
    model = nn.Sequential(
        tn.nn.MPOLinear(16, 16, max_bond=4), tn.nn.MPOEmbedding(TOPOLOGIES["mpo"]), nn.Linear(2, 2)
    )
    tn.nn.set_strategy(model, "factorized", machine=GPU)
    assert [(x.strategy, x.machine) for x in model[:2]] == 2 * [("factorized", GPU)]
    tn.nn.set_strategy(model, machine=CPU)
    assert [(x.strategy, x.machine) for x in model[:2]] == 2 * [("factorized", CPU)]
    with pytest.raises(TargetError, match="no compressed layer"):
        tn.nn.set_strategy(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="measure_machine"):
        tn.nn.set_strategy(model, "auto", machine="cpu")  # type: ignore[arg-type]
    assert model[0].strategy == "factorized"


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
