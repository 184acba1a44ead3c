"""Matrices are compressed in parts of rows and in any process, with the same result."""

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tensornet._util import _known
from tensornet.compression import tasks as module
from tensornet.compression.apply import compress_layer, relative_gap
from tensornet.compression.plan import LayerPlan
from tensornet.compression.tasks import Task, compress_tasks, one_thread, results, row_parts
from tensornet.linalg.weighted_svd import Weighting
from tensornet.nn.storage import Storage
from tensornet.topologies import dense, low_rank
from tensornet.topology import Topology

COLUMNS = 256


@pytest.fixture(autouse=True)
def _few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PART_ROWS", 16)


def task_of(
    rows: int, number_format: str, *, seed: int = 0, moment: str = "none", topology: Topology | None = None
) -> Task:
    generator = torch.Generator().manual_seed(seed)
    matrix, inputs = (torch.randn(n, COLUMNS, generator=generator) for n in (rows, 512))
    topology = topology or dense(out_features=rows, in_features=COLUMNS)
    layer = LayerPlan("a", (rows, COLUMNS), topology, "max_bytes", None, None, Storage(False, number_format))
    of_rows = torch.rand(rows, generator=generator) + 0.1
    known = {"none": None, "diagonal": of_rows, "full": of_rows.diag()}[moment]
    return Task(matrix, layer, Weighting(known, inputs.T @ inputs / 512), "two_sided")


@given(
    rows=st.integers(17, 70),
    number_format=st.sampled_from(["int4:g32", "int3:g16:s6", "int4:g32:s6:min", "int8", "iq3_s"]),
    moment=st.sampled_from(["none", "diagonal"]),
    seed=st.integers(0, 99),
)
def test_parts_make_the_same_layer(rows: int, number_format: str, moment: str, seed: int) -> None:
    task = task_of(rows, number_format, seed=seed, moment=moment)
    parts = row_parts(task)
    assert [len(part.matrix) for part in parts] == [*[16] * (rows // 16), *[rows % 16] * (rows % 16 > 0)]
    ((layer, error),) = compress_tasks([task], compress_layer)
    whole, _ = compress_layer(*task)
    assert layer.to_matrix().shape == task.matrix.shape
    assert {n: x.dtype for n, x in layer.state_dict().items()} == {
        n: x.dtype for n, x in whole.state_dict().items()
    }
    assert error == pytest.approx(relative_gap(task.matrix, layer.to_matrix()))
    # A part may round to nearest if this is better for its rows, so parts can lose less than the whole.
    lost, limit = (float(task.weighting.cost(task.matrix - x.to_matrix())) for x in (layer, whole))
    assert lost <= limit * (1.01 if moment == "diagonal" else 1 + 1e-5)


def test_rows_that_depend_on_each_other_stay_together() -> None:
    full = task_of(40, "int4:g32", moment="full")
    network = task_of(40, "float", topology=low_rank(out_features=40, in_features=COLUMNS, rank=4))
    few = task_of(16, "int4:g32")
    for task in (full, network, few):
        (only,) = row_parts(task)
        assert only is task


def test_an_executor_begins_with_the_largest_tasks() -> None:
    tasks = [task_of(rows, "int8") for rows in (2, 5, 3)]
    seen: list[int] = []

    def rows(*task: torch.Tensor) -> int:
        seen.append(len(task[0]))
        return len(task[0])

    with ThreadPoolExecutor(1) as executor:
        assert results(tasks, rows, executor) == [2, 5, 3]
    assert seen == [5, 3, 2]
    assert results(tasks, rows, None) == [2, 5, 3]


def test_tasks_with_the_same_inputs_share_factors() -> None:
    """Other tasks do not: what was computed for one of them is freed before the next one."""
    first, second = (task_of(8, "int4:g32", seed=k) for k in (0, 1))
    same = second._replace(weighting=first.weighting)
    plain = [x._replace(weighting=Weighting()) for x in (first, second)]
    tasks = [first, same, second, *plain]
    seen = results(tasks, lambda *task: _known.get(), None)
    kept = [x is y for x, y in pairwise(seen)]
    assert kept == [True, False, False, False]
    assert _known.get() is None


def test_a_single_thread_only_within_the_block() -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with one_thread():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
