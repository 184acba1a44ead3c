"""Hypothesis strategies, laws and slow references for property-testing tensor networks."""
