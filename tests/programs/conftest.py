"""Fixtures: exported models, made once when a test needs them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest

from tests.programs import exports


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], exports.Export]:
    place = tmp_path_factory.mktemp("exports")
    return cache(lambda name: exports.make(name, place))
