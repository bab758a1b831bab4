"""Creates virtual nodes on this machine, connected by a link of given bandwidth and delay. This module uses network namespaces
and tc, so it needs root and Linux.

Every node has an interface `data` (10.10.0.1, .2, ...), which is limited to the link's bandwidth in both directions (tc tbf). It
also has an interface `control` without limit, through which ranks reach their mpirun. Without a delay the data interfaces are
connected by a bridge. With a delay, a process forwards packets from node to node after the delay, because kernels of virtual
machines often lack tc's netem. In both cases the kernel's TCP is used, with its windows and slow start.

Everything runs inside one `unshare` with its own /run, /dev/shm and process ids. The network of the machine itself is not
changed, and nothing remains after `unshare` has ended.
"""

from __future__ import annotations

import ctypes
import fcntl
import heapq
import json
import os
import select
import shutil
import signal
import struct
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

INSIDE = "MPIDP_BENCHMARK_LINK"
UNSHARE = ["unshare", "--mount", "--net", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
TRY = ("mount -t tmpfs tmpfs /run && ip link add switch type bridge && "
       "tc qdisc add dev switch root tbf rate 1mbit burst 10kb limit 10kb")
SCRATCH = Path("/run/mpidp")  # inside the namespaces: in memory, removed with them
SET_IFF, SET_OFFLOAD = 0x400454CA, 0x400454D0  # ioctls TUNSETIFF and TUNSETOFFLOAD
TUN, NO_PI, VNET_HDR = 0x1, 0x1000, 0x4000
CHECKSUM_AND_TSO = 0x1 | 0x2
HEADER = 10  # bytes of a virtio_net_hdr before the packet
LAUNCH = {  # Hydra starts a daemon on each node; with Open MPI each rank enters its node by itself
    "mpich": "-launcher rsh -localhost 10.9.0.254 -genv MPIR_CVAR_CH4_NETMOD ofi -genv FI_PROVIDER tcp -genv FI_TCP_IFACE data",
    "openmpi": "--pmixmca ptl_base_if_include 10.9.0.0/16 --pmixmca ptl_base_remote_connections 1 --mca pml ob1 "
               "--mca btl self,tcp --mca btl_tcp_if_include 10.10.0.0/24",
}
OF_RANKS = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parent.parent),
            "MASTER_ADDR": "10.10.0.1", "GLOO_SOCKET_IFNAME": "data", "OMPI_ALLOW_RUN_AS_ROOT": "1",
            "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "OMPI_MCA_osc": "^ucx",
            "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe", "OMPI_MCA_mpi_yield_when_idle": "1"}
REPEATS = 6
ALLREDUCE = """
import statistics, sys, time, numpy as np
from mpi4py import MPI
world, flat, times = MPI.COMM_WORLD, np.zeros(int(sys.argv[1]) // 4, dtype="f4"), []
for repeat in range(int(sys.argv[2])):
    world.Barrier()
    began = time.perf_counter()
    world.Allreduce(MPI.IN_PLACE, flat)
    times.append(time.perf_counter() - began)
trips, last, byte = [], world.size - 1, bytearray(1)
for repeat in range(9):
    began = time.perf_counter()
    if world.rank == 0:
        world.Send(byte, last)
        world.Recv(byte, last)
    elif world.rank == last:
        world.Recv(byte, 0)
        world.Send(byte, 0)
    trips.append(time.perf_counter() - began)
if world.rank == 0:
    print(f"took {statistics.median(times[1:])} {statistics.median(trips)}")
"""


def impossible(ms: float) -> str:
    """Return why such a link cannot be created here, or an empty string. Independent."""
    missing = [tool for tool in ("unshare", "nsenter", "ip", "tc", "mpirun") if shutil.which(tool) is None]
    if sys.platform != "linux" or os.geteuid() != 0:
        return "network namespaces need root on Linux"
    if missing:
        return f"missing programs: {', '.join(missing)} (they are part of iproute2, util-linux and MPI)"
    tried = subprocess.run([*UNSHARE, "sh", "-c", TRY], capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if tried.returncode:
        return f"this machine does not allow creating networks ({' '.join(tried.stderr.split()) or tried.returncode})"
    if ms and not os.path.exists("/dev/net/tun"):
        return "a delay needs /dev/net/tun, which does not exist here; use --ms 0"
    return ""


def go_inside() -> None:
    """Run this command again in new namespaces and exit with its exit code. If the process is already inside them, do nothing."""
    if os.environ.get(INSIDE):
        return

    def die_with_parent() -> None:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG

    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    child = subprocess.Popen([*UNSHARE, sys.executable, *sys.argv], env=os.environ | {INSIDE: "1"}, preexec_fn=die_with_parent,
                             start_new_session=True)  # so that only this process receives Ctrl-C
    try:
        sys.exit(child.wait())
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        child.kill()  # the kernel then ends all of its children
        child.wait()


def shell(line: str) -> str:
    done = subprocess.run(line.split(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{line}: {done.stderr.strip()}")
    return done.stdout


def make_tun(name: str) -> int:
    """Create a tun interface and return its file descriptor. The interface accepts pieces of up to 64 KiB, like a network card
    with TSO."""
    file = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(file, SET_IFF, struct.pack("16sH22x", name.encode(), TUN | NO_PI | VNET_HDR))
    fcntl.ioctl(file, SET_OFFLOAD, CHECKSUM_AND_TSO)
    return file


class Link:
    """The nodes node0, node1, ... Use this class only inside the namespaces of go_inside()."""

    def __init__(self, nodes: int, ranks_per_node: int, mbit: float, ms: float, mpi: str) -> None:
        """mbit: bandwidth of each node in each direction, in Mbit/s. ms: one-way delay between any two nodes, in ms."""
        self.nodes, self.ranks, self.mbit, self.ms, self.mpi = nodes, nodes * ranks_per_node, mbit, ms, mpi
        beside = Path(shutil.which("mpirun") or "").with_name("python")  # of mpirun's environment
        self._python = str(beside) if beside.exists() else sys.executable
        self._carrier: subprocess.Popen | None = None
        shell("ip link set lo up")
        shell("mount -t tmpfs tmpfs /run")
        shell("mount -t tmpfs tmpfs /dev/shm")
        SCRATCH.mkdir()
        Path("/run/netns").mkdir()
        rate = f"root tbf rate {mbit:g}mbit burst {max(65536, round(mbit * 125))} limit {4 << 20}"  # burst: at least 1 ms
        tuns = []
        if not ms:
            shell("ip link add switch up type bridge")
        for i in range(nodes):
            shell(f"ip netns add node{i}")
            shell(f"ip -n node{i} link set lo up")
            shell(f"ip link add control{i} up type veth peer name control netns node{i}")
            shell(f"ip addr add 10.9.{i}.254/24 dev control{i}")
            shell(f"ip -n node{i} addr add 10.9.{i}.1/24 dev control")
            shell(f"ip -n node{i} link set control up")
            shell(f"ip -n node{i} route add default via 10.9.{i}.254")
            if ms:
                tuns.append(make_tun(f"cable{i}"))
                shell(f"ip link set cable{i} netns node{i} name data")
            else:
                shell(f"ip link add cable{i} up master switch type veth peer name data netns node{i}")
                shell(f"tc qdisc add dev cable{i} {rate}")
            shell(f"ip -n node{i} addr add 10.10.0.{i + 1}/24 dev data")
            shell(f"ip -n node{i} link set data up")
            shell(f"tc -n node{i} qdisc add dev data {rate}")
        if ms:
            self._carrier = subprocess.Popen([sys.executable, __file__, str(mbit), str(ms), *map(str, tuns)], pass_fds=tuns)
        # used by Hydra's remote shell, whose arguments need another evaluation, or by sh -c before a rank's command
        enter = "exec nsenter --net=/run/netns/$node unshare --uts sh -c 'hostname $0; {} \"$@\"' $node \"$@\"\n"
        (SCRATCH / "rsh").write_text("#!/bin/sh\nnode=$1\nshift\n" + enter.format("eval"))
        (SCRATCH / "rsh").chmod(0o755)
        hosts = ",".join(f"node{i}:{ranks_per_node}" for i in range(nodes))
        self._launch = ["mpirun", "-n", str(self.ranks), *LAUNCH[mpi].split(), *{
            "mpich": ["-launcher-exec", str(SCRATCH / "rsh"), "-hosts", hosts],
            "openmpi": ["sh", "-c", f"node=node$((OMPI_COMM_WORLD_RANK / {ranks_per_node}))\n{enter.format('exec')}", "sh"],
        }[mpi]]

    def start(self, words: list[str], log: Path, **environment: str) -> subprocess.Popen:
        """Start `python WORDS` on every rank, each on its node. The output is written to the file `log`."""
        with open(log, "wb") as file:
            return subprocess.Popen(
                [*self._launch, self._python, *words],
                stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
                env=os.environ | OF_RANKS | {"TMPDIR": str(SCRATCH)} | environment,
            )

    def sent_bytes(self) -> list[int]:
        """Return the bytes that each node has sent. A piece of up to 64 KiB that leaves the kernel in one call counts with one
        header."""
        statistics = [json.loads(shell(f"ip -n node{i} -json -statistics link show dev data")) for i in range(self.nodes)]
        return [int(of[0]["stats64"]["tx"]["bytes"]) for of in statistics]

    def sweep(self) -> None:
        """Kill all processes that a run may have left, that is, all processes except this one and the packet carrier."""
        assert os.environ.get(INSIDE) and os.getpid() == 1, "refusing to kill processes outside the namespaces"
        keep = {1, self._carrier.pid if self._carrier else 1}
        for pid in [int(name) for name in os.listdir("/proc") if name.isdigit()]:
            if pid not in keep:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def check(self) -> dict[str, float]:
        """Measure and print the time of an Allreduce and of a round trip. Exit if they fail or are faster than the link
        allows."""
        size = int(2**20 * max(1.0, self.mbit / 100))
        least = 2 * (self.nodes - 1) / self.nodes * size * 8 / (self.mbit * 1e6)
        log, before = SCRATCH / "allreduce.txt", self.sent_bytes()
        process = self.start(["-c", ALLREDUCE, str(size), str(REPEATS)], log)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=60 + 60 * least)
        self.sweep()
        process.wait()
        found = [float(word) for line in log.read_text().splitlines() if line.startswith("took ") for word in line.split()[1:]]
        if not found:
            sys.exit(f"an Allreduce over the link failed:\n{log.read_text()[-2000:]}")
        sent = max(b - a for a, b in zip(before, self.sent_bytes(), strict=True)) / REPEATS
        print(f"an Allreduce of {size / 2**20:g} MiB takes {1e3 * found[0]:.0f} ms (its bytes alone need {1e3 * least:.0f} ms)"
              f"; a node sends {sent / 2**20:.2f} MiB for it; round trip of a byte: {1e3 * found[1]:.2f} ms", flush=True)
        if found[0] < 0.8 * least or sent < 0.5 * size or found[1] < 2e-3 * self.ms:
            sys.exit("this is faster than the link, so MPI does not use it; nothing was measured")
        return {"bytes": size, "seconds": found[0], "least_seconds": least, "round_trip_seconds": found[1]}


def carry(mbit: float, ms: float, tuns: list[int]) -> None:
    """Forward packets forever. A packet goes to the node given by the last byte of its address, after the delay and within the
    incoming bandwidth of this node. tc limits the outgoing bandwidth."""
    os.setpriority(os.PRIO_PROCESS, 0, -10)
    in_flight: list[tuple[float, int, int, bytes]] = []
    free = [0.0] * len(tuns)  # time at which each node's incoming direction is free
    count = 0
    while True:
        now = time.monotonic()
        while in_flight and in_flight[0][0] <= now:
            _, _, to, packet = heapq.heappop(in_flight)
            with suppress(OSError):  # an interface that is down loses the packet
                os.write(tuns[to], packet)
        wait = max(0.0, in_flight[0][0] - time.monotonic()) if in_flight else None
        ready = select.select(tuns, [], [], wait)[0]
        now = time.monotonic()
        for tun in ready:
            packet = os.read(tun, 1 << 17)
            to = packet[HEADER + 19] - 1
            if packet[HEADER] >> 4 == 4 and packet[HEADER + 16] == 10 and 0 <= to < len(tuns):  # not multicast, not IPv6
                arrives, count = max(now + ms / 1e3, free[to]), count + 1
                free[to] = arrives + (len(packet) - HEADER) * 8 / (mbit * 1e6)
                heapq.heappush(in_flight, (arrives, count, to, packet))


if __name__ == "__main__":
    carry(float(sys.argv[1]), float(sys.argv[2]), [int(number) for number in sys.argv[3:]])
