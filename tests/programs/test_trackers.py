"""Real trackers store the numbers of metrics.jsonl: once each, also after a resume; a dead server is a warning."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from data_tools.prepare import prepare
from tests.programs.packages import needed

SMALL = ["--model.num_layers=1", "--model.model_dim=32", "--model.seq_len=32", "--train.global_batch=4", "--train.eval_every=2",
         "--train.eval_tokens=200", "--train.save_every=2", "--optim.schedule=constant", "--optim.warmup_steps=0"]
Stored = dict[str, dict[int, float]]  # name of a scalar: its values by step


def train(run: Path, shards: Path, track: str, steps: int, **environment: str) -> subprocess.CompletedProcess[str]:
    servers = ("WANDB_", "MLFLOW_", "TRACKIO_")
    plain = {key: value for key, value in os.environ.items() if not key.startswith(servers)}
    return subprocess.run(
        [sys.executable, "-m", "mpidp.train", *SMALL, f"--train.steps={steps}", f"--run.dir={run}", f"--data.path={shards}",
         f"--metrics.track={track}", "--metrics.tags=one,two"],
        env=plain | environment, capture_output=True, text=True, check=True, timeout=280,
    )


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    (folder / "a.txt").write_text("the quick brown fox jumps over the lazy dog. " * 100)
    prepare(str(folder / "a.txt"), "byte", folder / "shards", 1, 0.2, verbose=False)
    return folder / "shards"


def leveldb_records(file: bytes) -> Iterator[bytes]:
    """Yield the records of a file of wandb: 7 bytes, then LevelDB's log format, with the 7 bytes as a part of the first block."""
    at, begun = 7, b""
    while at + 7 <= len(file):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", file, at + 4)  # after a checksum
        part, at = file[at + 7 : at + 7 + length], at + 7 + length
        begun = part if kind in (1, 2) else begun + part
        if kind in (1, 4):  # a whole record, or the last part of one
            yield begun


def of_wandb(track: Path) -> tuple[Stored, dict[str, Any]]:
    """Read the offline files, as `wandb sync` does."""
    records = needed("wandb.proto.wandb_internal_pb2", "wandb")
    found: Stored = {}
    about: dict[str, Any] = {"ids": set()}
    for path in sorted(track.glob("wandb/offline-run-*/*.wandb")):
        for raw in leveldb_records(path.read_bytes()):
            record = records.Record.FromString(raw)
            if record.HasField("run"):
                about["ids"].add(record.run.run_id)
                about |= {"tags": list(record.run.tags)}
                about |= {one.key or one.nested_key[0]: json.loads(one.value_json) for one in record.run.config.update}
            if record.HasField("history"):
                items = {one.key or ".".join(one.nested_key): json.loads(one.value_json) for one in record.history.item}
                step = record.history.step.num
                for name, value in items.items():
                    if "/" in name:
                        assert step not in found.setdefault(name, {}), "a step is stored twice"
                        found[name][step] = value
    assert len(about["ids"]) == 1
    return found, about


def of_mlflow(track: Path) -> tuple[Stored, dict[str, Any]]:
    client = needed("mlflow.tracking", "mlflow-skinny").MlflowClient(tracking_uri=f"sqlite:///{track}/mlflow.db")
    [experiment] = client.search_experiments(filter_string="name = 'mpidp'")
    [run] = client.search_runs([experiment.experiment_id])
    found: Stored = {}
    for name in run.data.metrics:
        history = client.get_metric_history(run.info.run_id, name)
        found[name] = {one.step: one.value for one in history}
        assert len(history) == len(found[name]), "a step is stored twice"
    assert run.info.status == "FINISHED" and run.info.run_name == track.parent.name
    tags = [key.removeprefix("tag.") for key in run.data.tags if key.startswith("tag.")]
    return found, {**run.data.params, "tags": tags, "resumed": run.data.tags.get("resumed.train.steps")}


def of_trackio(track: Path) -> tuple[Stored, dict[str, Any]]:
    needed("trackio")
    text = """
import json
from trackio.sqlite_storage import SQLiteStorage as S
[run] = S.get_runs("mpidp")
print(json.dumps([S.get_logs("mpidp", run), S.get_run_config("mpidp", run)]))
"""
    read = subprocess.run([sys.executable, "-c", text], env={**os.environ, "TRACKIO_DIR": str(track / "trackio")},
                          capture_output=True, text=True, check=True)
    logs, config = json.loads(read.stdout)
    found: Stored = {}
    for line in logs:
        for name, value in line.items():
            if name.startswith(("steps/", "val/")):
                assert line["step"] not in found.setdefault(name, {}), "a step is stored twice"
                found[name][line["step"]] = value
    return found, {**config, "tags": config["tags"].split(", ")}


READERS: dict[str, tuple[str, Callable[[Path], tuple[Stored, dict[str, Any]]]]] = {
    "wandb": ("wandb", of_wandb), "mlflow": ("mlflow", of_mlflow), "trackio": ("trackio", of_trackio),
}  # fmt: skip


@pytest.mark.parametrize("name", READERS)
def test_a_tracker_stores_what_metrics_jsonl_holds(tmp_path: Path, shards: Path, name: str) -> None:
    """The second job computes steps 3 and 4 again, because their checkpoint is lost."""
    package, reader = READERS[name]
    needed(package)
    run = tmp_path / "run"
    train(run, shards, name, 4)
    shutil.rmtree(run / "checkpoints/step_00000004")
    done = train(run, shards, name, 6)
    assert "warning" not in done.stderr, done.stderr
    found, about = reader(run / "track")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "event" not in line and "val_loss" not in line]
    evaluations = [line for line in lines if "event" not in line and "val_loss" in line]
    assert found["steps/train_loss"] == pytest.approx({line["step"]: line["train_loss"] for line in steps})
    assert found["val/val_loss"] == pytest.approx({line["step"]: line["val_loss"] for line in evaluations})
    assert sorted(found["steps/lr"]) == list(range(1, 7)) and "steps/step_seconds" in found
    assert float(about["model.model_dim"]) == 32 and sorted(about["tags"]) == ["one", "two"]


DEAD = {
    "wandb": {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0123456789" * 4},
    "mlflow": {"MLFLOW_TRACKING_URI": "http://me:s3cr3t@127.0.0.1:9"},
    "trackio": {"TRACKIO_SERVER_URL": "http://127.0.0.1:9"},
}  # fmt: skip


@pytest.mark.parametrize("name", DEAD)
def test_a_dead_server_is_a_warning(tmp_path: Path, shards: Path, name: str) -> None:
    needed(READERS[name][0])
    plain, tracked = (train(tmp_path / track, shards, track, 4, **DEAD[name]) for track in ("", name))
    weights = [re.findall("weights_sha256 (.*)", one.stdout) for one in (plain, tracked)]
    assert weights[0] == weights[1] and weights[0]
    assert tracked.stderr.count("warning: ") == tracked.stderr.count(f"metrics.track={name}: ") in (1, 2), tracked.stderr
    assert "s3cr3t" not in tracked.stderr
    if name == "wandb" and "stored offline" in tracked.stderr:  # if the machine is slow, the time at the end is not enough
        assert list((tmp_path / "wandb/track").glob("wandb/offline-run-*"))
    if name == "mlflow" and "are stored in" in tracked.stderr:
        found, _ = READERS[name][1](tmp_path / "mlflow/track")
        assert sorted(found["steps/train_loss"]) == [1, 2, 3, 4]
