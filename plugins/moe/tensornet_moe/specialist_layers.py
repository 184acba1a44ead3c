"""Specialists: named changes of a frozen model, which share their large cores and own their small ones.

A specialist changes the matrix of each adapted layer, `W_s = W + Delta_s`. Each change is a small tensor
network. All specialists of a layer share some of its cores, and each specialist owns the others. The forms
are:

- `share="ends"`: `Delta_s = A S_s B`; all specialists share `A: (out, r)` and `B: (r, in)`, and a specialist
  owns `S_s: (r, r)`;
- `share="in"`: `Delta_s = A_s B`, one projection `B` of the inputs for all;
- `share="out"`: `Delta_s = A B_s`, one basis `A` of the outputs for all;
- `share="center"`: a chain of three cores with a shared middle core and private ends, as in MPOE;
- `share="none"`: `Delta_s = A_s B_s`, nothing is shared, which is LoRA.

The shared cores are trained together with the first specialists, and then frozen. A new specialist afterwards
trains only its own cores, so that the outputs of all others do not change at all.

A whole fine-tuned model can be a specialist too (`tensornet_hf.pack`). Its changes have the number formats
and ranks of a plan, and it has its own biases and norms (`ChangedLayer`).
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from types import MappingProxyType
from typing import Any, Literal, NoReturn
from zlib import crc32

import torch
from torch import Tensor, nn

from tensornet._util import check_size
from tensornet.errors import ShapeError, TargetError
from tensornet.linalg.svd import truncated_svd
from tensornet.network import TensorNetwork, random_cores
from tensornet.nn import TensorNetworkLinear
from tensornet.nn.extension import dense_layers
from tensornet.nn.layer_kinds import kind_of, layer_bias
from tensornet.nn.targets import LayerSelection, adapter_names, matches, output_head, shortened
from tensornet.topologies import low_rank, mpo
from tensornet.topology import Topology
from tensornet_moe.sharing import Share, center_chain, check_share, shared_cores

#: The words of `tensornet_moe.sharing` for specialists, which always share the matrix of the trunk.
SHARES_OF_SPECIALISTS = ("none", "in", "out", "ends", "center")
#: Function `(out_features, in_features) -> topology of a change, names of its shared cores`.
MakeChange = Callable[[int, int], tuple[Topology, Sequence[str]]]
#: What `Specialists.use` takes: a name, a name for each row, weights by name, or None for the trunk.
Use = str | None | Sequence[str | None] | Mapping[str, float | Tensor]
#: A specialist, and its weight.
Part = tuple[str, float | Tensor]

#: Names of files and of entries in reports.
_RESERVED = ("shared", "next", "trunk")
#: A name is also the name of a file, whose length systems limit.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")
#: The specialists in use in this thread or task, as chosen by `Specialists.use`: a pair for each layer. The
#: first item contains the specialists in use. The second is None unless each row of the batch has its own
#: specialist. It then contains the indices of the rows' specialists in the first item, shape `(rows,)`; an
#: index equal to the number of specialists stands for the trunk alone.
_IN_USE: ContextVar[Mapping["SpecialistLayer", tuple[tuple[Part, ...], Tensor | None]]] = ContextVar(
    "specialists in use", default=MappingProxyType({})
)


class SpecialistLayer(nn.Module):
    """Layer of a trunk with specialists, which change its output: a `SpecialistLinear` or a `ChangedLayer`.

    Args:
        base_layer: the layer of the trunk.
    """

    #: Attribute by which PEFT and `tensornet.nn.targets` recognize the layers of adapters.
    adapter_layer_names: tuple[str, ...] = ("specialists",)

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.specialists = nn.ModuleDict()
        self.shared_cores = nn.ParameterDict()
        #: The specialists in use outside of any `use` block; empty for the trunk alone.
        self.parts: tuple[Part, ...] = ()

    @property
    def weight(self) -> Tensor:
        """Weight of the base layer, which some models read for its dtype."""
        weight: Tensor = self.base_layer.weight  # type: ignore[assignment]
        return weight

    @property
    def bias(self) -> Tensor | None:
        """Bias of the base layer."""
        return layer_bias(self.base_layer)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register a parameter; `weight` and `bias` become those of the base layer, as tied models expect."""
        if name in ("weight", "bias"):
            setattr(self.base_layer, name, param)
        else:
            super().register_parameter(name, param)

    def own_tensors(self, name: str) -> dict[str, Tensor]:
        """Return the tensors of a specialist by their names in files; empty if it changes nothing here."""
        if name not in self.specialists:
            return {}
        own = self.specialists[name]
        return {**dict(own.named_parameters()), **_stored_buffers(own)}

    def add(self, name: str, seed: int = 0) -> None:
        """Add a specialist that changes nothing yet.

        Raises:
            TargetError: specialists of this layer are not trained.
        """
        raise TargetError(
            "The specialists of this model are fine-tuned models, which are not trained here: add one by "
            "tensornet_hf.pack, or train specialists on the trunk alone."
        )

    @property
    def new_bytes(self) -> int:
        """Bytes that a new specialist takes in this layer."""
        return 0

    def change(self, name: str) -> Tensor | None:
        """Build the matrix `Delta_s` of a specialist, shape `(out_features, in_features)`; None for zero."""
        raise NotImplementedError

    def factors(self, name: str, rank: int | None = None) -> tuple[Tensor, Tensor] | None:
        """Return `left: (out, k)` and `right: (k, in)` with `Delta_s = left right`; None for zero.

        Args:
            name: the specialist.
            rank: largest `k`; the product is then the closest one to `Delta_s`. None for the exact product.

        Raises:
            TargetError: `Delta_s` is no such product and no rank is given, or the specialist changes more
                than this matrix.
        """
        raise NotImplementedError


def _stored_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Return the buffers of a module that belong to its state dict."""
    stored = module.state_dict(keep_vars=True)
    return {name: x for name, x in module.named_buffers() if name in stored}


class SpecialistLinear(SpecialistLayer):
    """Linear layer with specialists: `y = W x + sum_s w_s Delta_s x` over the specialists in use.

    Each change `Delta_s` is a tensor network. `shared_cores` contains the cores that all specialists share,
    and `specialists` the private cores of each specialist by name. `tm.specialists` builds these layers, and
    `Specialists` adds, uses and removes specialists of all layers of a model.

    Args:
        base_layer: the layer to change: a linear layer, or a `TensorNetworkLinear` of any number format.
        topology: topology of each change, shape `(out_features, in_features)`.
        shared: names of the shared cores; at least one core must be private.
        owner: another layer of the same topology whose shared cores this layer uses; None to own them.

    Raises:
        TargetError: no core is private, or `shared` names an unknown core.

    Example:
        >>> topology, shared = tm.change_form("ends", 16, 8, rank=4)
        >>> layer = tm.SpecialistLinear(torch.nn.Linear(8, 16), topology, shared)
        >>> layer.add("law")
        >>> {name: tuple(core.shape) for name, core in layer.specialists["law"].items()}
        {'core_1': (4, 1, 1, 4)}
    """

    def __init__(
        self,
        base_layer: nn.Module,
        topology: Topology,
        shared: Sequence[str],
        owner: "SpecialistLinear | None" = None,
    ) -> None:
        super().__init__(base_layer)
        private = [name for name in topology.core_names if name not in shared]
        if not private or not set(shared) <= set(topology.core_names):
            raise TargetError(
                f"A specialist must own a core: shared={list(shared)} of the cores "
                f"{list(topology.core_names)}."
            )
        self.topology, self.shared, self.private = topology, tuple(shared), tuple(private)
        self.low_rank = is_low_rank(topology)
        #: The layer that owns the shared cores; empty if this layer owns them. A tuple is not registered as a
        #: submodule, so that these cores are trained and saved once.
        self.owners: tuple[SpecialistLinear, ...] = () if owner is None else (owner,)
        if owner is None:
            dtype = torch.promote_types(self.weight.dtype, torch.float32)
            for name in shared:
                drawn = self._drawn(name, crc32(f"shared {name}".encode()), dtype)
                self.shared_cores[f"core_{name}"] = nn.Parameter(drawn)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the cores: at least float32, since 16 bits lose most of the small steps of training.

        A model that was cast as a whole has cores of another dtype, which new cores then get too.
        """
        shared = next(iter(self.shared_parameters().values()), None)
        return torch.promote_types(self.weight.dtype, torch.float32) if shared is None else shared.dtype

    def _drawn(self, core: str, seed: int, dtype: torch.dtype) -> Tensor:
        """Draw a Gaussian core; a matrix of a low-rank chain preserves the variance of its inputs."""
        generator = torch.Generator().manual_seed(seed)
        shape = self.topology.core_shapes[core]
        if self.low_rank:
            drawn = torch.randn(shape, generator=generator, device="cpu") / (shape[2] * shape[3]) ** 0.5
        else:
            drawn = random_cores(self.topology, generator=generator)[self.topology.core_names.index(core)]
        return drawn.to(device=self.weight.device, dtype=dtype)

    def shared_parameters(self) -> dict[str, nn.Parameter]:
        """Return the shared cores by the name of the core; other layers may own them."""
        cores = self.owners[0].shared_cores if self.owners else self.shared_cores
        return {name: cores[f"core_{name}"] for name in self.shared}

    def add(self, name: str, seed: int = 0) -> None:
        """Add a specialist that changes nothing yet: its first private core is zero, the others are random.

        Args:
            name: name of the specialist.
            seed: seed of the random cores.
        """
        cores = nn.ParameterDict()
        for k, core in enumerate(self.private):
            value = self._drawn(core, seed + crc32(f"{name} {core}".encode()), self.dtype)
            cores[f"core_{core}"] = nn.Parameter(value if k else torch.zeros_like(value))
        self.specialists[name] = cores

    @property
    def new_bytes(self) -> int:
        """Bytes that a new specialist takes in this layer."""
        shapes = self.topology.core_shapes
        return self.dtype.itemsize * sum(math.prod(shapes[core]) for core in self.private)

    def cores(self, name: str) -> dict[str, nn.Parameter]:
        """Return all cores of a specialist, private and shared, in the order of the topology."""
        own, shared = self.specialists[name], self.shared_parameters()
        assert isinstance(own, nn.ParameterDict)
        names = self.topology.core_names
        return {core: shared[core] if core in shared else own[f"core_{core}"] for core in names}

    def change(self, name: str) -> Tensor:
        """Build the matrix `Delta_s` of a specialist, shape `(out_features, in_features)`."""
        return TensorNetwork(self.topology, self.cores(name)).to_matrix()

    def factors(self, name: str, rank: int | None = None) -> tuple[Tensor, Tensor]:
        """Return `left: (out, k)` and `right: (k, in)` with `Delta_s = left right`; see the base class."""
        if self.low_rank:
            return product_of(list(self.cores(name).values()), rank)
        if rank is None:
            raise TargetError(
                f"The changes of this specialist are not of low rank: their topology is "
                f"{self.topology.core_shapes}. Give a rank to which they are truncated, or train specialists "
                "with share='ends', 'in', 'out' or 'none'."
            )
        return truncated(self.change(name), rank)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map `x: (rows, ..., in_features)` to `(rows, ..., out_features)`.

        Raises:
            ShapeError: the batch has another number of rows or tokens than the specialists in use.
            TargetError: the layer cannot know which specialists are in use (see `Specialists.use`).
        """
        y: Tensor = self.base_layer(x, *args, **kwargs)
        parts, rows = in_use(self)
        if not parts:
            return y
        check_rows(x, rows)
        return y + self._changes(x, parts, rows).to(y.dtype)

    def _changes(self, x: Tensor, parts: Sequence[Part], rows: Tensor | None) -> Tensor:
        """Compute `sum_s w_s Delta_s x` over the specialists in use; shared ends are applied only once."""
        shared = self.shared_parameters()
        names = list(self.topology.core_names)
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(next(iter(self.cores(parts[0][0]).values())).dtype)
        right: list[Tensor] = []
        left: list[Tensor] = []
        if self.low_rank:
            while names[-1] in shared:
                right.append(_as_matrix(shared[names.pop()]))
            while names[0] in shared:
                left.insert(0, _as_matrix(shared[names.pop(0)]))
        for core in right:
            x = nn.functional.linear(x, core)
        if rows is not None:
            total = self._changes_by_row(x, [name for name, _ in parts], rows, names)
        else:
            changes = []
            for name, weight in parts:
                y = self._change_of(name, x, names)
                changes.append(y * weight_like(weight, y, name))
            total = sum(changes[1:], changes[0])
        for core in left:
            total = nn.functional.linear(total, core)
        return total

    def _change_of(self, name: str, x: Tensor, names: Sequence[str]) -> Tensor:
        """Apply the cores `names` of one specialist, or its matrix if its topology is no product."""
        if not self.low_rank:
            return nn.functional.linear(x, self.change(name))
        cores = self.cores(name)
        for core in reversed(names):
            x = nn.functional.linear(x, _as_matrix(cores[core]))
        return x

    def _changes_by_row(
        self, x: Tensor, specialists: Sequence[str], rows: Tensor, names: Sequence[str]
    ) -> Tensor:
        """Apply to each row of `x: (rows, ..., features)` the change of its own specialist."""
        if not self.low_rank:
            index = [(rows == k).nonzero()[:, 0] for k in range(len(specialists))]
            found = [self._change_of(specialists[k], x[i], names) for k, i in enumerate(index)]
            y = found[0].new_zeros(*x.shape[:-1], found[0].shape[-1])
            return y.index_copy(0, torch.cat(index), torch.cat(found))
        # One batched product for all rows takes less time than a small product for each specialist.
        y = x.reshape(len(rows), -1, x.shape[-1])
        shared = self.shared_parameters()
        for core in reversed(names):
            if core in shared:
                y = nn.functional.linear(y, _as_matrix(shared[core]))
                continue
            own = [self.specialists[name][f"core_{core}"] for name in specialists]  # type: ignore[index]
            own.append(torch.zeros_like(own[0]))  # for rows of the trunk alone
            picked = torch.stack(own)[rows]
            y = torch.bmm(y, picked.reshape(len(rows), -1, y.shape[-1]).transpose(1, 2))
        return y.reshape(*x.shape[:-1], y.shape[-1])

    def extra_repr(self) -> str:
        """Describe the module for `print(model)`."""
        return f"specialists={list(self.specialists)}, shared={list(self.shared)}"


@torch.compiler.disable  # torch.compile cannot trace a ContextVar
def in_use(layer: SpecialistLayer) -> tuple[tuple[Part, ...], Tensor | None]:
    """Return the specialists that a layer uses now, and the index of each row's specialist among them.

    Raises:
        TargetError: the layer runs where no `use` block can be known.
    """
    chosen = _IN_USE.get().get(layer)
    if chosen is not None or layer.parts or not layer.specialists:
        return chosen or (layer.parts, None)
    # Both names are private; without them, the layer would silently compute the trunk alone.
    if torch._C._current_graph_task_id() != -1:
        raise TargetError(
            "This layer is recomputed in the backward pass, where it is unknown which specialists were in "
            "use. Use the checkpointing of a transformers model, or open `use` inside of the function that "
            "is checkpointed."
        )
    if getattr(layer, "_is_replica", False):
        raise TargetError(
            "nn.DataParallel runs copies of a model in threads, for which no `use` block is open. Use "
            "DistributedDataParallel (torchrun), or a single device."
        )
    return (), None


def check_rows(x: Tensor, rows: Tensor | None) -> None:
    """Raise ShapeError if a layer gets another number of rows than there are names of specialists."""
    if rows is not None and x.shape[0] != len(rows):
        raise ShapeError(
            f"There are names of specialists for {len(rows)} rows, but this layer gets "
            f"{tuple(x.shape)}: (rows, ..., features). Give one name for each row of the batch, with "
            "None for the trunk; repeat the names if generation repeats the rows. Layers that see the "
            "tokens of several rows in one dimension can only use one name for the whole batch."
        )


def weight_like(weight: float | Tensor, y: Tensor, name: str) -> float | Tensor:
    """Return the weight of a specialist in a form that multiplies the outputs `y: (rows, tokens, ...)`.

    Raises:
        ShapeError: the weight has another number of rows or tokens.
    """
    if not isinstance(weight, Tensor):
        return weight
    if y.shape[: weight.ndim] != weight.shape:
        raise ShapeError(
            f"The weights of {name!r} have the shape {tuple(weight.shape)}, but the output of this layer has "
            f"{tuple(y.shape)}: (rows, tokens, features). Weights are numbers, or have the shape (rows,) or "
            "(rows, tokens)."
        )
    return weight.to(y).reshape(*weight.shape, *[1] * (y.ndim - weight.ndim))


def _checkpoint_in_use(
    checkpoint: Callable[..., Any], function: Callable[..., Any], *args: Any, **options: Any
) -> Any:
    """Checkpoint a function whose recomputation uses the same specialists as its forward pass.

    The backward pass recomputes the function after the end of the `use` block, and often in another thread.
    """
    chosen = _IN_USE.get()

    def run(*inner: Any, **keywords: Any) -> Any:
        token = _IN_USE.set(chosen)
        try:
            return function(*inner, **keywords)
        finally:
            _IN_USE.reset(token)

    return checkpoint(run, *args, **options)


def _as_matrix(core: Tensor) -> Tensor:
    """View a core `(left, out, in, right)` of a low-rank chain as a matrix `(left * out, in * right)`."""
    return core.reshape(core.shape[0] * core.shape[1], -1)


def is_low_rank(topology: Topology) -> bool:
    """Return True if the operator is a product of matrices: only the ends of the chain have legs."""
    if topology.family not in ("mpo", "low_rank") or topology.terms or len(topology.cores) < 2:
        return False
    outs, ins = topology.out_dims, topology.in_dims
    return outs[0] == topology.out_features and ins[-1] == topology.in_features


def product_of(cores: Sequence[Tensor], rank: int | None = None) -> tuple[Tensor, Tensor]:
    """Multiply the cores of a chain for which `is_low_rank` is True, up to the last bond.

    Args:
        cores: the cores, from the outputs to the inputs.
        rank: largest rank; the product is truncated to it.

    Returns:
        Matrices `(out, k)` and `(k, in)`.
    """
    *first, right = [_as_matrix(core) for core in cores]
    left = first[0]
    for core in first[1:]:
        left = left @ core
    return (left, right) if rank is None or left.shape[1] <= rank else truncated(left @ right, rank)


def truncated(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the factors of a truncated SVD, `(out, k)` and `(k, in)`, of equal norms, with `k <= rank`."""
    found = truncated_svd(matrix, max_rank=rank)
    root = found.S.sqrt()
    return found.U * root, root[:, None] * found.Vh


def change_form(
    share: Share, out_features: int, in_features: int, *, rank: int
) -> tuple[Topology, tuple[str, ...]]:
    """Return the topology of the changes of one layer, and the names of the cores that specialists share.

    Args:
        share: `"none"`, `"in"`, `"out"`, `"ends"` or `"center"`; see `specialists`.
        out_features, in_features: shape of the matrix that is changed.
        rank: largest bond of the network.

    Raises:
        ValueError: an unknown `share`.
        ShapeError: `rank` is above the shorter side, or a side has no divisor for `share="center"`.

    Example:
        >>> topology, shared = tm.change_form("ends", 64, 32, rank=8)
        >>> topology.core_shapes, shared
        ({'0': (1, 64, 1, 8), '1': (8, 1, 1, 8), '2': (8, 1, 32, 1)}, ('0', '2'))
    """
    check_size("rank", rank, error=ValueError)
    check_share(share, SHARES_OF_SPECIALISTS)
    if rank > min(out_features, in_features):
        raise ShapeError(
            f"rank={rank} exceeds the shorter side of a {out_features} x {in_features} matrix; choose a rank "
            f"of at most {min(out_features, in_features)}, or exclude_modules=."
        )
    if share == "ends":
        outs, ins = (out_features, 1, 1), (1, 1, in_features)
        return mpo(out_dims=outs, in_dims=ins, bond_dims=(rank, rank)), ("0", "2")
    if share == "center":
        return center_chain(out_features, in_features, max_bond=rank), ("1",)
    topology = low_rank(out_features=out_features, in_features=in_features, rank=rank)
    return topology, shared_cores(topology, share)


def specialists(
    model: nn.Module,
    *,
    rank: int = 32,
    share: Share | MakeChange = "ends",
    pool: Literal["shape"] | None = None,
    target_modules: str | Sequence[str] | None = None,
    exclude_modules: str | Sequence[str] | None = None,
) -> "Specialists":
    """Freeze a model, and prepare its linear layers for specialists, in place.

    The layers may be dense, or compressed by this library in any number format. Until a specialist is used,
    the model computes exactly what it did before.

    Args:
        model: the trunk; all its parameters are frozen.
        rank: rank of the changes: the size of the bonds.
        share: what the specialists of a layer share; see `tensornet_moe.specialist_layers`. Or a function
            `(out_features, in_features) -> (topology, names of shared cores)` for any other network.
        pool: `"shape"`: all layers with matrices of one shape share one set of shared cores; None: each layer
            has its own.
        target_modules: patterns of the layers to adapt (see `tensornet.nn.targets.LayerSelection`); all
            linear layers except output heads if absent.
        exclude_modules: patterns of layers to skip.

    Raises:
        TargetError: no layer is left, a pattern matches no linear layer, or the model already has
            specialists.
        ShapeError: `rank` is above the shorter side of a matrix.
        ValueError: an unknown `share` or `pool`.

    Reference:
        Shared ends and private cores `A S_s B` generalize LoRA-XS (Balazy et al. 2024), whose ends are
        singular vectors that are not trained. Shared inputs are those of MoSLD and HydraLoRA; a shared center
        is that of MPOE (Gao et al. 2022), for the change instead of the matrix.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 8))
        >>> s = tm.specialists(model, rank=4)
        >>> s.add("python")
        >>> s.add("law")
        >>> optimizer = torch.optim.AdamW(s.parameters("python", "law"), lr=1e-3)
        >>> with s.use(["python", "law"]):  # one name for each row
        ...     y = model(torch.randn(2, 8))
        >>> s.freeze()  # new specialists now leave all others unchanged
        >>> s.add("perl")
        >>> [p.numel() for p in s.parameters("perl")]
        [16, 16]
    """
    if pool not in (None, "shape"):
        raise ValueError(f"Unknown pool={pool!r}; choose 'shape' or None.")
    refuse_prepared(model)
    layers = adaptable_layers(model, LayerSelection(target_modules, exclude_modules))
    forms: dict[str, tuple[Topology, Sequence[str], str | None]] = {}
    owners: dict[tuple[Topology, tuple[str, ...]], str] = {}
    for name, layer in layers.items():
        try:
            sizes = layer_shape(layer)
            topology, shared = share(*sizes) if callable(share) else change_form(share, *sizes, rank=rank)
        except ShapeError as error:
            raise ShapeError(f"{name}: {error}") from error
        owner = owners.setdefault((topology, tuple(shared)), name) if pool else name
        forms[name] = (topology, shared, None if owner == name else owner)
    return attach(model, forms)


def adaptable_layers(model: nn.Module, selection: LayerSelection) -> dict[str, nn.Module]:
    """Find the linear layers, dense or compressed, that a selection chooses; each layer has one name.

    Raises:
        TargetError: a pattern matches no linear layer, or no layer is left.
    """
    head, unsuitable = output_head(model), dense_layers(model)
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        kind = kind_of(module)
        linear = kind.name != "embedding" if kind is not None else isinstance(module, TensorNetworkLinear)
        if linear and name and name not in unsuitable:
            found[name] = module

    def patterns(value: str | Sequence[str] | None) -> list[str]:
        return [value] if isinstance(value, str) else list(value or ())

    included, excluded = patterns(selection.target_modules), patterns(selection.exclude_modules)
    for pattern in (*included, *excluded):
        if pattern != "all" and not any(matches(name, pattern) for name in found):
            raise TargetError(
                f"Pattern {pattern!r} matches no linear layer; the model has {shortened(list(found))}."
            )
    chosen = {}
    for name, module in found.items():
        wanted = any(p == "all" or matches(name, p) for p in included) if included else module is not head
        if wanted and not any(matches(name, p) for p in excluded):
            chosen[name] = module
    if not chosen:
        raise TargetError(
            f"{type(model).__name__} has no linear layer to adapt; it has {shortened(list(found)) or 'none'}."
        )
    return chosen


def layer_shape(layer: nn.Module) -> tuple[int, int]:
    """Return `(out_features, in_features)` of a linear layer, dense or compressed."""
    if isinstance(layer, TensorNetworkLinear):
        return layer.out_features, layer.in_features
    kind = kind_of(layer)
    assert kind is not None
    rows, columns = kind.matrix(layer).shape
    return rows, columns


def attach(
    model: nn.Module, forms: Mapping[str, tuple[Topology, Sequence[str], str | None]]
) -> "Specialists":
    """Freeze a model, and replace layers by `SpecialistLinear`; `specialists` chooses the layers and forms.

    Args:
        model: the trunk; it is changed in place.
        forms: topology, names of the shared cores, and name of the layer that owns these cores (None for the
            layer itself), by the name of the layer. Owners precede the layers that use their cores.

    Raises:
        TargetError: the model has no such layer.
        ShapeError: a layer has another shape than its topology.
    """
    refuse_prepared(model)
    made: dict[str, SpecialistLinear] = {}
    for name, (topology, shared, owner) in forms.items():
        try:
            layer = model.get_submodule(name)
        except AttributeError:
            raise TargetError(
                f"These specialists are of another trunk: {type(model).__name__} has no layer {name!r}."
            ) from None
        if layer_shape(layer) != topology.shape:
            raise ShapeError(
                f"These specialists are of another trunk: {name!r} has the shape {layer_shape(layer)}, and "
                f"the changes {topology.shape}."
            )
        made[name] = SpecialistLinear(layer, topology, shared, None if owner is None else made[owner])
    # Nothing is replaced before every layer could be built.
    return put_in_place(model, made)


def put_in_place(model: nn.Module, made: Mapping[str, SpecialistLayer]) -> "Specialists":
    """Freeze a model, and put layers with specialists in the places of their base layers.

    Args:
        model: the trunk; it is changed in place.
        made: the new layers by name.
    """
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        # Private, but the public `named_children` leaves out the second name of a child.
        for key, child in parent._modules.items():
            places.setdefault(id(child), []).append((parent, key))
    model.requires_grad_(False)
    head = output_head(model)
    for layer in made.values():
        for parent, key in places[id(layer.base_layer)]:
            setattr(parent, key, layer)
    _refuse(
        model,
        "save_pretrained",
        "Specialists are attached to this model, so that save_pretrained would write a folder that no model "
        "can be loaded from. Save the specialists by tensornet_hf.PretrainedSpecialists(model).save(folder); "
        "to save the trunk, remove them first by detach().",
    )
    if any(layer.base_layer is head for layer in made.values()):
        _refuse(
            model,
            "resize_token_embeddings",
            "The output head has specialists, whose cores have one row for each token. Resize the embeddings "
            "first, or leave the head out (exclude_modules=).",
        )
    return Specialists(model)


#: Methods of transformers models that `attach` replaces by an error.
_REFUSED = ("save_pretrained", "resize_token_embeddings")


def _refuse(model: nn.Module, method: str, why: str) -> None:
    """Let a method of a model raise TargetError until `Specialists.detach`."""
    if callable(getattr(model, method, None)):
        setattr(model, method, partial(_raise, why))


def _raise(why: str, *args: Any, **kwargs: Any) -> NoReturn:
    raise TargetError(why)


def refuse_prepared(model: nn.Module) -> None:
    """Raise TargetError if specialists or other adapters are attached to a model."""
    if any(isinstance(part, SpecialistLayer) for part in model.modules()):
        raise TargetError(
            "The model already has specialists: use tensornet_moe.Specialists(model), or remove them by "
            "Specialists(model).detach()."
        )
    if other := adapter_names(model):
        raise TargetError(
            f"Other adapters are attached to this model, such as {other[0]}. Merge or remove them first, in "
            "PEFT by merge_and_unload() or unload()."
        )


def is_name(name: Any) -> bool:
    """Return True if a specialist can have this name, which is also that of its file."""
    reserved = isinstance(name, str) and (hasattr(nn.ModuleDict, name) or name in _RESERVED)
    return isinstance(name, str) and _NAME.fullmatch(name) is not None and not reserved


def check_name(name: str, others: Iterable[str]) -> None:
    """Raise ValueError if a new specialist cannot have this name.

    Args:
        name: the name.
        others: names of the specialists that there are already.
    """
    if not is_name(name):
        raise ValueError(
            f"A specialist cannot be named {name!r}: use a word of at most 100 letters, digits, _ and -, "
            "such as 'law', that is not the name of a method or file."
        )
    # Some file systems do not distinguish upper and lower case.
    if name.lower() in (x.lower() for x in others):
        raise ValueError(
            f"There already is a specialist named {name!r}; choose another name, or remove({name!r})."
        )


class Specialists:
    """The specialists of a model: add, train, use, mix and remove them by name.

    The model owns all tensors; this object only refers to its layers, and can be made again at any time.

    Args:
        model: a model prepared by `specialists`.

    Raises:
        TargetError: the model is not prepared for specialists.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> _ = tm.specialists(model, rank=2)
        >>> s = tm.Specialists(model)
        >>> s.add("law")
        >>> s.names, s.bytes()
        (['law'], {'shared': 128, 'law': 16, 'next': 16})
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.layers = {n: x for n, x in model.named_modules() if isinstance(x, SpecialistLayer)}
        if not self.layers:
            raise TargetError(
                f"{type(model).__name__} is not prepared for specialists; call "
                "tensornet_moe.specialists(model) first."
            )

    @property
    def names(self) -> list[str]:
        """Names of the specialists, in the order in which they were added."""
        return list(dict.fromkeys(name for layer in self.layers.values() for name in layer.specialists))

    @property
    def frozen(self) -> bool:
        """True if the shared cores are not trained, or if nothing is shared."""
        return not any(p.requires_grad for p in self.shared_parameters())

    def freeze(self, frozen: bool = True) -> None:
        """Freeze the shared cores, so that training one specialist leaves all others unchanged.

        `freeze(False)` makes them trainable again; `movement` then says how much other specialists moved.
        """
        for parameter in self.shared_parameters():
            parameter.requires_grad_(not frozen)
            parameter.grad = None

    def add(self, name: str, *, seed: int = 0) -> None:
        """Add a specialist that does not change the outputs of the model yet.

        Raises:
            ValueError: the name is taken, or is not a word of at most 100 letters, digits, `_` and `-`.
        """
        check_name(name, self.names)
        for layer in self.layers.values():
            layer.add(name, seed)

    def remove(self, name: str) -> None:
        """Remove a specialist; no other one changes."""
        self._check(name)
        for layer in self.layers.values():
            if name in layer.specialists:
                layer.specialists.pop(name)

    def _check(self, *names: str | None) -> None:
        for name in names:
            if name not in self.names:
                raise TargetError(f"There is no specialist named {name!r}; there are {self.names or 'none'}.")

    def tensors(self, name: str | None = None) -> dict[str, Tensor]:
        """Return the tensors of a specialist, or the shared cores if `name` is None.

        Returns:
            The tensors, keyed by `layer.core_k`, or by the names in a `Change`. Those that several layers
            share appear once, under the layer that owns them.
        """
        if name is not None:
            self._check(name)
        found: dict[str, Tensor] = {}
        seen: set[int] = set()
        for layer_name, layer in self.layers.items():
            own = dict(layer.shared_cores) if name is None else layer.own_tensors(name)
            found |= {f"{layer_name}.{key}": core for key, core in own.items() if id(core) not in seen}
            seen |= {id(core) for core in own.values()}
        return found

    def shared_parameters(self) -> list[nn.Parameter]:
        """Return the shared cores of all layers, each once."""
        return [x for x in self.tensors().values() if isinstance(x, nn.Parameter)]

    def parameters(self, *names: str) -> list[nn.Parameter]:
        """Return the private cores of specialists, and the shared cores unless they are frozen.

        Args:
            names: names of specialists; all if absent.
        """
        own = [x for name in names or self.names for x in self.tensors(name).values()]
        trained = [x for x in self.shared_parameters() if x.requires_grad]
        return [x for x in own if isinstance(x, nn.Parameter)] + trained

    def bytes(self) -> dict[str, int]:
        """Count bytes: shared cores (`"shared"`), each specialist, and the next new one (`"next"`)."""
        counts = {"shared": sum(p.nbytes for p in self.shared_parameters())}
        counts |= {name: sum(p.nbytes for p in self.tensors(name).values()) for name in self.names}
        return {**counts, "next": sum(layer.new_bytes for layer in self.layers.values())}

    @contextmanager
    def use(self, which: Use) -> Iterator[None]:
        """Use specialists inside a `with` block.

        The block holds for the thread (or asyncio task) that opens it; a thread that is started inside opens
        its own. A backward pass may follow after the block, also with the gradient checkpointing of
        transformers.

        Args:
            which: a name, for the whole batch; a list with a name, or None for the trunk, for each row of the
                batch; or weights by name, for a weighted sum of changes. A weight is a number, or a tensor of
                shape `(rows,)` or `(rows, tokens)`. None uses the trunk alone.

        Raises:
            TargetError: an unknown name.
            ShapeError: the batch has another number of rows than `which`.
        """
        rows: list[str | None] = []
        weights: dict[str, float | Tensor] = {}
        if isinstance(which, Mapping):
            weights = dict(which)
        elif isinstance(which, str):
            weights = {which: 1.0}
        elif which is not None:
            rows = list(which)
            weights = {name: 1.0 for name in rows if name is not None}
        for name in weights:
            self._check(name)
        for module in self.model.modules():
            # transformers has no public place for this function, which `gradient_checkpointing_enable` sets.
            name = "_gradient_checkpointing_func"
            function = vars(module).get(name)
            if function is not None and getattr(function, "func", None) is not _checkpoint_in_use:
                setattr(module, name, partial(_checkpoint_in_use, function))
        chosen: dict[SpecialistLayer, tuple[tuple[Part, ...], Tensor | None]] = {}
        indices: dict[tuple[Any, ...], Tensor] = {}  # indices of rows, by specialists and device
        for layer in self.layers.values():
            known = tuple(name for name in weights if name in layer.specialists)
            key = (layer.weight.device, *known)
            if rows and key not in indices:
                index = [known.index(x) if x in known else len(known) for x in rows]
                indices[key] = torch.tensor(index, device=layer.weight.device)
            chosen[layer] = tuple((name, weights[name]) for name in known), indices.get(key)
        token = _IN_USE.set({**_IN_USE.get(), **chosen})
        try:
            yield
        finally:
            _IN_USE.reset(token)

    def changes(self, which: str | Mapping[str, float]) -> dict[str, Tensor]:
        """Build the matrices `sum_s w_s Delta_s` by layer, each `(out_features, in_features)`.

        Layers whose matrix none of the specialists changes are left out.
        """
        weights = {which: 1.0} if isinstance(which, str) else which
        self._check(*weights)
        found = {}
        for name, layer in self.layers.items():
            made = [w * change for x, w in weights.items() if (change := layer.change(x)) is not None]
            if made:
                found[name] = sum(made[1:], made[0])
        return found

    def snapshot(self) -> dict[str, dict[str, Tensor]]:
        """Copy all cores: those of each specialist by name, and shared ones under `"shared"`."""
        parts = {"shared": self.tensors(), **{name: self.tensors(name) for name in self.names}}
        return {name: {k: p.detach().clone() for k, p in cores.items()} for name, cores in parts.items()}

    @torch.no_grad()
    def restore(self, snapshot: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Copy the cores of a snapshot back; specialists that it does not contain stay as they are."""
        for name, cores in snapshot.items():
            for key, core in self.tensors(None if name == "shared" else name).items():
                core.copy_(cores[key])

    @torch.no_grad()
    def movement(self, before: Mapping[str, Mapping[str, Tensor]]) -> dict[str, float]:
        """Measure how much each specialist of a snapshot moved: `|Delta_new - Delta_old| / |Delta_old|`.

        The norms are Frobenius norms over all layers. The value is exactly 0 if nothing changed, and infinite
        if a zero change became nonzero.
        """
        owners = {id(layer): name for name, layer in self.layers.items()}
        found = {}
        for name in self.names:
            if name not in before:
                continue
            gap = size = 0.0
            for layer_name, layer in self.layers.items():
                if not isinstance(layer, SpecialistLinear):
                    continue  # not trained
                owner = owners[id(layer.owners[0])] if layer.owners else layer_name
                cores = {
                    core: before["shared"][f"{owner}.core_{core}"]
                    if core in layer.shared
                    else before[name][f"{layer_name}.core_{core}"]
                    for core in layer.topology.core_names
                }
                old = TensorNetwork(layer.topology, cores).to_matrix().double()
                gap += float((layer.change(name).double() - old).square().sum())
                size += float(old.square().sum())
            found[name] = (gap / size) ** 0.5 if size > 0 else (0.0 if gap == 0 else float("inf"))
        return found

    def detach(self) -> None:
        """Put the layers of the trunk back; the specialists are lost unless they were saved."""
        made = {id(layer): layer for layer in self.layers.values()}
        for parent in list(self.model.modules()):
            for key, child in parent._modules.items():
                if id(child) in made:
                    setattr(parent, key, made[id(child)].base_layer)
        for method in _REFUSED:
            vars(self.model).pop(method, None)
        self.layers = {}
