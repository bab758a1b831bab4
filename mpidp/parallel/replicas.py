"""Arranges the living ranks into replicas after ranks have failed or joined. Imports neither torch nor MPI."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Seat = tuple[int, int]  # (replica, part): the part of the model that a rank holds


@dataclass(frozen=True)
class Replicas:
    """The ranks that train together. A rank is given by its index in the communicator of all living ranks."""

    order: list[int]  # the ranks that train: replica by replica, and within a replica part by part; empty if there are too few
    numbers: list[int]  # permanent number of each living rank
    as_before: bool = True  # whether each replica has the same ranks, in the same order, as a replica before the change
    lost: bool = False  # whether living ranks lack some part, so that the state must come from a checkpoint

    def spares(self) -> list[int]:
        """Return the permanent numbers of the spare ranks, which belong to no replica. Independent."""
        return [number for rank, number in enumerate(self.numbers) if rank not in self.order]


def form_replicas(seats: Sequence[Seat | None], numbers: Sequence[int], parts: int) -> Replicas:
    """Form as many replicas as possible. seats: the seat (replica, part) of each living rank, or None if the rank holds no
    state. numbers: the permanent number of each living rank. parts: number of parts of the model.

    Replicas whose ranks are all alive come first, in ascending order. Ranks of other replicas keep their parts where possible.
    Therefore, if the living ranks hold every part, each rank of the first replica already holds the part that it is assigned.
    Pure."""
    held = {seat: rank for rank, seat in enumerate(seats) if seat is not None}
    lost = bool(held) and len({part for _, part in held}) < parts
    if lost:
        held = {}
    rows: list[list[int | None]] = [
        [held[replica, part] for part in range(parts)] for replica in sorted({replica for replica, _ in held})
        if all((replica, part) in held for part in range(parts))
    ]
    whole, used = len(rows), {rank for row in rows for rank in row}
    holders = [[rank for (_, its), rank in sorted(held.items()) if its == part and rank not in used] for part in range(parts)]
    while len(rows) < len(seats) // parts:
        rows.append([ranks.pop(0) if ranks else None for ranks in holders])
    used = {rank for row in rows for rank in row}
    others = [rank for rank in range(len(seats)) if rank not in used]
    others.sort(key=lambda rank: seats[rank] is not None)  # first those that hold nothing
    order = [others.pop(0) if rank is None else rank for row in rows for rank in row]
    return Replicas(order, list(numbers), len(rows) == whole, lost)
