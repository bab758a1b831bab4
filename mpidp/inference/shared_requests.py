"""Computes, on all ranks, the answers to requests of a program on rank 0. Each batch of requests is computed by one replica.
The batches, and therefore the answers, do not depend on the number of replicas."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from mpidp.data.encoder import Encoder
from mpidp.inference.decode import DecodedText, decode
from mpidp.inference.detokenize import detokenizer_of
from mpidp.inference.loading import Loaded
from mpidp.inference.sampling import Sampling, seed_of
from mpidp.inference.scoring import row_scores
from mpidp.inference.speech import StreamedText
from mpidp.runtime.world import polite_barrier, raise_together

T = TypeVar("T")


@dataclass(frozen=True)
class TextRequest:
    """A request to generate text. ids: the token ids of the prompt. tokens: maximum number of new tokens. stops: strings that
    end the text."""

    ids: list[int]
    tokens: int
    stops: tuple[str, ...] = ()
    sampling: Sampling = Sampling(temperature=0.0)


class SharedRequests:
    """Rank 0 makes requests, and all ranks compute the answers.

    serve() runs a function on rank 0. This function may call scores() and generated(). Inside serve(), the other ranks wait for
    these calls, and compute their part of the batches.
    """

    def __init__(
        self, loaded: Loaded, encoder: Encoder, together: int, progressed: Callable[[], None] = lambda: None
    ) -> None:
        """together: number of requests per batch. progressed: a function that is called after each batch, and repeatedly while
        a rank waits."""
        self.loaded, self.encoder, self._together, self._progressed = loaded, encoder, together, progressed
        self._grid = loaded.grid
        self._failed = False  # whether a batch failed; if so, every rank has raised an error

    def serve(self, work: Callable[[], T]) -> T | None:
        """Run work() on rank 0. Return its result on rank 0, and None on other ranks. If work() or a batch raises an exception
        on any rank, all ranks raise an exception. Collective over loaded.grid.world."""
        result: T | None = None
        self._failed = False
        with raise_together(self._grid.world):
            if self._grid.world.rank == 0:
                try:
                    result = work()
                finally:
                    if not self._failed:
                        self._pass(None)
            else:
                while (request := self._pass(None)) is not None:
                    self._answer(*request)
        return result

    def scores(self, rows: Sequence[tuple[list[int], int]]) -> list[tuple[float, bool]]:
        """For each row (ids, n), return (log-likelihood of the last n ids in nats, whether greedy decoding would generate these
        ids).

        Call this only on rank 0, in the function that serve() runs.
        """
        return self._ask("_score", list(rows), sorted(range(len(rows)), key=lambda i: -len(rows[i][0])))

    def generated(self, requests: Sequence[TextRequest]) -> list[list[int]]:
        """Return the new ids of each request. An id that ends the text is left out. If a stop string ends the text, the ids of
        this string are included.

        Call this only on rank 0, in the function that serve() runs.
        """
        return self._ask("_generate", list(requests), sorted(range(len(requests)), key=lambda i: -len(requests[i].ids)))

    def _ask(self, name: str, given: list[Any], order: list[int]) -> list[Any]:
        self._pass((name, given, order))
        answers = self._answer(name, given, order)
        return [answers[i] for i in range(len(given))]

    def _pass(self, request: tuple[str, list[Any], list[int]] | None) -> Any:
        """Return the argument `request` of rank 0 on all ranks. On other ranks, the argument is ignored. Collective over
        loaded.grid.world."""
        world = self._grid.world
        polite_barrier(world, self._progressed)
        return world.bcast(request if world.rank == 0 else None)

    def _answer(self, name: str, given: list[Any], order: list[int]) -> dict[int, Any]:
        """Call the method `name` with batches of the list `given`. order: the indices of the list, in the order of the
        batches. Return {index: answer} on rank 0, and {} on other ranks. Collective over loaded.grid.world."""
        grid, found, size = self._grid, dict[int, Any](), self._together
        groups = [order[at : at + size] for at in range(0, len(order), size)]
        try:
            with raise_together(grid.world):  # ranks of a replica communicate here, and raise DataError together
                for group in groups[grid.world.rank // grid.parts :: grid.world.size // grid.parts]:
                    found |= zip(group, getattr(self, name)([given[i] for i in group], group), strict=True)
                    self._progressed()
        except BaseException:
            self._failed = True
            raise
        gathered = grid.world.gather(found if grid.model.rank == 0 else {}) or []
        return {i: answer for part in gathered for i, answer in part.items()}

    def _score(self, rows: list[tuple[list[int], int]], _: list[int]) -> list[tuple[float, bool]]:
        found = row_scores(self.loaded, rows)
        if any(math.isnan(score) for score, _ in found):
            raise self.loaded.diverged("log-likelihood")
        return found

    def _generate(self, requests: list[TextRequest], places: list[int]) -> list[list[int]]:
        streams = [StreamedText(detokenizer_of(self.encoder.tokenizer, one.ids), one.stops) for one in requests]
        rows: dict[Sampling, list[DecodedText]] = {}
        for one, place, stream in zip(requests, places, streams, strict=True):
            row = DecodedText(self.loaded.model, one.ids, one.tokens, seed_of(0, place), stream.add)
            rows.setdefault(one.sampling, []).append(row)
        for sampling, together in rows.items():
            decode(self.loaded, together, sampling, self.encoder.table.ends, self.encoder.tokenizer.vocab_size)
        return [stream.ids for stream in streams]
