"""The training script of docs/guides/train_mixtures.md, started as the guide says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tensornet_moe as tm
from tensornet.topologies import mpo

#: Written by each process at its end, into a file of its own because the processes share one output:
#: a thread that waits for Python while it ends aborts the process. Linux lists a thread for a moment after it
#: has been joined, so that the count is taken again until one thread is left.
THREADS = """
import os, time
def threads():
    tasks = "/proc/self/task"
    return len(os.listdir(tasks)) if os.path.isdir(tasks) else 1
until = time.monotonic() + 60
while threads() > 1 and time.monotonic() < until:
    time.sleep(0.01)
with open(f"threads.{os.environ['RANK']}", "w") as written:
    written.write(str(threads()))
"""
GUIDE = Path(__file__).resolve().parents[3] / "docs" / "guides" / "train_mixtures.md"


@pytest.mark.slow
def test_accelerate_recipe(tmp_path: Path) -> None:
    script = next(part for part in GUIDE.read_text().split("```python\n") if part.startswith("# train.py"))
    (tmp_path / "train.py").write_text(script.partition("```")[0] + THREADS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, "train.py"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        check=False,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert [(tmp_path / f"threads.{rank}").read_text() for rank in range(2)] == ["1", "1"]
    losses = [float(line.split()[1]) for line in done.stdout.splitlines() if line[:1].isdigit()]
    assert len(losses) == 4
    assert losses[-1] < 0.8 * losses[0]
    up, down = mpo(out_dims=(4, 4, 4), in_dims=(2, 4, 2)), mpo(out_dims=(2, 4, 2), in_dims=(4, 4, 4))
    experts = tm.ExpertFFN({"up": tm.SharedCoreExperts(up, 4), "down": tm.SharedCoreExperts(down, 4)})
    model = torch.nn.Sequential(tm.SharedCoreMoE(tm.SwitchRouter(16, 4), experts), torch.nn.Linear(16, 3))
    model.load_state_dict(torch.load(tmp_path / "mixture.pt", weights_only=True))
    assert torch.isfinite(model(torch.randn(5, 16))).all()
