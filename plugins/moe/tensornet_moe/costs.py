"""Count the parameters, bytes and multiply-adds of models with mixtures of experts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import nn

from tensornet._util import check_size
from tensornet.contraction.plan import plan_matrix
from tensornet.errors import TargetError
from tensornet.nn import MPOEmbedding
from tensornet.nn.layer_kinds import kind_of
from tensornet.nn.module import NetworkModule
from tensornet.nn.storage import PackedCore, Storage
from tensornet.quantization import NumberFormat
from tensornet.topologies import dense
from tensornet_moe.bank import ExpertBank
from tensornet_moe.experts import SharedCoreExperts
from tensornet_moe.ffn import ExpertFFN
from tensornet_moe.layer import SharedCoreMoE
from tensornet_moe.pool import PooledExperts, find_pools
from tensornet_moe.routers import Router
from tensornet_moe.specialist_layers import SpecialistLinear, Specialists, is_low_rank


@dataclass
class Cost:
    """Cost of one part of a model, such as its experts.

    Args:
        stored: number of stored values, including the scales of integer formats.
        active: number of stored values that one token uses.
        multiply_adds: number of multiply-adds per token in a forward pass.
    """

    stored: int = 0
    active: float = 0.0
    multiply_adds: float = 0.0


@dataclass(frozen=True)
class ModelCosts:
    """Costs of a model, as returned by `describe`; `print` shows them as a table.

    Args:
        parts: cost of `"embeddings"`, `"experts"`, `"routers"`, `"other"` and, if there are any,
            `"specialists"`.
        bytes: bytes of the model as it is (key `"now"`), and as it would be in each number format.
        tokens: number of tokens in a forward pass.
        uncounted: names of weights with more than two dimensions; their multiply-adds are not counted.
        specialists: bytes of what specialists share (`"shared"`), of each specialist, and of a new one
            (`"next"`); empty without specialists.

    Example:
        >>> costs = tm.describe(torch.nn.Linear(64, 32))
        >>> costs.total.stored, costs.bytes["int4"]
        (2080, 1216)
    """

    parts: dict[str, Cost]
    bytes: dict[str, int]
    tokens: int
    uncounted: tuple[str, ...]
    specialists: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> Cost:
        """Cost of the whole model."""
        parts = self.parts.values()
        return Cost(
            sum(part.stored for part in parts),
            sum(part.active for part in parts),
            sum(part.multiply_adds for part in parts),
        )

    def __str__(self) -> str:
        """Return the table."""
        lines = [f"{'':<12}{'stored':>16}{'active a token':>18}{'multiply-adds a token':>24}"]
        for name, cost in {**self.parts, "total": self.total}.items():
            lines.append(f"{name:<12}{cost.stored:>16,}{cost.active:>18,.0f}{cost.multiply_adds:>24,.0f}")
        lines.append("bytes: " + ", ".join(f"{name} {size:,}" for name, size in self.bytes.items()))
        if self.specialists:
            sizes = ", ".join(f"{name} {size:,}" for name, size in self.specialists.items())
            lines.append(f"bytes of specialists: {sizes}")
        if self.uncounted:
            lines.append("arithmetic not counted: " + ", ".join(self.uncounted))
        return "\n".join(lines)


def describe(
    model: nn.Module,
    *,
    tokens: int = 2048,
    formats: Sequence[str] = ("float", "bf16", "int8", "int4"),
) -> ModelCosts:
    """Count parameters, bytes and multiply-adds of a model, to compare models of equal size or speed.

    - Stored: each stored value counts once. A pool counts once, however many layers use it.
    - Active: the stored values that one token uses, counted again in each layer that uses them. An embedding
      counts one row. A mixture counts its router, `top_k` experts (shared cores once) and its shared expert.
      Everything else counts in full. If the number of experts depends on the tokens
      (`Router.experts_per_token` is None), the mean of the last forward pass replaces `top_k`.
    - Multiply-adds: those of a forward pass, per token. Two-dimensional weights count once, and the matrices
      of experts count for `top_k` experts. Each pass builds the matrices of all experts from their cores
      once, so one token's share of this cost is `1 / tokens`. Attention scores, which depend on the length of
      the text, and elementwise operations are not counted.
    - Bytes: the size of the model if all matrices of linear layers, embeddings and `SharedCoreExperts` are
      stored in one number format, scales included. Everything else keeps its current size: norms, biases,
      routers, low-rank deltas, specialists and layers that are already compressed.
    - Specialists: a token uses one specialist, with all shared cores.

    Args:
        model: any model, usually with mixtures.
        tokens: number of tokens in a forward pass; they share the cost of building matrices.
        formats: names of number formats (see `tensornet.quantization.NumberFormat`); `"float"` is the dtype
            of the model.

    Returns:
        The costs; `print` shows them.

    Raises:
        ValueError: `tokens` is below 1.
        FormatError: an unknown number format.
        TargetError: experts are spread over processes; a router does not say how many experts a token gets,
            and its mixture has not run; or a pool is missing from the model or contained
            twice, or two pools have the same label.

    Example:
        >>> model = torch.nn.Module()
        >>> model.pool = tm.ExpertPool(tm.mixture(d_model=64, d_ff=64, experts=16, share="none").experts)
        >>> model.layers = torch.nn.ModuleList(tm.mixture(d_model=64, pool=model.pool) for _ in range(4))
        >>> print(tm.describe(model))
                              stored    active a token   multiply-adds a token
        embeddings                 0                 0                       0
        experts              196,608            98,304                  98,304
        routers                4,096             4,096                   4,096
        other                      0                 0                       0
        total                200,704           102,400                 102,400
        bytes: now 803,328, float 803,328, bf16 410,112, int8 219,648, int4 121,344
    """
    check_size("tokens", tokens, error=ValueError)
    find_pools(model)
    parts = {name: Cost() for name in ("embeddings", "experts", "routers", "other")}
    rooms: dict[int, str] = {}
    compressed: set[int] = set()
    for part in model.modules():
        room = "experts" if isinstance(part, ExpertFFN | ExpertBank) else None
        room = "routers" if isinstance(part, Router) else room
        room = "embeddings" if isinstance(part, nn.Embedding | MPOEmbedding) else room
        if room is not None:
            rooms.update((id(inner), room) for inner in part.modules())
        if isinstance(part, SpecialistLinear):
            parts.setdefault("specialists", Cost())
            own = (*part.specialists.modules(), *part.shared_cores.modules())
            rooms.update((id(inner), "specialists") for inner in own)
        if isinstance(part, NetworkModule):
            compressed.update(id(inner) for inner in part.modules() if inner is not part)

    seen: set[int] = set()
    for part in model.modules():
        cost = parts[rooms.get(id(part), "other")]
        if isinstance(part, PackedCore):
            cost.stored += sum(part.counts.values())
            continue
        for parameter in part.parameters(recurse=False):
            cost.stored += parameter.numel() if id(parameter) not in seen else 0
            seen.add(id(parameter))

    uncounted: list[str] = []
    for name, part in model.named_modules():
        if isinstance(part, SharedCoreMoE):
            _add_mixture(parts["experts"], name, part, tokens)
        if isinstance(part, SpecialistLinear):
            parts["specialists"].active += part.topology.num_params
            arithmetic: float = part.topology.num_params
            if not is_low_rank(part.topology):  # its matrix is built once in a pass
                arithmetic = math.prod(part.topology.shape)
                arithmetic += plan_matrix(part.topology).multiply_adds(1) / tokens
            parts["specialists"].multiply_adds += arithmetic
        if rooms.get(id(part)) in ("experts", "specialists") or id(part) in compressed:
            continue
        cost = parts[rooms.get(id(part), "other")]
        if isinstance(part, nn.Embedding | MPOEmbedding):
            cost.active += part.embedding_dim
            continue
        if isinstance(part, NetworkModule):
            cost.active += part.num_params
            whole = part.plan.matrix.multiply_adds(1) + tokens * math.prod(part.topology.shape)
            cost.multiply_adds += min(whole, *(x.multiply_adds(tokens) for x in part.plan.applies)) / tokens
            continue
        for key, parameter in part.named_parameters(recurse=False):
            cost.active += parameter.numel()
            cost.multiply_adds += parameter.numel() if parameter.ndim == 2 else 0
            if parameter.ndim > 2:
                uncounted.append(f"{name}.{key}".lstrip("."))

    specialists = Specialists(model).bytes() if "specialists" in parts else {}
    return ModelCosts(parts, _bytes(model, formats), tokens, tuple(uncounted), specialists)


def _add_mixture(cost: Cost, name: str, layer: SharedCoreMoE, tokens: int) -> None:
    """Add to `cost` what the experts of one layer cost per token."""
    per_token = _per_token(name, layer)
    routed, used = layer.experts, 1.0
    if isinstance(routed, PooledExperts):
        # `multiply_adds` includes building the matrices of all experts of the pool. A layer that uses the
        # fraction `used` of them builds only that fraction. So the cost below is that of `1 / used` times as
        # many rows, multiplied by `used`; this does not change the cost of multiplying the rows.
        used = routed.num_experts / routed.pool.num_experts
        routed = routed.pool.experts
    for network, count, part in ((routed, per_token, used), (layer.shared_expert, 1, 1.0)):
        if network is None:
            continue
        if not isinstance(network, ExpertFFN):
            raise TargetError(f"The experts of {name!r} are spread over processes: gather_experts first.")
        for key in network.names:
            bank, bias = network.bank(key), getattr(network, f"{key}_bias")
            cost.active += bank.active_params(count) + (0 if bias is None else count * bank.out_features)
            cost.multiply_adds += part * bank.multiply_adds(round(tokens * count / part)) / tokens


def _per_token(name: str, layer: SharedCoreMoE) -> float:
    """Return the number of experts that a layer chooses for a token."""
    if (per_token := layer.router.experts_per_token) is not None:
        return per_token
    if layer.stats is None:
        raise TargetError(
            f"The {type(layer.router).__name__} of {name!r} does not say how many experts it chooses for "
            "a token: call the model once before describe, which then counts the choices. If the number "
            "is fixed, define the property experts_per_token of the router."
        )
    return float(layer.stats.load.sum() / layer.stats.tokens.clamp_min(1))


def _bytes(model: nn.Module, formats: Sequence[str]) -> dict[str, int]:
    """Count the bytes of the model as it is, and with its matrices in each number format."""
    tensors = {id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values()}
    now = sum(tensor.nbytes for tensor in tensors.values())
    storages = {name: Storage(number_format=NumberFormat.parse(name)) for name in formats}
    sizes = dict.fromkeys(formats, 0)
    replaced: set[int] = set()
    for part in model.modules():
        if isinstance(part, SharedCoreExperts):
            replaced.update(id(tensor) for tensor in part.stored.values())
            for name, storage in storages.items():
                for core in part.topology.core_names:
                    topologies = (part.topology,) if core in part.shared else part.topologies
                    sizes[name] += sum(storage.core_size(t, core, part.dtype)[1] for t in topologies)
        elif (kind := kind_of(part)) is not None and id(part.weight) not in replaced:
            replaced.add(id(part.weight))
            matrix = kind.matrix(part)
            topology = dense(out_features=matrix.shape[0], in_features=matrix.shape[1])
            for name, storage in storages.items():
                sizes[name] += storage.num_bytes(topology, matrix.dtype)
    rest = sum(tensor.nbytes for key, tensor in tensors.items() if key not in replaced)
    return {"now": now, **{name: size + rest for name, size in sizes.items()}}
