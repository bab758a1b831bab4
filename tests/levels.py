"""Which tests run at which level. Set by the environment variable MPIDP_LEVEL; tests/conftest.py applies it.

| level | tests |
|---|---|
| quick | tier 1: `make test` |
| rest | tier 2: what `make check` adds |
| check | tiers 1 and 2: the default of `make mpi`, `make faults`, ... and of pytest |
| long | all tiers: `make long` |

A test is in tier 1 unless it is marked `check` (tier 2) or `long` (tier 3). Tests in tests/faults that start whole commands
(with the fixtures shell or either) are in tier 2 unless they are marked `quick`. The rows of a parametrized test in TABLES are
spread over the tiers: every n-th row is in tier 1 (no row if n is 0), every m-th of the others in tier 2, the rest in tier 3.
Every test in a table keeps at least one row in tier 1 or 2. Rows under Open MPI are never in tier 1.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

LEVELS = {"quick": {1}, "rest": {2}, "check": {1, 2}, "long": {1, 2, 3}}

# (start of the test's id, n, m). The first entry that matches counts. A test without rows is one row.
TABLES: tuple[tuple[str, int, int], ...] = (
    ("tests/methods/test_cells.py", 0, 2),
    ("tests/methods/test_compress.py::test_nothing_is_lost", 5, 3),
    ("tests/methods/test_compress.py::test_it_comes_to_the_optimum", 0, 5),
    ("tests/methods/test_compress.py::test_a_model_learns", 0, 5),
    ("tests/methods/test_compress.py::test_a_round_that_is_undone", 20, 10),
    ("tests/methods/test_compress_resume.py::test_crashed_and_gone_on_at_the_same", 12, 4),
    ("tests/methods/test_compress_resume.py::test_crashed_and_gone_on_at_another", 0, 5),
    ("tests/methods/test_compress_resume.py::test_another_number", 0, 2),
    ("tests/methods/test_compress_resume.py::test_compression_may_be_turned_on_and_off", 0, 1),
    ("tests/methods/test_foretold.py", 24, 8),
    ("tests/methods/test_quorum.py::test_the_same_arrivals", 0, 1),
    ("tests/methods/test_rhythms.py::test_a_group_of_all", 0, 1),
    ("tests/methods/test_rhythms.py::test_bytes_are_those", 0, 1),
    ("tests/methods/test_rhythms.py::test_a_run_of_fewer_steps", 0, 1),
    ("tests/methods/test_rhythms.py::test_a_batch_in_flight", 0, 1),
    ("tests/methods/test_rhythms.py", 14, 7),
    ("tests/methods/test_server.py::test_in_step_it_goes_on", 0, 1),
    ("tests/methods/", 12, 6),
    ("tests/hybrid/test_meshes.py::test_every_mesh_learns", 24, 12),
    ("tests/hybrid/test_meshes.py::test_positions_in_parts", 0, 4),
    ("tests/hybrid/test_meshes.py::test_evaluate_and_generate", 0, 1),
    ("tests/hybrid/test_meshes.py", 12, 8),
    ("tests/hybrid/test_adapters.py::test_without_slices", 8, 4),
    ("tests/hybrid/test_adapters.py", 0, 21),
    ("tests/hybrid/test_chunked_loss.py::test_every_mesh", 0, 1),
    ("tests/hybrid/test_interleave.py::test_with_cut_layers", 0, 2),
    ("tests/hybrid/test_interleave.py::test_a_run_goes_on", 0, 1),
    ("tests/hybrid/test_interleave.py", 12, 4),
    ("tests/hybrid/test_muon.py::test_servers", 0, 2),
    ("tests/hybrid/test_muon.py", 24, 12),
    ("tests/hybrid/test_slices.py::test_stages_of_a_tied", 0, 6),
    ("tests/hybrid/test_slices.py", 17, 9),
    ("tests/hybrid/test_sharded_slices.py::test_a_gradient", 0, 2),
    ("tests/hybrid/test_sharded_slices.py", 26, 13),
    ("tests/hybrid/test_model_options.py::test_gradients", 12, 4),
    ("tests/hybrid/test_model_options.py::test_every_mesh", 49, 24),
    ("tests/hybrid/test_model_options.py::test_every_model_is", 0, 18),
    ("tests/hybrid/test_model_options.py::test_every_model_resumes", 0, 3),
    ("tests/hybrid/test_model_options.py::test_frozen", 0, 3),
    ("tests/hybrid/test_model_options.py", 12, 4),
    ("tests/hybrid/test_whole_replicas.py", 12, 4),
    ("tests/hybrid/test_sharding.py::test_no_level_changes_a_bit_on", 14, 5),
    ("tests/hybrid/test_sharding.py::test_no_level", 12, 8),
    ("tests/hybrid/test_sharding.py::test_gradients_that_are_not_finite", 0, 2),
    ("tests/hybrid/test_sharding.py::test_any_level_goes_on", 0, 1),
    ("tests/hybrid/test_sharding.py", 2, 1),
    ("tests/hybrid/test_reports.py", 7, 3),
    ("tests/hybrid/test_init_from.py::test_every_mesh_trains", 0, 8),
    ("tests/hybrid/test_init_from.py", 3, 2),
    ("tests/mpi/test_nccl.py::test_a_training", 0, 4),
    ("tests/mpi/test_nccl.py", 4, 4),
    ("tests/mpi/test_saver.py::test_what_is_saved", 0, 2),
    ("tests/mpi/test_reducers.py::test_buckets", 9, 5),
    ("tests/mpi/test_reducers.py::test_losses", 4, 2),
    ("tests/mpi/test_reducers.py", 4, 4),
    ("tests/mpi/test_audit.py::test_every_rank_that_computes", 0, 1),
    ("tests/mpi/test_audit.py::test_nobody_is_suspected", 0, 1),
    ("tests/mpi/test_audit.py::test_every_glitch", 0, 2),
    ("tests/mpi/test_audit.py", 4, 2),
    ("tests/mpi/test_strategy.py", 5, 2),
    ("tests/mpi/test_overlap.py", 4, 2),
    ("tests/mpi/test_library.py::test_a_batch_that_was_left", 3, 2),
    ("tests/mpi/test_kinds.py::test_ranks_and_restarts", 2, 1),
    ("tests/mpi/test_remote_data.py", 0, 1),
    ("tests/mpi/test_examples.py::test_translate", 0, 1),
    ("tests/mpi/test_examples.py::test_masked", 0, 1),
    ("tests/laws/test_elastic.py::test_any_way", 0, 1),
    ("tests/laws/test_elastic.py::test_who_looks", 0, 1),
    ("tests/laws/test_elastic.py::test_the_noise", 0, 1),
    ("tests/laws/test_elastic.py::test_without_audits", 0, 1),
    ("tests/laws/test_elastic.py::test_balance", 18, 6),
    ("tests/laws/test_elastic.py", 8, 4),
    ("tests/laws/test_skipped.py::test_a_gradient_far_larger", 0, 1),
    ("tests/laws/test_skipped.py::test_a_request_to_stop", 0, 1),
    ("tests/laws/test_skipped.py::test_batches_skipped_again", 0, 1),
    ("tests/laws/test_skipped.py::test_a_return_if", 0, 1),
    ("tests/laws/test_skipped.py", 8, 4),
    ("tests/laws/test_ranks.py::test_the_size_of_buckets", 0, 1),
    ("tests/laws/test_ranks.py::test_how_the_data_is_cut", 0, 1),
    ("tests/laws/test_ranks.py", 5, 2),
    ("tests/laws/test_resume.py::test_stopped_before", 0, 1),
    ("tests/laws/test_resume.py::test_crashed_before", 0, 1),
    ("tests/laws/test_resume.py::test_a_target", 0, 1),
    ("tests/laws/test_resume.py::test_two_jobs", 0, 1),
    ("tests/laws/test_resume.py", 4, 2),
    ("tests/laws/test_finetune.py", 4, 2),
    ("tests/laws/test_families.py::test_a_fine_tune", 12, 4),
    ("tests/laws/test_families.py::test_the_number_of_ranks", 32, 8),
    ("tests/laws/test_families.py", 32, 4),
    ("tests/laws/test_adapters_on.py", 2, 1),
    ("tests/unit/test_families.py", 13, 3),
    ("tests/unit/test_chats.py::test_ids_and_masks", 4, 2),
    ("tests/unit/test_codes.py", 3, 2),
    ("tests/unit/test_trackers.py::test_a_fault", 4, 2),
    ("tests/unit/test_trackers.py::test_a_tracker_that_hangs", 0, 1),
    ("tests/unit/test_model.py::test_every_shape_of_a_batch", 0, 1),
    ("tests/unit/test_family_fields.py::test_no_field", 10, 4),
    ("tests/unit/test_family_fields.py::test_odd", 8, 4),
    ("tests/faults/test_checkpoints.py::test_killed_at_each", 0, 1),
    ("tests/faults/test_checkpoints.py::test_the_lock_of_another_host", 0, 1),
    ("tests/faults/test_stopping.py::test_the_old_copy", 0, 1),
    ("tests/faults/test_stopping.py::test_sigusr1_to_one", 0, 1),
    *((f"tests/faults/test_{name}.py", 3, 2) for name in (
        "bad_data", "bad_models", "bad_sources", "checkpoints", "hostile", "replay",
    )),
    *((f"tests/faults/test_{name}.py", 8, 6) for name in (
        "c10d", "crashes", "disks", "doctor", "hangs", "recovery", "respawn", "stopping", "table", "usage",
    )),
    ("tests/faults/test_missing_mpi.py", 8, 3),
    ("tests/faults/test_mesh_recovery.py", 8, 3),
    ("tests/faults/test_workers.py", 8, 3),
    ("tests/faults/test_packaging.py", 8, 2),
    ("tests/faults/", 8, 2),
    ("tests/programs/test_consumers.py::test_a_program_agrees", 0, 4),
    ("tests/programs/test_object_storage.py::test_weights", 0, 2),
    ("tests/programs/test_trackers.py::test_a_dead_server", 0, 3),
)


def level() -> str:
    """Return the level of this run. Raises ValueError for an unknown one. Independent."""
    name = os.environ.get("MPIDP_LEVEL") or ("long" if os.environ.get("MPIDP_LONG") == "1" else "check")
    if name not in LEVELS:
        raise ValueError(f"MPIDP_LEVEL={name}: choose one of {', '.join(LEVELS)}")
    return name


def tiers_of_rows(test: str, rows: Sequence[str], later: bool = False) -> list[int]:
    """Return the tier of each row of a parametrized test. test: its id without the row; rows: the rows' ids; later: no row is
    in tier 1. Pure."""
    shift = sum(map(ord, test))  # so that tests with few rows do not all keep the first
    found = [1] * len(rows)
    for start, quick, check in TABLES:
        if test.startswith(start):
            found = [2 if (i + shift) % min(check, len(rows)) == 0 else 3 for i in range(len(rows))]
            here = [i for i, row in enumerate(rows) if "openmpi" not in row]  # `make test` has no second environment
            for i in here[shift % min(quick, len(here) or 1) :: quick] if quick and not later else ():
                found[i] = 1
            return found
    return [2 if later or "openmpi" in row else 1 for row in rows]


def tiers(ids: Sequence[str], marks: Sequence[set[str]]) -> list[int]:
    """Return the tier of each collected test. ids: pytest's; marks: the names of each test's markers, and
    whole_command (conftest.py). Pure."""
    tables: dict[str, list[int]] = {}
    for i, name in enumerate(ids):
        tables.setdefault(name.partition("[")[0], []).append(i)
    found = [1] * len(ids)
    for test, members in tables.items():
        rows = [ids[i].partition("[")[2] for i in members]
        later = any("check" in marks[i] or ("whole_command" in marks[i] and "quick" not in marks[i]) for i in members)
        for i, tier in zip(members, tiers_of_rows(test, rows, later), strict=True):
            found[i] = 3 if "long" in marks[i] else tier
    return found
