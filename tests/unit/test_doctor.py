"""Laws of the doctor: tables of facts and verdicts; only segments that no process has open are removed."""

from __future__ import annotations

import argparse
import ast
import math
import mmap
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mpi4py import MPI

from mpidp.comm import probe
from mpidp.doctor import __main__ as doctor
from mpidp.doctor import hardware, launch, memory, network, sessions, storage
from mpidp.doctor.facts import MachineFacts
from mpidp.doctor.findings import VERDICTS, CheckResult, ranks, run_check, size, table, worst
from mpidp.doctor.job_script import check_job_script
from mpidp.runtime.environment import WAITING, numbers

VERSIONS = {"mpidp": "0.1", "torch": "2.9", "MPI": "MPICH 5.0.2"}
ONE = MachineFacts(0, "n1", (0, 1, 2, 3), 4, versions=VERSIONS)


def job(*places: tuple[str, str], host_cores: int = 4, **more: Any) -> list[MachineFacts]:
    """Return MachineFacts of ranks given as (host, cores), with cores as "0,1"."""
    return [
        replace(ONE, rank=rank, host=host, cores=tuple(map(int, cores.split(","))), host_cores=host_cores, **more)
        for rank, (host, cores) in enumerate(places)
    ]


def verdicts(found: CheckResult | list[CheckResult]) -> list[str]:
    return [one.verdict for one in (found if isinstance(found, list) else [found])]


LAUNCHES = {  # (size, launched, library, launcher, mpirun on the PATH) -> verdict, part of the message, part of the fix
    "one job": ((4, 4, "MPICH 5.0.2", "MPICH", ("", "")), "ok", "4 ranks, started by the mpirun of MPICH", ""),
    "one job by an unknown launcher": ((4, 0, "Cray MPICH 8.1", "", ("", "")), "ok", "4 ranks", ""),
    "alone": ((1, 0, "MPICH 5.0.2", "", ("/m/mpirun", "MPICH")), "ok", "matching mpirun /m/mpirun", ""),
    "alone, one meant": ((1, 1, "MPICH 5.0.2", "MPICH", ("/m/mpirun", "MPICH")), "ok", "one rank", ""),
    "alone, no mpirun": ((1, 0, "MPICH 5.0.2", "", ("", "")), "note", "no mpirun on the PATH", "srun"),
    "alone, another's mpirun": ((1, 0, "MPICH 5.0.2", "", ("/o/mpirun", "Open MPI")), "warning", "is Open MPI's", "first on"),
    "alone, mpirun unknown": ((1, 0, "Intel MPI 2021.1", "", ("/i/mpirun", "other")), "ok", "", ""),
    "Intel MPI": ((2, 2, "Intel MPI 2021.19.0", "Intel MPI", ("", "")), "ok", "by the mpirun of Intel MPI", "mpiexec.hydra"),
    "singletons of Intel": ((1, 4, "Open MPI 4.1.4", "Intel MPI", ("", "")), "wrong", "the mpirun of Intel MPI started 4",
                            "MPI4PY_MPIABI=mpich"),
    "two MPIs": ((1, 2, "MPICH 4.0.2", "Open MPI", ("", "")), "wrong", "each is alone", "MPI4PY_MPIABI=openmpi"),
    "singletons of srun, Intel": ((1, 4, "Intel MPI 2021.19.0", "srun", ("", "")), "wrong", "srun", "I_MPI_PMI_LIBRARY="),
    "singletons": ((1, 4, "Open MPI 5.0.11", "MPICH", ("/o/mpirun", "Open MPI")), "wrong", "started 4 ranks, but each is alone",
                   "srun --mpi=pmix -n 4"),
    "singletons of srun": ((1, 4, "MPICH 5.0.2", "srun", ("", "")), "wrong", "srun started 4 ranks", "srun --mpi=pmi2 -n 4"),
    "one, by a stranger": ((1, 1, "MPICH 5.0.2", "Open MPI", ("", "")), "wrong", "the mpirun of Open MPI started 1", "MPICH"),
}  # fmt: skip


@pytest.mark.parametrize("case", LAUNCHES.values(), ids=LAUNCHES)
def test_launch(case: tuple[tuple[Any, ...], str, str, str]) -> None:
    given, verdict, words, fix = case
    found = launch.check_launch(*given)
    assert found.verdict == verdict and words in found.words and fix in found.fix, found


@pytest.mark.parametrize(
    ("environ", "launcher", "place"),
    [
        ({}, "", (0, 1)),
        ({"PMI_RANK": "3", "MPI_LOCALNRANKS": "4", "MPI_LOCALRANKID": "3", "SLURM_LOCALID": "0"}, "MPICH", (3, 4)),
        ({"PMI_RANK": "0", "MPI_LOCALNRANKS": "2", "MPI_LOCALRANKID": "0", "I_MPI_HYDRA_UUID": "1-2"}, "Intel MPI", (0, 2)),
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, "Open MPI", (1, 2)),
        ({"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "4(x2)"},
         "srun", (1, 4)),
        *(({"SLURM_PROCID": "9", "SLURM_STEP_NUM_TASKS": "11", "SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "4(x2),3",
            "SLURM_NODEID": str(node)}, "srun", (1, ranks)) for node, ranks in enumerate((4, 4, 3))),
        ({"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "7", "SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "4,3",
          "SLURM_NODEID": "1"}, "srun", (1, 3)),
        ({"MPI_LOCALNRANKS": "2", "MPI_LOCALRANKID": "1", "SLURM_NODEID": "5"}, "MPICH", (1, 2)),
        ({"SLURM_PROCID": "0", "SLURM_JOB_ID": "1", "SLURM_LOCALID": "0"}, "", (0, 1)),  # in a batch script, outside a step
    ],
)
def test_who_launched(environ: dict[str, str], launcher: str, place: tuple[int, int]) -> None:
    assert launch.launcher_of(environ) == launcher and launch.on_this_node(environ) == place


@pytest.mark.parametrize(
    ("ranks", "tasks", "verdict"),
    [(4, None, "skipped"), (4, "4", "ok"), (1, "1", "ok"), (1, "4", "note"), (2, "4", "note"), (8, "4", "warning"),
     (2, "", "ok")],
)  # fmt: skip
def test_size_against_slurm(ranks: int, tasks: str | None, verdict: str) -> None:
    environ = {} if tasks is None else {"SLURM_JOB_ID": "7", "SLURM_NTASKS": tasks}
    assert launch.check_slurm(ranks, environ).verdict == verdict


SCRIPTS = {
    "#SBATCH --gres=gpu:4\n#SBATCH --gpus-per-node=4  # both": ("warning", "--gpus-per-node=4 request the same GPUs twice"),
    "#SBATCH --gres gpu:a100:2,nvme:1 -G 8": ("warning", "--gres=gpu:a100:2 and --gpus=8 are two different requests"),
    "#SBATCH --gres=gpu --gpus-per-node=4": ("warning", "two different requests"),
    "#SBATCH --gres=nvme:1\n#SBATCH --gpus-per-node=4": ("ok", "--gpus-per-node=4"),
    "#SBATCH --gres=gpu:4\n##SBATCH --gpus-per-node=4\n\nsrun x\n#SBATCH --gpus=4": ("ok", "--gres=gpu:4"),
    "#SBATCH --nodes=2 'x": ("ok", "no GPUs requested"),
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_job_script_requests_gpus_in_one_way(script: str) -> None:
    verdict, words = SCRIPTS[script]
    found = check_job_script(f"#!/bin/bash\n{script}\n", "my.sbatch")
    assert found.verdict == verdict and found.words.startswith("my.sbatch: ") and words in found.words, found


@pytest.mark.parametrize(
    ("library", "environ", "verdict"),
    [
        ("MPICH 5.0.2", {}, "note"),
        ("Open MPI 5.0.11", {}, "note"),
        ("Open MPI 5.0.11", {"OMPI_MCA_mpi_ft_enable": "1", "OMPI_MCA_coll": "^han,adapt"}, "ok"),
        ("Open MPI 5.0.11", {"OMPI_MCA_mpi_ft_enable": "1"}, "wrong"),
        ("Open MPI 5.0.11", {"OMPI_MCA_mpi_ft_enable": "1", "OMPI_MCA_coll": "han,basic"}, "wrong"),
    ],
)
def test_ulfm(library: str, environ: Mapping[str, str], verdict: str) -> None:
    assert launch.check_ulfm(library, environ).verdict == verdict


def test_thread_level() -> None:
    assert [launch.check_thread_level(level).verdict for level in range(4)] == ["note"] * 3 + ["ok"]


def test_versions_that_differ_are_named_with_ranks_and_hosts() -> None:
    same = job(("n1", "0"), ("n2", "0"), ("n2", "1"))
    assert verdicts(launch.check_versions(same)) == ["ok"]
    other = [same[0], *(replace(one, versions={**VERSIONS, "torch": "2.8"}) for one in same[1:])]
    [found] = launch.check_versions(other)
    assert found.verdict == "wrong" and "torch: rank 0 on n1 has 2.9, ranks 1-2 on n2 2.8" in found.words
    broken = [same[0], replace(same[1], versions={"mpidp": "0.1"}, broken={"torch": "ImportError: libc"}), same[2]]
    [found] = launch.check_versions(broken)
    assert found.verdict == "wrong" and "torch does not work for rank 1 on n2: ImportError: libc" in found.words


CORES = {  # ranks, verdict, part of the message
    "unbound, room for all": (job(("n1", "0,1,2,3"), ("n1", "0,1,2,3")), "ok", "n1 (4 cores): ranks 0-1 on 0-3"),
    "bound": (job(("n1", "0,1"), ("n1", "2,3")), "ok", "rank 0 on 0-1; rank 1 on 2-3"),
    "one core each": (job(("n1", "0"), ("n1", "1"), host_cores=2), "ok", "each rank is bound to one core"),
    "two on one core": (job(("n1", "2"), ("n1", "2"), ("n1", "0,1,2,3")), "wrong", "ranks 0-1 share core 2"),
    "three on two cores": (job(("n1", "0,1"), ("n1", "1"), ("n1", "0,1")), "wrong", "ranks 0-2 share core 0-1"),
    "the same core of two nodes": (job(("n1", "0"), ("n2", "0"), host_cores=1), "ok", "n2 (1 core): rank 1 on 0"),
    "more ranks than cores": (job(*[("n1", "0,1,2,3")] * 5), "warning", "5 ranks share its 4 cores"),
    "more ranks than it was given": (job(*[("n1", "0,1")] * 3), "wrong", "ranks 0-2 share core 0-1"),
    "half of the node": (job(("n1", "0"), ("n1", "1")), "note", "may use 2 of 4 cores"),
    "the worst of many nodes": (job(("n1", "0"), ("n1", "1"), ("n2", "3"), ("n2", "3")), "wrong", "n2: ranks 2-3 share core 3"),
}


@pytest.mark.parametrize("case", CORES.values(), ids=CORES)
def test_cores(case: tuple[list[MachineFacts], str, str]) -> None:
    facts, verdict, words = case
    found = hardware.check_cores(facts, "MPICH")
    assert found.verdict == verdict and words in found.words, found
    assert all(one.host in found.words for one in facts)


@pytest.mark.parametrize(
    ("threads", "expected"),
    [({}, ["ok"]), ({"OMP_NUM_THREADS": "2"}, ["ok"]), ({"OMP_NUM_THREADS": "3"}, ["warning"]),
     ({"OMP_NUM_THREADS": "4", "MKL_NUM_THREADS": "4"}, ["warning"] * 2), ({"OMP_NUM_THREADS": "4,2"}, ["warning"]),
     ({"OMP_NUM_THREADS": "no"}, ["ok"])],
)  # fmt: skip
def test_threads_against_cores(threads: dict[str, str], expected: list[str]) -> None:
    facts = job(*[("n1", "0,1,2,3")] * 2, threads=threads)
    assert verdicts(hardware.check_threads(facts)) == expected


@pytest.mark.parametrize(
    ("waiting", "expected"),
    [({}, "ok"), ({"GOMP_SPINCOUNT": "1000"}, "ok"), ({"OMP_WAIT_POLICY": "PASSIVE"}, "ok"),
     ({"OMP_WAIT_POLICY": "Active"}, "note"), ({"GOMP_SPINCOUNT": "infinite"}, "note"), ({"GOMP_SPINCOUNT": "300000"}, "note"),
     ({"OMP_WAIT_POLICY": "active", "GOMP_SPINCOUNT": "0"}, "ok")],
)  # fmt: skip
def test_threads_that_spin_for_long(waiting: dict[str, str], expected: str) -> None:
    (found,) = hardware.check_threads(job(("n1", "0,1"), waiting=waiting))
    assert found.verdict == expected and all(f"{name}={value}" in found.words for name, value in waiting.items())


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, {"GOMP_SPINCOUNT": "1000"}), ({"OMP_WAIT_POLICY": "active"}, {"OMP_WAIT_POLICY": "active"}),
     ({"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7"})],
)  # fmt: skip
def test_mpidp_limits_spinning_unless_the_user_has_chosen(given: dict[str, str], expected: dict[str, str]) -> None:
    code = "import os, mpidp.runtime.environment as e; print({n: os.environ[n] for n in e.WAITING if n in os.environ})"
    environment = {name: value for name, value in os.environ.items() if name not in WAITING} | given
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, timeout=60)
    assert ast.literal_eval(found.stdout) == expected


def test_nodes() -> None:
    assert hardware.check_nodes([ONE]).words == "1 node, 1 rank: n1"
    assert hardware.check_nodes(job(("n1", "0"), ("n2", "0"))).verdict == "ok"
    uneven = hardware.check_nodes(job(("n1", "0"), ("n2", "0"), ("n2", "1")))
    assert uneven.verdict == "note" and "n1 1\nn2 2" in uneven.words


A, B = ("GPU-a", "H200"), ("GPU-b", "H200")


@pytest.mark.parametrize(
    ("gpus", "wanted", "verdict", "words"),
    [
        ([(), ()], False, "skipped", "torch finds no GPU"),
        ([(), ()], True, "wrong", "torch finds no GPU"),
        ([(A, B), (A, B)], False, "ok", "n1: rank 1 on H200 GPU-b"),
        ([(A,), (B,)], False, "ok", "n1: rank 1 on H200 GPU-b"),  # each rank sees only its own
        ([(A,), (A,)], False, "warning", "ranks 0-1 share GPU-a"),
        ([(A, B), ()], False, "wrong", "no GPU on rank 1, but GPUs on other ranks"),
    ],
)
def test_gpus_by_uuid(gpus: list[tuple[tuple[str, str], ...]], wanted: bool, verdict: str, words: str) -> None:
    facts = [replace(ONE, rank=rank, gpus=those) for rank, those in enumerate(gpus)]
    found = hardware.check_gpus(facts, wanted)
    assert found.verdict == verdict and words in found.words, found


def test_cuda_aware_mpi() -> None:
    with_gpu = [replace(ONE, gpus=(A,)), replace(ONE, rank=1, gpus=(A,))]
    assert "no GPU" in hardware.check_probe([ONE], [None]).words
    assert hardware.check_probe(with_gpu, [None, None]).verdict == "skipped"
    assert hardware.check_probe(with_gpu, [True, None]).verdict == "ok"
    assert hardware.check_probe(with_gpu, [True, False]).verdict == "note"


@pytest.mark.parametrize(
    ("free", "starting", "verdict"),
    [(8 << 30, 0, "ok"), (32 << 20, 0, "warning"), (1 << 20, 0, "warning"), (1 << 20, 1, "wrong"),
     (32 << 20, 64, "wrong"), (0, 1, "wrong")],
)  # fmt: skip
def test_size_of_shared_memory(free: int, starting: int, verdict: str) -> None:
    found = memory.check_shm({"n1": (16 << 30, 16 << 30), "n2": (16 << 30, free)}, starting)
    assert found.verdict == verdict and ("n2" in found.words or free > 1 << 30)


NAMES = ["mpich_shm_1a2b_0", "sm_segment.n1.0.f512.1", "osc_sm.n1.abc.4.1", "vader_segment.n1.1.2", "ucx_shm_posix_5e"]


def test_segments_of_any_mpi_are_found_and_nothing_else(tmp_path: Path) -> None:
    others = ["my_data", "sem.mpich", "torch_123_456"]
    for name in [*NAMES, *others]:
        (tmp_path / name).write_bytes(b"x" * 5000)
    (tmp_path / "mpich_shm_link").symlink_to(tmp_path / "my_data")
    (tmp_path / "mpich_shm_folder").mkdir()
    found = memory.find("n1", tmp_path)
    assert sorted(one.name for one in found) == sorted(NAMES)
    assert all(one.state == "gone" and one.own and one.bytes >= 4096 and one.age_seconds < 600 for one in found)
    assert [one.name for one in memory.clean(found, tmp_path)] == sorted(NAMES)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mpich_shm_folder", "mpich_shm_link", *others]


HOLD = """
import mmap, os, sys, time
handle = os.open(sys.argv[1], os.O_RDWR)
memory = mmap.mmap(handle, 4096)
if sys.argv[2] == "mapped":
    os.close(handle)
if sys.argv[2] == "open":
    memory.close()
print("held", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("how", ["mapped", "open"])
@pytest.mark.parametrize("blind", ["", "_in_use", "_leased"])
def test_what_a_process_holds_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, blind: str) -> None:
    """Either of two proofs is enough: /proc, or the kernel's lease, which also covers containers."""
    path = tmp_path / NAMES[0]
    path.write_bytes(b"x" * 4096)
    child = subprocess.Popen([sys.executable, "-c", HOLD, str(path), how], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None and child.stdout.readline() == "held\n"
        if blind:
            monkeypatch.setattr(memory, blind, lambda _: set() if blind == "_in_use" else nullcontext())
        [found] = memory.find("n1", tmp_path)
        assert found.state == "used"
        assert memory.clean([replace(found, state="gone")], tmp_path) == [] and path.exists()  # it was opened after the check
    finally:
        child.kill()
        child.communicate()
    [found] = memory.find("n1", tmp_path)
    assert found.state == "gone"
    assert memory.clean([replace(found, own=False)], tmp_path) == [] and path.exists()
    assert memory.clean([found], tmp_path) == [found] and not path.exists()


@pytest.mark.parametrize("host", ["n1", "10.0.0.7", "n1.example.org"])
@pytest.mark.parametrize("form", ["ompi.{pid}", "ompi.{host}.{pid}", "prte.{host}.{pid}", "prte.{host}.{pid}.{uid}"])
def test_the_session_of_a_live_mpirun_is_kept(tmp_path: Path, form: str, host: str) -> None:
    """In every form of the name, also if the folder is that of another machine (in a shared folder). A number in the name that
    is not the process id does not matter."""
    child = subprocess.Popen(["sleep", "60"])
    try:
        live, dead = (tmp_path / form.format(pid=pid, host=host, uid=os.getuid()) for pid in (child.pid, 4194305))
        remote = tmp_path / form.format(pid=4194306, host="n2", uid=os.getuid())
        for folder in (live, dead, remote):
            folder.mkdir()
        found = sessions.find(host, tmp_path)
        assert [one.path for one in found] == [str(dead), str(remote)][: 1 + ("{host}" not in form)]
        assert sessions.clean([*found, sessions.Session(host, str(live))]) == found and live.exists() and not dead.exists()
    finally:
        child.kill()
        child.wait()


def test_the_folder_of_all_sessions_of_a_user_is_kept(tmp_path: Path) -> None:
    (tmp_path / f"ompi.n1.{os.getuid()}").mkdir()
    assert sessions.find("n1", tmp_path) == []


def test_segments_are_judged_by_whose_they_are() -> None:
    gone = memory.Segment("n1", NAMES[0], 3 << 20, "ann", True, 7200.0, "gone")
    [found] = memory.check_segments([gone, replace(gone, state="used")], [])
    assert f"n1:/dev/shm/{NAMES[0]}, 3 MiB, ann's, 2:00 h old" in found.words
    assert found.verdict == "warning" and "--clean" in found.fix
    assert verdicts(memory.check_segments([replace(gone, bytes=72 << 10)], [])) == ["note"]
    [found] = memory.check_segments([gone], [gone])
    assert found.verdict == "ok" and "removed 1 segment, 3 MiB\n" in found.words
    assert verdicts(memory.check_segments([replace(gone, own=False)], [])) == ["note"]
    assert verdicts(memory.check_segments([replace(gone, state="unknown")], [])) == ["note"]
    assert verdicts(memory.check_segments([replace(gone, state="used")], [])) == ["ok"]
    [found] = memory.check_segments([replace(gone, name=f"{i}") for i in range(20)], [])
    assert "and 12 more" in found.words


@pytest.mark.parametrize(
    ("hosts", "expected"),
    [
        (["a"], []),
        (["a", "a", "a"], [[(0, 1)]]),
        (["a", "a", "b"], [[(0, 2)]]),
        (["a", "b", "a", "c", "d"], [[(0, 1), (3, 4)], [(1, 3)]]),
    ],
)
def test_neighbours_are_measured_and_no_rank_twice_at_a_time(hosts: list[str], expected: list[list[tuple[int, int]]]) -> None:
    found = network.pairs(hosts)
    assert found == expected
    for these in found:
        ends = [rank for pair in these for rank in pair]
        assert len(ends) == len(set(ends))


def link(a: str, b: str, bandwidth: float, interface: str = "ib0") -> network.NetworkLink:
    return network.NetworkLink((a, b), 2e-6, bandwidth, interface)


@pytest.mark.parametrize(
    ("links", "expected", "words"),
    [
        ([], ["skipped"], ""),
        ([link("a", "a", 8e9, "")], ["ok"], "between ranks of a: 2 us, 8,000 MB/s; one node, so no network was measured"),
        ([link("a", "a", 1e8, "")], ["warning"], "100 MB/s"),
        ([link("a", "b", 8e9), link("b", "c", 7e9)], ["ok", "ok"], "b - c: 2 us, 7,000 MB/s, the slowest of 2 links"),
        ([link("a", "b", 8e9), link("b", "c", 7e9), link("c", "d", 2e9)], ["warning", "ok"], "c - d"),
        ([link("a", "b", 1e7)], ["warning", "ok"], "10 MB/s"),
        ([link("a", "b", 8e9), link("b", "c", 8e9, "eth0")], ["ok", "warning"], "a - b"),
    ],
)
def test_links(links: list[network.NetworkLink], expected: list[str], words: str) -> None:
    found = network.check_links(links, "MPICH 5.0.2", {"FI_PROVIDER": "tcp", "HOME": "/"})
    assert verdicts(found) == expected and words in found[0].words, found
    if len(found) > 1:
        assert "FI_PROVIDER=tcp" in found[1].words and "HOME" not in found[1].words and "FI_TCP_IFACE" in found[1].fix
        assert all(one.interface in found[1].words for one in links)


def test_the_interface_in_use_is_the_one_by_which_the_bytes_left() -> None:
    before = {"lo": 10, "eth0": 500, "ib0": 0}
    assert network._busiest(before, {"lo": 10, "eth0": 600, "ib0": 10_000}, 9_000) == "ib0"
    assert network._busiest(before, {"lo": 10, "eth0": 600, "ib0": 0}, 9_000) == ""
    assert network._busiest({}, {}, 9_000) == ""


def test_clocks() -> None:
    assert network.check_clocks([5.0, 5.1], ["a", "a"]).verdict == "skipped"
    assert network.check_clocks([5.0, 5.1], ["a", "b"]).verdict == "ok"
    late = network.check_clocks([5.0, 5.1, 2.0], ["a", "b", "c"])
    assert late.verdict == "warning" and "the clock of c differs by -3 s from the clock of a" in late.words


def test_no_byte_of_the_shards_is_read_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda handle, start, length, advice: parts.append((start, start + length)))
    (tmp_path / "index.json").write_text("{}")
    for i in range(2):
        (tmp_path / f"{i}.h5").write_bytes(b"x" * 6000)
    for size_ in (1, 2, 3, 4):
        found = [storage.read(tmp_path, "n1", rank, size_, 9.0) for rank in range(size_)]
        assert sum(one.bytes for one in found) == (6000 if size_ == 1 else 9000 if size_ == 3 else 12000)
        assert storage.check_read(found, "shards").verdict == "ok"
    assert parts[-4:] == [(0, 3000), (0, 3000), (3000, 6000), (3000, 6000)]  # two ranks per file


def test_data_that_are_not_there_are_wrong_and_say_where(tmp_path: Path) -> None:
    there = storage.ReadTest("n1", 9 << 20, 0.01)
    absent = storage.read(tmp_path / "absent", "n2", 1, 2, 9.0)
    found = storage.check_read([there, absent], "shards")
    assert found.verdict == "wrong" and "(rank 1 on n2)" in found.words
    slow = storage.check_read([there, storage.ReadTest("n2", 9 << 20, 2.0)], "shards")
    assert slow.verdict == "warning" and "n2" in slow.words


@pytest.mark.parametrize(
    ("met", "verdict", "words"),
    [
        ([{"flock": True, "fcntl": True}], "ok", "number tested: 1"),
        ([{"flock": True, "fcntl": True}, {"flock": True, "fcntl": False}], "warning", "fcntl: does not exclude other processes"),
        ([{"flock": "not supported", "fcntl": True}], "warning", "flock: not supported; fcntl: works"),
    ],
)
def test_locks(met: list[dict[str, bool | str]], verdict: str, words: str) -> None:
    found = storage.check_locks(met)
    assert found.verdict == verdict and words in found.words, found


def test_a_lock_that_another_process_holds_is_met(tmp_path: Path) -> None:
    handle = storage.make_locked_file(tmp_path / "run")
    assert isinstance(handle, int)
    assert storage.lock_states_in_child(tmp_path / "run") == {"flock": True, "fcntl": True}
    os.close(handle)
    assert storage.lock_states_in_child(tmp_path / "run") == {"flock": False, "fcntl": False}


@pytest.mark.parametrize("child", ["import sys; print('Traceback', file=sys.stderr); sys.exit('no module')", "raise OSError(5)"])
def test_a_lock_test_that_fails_says_nothing_about_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, child: str) -> None:
    """The table has one row for the locks: they could not be checked."""
    monkeypatch.setattr(storage, "_CHILD", child)
    options = argparse.Namespace(gpu=False, network=False, data=None, run=tmp_path / "run", clean=False, script=None)
    found, _ = doctor.examine(MPI.COMM_SELF, options, {}, 0, doctor.Deadline(math.inf))  # a finite one ends this process later
    (locks,) = (one for one in found if one.what == "locks")
    why = "no module" if "no module" in child else "OSError: 5"
    assert locks.verdict == "warning" and "could not be checked" in locks.words and f"code 1: {why}" in locks.words


def test_a_run_folder_must_be_one_and_be_writable(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for found in (storage.make_locked_file(tmp_path / "file" / "run"), storage.lock_states(tmp_path / "absent")):
        assert isinstance(found, CheckResult) and (found.what, found.verdict) == ("run.dir", "wrong") and found.fix


@pytest.mark.parametrize(
    ("sizes", "free", "verdict"),
    [([], 5 << 30, "ok"), ([], 5 << 20, "note"), ([100], 1000, "ok"), ([100], 500, "warning"), ([100], 299, "wrong"),
     ([100, 50, 50, 50], 201, "ok"), ([100, 50, 50, 50], 99, "wrong")],
)  # fmt: skip
def test_room_for_the_checkpoints_to_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sizes: list[int], free: int,
                                          verdict: str) -> None:  # fmt: skip
    """run.keep is 3: with one checkpoint present, space is needed for two more and the one being written."""
    for step, length in enumerate(sizes):
        (tmp_path / f"checkpoints/step_{step:08d}").mkdir(parents=True)
        (tmp_path / f"checkpoints/step_{step:08d}/rank_00000.safetensors").write_bytes(b"x" * length)
    real = os.statvfs(tmp_path)
    monkeypatch.setattr(os, "statvfs", lambda _: type("Told", (), {"f_bavail": free, "f_frsize": 1, "f_blocks": real.f_blocks}))
    assert storage.check_room(tmp_path).verdict == verdict
    if sizes == [100]:
        (tmp_path / "config.toml").write_text("[run]\nkeep = 1\n")
        assert ("100 bytes more" in storage.check_room(tmp_path).words) and storage.check_room(tmp_path).verdict == "ok"


def test_a_check_that_fails_is_a_finding() -> None:
    def check() -> CheckResult:
        raise OSError("no such thing")

    [found] = run_check("cores", check)
    assert found == CheckResult("cores", "warning", "could not be checked: OSError('no such thing')")


def test_the_table_shows_everything_and_the_worst_is_the_first_of_the_worst() -> None:
    found = [CheckResult("a", "ok", "x"), CheckResult("b", "wrong", "y\nz", "mend it"), CheckResult("c", "wrong", "w"),
             CheckResult("d", "warning", "v")]  # fmt: skip
    assert worst(found) == found[1]
    assert [worst(found[:1] + [CheckResult("e", verdict, "")]).verdict for verdict in VERDICTS] == list(VERDICTS)
    rows = ["ok       a  x", "wrong    b  y", "            z", "            -> mend it", "wrong    c  w", "warning  d  v"]
    assert table(found).splitlines() == rows
    long = table([CheckResult("a", "ok", "word " * 100)]).splitlines()
    assert len(long) > 3 and all(len(line) <= 130 for line in long)


def test_small_words() -> None:
    assert numbers([3, 0, 1, 2, 8]) == "0-3,8" and ranks([0]) == "rank 0" and ranks([0, 1]) == "ranks 0-1"
    assert [size(n) for n in (0, 999, 2048, 8 << 20, 24 << 30)] == ["0 bytes", "999 bytes", "2 KiB", "8 MiB", "24.0 GiB"]


def test_leases_do_not_kill_who_takes_them(tmp_path: Path) -> None:
    """If another process opens a leased file, the kernel sends SIGIO, which ends a process that does not ignore it."""
    path = tmp_path / NAMES[0]
    path.write_bytes(b"x" * 4096)
    with memory._leased(path):
        child = subprocess.Popen(["cat", str(path)], stdout=subprocess.PIPE)
        time.sleep(0.2)
    assert child.communicate(timeout=20)[0] == b"x" * 4096
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 4096), pytest.raises(BlockingIOError), memory._leased(path):
        pass


def test_a_probe_that_dies_leaves_no_shared_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The probe crashes if MPI treats a device pointer as a host pointer."""
    told = tmp_path / "pid"
    child = f"import os\nfrom mpi4py import MPI\nopen({str(told)!r}, 'w').write(str(os.getpid()))\nos.kill(os.getpid(), 11)"
    monkeypatch.setattr(probe, "_CHILD", child)
    assert not probe.device_buffers_work()
    assert not list(Path("/dev/shm").glob(f"mpich_shm_{int(told.read_text()):x}_*"))
    monkeypatch.setattr(probe, "_CHILD", "import time; print('device buffers work', flush=True); time.sleep(99)")
    assert not probe.device_buffers_work(timeout_seconds=0.5)
    monkeypatch.setattr(probe, "_CHILD", "print('device buffers work')")
    assert probe.device_buffers_work()
