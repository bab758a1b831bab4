"""Measures latency and bandwidth between ranks, and finds the network interface in use. Also compares the clocks of nodes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpidp.doctor.findings import CheckResult

if TYPE_CHECKING:
    from mpi4py import MPI

TAG = 7
SMALL = 256 << 10  # bytes of the first message, whose time determines the size of the next messages
SLOW_NODE, SLOW_LINK = 5e8, 1.2e8  # bytes/s; on a slower node, ranks probably share cores; a slower link is 1 Gbit/s
SETTINGS = ("FI_", "UCX_", "MPIR_CVAR_CH4_NETMOD", "MPIR_CVAR_CH4_OFI", "MPICH_OFI_", "HYDRA_IFACE", "PRTE_MCA_prte_if",
            "I_MPI_FABRICS", "I_MPI_OFI_PROVIDER", "OMPI_MCA_btl", "OMPI_MCA_pml", "OMPI_MCA_mtl")  # fmt: skip
HOW = {
    "MPICH": "UCX_NET_DEVICES=NAME (UCX), FI_PROVIDER=tcp FI_TCP_IFACE=NAME (libfabric), mpirun -iface NAME (launcher)",
    "Intel MPI": "FI_PROVIDER=tcp FI_TCP_IFACE=NAME (libfabric), mpiexec.hydra -iface NAME (launcher)",
    "Open MPI": "--mca btl_tcp_if_include NAME, UCX_NET_DEVICES=NAME (UCX), --prtemca prte_if_include NAME (launcher)",
}


@dataclass(frozen=True)
class NetworkLink:
    """The latency and bandwidth that were measured between two ranks."""

    ends: tuple[str, str]  # hosts of the two ranks
    latency_seconds: float
    bandwidth_bytes_per_second: float
    interface: str  # network interface through which the first host sent the messages; "" if unknown

    def __str__(self) -> str:
        a, b = self.ends
        speed = f"{1e6 * self.latency_seconds:.3g} us, {_speed(self.bandwidth_bytes_per_second)}"
        return f"{a} - {b}: {speed}" if a != b else f"between ranks of {a}: {speed}"


def _speed(bandwidth: float) -> str:
    return f"{bandwidth / 1e6:,.0f} MB/s" if bandwidth >= 1e8 else f"{bandwidth / 1e6:.3g} MB/s"


def pairs(hosts: Sequence[str]) -> list[list[tuple[int, int]]]:
    """Choose the pairs of ranks between which the network is measured. Return one or two lists of pairs. The pairs of one list
    are measured at the same time. A pair consists of the first rank of a node and the first rank of the next node. On a single
    node, the only pair is ranks 0 and 1. For a job of one rank, return an empty list. `hosts`: the host of each rank. Pure."""
    firsts = [hosts.index(host) for host in dict.fromkeys(hosts)]
    if len(firsts) == 1:
        return [[(0, 1)]] if len(hosts) > 1 else []
    links = list(zip(firsts, firsts[1:], strict=False))
    return [part for part in (links[::2], links[1::2]) if part]


def measure(world: MPI.Intracomm, hosts: Sequence[str], thorough: bool) -> list[NetworkLink]:
    """Measure the link between the two ranks of each pair in pairs(hosts). `thorough`: whether to use larger messages, for up
    to 3 s per pair instead of 0.5 s. Collective over world."""
    from mpidp.runtime.world import polite_barrier

    largest, seconds = (64 << 20, 3.0) if thorough else (4 << 20, 0.5)
    own: list[NetworkLink] = []
    for simultaneous in pairs(hosts):
        polite_barrier(world)
        for a, b in simultaneous:
            if world.rank == a:
                before, latency = _sent(), ping(world, b, 8, 1000, 0.2)
                large = min(largest, max(SMALL, int(seconds / 4 * SMALL / min(ping(world, b, SMALL, 5, 0.2)))))
                times = ping(world, b, large, 50, seconds)
                carried = _busiest(before, _sent(), large * len(times) / 2)
                own = [*own, NetworkLink((hosts[a], hosts[b]), statistics.median(latency), large / min(times), carried)]
            elif world.rank == b:
                for _ in range(3):
                    pong(world, a)
    polite_barrier(world)
    return [link for links in world.allgather(own) for link in links]


def ping(comm: MPI.Intracomm, other: int, size: int, most: int, seconds: float) -> list[float]:
    """Measure round trips of messages of `size` bytes to rank `other`, which must call pong(). Return half the seconds of each
    round trip. The first round trip is left out. Stop after `most` other round trips, or after `seconds` seconds. Collective over
    the two ranks."""
    comm.send(size, other, TAG)
    out, back, times = bytearray(size), bytearray(size), list[float]()
    began = time.perf_counter()
    while not out[0]:  # the first byte is 1 in the last message, and 0 in all others
        out[0] = len(times) >= most or (len(times) > 0 and time.perf_counter() - began > seconds)
        start = time.perf_counter()
        comm.Send(out, other, TAG)
        comm.Recv(back, other, TAG)
        times.append((time.perf_counter() - start) / 2)
    return times[1:]


def pong(comm: MPI.Intracomm, other: int) -> None:
    """Send back the messages that ping() on rank `other` sends. Collective over the two ranks."""
    back = bytearray(comm.recv(source=other, tag=TAG))
    while not back[0]:
        comm.Recv(back, other, TAG)
        comm.Send(back, other, TAG)


def _sent() -> dict[str, int]:
    """Return the number of bytes that this machine has sent so far, by interface."""
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
    """Return the interface that sent the most bytes between two calls of _sent(), or "" if it sent fewer than `least` bytes.
    `before`, `after`: the results of the two calls. Pure."""
    grown = {name: count - before.get(name, count) for name, count in after.items()}
    name = max(grown, key=lambda name: grown[name], default="")
    return name if name and grown[name] >= least else ""


def check_links(links: Sequence[NetworkLink], library: str, environ: Mapping[str, str]) -> list[CheckResult]:
    """Check the bandwidth between ranks and the interface in use. Pure."""
    if not links:
        return [CheckResult("network", "skipped", "needs two ranks")]
    choose = f"to choose an interface: {HOW.get(library.rpartition(' ')[0], 'see the manual of this MPI')}"
    slowest = min(links, key=lambda link: link.bandwidth_bytes_per_second)
    speed, usual = slowest.bandwidth_bytes_per_second, statistics.median(link.bandwidth_bytes_per_second for link in links)
    if slowest.ends[0] == slowest.ends[1]:
        slow = "check whether ranks share cores: within a node they communicate through memory" if speed < SLOW_NODE else ""
        return [CheckResult("network", "warning" if slow else "ok", f"{slowest}; one node, so no network was measured", slow)]
    words = str(slowest) + (f", the slowest of {len(links)} links (median {_speed(usual)})" if len(links) > 1 else "")
    fix = f"repair or exclude one of {' and '.join(slowest.ends)}" if speed < 0.5 * usual else choose if speed < SLOW_LINK else ""
    names = sorted({link.interface or "unknown (shared memory, or a fabric that the kernel does not count)" for link in links})
    given = ", ".join(f"{name}={value}" for name, value in environ.items() if name.startswith(SETTINGS)) or "no variable is set"
    verdict = "warning" if len(names) > 1 else "ok"
    interface = CheckResult("interface", verdict, f"used between nodes: {', '.join(names)}; {given}", choose)
    return [CheckResult("network", "warning" if fix else "ok", words, fix), interface]


def check_clocks(times: Sequence[float], hosts: Sequence[str]) -> CheckResult:
    """Compare the clocks of nodes. Locks, logs and time limits depend on the clocks. `times`: the time of each rank
    immediately after a barrier. Pure."""
    if len(set(hosts)) == 1:
        return CheckResult("clocks", "skipped", "only one node")
    late = max(range(len(times)), key=lambda rank: abs(times[rank] - times[0]))
    apart = times[late] - times[0]
    if abs(apart) < 0.5:
        return CheckResult("clocks", "ok", f"all within {abs(apart):.2g} s")
    words = f"the clock of {hosts[late]} differs by {apart:+.3g} s from the clock of {hosts[0]}"
    return CheckResult("clocks", "warning", words, "synchronize the clocks (chrony, ntpd)")


def summary(links: Sequence[NetworkLink]) -> dict[str, Any]:
    """Return the entries of cluster.json that describe the slowest link. Pure."""
    return {
        "between": None if not links else "ranks of one node" if links[0].ends[0] == links[0].ends[1] else "nodes",
        "latency_seconds": max((link.latency_seconds for link in links), default=None),
        "bandwidth_bytes_per_second": min((link.bandwidth_bytes_per_second for link in links), default=None),
    }
