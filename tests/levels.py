"""Which tests run at which level. Set by the environment variable MPIDP_LEVEL; tests/conftest.py applies it.

| level | tests |
|---|---|
| quick | tier 1: `make test` |
| rest | tier 2: what `make check` adds |
| check | tiers 1 and 2: the default of `make mpi`, `make faults`, ... and of pytest |
| long | all tiers: `make long` |

A test is in tier 1 unless it is marked `check` (tier 2) or `long` (tier 3). Tests in tests/faults that start whole commands
(with the fixtures shell or either) are in tier 2 unless they are marked `quick`. The rows of a parametrized test in TABLES are
spread over the tiers: every n-th row is in tier 1, every m-th of the others in tier 2, the rest in tier 3. Every test in a
table keeps at least one row in tier 1. Rows under Open MPI are never in tier 1. MPIDP_EVERY replaces m.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

LEVELS = {"quick": {1}, "rest": {2}, "check": {1, 2}, "long": {1, 2, 3}}

# (start of the test's id, n, m). The first entry that matches counts.
TABLES: tuple[tuple[str, int, int], ...] = (
    ("tests/methods/test_cells.py", 4, 1),
    ("tests/methods/test_compress.py::test_nothing_is_lost", 3, 1),
    ("tests/methods/test_compress_resume.py::test_crashed_and_gone_on_at_the_same", 12, 1),
    ("tests/methods/", 12, 4),
    ("tests/hybrid/test_meshes.py", 12, 4),
    ("tests/hybrid/test_adapters.py", 42, 8),
    ("tests/hybrid/test_interleave.py", 12, 4),
    ("tests/hybrid/test_muon.py", 16, 4),
    ("tests/hybrid/test_slices.py::test_every_mesh", 14, 5),
    ("tests/hybrid/test_slices.py", 10, 4),
    ("tests/hybrid/test_sharded_slices.py", 10, 4),
    ("tests/hybrid/test_model_options.py::test_gradients", 3, 2),
    ("tests/hybrid/test_model_options.py::test_every_mesh", 15, 5),
    ("tests/hybrid/test_model_options.py::test_every_model_is", 15, 5),
    ("tests/hybrid/test_model_options.py", 6, 2),
    ("tests/hybrid/test_whole_replicas.py", 12, 4),
    ("tests/hybrid/test_sharding.py::test_no_level_changes_a_bit_on", 6, 2),
    ("tests/hybrid/test_sharding.py::test_no_level", 6, 4),
    ("tests/hybrid/test_sharding.py", 2, 1),
    ("tests/hybrid/test_reports.py", 4, 1),
    ("tests/hybrid/test_init_from.py::test_every_mesh_trains", 15, 4),
    ("tests/hybrid/test_init_from.py", 3, 1),
    ("tests/mpi/test_nccl.py", 4, 4),
    ("tests/mpi/test_saver.py::test_what_is_saved", 4, 1),
    ("tests/mpi/test_reducers.py::test_buckets", 7, 3),
    ("tests/mpi/test_reducers.py::test_losses", 2, 1),
    ("tests/mpi/test_audit.py", 4, 2),
    ("tests/mpi/test_strategy.py", 3, 1),
    ("tests/mpi/test_overlap.py", 3, 1),
    ("tests/laws/test_elastic.py", 8, 4),
    ("tests/laws/test_skipped.py", 8, 4),
    ("tests/laws/test_ranks.py", 2, 1),
    ("tests/laws/test_fences.py", 3, 1),
    ("tests/laws/test_resume.py", 3, 1),
    ("tests/laws/test_finetune.py", 3, 1),
    ("tests/laws/test_families.py::test_a_fine_tune", 12, 2),
    ("tests/laws/test_families.py::test_the_number_of_ranks", 32, 4),
    ("tests/laws/test_families.py", 32, 2),
    ("tests/unit/test_families.py", 13, 1),
    ("tests/unit/test_chats.py::test_ids_and_masks", 4, 1),
    ("tests/unit/test_codes.py", 3, 1),
    ("tests/unit/test_trackers.py::test_a_fault", 4, 1),
    ("tests/unit/test_family_fields.py::test_no_field", 10, 1),
    ("tests/unit/test_family_fields.py::test_odd", 8, 1),
    ("tests/laws/test_adapters_on.py", 2, 1),
    *((f"tests/faults/test_{name}.py", 3, 1) for name in (
        "bad_data", "bad_models", "bad_sources", "checkpoints", "hostile", "replay",
    )),
    *((f"tests/faults/test_{name}.py", 8, 4) for name in (
        "c10d", "crashes", "disks", "doctor", "hangs", "recovery", "respawn", "stopping", "table", "usage",
    )),
    ("tests/faults/", 8, 1),
)


def level() -> str:
    """Return the level of this run. Raises ValueError for an unknown one. Independent."""
    name = os.environ.get("MPIDP_LEVEL") or ("long" if os.environ.get("MPIDP_LONG") == "1" else "check")
    if name not in LEVELS:
        raise ValueError(f"MPIDP_LEVEL={name}: choose one of {', '.join(LEVELS)}")
    return name


def tiers_of_rows(test: str, rows: Sequence[str]) -> list[int]:
    """Return the tier of each row of a parametrized test. test: its id without the row; rows: the rows' ids. Pure."""
    shift = sum(map(ord, test))  # so that tests with few rows do not all keep the first
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
    """Return the tier of each collected test. ids: pytest's; marks: the names of each test's markers, and
    whole_command (conftest.py). Pure."""
    tables: dict[str, list[int]] = {}
    for i, name in enumerate(ids):
        tables.setdefault(name.partition("[")[0], []).append(i)
    found = [1] * len(ids)
    for test, members in tables.items():
        rows = [ids[i].partition("[")[2] for i in members]
        for i, tier in zip(members, tiers_of_rows(test, rows), strict=True):
            later = "check" in marks[i] or ("whole_command" in marks[i] and "quick" not in marks[i])
            found[i] = max(tier, 3 if "long" in marks[i] else 2 if later else 1)
    return found
