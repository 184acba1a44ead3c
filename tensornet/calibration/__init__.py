"""Calibration: second moments of a model's inputs and gradients, collected on text or data."""

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
