"""Plugins that tests of settings register."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.stranger_plugins import JudgedPlugin, RankPlugin, registered


@pytest.fixture
def rank() -> Iterator[None]:
    with registered(RankPlugin()):
        yield


@pytest.fixture
def judged() -> Iterator[None]:
    with registered(JudgedPlugin()):
        yield
