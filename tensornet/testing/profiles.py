"""Hypothesis profiles: how many examples a law is tried on, and whether they are reproducible."""

from __future__ import annotations

from hypothesis import HealthCheck, settings


def register_profiles() -> None:
    """Register the profiles `default`, `ci` and `nightly` with hypothesis.

    Select one with `settings.load_profile(name)`; this project's own tests read the name from the
    environment variable `HYPOTHESIS_PROFILE`.

    - `default`: 50 random examples, for work at the desk.
    - `ci`: 25 examples, derandomised, so that the same commit always gives the same verdict.
    - `nightly`: 1000 random examples, to look for what the others miss.

    None has a deadline: the first call of an operation plans or compiles and is slower than the rest.
    """
    slow_data = [HealthCheck.too_slow, HealthCheck.data_too_large]
    settings.register_profile("default", max_examples=50, deadline=None, suppress_health_check=slow_data)
    settings.register_profile(
        "ci",
        max_examples=25,
        deadline=None,
        derandomize=True,
        database=None,
        print_blob=True,
        suppress_health_check=slow_data,
    )
    settings.register_profile("nightly", max_examples=1000, deadline=None, suppress_health_check=slow_data)
