"""Tensor contractions: plan them once, execute them as pairwise matrix products, and predict their time."""
