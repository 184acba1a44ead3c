"""Calibration: second moments of a model's inputs and gradients, collected on text or data."""
