"""Work that planning and rounding do once: factorisations, damped moments, sizes of ladders."""

from __future__ import annotations

import pytest
import torch
from quantization.rounding_cases import moment, weight
from torch import nn

import tensornet as tn
from tensornet.compression import candidates, layer_candidates
from tensornet.compression.sensitivity import layer_sensitivity
from tensornet.nn.encoding import Storage
from tensornet.quantization import predict, round_weight
from tensornet.quantization.feedback import Grid
from tensornet.quantization.predict import expected_residuals
from tensornet.topology import Topology


def test_one_and_two_sided_rounding_share_a_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, original = [], torch.linalg.cholesky_ex
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda x: (calls.append(x.shape), original(x))[1])
    round_weight(weight(20, 40, 0), "int4", rows=moment(20, 1), columns=moment(40, 2))
    assert sorted(calls) == [(1, 20, 20), (1, 40, 40)]


def test_layers_that_read_the_same_share_a_damped_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.query(x) * self.key(x)

    seen = []

    def kept(*given: object) -> object:
        seen.append(layer_sensitivity(*given))  # type: ignore[arg-type]
        return seen[-1]

    monkeypatch.setattr(layer_candidates, "layer_sensitivity", kept)
    model = Block()
    stats = tn.calibrate(model, [(torch.randn(64, 32), torch.randint(32, (64,)))])
    tn.plan(model, tn.CompressionConfig(bits_per_weight=4), stats)
    first, second = seen
    assert first.choice.columns is second.choice.columns
    assert first.choice.columns is first.forecast.columns
    assert first.choice.rows is not second.choice.rows


def test_sizes_of_equal_ladders_are_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = Storage.num_bytes
    monkeypatch.setattr(Storage, "num_bytes", lambda s, t, d: (calls.append(t), original(s, t, d))[1])

    def ladder(last: int) -> tuple[Topology, ...]:
        ranks = (1, 2, last)
        return tuple(tn.topologies.low_rank(out_features=9, in_features=7, rank=rank) for rank in ranks)

    def sizes(last: int) -> list[float]:
        key = candidates._Rungs(ladder(last))
        return candidates._sizes(key, Storage(number_format="int4"), torch.float32)[1].tolist()

    assert sizes(4) == sizes(4)
    assert len(calls) == 3
    assert sizes(5)[:2] == sizes(4)[:2]
    assert sizes(5)[2] > sizes(4)[2]
    assert len(calls) == 6


def test_far_tails_count_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the formula without a limit, in double precision."""
    matrix = weight(6, 50, 0)[None]
    grid = Grid(torch.full_like(matrix, 0.02), 128.0, 255)
    matrix[0, 0, 0] = 40.0  # far beyond the grid
    spread = torch.full_like(matrix, 3.0)
    near = expected_residuals(matrix, grid, spread)
    monkeypatch.setattr(predict, "_FAR", 1e300)
    torch.testing.assert_close(near, expected_residuals(matrix, grid, spread), rtol=1e-12, atol=0)
