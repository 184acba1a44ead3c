"""Tensor contractions: planned once, executed as pairwise matrix products, with a model of their time."""
