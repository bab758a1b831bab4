"""One cluster for the whole session, and a folder to submit from for each test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.conftest import finished, forks, prepared, whole_hash  # noqa: F401
from tests.slurm import cluster


@pytest.fixture(scope="session", autouse=True)
def _cluster() -> Iterator[None]:
    """Skip every test with the reason if no cluster can be started."""
    try:
        cluster.script("start")
        yield
    finally:
        cluster.script("stop")


@pytest.fixture
def mended() -> Iterator[None]:
    """Clean up after a test that breaks nodes: no job remains, and all nodes are usable."""
    yield
    cluster.script("reset")


@pytest.fixture
def folder(tmp_path: Path, prepared: Path) -> Path:  # noqa: F811
    return cluster.furnish(tmp_path, prepared)
