"""Contractions: planned once, run as pairwise matrix products, with a model of what they cost."""
