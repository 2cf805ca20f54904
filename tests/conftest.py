"""For all tests: a busy machine is no failure, so hypothesis watches no clock; and how they are shared out."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("sectool", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("sectool")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long tests first, so that none is left alone at the end; and a module's costly fixture is made once.

    Takes effect with `--dist loadgroup --no-loadscope-reorder`, as `./dev test` runs them.
    """
    items.sort(key=lambda item: item.get_closest_marker("long") is None)
    for item in items:
        fixtures = getattr(item, "_fixtureinfo", None)
        known = fixtures.name2fixturedefs.values() if fixtures else ()
        if any(each[-1].scope == "module" for each in known) and not item.get_closest_marker("xdist_group"):
            item.add_marker(pytest.mark.xdist_group(item.path.stem))
