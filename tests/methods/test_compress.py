"""Laws of compression: at any time, applied values and residuals add up to the true sum, even with skipped steps; all ranks hold
the same bits; the predicted number of bytes is sent; and training reaches the same result as without compression."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from mpi4py import MPI
from torch import Tensor

from mpidp.checkpoint.local_parameters import weights_sha256
from mpidp.comm.group import alone
from mpidp.comm.transport import Messages
from mpidp.data.lanes import Lanes
from mpidp.errors import UsageError
from mpidp.reducers.buckets import GradientBuffer
from mpidp.reducers.compression.codes import CODES
from mpidp.reducers.compression.compressed import Compressed, method_of
from mpidp.reducers.compression.topk import count
from mpidp.runtime.topology import make_topology
from mpidp.strategies.synchronous import Synchronous
from mpidp.training.balance import Even, Terms
from tests.mpi.test_strategy import run_batch
from tests.registries import COMPRESSIONS
from tests.tiny import WORLD, at, corpus, job_at, sizes, tiny, train_at

pytestmark = pytest.mark.mpi

CPU = torch.device("cpu")
SHAPES = {"a": (3, 50), "b": (65,), "c": (1,), "d": (20, 30), "e": (64,), "f": (12, 2, 9)}
NAMES = COMPRESSIONS
WAYS = [(name, 0.0, 0) for name in NAMES] + [("topk", 0.9, 0), ("randomk", 0.9, 0), ("topk", 0.0, 3), ("randomk", 0.5, 3)]


def reducer_of(
    comm: MPI.Intracomm, name: str, momentum: float = 0.0, warmup: int = 0, bucket_bytes: int = 1500, shapes: Any = None,
    ratio: float = 0.1,
) -> Compressed:
    """Return a reducer with buffers of these shapes. Collective over comm."""
    group = alone(make_topology(comm))
    shares = Even(Terms(8, comm.size, comm.rank))
    reducer = Compressed(group, Lanes(8, 1), Messages(CPU), shares, 1, method_of(name, ratio, warmup, 2, 7), 7, momentum)
    named = [(name, torch.nn.Parameter(torch.zeros(shape))) for name, shape in (shapes or SHAPES).items()]
    reducer.attach(GradientBuffer(named, 1, bucket_bytes, lambda n: group.memory(n, CPU), group.node.rank))
    return reducer


def gradient(reducer: Compressed, number: int) -> Tensor:
    """Return this rank's flat gradient in round `number`, with zeros between parameters. Magnitudes differ strongly between
    buckets, and a component is common to all ranks."""
    flat = torch.zeros(reducer.buffer.num_elements)
    common = torch.Generator().manual_seed(number)
    own = torch.Generator().manual_seed(1000 * reducer.comm.rank + number + 17)
    for i, view in enumerate(reducer.buffer.layout.views(flat)):
        view += 10.0 ** (i % 5 - 2) * (torch.randn(view.shape, generator=common) + torch.randn(view.shape, generator=own))
    return flat


def summed(reducer: Compressed, flat: Tensor, applied: bool = True) -> Tensor:
    """Run one round. Collective over all ranks."""
    total = flat.clone()
    for bucket in reducer.buffer.buckets:
        reducer.sum(total, bucket)
    reducer.end_round(applied)
    return total


def over_ranks(comm: MPI.Intracomm, tensor: Tensor) -> Tensor:
    """Return the sum over ranks in float64. Collective over comm."""
    return torch.from_numpy(sum(comm.allgather(tensor.double().numpy())))


def by_bucket(reducer: Compressed, flat: Tensor) -> list[float]:
    return [float(flat[bucket.start : bucket.stop].abs().max()) for bucket in reducer.buffer.buckets]


class Books:
    """Accounts for inputs, outputs and residuals, and checks the law."""

    def __init__(self, reducer: Compressed) -> None:
        self.reducer, self.comm = reducer, reducer.comm
        self.given = self.applied = torch.zeros(reducer.buffer.num_elements, dtype=torch.float64)
        self.sizes = [0.0] * len(reducer.buffer.buckets)  # the largest absolute value on any rank per bucket, summed over rounds

    def enter(self, gradient: Tensor, total: Tensor) -> None:
        """Record a round that was applied. Collective over comm."""
        held = self.reducer.held["residual"]
        largest = [max(pair) for pair in zip(by_bucket(self.reducer, gradient), by_bucket(self.reducer, held), strict=True)]
        largest = torch.tensor(self.comm.allgather(largest)).amax(0).tolist()
        self.sizes = [a + b for a, b in zip(self.sizes, largest, strict=True)]
        self.given, self.applied = self.given + over_ranks(self.comm, gradient), self.applied + total.double()

    def hold(self) -> bool:
        """Check the law. Each round adds P + 8 rounding errors of values up to 4 P times the largest on a rank. For powersgd this
        bound is multiplied by the ratio of a matrix column's norm to its largest value. Collective over comm."""
        missing = self.given - self.applied - over_ranks(self.comm, self.reducer.held["residual"])
        size, more = self.comm.size, 8.0 if self.reducer.method.__class__.__name__ == "PowerSGD" else 1.0
        bounds = [more * (size + 8) * 2.0**-24 * 4 * size * one for one in self.sizes]
        return all(one <= bound for one, bound in zip(by_bucket(self.reducer, missing), bounds, strict=True))


@pytest.mark.parametrize(("name", "momentum", "warmup"), WAYS)
def test_nothing_is_lost_and_all_ranks_hold_the_same_bits_and_bytes_are_as_foretold(
    name: str, momentum: float, warmup: int
) -> None:
    def rounds(comm: MPI.Intracomm) -> list[tuple[bool, bytes, int, int]]:
        reducer, found = reducer_of(comm, name, momentum, warmup), []
        books = Books(reducer)
        for number in range(6):
            flat = gradient(reducer, number)
            given = flat if not momentum else reducer.held["velocity"] * momentum + flat  # the value to apply
            foretold = sum(reducer.bytes_sent(bucket) for bucket in reducer.buffer.buckets)
            total = summed(reducer, flat)
            books.enter(given, total)
            bits = total.numpy().tobytes()
            for view in reducer.buffer.layout.views(total):
                view.zero_()
            assert not total.any()  # padding between parameters
            found.append((books.hold(), bits, foretold, reducer.transport.pop_counts()[0]))
        assert any(tensor.any() for tensor in comm.allgather(reducer.held["residual"]))
        reducer.group.close()
        return found

    for n in sizes(1, 2, 3, 4):
        of_ranks = at(n, rounds)
        for of_round in zip(*of_ranks, strict=True):
            assert all(held for held, *_ in of_round), (n, [held for held, *_ in of_round])
            assert len({bits for _, bits, *_ in of_round}) == 1
            assert [foretold for *_, foretold, _ in of_round] == [sent for *_, sent in of_round]
            assert n == 1 or all(sent > 0 for *_, sent in of_round)


@pytest.mark.parametrize("name", NAMES)
def test_as_much_less_is_sent_as_the_code_is_smaller(name: str) -> None:
    """A code sends what it declares for one slice of a bucket. topk and randomk have a ratio of 0.1, powersgd rank 2."""
    values = 256 * 256 + 128
    sparse = {"topk": 0.15, "randomk": 0.1, "powersgd": 0.0175}
    share = sparse[name] if name in sparse else CODES[name].num_bytes(values) / (4 * values)
    assert share < 0.6, "it sends hardly less than float32"

    def sent(comm: MPI.Intracomm) -> tuple[int, int]:
        reducer = reducer_of(comm, name, bucket_bytes=10**9, shapes={"one.w": (256, 256), "one.v": (100,)})
        summed(reducer, gradient(reducer, 0))
        size = 4 * (256 * 256 + 128)
        reducer.group.close()
        return reducer.transport.pop_counts()[0], size

    for n in sizes(2, 3, 4):
        found = at(n, sent)
        plain = 2 * (n - 1) * found[0][1]
        assert share * 0.9 * plain < sum(one for one, _ in found) <= share * 1.02 * plain


@pytest.mark.parametrize(("name", "momentum", "warmup"), WAYS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, 3e38])
def test_a_round_that_is_undone_leaves_no_trace(name: str, momentum: float, warmup: int, bad: float) -> None:
    """A value that is not finite on one rank, or whose sum is not, becomes nan on all ranks and enters no residual. A finite
    round that is undone leaves no trace either."""

    def rounds(comm: MPI.Intracomm, spoilt: int | None) -> tuple[list[bytes], list[Tensor], list[bool]]:
        reducer, seen, nans = reducer_of(comm, name, momentum, warmup), [], []
        for number in range(4):
            if number == spoilt:
                flat = gradient(reducer, 99)
                if comm.rank == comm.size - 1 or bad == 3e38:
                    flat[130] = bad
                before = [tensor.clone() for tensor in reducer.held.values()]
                total = summed(reducer, flat, applied=False)
                nans.append(bool(total.isnan().any()))
                assert all(torch.equal(a, b) for a, b in zip(before, reducer.held.values(), strict=True))
                summed(reducer, gradient(reducer, 98), applied=False)
                assert all(torch.equal(a, b) for a, b in zip(before, reducer.held.values(), strict=True))
            seen.append(summed(reducer, gradient(reducer, number)).numpy().tobytes())
        reducer.group.close()
        return seen, list(reducer.held.values()), nans

    for n in sizes(1, 2, 3):
        clean = at(n, lambda comm: rounds(comm, None))
        for number in (0, 2):
            spoilt = at(n, lambda comm, number=number: rounds(comm, number))
            for (seen, held, nans), (wanted, wanted_held, _) in zip(spoilt, clean, strict=True):
                assert (nans == [True] or bad == 3e38) and seen == wanted
                assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(held, wanted_held, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_finite_enters_no_residual_even_if_nobody_undoes_it(name: str) -> None:
    def rounds(comm: MPI.Intracomm) -> tuple[bool, bool]:
        reducer = reducer_of(comm, name)
        flat = gradient(reducer, 0)
        flat[:: 7 + comm.rank] = math.inf if comm.rank == comm.size - 1 else 1.0
        total = summed(reducer, flat)
        after = summed(reducer, gradient(reducer, 1))
        reducer.group.close()
        nans = all(bool(view.isnan().all()) for view in reducer.buffer.layout.views(total))
        return nans, bool(after.isfinite().all() and reducer.held["residual"].isfinite().all())

    for n in sizes(1, 2, 4):
        assert at(n, rounds) == [(True, True)] * n


@pytest.mark.parametrize("name", NAMES)
def test_a_step_that_failed_is_not_gone_on_from(name: str) -> None:
    """As after a failure: some buckets of the step were summed, others were not."""

    def rounds(comm: MPI.Intracomm, fail: bool) -> bytes:
        reducer = reducer_of(comm, name)
        summed(reducer, gradient(reducer, 0))
        if fail:
            flat = gradient(reducer, 1)
            for bucket in reducer.buffer.buckets[:2]:
                reducer.sum(flat, bucket)
            before, reducer = reducer, reducer_of(comm, name)
            reducer.resume_from(before)
            before.group.close()
        found = [summed(reducer, gradient(reducer, 1)) for _ in range(2)]
        reducer.group.close()
        return torch.cat(found).numpy().tobytes()

    for n in sizes(1, 3):
        assert at(n, lambda comm: rounds(comm, True)) == at(n, lambda comm: rounds(comm, False))


@pytest.mark.parametrize("name", NAMES)
def test_a_new_rank_holds_nothing_and_counts_on_with_the_others(name: str) -> None:
    """Different counters would give different lengths or positions; a different Q would give a different sum."""

    def rounds(comm: MPI.Intracomm) -> tuple[bytes, bool]:
        before, reducer = (reducer_of(comm, name, warmup=9 if name == "topk" else 0) for _ in range(2))
        for number in range(3):
            summed(before, gradient(before, number))
        new = comm.rank == comm.size - 1
        if new:
            before.load_state_dict({})
        reducer.resume_from(None if new else before)
        held = torch.equal(reducer.held["residual"], before.held["residual"])
        books = Books(reducer)
        books.given = over_ranks(comm, reducer.held["residual"])
        total = summed(reducer, flat := gradient(reducer, 3))
        books.enter(flat, total)
        right = held and reducer.rounds == 4 and books.hold()
        for one in (before, reducer):
            one.group.close()
        return total.numpy().tobytes(), right

    for n in sizes(2, 3):
        found = at(n, rounds)
        assert len({total for total, _ in found}) == 1 and all(held for _, held in found)


def test_momentum_is_that_of_deep_gradient_compression() -> None:
    """On one rank, where the second encoding changes nothing: algorithm 1 of Lin 2018, with the momentum factor masking of its
    section 3.2."""

    def rounds(comm: MPI.Intracomm) -> list[Tensor]:
        reducer = reducer_of(comm, "topk", momentum=0.9, shapes={"w": (32, 32)})
        u, v, found = torch.zeros(1024), torch.zeros(1024), []
        for number in range(5):
            flat = gradient(reducer, number)
            u = 0.9 * u + flat[:1024]
            v = v + u
            sent = v.abs() >= v.abs().sort(descending=True).values[count(0.1, 1024) - 1]
            found.append(summed(reducer, flat)[:1024] - v * sent)
            u, v = u * ~sent, v * ~sent
        reducer.group.close()
        return found

    assert all(float(difference.abs().max()) < 1e-5 for difference in at(1, rounds)[0])


def test_bf16_is_close_to_the_true_sum() -> None:
    def error(comm: MPI.Intracomm) -> float:
        reducer = reducer_of(comm, "bf16")
        flat = gradient(reducer, 0)
        total, true, sizes = summed(reducer, flat), over_ranks(comm, flat), over_ranks(comm, flat.abs())
        reducer.group.close()
        return float((((total - true).abs()) / (2.0**-8 * (sizes + true.abs()) + 1e-30)).max())

    for n in sizes(1, 2, 3, 4):
        assert max(at(n, error)) <= 1 + 2.0**-7


def descend(comm: MPI.Intracomm, name: str, forgetful: bool, steps: int = 150) -> tuple[float, float]:
    """Run gradient descent on the sum of the ranks' least-squares problems, whose optima differ. Return the distance to the
    common optimum relative to the initial distance, with and without compression. Collective over comm."""
    reducer = reducer_of(comm, name, shapes={"w": (64, 8)})
    generator = torch.Generator().manual_seed(comm.rank)
    rows = torch.randn(512, 64, generator=generator) / 512**0.5
    true = torch.randn(64, 8, generator=torch.Generator().manual_seed(99))
    wanted = rows @ true + 0.1 * torch.randn(512, 8, generator=generator)
    gram, right = over_ranks(comm, rows.T @ rows).float(), over_ranks(comm, rows.T @ wanted).float()
    best = torch.linalg.solve(gram, right)
    w, plain = torch.zeros(64, 8), torch.zeros(64, 8)
    flat = torch.zeros(reducer.buffer.num_elements)
    for _ in range(steps):
        if forgetful:
            reducer.held["residual"].zero_()
        flat[:512] = (rows.T @ (rows @ w - wanted)).view(-1)
        w -= 0.08 / comm.size * summed(reducer, flat)[:512].view(64, 8)
        plain -= 0.08 / comm.size * (gram @ plain - right)
    reducer.group.close()
    return float((w - best).norm() / best.norm()), float((plain - best).norm() / best.norm())


@pytest.mark.parametrize("name", NAMES)
def test_it_comes_to_the_optimum_as_without_compression(name: str) -> None:
    """With a constant rate. For strong compression, without error feedback it would not converge or take longer."""
    for n in sizes(2, 4):
        found, forgetful = at(n, lambda comm: descend(comm, name, False)), at(n, lambda comm: descend(comm, name, True))
        for (compressed, plain), (without, _) in zip(found, forgetful, strict=True):
            assert plain < 0.01 and compressed < 0.15
            assert name in ("bf16", "fp16", "int8", "int4") or without > 1.5 * compressed


# With a model and training ------------------------------------------------------------------------------------------------

SECTIONS: dict[str, Any] = {"train": {"global_batch": 13, "steps": 30, "eval_every": 0}}


@pytest.mark.parametrize("name", NAMES)
def test_a_model_learns_and_replicas_stay_equal(
    shared_folder: Path, shared_tmp: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, hashes = corpus(shared_folder), []
    real_step = Synchronous.step

    def step(self: Synchronous, *of: Any) -> Any:
        stats = real_step(self, *of)
        hashes.append(weights_sha256(torch.nn.ParameterList(self.parameters)))
        return stats

    plain = train_at(1, tiny(data, shared_tmp / "plain", **SECTIONS))
    monkeypatch.setattr(Synchronous, "step", step)
    ratio = 0.1 if name in ("topk", "randomk") else 0.0
    for n in sizes(2, 4):
        hashes.clear()
        run = train_at(n, tiny(data, shared_tmp / str(n), comm={"compress": name, "ratio": ratio}, **SECTIONS))
        of_ranks = WORLD.allgather(list(hashes))[:n]
        assert len(of_ranks[0]) == 30 and all(other == of_ranks[0] for other in of_ranks)
        first, last = plain.losses[0], sum(plain.losses[-5:]) / 5
        assert sum(run.losses[-5:]) / 5 < last + 0.5 * (first - last)


@pytest.mark.parametrize("name", NAMES)
def test_overlap_changes_no_bit(shared_folder: Path, shared_tmp: Path, name: str) -> None:
    data, runs = corpus(shared_folder), []
    for way in ("none", "thread", "poll", "auto"):  # auto sums during its measurement, and discards the result
        comm = {"compress": name, "overlap": way, "bucket_mb": 0.02}
        runs.append(train_at(sizes(1, 2, 3)[-1], tiny(data, shared_tmp / way, comm=comm, train={"save_every": 2})))
        if name == "powersgd" and WORLD.size == 1:
            return
    assert len({run.sha256 for run in runs}) == 1


@pytest.mark.parametrize("name", NAMES)
def test_a_skipped_batch_leaves_no_trace(shared_folder: Path, shared_tmp: Path, name: str) -> None:
    """Weights, optimizer state and residuals equal those of a run without that batch."""
    config = tiny(corpus(shared_folder), shared_tmp, comm={"compress": name})

    def steps(comm: MPI.Intracomm, spoil: bool) -> tuple[list[bool], str, dict[str, Any]]:
        job = job_at(comm, config)
        skipped = []
        for number in range(4):
            if number == 2 and not spoil:
                continue
            tokens = run_batch(job, number, spoil=7 if number == 2 else -1)
            skipped.append(job.strategy.step(0.01, tokens).skipped)
        state = job.strategy.state_dict()
        return skipped, weights_sha256(job.engine.model), {one: entry.tensor.tolist() for one, entry in state.items()}

    for n in sizes(2, 3):
        found, clean = at(n, lambda comm: steps(comm, True)), at(n, lambda comm: steps(comm, False))
        for (skipped, sha256, state), (_, clean_sha256, clean_state) in zip(found, clean, strict=True):
            assert skipped == [False, False, True, False]
            assert sha256 == clean_sha256 and state == clean_state
            assert any(any(values) for one, values in state.items() if one == "reducer/residual")


def test_powersgd_on_one_rank_is_refused_before_training(shared_folder: Path, shared_tmp: Path) -> None:
    with pytest.raises(UsageError, match="nothing to send"):
        train_at(1, tiny(corpus(shared_folder), shared_tmp / "run", comm={"compress": "powersgd"}))
