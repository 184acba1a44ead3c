"""Split the stacked expert matrices of transformers into linear layers, and stack them again.

A stack is a single parameter, shape `(experts, ...)`. So its matrices are not layers that can be calibrated,
planned or compressed. After the stack is split (unfused), every expert has its own linear layers, such as
`experts.3.down_proj`, which are treated like any other linear layer. If no matrix was replaced, the stack is
restored.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tensornet.nn.unfuse import Compound, Shared, StackedMatrices, fuse, register_compound, unfuse

#: Attributes that transformers' `use_experts_implementation` sets on experts modules.
FLAGS = ("has_gate", "has_bias", "is_transposed", "has_post_expert_norm")


@register_compound
class SplitExperts(Compound):
    """Replacement for an experts module of transformers, with a linear layer for each matrix of each expert.

    Args:
        stock: the replaced module; its methods still compute the gate and the activation.
        shared: see `Compound`.
    """

    def __init__(self, stock: nn.Module, shared: Shared | None = None) -> None:
        layouts = self.layouts(stock)
        count: int = stock.num_experts  # type: ignore[assignment]
        self.names = tuple(name.replace(".", "_") for name in layouts)
        stacks = tuple(
            StackedMatrices(
                parameter,
                tuple(f"{number}.{name}" for number in range(count)),
                stock.get_parameter(parameter).shape[-1],
                transposed,
            )
            for name, (parameter, transposed) in zip(self.names, layouts.items(), strict=True)
        )
        super().__init__(stock, stacks, {} if shared is None else shared)
        self.padding_mask: Tensor | None = None  # shape: (rows, tokens), during calibration
        self.num_experts = count

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        """Return True if a module has stacks of experts that can be split."""
        return bool(cls.layouts(module))

    @classmethod
    def layouts(cls, module: nn.Module) -> dict[str, bool]:
        """Map the name of each stack in a module, in order, to True if its matrices have shape `(in, out)`.

        The result is empty if the module cannot be split, since it has more than matrices, biases and an
        activation.
        """
        if (
            not all(isinstance(getattr(module, flag, None), bool) for flag in FLAGS)
            or module.has_post_expert_norm
        ):
            return {}
        names = ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")
        biases = [f"{name}_bias" for name in names] if module.has_bias else []
        parameters = dict(module.named_parameters())
        known = parameters.keys() == {*names, *biases} and next(module.buffers(), None) is None
        if not known or any(parameters[name].ndim != 3 for name in names):
            return {}
        return dict.fromkeys(names, bool(module.is_transposed))

    @property
    def experts(self) -> list[nn.Module]:
        """The experts in order; each is a module that has one linear layer for every name in `names`."""
        return [self.get_submodule(str(number)) for number in range(self.num_experts)]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Compute the weighted sum of the chosen experts' outputs for each token, shape `(tokens, features)`.

        Args:
            hidden_states: `(tokens, features)`.
            top_k_index, top_k_weights: chosen experts and their weights, `(tokens, top_k)`.
        """
        mask = self.padding_mask
        if mask is not None and mask.numel() == len(hidden_states):  # calibration must ignore padding
            padded = mask.reshape(-1, 1).to(top_k_index.device) == 0  # the mask may be on another device
            top_k_index = top_k_index.masked_fill(padded, self.num_experts)
        wide = torch.promote_types(hidden_states.dtype, torch.float32)
        if hidden_states.is_meta:  # meta tensors have no values, so let every expert process every token
            outputs = [self._run(number, hidden_states) for number in range(self.num_experts)]
            return torch.stack(outputs).sum(0).to(hidden_states.dtype)
        # Sort the slots by expert. Indices of `num_experts` and above mark empty slots.
        chosen, slots = top_k_index.reshape(-1).sort(stable=True)
        counts = chosen[chosen < self.num_experts].bincount(minlength=self.num_experts).tolist()
        slots = slots[: sum(counts)]
        token = slots // top_k_index.shape[-1]
        parts = hidden_states[token].split(counts)
        found = [self._run(number, part) for number, part in enumerate(parts) if len(part)]
        if not found:
            return torch.zeros_like(hidden_states)
        y = torch.cat(found) * top_k_weights.reshape(-1)[slots, None]
        mixed = torch.zeros_like(hidden_states, dtype=wide).index_add(0, token, y.to(wide))
        return mixed.to(hidden_states.dtype)

    def _run(self, number: int, x: Tensor) -> Tensor:
        stock: Any = self._stock[0]
        expert = self.get_submodule(str(number))
        for step, name in enumerate(self.names):
            x = expert.get_submodule(name)(x)
            if (bias := self._parameters.get(f"{name}_bias")) is not None:
                x = x + bias[number]
            if step == 0:
                # A private method, but these classes have no public method for their gate.
                x = stock._apply_gate(x) if stock.has_gate else stock.act_fn(x)
        return x


@register_compound
class SplitDbrx(SplitExperts):
    """Replacement for the experts module of DBRX.

    The child `mlp` of that module stores each stack as a parameter of shape `(experts * rows, columns)`.
    """

    replaces = ("transformers.models.dbrx.modeling_dbrx.DbrxExperts",)

    @classmethod
    def layouts(cls, module: nn.Module) -> dict[str, bool]:
        """Return the stacks of the module (see `SplitExperts.layouts`)."""
        return {"mlp.w1": False, "mlp.v1": False, "mlp.w2": True}

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Compute the weighted sum of the chosen experts' outputs, shape `(batch, length, features)`."""
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        mixed = super().forward(flat, top_k_index, top_k_weights)
        return mixed.view(len(hidden_states), -1, hidden_states.shape[-1])

    def _run(self, number: int, x: Tensor) -> Tensor:
        stock: Any = self._stock[0]
        gate, up, down = (self.get_submodule(f"{number}.{name}") for name in self.names)
        y: Tensor = down(stock.mlp.activation_fn(gate(x)) * up(x))
        return y


@register_compound
class SplitLlama4(SplitExperts):
    """Replacement for the experts module of Llama 4, in which every expert processes all tokens."""

    replaces = ("transformers.models.llama4.modeling_llama4.Llama4TextExperts",)

    @classmethod
    def layouts(cls, module: nn.Module) -> dict[str, bool]:
        """Return the stacks of the module (see `SplitExperts.layouts`)."""
        return {"gate_up_proj": True, "down_proj": True}

    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        """Compute the outputs of all experts; input and output have shape `(experts * tokens, features)`.

        The input contains a copy of all tokens for each expert, multiplied by the weights of the router. So
        tokens that the router did not send to an expert are zero in its copy, and their outputs are zero.
        They are skipped, so that calibration does not count them as tokens of this expert.
        """
        parts = hidden_states.view(self.num_experts, -1, hidden_states.shape[-1])
        if hidden_states.is_meta:
            return torch.cat([self._run(number, part) for number, part in enumerate(parts)])
        outputs = []
        for number, part in enumerate(parts):
            outputs.append(torch.zeros_like(part))
            (token,) = part.detach().any(-1).nonzero(as_tuple=True)
            if len(token):
                outputs[-1] = outputs[-1].index_add(0, token, self._run(number, part[token]).to(part.dtype))
        return torch.cat(outputs)

    def _run(self, number: int, x: Tensor) -> Tensor:
        stock: Any = self._stock[0]
        gate_up, down = (self.get_submodule(f"{number}.{name}") for name in self.names)
        gate, up = gate_up(x).chunk(2, dim=-1)
        y: Tensor = down(up * stock.act_fn(gate))
        return y


@register_compound
class SplitJetMoe(SplitExperts):
    """Replacement for a stack of JetMoE, which takes tokens that are sorted by expert."""

    replaces = ("transformers.models.jetmoe.modeling_jetmoe.JetMoeParallelExperts",)

    @classmethod
    def layouts(cls, module: nn.Module) -> dict[str, bool]:
        """Return the stacks of the module (see `SplitExperts.layouts`)."""
        return {"weight": False}

    def forward(self, inputs: Tensor, expert_size: list[int]) -> Tensor:  # type: ignore[override]
        """Map tokens `(tokens, in)`, sorted by expert, to `(tokens, out)`; `expert_size` counts them."""
        parts = inputs.split(expert_size)
        return torch.cat([self.get_submodule(f"{k}.weight")(part) for k, part in enumerate(parts)])


@contextmanager
def experts_apart(model: nn.Module) -> Iterator[None]:
    """Split the experts of a model into layers within a `with` block, and make the experts ignore padding."""
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
    """Give split experts the attention mask of a batch, which shows where their inputs are padding."""
    mask = batch.get("attention_mask")
    mask = mask if isinstance(mask, Tensor) else None
    for module in model.modules():
        if isinstance(module, SplitExperts):
            module.padding_mask = mask
