"""Fixtures of the playbooks: see tests/nfq/memory.py."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest

from sectool.identity.authority import RootAuthority
from tests.nfq import memory
from tests.nfq.memory import NOW_US, MakeHost, Pair


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> RootAuthority:
    return RootAuthority.create(tmp_path_factory.mktemp("ca") / "ca", "lab.example", NOW_US)


@pytest.fixture(scope="session")
def foreign_root(tmp_path_factory: pytest.TempPathFactory) -> RootAuthority:
    return RootAuthority.create(tmp_path_factory.mktemp("foreign") / "ca", "evil.example", NOW_US)


@pytest.fixture(scope="session")
def make_host(root: RootAuthority) -> MakeHost:
    return partial(memory.make_host, root)


@pytest.fixture(scope="session")
def make_pair(root: RootAuthority) -> Callable[[], Pair]:
    """For property tests, which need a fresh pair for each example."""
    return partial(memory.make_pair, root)


@pytest.fixture(params=[False, True], ids=["v4", "v6"])
def pair(request: pytest.FixtureRequest, make_pair: Callable[[], Pair]) -> Pair:
    pair = make_pair()
    pair.v6 = request.param
    return pair
