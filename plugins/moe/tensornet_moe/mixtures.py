"""Build a mixture of experts in one call; `tensornet_hf.upcycle` uses the same functions."""

from collections.abc import Callable, Sequence
from difflib import get_close_matches
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from tensornet._util import check_size, check_type
from tensornet.errors import ShapeError
from tensornet.linalg.svd import check_finite
from tensornet.topologies import dense
from tensornet.topology import Topology
from tensornet_moe.bank import ExpertBank
from tensornet_moe.experts import SharedCoreExperts
from tensornet_moe.ffn import ExpertFFN
from tensornet_moe.joint_fit import fit_shared
from tensornet_moe.layer import SharedCoreMoE
from tensornet_moe.low_rank_deltas import LowRankDeltaExperts
from tensornet_moe.pool import ExpertPool, PooledExperts
from tensornet_moe.routers import Combine, Router, TopKRouter, router_kind
from tensornet_moe.sharing import Share, center_chain, check_share

#: The words of `tensornet_moe.sharing` for the matrices of new experts.
SHARES_OF_MIXTURES = ("none", "center", "base")
#: Function that builds a bank of experts which start as the given matrices, shape `(networks, out, in)`.
MakeBank = Callable[[Tensor], ExpertBank]

#: By default the rank of deltas is the shorter side of the matrix divided by this number.
_SIDE_PER_RANK = 16
#: Largest number of sweeps of alternating least squares when a shared core is fitted to several matrices.
_SWEEPS = 10


def mixture(
    *,
    d_model: int,
    d_ff: int | None = None,
    experts: int | MakeBank | range | None = None,
    top_k: int | None = None,
    share: Share | None = None,
    pool: ExpertPool | None = None,
    rank: int | None = None,
    router: str | Router = "topk",
    shared_expert: int | None = None,
    capacity_factor: float | None = None,
    balance_coef: float | None = None,
    z_coef: float = 0.0,
    bias_rate: float | None = None,
    combine: Combine | None = None,
    normalize: bool = False,
    jitter: float = 0.0,
    activation: str | None = None,
    gated: bool | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **router_options: Any,
) -> SharedCoreMoE:
    """Build a mixture of experts for training from scratch; all arguments but `d_model` have defaults.

    `tensornet_hf.upcycle` takes most of these options, with the same defaults except for `combine`, to start
    from a dense model.

    `share` determines how the matrices `(out, in)` of the experts are stored:

    - `"none"`: a dense matrix for each expert.
    - `"center"`: a chain (MPO) of three cores with full bonds. All experts share the middle core, which is as
      large as one dense matrix. Each expert owns its first and last core. The first core has a leg of size
      `a`, which divides `out`; the last core has a leg of size `b`, which divides `in`; both are at most 64.
      So an expert owns `a**2 + b**2` values for each matrix, and rebuilding a matrix costs as much as
      multiplying `a + b` tokens by it.
    - `"base"`: one dense matrix that all experts share, plus a low-rank delta of each expert that starts at
      zero.

    For other topologies, legs, bonds or banks, pass a function that builds banks as `experts`.

    Args:
        d_model: number of features of a token.
        d_ff: number of features of an expert's hidden layer; `4 * d_model` if absent.
        experts: number of experts; 8 if absent. Or a function `weights -> ExpertBank` that builds the bank of
            one matrix of the experts. With `upcycle`, `weights: (networks, out, in)` contains this matrix of
            each dense network from which the experts start. Here, it is empty: `(0, out, in)`. With a pool:
            the range of the pool's experts that the layer uses; all if absent.
        top_k: number of experts for each token; 2 if absent. Only for routers with this argument.
        share: what the experts share, as above; `"center"` if absent.
        pool: use the experts of this pool, which belongs to the model. They exist already, so `d_ff`,
            `activation` and `gated` must be absent or agree with them, and `share` and `rank` must be absent.
        rank: rank of the deltas of `share="base"`; `min(out, in) / 16` if absent.
        router: a `Router`, or its name: `"topk"`, `"switch"`, `"expert_choice"`, or a name that was given to
            `register_router`.
        shared_expert: number of hidden features of an expert that processes every token, in addition to the
            experts that the router chooses; no such expert if absent.
        capacity_factor: slots of each expert relative to an even load; no limit if absent. Only for encoders:
            see `SharedCoreMoE`. With `"expert_choice"`: mean number of experts for each token; 1 if absent.
        balance_coef: weight of the balancing loss. If absent: 0 if the load is balanced by biases
            (`bias_rate`) or by the router itself (`"expert_choice"`), otherwise 0.01.
        z_coef: weight of the router z-loss; see `router_z_loss`.
        bias_rate: step size of router biases, which balance the load without a loss. If absent: 0.001 for the
            routers `"topk"` and `"switch"` of a pool, otherwise 0. Call `update_biases` after each training
            step.
        combine: how the outputs of a token's experts are weighted; see `Router`. `"sigmoid"` if absent, which
            is best for training from scratch. (In `upcycle`, `"unit"` is the default, since only then does a
            mixture reproduce the dense model.)
        normalize: whether to normalize the logits of the router; see `Router`.
        jitter: relative noise on the inputs of the router in training.
        activation: a name in `tensornet_moe.ffn.ACTIVATIONS`; `"silu"` if absent.
        gated: if True or absent, an expert is `W_down (act(W_gate x) * W_up x)`; if False, it is
            `W_down act(W_up x)`.
        device, dtype: device and dtype of all parameters.
        router_options: other arguments of a router that you registered.

    Raises:
        ValueError: an unknown `share`, router or activation, a size below 1, `top_k` above `experts`, or
            arguments that exclude each other.
        ShapeError: the sizes differ from those of the pool; a size has no divisor that can be a leg of
            `share="center"`; or the function `experts` built a bank of another shape.
        IndexError: the pool does not have these experts.
        TypeError: an option that the named router does not have, or any router option if `router` is a
            `Router`.

    Reference:
        `"center"`: Gao et al. 2022, section 4.1; `"base"`: Gu et al. 2025 (D2-MoE), section 3; pools: Huang
        et al. 2026 (UniPool). Legs and ranks are our choice.

    Example:
        >>> moe = tm.mixture(d_model=64, d_ff=256, experts=8, top_k=2, share="center")
        >>> moe(torch.randn(2, 5, 64)).shape
        torch.Size([2, 5, 64])
        >>> pool = tm.ExpertPool(tm.mixture(d_model=64, experts=16, share="none").experts)
        >>> layers = [tm.mixture(d_model=64, pool=pool) for _ in range(4)]
        >>> layers[0].num_experts, layers[0].router.top_k
        (16, 2)
    """
    where: dict[str, Any] = {"device": device, "dtype": dtype}
    if isinstance(router, str):
        of_router = router_kind(router).options
        known = [name for name in signature(mixture).parameters if name != "router_options"]
        check_options([x for x in router_options if x not in of_router], "mixture", [*known, *of_router])
    if pool is not None:
        own = pool.experts
        have = {
            "d_model": own.in_features,
            "d_ff": own.bank(own.names[0]).out_features,
            "activation": own.activation,
            "gated": own.gated,
        }
        for name, value in zip(have, (d_model, d_ff, activation, gated), strict=True):
            if value is not None and value != have[name]:
                raise ShapeError(
                    f"{name}={value!r}, but the experts of the pool {pool.label!r} have {name}="
                    f"{have[name]!r}; leave it out, or build a pool of other experts."
                )
        if share is not None or rank is not None:
            raise ValueError("share= and rank= are for new experts, but those of a pool exist already.")
        network: Any = PooledExperts(pool, experts)  # type: ignore[arg-type]  # it checks for a range
        names = own.names
    else:
        names = ("up", "down") if gated is False else ("gate", "up", "down")
        network = new_experts(
            names, d_model, d_ff, experts=experts, share=share, rank=rank, activation=activation, **where
        )
    if isinstance(router, Router):
        given = {"top_k": top_k, "combine": combine, "bias_rate": bias_rate, "normalize": normalize or None}
        given |= {"jitter": jitter or None, **router_options}
        if surplus := [name for name, value in given.items() if value is not None]:
            raise TypeError(f"{', '.join(surplus)}: pass these to the router itself, or name a router.")
    else:
        router = make_router(
            router,
            d_model,
            network.num_experts,
            pooled=pool is not None,
            top_k=top_k,
            capacity_factor=capacity_factor,
            bias_rate=bias_rate,
            combine=combine or "sigmoid",
            normalize=normalize,
            jitter=jitter,
            **router_options,
            **where,
        )
    always = None
    if shared_expert is not None:
        activation = activation or (pool.experts.activation if pool is not None else None)
        always = new_experts(
            names, d_model, shared_expert, experts=1, share="none", activation=activation, **where
        )
    return make_layer(
        router,
        network,
        shared_expert=always,
        capacity_factor=capacity_factor,
        balance_coef=balance_coef,
        z_coef=z_coef,
    )


# --- the parts of a mixture, which `tensornet_hf.upcycle` uses, too -------------------------------------


def new_experts(
    names: Sequence[str],
    d_model: int,
    d_ff: int | None,
    *,
    activation: str | None,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
    **words: Any,
) -> ExpertFFN:
    """Build experts with random matrices.

    The last of `names` is the matrix from the hidden layer back to `d_model`; all others map to the hidden
    layer. `words` are arguments of `make_bank`.
    """
    d_ff = 4 * d_model if d_ff is None else d_ff
    for name, size in (("d_model", d_model), ("d_ff", d_ff)):
        check_size(name, size, error=ValueError)
    shapes = {**dict.fromkeys(names[:-1], (d_ff, d_model)), names[-1]: (d_model, d_ff)}
    banks = {
        name: make_bank(torch.empty(0, *shape, device=device, dtype=dtype), **words)
        for name, shape in shapes.items()
    }
    return ExpertFFN(banks, activation=activation or "silu", device=device, dtype=dtype)


def make_bank(
    weights: Tensor,
    *,
    experts: int | MakeBank | None = None,
    share: Share | None = None,
    rank: int | None = None,
    seed: int = 0,
) -> ExpertBank:
    """Build the bank of one matrix from the arguments `experts`, `share` and `rank` of `mixture`.

    Expert `e` starts as matrix `e % networks` of `weights`. If `weights` is empty, all experts are random.

    Args:
        weights: matrices of the dense networks, shape `(networks, out, in)`.
        experts, share, rank: see `mixture`.
        seed: seed of the deltas of `share="base"`.

    Raises:
        ValueError: an unknown `share`, a number below 1, or arguments that exclude each other.
        ShapeError: a side has no divisor that can be a leg of `share="center"`; or the function `experts`
            built a bank of matrices of another shape.
        TypeError: the function `experts` did not return a bank.
        NonFiniteError: NaN or infinity in `weights`.
    """
    rows, columns = weights.shape[1:]
    if callable(experts):
        if share is not None or rank is not None:
            raise ValueError(
                "share= and rank= are for a number of experts, but experts= makes banks of its own: leave "
                "out one of the two."
            )
        bank = experts(weights)
        check_type("What experts= made", bank, ExpertBank, "for example SharedCoreExperts(topology, 8)")
        if (bank.out_features, bank.in_features) != (rows, columns):
            raise ShapeError(
                f"experts= made matrices of shape ({bank.out_features}, {bank.in_features}) for weights of "
                f"shape {tuple(weights.shape)}."
            )
        return bank
    experts, share = 8 if experts is None else experts, share or "center"
    check_size("experts", experts, error=ValueError)
    check_share(share, SHARES_OF_MIXTURES, instead="For other networks, pass a function as experts=.")
    if rank is not None and share != "base":
        raise ValueError(f'rank= is the rank of the deltas of share="base", got share={share!r}.')
    whole = dense(out_features=rows, in_features=columns)
    if share == "none":
        return experts_from(weights, experts, whole, ())
    if share == "base":
        rank = max(min(rows, columns) // _SIDE_PER_RANK, 1) if rank is None else rank
        if len(weights) > 1:
            stack = weights[[e % len(weights) for e in range(experts)]]
            return LowRankDeltaExperts.from_experts(stack, rank=rank)
        if len(weights) == 1:
            return LowRankDeltaExperts.from_dense(weights[0], num_experts=experts, rank=rank, seed=seed)
        base = experts_from(weights, experts, whole, whole.core_names)
        return LowRankDeltaExperts(base, rank, device=weights.device, dtype=weights.dtype)
    chain = center_chain(rows, columns)
    return experts_from(weights, experts, chain, ("1",))


@torch.no_grad()
def experts_from(
    weights: Tensor, experts: int, topology: Topology, shared: Sequence[str]
) -> SharedCoreExperts:
    """Build experts of a given topology; expert `e` starts as matrix `e % networks` of `weights`.

    If `weights` is empty, the experts are random. A single matrix is decomposed. Several matrices are fitted
    jointly (`fit_shared`), or stored exactly if each expert owns a dense matrix. `.error` of the bank is the
    relative Frobenius error.

    Args:
        weights: shape `(networks, out, in)`.
        experts: number of experts.
        topology: topology of each expert.
        shared: names of the cores that all experts share.

    Raises:
        NonFiniteError: NaN or infinity in `weights`.
    """
    if len(weights) == 0:
        return SharedCoreExperts(topology, experts, share=shared, device=weights.device, dtype=weights.dtype)
    if len(weights) == 1:
        return SharedCoreExperts.from_dense(weights[0], num_experts=experts, topology=topology, share=shared)
    error = 0.0
    if not shared and len(topology.cores) == 1:
        check_finite(weights, "The stack of expert matrices")
        found = dict.fromkeys(topology.core_names, weights)
    else:
        fit = fit_shared(weights, topology, tuple(shared), max_sweeps=_SWEEPS)
        found, error = dict(fit.cores), fit.error
    same = [e % len(weights) for e in range(experts)]
    cores: dict[str, Tensor | Sequence[Tensor]] = {
        name: core if name in shared else core[same] for name, core in found.items()
    }
    return SharedCoreExperts._from_cores((topology,) * experts, shared, cores, error, weights.dtype)


def make_router(
    name: str,
    num_features: int,
    num_experts: int,
    *,
    pooled: bool,
    top_k: int | None,
    capacity_factor: float | None,
    bias_rate: float | None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> Router:
    """Build a router by name, with the defaults of `mixture`.

    `pooled` is True if the experts belong to a pool, which changes the default of `bias_rate`.

    `options` are the other arguments of the router; the caller checks their names.

    Raises:
        ValueError: an unknown name, or an option out of its range.
        TypeError: `top_k` for a router without it.
    """
    kind = router_kind(name)
    if "top_k" in kind.options:
        options["top_k"] = top_k = 2 if top_k is None else top_k
        if top_k > num_experts:
            raise ValueError(f"top_k={top_k} with experts={num_experts}: top_k must be at most experts.")
    if "capacity_factor" in kind.options and capacity_factor is not None:
        options["capacity_factor"] = capacity_factor
    if bias_rate is None:
        bias_rate = 0.001 if pooled and issubclass(kind, TopKRouter) else 0.0
    router = kind(num_features, num_experts, bias_rate=bias_rate, device=device, dtype=dtype, **options)
    if top_k is not None and "top_k" not in kind.options and top_k != router.experts_per_token:
        raise TypeError(f'top_k={top_k} needs router="topk"; {name!r} has no top_k.')
    return router


def check_options(unknown: Sequence[str], what: str, known: Sequence[str]) -> None:
    """Raise TypeError if there is an unknown option; the message lists similar known options."""
    if unknown:
        near = dict.fromkeys(x for name in unknown for x in get_close_matches(name, known))
        raise TypeError(
            f"{what} has no option {', '.join(unknown)}; "
            f"{f'similar are {list(near)}' if near else f'options are {sorted(known)}'}."
        )


def make_layer(
    router: Router,
    experts: ExpertFFN | ExpertPool | PooledExperts,
    *,
    balance_coef: float | None,
    capacity_factor: float | None,
    **options: Any,
) -> SharedCoreMoE:
    """Combine a router and experts into a layer, with the defaults of `mixture`.

    `options` are further arguments of `SharedCoreMoE`.
    """
    # If the router itself has a capacity, experts choose tokens, so the load is always balanced and the
    # balancing loss would be constant.
    choice = "capacity_factor" in type(router).options
    if balance_coef is None:
        balance_coef = 0.0 if choice or router.bias_rate > 0 else 0.01
    capacity_factor = None if choice else capacity_factor
    return SharedCoreMoE(
        router, experts, balance_coef=balance_coef, capacity_factor=capacity_factor, **options
    )
