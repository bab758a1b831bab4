"""Ranks fail under `mpirun --with-ft ulfm`: the others continue in the same processes, and the result does not change.

| when | expected | checked |
|---|---|---|
| in any phase of a step, in a collective, evaluation, checkpoint, first step, last step | 0, nothing is lost | as below |
| rank 0; two at once; two in a row; all but one; a whole node; an exception or sys.exit of one rank | same | same |
| another rank during a recovery, at any of its communications | same | same |
| with background reductions, messages, one copy per rank, measured balance, audits | same | same |
| strategy local, delayed or server, a quorum | 0, return to the last checkpoint, same processes | end, a `went_back` event |
| all workers, with strategy server | 1; the same command with fewer servers resumes | code, output |
| rank 0, with comm.reducer=root | same | same |
| with compression | 0, each step once | lines, and losses that are close |
| in the first build, before a job exists | 0, start with fewer ranks | final hash |
| the same exception on all ranks | 1: mpirun's code is not that of a success | code |
| fewer than faults.min_ranks remain | 75 and a checkpoint; the same command resumes | code, hash |
| the last rank fails, or hangs | 1, 6 | code, output |
| SIGUSR1 or a STOP file after a recovery | 75; the same command resumes | code, hash |
| while rank 0 commits a checkpoint | 0, a `saved` line, a copy on run.mirror | lines, output |
| a usage, data or checkpoint error of one rank | its own code, at once | code, no process left |

Checked: the final hash, and every line of a step and of an evaluation, once and as in a run without failures; `recovered` events
name the failed ranks.

MPIDP_SOAK=N runs the whole table N times, and N random failures in random jobs; without it a part of the table is run once.
"""

from __future__ import annotations

import json
import os
import random
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.faults.commands import ENTER, SLOWLY, Ended, Forks, Shell, Started, expect, family, faulty, still_there

SOAK = int(os.environ.get("MPIDP_SOAK", "0"))
SETTINGS = (  # several blocks and buckets, more lanes than ranks
    "--model.model_dim=96", "--model.num_layers=2", "--train.global_batch=6", "--train.eval_every=3", "--comm.bucket_mb=0.1",
)


@dataclass(frozen=True)
class Row:
    """One run: which rank fails when, in what kind of job."""

    faults: str
    words: tuple[str, ...] = ()
    ranks: int = 4
    nodes: int = 1
    always: bool = False  # otherwise only in the soak test
    dead: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.dead.extend(sorted(int(word.split(":")[1]) for word in self.faults.split()))


ROWS = {
    "data, compute, comm_wait, down to one rank": Row("kill:3:2:data kill:1:3:compute kill:0:5:comm_wait", always=True),
    "reduce, apply, publish, down to one rank": Row("kill:0:2:reduce kill:2:3:apply kill:1:4:publish", always=True),
    "evaluation and checkpoint": Row("kill:0:3:evaluate kill:2:4:checkpoint kill:3:6:evaluate", always=True),
    "two at once, in the first step": Row("kill:1:1:reduce kill:2:1:reduce", always=True),
    "the last step, and the checkpoint after it": Row("kill:1:6:publish kill:0:6:checkpoint", always=True),
    "in the midst of things, with a thread": Row(
        "kill:2:3:compute,after=0.01 segv:0:4:reduce,after=0.002", ("--comm.overlap=thread",), nodes=2, always=True),
    "a node": Row("kill:2:4:apply kill:3:4:apply", nodes=2, always=True),
    "of each node one, in an update": Row("kill:0:3:apply kill:3:5:publish", nodes=2, always=True),
    "messages": Row("kill:0:3:reduce,after=0.001 kill:2:5:apply", ("--comm.transport=messages",), always=True),
    "a copy a rank": Row("kill:1:3:apply kill:3:5:publish", ("--comm.copies=rank",), always=True),
    "an exception, sys.exit": Row("raise:1:3:compute sysexit:2:4:reduce", always=True),
    "another while they recover": Row("kill:1:3:reduce kill:3:3:reduce,after=0.02"),
    "the first node": Row("kill:0:4:reduce kill:1:4:reduce", nodes=2),
    "update": Row("kill:2:4:update segv:1:4:update"),
    "a thread on one node": Row("kill:2:4:reduce kill:0:5:compute,after=0.01", ("--comm.overlap=thread",)),
    "poll": Row("kill:2:4:compute,after=0.01 kill:1:5:reduce", ("--comm.overlap=poll",), nodes=2),
    "two nodes, a copy a rank": Row("kill:2:4:apply kill:0:5:publish", ("--comm.copies=rank",), nodes=2),
    "shares by speed": Row("kill:1:3:publish", ("--train.balance=measured",), ranks=3),
    "stealing, which is not to be had here": Row("kill:1:3:publish", ("--train.balance=steal",), ranks=3),
    "audits": Row("kill:1:3:compute kill:2:4:publish", ("--train.audit_every=2",)),
    "noise": Row("kill:1:3:compute", ("--train.noise_every=2",), ranks=3),
}


@pytest.fixture
def shell(place: Path) -> Shell:
    return Shell(place, "openmpi")


def start(
    shell: Shell, ranks: int, faults: str, *words: str, nodes: int = 1, program: tuple[str, ...] = ("-m", "mpidp.train")
) -> Started:
    command = ["mpirun", "--with-ft", "ulfm", "-n", str(ranks), "python", *program, "tiny.toml", *SETTINGS, *words]
    return shell.start_command(command, MPIDP_FAULT=faults, MPIDP_PRETEND_NODES=str(nodes))


def lines_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def learned(lines: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """Return the results of each step and evaluation in order, and the end with its hash."""
    keys = ("event", "step", "train_loss", "lr", "grad_norm", "tokens", "val_loss", "weights_sha256")
    return [tuple(line.get(key) for key in keys) for line in lines if line.get("event") in (None, "end")]


def dead(lines: list[dict[str, Any]]) -> list[int]:
    return sorted(one["rank"] for line in lines if line.get("event") == "recovered" for one in line["lost"])


@pytest.fixture(scope="session")
def undisturbed(prepared: Path, forks: Forks) -> list[tuple[Any, ...]]:
    done = forks.run(prepared, "mpidp.train", "tiny.toml", *SETTINGS, "--run.dir=undisturbed")
    assert done.code == 0, done
    return learned(lines_of(prepared / "undisturbed"))


def check(row: Row, shell: Shell, undisturbed: list[tuple[Any, ...]]) -> None:
    ended = start(shell, row.ranks, row.faults, *row.words, nodes=row.nodes).wait()
    assert ended.code == 0, ended
    lines = lines_of(shell.folder / "run")
    assert learned(lines) == undisturbed, f"{lines}\n{ended}"
    assert dead(lines) == row.dead, ended


@pytest.mark.parametrize(("name", "time"), [(n, i) for i in range(SOAK or 1) for n, row in ROWS.items() if SOAK or row.always])
def test_the_others_go_on(shell: Shell, undisturbed: list[tuple[Any, ...]], name: str, time: int) -> None:
    check(ROWS[name], shell, undisturbed)


@pytest.mark.parametrize("name", ["int8", "topk", "powersgd"])
def test_with_compression_they_go_on_with_what_they_hold(shell: Shell, undisturbed: list[tuple[Any, ...]], name: str) -> None:
    """The residuals of the failed rank are lost, so losses differ slightly; every step is logged once."""
    ratio = ("--comm.ratio=0.5",) * (name == "topk")
    ended = start(shell, 4, "kill:3:2:reduce kill:0:4:apply kill:1:5:publish", f"--comm.compress={name}", *ratio).wait()
    assert ended.code == 0, ended
    lines = lines_of(shell.folder / "run")
    found = learned(lines)
    assert [line[:2] for line in found] == [line[:2] for line in undisturbed] and dead(lines) == [0, 1, 3], ended
    losses = [(ours[2], plain[2]) for ours, plain in zip(found, undisturbed, strict=True) if plain[2] is not None]
    assert all(ours == pytest.approx(plain, rel=0.35) for ours, plain in losses), losses


PLACES = (  # in a recovery: its communications, and rank 0's files
    "mpidp.training.recovery.make_topology", "mpidp.training.data_parallel.regroup", "mpidp.strategies.optimizer.Optimizer",
    "mpidp.training.services.open_heartbeat_board", "mpidp.training.recovery.committed",
    "mpidp.strategies.synchronous.Synchronous.resume_after_failure", "mpidp.training.run_record.MetricsFile",
    "mpidp.training.job.Loader",
)
DIES = """
import os, sys, pydoc, mpidp.runtime.command, mpidp.train, mpidp.training.loop, mpidp.training.recovery
from mpi4py import MPI
place, _, name = {place!r}.rpartition('.')
owner = pydoc.locate(place)
plain = getattr(owner, name)
def dies(*words, **more):
    if MPI.COMM_WORLD.rank == 0 and MPI.Comm.Get_name(MPI.COMM_WORLD) == 'failed':
        os.kill(os.getpid(), 9)
    return plain(*words, **more)
setattr(owner, name, dies)
again = mpidp.training.recovery.regroup
def regroup(*words):
    MPI.COMM_WORLD.Set_name('failed')
    return again(*words)
mpidp.training.recovery.regroup = regroup
"""


@pytest.mark.parametrize("where", PLACES if SOAK else PLACES[5:6])
def test_another_death_in_a_recovery(shell: Shell, undisturbed: list[tuple[Any, ...]], where: str) -> None:
    ended = start(shell, 4, "kill:1:3:apply", nodes=2, program=("-c", DIES.format(place=where) + ENTER)).wait()
    assert ended.code == 0, ended
    lines = lines_of(shell.folder / "run")
    assert learned(lines) == undisturbed and dead(lines) == [0, 1], f"{lines}\n{ended}"


SLOW_COMMIT = """
import time, mpidp.runtime.command, mpidp.train, mpidp.checkpoint.writer as writer
plain = writer.commit
def commit(folder, body, keep):
    time.sleep(1.5 * (body["step"] == 2))
    return plain(folder, body, keep)
writer.commit = commit
"""


@pytest.mark.parametrize("words", [(), ("--strategy.name=local", "--strategy.sync_every=1")], ids=["memory", "checkpoint"])
def test_a_checkpoint_that_is_committed_at_a_failure_is_logged_and_copied(shell: Shell, words: tuple[str, ...]) -> None:
    mirror = f"--run.mirror=file://{shell.folder}/mirror"
    ended = start(shell, 3, "kill:2:3:reduce", mirror, *words, program=("-c", SLOW_COMMIT + ENTER)).wait()
    assert ended.code == 0, ended
    lines = lines_of(shell.folder / "run")
    assert [line["step"] for line in lines if line.get("event") == "saved"] == [2, 4, 6], f"{lines}\n{ended}"
    assert "step_00000002 copied to" in ended.said, ended


def some_row(seed: int) -> Row:
    """Draw random failures in a random job; some may come too late."""
    draw = random.Random(seed)
    ranks, together = draw.choice([2, 3, 4, 4]), draw.randint(1, 6)
    faults = []
    for rank in draw.sample(range(ranks), draw.randint(1, ranks - 1)):
        phase = draw.choice(["data", "compute", "comm_wait", "update", "reduce", "apply", "publish", "evaluate", "checkpoint"])
        step = draw.choice({"evaluate": [3, 6], "checkpoint": [2, 4, 6]}.get(phase, [together, draw.randint(1, 6)]))
        after = draw.choice(["", f",after={0.03 * draw.random():.4f}"])
        faults.append(f"{draw.choice(['kill', 'kill', 'segv'])}:{rank}:{step}:{phase}{after}")
    words = [f"--comm.overlap={draw.choice(['none', 'thread', 'poll', 'auto'])}",
             draw.choice(["--comm.copies=node", "--comm.copies=rank", "--comm.copies=auto", "--comm.transport=messages"]),
             f"--train.audit_every={draw.choice([0, 0, 0, 2])}"]
    return Row(" ".join(faults), tuple(words), ranks, draw.choice([1, 2]))


@pytest.mark.parametrize("seed", range(SOAK))
def test_random_deaths(shell: Shell, undisturbed: list[tuple[Any, ...]], seed: int) -> None:
    row = some_row(seed)
    ended = start(shell, row.ranks, row.faults, *row.words, nodes=row.nodes).wait()
    assert ended.code == 0, f"{row}\n{ended}"
    lines = lines_of(shell.folder / "run")
    assert learned(lines) == undisturbed, f"{row}\n{lines}\n{ended}"
    assert set(dead(lines)) <= set(row.dead), ended


def check_goes_on(shell: Shell, undisturbed: list[tuple[Any, ...]]) -> None:
    """Run the same command on one rank."""
    done = shell.train(*SETTINGS)
    expect(done, 0)
    assert learned(lines_of(shell.folder / "run")) == undisturbed, done


def test_fewer_than_min_ranks(shell: Shell, undisturbed: list[tuple[Any, ...]]) -> None:
    ended = start(shell, 3, "kill:0:3:apply", "--faults.min_ranks=3", "--train.save_every=0").wait()
    assert ended.code == 75, ended
    assert ended.err.count("2 ranks are left, and faults.min_ranks is 3) at step 2, checkpoint written") == 1, ended
    check_goes_on(shell, undisturbed)


def test_the_last_rank_fails(shell: Shell) -> None:
    ended = start(shell, 2, "kill:0:3:compute raise:1:5:reduce").wait()
    assert ended.code == 1, ended
    assert ended.err.count("mpidp: rank 0 failed and ends the job:") == 1, ended
    assert learned(lines_of(shell.folder / "run"))[-1][1] == 4, ended  # a save may be logged later


@pytest.mark.long
def test_the_last_rank_hangs(shell: Shell) -> None:
    ended = start(shell, 2, "kill:0:2:compute hang:1:4", "--run.hang_seconds=2").wait()
    assert ended.code == 6, ended
    assert ended.err.count("mpidp: no rank has made progress") == 1, ended


@pytest.mark.parametrize("how", ["signal", "file"])
def test_a_request_to_stop_after_a_recovery(shell: Shell, undisturbed: list[tuple[Any, ...]], how: str) -> None:
    started = start(shell, 3, "kill:0:2:reduce", program=("-c", SLOWLY))
    started.until("lost ranks 0")
    if how == "file":
        (shell.folder / "run" / "STOP").touch()
    else:
        os.kill(started.ranks()[-1], signal.SIGUSR1)
    ended = started.wait()
    assert ended.code == 75, ended
    check_goes_on(shell, undisturbed)


BUILD = """
import os, mpidp.runtime.command, mpidp.train, mpidp.strategies.optimizer
from mpi4py import MPI
plain = mpidp.strategies.optimizer.Optimizer
def make(*words, **more):
    if MPI.COMM_WORLD.rank == 1:
        os.kill(os.getpid(), 9)
    return plain(*words, **more)
mpidp.strategies.optimizer.Optimizer = make
"""


def test_a_death_before_the_first_step(shell: Shell, undisturbed: list[tuple[Any, ...]]) -> None:
    ended = start(shell, 3, "", program=("-c", BUILD + ENTER)).wait()
    assert ended.code == 0 and learned(lines_of(shell.folder / "run")) == undisturbed, ended


def test_all_fail_alike(shell: Shell) -> None:
    ended = start(shell, 3, "", program=("-c", faulty("raise RuntimeError('the same on all')", ranks=range(3)) + ENTER)).wait()
    assert ended.code == 1, ended


def test_an_error_that_people_must_mend(shell: Shell) -> None:
    program = faulty("from mpidp.errors import DataError; raise DataError('bad on one rank')", ranks=[1]) + ENTER
    started = start(shell, 3, "kill:0:2:reduce", program=("-c", program))
    started.until("lost ranks 0")
    members = family(started.process.pid)
    ended: Ended = started.wait()
    assert ended.code == 3, ended
    assert ended.err.count("bad on one rank") == 1 and "Traceback" not in ended.said, ended
    assert not still_there(members), ended


@pytest.mark.parametrize("word", ["name=local", "name=delayed", "name=server", "quorum=0.5"])
def test_methods_that_go_back(shell: Shell, word: str) -> None:
    """Gradients in flight are lost with the failed rank."""
    method = (f"--strategy.{word}", "--strategy.meet_every=2", "--train.lanes=4", "--train.save_every=2")
    method += ("--strategy.sync_every=2",) if word == "name=local" else ()
    ended = start(shell, 4, "kill:2:5:reduce", *method).wait()
    assert ended.code == 0, ended
    lines = lines_of(shell.folder / "run")
    assert [line["event"] for line in lines if line.get("event") in ("went_back", "end")] == ["went_back", "end"], ended
    assert sorted({line["step"] for line in lines if "train_loss" in line}) == [1, 2, 3, 4, 5, 6], lines
    (back,) = [line for line in lines if line.get("event") == "went_back"]
    assert f"strategy.{word} cannot continue in the middle of a step" in back["why"] and lines[-1]["step"] == 6


@pytest.mark.long
def test_only_servers_are_left(shell: Shell) -> None:
    words = ("--strategy.name=server", "--strategy.servers=2", "--strategy.meet_every=2", "--train.save_every=2")
    ended = start(shell, 3, "kill:0:3:reduce", *words).wait()
    assert ended.code == 1 and "Traceback" not in ended.said, ended
    said = "mpidp: 2 of 3 ranks are left, but strategy.name=server with strategy.servers=2 needs 3 ranks, so the job ends."
    assert ended.err.count(said) == 1, ended
    again = shell.start_command(["mpirun", "-n", "2", "python", "-m", "mpidp.train", "tiny.toml", *SETTINGS,
                                 *words, "--strategy.servers=1"]).wait()
    assert again.code == 0 and [line["event"] for line in lines_of(shell.folder / "run") if "event" in line][-1] == "end", again


@pytest.mark.long
def test_fewer_than_min_ranks_after_a_return(shell: Shell) -> None:
    """Methods that return to the last checkpoint respect the limit, too."""
    words = ("--strategy.name=delayed", "--strategy.meet_every=2", "--train.save_every=2", "--faults.min_ranks=3")
    ended = start(shell, 3, "kill:2:5:reduce", *words).wait()
    assert ended.code == 75, ended
    assert ended.err.count("2 ranks are left, and faults.min_ranks is 3) at step ") == 1, ended
    assert max(line["step"] for line in lines_of(shell.folder / "run")) <= 4, ended


def test_the_only_optimizer_state_is_lost(shell: Shell) -> None:
    """After the return, steps are slow. The watchdog of the failed job must not count this as a hang."""
    slow = ("--comm.reducer=root", "--run.hang_seconds=2", "--train.save_every=1")
    ended = start(shell, 3, "kill:0:3:compute delay:1:3,seconds=0.5", *slow).wait()
    assert ended.code == 0, ended
    lines = lines_of(shell.folder / "run")
    (back,) = [line["why"] for line in lines if line.get("event") == "went_back"]
    assert "optimizer state" in back and [line["step"] for line in lines if "train_loss" in line] == [1, 2, 3, 4, 5, 6], lines
