"""Evaluation of saved models: tasks of lm-evaluation-harness, encoders, classifiers, folders compared."""

from tensornet_hf.evaluation.classifiers import Accuracy, measure_accuracy
from tensornet_hf.evaluation.encoders import EncoderScores, measure_encoder
from tensornet_hf.evaluation.harness import TaskScores, run_tasks

__all__ = [
    "Accuracy",
    "EncoderScores",
    "TaskScores",
    "measure_accuracy",
    "measure_encoder",
    "run_tasks",
]
