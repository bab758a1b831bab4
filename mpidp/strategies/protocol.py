"""What train.fit asks of a strategy. A new method is a new file that keeps to this; the loop gets no branch for it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from mpi4py import MPI
from torch import Tensor

from mpidp.state import Entry


@dataclass(frozen=True)
class StepStats:
    """What an update came to: the norm of the averaged gradient before clipping; skipped when it was not
    finite, or when no target token was in the batch."""

    grad_norm: float
    skipped: bool


class Strategy(Protocol):
    """How gradients become updates, together."""

    compute_comm: MPI.Intracomm  # the ranks that share the lanes

    def start(self) -> None:
        """Once, before the first step or after a restore. Collective over compute_comm."""

    def micro_batch(self, v: int, last: bool) -> AbstractContextManager[None]:
        """Backward of micro-batch v runs inside; last: the rank's last of this step. Independent."""

    def step(self, lr: float, tokens: int) -> StepStats:
        """Turn the step's gradients into an update; tokens: target tokens of the global batch. Collective."""

    def finish(self) -> None:
        """Drain what is in flight: afterwards there is one common model. Collective."""

    def state_dict(self) -> dict[str, Entry]:
        """Everything but the parameters that an exact resume needs. Independent."""

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Independent."""
