"""The parameter server: N workers compute gradients, and M servers store and update slices of the parameters and optimizer state.

A worker pushes slices of its gradient to the servers, and waits until they answer with the updated slices of the parameters.
There is no global barrier. See Li 2014, "Scaling Distributed Machine Learning with the Parameter Server", section 3. The last M
ranks are the servers, which compute no gradients. The other ranks are the workers, which store no optimizer state.

| mode | a server applies | a server answers |
|---|---|---|
| sync | the sum of all workers' gradients of a batch, added in order of workers | after the update |
| async | every push when it arrives | immediately |
| ssp | every push when it arrives | when the worker is at most `staleness` batches ahead of the slowest worker (Ho 2013) |

In modes async and ssp, every push makes an update. If the worker computes n of the B sequences of a batch, the learning rate is
lr n / B. So the rates of all pushes of a batch add up to lr. The rate is then divided by 1 + floor(u / N), where u is the number
of updates since the worker received its parameters. See Zhang 2016, "Staleness-aware Async-SGD", eq. 6. Here the delay is in
units of N updates.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from torch import Tensor

from mpidp.checkpoint.entry import Entry
from mpidp.comm.buffers import buf
from mpidp.comm.slices import NORM_BLOCK, global_norm, norm_of_squares, squares_of_blocks
from mpidp.comm.transport import pieces
from mpidp.errors import MpidpError
from mpidp.strategies.protocol import StepStats, StrategyOptions
from mpidp.strategies.synchronous import Synchronous

HEADER, GRADIENT, ANSWER, PARAMETERS = range(4)  # tags of MPI messages
WORKER, BATCH, TOKENS, VERSION, LR = range(5)  # fields of a header, float64
PendingReceive = tuple[MPI.Request, Tensor | None, Tensor | None]  # (request, wire tensor, destination)
ANSWERED, NORM, SKIPPED = range(3)  # fields of an answer: version of the slice; the other two are for mode sync


class Server(Synchronous):
    """Implements the parameter server. A worker pushes slot 0 (the first flat gradient) of its gradient buffer. A server
    receives gradients in slot 1 of its own gradient buffer. Its slot 0 holds the gradient of the next update."""

    survives_failures = False
    synchronizes_always = False

    def __init__(self, *parts: Any, **more: Any) -> None:
        """Take the arguments of Synchronous. The reducer must have a single gradient buffer. Collective over comm."""
        super().__init__(*parts, **more)
        self._comm, size = self.reducer.comm, self.compute_comm.size
        self._workers, self._servers = size - self.options.servers, self.options.servers
        me = self.compute_comm.rank - self._workers
        self._mine = slice(self._bounds[me], self._bounds[me + 1]) if me >= 0 else None
        self._among = self.compute_comm.Split(int(me >= 0), self.compute_comm.rank)  # the servers, or the workers
        self._versions = [0] * self._servers  # version of each slice on this worker
        self._version = 0  # number of updates of this server's slice
        self._pushed = 0  # number of batches that a worker has pushed, or a server has received from all workers
        self._clocks = [0] * self._workers  # number of pushes received from each worker
        self._waiting: dict[int, int] = {}  # the batch pushed by each worker that waits for an answer
        self._steps = 0
        self._stats = StepStats(0.0, False)
        self._arrived: list[int] = []  # workers, in the order of their pushes since the last meeting
        self._expected: deque[int] = deque()  # the workers whose pushes come next in a replay
        lanes, mine = self.reducer.lanes, self.reducer.shares.ranges[self.compute_comm.rank]
        self._share = sum(len(lanes.sequences(v)) for lane in mine for v in lanes.micro_batches(lane)) / lanes.global_batch

    def optimizer_share(self) -> dict[str, Any] | None:
        """On a server, return keyword arguments for the class `Optimizer`. The arguments state which slice (index range) of
        the parameters this server updates. On a worker, return None, because workers update nothing. Independent."""
        index, servers = self.compute_comm.rank - self.compute_comm.size + self.options.servers, self.options.servers
        self._bounds = self.bounds(servers, NORM_BLOCK)
        return {"share": (index, servers), "bounds": self._bounds} if index >= 0 else None

    def more_slots(self, options: StrategyOptions) -> int:
        """Return 1 on servers, which receive gradients in an additional gradient buffer (slot). Return 0 on workers.
        Independent."""
        return int(self.compute_comm.rank >= self.compute_comm.size - options.servers)

    def step(self, lr: float, tokens: int, limit: float = math.inf) -> StepStats:
        """On a worker, push the gradient and wait for the answers. On a server, receive, apply and answer pushes, until the
        pushes of this batch from all workers are applied. `tokens`: number of target tokens in this rank's micro-batches. All
        ranks must call step() the same number of times. Collective over compute_comm at a meeting (a step at which all ranks
        synchronize)."""
        synchronizes = self.synchronizes_at(self._steps + 1)
        if self._mine is None:
            stats = self._work(lr, tokens, limit, synchronizes)
        else:
            stats = self._serve(limit, synchronizes)
        self._pushed += 1
        self._steps += not stats.skipped
        return replace(stats, extra=self._publish_all()) if synchronizes else stats

    # Workers

    def _work(self, lr: float, tokens: int, limit: float, synchronizes: bool) -> StepStats:
        self.reducer.observers.enter("reduce")
        gradient, sync = self.buffer.flat[0], self.options.mode == "sync"
        scale, norm = self.nominal_tokens / max(1, tokens), 0.0
        if not sync:  # every push makes its own update, so the gradient is clipped or skipped here
            norm = global_norm(gradient) * scale if tokens else 0.0
            if not (math.isfinite(norm) and norm <= limit):
                tokens = 0
            gradient.mul_(scale * (self.clip / norm if self.clip and norm > self.clip else 1.0))
        with self.reducer.transport.timed():
            # Start the receives first. Otherwise a server could wait until a worker, which is still pushing to another server,
            # receives its answer.
            pulls = [self._begin_pull(server, parameters=not synchronizes) for server in range(self._servers)]
            self._push(gradient, lr if sync else lr * self._share, tokens)
            for server, (answer, parts) in enumerate(pulls):
                self._end_pull(parts)
                self._versions[server] = int(answer[ANSWERED])
        self.reducer.discard()
        return StepStats(float(answer[NORM]), bool(answer[SKIPPED])) if sync else StepStats(norm, False)

    def _push(self, gradient: Tensor, lr: float, tokens: int) -> None:
        wire = self.reducer.transport
        for server in range(self._servers):
            header = np.array([self.compute_comm.rank, self._pushed, tokens, self._versions[server], lr])
            self._comm.Send(header, self._workers + server, HEADER)
            for start, stop in pieces(self._bounds[server], self._bounds[server + 1]):
                piece = wire.load(gradient[start:stop], "push")
                self._comm.Send(buf(piece), self._workers + server, GRADIENT)
                wire.sent_bytes += piece.nbytes

    def _begin_pull(self, server: int, parameters: bool) -> tuple[np.ndarray, list[PendingReceive]]:
        answer, rank = np.zeros(3), self._workers + server
        parts: list[PendingReceive] = [(self._comm.Irecv(answer, rank, ANSWER), None, None)]
        for start, stop in pieces(self._bounds[server], self._bounds[server + 1]) if parameters else ():
            piece = self.flat[start:stop]
            wire = self.reducer.transport.load(piece, ("pull", start))
            parts.append((self._comm.Irecv(buf(wire), rank, PARAMETERS), wire, piece))
        return answer, parts

    def _end_pull(self, parts: list[PendingReceive]) -> None:
        for request, wire, piece in parts:
            self.group.wait(request)
            if wire is not None and piece is not None:
                self.reducer.transport.store(wire, piece)

    # Servers

    def _serve(self, limit: float, synchronizes: bool) -> StepStats:
        if self.options.mode == "sync":
            return self._serve_all(limit, synchronizes)
        while min(self._clocks) <= self._pushed:
            header = np.zeros(5)
            self.reducer.observers.enter("reduce")
            with self.reducer.transport.timed():
                self.group.wait(self._comm.Irecv(header, self._next(), HEADER))
            self._arrived.append(int(header[WORKER]))
            self._receive_push(header)
            self._apply(header)
            self._waiting[int(header[WORKER])] = int(header[BATCH])
            self._clocks[int(header[WORKER])] += 1
            self._answer_ready(synchronizes)
        return self._stats

    def _next(self) -> int:
        """Return the rank from which to receive the next push, or MPI.ANY_SOURCE. In a replay, it is the worker whose push was
        next in the replayed run."""
        if not self.options.arrivals:
            return MPI.ANY_SOURCE
        if not self._expected:
            next_sync = min((step for step in self.options.arrivals if step > self._steps), default=-1)
            order = self.options.arrivals.get(next_sync, [[]] * self._servers)[self.compute_comm.rank - self._workers]
            if not order:
                raise MpidpError(f"strategy.replay: the replayed run ended at step {self._steps}. Lower train.steps")
            self._expected.extend(order)
        return self._expected.popleft()

    def _receive_push(self, header: np.ndarray) -> None:
        assert self._mine is not None
        transport, arrived = self.reducer.transport, self.buffer.flat[1]
        with transport.timed():
            for start, stop in pieces(self._mine.start, self._mine.stop):
                wire = transport.load(arrived[start:stop], "receive")
                self.group.wait(self._comm.Irecv(buf(wire), int(header[WORKER]), GRADIENT))
                transport.store(wire, arrived[start:stop])

    def _apply(self, header: np.ndarray) -> None:
        """Apply a push. Skip it if it has no target tokens, or if its gradient is not finite."""
        self.reducer.observers.enter("apply")
        arrived = self.buffer.flat[1, self._mine]
        norm = float(torch.linalg.vector_norm(arrived))
        if not header[TOKENS] or not math.isfinite(norm):
            return
        self.buffer.total[self._mine] = arrived
        rounds = (self._version - int(header[VERSION])) // self._workers
        assert self.optimizer is not None
        self.optimizer.step(float(header[LR]) / (1 + max(0, rounds)))
        self._version += 1
        self._stats = StepStats(norm, False)

    def _answer_ready(self, synchronizes: bool) -> None:
        """Answer the waiting workers that may continue. At a meeting (a step at which all ranks synchronize), answers contain
        no parameters, because _publish_all() sends the parameters to all ranks."""
        slowest = min(self._clocks)
        for worker, batch in list(self._waiting.items()):
            last = synchronizes and batch == self._pushed
            if last or self.options.mode == "async" or batch + 1 - slowest <= self.options.staleness:
                del self._waiting[worker]
                self._answer(worker, self._stats, parameters=not last)

    def _answer(self, worker: int, stats: StepStats, parameters: bool) -> None:
        assert self._mine is not None
        wire = self.reducer.transport
        with wire.timed():
            self._comm.Send(np.array([self._version, stats.grad_norm, stats.skipped], dtype=np.float64), worker, ANSWER)
            for start, stop in pieces(self._mine.start, self._mine.stop) if parameters else ():
                piece = wire.load(self.flat[start:stop], "answer")
                self._comm.Send(buf(piece), worker, PARAMETERS)
                wire.sent_bytes += piece.nbytes

    def _serve_all(self, limit: float, synchronizes: bool) -> StepStats:
        """In mode sync, add the gradients of a batch from all workers, in order of workers. Scale the sum to the mean over target
        tokens, clip it by its norm over all servers, and make the update."""
        self.reducer.observers.enter("reduce")
        total, header, tokens, lr = self.buffer.total[self._mine], np.zeros(5), 0.0, 0.0
        total.zero_()
        for worker in range(self._workers):
            with self.reducer.transport.timed():
                self.group.wait(self._comm.Irecv(header, worker, HEADER))
            self._receive_push(header)
            tokens, lr = tokens + header[TOKENS], header[LR]
            total.copy_(self.buffer.flat[1, self._mine]) if worker == 0 else total.add_(self.buffer.flat[1, self._mine])
        scale = self.nominal_tokens / max(1.0, tokens)
        norm = self._norm_over_servers() * scale
        skipped = not (tokens and math.isfinite(norm) and norm <= limit)
        if not skipped:
            if self.clip and norm > self.clip:
                scale *= self.clip / norm
            if scale != 1.0:
                total.mul_(scale)
            self.reducer.observers.enter("apply")
            assert self.optimizer is not None
            self.optimizer.step(lr)
            self._version += 1
        stats = StepStats(norm, skipped)
        for worker in range(self._workers):
            self._answer(worker, stats, parameters=not synchronizes)
        return stats

    def _norm_over_servers(self) -> float:
        squares = torch.zeros(self.flat.numel() // NORM_BLOCK, dtype=torch.float64)
        assert self._mine is not None
        if self._mine.start < self._mine.stop:
            own = squares_of_blocks(self.buffer.total[self._mine]).cpu()
            squares[self._mine.start // NORM_BLOCK : self._mine.stop // NORM_BLOCK] = own
        if self._servers > 1:
            with self.reducer.transport.timed():
                self.group.wait(self._among.Iallreduce(MPI.IN_PLACE, buf(squares)))
        return norm_of_squares(squares)

    # All ranks

    def _publish_all(self) -> dict[str, Any]:
        """At a meeting (a step at which all ranks synchronize), broadcast every server's slice of the parameters. Return the
        field for metrics.jsonl with the order of pushes, or {} in mode sync. Collective over compute_comm."""
        self.reducer.observers.enter("publish")
        wire = self.reducer.transport
        with wire.timed():
            for server in range(self._servers):
                for start, stop in pieces(self._bounds[server], self._bounds[server + 1]):
                    piece = wire.load(self.flat[start:stop], "publish")
                    self.group.wait(self.compute_comm.Ibcast(buf(piece), self._workers + server))
                    wire.store(piece, self.flat[start:stop])
                    wire.sent_bytes += piece.nbytes if self.compute_comm.rank == self._workers + server else 0
        rows = self.compute_comm.allgather((self._version, self._arrived))[self._workers :]
        self._versions, self._arrived = [version for version, _ in rows], []
        return {} if self.options.mode == "sync" else {"arrivals": [order for _, order in rows]}

    def state_dict(self) -> dict[str, Entry]:
        """Return the numbers of steps and batches so far. On a server, also return its slice of the optimizer state.
        Independent."""
        steps = {"steps": Entry(torch.tensor([self._steps, self._pushed]))}
        if self._mine is None:
            return steps
        assert self.optimizer is not None
        index, size = self.compute_comm.rank - self._workers, self.flat.numel()
        slices = {
            f"server{name}": Entry(flat[self._mine], "sharded", (self._mine.start,), (size,))
            for name, flat in self.optimizer.moments().items() if self._mine.start < self._mine.stop
        }
        counts = torch.tensor([[self.optimizer.updates, self._version]])
        return steps | slices | {"server/updates": Entry(counts, "sharded", (index, 0), (self._servers, 2))}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load the state. The saved run may have had other numbers of servers and workers. Independent."""
        self._steps, self._pushed = map(int, state["steps"])
        self._clocks = [self._pushed] * self._workers
        updates, self._version = (int(one) for one in state["server/updates"].max(0).values)
        self._versions = [self._version] * self._servers
        if self._mine is not None:
            assert self.optimizer is not None
            self.optimizer.set_updates(updates)
            for name, flat in self.optimizer.moments().items():
                flat[self._mine] = state[f"server{name}"][self._mine].to(flat.device)

    def close(self) -> None:
        """Free the communicator and the memory. Collective over compute_comm."""
        self._among.Free()
        super().close()
