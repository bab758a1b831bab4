"""The store of process groups: who can reach it, and that what a stranger writes into it does no harm."""

from __future__ import annotations

import socket
from datetime import timedelta
from pathlib import Path

import pytest
from mpi4py import MPI

from mpidp.c10d.turns import waiting_ranks
from mpidp.comm import store
from tests.tiny import WORLD, at, everywhere, sizes

pytestmark = pytest.mark.mpi
SHORT = timedelta(seconds=20)


def listening(port: int) -> set[str]:
    """Return the addresses on which this machine listens at a port, as in /proc/net/tcp."""
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return {row[1].split(":")[0] for row in rows if int(row[1].split(":")[1], 16) == port and row[3] == "0A"}


def own_address() -> str:
    """Return this machine's address in a network, or "" if it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # nothing is sent
        except OSError:
            return ""
        return str(probe.getsockname()[0])


def test_ranks_of_one_host_meet_on_loopback_only() -> None:
    def meet(comm: MPI.Intracomm) -> tuple[set[str], bytes]:
        opened = store.open_store(comm, SHORT)
        opened.set(f"from {comm.rank}", "here")
        found = listening(opened.port), opened.get(f"from {comm.size - 1}")
        comm.Barrier()  # rank 0 serves the store until here
        return found

    for n in sizes(1, 2, 3):
        found = at(n, meet)
        everywhere(found == [({"0100007F"}, b"here")] * n, f"{found}")


@pytest.mark.parametrize(("written", "read"), [
    ("0 all_reduce of 3 elements;1 barrier;", {0: "all_reduce of 3 elements", 1: "barrier"}), ("", {}),
    ("x y;1 barrier;", {1: "barrier"}),
    ("9 barrier;-1 barrier;1;;1 ;", {}), ("\x1b[2J;1 \x1b[2J;1 barrier", {}), ("1" * 5000 + " a;0 " + "a" * 5000 + ";", {}),
])
def test_rows_of_strangers_are_ignored(written: str, read: dict[int, str]) -> None:
    """Otherwise they would end the thread that ends calls after their time-out."""
    assert waiting_ranks(written, 2) == read


@pytest.mark.skipif(WORLD.size > 1, reason="independent of the number of ranks")
@pytest.mark.parametrize(("addresses", "bound"), [
    ((), "127.0.0.1"), (("127.0.0.9",), "127.0.0.9"), (("own",), "own"), (("203.0.113.7",), "::"),
    (("127.0.0.8", "127.0.0.9"), "::"), (("no such host.invalid",), "::"),
])
def test_the_interface_is_the_one_that_other_hosts_reach(addresses: tuple[str, ...], bound: str) -> None:
    own = own_address()
    if "own" in (*addresses, bound) and not own:
        pytest.skip("SKIPPED FOR LACK OF a network")
    address, port, handle = store.listen([own if one == "own" else one for one in addresses])
    with socket.socket(fileno=handle):
        assert address == (own if bound == "own" else bound) or bound == "::" and address == "0.0.0.0"
        assert listening(port)
