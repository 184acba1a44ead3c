"""Replace `nn.MultiheadAttention` by a module with four linear layers that can be compressed."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tensornet.errors import ShapeError
from tensornet.nn.layer_kinds import own_parameters
from tensornet.nn.unfuse import Compound, Shared, StackedMatrices, register_compound

_INPUTS = ("q_proj", "k_proj", "v_proj")


@register_compound
class MatrixAttention(Compound):
    """Replacement for `nn.MultiheadAttention` with the same arguments, masks and results."""

    replaces = (nn.MultiheadAttention,)

    def __init__(self, stock: nn.MultiheadAttention, shared: Shared) -> None:
        width = stock.embed_dim
        if stock.in_proj_weight is not None:
            stacks = [StackedMatrices("in_proj_weight", _INPUTS, width)]
        else:
            widths = zip(_INPUTS, (width, stock.kdim, stock.vdim), strict=True)
            stacks = [StackedMatrices(f"{name}_weight", (name,), columns) for name, columns in widths]
        bias = None if stock.out_proj.bias is None else "out_proj.bias"
        stacks.append(StackedMatrices("out_proj.weight", ("out_proj",), width, bias=bias))
        super().__init__(stock, tuple(stacks), shared)
        self.embed_dim, self.num_heads, self.head_dim = width, stock.num_heads, stock.head_dim
        self.dropout, self.batch_first = stock.dropout, stock.batch_first
        self.add_zero_attn = stock.add_zero_attn

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        """Return True if every projection weight is a parameter of the module itself or of its `out_proj`."""
        assert isinstance(module, nn.MultiheadAttention)
        projections = [own_parameters(module), own_parameters(module.out_proj)]
        packed = "in_proj_weight" in projections[0]
        plain = packed or {f"{name}_weight" for name in _INPUTS} <= projections[0].keys()
        return plain and "weight" in projections[1]

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Compute attention; see `nn.MultiheadAttention.forward`.

        Raises:
            ShapeError: `is_causal` is given without `attn_mask`.
        """
        if is_causal and attn_mask is None:
            raise ShapeError(
                "is_causal only states that attn_mask is causal, but got no attn_mask; pass one as well, for "
                "example nn.Transformer.generate_square_subsequent_mask(length)."
            )
        q, k, v = self._heads(query, key, value)
        if key_padding_mask is not None and query.ndim == 2:
            key_padding_mask = key_padding_mask[None]
        causal = is_causal and key_padding_mask is None and not need_weights
        mask = None if causal else self._mask(q, attn_mask, key_padding_mask)
        k, v, mask = self._extended(k, v, mask)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = (q / math.sqrt(self.head_dim)) @ k.mT
            weights = F.softmax(scores if mask is None else scores + mask, dim=-1)
            weights = F.dropout(weights, dropout) if dropout else weights
            mixed = weights @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal)
        # shape of `mixed`: (batch, heads, length, head_dim)
        y = mixed.transpose(1, 2).flatten(2)
        y = y[0] if query.ndim == 2 else y if self.batch_first else y.transpose(0, 1)
        y = self.get_submodule("out_proj")(y)
        if weights is not None:
            weights = weights.mean(dim=1) if average_attn_weights else weights
            weights = weights[0] if query.ndim == 2 else weights
        return y, weights

    def _heads(self, *inputs: Tensor) -> list[Tensor]:
        biases = [None] * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        found = []
        for name, x, bias in zip(_INPUTS, inputs, biases, strict=True):
            y = self.get_submodule(name)(x)  # `x` is not transposed, so that layers share one input
            y = y if bias is None else y + bias
            y = y[None] if x.ndim == 2 else y if self.batch_first else y.transpose(0, 1)
            found.append(y.unflatten(2, (self.num_heads, self.head_dim)).transpose(1, 2))
        return found

    def _mask(self, q: Tensor, mask: Tensor | None, padding: Tensor | None) -> Tensor | None:
        """Combine the attention mask and the padding mask into one that broadcasts to the attention scores.

        The scores have shape `(batch, heads, length, source)`.
        """
        added = []
        if mask is not None:
            full = mask if mask.ndim == 2 else mask.unflatten(0, (len(q), self.num_heads))
            added.append(_additive(full, q.dtype))
        if padding is not None:
            added.append(_additive(padding[:, None, None, :], q.dtype))
        return sum(added[1:], added[0]) if added else None

    def _extended(self, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Append the learned key and value (`bias_k`, `bias_v`) and zeros, if the options require it."""
        batch, heads, _, dim = k.shape
        more = []
        if self.bias_k is not None and self.bias_v is not None:
            learned = [
                x.reshape(1, heads, 1, dim).expand(batch, -1, -1, -1) for x in (self.bias_k, self.bias_v)
            ]
            more.append(learned)
        if self.add_zero_attn:
            more.append([k.new_zeros(batch, heads, 1, dim)] * 2)
        for key, value in more:
            k, v = torch.cat([k, key], dim=2), torch.cat([v, value], dim=2)
            mask = None if mask is None else F.pad(mask, (0, 1))
        return k, v, mask


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert a mask to an additive mask: minus infinity where a boolean mask is True."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -math.inf)
