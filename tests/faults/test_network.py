"""Network failures: two virtual nodes with one rank each, whose MPI uses its own cable.

| fault | expected | checked |
|---|---|---|
| the cable is unplugged for a while | the run waits, then continues | steps of metrics.jsonl |
| it is unplugged permanently, run.hang_seconds=5 | 6; the network or the missing rank is named | code of both mpiruns, output |
| the same command again | resumes from its last checkpoint | hash |
"""

from __future__ import annotations

import subprocess
import time

import pytest

from tests.faults.commands import Forks, Shell, Started, end_record, expect, steps_logged

# Run by `unshare --mount --net --uts`, so everything disappears with its processes. Ranks enter their nodes by themselves and
# reach mpirun by the control network, which survives when the data network is cut at the switch by a file cable_down.
NODES = """
ip link set lo up
mount -t tmpfs tmpfs /run
mkdir /run/netns
ip link add switch up type bridge
for i in 0 1; do
    ip netns add node$i
    ip -n node$i link set lo up
    ip link add control$i up type veth peer name control netns node$i
    ip addr add 10.9.$i.254/24 dev control$i
    ip -n node$i addr add 10.9.$i.1/24 dev control
    ip -n node$i link set control up
    ip -n node$i route add default via 10.9.$i.254
    ip link add cable$i up master switch type veth peer name data netns node$i
    ip -n node$i addr add 10.10.0.$i/24 dev data
    ip -n node$i link set data up
done
cat > /run/enter << 'END'
node=node${PMI_RANK:-$OMPI_COMM_WORLD_RANK}
exec nsenter --net=/run/netns/$node unshare --uts sh -c 'hostname $0; exec "$@"' $node "$@"
END
"$@" &
while kill -0 $! 2> /dev/null; do
    for act in down up; do
        [ ! -e cable_$act ] || { rm cable_$act; ip link set cable1 $act; }
    done
    sleep 0.05
done
wait $!
"""
LAUNCH = {
    "mpich": "-genv MPIR_CVAR_NOLOCAL 1 -genv MPIR_CVAR_CH4_NETMOD ofi -genv FI_PROVIDER tcp -genv FI_TCP_IFACE data",
    "openmpi": "--pmixmca ptl_base_if_include 10.9.0.0/16 --pmixmca ptl_base_remote_connections 1 --mca pml ob1 "
               "--mca btl self,tcp --mca btl_tcp_if_include 10.10.0.0/24",
}
WORDS = ["tiny.toml", "--train.steps=100"]


def made(shell: Shell) -> int:
    """Return the last step of metrics.jsonl."""
    return max(steps_logged(shell.folder / "run"), default=0) if (shell.folder / "run" / "metrics.jsonl").exists() else 0


def until(shell: Shell, started: Started, step: int) -> None:
    began = time.monotonic()
    while made(shell) < step:
        assert started.process.poll() is None and time.monotonic() - began < 60, started.so_far()
        time.sleep(0.05)


def pull(shell: Shell, act: str) -> None:
    (shell.folder / f"cable_{act}").touch()
    while (shell.folder / f"cable_{act}").exists():
        time.sleep(0.01)


def test_the_network_is_unplugged(either: Shell, forks: Forks) -> None:
    if subprocess.run(["unshare", "-mnu", "ip", "link", "add", "type", "bridge"], capture_output=True, check=False).returncode:
        pytest.skip("SKIPPED FOR LACK OF leave to make networks (root, ip)")
    expect(forks.run(either.folder, "mpidp.train", *WORDS, "--run.dir=whole"), 0)
    train = ["sh", "/run/enter", "python", "-m", "mpidp.train", *WORDS, "--run.hang_seconds=5"]
    command = ["unshare", "-mnu", "sh", "-ec", NODES, "sh", "mpirun", "-n", "2", *LAUNCH[either.mpi].split(), *train]
    started = either.start_command(command, MPIDP_FAULT="delay:0:1,seconds=0.05")
    until(either, started, 3)
    pull(either, "down")
    time.sleep(1)
    at = made(either)
    pull(either, "up")
    until(either, started, at + 5)
    pull(either, "down")
    ended = started.wait()
    assert ended.code == 6 and "no rank has made progress for " in ended.err, ended
    assert "check the network" in ended.err or "the other ranks wait for rank " in ended.err, ended
    assert made(either) < 100 and end_record(either.folder / "run").get("event") != "end", ended
    expect(forks.run(either.folder, "mpidp.train", *WORDS), 0)
    assert end_record(either.folder / "run")["weights_sha256"] == end_record(either.folder / "whole")["weights_sha256"]
