"""Ranks of a mesh (mesh.tp, mesh.pp) fail under `mpirun --with-ft ulfm`: the other replicas continue, and the result does not
change.

| when | expected | checked |
|---|---|---|
| one rank, in any phase, on dp x tp, dp x pp, dp x pp x tp | 0, the ranks of its replica wait as spares | as in test_recovery |
| ranks of two replicas, with different parts | 0, the rest forms one replica | same |
| another rank later | 0, the spare takes its place | same |
| every rank with one part; Muon with mesh.tp | 0, return to the last checkpoint in the same processes | hash, `went_back` |
| all but one | 1, a message; resumes on another mesh | code, output, hash |
| a spare rank | 0 | as in test_recovery |
| one rank, with faults.respawn | 0, full size again | same |
| a STOP file, a wrong batch, while a rank waits | 75; resumes | code, hash |

MPIDP_SOAK=N runs the whole table N times, and N random failures.
"""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.faults.commands import SLOWLY, Forks, Shell, expect
from tests.faults.test_recovery import SETTINGS, SOAK, dead, learned, lines_of, undisturbed  # noqa: F401
from tests.faults.test_recovery import start as start_ulfm
from tests.faults.test_respawn import came
from tests.faults.test_respawn import start as start_respawning

Learned = list[tuple[Any, ...]]
TP, PP = ("--mesh.tp=2",), ("--mesh.pp=2",)


@pytest.fixture
def shell(place: Path) -> Shell:
    return Shell(place, "openmpi")


@pytest.fixture(scope="session")
def with_tp(prepared: Path) -> Learned:
    """The results with mesh.tp=2 and without failures. With mesh.pp they are those of one rank."""
    done = Shell(prepared).train(*SETTINGS, *TP, "--run.dir=with_tp", ranks=2)
    assert done.code == 0, done
    return learned(lines_of(prepared / "with_tp"))


# The faults, the mesh, the number of ranks, the number of nodes, and the ranks that are lost in the job.
ROWS: dict[str, tuple[str, tuple[str, ...], int, int, list[int]]] = {
    "a stage, in an update": ("kill:2:3:apply", PP, 4, 1, [2]),
    "half of a layer, in a sum": ("kill:1:4:reduce,after=0.001", TP, 4, 1, [1]),
    "different stages of both replicas, in an update": ("kill:0:3:apply kill:3:3:apply", PP, 4, 1, [0, 3]),
    "a spare takes the place": ("kill:1:2:publish kill:4:4:reduce", TP, 6, 1, [1, 4]),
    "one part shares memory, the other does not": ("kill:3:2:compute kill:4:2:compute kill:0:5:apply", TP, 6, 2, [0, 3, 4]),
    "a stage, in its backward passes": ("kill:1:3:compute,after=0.01", PP, 4, 1, [1]),
    "an evaluation, a checkpoint": ("kill:1:3:evaluate kill:5:4:checkpoint", PP, 6, 1, [1, 5]),
    "both kinds of parts": ("kill:6:2:publish", (*TP, *PP), 8, 2, [6]),
    "interleaved stages": ("kill:2:2:comm_wait", (*PP, "--mesh.interleave=2", "--model.num_layers=4"), 4, 1, [2]),
    "sequence parallelism": ("kill:0:5:publish", (*TP, "--mesh.sequence=true"), 4, 1, [0]),
    "messages": ("kill:3:3:apply", (*TP, "--comm.transport=messages"), 4, 1, [3]),
    "a copy a rank": ("kill:3:3:apply", (*PP, "--comm.copies=rank"), 4, 1, [3]),
    "a loss in chunks": ("kill:0:3:update", (*TP, "--train.loss=chunked"), 4, 1, [0]),
    "audits": ("kill:0:4:compute", (*PP, "--train.audit_every=2"), 4, 1, [0]),
    "two nodes": ("kill:0:3:apply kill:5:5:publish", PP, 8, 2, [0, 5]),
}
ALWAYS = list(ROWS)[:5]


def compare(found: Learned, words: tuple[str, ...], undisturbed: Learned, with_tp: Learned) -> None:  # noqa: F811
    """Assert that the results are those of a run without failures."""
    if any("interleave" in word for word in words):
        assert [line[:2] for line in found] == [line[:2] for line in undisturbed]
    else:
        assert found == (with_tp if TP[0] in words else undisturbed)


@pytest.mark.parametrize(("name", "time"), [(n, i) for i in range(SOAK or 1) for n in (ROWS if SOAK else ALWAYS)])
def test_the_other_replicas_continue(
    shell: Shell, undisturbed: Learned, with_tp: Learned, name: str, time: int  # noqa: F811
) -> None:
    faults, words, ranks, nodes, lost = ROWS[name]
    ended = start_ulfm(shell, ranks, faults, *words, nodes=nodes).wait()
    assert ended.code == 0, ended
    lines = lines_of(shell.folder / "run")
    if "--train.loss=chunked" in words:  # it has other bits than the loss of all logits
        expect(shell.train(*SETTINGS, *words, "--run.dir=whole", ranks=2), 0)
        with_tp = learned(lines_of(shell.folder / "whole"))
    compare(learned(lines), words, undisturbed, with_tp)
    assert dead(lines) == lost and not any(line.get("event") == "went_back" for line in lines), f"{lines}\n{ended}"


@pytest.mark.parametrize(("faults", "words", "why"), [
    ("kill:1:4:reduce kill:3:4:reduce", (), "all ranks that held one part of the model have failed"),
    ("kill:1:4:apply", ("--optim.name=muon",), "optim.name=muon with mesh.tp cannot continue in the middle of a step"),
])
def test_the_state_comes_from_the_checkpoint(
    shell: Shell, with_tp: Learned, faults: str, words: tuple[str, ...], why: str
) -> None:
    ended = start_ulfm(shell, 4, faults, *TP, *words).wait()
    assert ended.code == 0, ended
    lines = lines_of(shell.folder / "run")
    (back,) = [line["why"] for line in lines if line.get("event") == "went_back"]
    assert why in back and lines[-1]["step"] == 6, ended
    if not words:
        assert learned(lines)[-1] == with_tp[-1], ended


@pytest.mark.parametrize(("mesh", "words"), [(TP, ()), (PP, ("--model.tie_embeddings=true",)), (TP, ("--model.lora_rank=2",))])
def test_slices(shell: Shell, prepared: Path, forks: Forks, mesh: tuple[str, ...], words: tuple[str, ...]) -> None:
    """With model.slices, the results are those of one rank, whatever the mesh, also after a failure."""
    words = "--model.slices=2", *words
    done = forks.run(prepared, "mpidp.train", "tiny.toml", *SETTINGS, *words, f"--run.dir={words[-1]}")
    assert done.code == 0, done
    ended = start_ulfm(shell, 4, "kill:2:3:apply", *mesh, *words).wait()
    assert ended.code == 0, ended
    lines = lines_of(shell.folder / "run")
    assert learned(lines) == learned(lines_of(prepared / words[-1])) and dead(lines) == [2], ended


@pytest.mark.long
def test_too_few_ranks_for_a_replica(shell: Shell, undisturbed: Learned) -> None:  # noqa: F811
    ended = start_ulfm(shell, 4, "kill:0:4:reduce kill:1:4:reduce kill:3:4:reduce", *PP).wait()
    assert ended.code == 1, ended
    assert ended.err.count("mpidp: 1 of 4 ranks are left, but mesh.tp=1 x mesh.pp=2 needs 2 ranks, so the job ends.") == 1, ended
    expect(shell.train(*SETTINGS), 0)
    assert learned(lines_of(shell.folder / "run"))[-1] == undisturbed[-1]


def test_back_to_full_size(shell: Shell, undisturbed: Learned) -> None:  # noqa: F811
    ended = start_respawning(shell, 4, "kill:1:3:apply kill:2:5:reduce", *PP).wait()
    assert ended.code == 0, ended
    lines = lines_of(shell.folder / "run")
    assert learned(lines) == undisturbed and dead(lines) == [1, 2], f"{lines}\n{ended}"
    assert came(lines) == [([0, 4], 4), ([3, 5], 4)], lines


@pytest.mark.long
def test_a_stop_while_a_rank_waits(shell: Shell, undisturbed: Learned) -> None:  # noqa: F811
    started = start_ulfm(shell, 4, "kill:1:2:reduce", *PP, program=("-c", SLOWLY))
    started.until("lost ranks 1")
    (shell.folder / "run" / "STOP").touch()
    ended = started.wait()
    assert ended.code == 75 and ended.err.count("stopped on request (file run/STOP)") == 1, ended
    expect(shell.train(*SETTINGS), 0)
    assert learned(lines_of(shell.folder / "run"))[-1] == undisturbed[-1]


@pytest.mark.long
def test_a_spare_rank_fails(shell: Shell, undisturbed: Learned) -> None:  # noqa: F811
    started = start_ulfm(shell, 4, "kill:1:2:reduce", *PP, program=("-c", SLOWLY))
    started.until("lost ranks 1")
    os.kill(started.ranks()[0], signal.SIGKILL)
    ended = started.wait()
    assert ended.code == 0 and learned(lines_of(shell.folder / "run")) == undisturbed, ended


@pytest.mark.long
def test_a_return_while_a_rank_waits(shell: Shell, prepared: Path, forks: Forks) -> None:
    """Bad batches return the training ranks to a checkpoint; the spare rank waits again."""
    words = ("--train.max_skipped=2", "--train.save_every=1")
    done = forks.run(prepared, "mpidp.train", "tiny.toml", *SETTINGS, *words, "--run.dir=bad", MPIDP_FAULT="nan:0:5,times=2")
    assert done.code == 0, done
    ended = start_ulfm(shell, 4, "kill:1:3:reduce nan:2:5,times=2 nan:3:5,times=2", *PP, *words).wait()
    assert ended.code == 0, ended
    lines = lines_of(shell.folder / "run")
    assert any(line.get("event") == "rolled_back" for line in lines), ended
    assert learned(lines)[-1] == learned(lines_of(prepared / "bad"))[-1], ended


def some_row(seed: int) -> tuple[str, tuple[str, ...], int, int]:
    """Draw random failures on a random mesh. At least one replica can be formed of the ranks that are left."""
    draw = random.Random(seed)
    mesh, parts, ranks = draw.choice([(TP, 2, 4), (PP, 2, 4), (TP, 2, 6), (PP, 2, 6), ((*TP, *PP), 4, 8)])
    together, faults = draw.randint(1, 6), []
    for rank in draw.sample(range(ranks), draw.randint(1, ranks - parts)):
        phase = draw.choice(["data", "compute", "comm_wait", "update", "reduce", "apply", "publish", "evaluate", "checkpoint"])
        step = draw.choice({"evaluate": [3, 6], "checkpoint": [2, 4, 6]}.get(phase, [together, draw.randint(1, 6)]))
        faults.append(f"kill:{rank}:{step}:{phase}" + draw.choice(["", f",after={0.03 * draw.random():.4f}"]))
    words = (*mesh, draw.choice(["--comm.copies=node", "--comm.copies=rank", "--comm.transport=messages"]),
             f"--train.audit_every={draw.choice([0, 0, 0, 2])}")
    return " ".join(faults), words, ranks, draw.choice([1, 1, 2])


@pytest.mark.long
@pytest.mark.parametrize("seed", range(SOAK))
def test_random_deaths(shell: Shell, undisturbed: Learned, with_tp: Learned, seed: int) -> None:  # noqa: F811
    faults, words, ranks, nodes = some_row(seed)
    ended = start_ulfm(shell, ranks, faults, *words, nodes=nodes).wait()
    assert ended.code == 0, f"{faults} {words}\n{ended}"
    lines = lines_of(shell.folder / "run")
    expected = with_tp if TP[0] in words else undisturbed
    back = any(line.get("event") == "went_back" for line in lines)
    assert learned(lines)[-1] == expected[-1] and (back or learned(lines) == expected), f"{faults} {words}\n{lines}\n{ended}"
