"""Errors that a user can mend, each with the exit code that scripts and schedulers rely on.

| code | meaning |
|---|---|
| 0 | done |
| 1 | a crash, or a difference that was found |
| 2 | usage or configuration (singletons too) |
| 3 | data invalid |
| 4 | checkpoints exist and none is valid |
| 6 | a hang, from the ranks that wait |
| 75 | stopped on request, resumable |
"""

from __future__ import annotations

from typing import Self

HANG_EXIT_CODE = 6


class MpidpError(Exception):
    """An error whose message says what, where and how to mend it; printed without a traceback."""

    exit_code = 1
    everywhere = False  # True once every rank holds it: rank 0 alone prints, all ranks leave together

    @classmethod
    def on_every_rank(cls, message: str) -> Self:
        """The error as every rank raises it alike."""
        error = cls(message)
        error.everywhere = True
        return error


class UsageError(MpidpError):
    """A wrong command line, configuration or launch."""

    exit_code = 2


class DataError(MpidpError):
    """Sources or shards that cannot be trained on."""

    exit_code = 3


class CheckpointError(MpidpError):
    """Checkpoints exist and none can be used."""

    exit_code = 4


class Stopped(MpidpError):
    """Stopped on request after a checkpoint; the same command goes on."""

    exit_code = 75


class Damaged(MpidpError):
    """The run returns to its last checkpoint: replicas differ and there is no majority, or batch after batch makes no update."""

    next_batch = 0  # the run continues with this batch and skips those before; 0: with the batch that follows the checkpoint

    @classmethod
    def at_batch(cls, message: str, next_batch: int) -> Self:
        """The error as every rank raises it alike; the run continues with next_batch."""
        error = cls.on_every_rank(message)
        error.next_batch = next_batch
        return error
