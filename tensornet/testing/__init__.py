"""Property tests of tensor networks: hypothesis strategies, laws, and slow reference implementations."""

from tensornet._util import require

require(("hypothesis",), extra="testing", user="tensornet.testing")

from tensornet.testing import laws, reference, strategies  # noqa: E402 - they import hypothesis
from tensornet.testing.strategies import register_profiles  # noqa: E402

__all__ = ["laws", "reference", "register_profiles", "strategies"]
