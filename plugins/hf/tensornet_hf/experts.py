"""Split experts that transformers stores in stacks `(experts, ...)` into single matrices, and join them.

A stack is one parameter, so none of its matrices is a layer that could be calibrated, planned or compressed.
After unfusing, every expert has its own linear layers, such as `experts.3.down_proj`, which are treated like
any linear layer. If none of the matrices was replaced, the stack is restored.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tensornet.nn.layer_kinds import CompoundKind, register_compound_kind
from tensornet.nn.unfuse import Compound, Shared, Stack, fuse, unfuse

#: Attributes that transformers' `use_experts_implementation` sets on experts modules.
FLAGS = ("has_gate", "has_bias", "is_transposed", "has_post_expert_norm")


class SplitExperts(Compound):
    """Replacement for an experts module of transformers: same function, one layer for each expert matrix.

    Args:
        stock: the replaced module; it still computes everything between the matrices.
        shared: see `CompoundKind.unfuse`.
    """

    def __init__(self, stock: nn.Module, shared: Shared | None = None) -> None:
        names = stack_names(stock)
        count: int = stock.num_experts  # type: ignore[assignment]
        stacks = tuple(
            Stack(
                name,
                tuple(f"{number}.{name}" for number in range(count)),
                stock.get_parameter(name).shape[-1],
                bool(stock.is_transposed),
            )
            for name in names
        )
        super().__init__(stock, stacks, {} if shared is None else shared)
        self.padding_mask: Tensor | None = None  # `(rows, tokens)`, during calibration
        self.num_experts = count
        self.names = names

    @property
    def experts(self) -> list[nn.Module]:
        """Return the experts, each with one layer for every name in `names`."""
        return [self.get_submodule(str(number)) for number in range(self.num_experts)]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Sum the weighted outputs of the experts that the router chose for each token.

        Args:
            hidden_states: `(tokens, features)`.
            top_k_index, top_k_weights: chosen experts and their weights, `(tokens, top_k)`.
        """
        mask = self.padding_mask
        if mask is not None and mask.numel() == len(hidden_states):  # calibration must skip padding
            padded = mask.reshape(-1, 1).to(top_k_index.device) == 0  # the mask may be on another device
            top_k_index = top_k_index.masked_fill(padded, self.num_experts)
        mixed = torch.zeros_like(hidden_states, dtype=torch.promote_types(hidden_states.dtype, torch.float32))
        if hidden_states.is_meta:  # without values every expert gets every token
            for number in range(self.num_experts):
                mixed = mixed + self._run(number, hidden_states)
            return mixed.to(hidden_states.dtype)
        for number in top_k_index.unique().tolist():
            if number < self.num_experts:  # larger numbers mark empty slots
                token, place = torch.where(top_k_index == number)
                y = self._run(number, hidden_states[token]) * top_k_weights[token, place, None]
                mixed = mixed.index_add(0, token, y.to(mixed.dtype))
        return mixed.to(hidden_states.dtype)

    def _run(self, number: int, x: Tensor) -> Tensor:
        stock: Any = self._stock[0]
        expert = self.get_submodule(str(number))
        for step, name in enumerate(self.names):
            x = expert.get_submodule(name)(x)
            if (bias := self._parameters.get(f"{name}_bias")) is not None:
                x = x + bias[number]
            if step == 0:
                # A private method, but the only one that all these classes have for their gate.
                x = stock._apply_gate(x) if stock.has_gate else stock.act_fn(x)
        return x


def stack_names(module: nn.Module) -> tuple[str, ...]:
    """Return the names of the stacks of an experts module in order; empty if it cannot be split.

    Only modules that consist of matrices, biases and an activation can be split.
    """
    if (
        not all(isinstance(getattr(module, flag, None), bool) for flag in FLAGS)
        or module.has_post_expert_norm
    ):
        return ()
    names = ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")
    biases = [f"{name}_bias" for name in names] if module.has_bias else []
    parameters = {name: parameter for name, parameter in module.named_parameters() if parameter is not None}
    known = parameters.keys() == {*names, *biases} and next(module.buffers(), None) is None
    return names if known and all(parameters[name].ndim == 3 for name in names) else ()


@contextmanager
def experts_apart(model: nn.Module) -> Iterator[None]:
    """Split the experts of a model inside the block, where they also skip padding."""
    names = unfuse(model)

    def tell(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        tell_padding(model, kwargs)

    handle = model.register_forward_pre_hook(tell, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
        tell_padding(model, {})
        fuse(model, names)


def tell_padding(model: nn.Module, batch: Mapping[str, Any]) -> None:
    """Pass the attention mask of a batch to experts, which receive tokens without their positions."""
    mask = batch.get("attention_mask")
    mask = mask if isinstance(mask, Tensor) else None
    for module in model.modules():
        if isinstance(module, SplitExperts):
            module.padding_mask = mask


class _ExpertsKind(CompoundKind):
    def matches(self, module: nn.Module) -> bool:
        return bool(stack_names(module))

    def unfuse(self, module: nn.Module, shared: Shared) -> nn.Module:
        return SplitExperts(module, shared)


register_compound_kind(_ExpertsKind())
