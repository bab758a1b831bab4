"""Reads cluster.json, which mpidp.doctor writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypedDict

from mpidp.errors import UsageError
from mpidp.runtime.json_file import read_json


class ClusterFile(TypedDict, total=False):
    """The entries of cluster.json that plans use."""

    ranks: int | None
    ranks_per_node: list[int] | None
    gpus_per_node: list[int] | None
    cores_per_node: list[int] | None
    latency_seconds: float | None
    bandwidth_bytes_per_second: float | None
    between: str | None
    gpu: str | None


def read_cluster(path: Path) -> dict[str, Any]:
    """Return the content of a cluster.json. Raises UsageError if the file cannot be read, or if its content is not what
    mpidp.doctor writes. Independent."""
    try:
        found: dict[str, Any] = read_json(path, ClusterFile)
        for key in ClusterFile.__annotations__:
            values = found.get(key)
            for value in values if isinstance(values, list) else [values]:
                if isinstance(value, (int, float)) and (value < 0 or value == 0 and key == "bandwidth_bytes_per_second"):
                    raise ValueError(f"{key} is {value}")
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} is not a file of mpidp.doctor ({error}). Run mpidp.doctor again") from error
    return found
