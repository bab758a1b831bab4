"""Defines the errors that a user can correct, and the exit codes of all commands."""

from __future__ import annotations

from typing import Self

HANG_EXIT_CODE = 6
EXIT_CODES = {  # `mpidp --help` and docs/commands.md show this table
    0: "success, or nothing left to do",
    1: "a crash, or a difference that replay found, or a problem that doctor found",
    2: "invalid usage or configuration; also a launch in which each process is a separate MPI job",
    3: "invalid data",
    4: "checkpoints exist, but none is valid",
    HANG_EXIT_CODE: "a hang: no rank made progress within the time limit",
    75: "stopped on request; the same command resumes the run",
}


class MpidpError(Exception):
    """An error whose message says what is wrong, where, and how to correct the problem. It is printed without a traceback."""

    exit_code = 1
    everywhere = False  # whether every rank raises this error; if so, only rank 0 prints it, and all ranks exit together

    @classmethod
    def on_every_rank(cls, message: str) -> Self:
        """Return an error that every rank raises with the same message."""
        error = cls(message)
        error.everywhere = True
        return error


class UsageError(MpidpError):
    """An error in the command line, the configuration or the launch."""

    exit_code = 2


class DataError(MpidpError):
    """An error in input data, such as shards, texts or a model's files."""

    exit_code = 3


class CheckpointError(MpidpError):
    """Says that there is no checkpoint that can be used."""

    exit_code = 4


class Stopped(MpidpError):
    """Says that the run stopped on request. A training run first saves a checkpoint, from which the same command resumes the
    run."""

    exit_code = 75


class Damaged(MpidpError):
    """Says that the run must return to its last checkpoint. For example, replicas differ and there is no majority, or too many
    batches in a row were skipped."""

    next_batch = 0  # number of the batch with which the run resumes; 0: the first batch after the checkpoint

    @classmethod
    def at_batch(cls, message: str, next_batch: int) -> Self:
        """Return an error that every rank raises with the same message. After the return to the checkpoint, the run continues
        with batch number `next_batch`."""
        error = cls.on_every_rank(message)
        error.next_batch = next_batch
        return error
