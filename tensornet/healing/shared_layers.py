"""Stacks of layers that share one core, found in a model and fitted together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from tensornet.compression.shared_forms import fit_form, form_of
from tensornet.linalg.weighted_svd import Weighting
from tensornet.network import TensorNetwork
from tensornet.nn.module import NetworkModule


@dataclass(frozen=True)
class SharedLayers:
    """Layers of one topology that share one core, as `CompressionConfig.share_experts` makes them.

    Args:
        names: of the layers.
        form: a key of `tensornet.compression.shared_forms.SHARED_FORMS`.
        rank: of their factors.
    """

    names: tuple[str, ...]
    form: str
    rank: int

    def fit(self, matrices: Sequence[Tensor], weightings: Sequence[Weighting]) -> list[TensorNetwork]:
        """Fit the networks of all layers to matrices `(out, in)`, in the order of the names."""
        return fit_form(self.form, matrices, weightings, self.rank)


def find_shared_layers(layers: Mapping[str, NetworkModule]) -> list[SharedLayers]:
    """Find the stacks whose layers share one core of a known form, and no other core with anyone.

    Args:
        layers: tensor-network layers of a model by name, each once.

    Example:
        >>> first, second = (tn.nn.TensorNetworkLinear(
        ...     tn.topologies.low_rank(out_features=6, in_features=4, rank=2)) for _ in range(2))
        >>> second.core_1 = first.core_1
        >>> find_shared_layers({"first": first, "second": second})
        [SharedLayers(names=('first', 'second'), form='inputs', rank=2)]
    """
    users: dict[int, list[tuple[str, str]]] = {}  # name of the layer and of its core, by the stored tensor
    for name, layer in layers.items():
        for part, tensor in layer.stored.items():
            users.setdefault(id(tensor), []).append((name, part))
    found = []
    for used in users.values():
        names, (part, *others) = [name for name, _ in used], dict.fromkeys(part for _, part in used)
        first = layers[names[0]]
        alike = all((layers[x].topology, layers[x].storage) == (first.topology, first.storage) for x in names)
        if len(names) == 1 or others or not alike or not first.storage.plain:
            continue
        apart = all(
            len(users[id(tensor)]) == 1
            for name in names
            for other, tensor in layers[name].stored.items()
            if other != part
        )
        form = form_of(first.topology, part.removeprefix("core_"))
        if apart and form is not None:
            found.append(SharedLayers(tuple(names), form, max(first.topology.bond_dims.values())))
    return found
