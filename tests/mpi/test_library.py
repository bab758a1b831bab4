"""Laws of mpidp.library. A training loop on N ranks equals the loop on one rank, bit for bit, and equals a loop without mpidp. A
resumed run equals an uninterrupted run. Every strategy ends with one common model. Wrong loops are rejected on all ranks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mpi4py import MPI
from torch import nn

import mpidp.library as mpidp
from mpidp.errors import UsageError
from tests.tiny import WORLD, at, sizes

pytestmark = pytest.mark.mpi
DATA = [(torch.tensor([i % 7 - 3.0, i % 5 - 2.0, i % 3 - 1.0]), (i * i) % 4) for i in range(53)]  # the fourth batch has 5
BATCH, MICRO = 16, 3


def net(dropout: float = 0.2) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 4))


def begun(comm: MPI.Intracomm, settings: dict[str, Any] | None = None, dropout: float = 0.2, **more: Any) -> mpidp.DataParallel:
    model = net(dropout)
    made: dict[str, Any] = {"steps": 12, "clip": 0.5, "threads": 1} | more
    optimizer = made.pop("optimizer", lambda parameters: torch.optim.AdamW(parameters, 1e-2))
    items = mpidp.from_dataset(DATA, BATCH, MICRO, seed=5)
    return mpidp.DataParallel(model, optimizer, items, settings, comm=comm, **made)


def epochs(optimizer: mpidp.DataParallel, until: int = 12, losses: list[float] | None = None) -> list[float]:
    losses = [] if losses is None else losses
    while optimizer.steps < until:
        for x, y in optimizer.micro_batches():
            optimizer.zero_grad()
            optimizer.backward(F.cross_entropy(optimizer.model(x), y))
            if optimizer.step() and optimizer.steps == until:
                break
        losses.append(optimizer.loss)
    return losses


def whole(settings: dict[str, Any] | None = None, **more: Any) -> Callable[[MPI.Intracomm], Any]:
    """Train and return (hash, losses)."""
    def work(comm: MPI.Intracomm) -> tuple[str, list[float]]:
        optimizer = begun(comm, settings, **more)
        losses = epochs(optimizer)
        updates = getattr(optimizer.strategy.optimizer, "updates", 12)  # with `root` only rank 0 makes updates
        alone = (settings or {}).get("strategy.name") == "local"  # then a rank without items makes no updates
        assert updates == 12 or alone, "what was in flight at the end was applied"
        optimizer.close()
        return optimizer.sha256(), losses

    return work


def test_the_number_of_ranks_changes_no_bit() -> None:
    for more in ({}, {"optimizer": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), "clip": 0.0}):
        found = [one for n in sizes(1, 2, 3, 4) for one in at(n, whole(**more))]
        assert all(one == found[0] for one in found)
        losses = found[0][1]
        assert losses[-1] < losses[0]


def test_it_is_torchs_own_loop() -> None:
    """The reference is torch's loop with one step per batch, on the mean over its items, also for the short batch."""
    optimizer = begun(MPI.COMM_SELF, dropout=0.0, clip=0.0)
    plain, items = copy.deepcopy(net(0.0)), optimizer.items
    adamw, losses = torch.optim.AdamW(plain.parameters(), 1e-2), []
    for batch in range(12):
        read = [DATA[i] for v in range(items.lanes.num_micro_batches) for i in items.indices(batch, v)]
        x, y = torch.stack([a for a, _ in read]), torch.tensor([b for _, b in read])
        adamw.zero_grad()
        loss = F.cross_entropy(plain(x), y)
        loss.backward()
        adamw.step()
        losses.append(loss.item())
    said = epochs(optimizer)
    assert said == pytest.approx([losses[3], losses[7], losses[11]], rel=1e-5)
    for p, q in zip(plain.parameters(), optimizer.model.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-6)


def test_a_mean_over_something_else_than_items() -> None:
    def work(comm: MPI.Intracomm) -> list[float]:
        optimizer, said = begun(comm, clip=0.0, dropout=0.0, optimizer=lambda p: torch.optim.SGD(p, 0.0)), []
        for x, y in optimizer.micro_batches():
            chosen = y == 1
            loss = F.cross_entropy(optimizer.model(x[chosen]), y[chosen])  # NaN if there are no items
            optimizer.backward(loss, int(chosen.sum()))
            if optimizer.step():
                said += [optimizer.loss, optimizer.stats.grad_norm]
        return said[:6]  # full batches only

    model, found = net(0.0), [at(n, work)[0] for n in sizes(1, 3)]
    chosen = [one for one in (DATA[i] for v in range(6) for i in begun(MPI.COMM_SELF).items.indices(0, v)) if one[1] == 1]
    loss = F.cross_entropy(model(torch.stack([x for x, _ in chosen])), torch.tensor([y for _, y in chosen]))
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm().item()
    assert found[0][:2] == pytest.approx([loss.item(), norm], rel=1e-5) and all(one == found[0] for one in found)


METHODS: list[dict[str, Any]] = [
    {"strategy.name": "local", "strategy.sync_every": 2}, {"strategy.name": "local", "strategy.group": "pairs"},
    {"strategy.name": "delayed"}, {"strategy.quorum": 0.5}, {"comm.compress": "topk", "comm.ratio": 0.5},
    {"strategy.name": "local", "comm.compress": "int8"}, {"comm.reducer": "root"},
]  # fmt: skip


@pytest.mark.parametrize("settings", METHODS, ids=str)
def test_every_strategy_ends_with_one_model(settings: dict[str, Any]) -> None:
    n = sizes(1, 2, 3)[-1]
    found = at(n, whole(settings))
    assert len({sha for sha, _ in found}) == 1
    assert sum(losses[-1] for _, losses in found) < sum(losses[0] for _, losses in found)


@pytest.mark.parametrize("settings", [{}, {"comm.compress": "int8"}, {"strategy.name": "local", "strategy.sync_every": 2}, {
    "strategy.name": "delayed", "strategy.meet_every": 2,
}], ids=str)  # fmt: skip
def test_resumed_in_the_middle_of_an_epoch_is_uninterrupted(settings: dict[str, Any]) -> None:
    def work(comm: MPI.Intracomm) -> tuple[str, str, str]:
        first = begun(comm, settings)
        epochs(first, until=6)
        states = comm.allgather(first.state_dict())
        first.close()
        second = begun(comm, settings)
        second.load_state_dict(states[0 if not settings else comm.rank])  # rank 0's for all ranks, or each its own
        epochs(second)
        second.close()
        return second.sha256(), whole(settings)(comm)[0], "" if settings else states[0]

    n = sizes(1, 2)[-1]
    found = at(n, work)
    assert all(resumed == uninterrupted for resumed, uninterrupted, _ in found)
    if not settings:
        def elsewhere(comm: MPI.Intracomm) -> str:
            optimizer = begun(comm)
            optimizer.load_state_dict(found[0][2])
            epochs(optimizer)
            return optimizer.sha256()

        assert set(at(sizes(1, 3)[-1], elsewhere)) == {found[0][0]}


def test_afterwards_the_model_is_an_ordinary_one() -> None:
    def work(comm: MPI.Intracomm) -> bool:
        optimizer = begun(comm)
        epochs(optimizer, until=2)
        before = [p.detach().clone() for p in optimizer.model.parameters()]
        optimizer.close()
        same = all(torch.equal(p, q) for p, q in zip(optimizer.model.parameters(), before, strict=True))
        optimizer.model(DATA[0][0]).sum().backward()
        optimizer.optimizer.step()
        return same and not torch.equal(before[-1], list(optimizer.model.parameters())[-1])

    assert all(at(sizes(1, 2)[-1], work))


def test_all_begin_with_rank_0s_model() -> None:
    def work(comm: MPI.Intracomm) -> str:
        torch.manual_seed(comm.rank)
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        model[1].running_mean += comm.rank
        optimizer = mpidp.DataParallel(model, torch.optim.AdamW, mpidp.from_dataset(DATA, BATCH), comm=comm)
        return optimizer.sha256() + str(model[1].running_mean.tolist())

    assert len({one for n in sizes(1, 2, 3) for one in at(n, work)}) == 1


def left_out_backward(optimizer: mpidp.DataParallel) -> None:
    for _ in optimizer.micro_batches():
        pass


def left_out_step(optimizer: mpidp.DataParallel) -> None:
    for x, y in optimizer.micro_batches():
        optimizer.backward(F.cross_entropy(optimizer.model(x), y))


def twice(optimizer: mpidp.DataParallel) -> None:
    for x, y in optimizer.micro_batches():
        for _ in range(20):
            optimizer.backward(F.cross_entropy(optimizer.model(x), y))


def took_gradients(optimizer: mpidp.DataParallel) -> None:
    for x, y in optimizer.micro_batches():
        loss = F.cross_entropy(optimizer.model(x), y)
        loss.register_hook(lambda _: optimizer.model.zero_grad())
        optimizer.backward(loss)


@pytest.mark.parametrize(("wrong", "said"), [
    (left_out_backward, "backward() was not called"), (left_out_step, "step() was not called"), (twice, "called twice"),
    (took_gradients, "not of the model"),
])  # fmt: skip
def test_a_wrong_loop_is_told_so(wrong: Callable[[mpidp.DataParallel], None], said: str) -> None:
    def work(comm: MPI.Intracomm) -> str:
        with pytest.raises(UsageError) as caught:
            wrong(begun(comm))
        return str(caught.value)

    assert all(said in words for words in at(sizes(1, 2)[-1], work))


@pytest.mark.parametrize(("settings", "more", "said"), [
    ({"strategy.name": "server"}, {}, "strategy.name=server is not supported"), ({"mesh.tp": 2}, {}, "has the key 'mesh.tp'"),
    ({"strategy.name": "local"}, {"steps": 0}, "strategy.name=local does not synchronize"),
    ({"comm.reducer": "tree", "strategy.name": "delayed"}, {}, "be combined"), ({"comm.copies": "node"}, {}, "comm.copies"),
    ({}, {"optimizer": lambda p: torch.optim.LBFGS(p)}, "LBFGS"),
    ({}, {"optimizer": lambda p: torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1)}, "not in the model"),
])  # fmt: skip
def test_what_cannot_be_trained_is_refused(settings: dict[str, Any], more: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        at(sizes(1, 2)[-1], lambda comm: begun(comm, settings, **more))


def test_ranks_must_have_the_same() -> None:
    if WORLD.size < 2:
        pytest.skip("nobody to differ from")

    def other_model(comm: MPI.Intracomm) -> None:
        mpidp.DataParallel(nn.Linear(3, 4 + comm.rank), torch.optim.AdamW, mpidp.from_dataset(DATA, BATCH), comm=comm)

    def other_data(comm: MPI.Intracomm) -> None:
        mpidp.DataParallel(nn.Linear(3, 4), torch.optim.AdamW, mpidp.from_dataset(DATA[comm.rank :], BATCH), comm=comm)

    def too_many(comm: MPI.Intracomm) -> None:
        mpidp.DataParallel(nn.Linear(3, 4), torch.optim.AdamW, mpidp.from_dataset(DATA, BATCH, BATCH), comm=comm)

    for work, said in [(other_model, "parameter 0: rank 0 has"), (other_data, "dataset: rank 0 has"), (too_many, "has only 1")]:
        with pytest.raises(UsageError, match=said):
            at(2, work)
