"""Experts on disk: run mixtures whose experts do not fit into memory.

The private tensors of experts, which are most of a mixture, stay in a memory-mapped file. What the experts of
a bank share stays in memory. The matrix of an expert is built when a token is routed to the expert, and a
cache keeps the matrices that were used last. So each token reads at most the private tensors of its own
experts, and the more the experts share, the fewer bytes are read.

Reference:
    Eliseev and Mazur 2023, "Fast Inference of Mixture-of-Experts Language Models with Offloading", section 3
    (a cache of the experts used last). Their reading ahead, of experts that the next layer's router probably
    chooses, is missing: it made generation no faster.
"""

from collections import OrderedDict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from typing_extensions import Self

from tensornet._util import check_size, in_eval_mode
from tensornet.calibration.batches import BatchLike, as_batch, run_model
from tensornet.errors import TargetError
from tensornet_moe.bank import ExpertBank
from tensornet_moe.ffn import ExpertFFN
from tensornet_moe.grouped_linear import Groups
from tensornet_moe.layer import SharedCoreMoE
from tensornet_moe.pool import PooledExperts
from tensornet_moe.routers import Routing


class ExpertCache:
    """Cache of the matrices of experts that were used last.

    Args:
        max_bytes: largest total size of the matrices; 0 keeps none.

    Attributes:
        num_bytes: total size of the matrices in the cache.
        hits, misses: number of times that a matrix was in the cache, and that it was built.
        bytes_read: bytes of private tensors from which matrices were built.

    Raises:
        ValueError: `max_bytes` is not an integer of at least 0.

    Example:
        >>> bank = tm.SharedCoreExperts.from_dense(torch.randn(8, 8), num_experts=3)
        >>> cache = tm.ExpertCache(8 * 8 * 4)
        >>> shapes = [tuple(cache.matrix(bank, expert).shape) for expert in (0, 0, 1)]
        >>> shapes[0], cache.hits, cache.misses, cache.num_bytes
        ((8, 8), 1, 2, 256)
    """

    def __init__(self, max_bytes: int) -> None:
        check_size("max_bytes", max_bytes, least=0, error=ValueError)
        self.max_bytes = max_bytes
        self.hits = self.misses = self.bytes_read = 0
        self.num_bytes = 0
        self._sizes: OrderedDict[Hashable, int] = OrderedDict()
        self._matrices: dict[Hashable, Tensor] = {}

    def __contains__(self, key: Hashable) -> bool:
        return key in self._sizes

    def use(self, key: Hashable, size: int, read: int) -> bool:
        """Count one use of a matrix, and remove the matrices that were not used for longest if it is new.

        Args:
            key: identifies the matrix.
            size: bytes of the matrix.
            read: bytes of the private tensors from which it is built.

        Returns:
            True if the matrix was in the cache.
        """
        if key in self._sizes:
            self._sizes.move_to_end(key)
            self.hits += 1
            return True
        self.misses += 1
        self.bytes_read += read
        if size <= self.max_bytes:
            self._sizes[key] = size
            self.num_bytes += size
            while self.num_bytes > self.max_bytes:
                oldest, freed = self._sizes.popitem(last=False)
                self.num_bytes -= freed
                self._matrices.pop(oldest, None)
        return False

    def matrix(self, bank: ExpertBank, expert: int) -> Tensor:
        """Return the matrix of an expert, shape `(out, in)`, from the cache or from its tensors."""
        key = id(bank), expert
        if self.use(key, matrix_bytes(bank), expert_bytes(bank)):
            return self._matrices[key]
        made = bank.expert_matrices([expert])[0]
        if key in self._sizes:
            self._matrices[key] = made
        return made

    def apply(self, bank: ExpertBank, expert: int, x: Tensor) -> Tensor:
        """Multiply rows `x: (rows, in)` by the matrix of an expert.

        If the cache could not keep the matrix, the matrix is not built where applying the cores is faster.
        """
        if matrix_bytes(bank) <= self.max_bytes:
            return nn.functional.linear(x, self.matrix(bank, expert).to(x.dtype))
        self.use((id(bank), expert), matrix_bytes(bank), expert_bytes(bank))
        return bank.apply_expert(x, expert)


def matrix_bytes(bank: ExpertBank) -> int:
    """Return the number of bytes of the matrix of one expert."""
    return bank.out_features * bank.in_features * bank.dtype.itemsize


def expert_bytes(bank: ExpertBank) -> int:
    """Return the mean number of bytes of the private tensors of one expert of a bank."""
    return sum(x.nbytes for x in bank.private_tensors()) // bank.num_experts


class CachedExperts(ExpertBank):
    """Bank that builds the matrix of an expert when it is needed; see `cache_experts`.

    Args:
        bank: the bank whose matrices are built.
        cache: the cache, which all layers of a model use.
    """

    def __init__(self, bank: ExpertBank, cache: ExpertCache) -> None:
        super().__init__(bank.num_experts, (bank.out_features, bank.in_features))
        self.bank, self.cache = bank, cache
        self.register_state_dict_pre_hook(_refuse)
        self.requires_grad_(False)
        self.eval()

    def expert_matrices(self, experts: Sequence[int] | Tensor | None = None) -> Tensor:
        """Return the matrices of the given experts; see `ExpertBank`."""
        index = range(self.num_experts) if experts is None else self.check_experts(experts).tolist()
        return torch.stack([self.cache.matrix(self.bank, e) for e in index])

    def apply_rows(self, x: Tensor, groups: Groups) -> Tensor:
        """Multiply rows by the matrices of their experts, one expert after the other; see `ExpertBank`."""
        if groups.sizes is None or groups.active is None:
            raise TargetError("Experts on disk cannot be compiled; call the model without torch.compile.")
        pieces = x.split([groups.sizes[e] for e in groups.active])
        pairs = zip(pieces, groups.active, strict=True)
        return torch.cat([self.cache.apply(self.bank, expert, rows) for rows, expert in pairs])

    def shared_parameters(self) -> dict[str, nn.Parameter]:
        """Return the shared cores of the bank."""
        return self.bank.shared_parameters()

    def stored_tensors(self) -> tuple[Tensor, ...]:
        """Return the tensors of the bank."""
        return self.bank.stored_tensors()

    def active_params(self, top_k: float) -> float:
        """Count the values that `top_k` experts use; see `ExpertBank`."""
        return self.bank.active_params(top_k)

    def multiply_adds(self, rows: int) -> int:
        """Count the multiply-adds if no matrix is in the cache; see `ExpertBank`."""
        return self.bank.multiply_adds(rows)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the matrices."""
        return self.bank.dtype

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode; raise TargetError if `mode` is True."""
        if mode:
            _refuse()
        return super().train(mode)

    def spec(self) -> dict[str, Any]:
        """Raise TargetError, since a model with experts on disk cannot be saved."""
        _refuse()


def _refuse(*_: object) -> NoReturn:
    """Raise TargetError; this is also a hook for `register_state_dict_pre_hook`, which runs before saving."""
    raise TargetError(
        "A model whose experts are cached can neither be trained nor saved, nor described: load it again "
        "without experts_cache, or do so before cache_experts."
    )


def cache_experts(model: nn.Module, *, max_bytes: int) -> ExpertCache:
    """Build the matrices of experts only when a token needs them, and keep those that were used last.

    This saves memory if the private tensors of the experts are memory-mapped, as in models that
    `tensornet_hf.load(folder, experts_cache=...)` returns. The model can then neither be trained nor saved.

    Args:
        model: a model with mixtures of this library; it is changed in place and set to eval mode.
        max_bytes: largest size of the kept matrices in bytes, over all layers.

    Returns:
        The cache, which counts hits, misses and bytes read.

    Raises:
        TargetError: the model has no mixture with private cores.
        ValueError: `max_bytes` is not an integer of at least 0.

    Example:
        >>> model = torch.nn.Sequential(tm.mixture(d_model=8, d_ff=16, experts=4, top_k=1)).eval()
        >>> x = torch.randn(5, 8)
        >>> before = model(x)
        >>> cache = tm.cache_experts(model, max_bytes=4096)
        >>> torch.allclose(model(x), before, atol=1e-6), cache.num_bytes <= 4096
        (True, True)
    """
    cache = ExpertCache(max_bytes)
    layers = [x for x in model.modules() if isinstance(x, SharedCoreMoE)]
    networks = {id(network): network for layer in layers if (network := _network(layer)) is not None}
    found = False
    model.eval()
    for network in networks.values():
        for name in network.names:
            bank = network.bank(name)
            if bank.private_tensors() and not isinstance(bank, CachedExperts):
                setattr(network, name, CachedExperts(bank, cache))
                found = True
    if not found:
        raise TargetError(
            f"{type(model).__name__} has no mixture whose experts have private cores, so there is nothing to "
            "cache. Build one by tensornet_hf.upcycle or tensornet_moe.mixture."
        )
    return cache


def _network(layer: SharedCoreMoE) -> ExpertFFN | None:
    """Return the experts of a layer, or those of its pool; None if they are spread over processes."""
    experts = layer.experts.pool.experts if isinstance(layer.experts, PooledExperts) else layer.experts
    return experts if isinstance(experts, ExpertFFN) else None


def banks_of(layer: SharedCoreMoE) -> list[ExpertBank]:
    """Return the banks of the experts of a layer, without caches; none if they are spread over processes."""
    network = _network(layer)
    banks = [] if network is None else [network.bank(name) for name in network.names]
    return [bank.bank if isinstance(bank, CachedExperts) else bank for bank in banks]


class BytesRead(NamedTuple):
    """Bytes that a mixture reads from disk if only what its experts share is in memory.

    Args:
        resident: bytes of the model without the private tensors of experts.
        private: bytes of the private tensors of all experts.
        per_token: bytes read for a token.
        hits: fraction of the uses of an expert's matrix that a cache serves.

    Example:
        >>> print(tm.BytesRead(resident=1000, private=8000, per_token=500.0, hits=0.5))
        500 bytes read for a token (50% from the cache), 1,000 resident, 8,000 private
    """

    resident: int
    private: int
    per_token: float
    hits: float

    @classmethod
    def of(cls, model: nn.Module, banks: Iterable[ExpertBank], per_token: float, hits: float) -> "BytesRead":
        """Add the sizes of a model to what is read for a token; `banks` are the banks of its experts."""
        own = {id(x): x.nbytes for bank in banks for x in bank.private_tensors()}
        everything = {id(x): x.nbytes for x in (*model.parameters(), *model.buffers())}
        resident = sum(size for key, size in everything.items() if key not in own)
        return cls(resident, sum(own.values()), per_token, hits)

    def __str__(self) -> str:
        return (
            f"{self.per_token:,.0f} bytes read for a token ({self.hits:.0%} from the cache), "
            f"{self.resident:,} resident, {self.private:,} private"
        )


@torch.no_grad()
def bytes_read(model: nn.Module, batches: Iterable[BatchLike], *, cache_bytes: int = 0) -> BytesRead:
    """Count the bytes that a mixture with experts on disk would read for each token of real text.

    The model runs on the batches, and the chosen experts are recorded. Then the uses of experts are replayed
    token after token and layer after layer, as in generation, with a cache of `cache_bytes` (see
    `ExpertCache`). The model may be in memory, with or without `cache_experts`.

    Args:
        model: a model with mixtures of this library.
        batches: batches as for `tensornet.calibrate`.
        cache_bytes: largest size of the kept matrices in bytes.

    Raises:
        TargetError: there is no batch, or the model has no mixture.
        ValueError: `cache_bytes` is not an integer of at least 0.

    Example:
        >>> model = torch.nn.Sequential(tm.mixture(d_model=8, d_ff=16, experts=4, top_k=1)).eval()
        >>> found = tm.bytes_read(model, [torch.randn(5, 8)])
        >>> found.per_token == found.private / 4
        True
    """
    cache = ExpertCache(cache_bytes)
    device = next(model.parameters()).device
    given = [as_batch(batch, model, device) for batch in batches]
    layers = [x for x in model.modules() if isinstance(x, SharedCoreMoE) and banks_of(x)]
    if not given or not layers:
        what = "no mixture" if given else "no batches"
        raise TargetError(f"bytes_read needs a model with mixtures and at least one batch; there is {what}.")
    banks = [banks_of(layer) for layer in layers]
    tokens = 0
    with in_eval_mode(model), _recorded(layers) as chosen:
        for batch in given:
            for found in chosen:
                found.clear()
            run_model(model, batch)
            for step in zip(*(torch.cat(found).tolist() for found in chosen), strict=True):
                if all(expert == _PADDING for experts in step for expert in experts):
                    continue
                tokens += 1
                for layer, each, experts in zip(layers, banks, step, strict=True):
                    if isinstance(layer.experts, PooledExperts):
                        experts = [layer.experts.experts[x] if x >= 0 else x for x in experts]
                    for expert in (x for x in experts if x >= 0):
                        for bank in each:
                            if (read := expert_bytes(bank)) > 0:
                                cache.use((id(bank), expert), matrix_bytes(bank), read)
    uses = max(cache.hits + cache.misses, 1)
    return BytesRead.of(model, chain(*banks), cache.bytes_read / max(tokens, 1), cache.hits / uses)


_DROPPED, _PADDING = -1, -2


@contextmanager
def _recorded(layers: Sequence[SharedCoreMoE]) -> Iterator[list[list[Tensor]]]:
    """Record the chosen experts of every layer, each of shape `(tokens, top_k)`, within a `with` block.

    Choices that are not computed are recorded as `_DROPPED`, those of padding as `_PADDING`.
    """
    chosen: list[list[Tensor]] = [[] for _ in layers]

    def recording(found: list[Tensor], before: Any, x: Tensor, routing: Routing, experts: Any) -> Tensor:
        indices = routing.expert_indices
        if routing.kept is not None:
            indices = indices.masked_fill(~routing.kept.bool(), _DROPPED)
        if routing.mask is not None:
            indices = indices.masked_fill(~routing.mask.bool()[:, None], _PADDING)
        found.append(indices.cpu())
        made: Tensor = before(x, routing, experts)
        return made

    originals = [layer.dispatch for layer in layers]
    try:
        for layer, found, before in zip(layers, chosen, originals, strict=True):
            layer.dispatch = partial(recording, found, before)
        yield chosen
    finally:
        for layer, before in zip(layers, originals, strict=True):
            layer.dispatch = before
