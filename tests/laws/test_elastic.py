"""Law: the weights and logged values have the same bits, whichever rank computes or adds a lane, and with any transport, number
of copies, speed of ranks, audits and measurements.

Audits also repair the errors that they find. The run then ends with the bits of an undisturbed run, or the error message names
the rank to exclude.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from mpidp.comm.work_stealing import Tickets
from mpidp.errors import MpidpError
from mpidp.training import balance
from tests.registries import OPTIMIZERS
from tests.tiny import WORLD, Ran, corpus, pretended, sizes, small_blocks, tiny, train_at

pytestmark = pytest.mark.mpi
BASE: dict[str, dict[str, Any]] = {
    "model": {"dropout": 0.1}, "train": {"steps": 8, "eval_every": 4, "save_every": 3}, "comm": {"overlap": "none"},
}


@pytest.fixture(autouse=True)
def owners_of_small_slices() -> Iterator[None]:
    """Use small slices, so that every owner has elements to add."""
    with small_blocks():
        yield


def ranks(n: int) -> int:
    """Return n, or the number of available ranks."""
    return min(n, WORLD.size)


def train(n: int, data: Path, folder: Path, /, nodes: int = 1, inject: str = "", **sections: dict[str, Any]) -> Ran:
    """Train on n ranks of `nodes` simulated nodes, with injected faults. Collective over WORLD."""
    merged = {name: BASE.get(name, {}) | sections.get(name, {}) for name in {*BASE, *sections}}
    with pytest.MonkeyPatch.context() as patch, pretended(min(n, nodes)):
        patch.setenv("MPIDP_FAULT", inject)
        return train_at(n, tiny(data, folder, **merged))


@pytest.fixture(scope="module")
def alone(shared_folder: Path) -> Ran:
    """A run on one rank without faults."""
    with small_blocks():
        run = train(1, corpus(shared_folder), shared_folder / "alone")
    assert run.end["step"] == 8 and len(set(run.losses)) == 8 and run.losses[-1] < run.losses[0] - 0.1
    return run


def same(run: Ran, other: Ran) -> None:
    """Assert equal bits of weights and of all logged values."""
    assert run.sha256 == other.sha256
    assert run.learned == other.learned


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Redistribute lanes after few steps."""
    monkeypatch.setattr(balance, "FIRST_STEPS", 2)
    monkeypatch.setattr(balance, "EVERY_STEPS", 2)


@dataclass
class Stolen:
    """The lanes that this rank took from other ranks since the last call."""

    lanes: int = 0

    def everywhere(self) -> int:
        """Evaluate on all ranks together. Collective over WORLD."""
        found, self.lanes = self.lanes, 0
        return int(WORLD.allreduce(found))


@pytest.fixture
def stolen(monkeypatch: pytest.MonkeyPatch) -> Stolen:
    counted, real = Stolen(), Tickets.steal

    def steal(self: Tickets) -> int | None:
        lane = real(self)
        counted.lanes += lane is not None
        return lane

    monkeypatch.setattr(Tickets, "steal", steal)
    return counted


SLOW = "delay:1:1,seconds=0.01"
PATHS = [("window", "node"), ("window", "rank"), ("messages", "rank"), ("messages", "node"), ("auto", "auto")]


@pytest.mark.parametrize("nodes", [1, 2, 3])
@pytest.mark.parametrize("inject", ["", SLOW], ids=["even speed", "a slow rank"])
@pytest.mark.parametrize("kind", list(balance.BALANCES))
def test_balance_path_and_nodes_change_no_bit(
    shared_folder: Path, shared_tmp: Path, alone: Ran, quick: None, stolen: Stolen, kind: str, inject: str, nodes: int
) -> None:
    data, moved = corpus(shared_folder), 0
    for transport, copies in PATHS:
        if kind == "steal" and transport == "messages":
            continue
        n = ranks(4 if transport == "window" else 3)
        if transport == "window" and n <= nodes:
            continue  # no ranks share memory
        run = train(n, data, shared_tmp / f"{transport}{copies}", nodes, inject, train={"balance": kind},
                    comm={"transport": transport, "copies": copies})
        same(run, alone)
        assert run.lines == alone.lines
        taken = stolen.everywhere()
        assert kind == "steal" or not taken
        moved += taken + len(run.events("balance"))
    if inject and not moved and kind != "even":  # other processes slowed the other ranks as much
        run = train(ranks(4), data, shared_tmp / "slower", 1, SLOW.replace("0.01", "0.2"), train={"balance": kind})
        same(run, alone)
        moved = stolen.everywhere() + len(run.events("balance"))
    if inject and WORLD.size >= 4:
        assert (moved > 0) == (kind != "even"), "lanes did change hands, or this says nothing"


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_ranks_that_update_a_share_each_update_as_one(shared_folder: Path, shared_tmp: Path, name: str) -> None:
    data = corpus(shared_folder)
    optim = {"name": name, "weight_decay": 0.3, "clip": 0.5}
    alone = train(1, data, shared_tmp / "alone", optim=optim)
    for n in sizes(2, 3, 5, 8):
        for nodes in (1, 2):
            comm = {"copies": "node", "overlap": "none"}
            run = train(n, data, shared_tmp / f"{n} on {nodes}", nodes, optim=optim, comm=comm)
            same(run, alone)


@pytest.mark.parametrize("way", ["thread", "poll", "auto"])
def test_reducing_early_changes_no_bit(shared_folder: Path, shared_tmp: Path, alone: Ran, way: str) -> None:
    data = corpus(shared_folder)
    for n, nodes, transport in [(2, 1, "messages"), (3, 1, "auto"), (4, 2, "auto"), (5, 3, "auto")]:
        if n > WORLD.size:
            continue
        comm = {"overlap": way, "transport": transport, "bucket_mb": 0.02}
        same(train(n, data, shared_tmp / f"{n} on {nodes}", nodes, comm=comm), alone)


def test_who_looks_changes_nothing(shared_folder: Path, shared_tmp: Path, alone: Ran) -> None:
    """The runs have audits, with one copy per rank and with one copy per node."""
    data = corpus(shared_folder)
    for n, nodes, kind in [(1, 1, "even"), (2, 1, "even"), (3, 1, "steal"), (4, 2, "measured"), (5, 2, "steal"), (8, 3, "even")]:
        if n > WORLD.size:
            continue
        for every in (1, 3):
            run = train(n, data, shared_tmp / f"{n} {every}", nodes, train={"audit_every": every, "balance": kind})
            assert run.lines == alone.lines, (n, nodes, kind, every)


def test_the_noise_scale_is_the_same_floats_at_any_number_of_ranks(shared_folder: Path, shared_tmp: Path, alone: Ran) -> None:
    """The noise scale is computed from values of single lanes, whichever rank computes them. Measuring changes nothing else."""
    data, found = corpus(shared_folder), []
    for n, nodes, kind in [(1, 1, "even"), (2, 1, "steal"), (3, 1, "measured"), (3, 3, "even"), (5, 2, "steal"), (8, 1, "even")]:
        if n <= WORLD.size:
            run = train(n, data, shared_tmp / f"{n} {kind}", nodes, train={"noise_every": 2, "balance": kind})
            assert run.sha256 == alone.sha256
            found.append(run.lines)
    assert all(lines == found[0] for lines in found)
    noises = [{k: v for k, v in line.items() if k.startswith("noise")} for line in found[0] if "train_loss" in line]
    assert [sorted(noise) for noise in noises] == [[], ["noise_scale_tokens", "noise_signal_square", "noise_trace"]] * 4
    assert all(noise["noise_trace"] > 0 for noise in noises if noise)
    plain = [{k: v for k, v in line.items() if not k.startswith("noise")} for line in found[0]]
    assert plain == alone.lines


def test_the_noise_average_goes_along_with_a_checkpoint(shared_folder: Path, shared_tmp: Path) -> None:
    data = corpus(shared_folder)
    train_section = {"noise_every": 1, "steps": 8, "save_every": 4}
    constant = {"schedule": "constant"}
    whole = train(ranks(2), data, shared_tmp / "whole", train=train_section, optim=constant)
    train(ranks(3), data, shared_tmp / "run", train=train_section | {"steps": 5}, optim=constant)
    run = train(1, data, shared_tmp / "run", train=train_section, optim=constant)
    noises = [[line["noise_scale_tokens"] for line in r.lines if "train_loss" in line] for r in (run, whole)]
    assert run.sha256 == whole.sha256 and noises[0] == noises[1]


@st.composite
def ways(draw: st.DrawFn) -> dict[str, Any]:
    """Draw (the configuration of a run, the way in which it is launched)."""
    micro = draw(st.integers(1, 3))
    global_batch = draw(st.integers(2 * micro, 12))
    micro_batches = -(-global_batch // micro)
    lanes = draw(st.sampled_from([0, *range(2, micro_batches + 1)]))
    n = draw(st.integers(min(2, WORLD.size), max(1, min(WORLD.size, lanes or micro_batches))))
    kind = draw(st.sampled_from(list(balance.BALANCES)))
    delayed = draw(st.sampled_from([None, *range(n)]))
    return {
        "run": {"global_batch": global_batch, "micro_batch": micro, "lanes": lanes, "steps": 5, "save_every": 0},
        "n": n,
        "nodes": draw(st.integers(1, n)),
        "inject": "" if delayed is None else f"delay:{delayed}:1,seconds=0.004",
        "train": {
            "balance": kind, "audit_every": draw(st.sampled_from([0, 0, 1, 2])), "noise_every": draw(st.sampled_from([0, 0, 2])),
        },
        "comm": {
            "transport": draw(st.sampled_from(["auto", "auto" if kind == "steal" else "messages"])),
            "copies": draw(st.sampled_from(["auto", "node", "rank"])), "bucket_mb": draw(st.sampled_from([0.001, 0.03, 64.0])),
            "overlap": "none" if kind == "steal" else draw(st.sampled_from(["none", "thread", "poll"])),
        },
    }


NUMBER = count()


@settings(
    max_examples=30, derandomize=True, deadline=None, database=None, phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(how=ways())
def test_any_way_to_run_it_gives_the_bits_of_one_rank(
    shared_folder: Path, shared_tmp: Path, quick: None, how: dict[str, Any]
) -> None:
    """derandomize=True makes all ranks draw the same values."""
    data, number = corpus(shared_folder), next(NUMBER)
    alone = train(1, data, shared_tmp / f"alone{number}", train=how["run"] | {"noise_every": how["train"]["noise_every"]})
    run = train(how["n"], data, shared_tmp / f"run{number}", how["nodes"], how["inject"], train=how["run"] | how["train"],
                comm=how["comm"])
    assert len(run.losses) == 5 and run.sha256 == alone.sha256 and run.lines == alone.lines, how


# Audits -------------------------------------------------------------------------------------------------------------------


def at_least(n: int) -> None:
    if WORLD.size < n:
        pytest.skip(f"it takes {n} ranks")


@pytest.mark.parametrize(
    ("n", "nodes", "copies", "rank", "seen"),
    [(3, 1, "rank", 2, [2]), (3, 1, "auto", 0, [0]), (5, 1, "rank", 3, [3]),
     (5, 3, "node", 2, [2, 3]), (4, 3, "node", 0, [0, 1])],  # 5 ranks on 3 nodes: 2, 2 and 1; 4 ranks on 3 nodes: 2, 1, 1
)
def test_a_flipped_bit_is_mended_from_the_majority(
    shared_folder: Path, shared_tmp: Path, alone: Ran, n: int, nodes: int, copies: str, rank: int, seen: list[int]
) -> None:
    at_least(n)
    inject = f"flip:{rank}:4,tensor=3,bit=20 flip:{rank}:6,tensor=0,bit=31"
    run = train(n, corpus(shared_folder), shared_tmp, nodes, inject, train={"audit_every": 2}, comm={"copies": copies})
    same(run, alone)
    assert [(e["of_step"], e["ranks"], e["then"]) for e in run.events("audit")] == [(4, seen, "repaired"), (6, seen, "repaired")]
    assert [line for line in run.lines if line.get("event") != "audit"] == alone.lines


@pytest.mark.parametrize("step", [2, 6])  # before the first checkpoint, and after it
@pytest.mark.parametrize(("n", "nodes", "copies"), [(2, 1, "rank"), (4, 2, "node"), (3, 2, "node")])
def test_of_two_replicas_the_run_goes_back_to_its_last_checkpoint(
    shared_folder: Path, shared_tmp: Path, alone: Ran, n: int, nodes: int, copies: str, step: int
) -> None:
    at_least(n)
    inject = f"flip:0:{step},tensor=3,bit=20"
    run = train(n, corpus(shared_folder), shared_tmp, nodes, inject, train={"audit_every": 2}, comm={"copies": copies})
    same(run, alone)
    back = run.events("went_back")
    assert len(back) == 1 and f"step {step}" in back[0]["why"] and back[0]["step"] == (0 if step == 2 else 3)


def test_a_checkpoint_is_never_of_replicas_that_differ(shared_folder: Path, shared_tmp: Path, alone: Ran) -> None:
    """Audits are due at step 5, and checkpoints at steps 3 and 6. A bit that flips in step 6 is found before checkpoint 6 is
    written."""
    at_least(2)
    run = train(2, corpus(shared_folder), shared_tmp, inject="flip:1:6,tensor=3,bit=20", train={"audit_every": 5},
                comm={"copies": "rank"})
    same(run, alone)
    assert [(e["step"], "step 6" in e["why"]) for e in run.events("went_back")] == [(3, True)]


@pytest.mark.parametrize("kind", ["even", "steal"])
@pytest.mark.parametrize("n", [2, 3, 4])
def test_a_glitch_is_found_and_its_step_done_again(
    shared_folder: Path, shared_tmp: Path, alone: Ran, n: int, kind: str
) -> None:
    at_least(n)
    run = train(n, corpus(shared_folder), shared_tmp, inject="wrong:1:4",
                train={"audit_every": 4, "balance": kind, "noise_every": 4})
    found = run.events("audit")
    assert [(e["of_step"], e["then"]) for e in found] == [(4, "the step is computed again")] and 1 in found[0]["ranks"]
    quiet = train(n, corpus(shared_folder), shared_tmp / "quiet", train={"audit_every": 4, "balance": kind, "noise_every": 4})
    same(run, quiet)
    assert run.sha256 == alone.sha256


@pytest.mark.parametrize("every", [2, 4])
@pytest.mark.parametrize("n", [3, 4, 5, 8])
def test_a_rank_that_computes_wrongly_again_and_again_is_named(
    shared_folder: Path, shared_tmp: Path, alone: Ran, n: int, every: int
) -> None:
    """The job ends. Without this rank, or with the rank repaired, the run resumes from the last checkpoint."""
    at_least(n)
    data = corpus(shared_folder)
    with pytest.raises(MpidpError, match=r"step 4: .*memory of one of the ranks \[1\] is faulty") as caught:
        train(n, data, shared_tmp, inject="wrong:1:4,until=9", train={"audit_every": every})
    assert (caught.value.exit_code, caught.value.everywhere) == (1, True)
    run = train(n - 1, data, shared_tmp, train={"audit_every": every})
    same(run, alone)
    assert [e["step"] for e in run.events("resume")] == [3]


def test_without_audits_it_would_not_have_been_seen(shared_folder: Path, shared_tmp: Path, alone: Ran) -> None:
    """Without audits, the injected faults change the bits of the result."""
    at_least(3)
    for i, inject in enumerate(["wrong:1:4", "flip:1:4,tensor=3,bit=20"]):
        run = train(3, corpus(shared_folder), shared_tmp / str(i), inject=inject)
        assert run.losses[:4] == alone.losses[:4] and run.losses[4:] != alone.losses[4:]
