"""Experts that transformers keeps in stacks `(experts, ...)`, taken apart into single matrices and put back.

A stack is one parameter, so nothing in it is a layer that could be observed, planned or compressed. Taken
apart, every expert has linear layers of its own, `experts.3.down_proj`, and what works for linear layers
works for them. Experts none of whose matrices became cores go back into their stacks.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tensornet.compression.apply import set_submodule
from tensornet.nn.expert_matrix import ExpertMatrix
from tensornet_hf.checkpoint.describe import is_inside

#: What transformers' `use_experts_implementation` puts on the experts modules that follow its conventions.
FLAGS = ("has_gate", "has_bias", "is_transposed", "has_post_expert_norm")


class SplitExperts(nn.Module):
    """Stands in for an experts module of transformers: the same function of the same arguments.

    Args:
        stock: the module it stands for; its stacks are viewed, not copied. It is kept, outside the tree of
            modules, for what it does between the matrices.
    """

    def __init__(self, stock: nn.Module) -> None:
        super().__init__()
        self._stock = (stock,)
        self.padding_mask: Tensor | None = None  # `(rows, tokens)`, while a model is observed
        self.num_experts: int = stock.num_experts  # type: ignore[assignment]
        self.names = stack_names(stock)
        for number in range(self.num_experts):
            self.add_module(str(number), nn.Module())
        for name in self.names:
            stack = stock.get_parameter(name)
            for expert, view in zip(self.experts, stack.detach(), strict=True):
                matrix = nn.Parameter(view.T if stock.is_transposed else view, stack.requires_grad)
                expert.add_module(name, ExpertMatrix(matrix))
        for name in _bias_names(stock):
            self.register_parameter(name, stock.get_parameter(name))
        self.train(stock.training)

    @property
    def experts(self) -> list[nn.Module]:
        """The experts; each has a layer for every name in `names`."""
        return [self.get_submodule(str(number)) for number in range(self.num_experts)]

    @property
    def compressed(self) -> bool:
        """Whether a matrix of some expert has been replaced."""
        layers = [layer for expert in self.experts for layer in expert.children()]
        return any(not isinstance(layer, ExpertMatrix) for layer in layers)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Mix the experts that the router chose for each token.

        Args:
            hidden_states: `(tokens, features)`.
            top_k_index, top_k_weights: chosen experts and what each counts, `(tokens, top_k)`.
        """
        mask = self.padding_mask
        if mask is not None and mask.numel() == len(hidden_states):  # calibration must not see padding
            top_k_index = top_k_index.masked_fill(mask.reshape(-1, 1) == 0, self.num_experts)
        mixed = torch.zeros_like(hidden_states, dtype=torch.promote_types(hidden_states.dtype, torch.float32))
        if hidden_states.is_meta:  # without values to route by, every expert sees every token
            for number in range(self.num_experts):
                mixed = mixed + self._run(number, hidden_states)
            return mixed.to(hidden_states.dtype)
        for number in top_k_index.unique().tolist():
            if number < self.num_experts:  # beyond are slots that the router left empty
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
                x = stock._apply_gate(x) if stock.has_gate else stock.act_fn(x)
        return x

    @torch.no_grad()
    def settle(self) -> nn.Module:
        """What belongs in this place now.

        Returns:
            This module, freed of the stacks, if some matrix is made of cores; else the stock module, with
            the matrices in its stacks.
        """
        stock = self._stock[0]
        for name in self.names:
            layers = [expert.get_submodule(name) for expert in self.experts]
            if self.compressed:
                stock._parameters[name] = None
                for layer in layers:
                    if isinstance(layer, ExpertMatrix):
                        layer.matrix.data = _own(layer.matrix.data)
            elif stock._parameters[name] is None:
                matrices = [layer.get_parameter("matrix") for layer in layers]
                stack = torch.stack([x.T if stock.is_transposed else x for x in matrices])
                stock._parameters[name] = nn.Parameter(stack, any(x.requires_grad for x in matrices))
        if self.compressed:
            return self
        for name in _bias_names(stock):
            stock._parameters[name] = self.get_parameter(name)
        return stock.train(self.training)


def stack_names(module: nn.Module) -> tuple[str, ...]:
    """Names of the stacks of an experts module, first matrix first; none if it is not one that can be split.

    Only modules that hold their matrices, their biases and an activation are split.
    """
    if not all(isinstance(getattr(module, flag, None), bool) for flag in FLAGS):
        return ()
    names = ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")
    own = {name for name, parameter in module.named_parameters() if parameter is not None}
    stacks = [module._parameters.get(name) for name in names]
    known = own == {*names, *_bias_names(module)} and next(module.buffers(), None) is None
    if not known or module.has_post_expert_norm:
        return ()
    return names if all(stack is not None and stack.ndim == 3 for stack in stacks) else ()


def split_experts(model: nn.Module, *, inside: Iterable[str] | None = None) -> list[str]:
    """Take the experts of a model apart, in place; nothing is copied.

    Args:
        model: any model.
        inside: only modules that hold one of these names, which are those of layers in split experts.

    Returns:
        Names of the modules that were replaced.
    """
    wanted = None if inside is None else set(inside)
    found = [(name, module) for name, module in model.named_modules() if stack_names(module)]
    chosen = [(n, m) for n, m in found if wanted is None or any(is_inside(x, {n}) for x in wanted)]
    for name, module in chosen:
        set_submodule(model, name, SplitExperts(module))
    return [name for name, _ in chosen]


def settle_experts(model: nn.Module, names: Iterable[str] | None = None) -> None:
    """Put experts back into their stacks where no matrix of theirs is made of cores.

    Args:
        model: any model.
        names: look at these modules only.
    """
    found = [name for name, module in model.named_modules() if isinstance(module, SplitExperts)]
    for name in found if names is None else set(found) & set(names):
        module = model.get_submodule(name)
        assert isinstance(module, SplitExperts)
        if (settled := module.settle()) is not module:
            set_submodule(model, name, settled)


@contextmanager
def experts_apart(model: nn.Module) -> Iterator[None]:
    """Have the experts of a model taken apart inside the block; there they leave padding out."""
    names = split_experts(model)
    handle = model.register_forward_pre_hook(_tell_padding, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
        _set_padding(model, None)
        settle_experts(model, names)


def _tell_padding(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Experts read tokens without their places, so the mask must reach them past the layers between."""
    mask = kwargs.get("attention_mask")
    _set_padding(model, mask if isinstance(mask, Tensor) else None)


def _set_padding(model: nn.Module, mask: Tensor | None) -> None:
    for module in model.modules():
        if isinstance(module, SplitExperts):
            module.padding_mask = mask


def _own(matrix: Tensor) -> Tensor:
    """The same numbers, in order, in memory that holds nothing else."""
    alone = matrix.is_meta or matrix.untyped_storage().nbytes() == matrix.nbytes
    return matrix if alone and matrix.is_contiguous() else matrix.clone(memory_format=torch.contiguous_format)


def _bias_names(stock: nn.Module) -> tuple[str, ...]:
    names = ("gate_up_proj" if stock.has_gate else "up_proj", "down_proj")
    return tuple(f"{name}_bias" for name in names) if stock.has_bias else ()
