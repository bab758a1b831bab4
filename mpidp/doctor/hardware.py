"""Checks which cores, threads and GPUs each rank uses, and whether several ranks share a core or a GPU. Pure, except probe()."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mpidp.doctor.facts import THREADS, MachineFacts, nodes
from mpidp.doctor.findings import CheckResult, listed, ranks, worst
from mpidp.runtime.environment import SPIN_COUNT, numbers

BIND = {
    "MPICH": "mpirun -bind-to core:{k} -map-by core:{k}",
    "Open MPI": "mpirun --map-by slot:PE={k} --bind-to core",
    "Intel MPI": "I_MPI_PIN_DOMAIN={k}:compact mpiexec.hydra",
    "srun": "srun --cpus-per-task={k} --cpu-bind=cores (srun does not inherit this option from sbatch: set SRUN_CPUS_PER_TASK)",
}

UNBIND = {  # options for a trial with more ranks than cores, because these launchers bind ranks by default
    "Intel MPI": "; for a trial with more ranks than cores, set I_MPI_PIN=off",
    "Open MPI": "; for a trial with more ranks than cores, use mpirun --bind-to none --oversubscribe",
}


def check_nodes(facts: Sequence[MachineFacts]) -> CheckResult:
    """Check that all nodes have the same number of ranks. Pure."""
    counts = {host: len(members) for host, members in nodes(facts).items()}
    total = f"{len(counts)} node{'s' * (len(counts) > 1)}"
    if len(set(counts.values())) == 1:
        each = f"{len(facts) // len(counts)} rank{'s' * (len(facts) > len(counts))}{' each' * (len(counts) > 1)}"
        return CheckResult("nodes", "ok", f"{total}, {each}: {', '.join(list(counts)[:8])}{' ...' * (len(counts) > 8)}")
    words = f"{total} with unequal numbers of ranks:\n" + listed([f"{host} {count}" for host, count in counts.items()])
    fix = "start equally many ranks on each node (Slurm --ntasks-per-node, mpirun -ppn), so that ranks have equally many cores"
    return CheckResult("nodes", "note", words, fix)


def check_cores(facts: Sequence[MachineFacts], launcher: str) -> CheckResult:
    """Check which cores each rank may use, and whether ranks must share cores. Pure."""
    lines, found = [], []
    for host, members in nodes(facts).items():
        places: dict[tuple[int, ...], list[int]] = {}
        for one in members:
            places.setdefault(one.cores, []).append(one.rank)
        bound = "; ".join(f"{ranks(group)} on {numbers(cores)}" for cores, group in places.items())
        lines.append(f"{host} ({members[0].host_cores} core{'s' * (members[0].host_cores > 1)}): {bound}")
        usable, crowd = sorted({core for one in members for core in one.cores}), crowded(members)
        fix = BIND.get(launcher, "bind each rank to its own cores").format(k=max(1, members[0].host_cores // len(members)))
        if crowd and len(crowd) == members[0].host_cores:
            words = f"{host}: {len(members)} ranks share its {len(crowd)} cores"
            found.append(CheckResult("cores", "warning", words, "fine for a trial; for speed, use at most one rank per core"))
        elif crowd:
            words = f"{host}: {ranks([one.rank for one in members if set(one.cores) <= set(crowd)])} share core {numbers(crowd)}"
            unbind = UNBIND.get(launcher, "")
            fix += f"; or use fewer ranks or more cores (--cpus-per-task){unbind}"
            found.append(CheckResult("cores", "wrong", words, fix))
        elif len(usable) < members[0].host_cores and launcher:
            words = f"{host}: its ranks may use {len(usable)} of {members[0].host_cores} cores"
            found.append(CheckResult("cores", "note", words, f"{fix}; no change needed if the job has only these cores"))
    if not found:
        one_each = all(len(one.cores) == 1 < one.host_cores for one in facts)
        note = "\neach rank is bound to one core (the default of some launchers), so comm.overlap=auto does not use poll"
        return CheckResult("cores", "ok", listed(lines) + note * one_each)
    first = worst(found)
    return CheckResult("cores", first.verdict, f"{first.words}\n{listed(lines)}", first.fix)


def crowded(facts: Sequence[MachineFacts]) -> tuple[int, ...]:
    """Return the smallest set of cores to which more ranks are bound than the set has cores. Return () if there is no such set.
    Only two kinds of sets are considered: the cores of one rank, and the cores of all ranks together. `facts`: the facts of the
    ranks of one node. Pure."""
    sets = sorted({one.cores for one in facts} | {tuple(sorted({core for one in facts for core in one.cores}))}, key=len)
    return next((cores for cores in sets if sum(set(one.cores) <= set(cores) for one in facts) > len(cores)), ())


def check_threads(facts: Sequence[MachineFacts]) -> list[CheckResult]:
    """Check whether the numbers of threads in environment variables exceed the number of cores. Also report OpenMP threads that
    spin for a long time. Pure."""
    found, each = [], 0
    for host, members in nodes(facts).items():
        cores = len({core for one in members for core in one.cores})
        each = max(1, cores // len(members))
        for name in dict.fromkeys(name for one in members for name in one.threads):
            counts = [int(value) for one in members if (value := one.threads.get(name, "").split(",")[0]).isdigit()]
            if sum(counts) > max(cores, len(members)):
                words = f"{host}: {name}={max(counts)} gives {sum(counts)} threads for {len(members)} ranks on {cores} cores. "
                words += f"mpidp.train sets its own number (train.threads, {each} here), but other libraries use this variable"
                found.append(CheckResult("threads", "warning", words, f"export {name}={each}"))
    given = ", ".join(f"{name}={value}" for name, value in facts[0].threads.items()) or f"{THREADS[0]} etc. are unset"
    words = f"train.threads=0 means {each} thread{'s' * (each > 1)} per rank; {given}; {waiting_words(facts[0])}"
    spinning = next((one for one in facts if spins(one)), None)
    if spinning is not None:
        found.append(CheckResult(
            "threads", "note",
            f"{spinning.host}: with {waiting_words(spinning)}, waiting threads keep their cores busy. If other processes need "
            "these cores, a step can take many times as long",
            f"unset {' '.join(spinning.waiting)}; mpidp then sets GOMP_SPINCOUNT={SPIN_COUNT}",
        ))
    return found[:2] or [CheckResult("threads", "ok", words)]


def spins(facts: MachineFacts) -> bool:
    """Return whether environment variables make waiting OpenMP threads spin for a long time. Pure."""
    count = facts.waiting.get("GOMP_SPINCOUNT", "").strip()
    if count.isdigit():
        return int(count) > 10 * int(SPIN_COUNT)
    return bool(count) or facts.waiting.get("OMP_WAIT_POLICY", "").strip().lower() == "active"  # count: INFINITE, or 30k


def waiting_words(facts: MachineFacts) -> str:
    """Return a text that describes how OpenMP threads wait. Pure."""
    return ", ".join(f"{name}={value}" for name, value in facts.waiting.items()) or "OpenMP threads wait in the default way"


def check_gpus(facts: Sequence[MachineFacts], wanted: bool) -> CheckResult:
    """Check that each rank has its own GPU. A rank uses the GPU cuda:{local rank % number of GPUs}. GPUs are compared by UUID.
    `wanted`: whether GPUs are required. Pure."""
    if not any(one.gpus for one in facts):
        fix = "install a CUDA build of torch, and request GPUs for the job (--gpus-per-node)" if wanted else ""
        return CheckResult("GPUs", "wrong" if wanted else "skipped", "torch finds no GPU on any rank", fix)
    lines, users = [], dict[str, list[int]]()
    for host, members in nodes(facts).items():
        for place, one in enumerate(members):
            uuid, name = one.gpus[place % len(one.gpus)] if one.gpus else ("", "no GPU")
            lines.append(f"{host}: rank {one.rank} on {name} {uuid}")
            users.setdefault(uuid, []).append(one.rank)
    if without := users.pop("", []):
        fix = "use nodes that all have GPUs (--gpus-per-node), or --train.device=cpu"
        return CheckResult("GPUs", "wrong", f"no GPU on {ranks(without)}, but GPUs on other ranks\n{listed(lines)}", fix)
    for uuid, sharing in users.items():
        if len(sharing) > 1:
            fix = "use one rank per GPU; if each rank sees a single GPU, make a different GPU visible to each rank"
            return CheckResult("GPUs", "warning", f"{ranks(sharing)} share {uuid}\n{listed(lines)}", fix)
    return CheckResult("GPUs", "ok", listed(lines))


def probe() -> bool:
    """Return True if Sendrecv and Allreduce of device memory give correct results. The test runs in a child process, because it
    may crash MPI. Independent."""
    from mpidp.comm.probe import device_buffers_work

    return device_buffers_work(60.0)


def check_probe(facts: Sequence[MachineFacts], works: Sequence[bool | None]) -> CheckResult:
    """Report whether MPI accepts device memory. `works`: the result of probe() on each rank, or None if the rank did not call it.
    Pure."""
    tried = [one for one in works if one is not None]
    if not any(one.gpus for one in facts):
        return CheckResult("CUDA-aware MPI", "skipped", "no GPU")
    if not tried:
        return CheckResult("CUDA-aware MPI", "skipped", "not tested", "--gpu tests it in a child process")
    if all(tried):
        return CheckResult("CUDA-aware MPI", "ok", "Sendrecv and Allreduce of device memory (12 bytes and 4 MiB) are correct")
    words = f"device pointers crash MPI or give wrong values on {tried.count(False)} of {len(tried)} nodes: gradients go through "
    fix = "use an MPI built with CUDA, or one over UCX with CUDA; for Cray MPICH set MPICH_GPU_SUPPORT_ENABLED=1"
    return CheckResult("CUDA-aware MPI", "note", words + "pinned host memory (comm.gpu=auto detects this)", fix)


def summary(facts: Sequence[MachineFacts]) -> dict[str, Any]:
    """Return the entries of cluster.json that describe the nodes. Pure."""
    by_host = nodes(facts)
    return {
        "hosts": list(by_host),
        "ranks_per_node": [len(members) for members in by_host.values()],
        "cores_per_node": [len({core for one in members for core in one.cores}) for members in by_host.values()],
        "gpus_per_node": [len({uuid for one in members for uuid, _ in one.gpus}) for members in by_host.values()],
        "gpu": next((one.gpus[0][1] for one in facts if one.gpus), None),
        "shm_bytes": min(one.shm[0] for one in facts),
        "versions": facts[0].versions,
    }
