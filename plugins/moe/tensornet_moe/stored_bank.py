"""Base of banks whose cores are stored as parameters, or as buffers in number formats."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tensornet.errors import ShapeError
from tensornet.linalg.svd import frobenius
from tensornet.nn.encoding import PLAIN, Storage
from tensornet.nn.fixed_dtypes import FixedDtypes
from tensornet.quantization import NumberFormat
from tensornet.topologies.factored import pad_core
from tensornet.topologies.structure import matrix_view
from tensornet.topology import Topology
from tensornet_moe.expert_bank import ExpertBank
from tensornet_moe.number_formats import check_storage, decode_core, encode_core, stored_dtypes


class StoredBank(FixedDtypes, ExpertBank):
    """Abstract bank that stores its cores by name, each in its number format.

    A core is one tensor `core_<name>`, stacked where it is private, or one for each expert
    (`core_<name>_expert_<e>`) where bonds differ; integers have `scale_...` and perhaps `zero_...` beside.

    Subclasses set `topology`, `topologies`, `shared` and `storage`, and call `_compute_like` before `_store`.
    """

    topology: Topology
    topologies: tuple[Topology, ...]
    shared: tuple[str, ...]
    storage: Storage
    compute_like: Tensor
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
        kept = encode_core(self.storage.format_of(name), topology, name, core)
        plain = self.storage.format_of(name) == PLAIN.number_format
        for part in ("core", "scale", "zero"):
            key = f"{part}_{stem}"
            # A tensor of the same kind keeps its place, and with it the order of the state dict.
            if part not in kept or not plain:
                self._parameters.pop(key, None)
            if part not in kept or plain:
                self._buffers.pop(key, None)
            if part not in kept:
                continue
            if plain:
                self.register_parameter(key, nn.Parameter(kept[part]))
            else:
                self.register_buffer(key, kept[part])

    def _compute_like(self, like: Tensor) -> None:
        """Set the dtype and device of products to those of a tensor; stored tensors may have others."""
        self.register_buffer("compute_like", like.new_empty(0), persistent=False)

    @property
    def stored(self) -> dict[str, Tensor]:
        """Parameters and buffers that hold the cores the bank owns, by name."""
        return {
            name: tensor
            for name, tensor in (*self._parameters.items(), *self._buffers.items())
            if tensor is not None and name != "compute_like"
        }

    @property
    def fixed_dtypes(self) -> dict[str, torch.dtype]:
        """See `FixedDtypes`."""
        if not self.storage.own_dtypes:
            return {}
        kinds = {x: stored_dtypes(self.storage.format_of(x)) for x in self.topology.core_names}
        found = {}
        for key in self.stored:
            part, _, stem = key.partition("_")
            kind = kinds[stem.partition("_expert_")[0]].get(part)
            if kind is not None:
                found[key] = kind
        return found

    @property
    def integer_cores(self) -> dict[str, tuple[NumberFormat, int]]:
        """See `FixedDtypes`."""
        found = {}
        for key in self.fixed_dtypes:
            part, _, stem = key.partition("_")
            name, _, expert = stem.partition("_expert_")
            if part == "core" and self.storage.format_of(name).is_integer:
                topology = self.topologies[int(expert)] if expert else self.topology
                found[key] = (self.storage.format_of(name), matrix_view(topology, name)[1])
        return found

    def stored_tensors(self) -> tuple[Tensor, ...]:
        """Return every tensor that the matrices are built from, borrowed ones included."""
        return (*self.stored.values(), *self.shared_parameters().values())

    def _core_tensors(self) -> tuple[Tensor, ...]:
        return self.stored_tensors()

    def _computed_like(self) -> Tensor:
        return self.compute_like

    @property
    def dtype(self) -> torch.dtype:
        """Dtype in which the cores are contracted."""
        return self.compute_like.dtype

    @property
    def num_params(self) -> int:
        """Stored numbers that this bank owns, scales included; packed integers count one by one."""
        return sum(self.stored_counts.values())

    @property
    def num_bytes(self) -> int:
        """Bytes of everything that this bank stores."""
        return sum(tensor.nbytes for tensor in self.stored.values())

    def _whole_core(self, name: str, index: Tensor | None = None) -> Tensor:
        """Decode a core that the bank owns; only some experts' part of a private core if `index` is given."""
        shape = self.topology.core_shapes[name]
        if name in self.shared:
            return self._decoded(name, name, self.topology, None)
        if f"core_{name}" in self._parameters or f"core_{name}" in self._buffers:
            return self._decoded(name, name, self.topology, index)
        pieces = [
            self._decoded(f"{name}_expert_{e}", name, self.topologies[e], None)
            for e in range(self.num_experts)
        ]
        stacked = torch.stack([pad_core(piece, shape) for piece in pieces])
        return stacked if index is None else stacked.index_select(0, index)

    def _decoded(self, stem: str, name: str, topology: Topology, index: Tensor | None) -> Tensor:
        kept = {part: getattr(self, f"{part}_{stem}", None) for part in ("core", "scale", "zero")}
        some = {
            part: x if index is None else x.index_select(0, index)
            for part, x in kept.items()
            if x is not None
        }
        return decode_core(self.storage.format_of(name), topology, name, some, self.dtype)

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
        stems = {key.partition("_")[2].partition("_expert_")[0] for key in self.stored}
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
        self.drop_cache()
        added = frobenius(before - self.expert_matrices()) / max(frobenius(before), 1e-300)
        self.error = None if self.error is None else self.error + added * (1 + self.error)
        return added

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in self.topology.core_names:
            stored, own = state_dict.get(f"{prefix}core_{name}"), self.stored.get(f"core_{name}")
            if name in self.shared or stored is None or own is None:
                continue
            if len(stored) != self.num_experts and stored.shape[1:] == own.shape[1:]:
                raise ShapeError(
                    f"{prefix}core_{name} holds {len(stored)} experts, this module has {self.num_experts}. "
                    f"Build the model with num_experts={len(stored)}, or upcycle again from the dense model."
                )
        super()._load_from_state_dict(state_dict, prefix, *args)
