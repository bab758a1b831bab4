"""Which tests run at which level. Set by the environment variable MPIDP_LEVEL; tests/conftest.py applies it.

| level | tests |
|---|---|
| quick | tier 1: `make test` |
| rest | tier 2: what `make check` adds |
| check | tiers 1 and 2: the default of `make mpi`, `make faults`, ... and of pytest |
| long | all tiers: `make long` |

A test is in tier 1 unless it is marked `check` (tier 2) or `long` (tier 3). The rows of a parametrized test in TABLES are
spread over the tiers: every n-th row is in tier 1, every m-th in tier 2, all others in tier 3. Every test in a table keeps at
least one row in tier 1. MPIDP_EVERY replaces m.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

LEVELS = {"quick": {1}, "rest": {2}, "check": {1, 2}, "long": {1, 2, 3}}

# (start of the test's id, n, m). The first entry that matches counts.
TABLES: tuple[tuple[str, int, int], ...] = (
    ("tests/methods/", 12, 4),
    ("tests/hybrid/test_meshes.py", 12, 4),
    ("tests/hybrid/test_interleave.py", 12, 4),
    ("tests/hybrid/test_whole_replicas.py", 12, 4),
    ("tests/mpi/test_nccl.py", 4, 4),
    ("tests/laws/test_elastic.py", 8, 4),
    ("tests/laws/test_skipped.py", 8, 4),
    *((f"tests/faults/test_{name}.py", 8, 4) for name in (
        "c10d", "crashes", "disks", "doctor", "hangs", "recovery", "respawn", "stopping", "table", "usage",
    )),
)


def level() -> str:
    """Return the level of this run. Raises ValueError for an unknown one. Independent."""
    name = os.environ.get("MPIDP_LEVEL") or ("long" if os.environ.get("MPIDP_LONG") == "1" else "check")
    if name not in LEVELS:
        raise ValueError(f"MPIDP_LEVEL={name}: choose one of {', '.join(LEVELS)}")
    return name


def tiers_of_rows(test: str, rows: Sequence[str]) -> list[int]:
    """Return the tier of each row of a parametrized test. test: its id without the row; rows: the rows' ids. Pure."""
    shift = sum(map(ord, test))  # tests with few rows shall not all keep the first
    found = [1] * len(rows)
    for start, quick, check in TABLES:
        if test.startswith(start):
            check = min(int(os.environ.get("MPIDP_EVERY") or check), len(rows))
            found = [2 if (i + shift) % check == 0 else 3 for i in range(len(rows))]
            here = [i for i, row in enumerate(rows) if "openmpi" not in row]  # `make test` has no second environment
            for i in here[shift % min(quick, len(here) or 1) :: quick]:
                found[i] = 1
            return found
    return [2 if "openmpi" in row else 1 for row in rows]


def tiers(ids: Sequence[str], marks: Sequence[set[str]]) -> list[int]:
    """Return the tier of each collected test. ids: pytest's; marks: the names of each test's markers. Pure."""
    tables: dict[str, list[int]] = {}
    for i, name in enumerate(ids):
        tables.setdefault(name.partition("[")[0], []).append(i)
    found = [1] * len(ids)
    for test, members in tables.items():
        rows = [ids[i].partition("[")[2] for i in members]
        for i, tier in zip(members, tiers_of_rows(test, rows), strict=True):
            found[i] = max(tier, 3 if "long" in marks[i] else 2 if "check" in marks[i] else 1)
    return found
