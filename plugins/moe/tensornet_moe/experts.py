"""Experts whose matrices are tensor networks with shared and private cores."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tensornet._util import check_size, transforms_active
from tensornet.budget import Budget
from tensornet.contraction.cost import Machine, default_machine
from tensornet.contraction.plan import (
    RECONSTRUCT,
    choose,
    contract_with_input,
    fastest_routes,
    plan_operator,
)
from tensornet.decompose import decompose
from tensornet.errors import FormatError, TopologyError
from tensornet.linalg.svd import frobenius
from tensornet.network import TensorNetwork, random_cores
from tensornet.nn import register_module_type
from tensornet.nn.storage import (
    FLOAT,
    PLAIN,
    PackedCore,
    Storage,
    layout,
    put_core,
    storage_entry,
    stored_core,
)
from tensornet.nn.strategy import Strategy
from tensornet.quantization import NumberFormat, round_weight
from tensornet.topologies import TopologyFamily, topology_family
from tensornet.topologies.factored import pad_core
from tensornet.topologies.rounded_cores import matrix_view
from tensornet.topology import Topology
from tensornet_moe.bank import ExpertBank, check_not_negative, check_weights
from tensornet_moe.grouped_linear import Groups, takes_grouped_mm
from tensornet_moe.joint_fit import JointFit, fit_jointly, stack_error
from tensornet_moe.prepared import PreparedExperts
from tensornet_moe.sharing import shared_cores
from tensornet_moe.stacked import build_matrices, enclosing_topology, plan_stack

#: On CPUs, matrices with at least this many elements are built and used one at a time, so that each stays in
#: the cache and its memory is reused for the next one.
BUILT_ALONE = 2**18


class SharedCoreExperts(ExpertBank):
    """Bank of expert matrices, stored as tensor networks that share some cores and keep the others private.

    A shared core is stored once, as `core_<name>`. The private cores of all experts are stacked in one tensor
    `core_<name>` of shape `(num_experts, *shape)`. If the experts' bonds differ, each private core is stored
    on its own, as `core_<name>_expert_<e>`. An expert with smaller bonds uses the leading block of a shared
    core. Nothing is padded in storage, so parameter counts are exact and a small expert stays small in
    training. A core is a parameter, or a `PackedCore` if its number format is not the model's dtype. An
    optimizer treats a stacked core as one parameter, so weight decay and momentum also change experts whose
    gradients are zero.

    Args:
        topology: one topology for all experts, or a sequence with one topology for each expert. These may
            differ only in their bonds.
        num_experts: number of experts.
        share: what the experts share: a word of `tensornet_moe.sharing`, or names of cores.
        storage: number formats of the cores; see `quantize`.
        device, dtype: device and dtype of the cores.

    A new bank has Gaussian cores with `Var(W) = 1 / in_features` for every expert.

    Raises:
        TopologyError: unknown cores, or topologies that differ in more than their bonds.
        ValueError: an unknown word, or `num_experts` is below 1 or is not the number of topologies.

    Reference:
        Gao et al. 2022, "Parameter-Efficient Mixture-of-Experts Architecture for Pre-trained Language
        Models", section 4.1. Sharing cores other than the center, and bonds that differ between
        experts, are our extensions. Several layers share cores if each uses a range of the experts of one
        bank; see `ExpertPool`.

    Example:
        >>> bank = tm.SharedCoreExperts.from_dense(torch.randn(16, 8), num_experts=4)
        >>> bank.expert_matrices([0, 2]).shape
        torch.Size([2, 16, 8])
        >>> list(bank.shared_parameters())
        ['1']
    """

    compute_like: Tensor

    def __init__(
        self,
        topology: Topology | Sequence[Topology],
        num_experts: int,
        *,
        share: str | Sequence[str] = "center",
        storage: Storage = PLAIN,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_size("num_experts", num_experts, error=ValueError)
        topologies = _one_for_each(topology, num_experts)
        enclosing = enclosing_topology(topologies)
        super().__init__(num_experts, enclosing.shape)
        self.topology, self.topologies = enclosing, topologies
        self.shared = shared_cores(enclosing, share)
        self.plan = plan_stack(enclosing, self.shared, num_experts)
        self.strategy: Strategy = "auto"
        self.machine: Machine | None = None
        #: Relative Frobenius error with respect to the original matrices; None for a new bank.
        self.error: float | None = None
        #: Result of the joint fit of `from_experts`; None for other banks.
        self.fit: JointFit | None = None
        check_storage(storage, enclosing)
        self.storage = storage
        self._compute_like(torch.empty(0, dtype=dtype, device=device))
        for name, core in initial_cores(topologies, enclosing, self.shared, device, dtype).items():
            self._store(name, core)

    @classmethod
    @torch.no_grad()
    def from_dense(
        cls,
        weight: Tensor,
        *,
        num_experts: int,
        topology: Topology | Sequence[Topology] | str | TopologyFamily = "mpo",
        share: str | Sequence[str] = "center",
        noise: float = 0.0,
        seed: int = 0,
        max_bond: int | None = None,
        rel_error: float | None = None,
        param_ratio: float | None = None,
        **options: Any,
    ) -> "SharedCoreExperts":
        """Upcycle one dense matrix: every expert starts from the same decomposition of this matrix.

        `.error` of the result is the relative Frobenius error of the first expert, before noise is added.

        Args:
            weight: shape `(out, in)`.
            num_experts: number of experts.
            topology: a topology, a sequence with one for each expert, or a family's name. An expert with
                smaller bonds gets the leading part of each core; in chains, this part belongs to the largest
                singular values.
            share: what the experts share; see `tensornet_moe.sharing`.
            noise: standard deviation of Gaussian noise on each private core, relative to the root mean square
                of the core. It breaks the symmetry between experts, and is not in Gao et al. 2022.
            seed: seed of the noise, which is the same on every device.
            max_bond, rel_error, param_ratio: budget of the decomposition, if `topology` is a name.
            options: passed to the family, for example `out_dims=`, `in_dims=`, `sites=`.

        Raises:
            TopologyError: the weight does not fit the topology.
            BudgetError, NonFiniteError: from the decomposition.
            ValueError: noise below 0.
        """
        check_weights(weight, "out", "in")
        check_not_negative(noise=noise)
        check_size("num_experts", num_experts, error=ValueError)
        budget = Budget(max_bond=max_bond, rel_error=rel_error, param_ratio=param_ratio)
        if isinstance(topology, str | TopologyFamily):
            result = topology_family(topology).decompose(weight, budget, **options)
            topologies = (result.network.topology,) * num_experts
        else:
            if not budget.unlimited or options:
                raise TopologyError(
                    "An explicit topology fixes dims and bonds: drop max_bond, rel_error, param_ratio and "
                    f"{', '.join(options) or 'family options'}, or give the name of a family instead."
                )
            topologies = _one_for_each(topology, num_experts)
            result = decompose(weight, enclosing_topology(topologies))
        network, error = result.network, result.error
        names = shared_cores(network.topology, share)
        generator = torch.Generator().manual_seed(seed)
        cores: dict[str, Tensor | Sequence[Tensor]] = {}
        for name, core in zip(network.topology.core_names, network.cores, strict=True):
            cores[name] = core
            if name not in names:
                pieces = [_leading(core, each.core_shapes[name]) for each in topologies]
                cores[name] = [with_noise(piece, noise, generator) for piece in pieces]
        if topologies[0] != network.topology:  # the first expert's bonds are smaller than the network's
            shapes = topologies[0].core_shapes.values()
            own = [_leading(core, shape) for core, shape in zip(network.cores, shapes, strict=True)]
            error = stack_error(weight[None], TensorNetwork(topologies[0], own).to_matrix()[None])
        return cls._from_cores(topologies, names, cores, error, weight.dtype)

    @classmethod
    def from_experts(
        cls,
        weights: Tensor,
        *,
        topology: Topology | str | TopologyFamily = "mpo",
        share: str | Sequence[str] = "center",
        max_bond: int | None = None,
        max_sweeps: int = 30,
        **options: Any,
    ) -> "SharedCoreExperts":
        """Decompose different experts jointly into shared and private cores.

        If separate decompositions with the same total number of parameters have a smaller error, the bank
        stores these, without shared cores, and `.fit.fell_back` is True.

        Args:
            weights: shape `(num_experts, out, in)`.
            topology: an explicit topology, or a family's name.
            share: what the experts share; see `tensornet_moe.sharing`.
            max_bond: cap on the bonds, if `topology` is a name.
            max_sweeps: largest number of sweeps of alternating least squares.
            options: passed to the family, for example `out_dims=`, `in_dims=`, `sites=`.

        Returns:
            The bank. Its `.fit` is a `JointFit` with the errors of the joint and separate fits; its `.error`
            is the error of the fit that it stores.

        Raises:
            ShapeError: `weights` is not a stack of matrices of the topology's shape.
            NonFiniteError: NaN or infinity in `weights`.
        """
        check_weights(weights, "num_experts", "out", "in")
        if isinstance(topology, str | TopologyFamily):
            rows, columns = weights.shape[1:]
            topology = topology_family(topology).build(rows, columns, max_bond=max_bond, **options)
        fit = fit_jointly(weights, topology, shared_cores(topology, share), max_sweeps=max_sweeps)
        bank = cls._from_cores(fit.topologies, fit.shared, fit.cores, fit.error, weights.dtype)
        bank.fit = fit
        return bank

    @classmethod
    def _from_cores(
        cls,
        topologies: Sequence[Topology],
        shared: Sequence[str],
        cores: Mapping[str, Tensor | Sequence[Tensor]],
        error: float | None,
        dtype: torch.dtype,
    ) -> "SharedCoreExperts":
        """Build a bank from its cores; a private core is `(E, *shape)` or a list of `E` tensors."""
        bank = cls(topologies, len(topologies), share=shared, device="meta")
        for name, core in cores.items():
            pieces = [core] if isinstance(core, Tensor) else list(core)
            pieces = [piece.detach().to(dtype).contiguous() for piece in pieces]
            same = len({piece.shape for piece in pieces}) == 1
            whole = pieces[0] if isinstance(core, Tensor) else torch.stack(pieces) if same else pieces
            bank._compute_like(pieces[0])
            bank._store(name, whole)
        bank.error = error
        return bank

    def shared_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters of the shared cores, keyed by name; see `ExpertBank`.

        An integer core has a parameter only while its scales are trained; these scales are then the parameter
        (`tensornet.healing.trained_scales`).
        """
        found: dict[str, nn.Parameter] = {}
        for name in self.shared:
            core = getattr(self, f"core_{name}")
            parts = core.tensors.values() if isinstance(core, PackedCore) else [core]
            trained = [part for part in parts if isinstance(part, nn.Parameter)]
            found |= {name: trained[0]} if trained else {}
        return found

    def expert_matrices(self, experts: Sequence[int] | Tensor | None = None) -> Tensor:
        """Build the matrices of the given experts; see `plan_stack` for the cost."""
        index = None if experts is None else self.check_experts(experts)
        count = self.num_experts if index is None else len(index)
        return build_matrices(self.plan, self.cores(index), count)

    def apply_rows(self, x: Tensor, groups: Groups) -> Tensor:
        """Multiply rows by their experts' matrices, or core by core if predicted faster; see `ExpertBank`."""
        if len(self.shared) == len(self.topology.cores):
            return self._apply_common(x)
        if groups.active is None or groups.sizes is None:  # sizes are unknown in compiled code
            return super().apply_rows(x, groups)
        rows = len(x) // len(groups.active)
        pieces = x.split([groups.sizes[e] for e in groups.active])
        route = self._route(x, rows)
        if route != RECONSTRUCT:
            plan, cores = plan_operator(self.topology), self._cores_of_each()
            return torch.cat(
                [
                    contract_with_input(plan, cores[e], piece, route=route)
                    for e, piece in zip(groups.active, pieces, strict=True)
                ]
            )
        elements = self.out_features * self.in_features
        if elements < BUILT_ALONE or x.device.type != "cpu" or takes_grouped_mm(x, self.out_features, groups):
            return super().apply_rows(x, groups)
        # Keeping all matrices for the backward pass would take as much memory as dense experts. So the
        # backward pass rebuilds a matrix if that takes at most half as many multiply-adds as applying it.
        again = torch.is_grad_enabled() and 2 * self.plan.multiply_adds(1) <= rows * elements
        cores = self._cores_of_each()
        return torch.cat(
            [
                self._apply_one(piece, cores[e], built_again=again and not transforms_active())
                for e, piece in zip(groups.active, pieces, strict=True)
            ]
        )

    def _apply_common(self, x: Tensor) -> Tensor:
        """Multiply rows by the only matrix of a bank whose experts share all cores."""
        # The route cannot depend on the number of rows in compiled code, where this number is not a constant.
        route = RECONSTRUCT if torch.compiler.is_compiling() else self._route(x, len(x))
        if route == RECONSTRUCT:
            return nn.functional.linear(x, self.expert_matrices([0])[0].to(x.dtype))
        return contract_with_input(plan_operator(self.topology), list(self.cores().values()), x, route=route)

    def _apply_one(self, x: Tensor, cores: Sequence[Tensor], *, built_again: bool) -> Tensor:
        """Multiply rows by the matrix of one expert; if `built_again`, rebuild it in the backward pass."""
        # Plan all cores as shared, so that the products have no expert index: plain matrix products are
        # faster than batched products with a batch of one.
        plan = plan_stack(self.topology, self.topology.core_names, 1)

        def product(x: Tensor, *cores: Tensor) -> Tensor:
            named = dict(zip(self.topology.core_names, cores, strict=True))
            # Use `squeeze`, since the backward pass of `[0]` would copy the gradient into zeros.
            return nn.functional.linear(x, build_matrices(plan, named, 1).squeeze(0).to(x.dtype))

        if not built_again:
            return product(x, *cores)
        made: Tensor = checkpoint(product, x, *cores, use_reentrant=False, preserve_rng_state=False)
        return made

    def core(self, name: str, index: Tensor | None = None) -> Tensor:
        """Return a core; private cores are stacked over experts, and zero-padded if bonds differ.

        Args:
            name: name of the core.
            index: the experts whose parts of a private core are returned; all if absent.
        """

        def decoded(core: Tensor | PackedCore, index: Tensor | None) -> Tensor:
            if isinstance(core, PackedCore):
                values: Tensor = core(self.dtype, index)
                return values
            return core if index is None else core.index_select(0, index)

        core = getattr(self, f"core_{name}", None)
        if core is not None:
            return decoded(core, None if name in self.shared else index)
        pieces = [decoded(getattr(self, f"core_{name}_expert_{e}"), None) for e in range(self.num_experts)]
        stacked = torch.stack([pad_core(piece, self.topology.core_shapes[name]) for piece in pieces])
        return stacked if index is None else stacked.index_select(0, index)

    def cores(self, index: Tensor | None = None) -> dict[str, Tensor]:
        """Return all cores by name; private cores are stacked, as in `core`."""
        return {name: self.core(name, index) for name in self.topology.core_names}

    def active_params(self, top_k: float) -> float:
        """Count the core elements that `top_k` experts use on average; see `ExpertBank`."""
        used = 0.0
        for name, shape in self.topology.core_shapes.items():
            sizes = [math.prod(topology.core_shapes[name]) for topology in self.topologies]
            used += math.prod(shape) if name in self.shared else top_k * sum(sizes) / self.num_experts
        return used

    def multiply_adds(self, rows: int) -> int:
        """Count the multiply-adds of building all matrices and multiplying `rows` rows by them."""
        return self.plan.multiply_adds(self.num_experts) + super().multiply_adds(rows)

    def _route(self, x: Tensor, rows: int) -> int:
        """Return the fastest route for `rows` rows of an expert.

        A route is an order in which `contract_with_input` contracts the rows with the cores; RECONSTRUCT
        builds the matrix instead.
        """
        if len(set(self.topologies)) > 1 or len(self.topology.cores) == 1:
            return RECONSTRUCT
        machine = self.machine or default_machine(x.device)
        bounds = fastest_routes(plan_operator(self.topology), machine, x.element_size())
        return choose(bounds, rows)

    def _cores_of_each(self) -> list[list[Tensor]]:
        columns = [
            [core] * self.num_experts if name in self.shared else core.unbind()
            for name, core in self.cores().items()
        ]
        return [list(cores) for cores in zip(*columns, strict=True)]

    @torch.no_grad()
    def prepared(self, max_growth: float) -> PreparedExperts | None:
        """Return a faster bank that stores dense matrices; see `tensornet.nn.prepare_for_inference`.

        Args:
            max_growth: largest allowed size of the matrices, relative to the size of the stored cores.

        Returns:
            The bank; None if it would be too large, or if this bank has only one core, integer cores, or a
            strategy other than `"auto"`.
        """
        count = 1 if len(self.shared) == len(self.topology.cores) else self.num_experts
        matrix_bytes = count * self.out_features * self.in_features * self.dtype.itemsize
        stored = {id(tensor): tensor.nbytes for tensor in self.stored_tensors()}  # count each tensor once
        too_large = matrix_bytes > max_growth * sum(stored.values())
        stays = len(self.topology.cores) == 1 or self.storage.quantized or self.strategy != "auto"
        if too_large or stays:
            return None
        matrices = build_matrices(self.plan, self.cores(), count)
        return PreparedExperts(matrices.clone(memory_format=torch.contiguous_format), self.num_experts)

    # --- stored cores ---

    def _store(self, name: str, core: Tensor | Sequence[Tensor]) -> None:
        """Register a core (one tensor, or a list with one tensor per expert) in its number format."""
        kind = self.storage.format_of(name)
        if isinstance(core, Tensor):
            put_core(self, f"core_{name}", encoded_core(kind, self.topology, name, core))
            return
        for expert, (piece, topology) in enumerate(zip(core, self.topologies, strict=True)):
            put_core(self, f"core_{name}_expert_{expert}", encoded_core(kind, topology, name, piece))

    def _compute_like(self, like: Tensor) -> None:
        """Use the dtype and device of `like` for products; stored tensors may have other dtypes."""
        self.register_buffer("compute_like", like.new_empty(0), persistent=False)

    @property
    def stored(self) -> dict[str, Tensor]:
        """Parameters and buffers that store the cores of this bank, by name."""
        buffers = {name: x for name, x in self.named_buffers() if name != "compute_like"}
        return {**dict(self.named_parameters()), **buffers}

    def stored_tensors(self) -> tuple[Tensor, ...]:
        """Return every tensor that the matrices are built from."""
        return tuple(self.stored.values())

    def private_tensors(self) -> tuple[Tensor, ...]:
        """Return the stored tensors of private cores; cores whose bonds differ are one tensor per expert."""
        shared = {f"core_{name}" for name in self.shared}
        return tuple(x for name, x in self.stored.items() if name.split(".")[0] not in shared)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype in which the cores are contracted."""
        return self.compute_like.dtype

    @property
    def num_params(self) -> int:
        """Number of values that this bank stores, scales included; each packed integer counts as one."""
        packed = [core for core in self.modules() if isinstance(core, PackedCore)]
        plain = sum(x.numel() for x in self.parameters(recurse=False))
        return plain + sum(sum(core.counts.values()) for core in packed)

    @property
    def num_bytes(self) -> int:
        """Bytes of everything that this bank stores."""
        return sum(tensor.nbytes for tensor in self.stored.values())

    @torch.no_grad()
    def quantize(self, storage: Storage | str) -> float:
        """Store the cores of this bank in number formats, in place.

        Cores are rounded to nearest, with a search for the best scale of each group. Error feedback, as in
        GPTQ, would gain little, since errors in different elements of a core affect the matrices nearly
        independently. `"float"` stores the rounded cores as floats again.

        Args:
            storage: the name of one format for all cores, or a `Storage` with a format for each core.

        Returns:
            Relative Frobenius error that rounding adds to the matrices of all experts.

        Raises:
            FormatError: an unknown format, formats for unknown cores, or a pivoted `Storage`.

        Example:
            >>> bank = tm.SharedCoreExperts.from_dense(torch.randn(32, 64), num_experts=4)
            >>> before = bank.num_bytes
            >>> bank.quantize("int4") < 0.2, bank.num_bytes < before / 4
            (True, True)
        """
        storage = Storage(number_format=storage) if isinstance(storage, str) else storage  # type: ignore[arg-type]
        check_storage(storage, self.topology)
        before, like = self.expert_matrices(), self.compute_like
        values = {name: core.to(like) for name, core in self.cores().items()}
        same = len(set(self.topologies)) == 1
        self.storage = storage
        for name in values:
            if same or name in self.shared:
                self._store(name, values[name])
            else:  # bonds differ: each expert's core has its own scales
                sizes = [topology.core_shapes[name] for topology in self.topologies]
                pieces = zip(values[name], sizes, strict=True)
                self._store(name, [core[tuple(map(slice, size))].contiguous() for core, size in pieces])
        added = frobenius(before - self.expert_matrices()) / max(frobenius(before), 1e-300)
        self.error = None if self.error is None else self.error + added * (1 + self.error)
        return added

    def spec(self) -> dict[str, Any]:
        """Return a JSON-ready description; see `tensornet.nn.register_module_type`."""
        same = len(set(self.topologies)) == 1
        return {
            "type": "shared_core_experts",
            "num_experts": self.num_experts,
            "shared": list(self.shared),
            "topologies": [t.to_dict() for t in (self.topologies[:1] if same else self.topologies)],
            **storage_entry(self.storage),
        }

    def extra_repr(self) -> str:
        """Describe the module for `print(model)`."""
        return (
            f"{self.num_experts} x ({self.out_features}, {self.in_features}), "
            f"topology={self.topology.family}, bonds={list(self.topology.bond_dims.values())}, "
            f"shared={list(self.shared)}"
        )


def _build(
    spec: Mapping[str, Any], device: torch.device | str | None, dtype: torch.dtype | None
) -> SharedCoreExperts:
    topologies = [Topology.from_dict(data) for data in spec["topologies"]]
    return SharedCoreExperts(
        topologies[0] if len(topologies) == 1 else topologies,
        spec["num_experts"],
        share=spec["shared"],
        storage=Storage.from_dict(spec.get("storage", {})),
        device=device,
        dtype=dtype,
    )


register_module_type("shared_core_experts", _build)


# --- initial cores ---------------------------------------------------------------------------------


def _one_for_each(topology: Topology | Sequence[Topology], num_experts: int) -> tuple[Topology, ...]:
    topologies = (topology,) * num_experts if isinstance(topology, Topology) else tuple(topology)
    if len(topologies) != num_experts:
        raise ValueError(
            f"Got {len(topologies)} topologies for num_experts={num_experts}; give one for all, or one each."
        )
    return topologies


def _leading(core: Tensor, shape: Sequence[int]) -> Tensor:
    return core[tuple(slice(size) for size in shape)]


def with_noise(core: Tensor, noise: float, generator: torch.Generator) -> Tensor:
    """Add Gaussian noise whose standard deviation is `noise` times the root mean square of the core."""
    if noise == 0:
        return core
    size = frobenius(core) / core.numel() ** 0.5  # `frobenius` does not underflow, however small the core is
    # Draw on the CPU, so that the noise is the same on every device.
    drawn = torch.randn(core.shape, generator=generator, device="cpu")
    return core + noise * size * drawn.to(core)


def initial_cores(
    topologies: Sequence[Topology],
    enclosing: Topology,
    shared: Sequence[str],
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> dict[str, Tensor | list[Tensor]]:
    """Draw Gaussian cores with `Var(W) = 1 / in_features` for every expert."""

    def draw(topology: Topology) -> dict[str, Tensor]:
        cores = random_cores(topology, device=device, dtype=dtype)
        return dict(zip(topology.core_names, cores, strict=True))

    def bonds(topology: Topology) -> int:
        return math.prod(topology.bond_dims.values())

    count, private = len(enclosing.cores), len(enclosing.cores) - len(shared)
    common = draw(enclosing)
    experts = [draw(topology) for topology in topologies]
    # `random_cores` gives each of n cores the standard deviation (in * bonds)^(-1 / (2n)), where `bonds` is
    # the product of all bonds. Shared cores are drawn for the largest bonds, so the private cores of experts
    # with smaller bonds are rescaled.
    gains = [
        (bonds(enclosing) / bonds(topology)) ** (len(shared) / (2 * count * max(private, 1)))
        for topology in topologies
    ]
    cores: dict[str, Tensor | list[Tensor]] = {}
    for name in enclosing.core_names:
        pieces = [expert[name] * gain for expert, gain in zip(experts, gains, strict=True)]
        same = len({piece.shape for piece in pieces}) == 1
        cores[name] = common[name] if name in shared else (torch.stack(pieces) if same else pieces)
    return cores


# --- number formats --------------------------------------------------------------------------------


def check_storage(storage: Storage, topology: Topology) -> None:
    """Check that a storage only sets number formats, and only for cores of this topology.

    Raises:
        FormatError: the storage is pivoted, or has formats for unknown cores.
    """
    if not isinstance(storage, Storage) or storage.pivoted:
        raise FormatError(
            f"Cores of experts have number formats only, got {storage!r}; write "
            "Storage(number_format='int8') or the name of a format."
        )
    layout(topology, storage, torch.float32)


def encoded_core(
    number_format: NumberFormat, topology: Topology, name: str, core: Tensor
) -> Tensor | PackedCore:
    """Encode a core, or a stack of cores, in a number format.

    Args:
        number_format: format of the elements.
        topology: the topology that the core belongs to.
        name: name of the core.
        core: the values, shape `(..., *shape)`; the format rounds them to nearest.
    """
    if number_format == FLOAT:
        return core
    shape, storage = topology.core_shapes[name], Storage(number_format=number_format)
    lead, (rows, columns) = core.shape[: core.ndim - len(shape)], matrix_view(topology, name)
    if core.is_meta:
        tensors = {
            part: torch.empty((*lead, *size), dtype=kind, device="meta")
            for key, (size, kind) in layout(topology, storage, core.dtype).items()
            for owner, _, part in [key.partition(".")]
            if owner == f"core_{name}"
        }
        return PackedCore(number_format, shape, columns, tensors)
    if number_format.bits is None:
        return stored_core(topology, storage, name, core, core.dtype)
    rounded = round_weight(core.reshape(*lead, rows, columns), number_format)
    return stored_core(topology, storage, name, rounded, core.dtype)
