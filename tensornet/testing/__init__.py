"""Hypothesis strategies, laws and slow references for property-testing tensor networks."""

from tensornet.testing import laws, reference, strategies
from tensornet.testing.profiles import register_profiles

__all__ = ["laws", "reference", "register_profiles", "strategies"]
