"""Planned contractions of random networks, hyperedges and indices of size 1 included, against einsum."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from tensornet.contraction.plan import TOKEN, plan_contraction, run
from tensornet.testing import reference

Labels = tuple[str, ...]
Example = tuple[list[Labels], Labels, dict[str, int]]


@st.composite
def equations(draw: st.DrawFn) -> Example:
    """Two to five operands over few labels, so that many labels meet in three and more of them.

    Every label that is summed is carried by at least two operands, as topologies demand.
    """
    labels = [*"abcdef", TOKEN]
    sizes = {label: draw(st.integers(1, 3)) for label in labels}
    count = draw(st.integers(2, 5))
    operands = [tuple(draw(st.lists(st.sampled_from(labels), max_size=4, unique=True))) for _ in range(count)]
    once = {x for x in labels if sum(x in operand for operand in operands) == 1}
    present = sorted({x for operand in operands for x in operand})
    chosen = {x for x in present if x in once or x == TOKEN or draw(st.booleans())}
    return operands, tuple(draw(st.permutations(sorted(chosen)))), sizes


@given(example=equations())
def test_plan_is_the_einsum(example: Example) -> None:
    operands, output, sizes = example
    plan = plan_contraction(operands, output, sizes)
    tokens_in_one = sum(TOKEN in labels for labels in operands) <= 1
    counts = (sizes[TOKEN], 4) if tokens_in_one else (sizes[TOKEN],)
    for tokens in counts:  # a plan serves any number of tokens
        actual = {**sizes, TOKEN: tokens}
        tensors = [torch.randn([actual[x] for x in labels], dtype=torch.float64) for labels in operands]
        number = {label: k for k, label in enumerate(actual)}
        mixed: list[object] = []
        for tensor, labels in zip(tensors, operands, strict=True):
            mixed += [reference.to_numpy(tensor), [number[x] for x in labels]]
        expected = np.einsum(*mixed, [number[x] for x in output])
        result = run(plan, tensors)
        assert result.numel() == expected.size
        np.testing.assert_allclose(result.reshape(expected.shape).numpy(), expected, rtol=1e-10, atol=1e-10)
