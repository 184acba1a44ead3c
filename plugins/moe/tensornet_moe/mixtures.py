"""Mixtures of experts built in one line, and experts that several layers of a model share."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tensornet._util import check_size, check_type
from tensornet.errors import ShapeError
from tensornet.linalg.svd import check_finite
from tensornet.topologies import dense, mpo
from tensornet.topology import Topology
from tensornet_moe.bank import ExpertBank, check_weights
from tensornet_moe.experts import SharedCoreExperts, with_noise
from tensornet_moe.ffn import ExpertFFN
from tensornet_moe.joint_fit import fit_shared
from tensornet_moe.layer import SharedCoreMoE
from tensornet_moe.low_rank_deltas import LowRankDeltaExperts
from tensornet_moe.pool import Balance, ExpertPool, PooledExperts
from tensornet_moe.routers import Router, router_kind

Share = Literal["center", "none", "base"]
SHARES = ("center", "none", "base")

#: Largest leg of the end cores of a chain in `mixture`. With 64, rebuilding a matrix costs at most as much as
#: multiplying `64 + 64` tokens by it.
_LONGEST_END = 64
#: The rank of deltas in `mixture` is the shorter side of the matrix divided by this number.
_SIDE_PER_RANK = 16
#: Largest number of sweeps of alternating least squares when a center is fitted to several matrices.
_SWEEPS = 10


def mixture(
    *,
    d_model: int,
    d_ff: int | None = None,
    experts: int | None = None,
    top_k: int | None = None,
    share: Share | ExpertPool = "center",
    router: str | Router = "topk",
    activation: str | None = None,
    gated: bool | None = None,
    balance_coef: float = 0.01,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **router_options: Any,
) -> SharedCoreMoE:
    """Build a mixture of experts for training from scratch; everything but the sizes has a default.

    `share` determines how the matrices `(out, in)` of the experts are stored:

    - `"none"`: a dense matrix for each expert.
    - `"center"`: a chain of three cores with full bonds. All experts share the middle core, which is as large
      as one dense matrix; each expert owns both ends. The first core has a leg of size `a` that divides
      `out`, the last a leg of size `b` that divides `in`, both at most 64. So an expert owns `a**2 + b**2`
      values for each matrix, and rebuilding a matrix costs as much as multiplying `a + b` tokens by it.
    - `"base"`: one dense matrix for all experts, and for each a low-rank delta that starts at zero, of rank
      `min(out, in) / 16`.
    - an `ExpertPool`: the layer uses the experts of the pool, which belongs to the model.

    For other legs, bonds, ranks or banks build a `SharedCoreMoE` from a router and an `ExpertFFN` yourself.

    Args:
        d_model: number of features of a token.
        d_ff: number of features of an expert's hidden layer; `4 * d_model` if absent.
        experts: number of experts; 8 if absent.
        top_k: number of experts for each token; 2 if absent. Only for routers with this argument.
        share: what the experts share, as above. The experts of a pool exist already, so `d_ff`, `experts`,
            `activation` and `gated` must then be absent or agree with them.
        router: a `Router`, or its name: `"topk"`, `"switch"`, `"expert_choice"`, or a name that was given to
            `register_router`.
        activation: a name in `tensornet_moe.ffn.ACTIVATIONS`; `"silu"` if absent.
        gated: True (if absent): an expert is `W_down (act(W_gate x) * W_up x)`. False: `W_down act(W_up x)`.
        balance_coef: weight of the balancing loss, see `SharedCoreMoE`.
        device, dtype: device and dtype of all parameters.
        router_options: arguments of the named router, for example `bias_rate=`, `normalize=`. `combine` is
            `"sigmoid"` if absent, which is best for training from scratch, see `Router`.

    Raises:
        ValueError: an unknown `share`, router or activation, a size below 1, or `top_k` above `experts`.
        ShapeError: the sizes differ from those of the pool, or have no divisors for the legs of a center.
        TypeError: `router_options` that the named router does not have, or any if `router` is a `Router`.

    Reference:
        `"center"`: Gao et al. 2022, section 4.1; `"base"`: Gu et al. 2025 (D2-MoE), section 3; pools: Huang
        et al. 2026 (UniPool). Legs and ranks are our choice.

    Example:
        >>> moe = tm.mixture(d_model=64, d_ff=256, experts=8, top_k=2, share="center")
        >>> moe(torch.randn(2, 5, 64)).shape
        torch.Size([2, 5, 64])
        >>> pool = tm.ExpertPool(tm.mixture(d_model=64, experts=16, share="none").experts)
        >>> layers = [tm.mixture(d_model=64, share=pool, bias_rate=0.001) for _ in range(4)]
        >>> layers[0].num_experts, layers[0].router.top_k
        (16, 2)
    """
    if isinstance(share, ExpertPool):
        network: ExpertFFN | ExpertPool = share
        own = share.experts
        have: dict[str, Any] = {
            "d_model": own.in_features,
            "d_ff": own.bank(own.names[0]).out_features,
            "experts": own.num_experts,
            "activation": own.activation,
            "gated": own.gated,
        }
        for name, value in zip(have, (d_model, d_ff, experts, activation, gated), strict=True):
            if value is not None and value != have[name]:
                raise ShapeError(
                    f"{name}={value!r}, but the experts of the pool {share.label!r} have {name}="
                    f"{have[name]!r}; leave it out, or build a pool of other experts."
                )
        experts = own.num_experts
    else:
        experts = 8 if experts is None else experts
        d_ff = 4 * d_model if d_ff is None else d_ff
        for name, size in (("d_model", d_model), ("d_ff", d_ff), ("experts", experts)):
            check_size(name, size, error=ValueError)
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        names = ("up",) if gated is False else ("gate", "up")
        shapes = {**dict.fromkeys(names, (d_ff, d_model)), "down": (d_model, d_ff)}
        matrices: dict[str, ExpertBank] = {}
        for name, shape in shapes.items():
            topology, shared, rank = _parts(share, *shape)
            bank = SharedCoreExperts(topology, experts, shared=shared, **where)
            matrices[name] = bank if rank is None else LowRankDeltaExperts(bank, rank, **where)
        network = ExpertFFN(matrices, activation=activation or "silu", **where)
    if isinstance(router, str):
        kind = router_kind(router)
        if top_k is not None and "top_k" not in kind.options:
            raise TypeError(f'top_k={top_k} needs router="topk"; {router!r} has no top_k.')
        if "top_k" in kind.options:
            router_options["top_k"] = 2 if top_k is None else top_k
        options = {"combine": "sigmoid", "device": device, "dtype": dtype, **router_options}
        router = kind(d_model, experts, **options)
    elif router_options or top_k is not None:
        surplus = [*router_options, *(() if top_k is None else ("top_k",))]
        raise TypeError(f"{', '.join(surplus)}: give these to the router that you built, or name a router.")
    return SharedCoreMoE(router, network, balance_coef=balance_coef)


def _parts(share: str, rows: int, columns: int) -> tuple[Topology, tuple[str, ...], int | None]:
    """Choose topology, shared cores and rank of deltas (None without deltas) for a matrix; see `mixture`."""
    if share not in SHARES:
        raise ValueError(f"Unknown share={share!r}; choose one of {', '.join(SHARES)}, or an ExpertPool.")
    whole = dense(out_features=rows, in_features=columns)
    if share == "none":
        return whole, (), None
    if share == "base":
        return whole, whole.core_names, max(min(rows, columns) // _SIDE_PER_RANK, 1)
    # An end with legs on both sides of the matrix trains equally well, but the matrix that is built from it
    # must be copied to bring its rows and columns into order, which makes a training step a third slower.
    first, last = _end(rows), _end(columns)
    if first == 1 or last == 1:
        raise ShapeError(
            f"Matrices of shape {rows} x {columns} have no legs for a shared center: each side needs a "
            f"factor in 2..{_LONGEST_END}. Choose sizes with small factors, or share='base'."
        )
    return mpo(out_dims=(first, rows // first, 1), in_dims=(1, columns // last, last)), ("1",), None


def _end(size: int) -> int:
    """Choose an end leg: the largest divisor of `size`, at most 64 and at most four times the middle leg."""
    return max(a for a in range(1, _LONGEST_END + 1) if size % a == 0 and a * a <= 4 * size)


@torch.no_grad()
def experts_from(
    weights: Tensor, *, experts: int, share: Share, noise: float = 0.0, seed: int = 0
) -> SharedCoreExperts | LowRankDeltaExperts:
    """Make a bank whose experts start as given matrices, expert `e` as matrix `e % matrices`.

    For `share="none"` this is exact. Otherwise different matrices are fitted jointly by one center
    (`fit_shared`) or by one base with deltas; the fit of a single matrix is exact. `.error` of the bank is
    the relative Frobenius error.

    Args:
        weights: shape `(matrices, out, in)`.
        experts: number of experts.
        share: see `mixture`.
        noise: standard deviation of Gaussian noise on each private core, relative to the root mean square of
            the core; not for `"base"`.
        seed: seed of the noise, and of the deltas of a base.

    Raises:
        ValueError: an unknown `share`.
        ShapeError: the sides have no divisors for the legs of a center.
        NonFiniteError: NaN or infinity in `weights`.
    """
    check_weights(weights, "matrices", "out", "in")
    topology, shared, rank = _parts(share, *weights.shape[1:])
    same = [e % len(weights) for e in range(experts)]
    if rank is not None:
        if len(weights) > 1:
            return LowRankDeltaExperts.from_experts(weights[same], rank=rank)
        return LowRankDeltaExperts.from_dense(weights[0], num_experts=experts, rank=rank, seed=seed)
    if len(weights) == 1:
        return SharedCoreExperts.from_dense(
            weights[0], num_experts=experts, topology=topology, shared=shared, noise=noise, seed=seed
        )
    error = 0.0
    if share == "none":
        check_finite(weights, "The stack of expert matrices")
        found = dict.fromkeys(topology.core_names, weights)
    else:
        fit = fit_shared(weights, topology, shared, max_sweeps=_SWEEPS)
        found, error = dict(fit.cores), fit.error
    generator = torch.Generator().manual_seed(seed)
    cores: dict[str, Tensor | Sequence[Tensor]] = {
        name: core if name in shared else [with_noise(core[k], noise, generator) for k in same]
        for name, core in found.items()
    }
    return SharedCoreExperts._from_cores((topology,) * experts, shared, cores, error, weights.dtype)


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
        group: number of layers that use one pool; all layers if absent.
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
    check_group("group", group, len(layers))
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


def check_group(name: str, group: int, layers: int, *, least: int = 1) -> None:
    """Raise ValueError unless `group` is at least `least` and divides the number of layers."""
    check_size(name, group, least=least, error=ValueError)
    if layers % group:
        divisors = [str(size) for size in range(least, layers + 1) if layers % size == 0]
        raise ValueError(
            f"{name}={group} does not divide the {layers} layers; choose one of {', '.join(divisors)}."
        )


def _function_of(experts: ExpertFFN) -> dict[str, object]:
    """Describe the shapes, the activation and the biases of experts."""
    banks = {name: experts.bank(name) for name in experts.names}
    shapes = {name: (bank.num_experts, bank.out_features, bank.in_features) for name, bank in banks.items()}
    bias = getattr(experts, f"{experts.names[0]}_bias") is not None
    return {"(experts, out, in)": shapes, "activation": experts.activation, "bias": bias}
