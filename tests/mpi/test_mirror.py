"""Laws of run.mirror: a run that resumes from its mirror equals an uninterrupted run; a checkpoint without manifest does not
exist; a server that fails stops nothing; a mirror belongs to one run."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import IO, Any

import pytest

from mpidp.checkpoint import mirror, mirrored
from mpidp.checkpoint.manifest import committed
from mpidp.checkpoint.mirrored import MirrorFolder
from mpidp.config.schema import Config
from mpidp.errors import DataError, MpidpError, UsageError
from tests.tiny import WORLD, corpus, everywhere, polite_barrier, tiny, train_at

pytestmark = pytest.mark.mpi
TRAIN = {"steps": 6, "save_every": 2}


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror, "AGAIN_SECONDS", 0.1)


def config(folder: Path, name: str, address: str, **run: Any) -> Config:
    shards = corpus(folder, 5000, shards=3)
    own = {"dir": str(folder / name), "mirror": address, "hang_seconds": 0.0, **run}
    return tiny(shards, folder / name, train=TRAIN, run=own)


@pytest.fixture
def place(mpi_tmp_path: Path) -> tuple[Path, str]:
    return mpi_tmp_path, f"file://{mpi_tmp_path}/mirror/run"


def steps_on(folder: Path) -> list[int]:
    """The steps on the mirror with a manifest. Collective over WORLD."""
    found = sorted(int(path.parent.name[5:]) for path in (folder / "mirror/run/checkpoints").glob("*/manifest.json"))
    return list(WORLD.bcast(found))


def alone(work: Any) -> None:
    """Do something on rank 0 only. Collective over WORLD."""
    if WORLD.rank == 0:
        work()
    polite_barrier(WORLD)


def test_a_run_resumes_from_its_mirror(place: tuple[Path, str]) -> None:
    folder, address = place
    whole = train_at(1, config(folder, "whole", ""))
    assert train_at(min(2, WORLD.size), config(folder, "first", address, keep=2)).sha256 == whole.sha256
    assert steps_on(folder) == [4, 6]
    top = folder / "mirror/run"
    for name in ("config.toml", "tokenizer.json", "metrics.jsonl", "mirror.json"):
        everywhere((top / name).exists(), name)
    alone(lambda: (top / "checkpoints/step_00000006/manifest.json").unlink())  # as after a copy that was interrupted
    resumed = train_at(min(3, WORLD.size), config(folder, "second", address, keep=2))
    assert resumed.sha256 == whole.sha256 and resumed.learned == whole.learned
    assert steps_on(folder) == [4, 6]
    assert len(resumed.events("resume")) == 1


@pytest.mark.check
def test_a_damaged_checkpoint_on_the_mirror_is_skipped(place: tuple[Path, str]) -> None:
    folder, address = place
    whole = train_at(1, config(folder, "first", address))

    def damage(step: int) -> None:
        part = folder / f"mirror/run/checkpoints/step_{step:08d}/rank_00000.safetensors"
        content = bytearray(part.read_bytes())
        content[-1] ^= 1
        part.write_bytes(content)

    alone(lambda: damage(6))
    assert train_at(1, config(folder, "second", address)).sha256 == whole.sha256
    for step in (2, 4, 6):
        alone(lambda step=step: damage(step))
    with pytest.raises(MpidpError, match="no checkpoint on file://.* is valid.*wrong crc32") as caught:
        train_at(WORLD.size, config(folder, "third", address))
    assert caught.value.exit_code == 4
    everywhere(not committed(folder / "third/checkpoints"), "nothing half fetched")


@pytest.mark.check
def test_a_damaged_checkpoint_is_not_copied_to_the_mirror(place: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest checkpoint of the run is damaged, and the mirror lacks it. The run resumes from an earlier one."""
    folder, address = place
    whole = train_at(1, config(folder, "run", address))

    def damage() -> None:
        (folder / "run/checkpoints/step_00000006/manifest.json").write_text("")
        shutil.rmtree(folder / "mirror/run/checkpoints/step_00000006")

    copied: list[str] = []
    real = mirror.Mirror._copy

    def copy(self: mirror.Mirror, checkpoint: Path) -> int:
        copied.append(checkpoint.name)
        return real(self, checkpoint)

    alone(damage)
    monkeypatch.setattr(mirror.Mirror, "_copy", copy)
    assert train_at(1, config(folder, "run", address)).sha256 == whole.sha256
    assert WORLD.bcast(copied) == ["step_00000006"] and steps_on(folder) == [2, 4, 6]
    alone(lambda: shutil.rmtree(folder / "mirror/run/checkpoints/step_00000006"))
    train_at(1, config(folder, "run", address))  # the run has ended; the mirror gets what it lacks
    assert WORLD.bcast(copied) == ["step_00000006"] * 2 and steps_on(folder) == [2, 4, 6]


@pytest.mark.check
def test_a_mirror_belongs_to_one_run(place: tuple[Path, str]) -> None:
    folder, address = place
    train_at(1, config(folder, "first", address))
    train_at(1, config(folder, "other", ""))
    wrong = [("other", {}, "of another run"), ("first", {"resume": "never"}, "holds the checkpoints of the earlier run")]
    for name, changes, says in wrong:
        with pytest.raises(UsageError, match=says):
            train_at(WORLD.size, config(folder, name, address, **changes))
    alone(lambda: shutil.rmtree(committed(folder / "first/checkpoints")[0]))
    with pytest.raises(UsageError, match="has a checkpoint of step 6, but step 4 is the newest"):
        train_at(WORLD.size, config(folder, "first", address))
    with pytest.raises(UsageError, match="nothing can be written to a web server"):
        MirrorFolder("http://localhost/x").write("a", io.BytesIO(b"a"), 1)


@pytest.mark.check
def test_a_server_that_fails_stops_nothing(place: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, address = place
    real, calls = MirrorFolder.write, []

    def write(self: MirrorFolder, name: str, content: IO[bytes], size: int) -> None:
        calls.append(name)
        if 1 < len(calls) < 12:
            raise DataError("the server is gone")
        real(self, name, content, size)

    monkeypatch.setattr(MirrorFolder, "write", write)
    whole = train_at(1, config(folder, "whole", ""))
    assert train_at(min(2, WORLD.size), config(folder, "run", address)).sha256 == whole.sha256
    assert 6 in steps_on(folder)  # tried again at the end

    monkeypatch.setattr(mirror.Mirror, "finish", lambda self, seconds: real_finish(self, min(seconds, 0.5)))
    monkeypatch.setattr(MirrorFolder, "write", lambda self, name, content, size: (_ for _ in ()).throw(DataError("gone")))
    monkeypatch.setattr(mirrored, "_id_of", lambda folder: json.loads(Path(address[7:], "mirror.json").read_text())["run"])
    alone(lambda: shutil.rmtree(folder / "mirror/run/checkpoints"))
    more = config(folder, "run", address).with_values(train={"steps": 8})
    assert train_at(1, more).end["step"] == 8 and steps_on(folder) == []


real_finish = mirror.Mirror.finish
