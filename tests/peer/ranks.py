"""One rank of a run of PyTorch's own distributed tests: all tests run one after another in one process per rank.

    mpirun -n 3 python -m tests.peer.ranks OUT.jsonl ours|gloo [TEST ...]

The tests request their backend by name and skip unknown ones, so mpidp.c10d is registered under gloo's name. What the tests' own
processes do once per test (spawn, rendezvous by a file, exit with a code) is done here in processes that stay.
"""

from __future__ import annotations

import io
import json
import logging
import os
import shutil
import socket
import sys
import tempfile
import time
import traceback
import unittest
import warnings
import zlib
from contextlib import redirect_stderr, redirect_stdout, suppress
from datetime import timedelta
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from mpi4py import MPI

WORLD = MPI.COMM_WORLD
HARNESS = WORLD.Dup()
LIMIT_SECONDS = float(os.environ.get("PEER_SECONDS", "100"))  # time limit of a test, until all ranks have finished it


def prepare() -> str:
    """Set the environment that the tests read when they are imported; return its folder. Collective over HARNESS."""
    folder = HARNESS.bcast(tempfile.mkdtemp() if WORLD.rank == 0 else None)
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = HARNESS.bcast(probe.getsockname()[1])
    os.environ |= {
        "BACKEND": "gloo", "WORLD_SIZE": str(WORLD.size), "RANK": str(WORLD.rank), "TEMP_DIR": str(folder),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "INIT_METHOD": "env://", "PYTORCH_PRINT_REPRO_ON_FAILURE": "0",
    }
    try:
        import expecttest  # noqa: F401
    except ImportError:  # only a base class of torch's test cases, as far as these tests are concerned
        sys.modules["expecttest"] = ModuleType("expecttest")
        sys.modules["expecttest"].TestCase = unittest.TestCase  # type: ignore[attr-defined]
    for name in ("barrier", "test_dir", "init_dir"):
        Path(folder, name).mkdir(exist_ok=True)
    warnings.simplefilter("ignore")
    return str(folder)


def take_gloos_name() -> None:
    """Make torch create mpi4py groups where gloo is requested."""
    import torch.distributed as dist
    from torch.distributed import distributed_c10d

    from mpidp.c10d import group, meeting

    members: list[int] = []
    make = distributed_c10d._new_process_group_helper

    def helper(group_size: int, group_rank: int, ranks: list[int], *rest: Any, **named: Any) -> Any:
        members[:] = ranks or range(group_size)
        return make(group_size, group_rank, ranks, *rest, **named)

    class Alias(group.MpiGroup):
        label = "gloo"

        def __init__(self, store: Any, rank: int, size: int, timeout: timedelta) -> None:
            chosen = WORLD.Get_group().Incl(members)
            comm = WORLD.Create_group(chosen, zlib.crc32(str(members).encode()) % 32768)
            super().__init__(comm, timeout, "gloo", store, meeting._blocking(comm))
            self.options = SimpleNamespace()

    meeting._prepare()
    distributed_c10d._new_process_group_helper = helper
    distributed_c10d.ProcessGroupGloo = dist.ProcessGroupGloo = Alias  # type: ignore[misc,assignment]


def names() -> list[str]:
    """Return the names of all tests."""
    from torch.testing._internal.distributed.distributed_test import DistributedTest

    return sorted(name for name in dir(DistributedTest._DistTestBase) if name.startswith("test_"))


def run(name: str, folder: str) -> tuple[str, str]:
    """Run one test on this rank. Return (outcome, reason); the outcome is passed, skipped or failed."""
    import torch.distributed as dist
    from torch.testing._internal import common_distributed, common_utils
    from torch.testing._internal.distributed import distributed_test as suite

    class Peer(suite.TestDistBackend, suite.DistributedTest._DistTestBase):
        pass

    test = Peer(name)
    test.rank, test.file_name = WORLD.rank, os.path.join(folder, f"meet_{name}")
    seconds = suite.CUSTOM_PG_TIMEOUT.get(name, 60)
    outcome, why = "passed", ""
    try:
        if WORLD.rank == 0:
            suite.Barrier.init()
        HARNESS.barrier()
        suite.Barrier.barrier_id = 0
        dist.init_process_group("gloo", init_method=test.init_method, world_size=WORLD.size, rank=WORLD.rank,
                                timeout=timedelta(seconds=min(seconds, 0.8 * LIMIT_SECONDS)))
        common_utils.set_rng_seed()
        getattr(test, name)()
    except unittest.SkipTest as skip:
        outcome, why = "skipped", str(skip)
    except SystemExit as end:
        known = {skip.exit_code: skip.message for skip in common_distributed.TEST_SKIPS.values()}
        outcome, why = ("passed", "") if not end.code else ("skipped", known.get(end.code, f"exit code {end.code}"))  # type: ignore
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)
        at = next((f"line {frame.lineno}" for frame in reversed(where) if frame.filename.endswith("distributed_test.py")), "")
        words = " ".join(str(error).split())
        outcome, why = "failed", f"{type(error).__name__}: {words[:600]} ({at})"
    return outcome, why


def met(seconds: float) -> bool:
    """Do all ranks arrive here within this time? Collective over HARNESS."""
    request, end = HARNESS.Ibarrier(), time.monotonic() + seconds
    while not request.Test():
        if time.monotonic() > end:
            return False
        time.sleep(0.002)
    return True


def clean() -> None:
    """Destroy all process groups."""
    import torch.distributed as dist

    with suppress(Exception):
        dist.destroy_process_group()
    for key in ("TORCH_DISTRIBUTED_DEBUG", "TORCH_SHOW_CPP_STACKTRACES"):
        os.environ.pop(key, None)
    with suppress(Exception):
        dist.set_debug_level(dist.DebugLevel.OFF)


def main() -> None:
    folder = prepare()
    if sys.argv[1:] == ["list"]:
        print(*names())
        return
    out, whose, *wanted = sys.argv[1:]
    logging.disable(logging.CRITICAL)
    import mpidp.c10d  # noqa: F401

    if whose == "ours":
        take_gloos_name()
    for name in wanted or names():
        began = time.monotonic()
        if WORLD.rank == 0:
            with open(out, "a") as file:
                file.write(json.dumps({"test": name, "outcome": "began"}) + "\n")
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            outcome, why = run(name, folder)
        came = met(LIMIT_SECONDS)
        if came:
            said = HARNESS.allgather((outcome, why))
            clean()
            failed = [f"rank {rank}: {words}" for rank, (kind, words) in enumerate(said) if kind == "failed"]
            outcome = "failed" if failed else said[0][0]
            why = failed[0] if failed else said[0][1]
        else:
            outcome, why = "hung", f"rank {WORLD.rank} waited {LIMIT_SECONDS:g} s for others ({outcome} here: {why})"
        if WORLD.rank == 0 or not came:
            with open(out, "a") as file:
                file.write(json.dumps(
                    {"test": name, "outcome": outcome, "why": why, "seconds": round(time.monotonic() - began, 2)}
                ) + "\n")
        if not came:
            time.sleep(1)
            WORLD.Abort(3)
    met(10)
    if WORLD.rank == 0:
        shutil.rmtree(folder, ignore_errors=True)
        sys.stdout.flush()
    os._exit(0) if met(10) else WORLD.Abort(3)


if __name__ == "__main__":
    main()
