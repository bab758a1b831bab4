"""Decides which contributions are summed in each round of a quorum. The decision depends on the order of arrival. Pure.

Every rank computes some of the lanes (fixed sequences of micro-batches) of each batch. It contributes its gradient of batch 0,
then of batch 1, and so on. Round i makes the update of batch i. Round i closes when

1. the ranks that have contributed to batch i have at least `needed` lanes in total,
2. the contributions contain target tokens (some lanes of an epoch's last batch are empty), and
3. no rank is more than `staleness` batches behind.

At a meeting (a step at which all ranks synchronize), the round closes only when all contributions have arrived. A contribution
that arrives after its round has closed joins the next round. Therefore every contribution is summed exactly once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from mpidp.errors import MpidpError


class RoundTracker:
    """Decides which contributions (gradients of one rank for one batch) are summed in each round, from one meeting (step at
    which all ranks synchronize) to the next. Independent."""

    def __init__(
        self, lanes: Sequence[int], needed: int, staleness: int, order: Sequence[Sequence[int]] | None = None
    ) -> None:
        """`lanes`: number of lanes of each rank. `needed`, `staleness`: as at the top of this file. `order`: None, or in a
        replay one list per round: the rank of each contribution in the round."""
        self.lanes, self.needed, self.staleness = lanes, needed, staleness
        self.round = 0  # the round that closes next, and also the number of its batch
        self.given = [0] * len(lanes)  # number of contributions received from each rank
        self._waiting = [deque[float]() for _ in lanes]  # target tokens of the contributions that have not joined a round
        self._order = None if order is None else deque(order)
        self._synchronizes = False

    def add(self, rank: int, tokens: float, synchronizes: bool) -> None:
        """Record the next contribution of rank `rank`. `tokens`: the number of target tokens in the contribution.
        `synchronizes`: whether all ranks synchronize at this step."""
        self._waiting[rank].append(tokens)
        self.given[rank] += 1
        if self.given[rank] > self.round:
            self._synchronizes = synchronizes

    def close_round(self) -> tuple[list[int], float, bool] | None:
        """Close the next round if possible. Return (number of contributions of each rank, number of target tokens, whether all
        ranks synchronize in this round). Return None if the round cannot close yet. In a replay, raises MpidpError if the
        ranks of the replayed run synchronized at other steps."""
        joining = [len(waiting) for waiting in self._waiting]
        if self._order is not None:
            joining = self._repeated()
            if any(len(waiting) < count for waiting, count in zip(self._waiting, joining, strict=True)):
                return None
        elif not self._enough():
            return None
        left = [len(waiting) - count for waiting, count in zip(self._waiting, joining, strict=True)]
        if self._synchronizes and (any(left) or min(self.given) <= self.round):
            raise MpidpError(
                "strategy.replay: this run synchronizes at a step where the replayed run did not. Set strategy.meet_every and "
                "train.steps as in that run"
            )
        if self._order is not None:
            self._order.popleft()
        tokens = sum(waiting.popleft() for waiting, count in zip(self._waiting, joining, strict=True) for _ in range(count))
        self.round += 1
        return joining, tokens, self._synchronizes

    def _enough(self) -> bool:
        present = sum(lanes for lanes, given in zip(self.lanes, self.given, strict=True) if given > self.round)
        behind = self.round + 1 - min(self.given)  # batches by which the slowest rank is late
        something = behind == 0 or any(map(sum, self._waiting))
        return present >= self.needed and something and behind <= (0 if self._synchronizes else self.staleness)

    def _repeated(self) -> list[int]:
        if not self._order:
            raise MpidpError(
                "strategy.replay: the replayed run synchronized after fewer steps than this run. Set strategy.meet_every and "
                "train.steps as in that run"
            )
        return [list(self._order[0]).count(rank) for rank in range(len(self.lanes))]
