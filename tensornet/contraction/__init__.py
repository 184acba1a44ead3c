"""Tensor contractions: planned once, run as pairwise matrix products, timed by a cost model."""
