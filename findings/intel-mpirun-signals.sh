#!/bin/sh
# In Intel MPI, SIGTERM to mpirun ends mpirun, but the ranks continue. SIGTERM to mpiexec.hydra reaches every rank.
#
# Versions: impi-rt 2021.18.1 (wheel), mpi4py 4.1.2, Python 3.11, Linux x86-64.
#
# What a good engineer would guess: mpirun forwards SIGTERM to the ranks, as MPICH's and Open MPI's mpirun do. In Intel MPI, mpirun and
# mpiexec.hydra are two names of the same launcher, which comes from MPICH.
#
# Behaviour: Intel's mpirun is a shell script that starts mpiexec.hydra as a child process. The signal ends only the script. The ranks
# get no signal and run until they end by themselves.
#
# Consequence: if a batch system sends a signal to the launcher before a time limit, the ranks cannot save their state. After an
# interactive mpirun is killed, its ranks still use the cores.
#
# Output seen:
#   mpirun:        launcher ended, ranks that got SIGTERM: 0 of 2, ranks still running: 2 of 2
#   mpiexec.hydra: launcher ended, ranks that got SIGTERM: 2 of 2, ranks still running: 0 of 2
# Exit status: 0 if mpirun still does not forward the signal, 1 if the behaviour changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet impi-rt==2021.18.1 mpi4py==4.1.2
cat > "$folder/rank.py" <<'PROGRAM'
import os
import signal
import sys
import time
from pathlib import Path

from mpi4py import MPI

place, rank = Path(sys.argv[1]), MPI.COMM_WORLD.rank


def stop(*_):
    (place / f"got-{rank}").touch()
    os._exit(0)


signal.signal(signal.SIGTERM, stop)
(place / f"pid-{rank}").write_text(str(os.getpid()))
time.sleep(40)  # ends by itself
os._exit(0)
PROGRAM
cat > "$folder/program.py" <<'PROGRAM'
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

results = {}
for launcher in ("mpirun", "mpiexec.hydra"):
    place = Path(tempfile.mkdtemp(dir=sys.argv[1]))
    words = [launcher, "-n", "2", sys.executable, f"{sys.argv[1]}/rank.py", str(place)]
    process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.time() + 60
    while len(list(place.glob("pid-*"))) < 2 and time.time() < until:
        time.sleep(0.1)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    process.wait(30)
    time.sleep(3)
    pids = [int(one.read_text()) for one in place.glob("pid-*")]
    running = [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    got = len(list(place.glob("got-*")))
    for pid in running:
        os.kill(pid, signal.SIGKILL)
    results[launcher] = got, len(running)
    print(f"{launcher + ':':<14} launcher ended, ranks that got SIGTERM: {got} of {len(pids)}, "
          f"ranks still running: {len(running)} of {len(pids)}")
if results != {"mpirun": (0, 2), "mpiexec.hydra": (2, 0)}:
    sys.exit("changed: mpirun passes SIGTERM on")
PROGRAM
PATH="$folder/env/bin:$PATH" "$folder/env/bin/python" "$folder/program.py" "$folder"
