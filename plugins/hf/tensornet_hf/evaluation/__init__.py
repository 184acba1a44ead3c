"""Evaluation of saved models: tasks of lm-evaluation-harness, encoders, classifiers, folders compared."""

from tensornet_hf.evaluation.accuracy import Accuracy
from tensornet_hf.evaluation.classifiers import measure_accuracy
from tensornet_hf.evaluation.encoders import EncoderScores, measure_encoder
from tensornet_hf.evaluation.harness import TaskScores, run_tasks
from tensornet_hf.evaluation.images import measure_image_accuracy, read_images

__all__ = [
    "Accuracy",
    "EncoderScores",
    "TaskScores",
    "measure_accuracy",
    "measure_encoder",
    "measure_image_accuracy",
    "read_images",
    "run_tasks",
]
