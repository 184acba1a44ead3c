"""Calibration: second moments of a model's inputs and gradients, collected on text or data."""

from tensornet.calibration.calibrate import calibrate
from tensornet.calibration.losses import (
    cosine_losses,
    label_losses,
    losses_against,
    output_losses,
    sampled_losses,
)
from tensornet.calibration.stats import CalibrationStats

__all__ = [
    "CalibrationStats",
    "calibrate",
    "cosine_losses",
    "label_losses",
    "losses_against",
    "output_losses",
    "sampled_losses",
]
