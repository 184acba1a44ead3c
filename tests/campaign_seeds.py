"""Where the seeds of random campaigns start: at 0, or in the nightly profile at the day.

So every night tries others. `CAMPAIGN_SEED` repeats a night.
"""

from __future__ import annotations

import os
import time

NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"
FIRST_SEED = int(os.environ.get("CAMPAIGN_SEED", time.time() // 86400 * 100_000)) if NIGHTLY else 0
