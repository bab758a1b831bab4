"""What travels between ranks: latency, bandwidth, which interface it takes; and how far clocks are apart."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpidp.checkup.findings import Finding

if TYPE_CHECKING:
    from mpi4py import MPI

TAG = 7
SMALL = 256 << 10  # bytes of a message that says how large one can be measured in time
SLOW_NODE, SLOW_LINK = 5e8, 1.2e8  # bytes/s: of memory that is shared by too many; what 1 Gbit/s carries
SETTINGS = ("FI_", "UCX_", "MPIR_CVAR_CH4_NETMOD", "MPIR_CVAR_CH4_OFI", "MPICH_OFI_", "HYDRA_IFACE", "PRTE_MCA_prte_if",
            "OMPI_MCA_btl", "OMPI_MCA_pml", "OMPI_MCA_mtl")  # fmt: skip
HOW = {
    "MPICH": "UCX_NET_DEVICES=NAME (UCX), FI_PROVIDER=tcp FI_TCP_IFACE=NAME (libfabric), mpirun -iface NAME (start)",
    "Open MPI": "--mca btl_tcp_if_include NAME, UCX_NET_DEVICES=NAME (UCX), --prtemca prte_if_include NAME (start)",
}


@dataclass(frozen=True)
class Link:
    """Measured between two ranks."""

    ends: tuple[str, str]  # hosts
    latency_seconds: float
    bandwidth_bytes_per_second: float
    interface: str  # of the first host, that carried it; "" when none did

    def __str__(self) -> str:
        a, b = self.ends
        speed = f"{1e6 * self.latency_seconds:.3g} us, {_speed(self.bandwidth_bytes_per_second)}"
        return f"{a} - {b}: {speed}" if a != b else f"between ranks of {a}: {speed}"


def _speed(bandwidth: float) -> str:
    return f"{bandwidth / 1e6:,.0f} MB/s" if bandwidth >= 1e8 else f"{bandwidth / 1e6:.3g} MB/s"


def pairs(hosts: Sequence[str]) -> list[list[tuple[int, int]]]:
    """Rounds of pairs that measure at the same time: neighbours among the nodes, by their first ranks; ranks 0 and 1 where there
    is one node. hosts: of each rank. Pure."""
    firsts = [hosts.index(host) for host in dict.fromkeys(hosts)]
    if len(firsts) == 1:
        return [[(0, 1)]] if len(hosts) > 1 else []
    links = list(zip(firsts, firsts[1:], strict=False))
    return [part for part in (links[::2], links[1::2]) if part]


def measure(world: MPI.Intracomm, hosts: Sequence[str], thorough: bool) -> list[Link]:
    """Every pair; a second or so each round. Collective over world."""
    from mpidp.runtime.world import polite_barrier

    largest, seconds = (64 << 20, 3.0) if thorough else (4 << 20, 0.5)
    mine: list[Link] = []
    for these in pairs(hosts):
        polite_barrier(world)
        for a, b in these:
            if world.rank == a:
                before, latency = _sent(), ping(world, b, 8, 1000, 0.2)
                large = min(largest, max(SMALL, int(seconds / 4 * SMALL / min(ping(world, b, SMALL, 5, 0.2)))))
                times = ping(world, b, large, 50, seconds)
                carried = _busiest(before, _sent(), large * len(times) / 2)
                mine = [*mine, Link((hosts[a], hosts[b]), statistics.median(latency), large / min(times), carried)]
            elif world.rank == b:
                for _ in range(3):
                    pong(world, a)
    polite_barrier(world)
    return [link for links in world.allgather(mine) for link in links]


def ping(comm: MPI.Intracomm, other: int, size: int, most: int, seconds: float) -> list[float]:
    """Half the round trips, the first left out: at least one, then as many as fit. Collective over the two."""
    comm.send(size, other, TAG)
    out, back, times = bytearray(size), bytearray(size), list[float]()
    began = time.perf_counter()
    while not out[0]:  # each message says whether it is the last
        out[0] = len(times) >= most or (len(times) > 0 and time.perf_counter() - began > seconds)
        start = time.perf_counter()
        comm.Send(out, other, TAG)
        comm.Recv(back, other, TAG)
        times.append((time.perf_counter() - start) / 2)
    return times[1:]


def pong(comm: MPI.Intracomm, other: int) -> None:
    """The other side of ping. Collective over the two."""
    back = bytearray(comm.recv(source=other, tag=TAG))
    while not back[0]:
        comm.Recv(back, other, TAG)
        comm.Send(back, other, TAG)


def _sent() -> dict[str, int]:
    """Bytes that left by each interface of this machine, so far."""
    found = {}
    with suppress(OSError):
        for line in Path("/proc/net/dev").read_text().splitlines()[2:]:
            name, _, counts = line.partition(":")
            found[name.strip()] = int(counts.split()[8])
    for counter in Path("/sys/class/infiniband").glob("*/ports/*/counters/port_xmit_data"):
        with suppress(OSError, ValueError):
            found[f"{counter.parts[4]}:{counter.parts[6]}"] = 4 * int(counter.read_text())
    return found


def _busiest(before: Mapping[str, int], after: Mapping[str, int], least: float) -> str:
    """The interface by which at least so many bytes left. Pure."""
    grown = {name: count - before.get(name, count) for name, count in after.items()}
    name = max(grown, key=lambda name: grown[name], default="")
    return name if name and grown[name] >= least else ""


def check_links(links: Sequence[Link], library: str, environ: Mapping[str, str]) -> list[Finding]:
    """How fast ranks talk, and through what. Pure."""
    if not links:
        return [Finding("network", "skipped", "one rank sends nothing")]
    choose = f"to choose: {HOW.get(library.rpartition(' ')[0], 'see the manual of this MPI')}"
    slowest = min(links, key=lambda link: link.bandwidth_bytes_per_second)
    speed, usual = slowest.bandwidth_bytes_per_second, statistics.median(link.bandwidth_bytes_per_second for link in links)
    if slowest.ends[0] == slowest.ends[1]:
        slow = "are its cores shared? Ranks of a node talk through memory" if speed < SLOW_NODE else ""
        return [Finding("network", "warning" if slow else "ok", f"{slowest}; one node, so no network was measured", slow)]
    words = str(slowest) + (f", the slowest of {len(links)} links; usual are {_speed(usual)}" if len(links) > 1 else "")
    fix = f"mend or leave out one of {' and '.join(slowest.ends)}" if speed < 0.5 * usual else choose if speed < SLOW_LINK else ""
    names = sorted({link.interface or "none that the kernel counts (shared memory, or a fabric of its own)" for link in links})
    said = ", ".join(f"{name}={value}" for name, value in environ.items() if name.startswith(SETTINGS)) or "nothing is set"
    verdict = "warning" if len(names) > 1 else "ok"
    interface = Finding("interface", verdict, f"messages between nodes went by {', '.join(names)}; {said}", choose)
    return [Finding("network", "warning" if fix else "ok", words, fix), interface]


def check_clocks(times: Sequence[float], hosts: Sequence[str]) -> Finding:
    """Locks, logs and time limits compare the times of nodes. times: of each rank, right after a barrier. Pure."""
    if len(set(hosts)) == 1:
        return Finding("clocks", "skipped", "one node has one")
    late = max(range(len(times)), key=lambda rank: abs(times[rank] - times[0]))
    apart = times[late] - times[0]
    if abs(apart) < 0.5:
        return Finding("clocks", "ok", f"all within {abs(apart):.2g} s")
    return Finding("clocks", "warning", f"{hosts[late]} is {apart:+.3g} s from {hosts[0]}", "synchronise its time (chrony, ntpd)")


def summary(links: Sequence[Link]) -> dict[str, Any]:
    """For cluster.json: the slowest of all. Pure."""
    return {
        "between": None if not links else "ranks of one node" if links[0].ends[0] == links[0].ends[1] else "nodes",
        "latency_seconds": max((link.latency_seconds for link in links), default=None),
        "bandwidth_bytes_per_second": min((link.bandwidth_bytes_per_second for link in links), default=None),
    }
