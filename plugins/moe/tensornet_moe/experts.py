"""Experts whose matrices are tensor networks with shared and private cores."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tensornet.budget import Budget
from tensornet.contraction.cost import Machine, default_machine
from tensornet.contraction.plan import (
    RECONSTRUCT,
    choose,
    contract_with_input,
    fastest_routes,
    plan_operator,
)
from tensornet.errors import TopologyError
from tensornet.nn.storage import PLAIN, PackedCore, Storage, storage_entry
from tensornet.nn.strategy import KeptMatrix, Strategy, may_keep
from tensornet.topologies import TopologyFamily, topology_family
from tensornet.topology import Topology
from tensornet_moe.checks import check_weights, check_whole
from tensornet_moe.expert_bank import SharedCores
from tensornet_moe.grouped_linear import Groups
from tensornet_moe.initialization import Start, initial_cores, start_from_dense
from tensornet_moe.joint_fit import JointFit, fit_jointly
from tensornet_moe.number_formats import check_storage
from tensornet_moe.stacked import build_matrices, enclosing_topology, plan_stack, resolve_shared
from tensornet_moe.stored_bank import StoredBank

#: Matrices with at least this many elements are built one after another on CPUs: the working set of one fits
#: the caches and its memory is reused for the next, which saves a tenth of a training step.
BUILT_ALONE = 2**18


class SharedCoreExperts(StoredBank):
    """Expert matrices whose tensor networks share some cores and keep the other cores private.

    A shared core `core_<name>` has its own shape; a private one is stacked, `(num_experts, *shape)`. Where
    the experts' bonds differ, a private core is stored for each expert at its true size
    (`core_<name>_expert_<e>`), and an expert uses the leading block of a shared core that is larger than its
    bonds: nothing is padded in storage, so parameters count honestly and a small expert stays small when
    trained.

    Args:
        topology: the operator of one expert, or a sequence of topologies, one for each expert, that differ
            in their bonds only.
        num_experts: number of experts.
        shared: `"center"` (MPOE), `"ends"`, `"none"`, `"all"`, core names, or a `SharedCores` that owns them.
        storage: number formats of the cores that the bank owns; see `quantize`.
        device, dtype: of the cores.

    A new bank has Gaussian cores with `Var(W) = 1 / in_features` for every expert.

    Raises:
        TopologyError: unknown cores, or topologies that differ in more than bonds.
        ShapeError: a borrowed core has another shape.
        ValueError: `num_experts` is below 1 or is not the number of topologies.

    Reference:
        Gao et al. 2022, "Parameter-Efficient Mixture-of-Experts Architecture for Pre-trained Language
        Models", section 4.1. Sharing other cores than the center, different bonds and sharing across layers
        are our extensions.

    Example:
        >>> bank = tm.SharedCoreExperts.from_dense(torch.randn(16, 8), num_experts=4)
        >>> bank.expert_matrices([0, 2]).shape
        torch.Size([2, 16, 8])
        >>> list(bank.shared_parameters())
        ['1']
    """

    def __init__(
        self,
        topology: Topology | Sequence[Topology],
        num_experts: int,
        *,
        shared: str | Sequence[str] | SharedCores = "center",
        storage: Storage = PLAIN,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_whole(num_experts=num_experts)
        topologies = (topology,) * num_experts if isinstance(topology, Topology) else tuple(topology)
        if len(topologies) != num_experts:
            raise ValueError(
                f"Got {len(topologies)} topologies for num_experts={num_experts}; give one for all, or one "
                "each."
            )
        enclosing = enclosing_topology(topologies)
        super().__init__(num_experts, enclosing.shape)
        self.topology, self.topologies = enclosing, topologies
        owner = shared if isinstance(shared, SharedCores) else None
        # In a tuple, so that the owner is not registered here as well.
        self._owner: tuple[SharedCores, ...] = () if owner is None else (owner,)
        self.shared = resolve_shared(enclosing, shared.names if isinstance(shared, SharedCores) else shared)
        self.plan = plan_stack(enclosing, self.shared, num_experts)
        self.strategy: Strategy = "auto"
        self.machine: Machine | None = None
        self.kept = KeptMatrix()
        #: Relative Frobenius error against the matrices the bank was built from; None for a new bank.
        self.error: float | None = None
        #: Multiplies rows by the matrices of their experts, or returns None to leave that to the bank: see
        #: `tensornet_moe.experimental.chain_rows.use_chain_rows`.
        self.kernel: Callable[[SharedCoreExperts, Tensor, Groups], Tensor | None] | None = None
        #: Result of the joint fit of `from_experts`.
        self.fit: JointFit | None = None
        if owner is not None:
            owner.check_fits(enclosing)
        check_storage(storage, enclosing)
        self.storage = storage
        self._compute_like(torch.empty(0, dtype=dtype, device=device))
        for name, core in initial_cores(topologies, enclosing, self.shared, device, dtype).items():
            if not (owner is not None and name in self.shared):
                self._store(name, core)

    @classmethod
    def from_dense(
        cls,
        weight: Tensor,
        *,
        num_experts: int,
        topology: Topology | Sequence[Topology] | str | TopologyFamily = "mpo",
        shared: str | Sequence[str] = "center",
        noise: float = 0.0,
        seed: int = 0,
        max_bond: int | None = None,
        rel_error: float | None = None,
        param_ratio: float | None = None,
        **options: Any,
    ) -> "SharedCoreExperts":
        """Upcycle one dense matrix: every expert starts from the same decomposition of it.

        `.error` of the result is the relative Frobenius error of the first expert before noise.

        Args:
            weight: shape `(out, in)`.
            num_experts: number of experts.
            topology: an explicit topology; one for each expert (bonds may differ: smaller ones keep the
                leading part of each bond, for chains the largest singular values); or a family's name.
            shared: which cores are shared.
            noise: standard deviation of the Gaussian added to each private core, relative to the root mean
                square of that core; breaks the symmetry between experts (our addition to the paper).
            seed: of the noise; the same on every device.
            max_bond, rel_error, param_ratio: budget of the decomposition where `topology` is a name.
            options: passed to the family, for example `out_dims=`, `in_dims=`, `sites=`.

        Raises:
            TopologyError: the weight does not fit the topology.
            BudgetError, NonFiniteError: from the decomposition.
            ValueError: noise below 0.
        """
        budget = Budget(max_bond=max_bond, rel_error=rel_error, param_ratio=param_ratio)
        start = start_from_dense(weight, topology, budget, num_experts, shared, noise, seed, options)
        return cls._from_start(start, weight.dtype)

    @classmethod
    def from_experts(
        cls,
        weights: Tensor,
        *,
        topology: Topology | str | TopologyFamily = "mpo",
        shared: str | Sequence[str] = "center",
        max_bond: int | None = None,
        max_sweeps: int = 30,
        **options: Any,
    ) -> "SharedCoreExperts":
        """Decompose different experts jointly into shared and private cores (our addition).

        The error is at most that of separate decompositions with the same total number of parameters: where
        those have the smaller error they are returned, with nothing shared, and `.fit.fell_back` is True.

        Args:
            weights: shape `(num_experts, out, in)`.
            topology: an explicit topology, or a family's name.
            shared: which cores are shared.
            max_bond: cap on the bonds where `topology` is a name.
            max_sweeps: limit of alternating least squares.
            options: passed to the family, for example `out_dims=`, `in_dims=`, `sites=`.

        Returns:
            The bank; `.fit` is a `JointFit` with the errors of both ways, `.error` the one reached.

        Raises:
            ShapeError: `weights` is not a stack of matrices of the topology's shape.
            NonFiniteError: NaN or infinity in `weights`.
        """
        check_weights(weights, "num_experts", "out", "in")
        if isinstance(topology, str | TopologyFamily):
            rows, columns = weights.shape[1:]
            topology = topology_family(topology).build(rows, columns, max_bond=max_bond, **options)
        fit = fit_jointly(weights, topology, resolve_shared(topology, shared), max_sweeps=max_sweeps)
        start = Start(fit.topologies, fit.shared, fit.cores, fit.error)
        bank = cls._from_start(start, weights.dtype)
        bank.fit = fit
        return bank

    @classmethod
    def _from_start(
        cls, start: Start, dtype: torch.dtype, owner: SharedCores | None = None
    ) -> "SharedCoreExperts":
        count, shared = len(start.topologies), start.shared if owner is None else owner
        bank = cls(start.topologies, count, shared=shared, device="meta")
        for name, core in start.cores.items():
            pieces = [core] if isinstance(core, Tensor) else list(core)
            pieces = [piece.detach().to(dtype).contiguous() for piece in pieces]
            same = len({piece.shape for piece in pieces}) == 1
            whole = pieces[0] if isinstance(core, Tensor) else torch.stack(pieces) if same else pieces
            bank._compute_like(pieces[0])
            bank._store(name, whole)
        bank.error = start.error
        return bank

    def shared_parameters(self) -> dict[str, nn.Parameter]:
        """Return the trained parameters of shared cores by name, borrowed ones included; see `ExpertBank`.

        Of integer cores these are the scales while they are trained (`tensornet.healing.trained_scales`).
        """
        if self._owner:
            return {name: self._owner[0].core(name) for name in self.shared}
        found: dict[str, nn.Parameter] = {}
        for name in self.shared:
            core = getattr(self, f"core_{name}")
            parts = core.tensors.values() if isinstance(core, PackedCore) else [core]
            trained = [part for part in parts if isinstance(part, nn.Parameter)]
            found |= {name: trained[0]} if trained else {}
        return found

    @property
    def owner(self) -> SharedCores | None:
        """Owner of the shared cores, None if this bank owns them."""
        return self._owner[0] if self._owner else None

    def borrow(self, owner: SharedCores) -> None:
        """Replace the owner of the shared cores; for banks rebuilt from a description.

        Raises:
            RuntimeError: the bank owns its cores.
            TopologyError: the owner has other cores.
            ShapeError: or of other shapes.
        """
        if not self._owner:
            raise RuntimeError("This bank owns its shared cores; make it with shared=owner to borrow them.")
        if owner.names != self.shared:
            raise TopologyError(
                f"The owner {owner.label!r} has the cores {list(owner.names)}, these experts share "
                f"{list(self.shared)}."
            )
        owner.check_fits(self.topology)
        self._owner = (owner,)

    def private_core(self, name: str) -> Tensor:
        """Stack a private core of all experts, `(num_experts, *shape)`, zero-padded where bonds differ."""
        return self._whole_core(name)

    def expert_matrices(self, experts: Sequence[int] | Tensor | None = None) -> Tensor:
        """Build expert matrices, about `(l + r) * out * in` multiply-adds each, or read them from the cache.

        Raises:
            IndexError: an index outside `[0, num_experts)`, or no index at all.
        """
        kept = self._kept()
        if experts is None:
            return self._rebuild(None) if kept is None else kept
        index = self.check_experts(experts)
        return self._rebuild(index) if kept is None else kept.index_select(0, index)

    def matrix_list(self, experts: Sequence[int]) -> Iterable[Tensor]:
        """Return the matrices of the given experts one by one, as views where the matrices are cached."""
        kept = self._kept()
        if kept is not None:
            return [kept[e] for e in experts]
        if (
            self.out_features * self.in_features >= BUILT_ALONE
            and self.stored_tensors()[0].device.type == "cpu"
        ):
            return self._one_by_one(experts)
        # Asked for all in order there is nothing to select: no copy of the private cores.
        everything = list(experts) == list(range(self.num_experts))
        return self.expert_matrices(None if everything else experts).unbind(0)

    def apply_rows(self, x: Tensor, groups: Groups) -> Tensor:
        """Compute `y_r = W_e(r) x_r`, core by core where that is predicted to be faster; see `ExpertBank`."""
        if self.keeps_matrices():
            return super().apply_rows(x, groups)
        if len(self.shared) == len(self.topology.cores):
            return self._apply_to_all(x)
        if groups.active is None or groups.sizes is None:
            return self._apply_matrices(x, groups)
        route = self._route(x, len(x) // len(groups.active))
        if route == RECONSTRUCT:
            return self._apply_matrices(x, groups)
        plan, cores = plan_operator(self.topology), self._cores_of_each()
        pieces = x.split([groups.sizes[e] for e in groups.active])
        outputs = [
            contract_with_input(plan, cores[e], piece, candidate=route)
            for e, piece in zip(groups.active, pieces, strict=True)
        ]
        return torch.cat(outputs)

    def _apply_matrices(self, x: Tensor, groups: Groups) -> Tensor:
        """Build the matrix of each active expert and multiply its rows by it."""
        y = None if self.kernel is None else self.kernel(self, x, groups)
        return super().apply_rows(x, groups) if y is None else y

    def cores(self) -> list[Tensor]:
        """Return the cores in the order of the topology: shared ones, and private ones as stacks."""
        shared = self._shared_here()
        return [shared[n] if n in shared else self._whole_core(n) for n in self.topology.core_names]

    def _apply_to_all(self, x: Tensor) -> Tensor:
        """Apply the single matrix of a bank whose cores are all shared."""
        # The number of rows is not a constant in compiled code.
        route = RECONSTRUCT if torch.compiler.is_compiling() else self._route(x, len(x))
        if route != RECONSTRUCT:
            cores = list(self._shared_here().values())
            return contract_with_input(plan_operator(self.topology), cores, x, candidate=route)
        matrix = build_matrices(self.plan, self._shared_here(), 1).squeeze(0)
        return nn.functional.linear(x, matrix.to(x.dtype))

    def _route(self, x: Tensor, rows: int) -> int:
        """Return the fastest way to apply the network of one expert to a number of rows."""
        if len(set(self.topologies)) > 1 or len(self.topology.cores) == 1:
            return RECONSTRUCT
        bounds = fastest_routes(plan_operator(self.topology), default_machine(x.device), x.element_size())
        return choose(bounds, rows)

    def _cores_of_each(self) -> list[list[Tensor]]:
        """Return the cores of every expert in the order of the topology."""
        shared = self._shared_here()
        columns = [
            [shared[name]] * self.num_experts if name in shared else self.private_core(name).unbind()
            for name in self.topology.core_names
        ]
        return [list(cores) for cores in zip(*columns, strict=True)]

    def keeps_matrices(self) -> bool:
        """Return True if the matrices are cached: on request, in eval mode, without core gradients."""
        return self.strategy == "cached" and may_keep(self, self.stored_tensors())

    @property
    def matrix_bytes(self) -> int:
        """Bytes of the matrices of all experts in the dtype of the cores."""
        return self.num_experts * self.out_features * self.in_features * self.dtype.itemsize

    @property
    def seconds_saved(self) -> float:
        """Predicted seconds that cached matrices save in a forward pass of one token."""
        return self.plan.multiply_adds(1) / default_machine(self.stored_tensors()[0].device).peak

    def _kept(self) -> Tensor | None:
        if not self.keeps_matrices():
            return None
        return self.kept.get(self.stored_tensors(), self.compute_like, lambda: self._rebuild(None))

    def _rebuild(self, index: Tensor | None) -> Tensor:
        cores = self._shared_here()
        for name in self.topology.core_names:
            if name not in self.shared:
                cores[name] = self._whole_core(name, index)
        return build_matrices(self.plan, cores, self.num_experts if index is None else len(index))

    def _one_by_one(self, experts: Sequence[int]) -> Iterable[Tensor]:
        # One expert is a stack that shares everything: plain products, faster than batches of one.
        plan = plan_stack(self.topology, self.topology.core_names, 1)
        private = {n: self.private_core(n).unbind() for n in self.topology.core_names if n not in self.shared}
        shared = self._shared_here()
        # squeeze and not [0], whose backward would copy the gradient into zeros
        return (
            build_matrices(plan, {**shared, **{n: cores[e] for n, cores in private.items()}}, 1).squeeze(0)
            for e in experts
        )

    def _shared_here(self) -> dict[str, Tensor]:
        if self._owner:
            # A model that is spread over devices may hold the owner on another one than this layer.
            device = self.stored_tensors()[0].device
            return {name: core.to(device) for name, core in self.shared_parameters().items()}
        return {name: self._whole_core(name) for name in self.shared}

    def spec(self) -> dict[str, Any]:
        """Return a JSON-ready description, see `tensornet.nn.register_module_type`."""
        same = len(set(self.topologies)) == 1
        return {
            "type": "shared_core_experts",
            "num_experts": self.num_experts,
            "shared": list(self.shared),
            "owner": self._owner[0].label if self._owner else None,
            "topologies": [t.to_dict() for t in (self.topologies[:1] if same else self.topologies)],
            **storage_entry(self.storage),
        }

    def extra_repr(self) -> str:
        """Describe the module for `print(model)`."""
        return (
            f"{self.num_experts} x ({self.out_features}, {self.in_features}), "
            f"topology={self.topology.family}, bonds={list(self.topology.bond_dims.values())}, "
            f"shared={list(self.shared)}{f' of {self._owner[0].label!r}' if self._owner else ''}"
        )
