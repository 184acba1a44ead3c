"""Calibration: run a model on data, and collect second moments of its layers' inputs and gradients."""

from tensornet.calibration.losses import (
    cosine_losses,
    label_losses,
    losses_against,
    output_losses,
    sampled_losses,
)

__all__ = [
    "cosine_losses",
    "label_losses",
    "losses_against",
    "output_losses",
    "sampled_losses",
]
