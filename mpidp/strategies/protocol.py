"""What train.fit asks of a strategy. A new method is a new file that keeps to this; the loop gets no branch for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from mpi4py import MPI
from torch import Tensor

from mpidp.comm.reducers import Look
from mpidp.state import Entry


@dataclass(frozen=True)
class StepStats:
    """What an update came to: the norm of the averaged gradient before clipping; skipped when it was not
    finite, or when no target token was in the batch."""

    grad_norm: float
    skipped: bool


class Accumulates(Protocol):
    """What the engine needs: somewhere for gradients to go."""

    def micro_batch(self, v: int, last: bool) -> AbstractContextManager[None]:
        """Backward of micro-batch v runs inside; last: the rank's last of this step. Independent."""


class Strategy(Accumulates, Protocol):
    """How gradients become updates, together."""

    compute_comm: MPI.Intracomm  # the ranks that share the lanes

    def start(self) -> None:
        """Once, before the first step or after a restore. Collective over compute_comm."""

    def watch(self, looks: Sequence[Look]) -> None:
        """In the step that begins, show each of these every lane that this rank computes. Independent."""

    def discard(self) -> None:
        """Forget the gradients of the step that has begun: it is done again. Independent."""

    def step(self, lr: float, tokens: int) -> StepStats:
        """Turn the step's gradients into an update; tokens: target tokens of the global batch. Collective."""

    def finish(self) -> None:
        """Drain what is in flight: afterwards there is one common model. Collective."""

    def state_dict(self) -> dict[str, Entry]:
        """Everything but the parameters that an exact resume needs. Independent."""

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Independent."""

    def close(self) -> None:
        """Give shared memory back: parameters and state are gone with it. Collective over compute_comm."""
