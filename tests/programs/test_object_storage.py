"""Laws of shards and mirrors in S3, with moto's server behind a proxy that fails on purpose: weights as on disk, also while
requests fail; a server that is gone ends the job with exit code 3, and the same command resumes it; what is wrong is named,
without a traceback and without a secret."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from data_tools.prepare import prepare
from mpidp.storage.remote import CacheOptions, RemoteFolder
from tests.programs.packages import needed
from tests.storage_server import Faults, FaultyServer, before, no_faults, serving

ROOT = Path(__file__).resolve().parents[2]
SECRET = "hushhushhushhush"
SMALL = (
    "--model.num_layers=1", "--model.model_dim=32", "--model.seq_len=64", "--train.threads=1", "--train.eval_every=0",
    "--train.device=cpu", "--train.dtype=float32", "--metrics.energy=false",
)


@dataclass
class Cloud:
    """A bucket with the shards `d`, behind a proxy that can fail."""

    client: Any
    proxy: FaultyServer
    upstream: str
    folder: Path  # with the shards on disk, `d`
    env: dict[str, str] = field(default_factory=dict)

    def run(self, *words: str, ranks: int = 1, **env: str) -> subprocess.CompletedProcess[str]:
        """Run a command of mpidp with the Python beside mpirun."""
        mpirun = Path(shutil.which("mpirun") or pytest.skip("no mpirun"))
        places = {Path(str(needed(name).__file__)).parents[1] for name in ("s3fs", "aiobotocore", "wrapt")}
        own = {"PYTHONPATH": ":".join(map(str, [ROOT, *sorted(places)])), "OMP_NUM_THREADS": "1", **self.env, **env}
        command = [*([str(mpirun), "-n", str(ranks)] if ranks > 1 else []), str(mpirun.parent / "python"), "-m", *words]
        done = subprocess.run(
            command, env=os.environ | own, capture_output=True, text=True, timeout=200, stdin=subprocess.DEVNULL, cwd=self.folder
        )
        assert SECRET not in done.stdout + done.stderr and "Traceback" not in done.stdout + done.stderr
        return done

    def train(self, name: str, path: str, *words: str, ranks: int = 1, **env: str) -> subprocess.CompletedProcess[str]:
        """Train for 12 steps in the folder `name`."""
        return self.run("mpidp.train", f"--data.path={path}", f"--run.dir={self.folder / name}",
                        f"--data.cache_dir={self.folder / 'cache'}", "--train.steps=12", *SMALL, *words, ranks=ranks, **env)

    def sha256(self, name: str) -> str:
        lines = (self.folder / name / "metrics.jsonl").read_text().splitlines()
        return str(json.loads(lines[-1])["weights_sha256"])

    def forget(self) -> None:
        """Empty the cache."""
        shutil.rmtree(self.folder / "cache", ignore_errors=True)


@pytest.fixture(scope="module")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cloud]:
    needed("s3fs")
    moto, boto3 = needed("moto.server", "moto"), needed("boto3")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = moto.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    upstream = "http://{}:{}".format(*server.get_host_and_port())
    folder = tmp_path_factory.mktemp("cloud")
    prepare("stdlib", "byte", folder / "d", shards=3, verbose=False)
    client = boto3.client(
        "s3", endpoint_url=upstream, aws_access_key_id="KEY", aws_secret_access_key=SECRET, region_name="us-east-1"
    )
    client.create_bucket(Bucket="bucket")
    for path in (folder / "d").iterdir():
        client.upload_file(str(path), "bucket", f"data/d/{path.name}")
    with serving(before(upstream)) as proxy:
        env = {"AWS_ENDPOINT_URL": proxy.address, "AWS_ACCESS_KEY_ID": "KEY", "AWS_SECRET_ACCESS_KEY": SECRET,
               "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true", "HOME": str(folder)}
        yield Cloud(client, proxy, upstream, folder, env)
    server.stop()


@pytest.fixture(autouse=True)
def _no_faults(cloud: Cloud) -> Iterator[None]:
    yield
    cloud.proxy.faults = no_faults


@pytest.fixture(scope="module")
def on_disk(cloud: Cloud) -> str:
    """The hash of the weights of a training on the shards on disk."""
    assert cloud.train("disk", str(cloud.folder / "d")).returncode == 0
    return cloud.sha256("disk")


def sometimes(number: int, method: str, path: str) -> str | None:
    """Every third request fails, each time in another way."""
    return ("503", "cut", "gone", "other", "slow")[number // 3 % 5] if number % 3 == 2 else None


@pytest.mark.parametrize(("ranks", "faults"), [(1, no_faults), (2, sometimes), (3, no_faults)])
def test_weights_are_those_of_shards_on_disk(cloud: Cloud, on_disk: str, ranks: int, faults: Faults) -> None:
    cloud.forget()
    cloud.proxy.faults = faults
    words = ("--data.verify=false", "--train.balance=steal") if ranks == 3 else ()
    done = cloud.train(f"s3_{ranks}", "s3://bucket/data/d", *words, ranks=ranks)
    assert done.returncode == 0, done.stderr
    assert cloud.sha256(f"s3_{ranks}") == on_disk
    config = (cloud.folder / f"s3_{ranks}" / "config.toml").read_text()
    assert 'path = "s3://bucket/data/d"' in config and SECRET not in config


@pytest.mark.parametrize("fault", ["gone", pytest.param("503", marks=pytest.mark.long)])
def test_a_server_that_is_gone_ends_the_job_and_the_same_command_resumes_it(cloud: Cloud, on_disk: str, fault: str) -> None:
    cloud.forget()
    # in order, 8 steps read one block of the cache: step 9 needs the server
    same = ("--data.order=sequential", "--model.seq_len=1024", "--train.save_every=1")
    words = (*same, "--data.verify=false", "--data.retry_seconds=3", "--train.eval_tokens=1024")
    path = cloud.folder / f"gone_{fault}"

    def gone(number: int, method: str, path_: str) -> str | None:
        return fault if method == "GET" and any(path.glob("checkpoints/step_0000000[2-9]")) else None

    cloud.proxy.faults = gone
    done = cloud.train(path.name, "s3://bucket/data/d", *words, ranks=2)
    assert done.returncode == 3, done.stdout + done.stderr
    assert "s3://bucket/data/d/train_0000" in done.stderr and "gave up after" in done.stderr and "try 2 failed" in done.stderr
    cloud.proxy.faults = no_faults
    done = cloud.train(path.name, "s3://bucket/data/d", *words, ranks=1)
    assert done.returncode == 0 and "resuming from" in done.stdout, done.stderr
    assert cloud.train(f"whole_{fault}", str(cloud.folder / "d"), *words).returncode == 0
    assert cloud.sha256(path.name) == cloud.sha256(f"whole_{fault}")


def test_an_outage_is_waited_for_longer_than_hang_seconds(cloud: Cloud, on_disk: str) -> None:
    cloud.forget()
    began: list[float] = []

    def out(number: int, method: str, path: str) -> str | None:
        if not (cloud.folder / "outage" / "metrics.jsonl").exists():
            return None
        began.append(time.monotonic())
        return "503" if time.monotonic() - began[0] < 8 else None

    cloud.proxy.faults = out
    done = cloud.train("outage", "s3://bucket/data/d", "--run.hang_seconds=2", "--data.verify=false", ranks=2)
    assert done.returncode == 0, done.stderr
    assert cloud.sha256("outage") == on_disk and "answers again" in done.stdout and "HTTP 503" in done.stderr


def test_a_shard_that_is_replaced_is_an_error(cloud: Cloud) -> None:
    folder = RemoteFolderOf(cloud, "changed")
    shard = folder.opened("train_00000.h5")
    shard.read(0, 10)
    cloud.client.upload_file(str(cloud.folder / "d" / "train_00001.h5"), "bucket", "changed/train_00000.h5")
    with pytest.raises(Exception, match="s3://bucket/changed/train_00000.h5: it was replaced on the server"):
        shard.read(1_000_000, 10)


class RemoteFolderOf:
    """A copy of the shards in another folder of the bucket, opened in this process."""

    def __init__(self, cloud: Cloud, name: str) -> None:
        for path in (cloud.folder / "d").iterdir():
            cloud.client.upload_file(str(path), "bucket", f"{name}/{path.name}")
        with pytest.MonkeyPatch.context() as patch:
            for key, value in cloud.env.items():
                patch.setenv(key, value)
            self.folder = RemoteFolder(f"s3://bucket/{name}", CacheOptions(str(cloud.folder / "cache"), 0.1, 2.0))
            self.folder.open_file("train_00000.h5")  # connects with these variables

    def opened(self, name: str) -> Any:
        return self.folder.open_file(name)


@pytest.mark.parametrize(("address", "env", "says"), [
    ("s3://nobucket/d", {}, "s3://nobucket/d/index.json: there is no bucket nobucket"),
    ("s3://bucket/none", {}, "no shards at s3://bucket/none .index.json: there is no such object"),
    ("s3://bucket/data/d", {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, "[Cc]redentials.*AWS_ACCESS_KEY_ID"),
    ("s3://bucket/data/d", {"AWS_PROFILE": "nobody"}, "nobody"),
    ("s3://bucket/data/d", {"AWS_ENDPOINT_URL": "http://127.0.0.1:1"}, "s3://bucket/data/d/index.json: .*gave up after"),
    ("s3://Bad_Bucket!/d", {}, "s3://Bad_Bucket!/d"),
    (f"s3://KEY:{SECRET}@bucket/d", {}, r"s3://\*\*\*@bucket/d: an address must not contain"),
])
def test_what_is_wrong_is_named(cloud: Cloud, address: str, env: dict[str, str], says: str) -> None:
    done = cloud.run("data_tools.verify", address, TMPDIR=str(cloud.folder), **env)
    assert done.returncode in (2, 3), done.stderr
    assert re.search(says, done.stderr), done.stderr


@pytest.mark.parametrize(("status", "code", "says"), [
    (403, "AccessDenied", "no access"), (403, "InvalidAccessKeyId", "no access"), (403, "SignatureDoesNotMatch", "no access"),
    (301, "PermanentRedirect", "another region.*AWS_DEFAULT_REGION"), (400, "ExpiredToken", "no access"),
    (400, "AuthorizationHeaderMalformed", "another region"), (412, "PreconditionFailed", "replaced"),
])
def test_answers_of_s3_are_translated(status: int, code: str, says: str) -> None:
    """moto checks neither signatures nor regions, so these answers are made here. See S3's list of error codes."""
    needed("s3fs")
    from mpidp.storage.s3 import _of_code

    answer = {"Error": {"Code": code, "Message": "no."}, "ResponseMetadata": {"HTTPStatusCode": status}}
    assert re.search(says, str(_of_code(answer)))


def test_the_tools_read_s3(cloud: Cloud, on_disk: str) -> None:
    verified = cloud.run("data_tools.verify", "s3://bucket/data/d", TMPDIR=str(cloud.folder))
    assert verified.returncode == 0 and "all match index.json" in verified.stdout, verified.stderr
    shown = cloud.run("data_tools.inspect", "s3://bucket/data/d", TMPDIR=str(cloud.folder))
    assert shown.returncode == 0 and "skew" in shown.stdout, shown.stderr
    dry = cloud.run("mpidp.train", "--dry-run", "--data.path=s3://bucket/data/d", *SMALL, TMPDIR=str(cloud.folder))
    assert dry.returncode == 0 and "data: s3://bucket/data/d" in dry.stdout, dry.stderr
    loss = cloud.run("mpidp.evaluate", "disk", "--data", "s3://bucket/data/d", TMPDIR=str(cloud.folder))
    assert loss.returncode == 0, loss.stderr


def test_checkpoints_are_mirrored_and_fetched(cloud: Cloud, on_disk: str) -> None:
    words = ("--run.mirror=s3://bucket/runs/a", "--train.save_every=4")
    cloud.proxy.faults = lambda number, method, path: "503" if "/runs/" in path and number % 7 in (1, 2) else None
    done = cloud.train("mirrored", str(cloud.folder / "d"), *words, ranks=2)
    assert done.returncode == 0 and cloud.sha256("mirrored") == on_disk, done.stderr
    keys = [one["Key"] for one in cloud.client.list_objects_v2(Bucket="bucket", Prefix="runs/a/")["Contents"]]
    assert "runs/a/checkpoints/step_00000012/manifest.json" in keys and "runs/a/metrics.jsonl" in keys
    cloud.client.delete_object(Bucket="bucket", Key="runs/a/checkpoints/step_00000012/manifest.json")
    again = cloud.train("elsewhere", "s3://bucket/data/d", *words)
    assert again.returncode == 0 and "fetching the checkpoint of step" in again.stdout, again.stderr
    assert cloud.sha256("elsewhere") == on_disk


def test_a_mirror_that_is_gone_does_not_stop_the_training(cloud: Cloud, on_disk: str) -> None:
    words = ("--run.mirror=s3://bucket/runs/b", "--train.save_every=4")
    cloud.proxy.faults = lambda number, method, path: (
        "gone" if method == "PUT" and "/runs/b/checkpoints/step_00000004" in path else None
    )
    done = cloud.train("no_mirror", str(cloud.folder / "d"), *words)
    assert done.returncode == 0 and cloud.sha256("no_mirror") == on_disk, done.stderr
    keys = [one["Key"] for one in cloud.client.list_objects_v2(Bucket="bucket", Prefix="runs/b/")["Contents"]]
    assert "runs/b/checkpoints/step_00000012/manifest.json" in keys
