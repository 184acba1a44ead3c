"""Tasks of lm-evaluation-harness, and folders side by side."""

from tensornet_hf.evaluation.harness import TaskScores, run_tasks

__all__ = ["TaskScores", "run_tasks"]
