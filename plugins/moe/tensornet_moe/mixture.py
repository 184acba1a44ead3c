"""Mixtures built in one line, and experts that are shared by the layers of a model."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from tensornet._util import check_size, check_type
from tensornet.errors import ShapeError
from tensornet_moe.ffn import ExpertFFN
from tensornet_moe.layer import SharedCoreMoE
from tensornet_moe.pool import Balance, ExpertPool, PooledExperts


def tie_experts(
    layers: Sequence[SharedCoreMoE],
    *,
    group: int | None = None,
    label: str = "pool",
    balance: Balance = "pool",
) -> nn.ModuleList:
    """Replace the experts of neighbouring layers, in place, by one `ExpertPool` for each group of layers.

    The pool of a group has the experts of its first layer, biases included; routers, always-on experts and
    the settings of each layer stay.

    Args:
        layers: mixtures with experts of their own, in the order of the model.
        group: layers that use one pool; all of them if absent.
        label: label of the pool; with several pools a number is appended.
        balance: `"pool"` or `"layer"`, see `ExpertPool`.

    Returns:
        The pools, in the order of the layers. Assign them to the model that contains the layers.

    Raises:
        ValueError: `group` does not divide the number of layers, there is no layer, or one is given twice;
            or an unknown `balance`.
        TypeError: a layer is not a SharedCoreMoE with experts of its own.
        ShapeError: the experts of a group differ in number, names, shapes, biases or activation.

    Reference:
        "Expert Tying" (arXiv 2606.16825) for `group=2`; UniPool (arXiv 2605.06665) for all layers.

    Example:
        >>> def layer():
        ...     up = tm.SharedCoreExperts.from_dense(torch.randn(16, 8), num_experts=4)
        ...     down = tm.SharedCoreExperts.from_dense(torch.randn(8, 16), num_experts=4)
        ...     return tm.SharedCoreMoE(tm.SwitchRouter(8, 4), tm.ExpertFFN({"up": up, "down": down}))
        >>> model = torch.nn.Module()
        >>> model.layers = torch.nn.ModuleList(layer() for _ in range(4))
        >>> model.pools = tm.tie_experts(model.layers, group=2)
        >>> [layer.experts.owner_label for layer in model.layers]
        ['pool0', 'pool0', 'pool1', 'pool1']
    """
    layers = list(layers)
    if not layers or len({id(layer) for layer in layers}) != len(layers):
        raise ValueError(f"Expected different layers to tie, got {len(layers)} of which some are the same.")
    networks: list[Any] = []
    for position, layer in enumerate(layers):
        check_type(f"Layer {position} to tie", layer, SharedCoreMoE, "pass the mixtures of the model")
        advice = "layers of a pool are tied already"
        check_type(f"The experts of layer {position}", layer.experts, ExpertFFN, advice)
        networks.append(layer.experts)
    group = len(layers) if group is None else group
    check_size("group", group, error=ValueError)
    if len(layers) % group:
        divisors = [str(size) for size in range(1, len(layers) + 1) if len(layers) % size == 0]
        raise ValueError(
            f"group={group} does not divide the {len(layers)} layers; choose one of {', '.join(divisors)}."
        )
    functions = [_function_of(network) for network in networks]
    for position, function in enumerate(functions):
        first = position - position % group
        if function != functions[first]:
            raise ShapeError(
                f"The experts of layers {first} and {position} cannot be tied: they are {functions[first]} "
                f"and {function}. Build them alike, or tie layers of equal shapes."
            )
    pools = nn.ModuleList()
    for k in range(0, len(layers), group):
        name = label if group == len(layers) else f"{label}{k // group}"
        pool = ExpertPool(networks[k], label=name, balance=balance)
        pools.append(pool)
        for layer in layers[k : k + group]:
            layer.experts = PooledExperts(pool)
    return pools


def _function_of(experts: ExpertFFN) -> dict[str, object]:
    """Describe what experts compute, whatever their matrices are made of."""
    banks = {name: experts.bank(name) for name in experts.names}
    shapes = {name: (bank.num_experts, bank.out_features, bank.in_features) for name, bank in banks.items()}
    bias = getattr(experts, f"{experts.names[0]}_bias") is not None
    return {"(experts, out, in)": shapes, "activation": experts.activation, "bias": bias}
