"""All tested faults, under both MPIs where it matters: in this file, or in the files named in the table.

| fault | expected | checked | where |
|---|---|---|---|
| a rank raises, sys.exit, os._exit, SIGSEGV, SIGKILL | not 0, at once; resumes | code, processes, hash | test_crashes |
| the same in each phase, of rank 0, two at once | same | same | test_a_death |
| failures under ULFM: in each phase, two in a row, too many | the survivors continue | hash, lines | test_recovery |
| the same on meshes | the other replicas continue, ranks wait as spares | hash, lines | test_mesh_recovery |
| SIGSTOP, sleeping, the GIL held | 6, the rank and phase named | code, output, stacks | test_hangs |
| USR1, TERM, Ctrl-C, a STOP file, the time limit | 75, a checkpoint; resumes | code, output, hash | test_stopping |
| USR1, TERM to a rank in each phase | same | same | test_a_word_to_a_rank |
| killed at random moments; at each write of a checkpoint | resumes | hash, lines | test_stopping, test_checkpoints |
| a checkpoint truncated at 0, 1, half, end - 1; 200 flipped bits | the one before, reason | the result | test_a_checkpoint_... |
| other damage to the newest checkpoint; to all of them | 0; 4 | code, output, hash | test_checkpoints |
| disk full: no space for checkpoints, for a while, permanently | 0; 1 at the end | output, listing, hash | test_disks |
| disk full: no space for a line in run.dir, for a while | 0, no line lost | lines, output, hash | test_no_room_for_a_line |
| run.dir renamed or removed; a node killed while it writes | 0; resumes | listing, hash | test_disks |
| run.dir read-only, below a file | 2 | code, output | test_a_read_only_run_dir, test_usage |
| /dev/shm too small for a window | 0, by messages | output, hash | test_too_little_shared_memory |
| network unplugged for a while; permanently | continues; 6 | code, output, hash | test_network |
| a slow rank | 0, it is named | lines, hash | test_a_slow_rank, laws/test_elastic |
| N processes that are N jobs of one rank | 2, the right command | code, output | test_usage |
| different settings, data, libraries on one rank | 2, what and where | code, output | test_ranks_that_are_not_alike, test_usage |
| two jobs in one run.dir; a requeued job's old copy | 2; 1 | codes, hash | test_two_jobs_..., test_checkpoints, test_stopping |
| NaN on one rank; too many bad batches; a spike | skipped; passed over | lines, hash | test_nan_..., laws/test_skipped |
| a bit of the weights flips, a gradient is wrong | repaired | lines, hash | test_memory_or_a_core_fails, laws/test_elastic |
| bad shards, sources, tokenizers; hostile HDF5 | 3 | code, output | test_bad_data, test_bad_sources |
| .pt, archives, bombs, false manifests | 3, 4, not executed | code, output | test_hostile |
| repeated starts without a step | the fourth rejected: 2 | code, output | test_checkpoints, unit/test_tries |
| jobs on Slurm: requeue, failed node, time limit | resumes | hash | ../slurm |
| kills every few seconds, by ULFM and by restarts | as without | hash, goodput | soak.py |
"""

from __future__ import annotations

import json
import random
import zlib
from pathlib import Path
from typing import Any

import pytest
from mpi4py import MPI

from mpidp.checkpoint.manifest import newest_valid
from tests.faults.commands import ENTER, Forks, Shell, end_record, expect, faulty, steps_logged
from tests.faults.test_crashes import check_goes_on, end_of
from tests.faults.test_doctor import with_mounts


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


# --- a rank fails or receives a signal in any phase

DEATHS = [
    "raise:1:4:data", "kill:2:4:reduce", "segv:0:4:publish", "exit:2:4:evaluate", "kill:1:4:checkpoint", "kill:0:4 kill:2:4",
]


@pytest.mark.quick
@pytest.mark.parametrize("fault", DEATHS)
def test_a_death(either: Shell, forks: Forks, whole_hash: str, fault: str) -> None:
    words = ("-m", "mpidp.train", "tiny.toml", "--train.eval_every=2")
    ended = end_of(either.start(*words, ranks=3, MPIDP_FAULT=fault))
    assert ended.code not in (0, 6) and "done:" not in ended.said, ended
    assert f"MPIDP_FAULT is set: THIS RUN HAS INJECTED FAULTS: {fault}" in ended.err, ended
    assert any(f": {word}" in ended.err for word in fault.split()), ended
    check_goes_on(either, forks, whole_hash)


@pytest.mark.parametrize("fault", ["usr1:1:3:data", "term:2:3:reduce", "usr1:0:4:checkpoint"])
def test_a_word_to_a_rank(either: Shell, forks: Forks, whole_hash: str, fault: str) -> None:
    ended = either.train("--train.eval_every=2", ranks=3, MPIDP_FAULT=fault)
    expect(ended, 75, f"stopped on request (SIG{fault[:4].strip(':').upper()}) at step ", "the same command resumes from here")
    check_goes_on(either, forks, whole_hash)


# --- one rank computes wrong values, is late, or has other settings


def test_nan_on_one_rank(either: Shell, forks: Forks, whole_hash: str) -> None:
    expect(either.train(ranks=3, MPIDP_FAULT="nan:1:3"), 0)
    alone = {"MPIDP_FAULT": "nan:0:3"}
    expect(forks.run(either.folder, "mpidp.train", "tiny.toml", "--run.dir=alone", **alone), 0)
    events = [
        [{key: line[key] for key in ("event", "step", "batch", "grad_norm")}
         for line in lines(either.folder / run) if line.get("event") == "skipped"] for run in ("run", "alone")
    ]
    assert events[0] == events[1] == [{"event": "skipped", "step": 2, "batch": 2, "grad_norm": None}]
    hashes = [end_record(either.folder / run)["weights_sha256"] for run in ("run", "alone")]
    assert hashes[0] == hashes[1] != whole_hash


def test_nan_again_and_again(either: Shell, forks: Forks, whole_hash: str) -> None:
    """Three in a row return the run to step 2; three more end it."""
    ended = either.train("--train.max_skipped=3", ranks=2, MPIDP_FAULT="nan:1:4,times=6")
    already = "The run already returned to its last checkpoint"
    expect(ended, 1, f"3 batches in a row, up to batch 9, made no update (its gradient is not finite). {already}")
    assert "3 batches in a row, up to batch 5, made no update" in ended.out and "to continue with batch 6" in ended.out, ended
    back = [line for line in lines(either.folder / "run") if line.get("event") == "rolled_back"]
    assert [(line["step"], line["batch"]) for line in back] == [(2, 5)]
    expect(forks.run(either.folder, "mpidp.train", "tiny.toml", "--train.max_skipped=3"), 0)
    assert end_record(either.folder / "run")["weights_sha256"] == whole_hash  # neither the fault nor its effects remain


@pytest.mark.parametrize(("fault", "mpi"), [("flip:1:3,tensor=2,bit=20", "openmpi"), ("wrong:2:3", "mpich")])
def test_memory_or_a_core_fails(place: Path, whole_hash: str, fault: str, mpi: str) -> None:
    expect(Shell(place, mpi).train("--train.audit_every=1", ranks=3, MPIDP_FAULT=fault), 0)
    (event,) = [line for line in lines(place / "run") if line.get("event") == "audit"]
    assert event["of_step"] == 3 and int(fault.split(":")[1]) in event["ranks"]
    assert end_record(place / "run")["weights_sha256"] == whole_hash


def test_a_slow_rank(either: Shell, whole_hash: str) -> None:
    expect(either.train(ranks=3, MPIDP_FAULT="delay:1:1,seconds=0.3"), 0)
    assert [line["slowest_rank"] for line in lines(either.folder / "run") if "train_loss" in line] == [1] * 6
    assert end_record(either.folder / "run")["weights_sha256"] == whole_hash


OTHER_VERSIONS = "import mpidp.runtime.agreement; plain = mpidp.runtime.agreement.versions\n" \
                 "mpidp.runtime.agreement.versions = lambda: plain() | {'torch': '1.0'}\n" \
                 "import mpidp.runtime.command, mpidp.train\n" + ENTER


@pytest.mark.parametrize(("rank_1", "said"), [
    (["-m", "mpidp.train", "tiny.toml", "--optim.lr=0.5"], "optim.lr: rank 0 has 0.003, rank 1 has 0.5"),
    (["-c", OTHER_VERSIONS, "tiny.toml"], "rank 1 has 1.0"),
    (["-m", "mpidp.train", "tiny.toml", "--run.dir=other"], "run.dir: rank 0 has run, rank 1 has other"),
], ids=["settings", "versions", "folder"])
def test_ranks_that_are_not_alike(either: Shell, rank_1: list[str], said: str) -> None:
    command = ["mpirun", "-n", "1", "python", "-m", "mpidp.train", "tiny.toml", ":", "-n", "1", "python", *rank_1]
    expect(either.start_command(command).wait(), 2, "the ranks differ", said)
    assert not (either.folder / "run" / "metrics.jsonl").exists()


def test_two_jobs_in_one_run_dir(either: Shell, whole_hash: str) -> None:
    waits = faulty("while not os.path.exists('go'): time.sleep(0.02)") + ENTER
    first = either.start("-c", waits, "tiny.toml", ranks=1)
    first.until_exists(either.folder / "run" / "metrics.jsonl")
    expect(either.train(ranks=2), 2, "run/lock: in use by ", "--run.dir=DIR")
    (either.folder / "go").touch()
    expect(first.wait(), 0)
    assert end_record(either.folder / "run")["weights_sha256"] == whole_hash
    assert steps_logged(either.folder / "run") == [1, 2, 3, 4, 5, 6]


# --- files


@pytest.mark.parametrize("name", ["rank_00000.safetensors", "manifest.json"])
def test_a_checkpoint_cut_short(half_run: Path, name: str) -> None:
    file = half_run / "checkpoints" / "step_00000004" / name
    whole = file.read_bytes()
    for length in (0, 1, len(whole) // 2, len(whole) - 2 * (name == "manifest.json") - 1):  # it ends with a newline
        file.write_bytes(whole[:length])
        assert found(half_run) == ("step_00000002", 1), length
    file.write_bytes(whole)
    assert found(half_run) == ("step_00000004", 0)


def test_a_checkpoint_with_a_flipped_bit(half_run: Path) -> None:
    chance, files = random.Random(7), sorted((half_run / "checkpoints" / "step_00000004").iterdir())
    for _ in range(200):
        file = chance.choices(files, [one.stat().st_size for one in files])[0]
        whole = file.read_bytes()
        spoilt = bytearray(whole)
        spoilt[chance.randrange(len(whole) - 2)] ^= 1 << chance.randrange(8)
        file.write_bytes(spoilt)
        assert found(half_run) == ("step_00000002", 1), (file.name, zlib.crc32(spoilt))
        file.write_bytes(whole)
    assert found(half_run) == ("step_00000004", 0)


def found(run: Path) -> tuple[str, int]:
    """Return the checkpoint that would be resumed, and the number of newer ones passed over."""
    path, reasons = newest_valid(run, MPI.COMM_SELF)
    return path.name if path else "", len(reasons)


NO_ROOM = """
import os
filler = None
def full(batch):
    global filler
    if batch == 2:
        filler = open("run/filler", "wb", buffering=0)
        for size in (4096, 1):
            try:
                while filler.write(bytes(size)):
                    pass
            except OSError:
                pass
    else:
        os.remove("run/filler")
        filler.close()
"""


def test_no_room_for_a_line(either: Shell, forks: Forks) -> None:
    """From step 3 to step 19: more lines than fit into the last page of the file."""
    words = ("tiny.toml", "--train.steps=20")
    expect(forks.run(either.folder, "mpidp.train", *words, "--run.dir=alone"), 0)
    source = NO_ROOM + faulty("full(batch.batch)", batches=[2, 18]) + ENTER
    ended = with_mounts(either, "mkdir run; mount -t tmpfs -o size=2m tmpfs run",
                        "sh", "-c", 'mpirun -n 2 python "$@" && cp run/metrics.jsonl .', "sh", "-c", source, *words)
    assert ended.code == 0, ended
    assert steps_logged(either.folder) == list(range(1, 21))
    assert end_record(either.folder)["weights_sha256"] == end_record(either.folder / "alone")["weights_sha256"]
    warnings = [line for line in ended.err.splitlines() if "warning: run/metrics.jsonl cannot be written" in line]
    assert len(warnings) == 1 and "No space left on device" in warnings[0], ended


def test_a_read_only_run_dir(either: Shell) -> None:
    mounts = "mkdir run; mount -o bind run run; mount -o remount,ro,bind run"
    ended = with_mounts(either, mounts, "mpirun", "-n", "2", "python", "-m", "mpidp.train", "tiny.toml")
    expect(ended, 2, "run.dir=run cannot be written to", "Read-only file system", "--run.dir=DIR")


def test_too_little_shared_memory(either: Shell, forks: Forks) -> None:
    """A window needs 40 MB; both MPIs start with less than 24 MB."""
    words = ["tiny.toml", "--model.model_dim=256", "--model.num_layers=2", "--train.steps=2"]
    expect(forks.run(either.folder, "mpidp.train", *words, "--run.dir=alone"), 0)
    mounts = "mount -t tmpfs -o size=24m tmpfs /dev/shm"
    ended = with_mounts(either, mounts, "mpirun", "-n", "2", "python", "-m", "mpidp.train", *words)
    expect(ended, 0)
    assert "transport messages (/dev/shm on " in ended.out and "MiB free, but a shared-memory window needs" in ended.out, ended
    hashes = [end_record(either.folder / run)["weights_sha256"] for run in ("run", "alone")]
    assert hashes[0] == hashes[1]
