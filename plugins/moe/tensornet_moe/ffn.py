"""Feed-forward networks of all experts of a layer, applied to rows sorted by expert."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tensornet._util import check_type, is_exporting
from tensornet.errors import ShapeError
from tensornet.nn import build_module, register_module_type
from tensornet_moe.bank import ExpertBank
from tensornet_moe.grouped_linear import Groups, masked_linear

#: Maps names to activations; it includes the names that common model configurations use.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
    "identity": lambda x: x,
}


class ExpertFFN(nn.Module):
    """Feed-forward networks of experts: `W_down act(W_up x)`, or gated `W_down (act(W_gate x) * W_up x)`.

    Args:
        matrices: expert banks by name, in the order `up, down`, or `gate, up, down` if gated. Other
            names are possible, for example `{"wi": ..., "wo": ...}`; the submodules get the given names.
        activation: a name in `ACTIVATIONS`.
        bias: whether each expert has a bias after each matrix, shape `(num_experts, out)`.
        dropout: dropout probability of the hidden layer, in training.
        device, dtype: device and dtype of the biases.

    Raises:
        TypeError: a value of `matrices` is not an ExpertBank.
        ValueError: unknown activation, or neither two nor three banks.
        ShapeError: the banks differ in the number of experts, or their shapes do not fit together.

    Example:
        >>> up = tm.SharedCoreExperts.from_dense(torch.randn(16, 8), num_experts=4)
        >>> down = tm.SharedCoreExperts.from_dense(torch.randn(8, 16), num_experts=4)
        >>> experts = tm.ExpertFFN({"up": up, "down": down}, activation="relu", bias=True)
        >>> experts.num_experts, experts.in_features, experts.out_features
        (4, 8, 8)
    """

    def __init__(
        self,
        matrices: Mapping[str, ExpertBank],
        *,
        activation: str = "gelu",
        bias: bool = False,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"Unknown activation {activation!r}; known are {', '.join(sorted(ACTIVATIONS))}."
            )
        if len(matrices) not in (2, 3):
            raise ValueError(f"An expert has two matrices, or three if gated; got {list(matrices)}.")
        for name, bank in matrices.items():
            check_type(f"The bank {name!r}", bank, ExpertBank, "the matrices of all experts form a bank")
        _check_fit(matrices)
        self.names = tuple(matrices)
        self.activation, self.dropout = activation, dropout
        self.gated = len(matrices) == 3
        for name, bank in matrices.items():
            self.add_module(name, bank)
            zeros = torch.zeros(bank.num_experts, bank.out_features, device=device, dtype=dtype)
            self.register_parameter(f"{name}_bias", nn.Parameter(zeros) if bias else None)

    def bank(self, name: str) -> ExpertBank:
        """Look up a bank by name.

        Raises:
            KeyError: there is no such bank; the message lists the existing ones.
        """
        if name not in self.names:
            raise KeyError(f"No bank {name!r}; this network has {', '.join(self.names)}.")
        return getattr(self, name)

    @property
    def num_experts(self) -> int:
        """Number of experts."""
        return self.bank(self.names[0]).num_experts

    @property
    def in_features(self) -> int:
        """Number of input features of a token."""
        return self.bank(self.names[0]).in_features

    @property
    def out_features(self) -> int:
        """Number of output features of a token."""
        return self.bank(self.names[-1]).out_features

    def forward(self, x: Tensor, groups: Groups) -> Tensor:
        """Apply each expert to its rows of `x: (rows, in_features)`, and return `(rows, out_features)`.

        The rows are sorted by expert, as `groups` describes.
        """
        hidden = ACTIVATIONS[self.activation](self._linear(self.names[0], x, groups))
        if self.gated:
            hidden = hidden * self._linear(self.names[1], x, groups)
        hidden = F.dropout(hidden, self.dropout, self.training)
        return self._linear(self.names[-1], hidden, groups)

    def _linear(self, name: str, x: Tensor, groups: Groups) -> Tensor:
        bank = self.bank(name)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        else:
            # Banks may differ in dtype: T5's output matrix stays in float32 in a half-precision model.
            x = x.to(bank.dtype)
        if is_exporting():
            y = masked_linear(x, bank.expert_matrices().to(x.dtype), groups)
        else:
            y = bank.apply_rows(x, groups)
        bias = getattr(self, f"{name}_bias")
        return y if bias is None else y + bias.index_select(0, groups.expert_of_row).to(y.dtype)

    def spec(self) -> dict[str, Any]:
        """Return a JSON-ready description; see `tensornet.nn.register_module_type`."""
        return {
            "type": "expert_ffn",
            "names": list(self.names),  # some JSON writers do not keep the order of mappings
            "matrices": {name: self.bank(name).spec() for name in self.names},
            "activation": self.activation,
            "bias": getattr(self, f"{self.names[0]}_bias") is not None,
            "dropout": self.dropout,
        }

    def extra_repr(self) -> str:
        """Describe the module for `print(model)`."""
        return f"activation={self.activation}, gated={self.gated}, dropout={self.dropout}"


def _check_fit(matrices: Mapping[str, ExpertBank]) -> None:
    shapes = {name: (b.num_experts, b.out_features, b.in_features) for name, b in matrices.items()}
    *first, (experts, _, hidden) = shapes.values()
    fits = all(shape == (experts, hidden, first[0][2]) for shape in first)
    if not fits:
        raise ShapeError(
            f"The matrices do not fit each other: (experts, out, in) are {shapes}. All but the last map a "
            "token to the hidden layer, the last maps back, and the number of experts is the same."
        )


def _build(
    spec: Mapping[str, Any], device: torch.device | str | None, dtype: torch.dtype | None
) -> ExpertFFN:
    banks: dict[str, Any] = {
        name: build_module(spec["matrices"][name], device=device, dtype=dtype) for name in spec["names"]
    }
    options = {name: spec[name] for name in ("activation", "bias", "dropout")}
    return ExpertFFN(banks, **options, device=device, dtype=dtype)


register_module_type("expert_ffn", _build)
