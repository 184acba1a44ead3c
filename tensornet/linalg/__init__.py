"""Singular value decompositions, plain and weighted, and the decompositions built on them."""
