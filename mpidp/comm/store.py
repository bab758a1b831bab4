"""Opens the TCP store through which torch's process groups exchange addresses.

torch's TCPStore has no authentication, so every process that can connect to the store can read and change it. The store therefore
listens at one address only. This is loopback if all ranks are on one host. Otherwise it is the address to which the other hosts
resolve the name of rank 0's host. If it cannot listen there, or if the hosts resolve the name differently, it listens at all
addresses.
"""

from __future__ import annotations

import socket
from collections.abc import Collection
from datetime import timedelta
from ipaddress import ip_address
from typing import Any

from mpi4py import MPI

LOOPBACK, EVERY_INTERFACE, EVERY_IPV4 = "127.0.0.1", "::", "0.0.0.0"


def open_store(comm: MPI.Intracomm, timeout: timedelta, name: str = "") -> Any:
    """Return a connection to a TCPStore that runs on rank 0 at a free port. `name`: another name or address of rank 0's host,
    for hosts that cannot connect to its host name, or "" for none. Raises RuntimeError on every rank if any rank cannot
    connect. Collective over comm."""
    from torch import distributed

    here = socket.gethostname()
    root, name = comm.bcast((here, name or here))
    wanted = comm.allgather("" if here == root else _resolved(name))
    store: Any = None
    address, port, failed = "", 0, ""
    if comm.rank == 0:
        try:
            address, port, handle = listen(set(filter(None, wanted)))
            store = distributed.TCPStore(  # type: ignore[attr-defined]
                LOOPBACK if address in (EVERY_INTERFACE, EVERY_IPV4) else address, port, None, True, timeout,
                wait_for_workers=False, multi_tenant=False, master_listen_fd=handle,
            )
        except (OSError, RuntimeError) as error:
            failed = str(error)
    address, port, failed = comm.bcast((address, port, failed))
    if address in (EVERY_INTERFACE, EVERY_IPV4):
        address = LOOPBACK if here == root else name
    if comm.rank and not failed:
        try:
            store = _connected(address, port, timeout)
        except RuntimeError as error:
            failed = str(error)
    errors = [f"rank {rank}: {error.splitlines()[0]}" for rank, error in enumerate(comm.allgather(failed)) if error]
    if errors:
        raise RuntimeError(f"cannot connect to rank 0's store on {name}, port {port} ({errors[0]})")
    return store


def _connected(address: str, port: int, timeout: timedelta) -> Any:
    from torch import distributed

    return distributed.TCPStore(  # type: ignore[attr-defined]
        address, port, None, False, timeout, wait_for_workers=False
    )


def listen(addresses: Collection[str]) -> tuple[str, int, int]:
    """Listen at a free port. Return (address, port, file descriptor of the socket). `addresses`: the addresses at which other
    hosts reach this host. If there are none, listen on loopback. If there are several, or if listening at the only one fails,
    listen on every interface. Independent."""
    chosen = LOOPBACK if not addresses else next(iter(addresses)) if len(addresses) == 1 else EVERY_INTERFACE
    while True:
        listening = socket.socket(socket.AF_INET6 if ":" in chosen else socket.AF_INET)
        try:
            if chosen == EVERY_INTERFACE:
                listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            listening.bind((chosen, 0))
            listening.listen(2048)
            return chosen, listening.getsockname()[1], listening.detach()
        except OSError:
            listening.close()
            if chosen in (LOOPBACK, EVERY_IPV4):
                raise
            chosen = EVERY_IPV4 if chosen == EVERY_INTERFACE else EVERY_INTERFACE  # EVERY_IPV4 if this host has no IPv6


def _resolved(name: str) -> str:
    """Return the address to which this host resolves `name`. Return `name` itself if it cannot be resolved, or if other hosts
    could not connect at the address because it is loopback or link-local."""
    try:
        address = str(socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)[0][4][0])
        usable = not (ip_address(address).is_loopback or ip_address(address).is_link_local)
    except (OSError, ValueError):
        return name
    return address if usable else name
