"""Hypothesis profiles: number of examples and reproducibility."""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, settings


def register_profiles() -> None:
    """Register the profiles `default`, `ci` and `nightly` with hypothesis.

    Select one with `settings.load_profile(name)`; this project's own tests read the name from the
    environment variable `HYPOTHESIS_PROFILE`.

    - `default`: 50 random examples, for work at the desk.
    - `ci`: 25 examples, derandomised, so that the same commit always gives the same verdict.
    - `nightly`: 1000 random examples, to find rare failures.

    No profile has a deadline: the first call of an operation plans or compiles and is slower than the rest.

    Example:
        >>> from hypothesis import settings
        >>> from tensornet.testing import register_profiles
        >>> register_profiles()
        >>> settings.get_profile("ci").max_examples
        25
    """
    # Each option is written out: on a CI machine hypothesis changes the defaults it would inherit.
    common: dict[str, Any] = {
        "deadline": None,
        "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
    }
    settings.register_profile("default", max_examples=50, derandomize=False, **common)
    settings.register_profile(
        "ci", max_examples=25, derandomize=True, database=None, print_blob=True, **common
    )
    settings.register_profile("nightly", max_examples=1000, derandomize=False, **common)
