"""Campaigns of random trials against independent truths: a few here, thousands in the nightly profile.

Every trial draws from a seed of its own, which a failure names (`campaign_seeds`).
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from campaign_seeds import FIRST_SEED, NIGHTLY
from hf.streaming.test_faults_processes import Run, finished_layers, processes  # noqa: F401
from moe.test_block import FEATURES, ROUTERS, by_hand, make_moe
from sharded_folders import HALF, contents, save
from torch import Tensor

import tensornet as tn
import tensornet_hf as th
from tensornet.testing import reference


def seeds(toy: int, night: int) -> Iterator[int]:
    """Seeds of the trials of one campaign; torch, numpy and random start from each."""
    for seed in range(FIRST_SEED, FIRST_SEED + (night if NIGHTLY else toy)):
        torch.manual_seed(seed)
        random.seed(seed)
        yield seed


def random_matrix() -> Tensor:
    """A matrix of any shape, scale and decay of its spectrum, in single or double precision."""
    rows, columns = random.randint(1, 40), random.randint(1, 40)
    inner = random.randint(1, min(rows, columns))
    decay = torch.logspace(0, -random.choice((0, 1, 3, 6)), inner, dtype=torch.float64)
    left, right = (
        torch.randn(rows, inner, dtype=torch.float64),
        torch.randn(inner, columns, dtype=torch.float64),
    )
    matrix = (left * decay) @ right * 10.0 ** random.randint(-6, 6)
    return matrix.to(random.choice((torch.float32, torch.float64)))


def dims(size: int) -> tuple[int, ...]:
    """A random factorization."""
    factors = []
    while size > 1:
        divisors = [d for d in range(2, size + 1) if size % d == 0]
        factors.append(random.choice(divisors))
        size //= factors[-1]
    return tuple(factors) or (1,)


def test_truncated_svd_against_numpy() -> None:
    for seed in seeds(30, 5_000):
        matrix = random_matrix()
        rank = random.randint(1, min(matrix.shape))
        found = tn.truncated_svd(matrix, max_rank=rank, method=random.choice(("auto", "exact", "gram")))
        error = reference.relative_error(matrix, (found.U * found.S) @ found.Vh)
        slack = 1e-5 if matrix.dtype == torch.float32 else 1e-7
        assert error <= reference.best_error(matrix, rank) + slack, seed
        assert error <= found.error + slack, seed


def test_chains_against_numpy() -> None:
    for seed in seeds(30, 5_000):
        matrix = random_matrix()
        out_dims, in_dims = dims(matrix.shape[0]), dims(matrix.shape[1])
        sites = max(len(out_dims), len(in_dims))
        out_dims += (1,) * (sites - len(out_dims))
        in_dims += (1,) * (sites - len(in_dims))
        bond = random.randint(1, 12)
        mpo = tn.MPO.from_matrix(matrix, out_dims=out_dims, in_dims=in_dims, max_bond=bond)
        rebuilt = reference.chain_matrix(mpo.cores)
        slack = 1e-5 if matrix.dtype == torch.float32 else 1e-7
        error = reference.relative_error(matrix, rebuilt)
        assert error <= mpo.error + slack, seed
        cuts = [reference.unfolding(matrix, out_dims, in_dims, k) for k in range(sites - 1)]
        tails = [np.linalg.svd(np.asarray(cut, dtype=np.float64), compute_uv=False)[bond:] for cut in cuts]
        optimum = np.sqrt(sum(float((tail**2).sum()) for tail in tails)) / max(
            float(matrix.double().norm()), 1e-300
        )
        assert error <= optimum + slack, seed  # quasi-optimal: at most the tails of all cuts together
        x = torch.randn(3, matrix.shape[1], dtype=matrix.dtype)
        expected = x.double().numpy() @ rebuilt.T
        np.testing.assert_allclose(
            mpo.apply(x).double().numpy(), expected, rtol=0, atol=1e-4 * abs(expected).max() + 1e-300
        )


def test_mixtures_against_a_loop() -> None:
    for seed in seeds(6, 1_000):
        moe = make_moe(random.choice(ROUTERS), gated=random.random() < 0.5).eval()
        x = torch.randn(random.randint(1, 20), FEATURES, dtype=torch.float64)
        with torch.no_grad():
            torch.testing.assert_close(moe(x), by_hand(moe, x), rtol=1e-6, atol=1e-9, msg=f"seed {seed}")


def test_gradients_of_routers_and_inputs() -> None:
    """Against central differences along a random direction, where the direction changes no routing."""
    tried = 0
    for seed in seeds(9, 1_000):
        moe = make_moe(ROUTERS[seed % 3]).eval()
        moe.router.combine = "prob"  # sums without a gradient, as in "unit", are meant to differ
        x = torch.randn(7, FEATURES, dtype=torch.float64, requires_grad=True)
        weights = torch.randn(7, FEATURES, dtype=torch.float64)
        for tensor in (x, moe.router.weight):
            (gradient,) = torch.autograd.grad((moe(x) * weights).sum(), tensor)
            direction, step = torch.randn_like(tensor), 1e-3
            values, routes = [], []
            with torch.no_grad():
                for sign in (1, -1):
                    tensor += sign * step * direction
                    values.append(float((moe(x) * weights).sum()))
                    routing = moe.router(x)
                    kept = torch.ones_like(routing.weights) if routing.kept is None else routing.kept
                    routes.append(torch.stack((routing.expert_indices, kept.long())))
                    tensor -= sign * step * direction
            if torch.equal(*routes):
                tried += 1
                expected = (values[0] - values[1]) / (2 * step)
                size = float(gradient.norm() * direction.norm())
                assert abs(float((gradient * direction).sum()) - expected) <= 2e-3 * size + 1e-6, seed
    assert tried >= 6


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_kills_of_compress_checkpoint(processes: object, name: str, tmp_path: Path) -> None:  # noqa: F811
    source, config = save(name, tmp_path / "dense"), tn.CompressionConfig(**HALF)
    th.compress_checkpoint(source, tmp_path / "expected", config, max_shard_bytes=6_000)
    expected = contents(tmp_path / "expected")
    for seed in seeds(2, 100):
        out = tmp_path / f"out{seed}"
        for _ in range(random.randint(1, 3)):
            if out.exists():
                break
            run = Run(processes, source, out, config, max_shard_bytes=6_000)
            time.sleep(random.uniform(0, 0.25))
            run.process.kill()
            run.process.join()
        if not out.exists():
            done = finished_layers(out)
            assert th.compress_checkpoint(source, out, config, max_shard_bytes=6_000).resumed == done, seed
        assert contents(out) == expected, seed
