"""Base of banks whose cores are stored as parameters, or as buffers in number formats."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tensornet.errors import ShapeError
from tensornet.linalg.svd import frobenius
from tensornet.nn.storage import PackedCore, Storage, put_core
from tensornet.nn.strategy import KeptMatrix
from tensornet.topologies.factored import pad_core
from tensornet.topology import Topology
from tensornet_moe.expert_bank import ExpertBank
from tensornet_moe.number_formats import check_storage, encode_core


class StoredBank(ExpertBank):
    """Abstract bank that stores its cores by name, each in its number format.

    A core is a parameter or a `PackedCore` called `core_<name>`, stacked where it is private, or one for each
    expert (`core_<name>_expert_<e>`) where bonds differ.

    Subclasses set `topology`, `topologies`, `shared` and `storage`, and call `_compute_like` before `_store`.
    """

    topology: Topology
    topologies: tuple[Topology, ...]
    shared: tuple[str, ...]
    storage: Storage
    compute_like: Tensor
    kept: KeptMatrix
    #: Relative Frobenius error against the matrices the bank was built from; None for a new bank.
    error: float | None

    def _store(self, name: str, core: Tensor | Sequence[Tensor]) -> None:
        """Register a core in its number format: one tensor, or a list with one tensor for each expert."""
        if isinstance(core, Tensor):
            self._hold(name, name, self.topology, core)
            return
        for expert, piece in enumerate(core):
            self._hold(f"{name}_expert_{expert}", name, self.topologies[expert], piece)

    def _hold(self, stem: str, name: str, topology: Topology, core: Tensor) -> None:
        put_core(self, f"core_{stem}", encode_core(self.storage.format_of(name), topology, name, core))

    def _compute_like(self, like: Tensor) -> None:
        """Set the dtype and device of products to those of a tensor; stored tensors may have others."""
        self.register_buffer("compute_like", like.new_empty(0), persistent=False)

    @property
    def stored(self) -> dict[str, Tensor]:
        """Parameters and buffers that hold the cores the bank owns, by name."""
        buffers = {name: x for name, x in self.named_buffers() if name != "compute_like"}
        return {**dict(self.named_parameters()), **buffers}

    def stored_tensors(self) -> tuple[Tensor, ...]:
        """Return every tensor that the matrices are built from, borrowed ones included."""
        return (*self.stored.values(), *self.shared_parameters().values())

    @property
    def dtype(self) -> torch.dtype:
        """Dtype in which the cores are contracted."""
        return self.compute_like.dtype

    @property
    def num_params(self) -> int:
        """Stored numbers that this bank owns, scales included; packed integers count one by one."""
        packed = [core for core in self.modules() if isinstance(core, PackedCore)]
        plain = sum(x.numel() for x in self.parameters(recurse=False))
        return plain + sum(sum(core.counts.values()) for core in packed)

    @property
    def num_bytes(self) -> int:
        """Bytes of everything that this bank stores."""
        return sum(tensor.nbytes for tensor in self.stored.values())

    def _whole_core(self, name: str, index: Tensor | None = None) -> Tensor:
        """Decode a core that the bank owns; only some experts' part of a private core if `index` is given."""
        core = getattr(self, f"core_{name}", None)
        if core is not None:
            return self._decoded(core, None if name in self.shared else index)
        pieces = [getattr(self, f"core_{name}_expert_{e}") for e in range(self.num_experts)]
        shape = self.topology.core_shapes[name]
        stacked = torch.stack([pad_core(self._decoded(piece), shape) for piece in pieces])
        return stacked if index is None else stacked.index_select(0, index)

    def _decoded(self, core: Tensor | PackedCore, index: Tensor | None = None) -> Tensor:
        if isinstance(core, PackedCore):
            decoded: Tensor = core(self.dtype, index)
            return decoded
        return core if index is None else core.index_select(0, index)

    @torch.no_grad()
    def quantize(self, storage: Storage | str) -> float:
        """Store the cores that the bank owns in number formats, in place.

        Cores are rounded to nearest, with scales searched group by group: in cores that a decomposition
        made, errors of one element hardly couple to others. `"float"` unpacks them again. Borrowed cores stay
        as their owner stores them.

        Args:
            storage: the name of a format for all cores, or formats core by core.

        Returns:
            Relative Frobenius error that rounding adds to the matrices of all experts.

        Raises:
            FormatError: an unknown format, formats for cores that are not there, or another encoding.

        Example:
            >>> bank = tm.SharedCoreExperts.from_dense(torch.randn(32, 64), num_experts=4)
            >>> before = bank.num_bytes
            >>> bank.quantize("int4") < 0.2, bank.num_bytes < before / 4
            (True, True)
        """
        storage = Storage(number_format=storage) if isinstance(storage, str) else storage  # type: ignore[arg-type]
        check_storage(storage, self.topology)
        before, like = self.expert_matrices(), self.compute_like
        stems = {key.partition(".")[0][5:].partition("_expert_")[0] for key in self.stored}
        owned = [name for name in self.topology.core_names if name in stems]
        values = {name: self._whole_core(name).to(like) for name in owned}
        whole = owned if len(set(self.topologies)) == 1 else [name for name in owned if name in self.shared]
        self.storage = storage
        for name in owned:
            if name in whole:
                self._store(name, values[name])
            else:  # bonds differ: every expert's own core has scales of its own
                sizes = [topology.core_shapes[name] for topology in self.topologies]
                pieces = zip(values[name], sizes, strict=True)
                self._store(name, [core[tuple(map(slice, size))].contiguous() for core, size in pieces])
        self.kept.drop()
        added = frobenius(before - self.expert_matrices()) / max(frobenius(before), 1e-300)
        self.error = None if self.error is None else self.error + added * (1 + self.error)
        return added

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        own_tensors = self.stored
        for name in self.topology.core_names:
            key = f"core_{name}" if f"core_{name}" in own_tensors else f"core_{name}.codes"
            stored, own = state_dict.get(prefix + key), own_tensors.get(key)
            if name in self.shared or stored is None or own is None:
                continue
            if len(stored) != self.num_experts and stored.shape[1:] == own.shape[1:]:
                raise ShapeError(
                    f"{prefix}{key} holds {len(stored)} experts, this module has {self.num_experts}. "
                    f"Build the model with num_experts={len(stored)}, or upcycle again from the dense model."
                )
        super()._load_from_state_dict(state_dict, prefix, *args)
