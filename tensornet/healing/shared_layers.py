"""Stacks of layers that share one core, found in a model and fitted together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from tensornet.compression.shared_forms import form_of
from tensornet.compression.shared_rounding import fit_stored
from tensornet.linalg.weighted_svd import Weighting
from tensornet.nn.encoding import PLAIN, Storage
from tensornet.nn.module import NetworkModule


@dataclass(frozen=True)
class SharedLayers:
    """Layers of one topology that share one core, as `CompressionConfig.share_experts` makes them.

    Args:
        names: of the layers.
        form: a key of `tensornet.compression.shared_forms.SHARED_FORMS`.
        rank: of their factors.
        storage: encoding of their cores.
    """

    names: tuple[str, ...]
    form: str
    rank: int
    storage: Storage = PLAIN

    def fit(self, matrices: Sequence[Tensor], weightings: Sequence[Weighting]) -> list[dict[str, Tensor]]:
        """Fit all layers to matrices `(out, in)`, in the order of the names; return their stored tensors."""
        return fit_stored(self.form, matrices, weightings, self.rank, self.storage)


def find_shared_layers(layers: Mapping[str, NetworkModule]) -> list[SharedLayers]:
    """Find the stacks whose layers share one core of a known form, and no other core with anyone.

    Args:
        layers: tensor-network layers of a model by name, each once.

    Example:
        >>> first, second = (tn.nn.TensorNetworkLinear(
        ...     tn.topologies.low_rank(out_features=6, in_features=4, rank=2)) for _ in range(2))
        >>> second.core_1 = first.core_1
        >>> [stack.names for stack in find_shared_layers({"first": first, "second": second})]
        [('first', 'second')]
    """
    stored = {name: layer.stored for name, layer in layers.items()}
    users: dict[int, list[str]] = {}
    for name, tensors in stored.items():
        for tensor in tensors.values():
            users.setdefault(id(tensor), []).append(name)
    found: dict[tuple[str, ...], SharedLayers] = {}
    for names in map(tuple, users.values()):
        first = layers[names[0]]
        alike = all((layers[x].topology, layers[x].storage) == (first.topology, first.storage) for x in names)
        if len(names) == 1 or len({*names}) < len(names) or names in found or not alike:
            continue
        if first.storage.pivoted:
            continue
        # Codes, scales and zero points of one core are shared together, all other tensors by nobody.
        common = [part for part, x in stored[names[0]].items() if tuple(users[id(x)]) == names]
        cores = {part.partition("_")[2] for part in common}
        rest = [x for name in names for part, x in stored[name].items() if part not in common]
        same = all(stored[name][part] is stored[names[0]][part] for name in names for part in common)
        form = form_of(first.topology, min(cores))
        if len(cores) == 1 and same and form is not None and all(len(users[id(x)]) == 1 for x in rest):
            rank = max(first.topology.bond_dims.values())
            found[names] = SharedLayers(names, form, rank, first.storage)
    return list(found.values())
