"""For all tests: a busy machine is no failure, so hypothesis watches no clock."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

settings.register_profile("sectool", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("sectool")
