"""Replace `nn.RNN`, `nn.LSTM` and `nn.GRU` by a module with one linear layer for each matrix."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from tensornet.errors import ShapeError
from tensornet.nn.layer_kinds import own_parameters
from tensornet.nn.unfuse import (
    Compound,
    Shared,
    StackedMatrices,
    dense_matrix,
    is_observed,
    register_compound,
)

#: State tensors: the hidden state or, for an LSTM, the hidden state and the cell state.
State = tuple[Tensor, ...]

_FUSED: dict[str, Callable[..., Any]] = {
    "LSTM": torch.lstm,
    "GRU": torch.gru,
    "RNN_TANH": torch.rnn_tanh,
    "RNN_RELU": torch.rnn_relu,
}


@register_compound
class MatrixRecurrence(Compound):
    """Replacement for `nn.RNN`, `nn.LSTM` or `nn.GRU` with the same arguments and results.

    In each call the matrices are rebuilt and passed to PyTorch's fused operation; multiplying by cores in
    every time step would be much slower. During calibration the layers are called in every time step.
    """

    replaces = (nn.RNN, nn.LSTM, nn.GRU)

    def __init__(self, stock: nn.RNNBase, shared: Shared) -> None:
        matrices = {n: p for n, p in own_parameters(stock).items() if n.startswith("weight_")}
        stacks = tuple(
            StackedMatrices(name, (name.replace("weight", "matrix"),), p.shape[1])
            for name, p in matrices.items()
        )
        super().__init__(stock, stacks, shared)
        self.mode, self.num_layers, self.bias = stock.mode, stock.num_layers, stock.bias
        self.hidden_size, self.proj_size = stock.hidden_size, stock.proj_size
        self.input_size, self.batch_first = stock.input_size, stock.batch_first
        self.dropout, self.bidirectional = stock.dropout, stock.bidirectional

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        """Return True if all weights are parameters of the module itself."""
        assert isinstance(module, nn.RNNBase)
        # The list of names is private; the public `all_weights` only has the tensors.
        return own_parameters(module).keys() == set(module._flat_weights_names)

    def forward(
        self, input: Tensor | PackedSequence, hx: Any = None
    ) -> tuple[Tensor | PackedSequence, Tensor | State]:
        """Compute outputs and final states for a batch of sequences; see `nn.LSTM.forward`.

        Raises:
            ShapeError: the input or a state has the wrong shape.
        """
        packed = input if isinstance(input, PackedSequence) else None
        x = input.data if isinstance(input, PackedSequence) else input
        if x.shape[-1] != self.input_size or x.ndim not in ((2,) if packed is not None else (2, 3)):
            raise ShapeError(
                f"{self.type_name} needs a sequence or a batch of sequences whose last dimension is "
                f"input_size={self.input_size}, got {tuple(x.shape)}."
            )
        alone = packed is None and x.ndim == 2
        x = x.unsqueeze(0 if self.batch_first else 1) if alone else x
        batch = int(packed.batch_sizes[0]) if packed is not None else x.shape[0 if self.batch_first else 1]
        states = self._states(x, hx, batch, None if packed is None else packed.sorted_indices, alone)
        if is_observed(*(self.get_submodule(name) for name in self.layer_names)):
            y, states = self._stepwise(x, None if packed is None else packed.batch_sizes, states)
        else:
            y, states = self._fused(x, None if packed is None else packed.batch_sizes, states)
        if packed is not None:
            back = packed.unsorted_indices
            states = states if back is None else tuple(state.index_select(1, back) for state in states)
        elif alone:
            y = y.squeeze(0 if self.batch_first else 1)
            states = tuple(state.squeeze(1) for state in states)
        after = states if self.mode == "LSTM" else states[0]
        if packed is None:
            return y, after
        return PackedSequence(y, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices), after

    def flatten_parameters(self) -> None:
        """Do nothing: on a GPU, each call copies the weights to one block of memory anyway."""

    def _states(self, x: Tensor, hx: Any, batch: int, order: Tensor | None, alone: bool) -> State:
        """Check the initial states and sort them like the batch; return zeros if no states are given.

        Each state has shape `(layers * directions, batch, size)`.
        """
        count = self.num_layers * (2 if self.bidirectional else 1)
        sizes = [self.proj_size or self.hidden_size, *([self.hidden_size] if self.mode == "LSTM" else [])]
        if hx is None:
            return tuple(x.new_zeros(count, batch, size) for size in sizes)
        given = hx if isinstance(hx, tuple | list) else (hx,)
        states = tuple(state.unsqueeze(1) if alone else state for state in given)
        wanted = [(count, batch, size) for size in sizes]
        if [tuple(state.shape) for state in states] != wanted:
            raise ShapeError(
                f"{self.type_name} needs initial states of shape {wanted}, got "
                f"{[tuple(state.shape) for state in states]}; leave hx out to start from zeros."
            )
        return states if order is None else tuple(state.index_select(1, order) for state in states)

    def _fused(self, x: Tensor, sizes: Tensor | None, states: State) -> tuple[Tensor, State]:
        suffixes = (suffix for layer in range(self.num_layers) for suffix in self._suffixes_of(layer))
        flat = [t for suffix in suffixes for t in self._weights(suffix)]
        flat = in_one_chunk(flat) if x.is_cuda else flat
        hx = states if self.mode == "LSTM" else states[0]
        options = (self.bias, self.num_layers, self.dropout, self.training, self.bidirectional)
        run = _FUSED[self.mode]
        if sizes is None:
            y, *after = run(x, hx, flat, *options, self.batch_first)
        else:
            y, *after = run(x, sizes, hx, flat, *options)
        return y, tuple(after)

    def _weights(self, suffix: str) -> list[Tensor]:
        """Collect the weights and biases of one layer and direction, in the order of the fused operation."""
        biases = [getattr(self, f"bias_{x}_{suffix}") for x in ("ih", "hh")] if self.bias else []
        ih, hh, *rest = (
            dense_matrix(self.get_submodule(f"matrix_{x}_{suffix}"))
            for x in ("ih", "hh", *(["hr"] if self.proj_size else []))
        )
        return [ih, hh, *biases, *rest]

    def _stepwise(self, x: Tensor, sizes: Tensor | None, states: State) -> tuple[Tensor, State]:
        """Compute the result of `_fused` by calling the layers in every time step."""
        rows = x.transpose(0, 1) if self.batch_first and sizes is None else x
        counts = [rows.shape[1]] * len(rows) if sizes is None else sizes.tolist()
        rows = rows.flatten(0, 1) if sizes is None else rows
        after: list[State] = []
        for layer in range(self.num_layers):
            outputs = []
            for suffix in self._suffixes_of(layer):
                start = tuple(state[len(after)] for state in states)
                y, end = self._direction(rows, counts, start, suffix)
                outputs.append(y)
                after.append(end)
            rows = torch.cat(outputs, dim=1)
            if self.dropout and self.training and layer < self.num_layers - 1:
                rows = F.dropout(rows, self.dropout)
        y = rows if sizes is not None else rows.unflatten(0, (len(counts), -1))
        y = y.transpose(0, 1) if self.batch_first and sizes is None else y
        return y, tuple(torch.stack(each) for each in zip(*after, strict=True))

    def _suffixes_of(self, layer: int) -> list[str]:
        return [f"l{layer}", *([f"l{layer}_reverse"] if self.bidirectional else [])]

    def _direction(self, rows: Tensor, counts: list[int], state: State, suffix: str) -> tuple[Tensor, State]:
        """Run one layer in one direction.

        Args:
            rows: concatenated inputs of all time steps, shape `(sum(counts), in)`.
            counts: number of sequences in each time step, which never increases.
            state: states before the first step, each of shape `(batch, size)`.
            suffix: suffix of the names of the linear layers.
        """
        given = self._applied("ih", suffix, rows).split(counts)
        steps = range(len(counts))
        outputs: list[Tensor] = [rows] * len(counts)
        for step in reversed(steps) if suffix.endswith("_reverse") else steps:
            # Sequences that have ended (or, in the reverse direction, not begun) keep their state.
            now = tuple(each[: counts[step]] for each in state)
            new = self._cell(given[step], now, suffix)
            state = tuple(torch.cat([x, each[counts[step] :]]) for x, each in zip(new, state, strict=True))
            outputs[step] = new[0]
        return torch.cat(outputs), state

    def _applied(self, which: str, suffix: str, x: Tensor) -> Tensor:
        y = self.get_submodule(f"matrix_{which}_{suffix}")(x)
        return y + getattr(self, f"bias_{which}_{suffix}") if self.bias else y

    def _cell(self, given: Tensor, state: State, suffix: str) -> State:
        """Compute the next state from the current state and `given = W_ih x + b_ih`."""
        hidden = state[0]
        own = self._applied("hh", suffix, hidden)
        if self.mode == "LSTM":
            i, f, g, o = (given + own).chunk(4, dim=1)
            cell = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
            y = o.sigmoid() * cell.tanh()
            return (self.get_submodule(f"matrix_hr_{suffix}")(y) if self.proj_size else y, cell)
        if self.mode == "GRU":
            r, z, n = given.chunk(3, dim=1)
            own_r, own_z, own_n = own.chunk(3, dim=1)
            update = (z + own_z).sigmoid()
            return ((1 - update) * (n + (r + own_r).sigmoid() * own_n).tanh() + update * hidden,)
        return ((given + own).tanh() if self.mode == "RNN_TANH" else (given + own).relu(),)


def in_one_chunk(tensors: list[Tensor]) -> list[Tensor]:
    """Copy tensors to one block of memory, matrices first; otherwise cuDNN would copy them and warn."""
    order = sorted(range(len(tensors)), key=lambda k: tensors[k].ndim == 1)
    chunk = torch.cat([tensors[k].reshape(-1) for k in order])
    parts = chunk.split([tensors[k].numel() for k in order])
    placed = {k: part.view(tensors[k].shape) for k, part in zip(order, parts, strict=True)}
    return [placed[k] for k in range(len(tensors))]
