"""Integer cores in several processes: scales and floats train as in one, integers stay what they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import distributed_integer_tasks as tasks
import pytest
import torch
from distributed_tasks import in_processes

RANKS = 2

pytestmark = pytest.mark.slow  # processes of their own


@pytest.mark.parametrize("how", [tasks.ddp, tasks.fsdp], ids=["ddp", "fsdp2"])
def test_training_is_that_of_one_process(
    how: Callable[[int, int], dict[str, tasks.Trained]], tmp_path: Path
) -> None:
    truth = {form: tasks.single(form, RANKS) for form in tasks.FORMS}
    for found in in_processes(how, RANKS, tmp_path):
        for form, (losses, state) in truth.items():
            start, (made_losses, made) = tasks.model_of(form).state_dict(), found[form]
            torch.testing.assert_close(made_losses, losses, rtol=1e-4, atol=1e-5)
            assert made.keys() == state.keys() == start.keys()
            codes = [name for name in start if name.endswith(".codes")]
            assert codes
            for name, before in start.items():
                assert made[name].dtype == before.dtype, name
                torch.testing.assert_close(made[name], state[name], rtol=1e-2, atol=1e-4)
                assert torch.equal(made[name], before) == (name in codes), name
