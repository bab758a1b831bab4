"""Who is in: which contributions each round of a quorum sums, decided in one place from the order in which they come. Pure.

Every rank contributes its part of batch 0, 1, 2, ...; round i makes the update of batch i. It closes when those who contributed
to batch i hold `needed` lanes, something is in to learn from (in an epoch's last batch some lanes are empty), and nobody is more
than `staleness` batches behind; at a meeting, when everything is in. What comes later joins the next round that closes: nothing
is left out, nothing is summed twice.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from mpidp.errors import MpidpError


class RoundTracker:
    """From one meeting to the next. Independent."""

    def __init__(
        self, lanes: Sequence[int], needed: int, staleness: int, order: Sequence[Sequence[int]] | None = None
    ) -> None:
        """lanes: of each rank; order: the ranks that join each round, once for each contribution, in a run that is repeated."""
        self.lanes, self.needed, self.staleness = lanes, needed, staleness
        self.round = 0  # that closes next, and the batch that it is of
        self.given = [0] * len(lanes)  # contributions of each rank that have come: of its batches below this one
        self._waiting = [deque[float]() for _ in lanes]  # target tokens of those that are in no round yet
        self._order = None if order is None else deque(order)
        self._synchronizes = False

    def add(self, rank: int, tokens: float, synchronizes: bool) -> None:
        """The next contribution of a rank: its target tokens; is the batch a meeting's?"""
        self._waiting[rank].append(tokens)
        self.given[rank] += 1
        if self.given[rank] > self.round:
            self._synchronizes = synchronizes

    def close_round(self) -> tuple[list[int], float, bool] | None:
        """How many contributions of each rank join the round that closes now, their target tokens, and whether it is a meeting's;
        None: it must wait. MpidpError when a run that is repeated did otherwise."""
        joining = [len(waiting) for waiting in self._waiting]
        if self._order is not None:
            joining = self._repeated()
            if any(len(waiting) < count for waiting, count in zip(self._waiting, joining, strict=True)):
                return None
        elif not self._enough():
            return None
        left = [len(waiting) - count for waiting, count in zip(self._waiting, joining, strict=True)]
        if self._synchronizes and (any(left) or min(self.given) <= self.round):
            raise MpidpError("strategy.replay: this run meets where the one that it repeats did not")
        if self._order is not None:
            self._order.popleft()
        tokens = sum(waiting.popleft() for waiting, count in zip(self._waiting, joining, strict=True) for _ in range(count))
        self.round += 1
        return joining, tokens, self._synchronizes

    def _enough(self) -> bool:
        present = sum(lanes for lanes, given in zip(self.lanes, self.given, strict=True) if given > self.round)
        behind = self.round + 1 - min(self.given)  # batches, the slowest rank
        something = behind == 0 or any(map(sum, self._waiting))
        return present >= self.needed and something and behind <= (0 if self._synchronizes else self.staleness)

    def _repeated(self) -> list[int]:
        if not self._order:
            raise MpidpError("strategy.replay: the run that it repeats made fewer rounds before it met")
        return [list(self._order[0]).count(rank) for rank in range(len(self.lanes))]
