"""Ranks, cores, threads, GPUs: who sits where, and who sits on whom. Pure but for `probe`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mpidp.checkup.facts import Facts, nodes
from mpidp.checkup.findings import Finding, listed, ranks, worst
from mpidp.runtime.environment import numbers

BIND = {
    "MPICH": "mpirun -bind-to core:{k} -map-by core:{k}",
    "Open MPI": "mpirun --map-by slot:PE={k} --bind-to core",
    "srun": "srun --cpus-per-task={k} --cpu-bind=cores (srun does not take it over from sbatch: SRUN_CPUS_PER_TASK)",
}


def check_nodes(facts: Sequence[Facts]) -> Finding:
    """Ranks per node. Pure."""
    counts = {host: len(those) for host, those in nodes(facts).items()}
    if len(set(counts.values())) == 1:
        each = f"{len(facts) // len(counts)} rank{'s' * (len(facts) > len(counts))} each"
        return Finding("nodes", "ok", f"{len(counts)} with {each}: {', '.join(list(counts)[:8])}{' ...' * (len(counts) > 8)}")
    words = f"{len(counts)} with unequal numbers of ranks:\n" + listed([f"{host} {count}" for host, count in counts.items()])
    return Finding("nodes", "note", words, "ranks of fuller nodes have fewer cores each: --ntasks-per-node, or -ppn of mpirun")


def check_cores(facts: Sequence[Facts], launcher: str) -> Finding:
    """Which cores each rank may use, and whether two must share one. Pure."""
    lines, found = [], []
    for host, those in nodes(facts).items():
        places: dict[tuple[int, ...], list[int]] = {}
        for one in those:
            places.setdefault(one.cores, []).append(one.rank)
        held = "; ".join(f"{ranks(these)} on {numbers(cores)}" for cores, these in places.items())
        lines.append(f"{host} (of {those[0].host_cores}): {held}")
        usable, crowd = sorted({core for one in those for core in one.cores}), crowded(those)
        fix = BIND.get(launcher, "bind ranks to cores of their own").format(k=max(1, those[0].host_cores // len(those)))
        if crowd and len(crowd) == those[0].host_cores:
            words = f"{host}: {len(those)} ranks share its {len(crowd)} cores"
            found.append(Finding("cores", "warning", words, "right for trying out; for speed, at most a rank a core"))
        elif crowd:
            words = f"{host}: {ranks([one.rank for one in those if set(one.cores) <= set(crowd)])} share core {numbers(crowd)}"
            found.append(Finding("cores", "wrong", words, f"{fix}; or fewer ranks, or more cores (--cpus-per-task)"))
        elif len(usable) < those[0].host_cores and launcher:
            words = f"{host}: its ranks may use {len(usable)} of {those[0].host_cores} cores"
            found.append(Finding("cores", "note", words, f"{fix}; right as it is where the job was given no more"))
    if not found:
        return Finding("cores", "ok", listed(lines))
    first = worst(found)
    return Finding("cores", first.verdict, f"{first.words}\n{listed(lines)}", first.fix)


def crowded(facts: Sequence[Facts]) -> tuple[int, ...]:
    """The smallest set of cores on which more ranks of a node are held than it has cores; () when each can have its own. Pure."""
    sets = sorted({one.cores for one in facts} | {tuple(sorted({core for one in facts for core in one.cores}))}, key=len)
    return next((held for held in sets if sum(set(one.cores) <= set(held) for one in facts) > len(held)), ())


def check_threads(facts: Sequence[Facts]) -> list[Finding]:
    """Threads asked for by the environment against cores. Pure."""
    found, each = [], 0
    for host, those in nodes(facts).items():
        cores = len({core for one in those for core in one.cores})
        each = max(1, cores // len(those))
        for name in dict.fromkeys(name for one in those for name in one.threads):
            asked = [int(value) for one in those if (value := one.threads.get(name, "").split(",")[0]).isdigit()]
            if sum(asked) > max(cores, len(those)):
                words = f"{host}: {name}={max(asked)} means {sum(asked)} threads of {len(those)} ranks on {cores} cores. "
                words += f"mpidp.train sets its own number (train.threads, {each} here), all else in the ranks follows this one"
                found.append(Finding("threads", "warning", words, f"export {name}={each}"))
    said = ", ".join(f"{name}={value}" for name, value in facts[0].threads.items())
    words = f"train.threads=0 will mean {each} a rank; {said or 'no variable asks for others'}"
    return found[:2] or [Finding("threads", "ok", words)]


def check_gpus(facts: Sequence[Facts], wanted: bool) -> Finding:
    """Which GPU each rank would train on (cuda:{place on its node % GPUs}), by UUID. Pure."""
    if not any(one.gpus for one in facts):
        fix = "a CUDA build of torch, and the job's GPU request (--gpus-per-node)" if wanted else ""
        return Finding("GPUs", "wrong" if wanted else "skipped", "no rank's torch sees one", fix)
    lines, users = [], dict[str, list[int]]()
    for host, those in nodes(facts).items():
        for place, one in enumerate(those):
            uuid, name = one.gpus[place % len(one.gpus)] if one.gpus else ("", "no GPU")
            lines.append(f"{host}: rank {one.rank} on {name} {uuid}")
            users.setdefault(uuid, []).append(one.rank)
    if without := users.pop("", []):
        fix = "nodes with GPUs for all (--gpus-per-node), or --train.device=cpu"
        return Finding("GPUs", "wrong", f"{ranks(without)} see none, others do\n{listed(lines)}", fix)
    for uuid, those_ranks in users.items():
        if len(those_ranks) > 1:
            fix = "one rank a GPU; where each rank is shown one alone, see that it is another for each"
            return Finding("GPUs", "warning", f"{ranks(those_ranks)} share {uuid}\n{listed(lines)}", fix)
    return Finding("GPUs", "ok", listed(lines))


def probe() -> bool:
    """Do Sendrecv and Allreduce of device memory give right results? Tried in a child process that may die. Independent."""
    from mpidp.comm.probe import device_buffers_work

    return device_buffers_work(60.0)


def check_probe(facts: Sequence[Facts], works: Sequence[bool | None]) -> Finding:
    """works: None where it was not tried. Pure."""
    tried = [one for one in works if one is not None]
    if not any(one.gpus for one in facts):
        return Finding("CUDA-aware MPI", "skipped", "no GPU here to try it with")
    if not tried:
        return Finding("CUDA-aware MPI", "skipped", "not tried", "--gpu tries it, in a process that may die of it")
    if all(tried):
        return Finding("CUDA-aware MPI", "ok", "Sendrecv and Allreduce of device memory, 12 bytes and 4 MiB, are right")
    words = f"device pointers crash it or come out wrong on {tried.count(False)} of {len(tried)} nodes: gradients go by pinned "
    fix = "an MPI built with CUDA, or over UCX with CUDA; MPICH_GPU_SUPPORT_ENABLED=1 for Cray's"
    return Finding("CUDA-aware MPI", "note", words + "host memory (comm.gpu=auto finds out by itself)", fix)


def summary(facts: Sequence[Facts]) -> dict[str, Any]:
    """For cluster.json. Pure."""
    by_host = nodes(facts)
    return {
        "hosts": list(by_host),
        "ranks_per_node": [len(those) for those in by_host.values()],
        "cores_per_node": [len({core for one in those for core in one.cores}) for those in by_host.values()],
        "gpus_per_node": [len({uuid for one in those for uuid, _ in one.gpus}) for those in by_host.values()],
        "gpu": next((one.gpus[0][1] for one in facts if one.gpus), None),
        "shm_bytes": min(one.shm[0] for one in facts),
        "versions": facts[0].versions,
    }
