"""What all tests share."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

# No deadline: a shared machine is slow now and then, and a slow example is no wrong example.
_SHARED = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("test", max_examples=100, **_SHARED)
settings.register_profile("soak", max_examples=1000, **_SHARED)
settings.load_profile("soak" if os.environ.get("ORC_SOAK") else "test")
