"""The fixtures of tests/faults: shards, a finished run and its hash, a folder for each test."""

from tests.faults.conftest import finished, forks, place, prepared, whole_hash  # noqa: F401
