"""Laws of shards and mirrors in Google Cloud Storage, with gcsfs and the server of gcp-storage-emulator: bytes and weights are as
on disk, a run resumes from its mirror, and a server that is gone is named without a traceback."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from data_tools.prepare import prepare
from data_tools.verify import verify
from mpidp.data.shards import TokenStream
from mpidp.storage.remote import CacheOptions
from tests.programs.packages import needed

ROOT = Path(__file__).resolve().parents[2]
SMALL = (
    "--model.num_layers=1", "--model.model_dim=32", "--model.seq_len=64", "--train.threads=1", "--train.eval_every=0",
    "--train.device=cpu", "--train.dtype=float32", "--metrics.energy=false", "--data.retry_seconds=1",
)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """A server with the bucket `box`, which has the shards `d`."""
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # asks another server of Google for the type of the bucket
    gcsfs, emulator = needed("gcsfs"), needed("gcp_storage_emulator.server", "gcp-storage-emulator")
    text = tmp_path / "in.txt"
    text.write_text("".join(f"line {i} of a text\n" for i in range(400)))
    prepare(str(text), "byte", tmp_path / "d", shards=2, verbose=False)
    running = emulator.create_server("127.0.0.1", 0, in_memory=True, default_bucket="box")
    running.start()
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{running._api._httpd.server_address[1]}")
    files = gcsfs.GCSFileSystem(token="anon", skip_instance_cache=True)
    for path in sorted((tmp_path / "d").iterdir(), key=lambda path: path.name == "index.json"):
        files.put_file(str(path), f"box/d/{path.name}")
    yield running
    running.stop()


def train(folder: Path, name: str, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mpidp.train", f"--run.dir={folder / name}", f"--data.cache_dir={folder / 'cache'}", *SMALL]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([*command, *words], env=environment, capture_output=True, text=True, timeout=200)


def weights(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stdout + done.stderr
    return re.findall(r"weights_sha256 (\w+)", done.stdout)[-1]


def test_shards_and_mirrors_in_google_storage(server: object, tmp_path: Path) -> None:
    there, here = TokenStream("gs://box/d", cache=CacheOptions(str(tmp_path / "c"), 0.1, 5.0)), TokenStream(tmp_path / "d")
    assert np.array_equal(there.read(0, there.num_tokens), here.read(0, here.num_tokens))
    assert "all match index.json" in verify("gs://box/d")
    of_disk = weights(train(tmp_path, "disk", f"--data.path={tmp_path / 'd'}", "--train.steps=6"))
    assert weights(train(tmp_path, "a", "--data.path=gs://box/d", "--run.mirror=gs://box/m", "--train.steps=6")) == of_disk
    resumed = train(tmp_path, "b", "--data.path=gs://box/d", "--run.mirror=gs://box/m", "--train.steps=9")
    assert "step 6/9" not in resumed.stdout and (tmp_path / "b/checkpoints/step_00000006").is_dir()
    assert weights(resumed) == weights(train(tmp_path, "disk", f"--data.path={tmp_path / 'd'}", "--train.steps=9"))


def test_a_google_server_that_is_gone_is_named(server: object, tmp_path: Path) -> None:
    server.stop()  # type: ignore[attr-defined]
    done = train(tmp_path, "a", "--data.path=gs://box/d", "--train.steps=6")
    assert done.returncode == 3 and "Traceback" not in done.stdout + done.stderr
    assert re.search(r"gs://box/d/index.json: .*gave up after \d+ tr(y|ies) in", done.stderr)
