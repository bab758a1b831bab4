"""Laws of the board: every rank's position is visible to all others, whatever it does, and determines which rank they wait for.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from mpidp.comm import waiting
from mpidp.faults import heartbeat
from mpidp.faults.heartbeat import LOST, SILENT, HeartbeatBoard, HeartbeatRow, blame
from mpidp.faults.watchdog import Watchdog


def row(
    rank: int, phase: str = "comm_wait", step: int = 12, state: str = "S", host: str = "node1", bucket: int = -1,
    waits: bool = False,
) -> HeartbeatRow:
    if state == SILENT:
        return HeartbeatRow(rank, host, 400 + rank)
    return HeartbeatRow(rank, host, 400 + rank, step, phase, bucket, 63.0, 63.0, state, waits)


COMPUTES, WAITS, REDUCES = row(3, "compute"), row(1), row(2, "reduce")
FOUR = "rank 3 (node1, pid 403), in phase apply of step 12 for 63 s; and 5 more; of the others 1 is in phase publish"
BLAMED = [  # rows, the ranks waited for, a part of the message
    ([row(0), row(1), COMPUTES], [3],
     "the other ranks wait for rank 3 (node1, pid 403), in phase compute of step 12 for 63 s; of the others 2 are in phase "
     "comm_wait"),
    ([row(0), row(1, state="T"), row(2)], [1], "in phase comm_wait of step 12 for 63 s, stopped (state T); of the others 2 are"),
    ([row(0, "compute", 11), row(1, "data"), row(2)], [0], "rank 0 (node1, pid 400), in phase compute of step 11"),  # earliest
    ([row(0, "compute"), row(1, "compute"), row(2)], [0, 1],
     "rank 0 (node1, pid 400), in phase compute of step 12 for 63 s; rank 1"),
    ([row(0), row(1, "compute"), row(2, state="Z")], [2], "exited (state Z)"),  # this is why the other makes no progress
    ([row(0), row(1, "reduce", bucket=4), row(2, "reduce")], [0], "1 is in phase reduce (bucket 4) of step 12"),
    ([row(0, "evaluate"), row(1, "evaluate_wait"), row(2, "evaluate_wait")], [0], "2 are in phase evaluate_wait"),
    ([row(0, "publish"), row(1, "checkpoint"), row(2, "data", 13)], [0], "1 is in phase data of step 13"),
    ([row(0), row(1), row(2, state=SILENT, host="node2")], [2], "rank 2 (node2, pid 402), no heartbeat received; of the others"),
    ([row(0), row(1, "compute"), row(2, state=SILENT)], [1], "rank 1 (node1, pid 401), in phase compute"),  # the folder is gone
    ([row(0), row(1), row(2)], [0, 1, 2],
     "all ranks are in the same phase (waiting for messages that did not arrive; check the network)"),
    ([row(0, "compute"), row(1, "compute")], [0, 1],
     "all ranks are in the same phase: rank 0 (node1, pid 400), in phase compute"),
    ([row(0, "data", state="D")], [0],
     "rank 0 (node1, pid 400), in phase data of step 12 for 63 s, waiting for a disk or a file"),
    ([row(0, "compute", waits=True), row(1, "compute"), row(2, "compute", waits=True)], [1],  # for a message within the model
     "the other ranks wait for rank 1 (node1, pid 401), in phase compute of step 12 for 63 s; of the others 2 are in phase "
     "compute of step 12 (waiting for other ranks)"),
    ([row(0, "compute", waits=True), row(1, waits=True), row(2, "reduce")], [0],
     "of the others 1 is in phase comm_wait of step 12, 1"),
    ([row(0, "compute", waits=True), row(1, "compute", waits=True), row(2, state=SILENT)], [2], "no heartbeat received"),
    ([row(0, "compute", waits=True), row(1, "compute", waits=True)], [0, 1],
     "all ranks are in the same phase (waiting for messages that did not arrive; check the network)"),
    ([row(r, "apply") for r in range(9)] + [row(9)], [9], "rank 9 (node1, pid 409), in phase comm_wait"),
    ([row(r, "apply") for r in range(9)] + [row(9, "publish")], list(range(9)), FOUR),
]


@pytest.mark.parametrize(("rows", "blamed", "part"), BLAMED)
def test_for_whom_everybody_waits(rows: list[HeartbeatRow], blamed: list[int], part: str) -> None:
    words, found = blame(rows)
    assert [one.rank for one in found] == blamed and part in words, words


def test_the_order_of_rows_blames_nobody_else() -> None:
    for rows, blamed, _ in BLAMED:
        assert sorted(one.rank for one in blame(rows[::-1])[1]) == sorted(blamed)


def test_a_rank_that_beats_says_when_it_last_did() -> None:
    words, _ = blame([HeartbeatRow(0, "a", 1, 3, "evaluate", -1, 200.0, 63.0, "S"), row(1, "evaluate_wait", 3)])
    assert "in phase evaluate of step 3 for 200 s, last heartbeat 63 s ago" in words


def boards(folder: Path, hosts: list[str], pids: list[int] | None = None) -> list[HeartbeatBoard]:
    token = os.urandom(8).hex()
    made = [HeartbeatBoard(rank, hosts, pids or [os.getpid()] * len(hosts), token, folder) for rank in range(len(hosts))]
    for one in made:
        one.unlink()
    return made


def test_neighbours_see_at_once_what_a_rank_wrote(tmp_path: Path) -> None:
    a, b = boards(tmp_path, ["x", "x"])
    assert [one.state for one in a.rows(1.0)] == [SILENT, SILENT]
    now = time.monotonic()
    b.write(7, "reduce", 3, now - 50, now - 20, waits=True)  # small: the clock may have begun at the machine's start, minutes ago
    (_, seen), (_, same) = a.rows(1.0), b.rows(1.0)
    assert (seen.rank, seen.host, seen.pid, seen.step, seen.phase, seen.bucket) == (1, "x", os.getpid(), 7, "reduce", 3)
    assert 50 <= seen.entered < 70 and 20 <= seen.heard < 40 and seen.state in "RS" and same.phase == "reduce"
    assert seen.waits
    assert 20 <= a.quiet_seconds() < 40
    a.write(7, "compute", -1, now, now)
    assert b.quiet_seconds() < 20
    assert not list(tmp_path.iterdir())  # the disk was not needed


def test_nothing_is_left_in_shared_memory(tmp_path: Path) -> None:
    before = set(Path("/dev/shm").glob("mpidp_board_*"))
    assert boards(tmp_path, ["x", "y", "x"])
    assert set(Path("/dev/shm").glob("mpidp_board_*")) <= before


def test_the_state_of_a_process_is_the_kernel_s_word(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    (mine, _) = boards(tmp_path, ["x", "x"], [os.getpid(), child.pid])
    other = mine
    now = time.monotonic()
    other.rank = 1
    other.write(1, "compute", -1, now, now)
    os.kill(child.pid, signal.SIGSTOP)
    while mine.rows(1.0)[1].state not in LOST:
        time.sleep(0.01)
    assert mine.rows(1.0)[1].state == "T"
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert mine.rows(1.0)[1].state == "Z"
    child.wait()
    assert mine.rows(1.0)[1].state == "X"


def test_nodes_hear_from_each_other_through_the_folder(tmp_path: Path) -> None:
    a, b, c = boards(tmp_path, ["x", "y", "y"])
    now = time.monotonic()
    for one in (a, b, c):
        one.write(4, "comm_wait" if one is not c else "compute", -1, now - 900, now - 900)
    b.exchange(0.0)
    a.exchange(0.0)
    rows = a.rows(600.0)
    assert [(one.host, one.phase) for one in rows] == [("x", "comm_wait"), ("y", "comm_wait"), ("y", "compute")]
    assert [one.rank for one in blame(rows)[1]] == [2]
    assert 900 <= a.quiet_seconds() < 1000
    c.write(5, "data", -1, time.monotonic(), time.monotonic())
    b.exchange(0.0)
    a.exchange(0.0)
    assert a.quiet_seconds() < 100  # there was a heartbeat
    assert sorted(path.name for path in (tmp_path / ".board").iterdir()) == ["x.json", "y.json"]
    b.close()
    assert (tmp_path / ".board").exists()
    a.close()
    assert not (tmp_path / ".board").exists()


def test_a_node_that_makes_progress_is_heard_of(tmp_path: Path) -> None:
    """Even if none of its ranks ever waits: all phases of its rank are short. Ranks of another node may wait for many of its
    steps."""
    a, b = boards(tmp_path, ["x", "y"])
    dog = Watchdog(b, 2.0)
    seen, until = [0], time.monotonic() + 20.0
    while len(seen) < 4 and time.monotonic() < until:
        dog.enter(dog._at[0] + 1, "data")
        time.sleep(0.02)
        a.exchange(0.0)
        (one,) = a.rows(60.0)[1:]
        seen += [one.step] * (one.step > seen[-1])
    dog.close()
    assert len(seen) == 4, f"its heartbeats were seen in steps {seen[1:]}"


def test_a_node_that_tells_nothing_more_is_not_heard_of(tmp_path: Path) -> None:
    a, b = boards(tmp_path, ["x", "y"])
    now = time.monotonic()
    b.write(4, "compute", -1, now, now)
    b.exchange(0.0)
    a.exchange(0.0)
    assert a.rows(600.0)[1].state != SILENT
    time.sleep(0.3)
    a.exchange(0.0)  # the same file again is no heartbeat
    assert a.rows(0.2)[1].state == SILENT
    assert str(a.rows(0.2)[1]).endswith("last seen in phase compute of step 4, no heartbeat received")
    assert a.quiet_seconds() >= 0.3


@pytest.mark.parametrize("content", ["", "{", "[]", '{"token": 1}', '{"token": "TOKEN", "stamp": 1, "rows": [{"rank": 1}]}',
                                     '{"token": "TOKEN", "stamp": "x", "rows": []}', '{"token": "old", "stamp": 1, "rows": []}'])
def test_what_an_earlier_job_or_half_a_write_left_is_nobody_s_word(tmp_path: Path, content: str) -> None:
    a, _ = boards(tmp_path, ["x", "y"])
    (tmp_path / ".board").mkdir()
    (tmp_path / ".board" / "y.json").write_text(content.replace("TOKEN", a._token))
    a.exchange(0.0)
    assert a.rows(60.0)[1] == HeartbeatRow(1, "y", os.getpid())


@pytest.mark.parametrize("folder", ["absent", "file"])
def test_a_folder_that_vanished_harms_nobody(tmp_path: Path, folder: str) -> None:
    (tmp_path / "file").write_text("")
    a, _ = boards(tmp_path / folder, ["x", "y"])
    now = time.monotonic()
    a.write(4, "compute", -1, now, now)
    a.exchange(0.0)
    assert [one.state == SILENT for one in a.rows(60.0)] == [False, True]
    a.close()


def test_no_shared_memory_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    a, b = boards(tmp_path, ["x", "x"])
    now = time.monotonic()
    for one in (a, b):
        one.write(4, "compute", -1, now, now)
    assert [one.state == SILENT for one in a.rows(60.0)] == [False, True]
    assert a.claim_report() and b.claim_report()


def test_one_rank_of_a_node_speaks(tmp_path: Path) -> None:
    code = """
import os, sys
from pathlib import Path
from mpidp.faults.heartbeat import HeartbeatBoard
board = HeartbeatBoard(1, ["x", "x"], [0, 0], sys.argv[1], Path("."))
print("ready", flush=True)
sys.stdin.readline()
print(board.claim_report(), flush=True)
"""
    token = os.urandom(8).hex()
    mine = HeartbeatBoard(0, ["x", "x"], [0, 0], token, tmp_path)
    child = subprocess.Popen([sys.executable, "-c", code, token], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdin is not None and child.stdout.readline() == "ready\n"
    mine.unlink()
    assert mine.claim_report()
    child.stdin.write("\n")
    child.stdin.flush()
    time.sleep(0.2)
    assert child.poll() is None  # it waits until the reporting process has exited
    os.close(mine._handle)
    mine._memory.close()
    assert child.stdout.readline() == "False\n" and child.wait(20) == 0


def test_a_board_costs_a_step_nothing(tmp_path: Path) -> None:
    """A slot has 56 bytes: a rank writes within one page, whatever the others write beside it."""
    (a, *_) = boards(tmp_path, ["x"] * 8)
    a.write(2**62, "a phase whose name is far too long for its place", 2**31, 1e9, 1e9)
    assert heartbeat.SLOT.size == 56 and a.rows(1.0)[1].state == SILENT and a.rows(1.0)[0].phase == "a phase whose name is f"


def test_the_board_shows_whether_a_rank_waits_for_a_message(tmp_path: Path) -> None:
    class Request:
        """A request that is complete when the board shows, at most 30 s after the last heartbeat, the expected state."""

        def __init__(self, waits: bool) -> None:
            self.waits, self.end = waits, time.monotonic() + 30

        def Test(self) -> bool:  # noqa: N802
            time.sleep(0.01)
            return time.monotonic() > self.end or board.rows(1.0)[0].waits == self.waits

    (board,) = boards(tmp_path, ["x"])
    dog = Watchdog(board, 60.0, waits=waiting.main_thread_waits)
    dog.enter(3, "compute")
    assert not board.rows(1.0)[0].waits
    waiting.doze(Request(True))  # type: ignore[arg-type]
    assert board.rows(1.0)[0].waits, "the watchdog's thread has recorded it"
    thread = threading.Thread(target=waiting.doze, args=(Request(False),))
    thread.start()
    thread.join()
    assert not board.rows(1.0)[0].waits, "a thread waits while the rank computes"
    dog.close()


# --- how long to wait


def test_the_deadline_follows_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    dog = Watchdog(None, 60.0)
    for step in range(1, 8):
        for phase in ("data", "compute", "comm_wait"):
            dog.enter(step, phase)
            assert dog.timeouts() == ((60.0, 180.0) if step == 1 else (60.0 if step < 6 else 180.0, dog.timeouts()[0]))
            now += (0.125 if step < 3 else 3.0) if step != 6 else 1000.0  # the sixth step is an exception
    dog.enter(8, "evaluate")
    assert dog.timeouts() == (180.0, 540.0)  # for the first time
    dog.enter(8, "data")
    dog.enter(8, "evaluate")
    assert dog.timeouts() == (180.0, 180.0)
