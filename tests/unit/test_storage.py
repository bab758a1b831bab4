"""Laws of remote shards: the same tokens as on disk; requests that fail are tried again, and what is wrong is never used; the
cache stays within its bound and has no block that is not whole; no secret is shown."""

from __future__ import annotations

import gc
import hashlib
import logging
import os
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pytest

from data_tools import inspect, verify
from mpidp.checkpoint.mirrored import MirrorFolder
from mpidp.config.command_line import from_args
from mpidp.data.shards import TokenStream
from mpidp.errors import DataError, MpidpError, UsageError
from mpidp.storage import cache, remote, retry
from mpidp.storage.address import address_problems, is_remote, without_secrets
from mpidp.storage.cache import BLOCK, BlockCache
from mpidp.storage.ranges import _groups
from mpidp.storage.remote import DEFAULT_CACHE, CacheOptions, RemoteFolder
from mpidp.storage.store import Unreachable
from tests.storage_server import FaultyServer, no_faults, of_folder, serving
from tests.unit.test_loader import make_stream

TOKENS = np.random.default_rng(1).integers(0, 300, 700_000)  # 1.4 MB: six blocks
FAULTS = {
    "503": "HTTP 503", "cut": "connection broke|bytes arrived", "gone": "closed connection|reset", "other": "sent the range",
}


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(retry, "QUIET_SECONDS", 0.0)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the shards `d`. Tests that change shards copy them."""
    folder = tmp_path_factory.mktemp("root")
    make_stream(folder / "d", TOKENS, [300_000])
    (folder / "d" / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture
def server(root: Path) -> Iterator[FaultyServer]:
    with serving(of_folder(root)) as running:
        yield running


def opened(server: FaultyServer, folder: Path, seconds: float = 5.0, gigabytes: float = 0.1) -> TokenStream:
    """The shards on the server. make_stream writes no checksum of a tokenizer, so the small files are put into the cache."""
    return TokenStream(f"{server.address}/d", "train", CacheOptions(str(folder / "cache"), gigabytes, seconds))


@pytest.fixture(autouse=True)
def _any_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The index of make_stream states the checksum "ab"."""
    real = hashlib.sha256

    class Ab:
        def hexdigest(self) -> str:
            return "ab"

    faked = SimpleNamespace(sha256=lambda data: Ab() if data == b"{}" else real(data))
    monkeypatch.setattr("mpidp.storage.remote.hashlib", faked)


def fail_first(kind: str, times: int, what: str = "train_") -> Any:
    """Faults for the first requests of ranges of shards."""
    left = [times]

    def fault(number: int, method: str, path: str) -> str | None:
        if method == "GET" and what in path and left[0] > 0:
            left[0] -= 1
            return kind
        return None

    return fault


def test_tokens_are_those_on_disk(server: FaultyServer, root: Path, tmp_path: Path) -> None:
    near, far = TokenStream(root / "d"), opened(server, tmp_path)
    assert far.num_tokens == near.num_tokens and far.index_sha256 == near.index_sha256
    for start, count in [(0, 1), (299_999, 2), (0, 700_000), (123_456, 65), (699_999, 1), (5, 0)]:
        assert np.array_equal(far.read(start, count), near.read(start, count))
        assert np.array_equal(far.read_starts(start, count), near.read_starts(start, count))
    far.check(contents=True)


def test_a_range_is_fetched_once_and_read_ahead(server: FaultyServer, tmp_path: Path) -> None:
    far = opened(server, tmp_path)
    far.advise(0, 250_000)
    for start in range(0, 240_000, 10_000):
        assert np.array_equal(far.read(start, 100), TOKENS[start : start + 100])
    ranges = [where for method, _, where in server.requests if method == "GET" and "train" in _]
    assert len(set(ranges)) == len(ranges)
    again, before = opened(server, tmp_path), len(server.requests)
    again.read(0, 240_000)
    assert [method for method, *_ in server.requests[before:]] == ["HEAD"]  # from the cache; only the version is asked for


@pytest.mark.parametrize("kind", FAULTS)
def test_failed_requests_are_tried_again_and_named(
    server: FaultyServer, tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("mpidp"), "propagate", True)
    server.faults = fail_first(kind, 3)
    far = opened(server, tmp_path)
    assert np.array_equal(far.read(0, 700_000), TOKENS)
    said = caplog.text
    assert f"{server.address}/d/train_" in said and "try 2 failed" in said


@pytest.mark.parametrize("kind", FAULTS)
def test_a_server_that_is_gone_is_an_error_after_the_time_limit(server: FaultyServer, tmp_path: Path, kind: str) -> None:
    far = opened(server, tmp_path, seconds=0.2)
    far.read(0, 10)
    server.faults = lambda number, method, path: kind
    with pytest.raises(DataError, match=f"({FAULTS[kind]}).*gave up after [0-9]+ tries.*0.2 s, see data.retry_seconds"):
        far.read(150_000, 10)
    server.faults = no_faults
    assert np.array_equal(far.read(150_000, 10), TOKENS[150_000:150_010])


@pytest.mark.parametrize(("seconds", "setting", "answers", "says"), [
    (0.3, "data.retry_seconds", True, r"limit is 0.3 s, see data.retry_seconds\)"),
    (0.1, "data.retry_seconds", False, r"limit is 0.1 s, see data.retry_seconds\)"),
    (300.0, "data.retry_seconds", False, r"limit is 0.2 s because the server has never answered: check the address\)"),
    (60.0, "", False, r"limit is 0.2 s because the server has never answered: check the address\)"),
    (0.3, "", True, r"limit is 0.3 s\)"),
])
def test_the_message_names_a_setting_only_if_it_holds_the_limit(
    monkeypatch: pytest.MonkeyPatch, seconds: float, setting: str, answers: bool, says: str
) -> None:
    monkeypatch.setattr(retry, "FIRST_SECONDS", 0.2)

    def fail() -> None:
        raise Unreachable("it is away")

    retries = retry.Retries(seconds, setting)
    if answers:
        retries.call("x", lambda: None)
    with pytest.raises(DataError, match=says):
        retries.call("x", fail)


def test_settings_are_named_only_by_commands_that_have_them(
    server: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """evaluate, inspect and verify do not have data.retry_seconds, and no setting holds the limit of a mirror."""
    pytest.importorskip("fsspec")
    monkeypatch.setattr(remote, "default_folder", lambda: tmp_path / "usual")
    address = f"{server.address}/d"
    for options, setting in ((DEFAULT_CACHE, ""), (CacheOptions(str(tmp_path)), "data.retry_seconds")):
        assert RemoteFolder(address, options)._retries._setting == setting
    assert MirrorFolder("memory://box/m")._retries._setting == ""


def test_slow_answers_are_waited_for(server: FaultyServer, tmp_path: Path) -> None:
    server.faults = lambda number, method, path: "slow"
    assert np.array_equal(opened(server, tmp_path).read(0, 10), TOKENS[:10])


@pytest.mark.parametrize(("kind", "says"), [("whole", "ignores the header Range"), ("no tag", "neither ETag nor Last-Modified")])
def test_servers_that_are_not_suitable_are_refused(server: FaultyServer, tmp_path: Path, kind: str, says: str) -> None:
    server.faults = lambda number, method, path: kind
    with pytest.raises(DataError, match=says):
        opened(server, tmp_path).read(0, 10)


@pytest.mark.parametrize("same_size", [True, False])
def test_a_file_that_is_replaced_during_the_run_is_an_error(root: Path, tmp_path: Path, same_size: bool) -> None:
    shutil.copytree(root, tmp_path / "root")
    with serving(of_folder(tmp_path / "root")) as server:
        far = opened(server, tmp_path)
        far.read(0, 10)
        shard = tmp_path / "root" / "d" / "train_0.h5"
        content = shard.read_bytes()
        shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]) + (b"" if same_size else b"x"))
        with pytest.raises(DataError, match=f"{server.address}/d/train_0.h5: it was replaced on the server"):
            far.read(200_000, 10)
        other = opened(server, tmp_path)  # another rank opened the file before
        other.storage.expect(far.storage.versions)
        with pytest.raises(DataError, match="it was replaced on the server during the run"):
            other.read(0, 10)


def test_a_server_or_fetching_thread_may_collect_garbage(root: Path, tmp_path: Path) -> None:
    """h5py objects in garbage need h5py's lock, which the thread that opens a shard must therefore not hold while it waits."""
    path = root / "d" / "train_0.h5"

    def collect(number: int, method: str, place: str) -> None:
        if place.endswith(path.name):
            leave_garbage(h5py.File(path))
            gc.collect()

    with serving(of_folder(root), collect) as server:
        gc.disable()
        try:
            assert opened(server, tmp_path).read(0, 10).tolist() == TOKENS[:10].tolist()
        finally:
            gc.enable()


def leave_garbage(held: h5py.File) -> None:
    """Leave a reference cycle that only the garbage collector can free."""
    cycle: list[Any] = [held]
    cycle.append(cycle)


def test_missing_files_are_named(server: FaultyServer, root: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"no shards at {server.address}/none .index.json"):
        TokenStream(f"{server.address}/none", cache=CacheOptions(str(tmp_path)))
    shutil.copytree(root, tmp_path / "root")
    (tmp_path / "root" / "d" / "train_1.h5").unlink()
    with serving(of_folder(tmp_path / "root")) as partial, pytest.raises(DataError, match="d/train_1.h5: it is missing"):
        opened(partial, tmp_path).check()


def test_contents_that_changed_before_the_run_are_found_by_verify(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root, tmp_path / "root")
    shard = tmp_path / "root" / "d" / "train_0.h5"
    good = shard.read_bytes()
    shard.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with serving(of_folder(tmp_path / "root")) as server, pytest.raises(DataError, match="its bytes changed"):
        opened(server, tmp_path).check(contents=True)
    assert not list((tmp_path / "cache" / "blocks").glob("*/*"))


def test_tools_take_addresses(server: FaultyServer, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mpidp.storage.remote.default_folder", lambda: tmp_path / "cache")
    with pytest.raises(DataError, match="tokenizer"):  # the tokenizer of make_stream is empty
        inspect.describe(f"{server.address}/d")
    with pytest.raises(DataError, match="tokenizer"):
        verify.verify(f"{server.address}/d")


def test_fsspec_filesystems(root: Path, tmp_path: Path) -> None:
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    memory.put(str(root / "d"), "/held/d", recursive=True)
    far = TokenStream("memory://held/d", cache=CacheOptions(str(tmp_path / "cache")))
    assert np.array_equal(far.read(290_000, 20_000), TOKENS[290_000:310_000])
    memory.put(str(root / "d" / "train_1.h5"), "/held/d/train_0.h5")
    with pytest.raises(DataError, match="it was replaced on the server"):
        far.read(200_000, 10)
    near = TokenStream(f"file://{root}/d", cache=CacheOptions(str(tmp_path / "cache")))
    assert np.array_equal(near.read(290_000, 20_000), TOKENS[290_000:310_000])
    with pytest.raises(DataError, match="no shards at memory://held/none"):
        TokenStream("memory://held/none", cache=CacheOptions(str(tmp_path / "cache")))


def test_a_filesystem_must_state_versions(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hugging Face Hub states the id of the content, but no time. Some filesystems state neither."""
    fsspec = pytest.importorskip("fsspec")
    memory, stated = fsspec.filesystem("memory"), {"blob_id": "1"}
    memory.put(str(root / "d"), "/hub/d", recursive=True)
    real = type(memory).info
    monkeypatch.setattr(type(memory), "info", lambda *place, **options: {
        key: value for key, value in real(*place, **options).items() if key != "created"} | stated)
    far = TokenStream("memory://hub/d", cache=CacheOptions(str(tmp_path / "cache")))
    assert np.array_equal(far.read(0, 10), TOKENS[:10])
    stated["blob_id"] = "2"
    with pytest.raises(DataError, match="it was replaced on the server"):
        far.read(250_000, 10)
    del stated["blob_id"]
    with pytest.raises(DataError, match="index.json: the server states no version or time of modification"):
        TokenStream("memory://hub/d", cache=CacheOptions(str(tmp_path / "cache")))


def on_disk(folder: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in (folder / "blocks").rglob("*") if path.is_file())


def test_the_cache_stays_within_its_bound(server: FaultyServer, tmp_path: Path) -> None:
    far = opened(server, tmp_path, gigabytes=0.001)  # four blocks
    random = np.random.default_rng(0)
    for start in random.integers(0, 600_000, 40).tolist():
        assert np.array_equal(far.read(start, 1000), TOKENS[start : start + 1000])
        assert on_disk(tmp_path / "cache") <= 1_000_000
    assert on_disk(tmp_path / "cache") >= 500_000


def test_two_processes_share_a_cache_and_the_smaller_bound_holds(tmp_path: Path) -> None:
    large, small = BlockCache(tmp_path / "c", 4 * 2**20), BlockCache(tmp_path / "c", 2**20)
    for number in range(12):
        large.write("a", {number: os.urandom(BLOCK)})
    assert on_disk(tmp_path / "c") == 12 * 2**18
    small.write("b", {0: b"x" * BLOCK})
    assert on_disk(tmp_path / "c") <= 2**20 and small.read("b", 0, BLOCK, 0, 1) == b"x"
    assert large.read("b", 0, BLOCK, BLOCK - 1, BLOCK) == b"x" and large.read("a", 0, BLOCK, 0, 1) is None


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "longer"])
def test_a_block_that_is_not_whole_is_fetched_again(tmp_path: Path, damage: str) -> None:
    BlockCache(tmp_path / "c", 2**20).write("a", {0: bytes(1000)})
    path = tmp_path / "c" / "blocks" / "a" / "0"
    content = path.read_bytes()
    path.write_bytes({"cut": content[:500], "flip": b"x" + content[1:], "empty": b"", "longer": content + b"x"}[damage])
    assert BlockCache(tmp_path / "c", 2**20).read("a", 0, 1000, 0, 10) is None and not path.exists()


def test_what_a_killed_process_left_is_deleted(tmp_path: Path) -> None:
    BlockCache(tmp_path / "c", 2**20).write("a", {0: bytes(1000)})
    left = tmp_path / "c" / "blocks" / "a" / ".1.abc.tmp"
    left.write_bytes(bytes(2**19))
    (tmp_path / "c" / "used").write_text("999999999")
    found = BlockCache(tmp_path / "c", 2**20)
    found.write("a", {2: bytes(1000)})
    assert not left.exists() and found.read("a", 0, 1000, 0, 1) == found.read("a", 2, 1000, 0, 1) == b"\0"


def test_a_full_disk_and_a_foreign_folder_are_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(DataError, match="link.*data.cache_dir"):
        BlockCache(tmp_path / "link", 2**20)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="data.cache_dir"):
        BlockCache(tmp_path / "file", 2**20)
    full = BlockCache(tmp_path / "c", 2**20)
    monkeypatch.setattr(cache.os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(DataError, match="No space left on device.*data.cache_gb"):
        full.write("a", {0: b"x"})


def test_groups_are_consecutive_and_bounded() -> None:
    assert list(_groups([1, 2, 3, 7, 9, 10])) == [range(1, 4), range(7, 8), range(9, 11)]
    assert [len(group) for group in _groups(list(range(40)))] == [16, 16, 8]


@pytest.mark.parametrize("address", [
    "s3:/HUSH:HUSH@bucket/p", "http:/HUSH:HUSH@host/p", " s3://HUSH:HUSH@bucket", "'s3://HUSH:HUSH@bucket'", "s3:HUSH:HUSH@b/p",
    "simplecache::s3://HUSH:HUSH@bucket/p", "s3://HUSH:HUSH@bucket/p", "s3://HUSH:HU/SH@bucket/p", "http://HUSH:HUSH@host/p", "https://HUSH@host/p",
    "https://host/p?X-Amz-Signature=HUSH", "https://host/p#HUSH", "S3://HUSH:HUSH@bucket", "https://host/p;sig=HUSH/d",
    "https://host/p?a=1;sig=HUSH,HUSH)HUSH", "s3:/bucket/p;sig=HUSH", "s3:bucket?sig=HUSH", "az://c/p;sig=HUSH",
    "https://host/p?a='HUSH' HUSH",
])
def test_credentials_in_addresses_are_refused_and_not_shown(address: str, tmp_path: Path) -> None:
    settings = [partial(from_args, [f"--{name}={address}"]) for name in ("data.path", "run.mirror")]
    for act in (*settings, lambda: TokenStream(address)):
        with pytest.raises(UsageError, match="must not contain|is not an address") as caught:
            act()
        assert "HU" not in str(caught.value) and "SH@" not in str(caught.value)


def test_names_with_spaces_and_letters_of_other_languages(root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "root/my shards/ä+b"
    shutil.copytree(root / "d", folder)
    with serving(of_folder(tmp_path / "root")) as server:
        for name in ("my shards/ä+b", "my%20shards/%C3%A4+b/"):
            stream = TokenStream(f"{server.address}/{name}", cache=CacheOptions(str(tmp_path / "cache"), 0.1, 5.0))
            assert np.array_equal(stream.read(0, 100), TokenStream(folder).read(0, 100))
        assert not [path for _, path, _ in server.requests if "//" in path]  # an object store would not find such a name


def test_messages_of_libraries_show_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "abcdefghij")
    text = "cannot reach https://me:pass@host/x?sig=1&k=2, signed with abcdefghij"
    assert without_secrets(text) == "cannot reach https://***@host/x?***, signed with ***"
    for mark in ("?", "#", ";", "?a=1;", "?a=b,", ";a)"):
        for end in ("", "; try again", ", try again", "'", "' (b)"):
            shown = without_secrets(f"cannot open https://host/p{mark}sig=HUSH{end}")
            assert shown == f"cannot open https://host/p?***{end}"
    shortened = "URL scheme should be http or https [input_value='ftp://me:password...k.example.com:8080', input_type=str]"
    assert without_secrets(shortened) == shortened.replace("me:password", "***")
    plain = "https://host/p; https://host/q, (s3://bucket/p), 'az://a/b'; why: a/b?"
    assert without_secrets(plain) == plain


def test_what_is_an_address() -> None:
    assert [is_remote(path) for path in ("s3://b/p", "HTTPS://h", "memory://x", "/a", "a", "s3:/b", "./s3://b")] == [
        True, True, True, False, False, False, False]
    assert not list(address_problems("data.path", "./s3:p"))
    for path, says in [("http://h:x/p", "port is not valid"), ("http://[::1/p", "port is not valid"),
                       ("http://h:99999/p", "port is not valid"),
                       ("s3:///p", "needs a bucket"), ("http:///p", "needs a host"), ("s3:/b/p", "two slashes"),
                       ("nosuch://b/p", "not a known protocol")]:
        with pytest.raises(MpidpError, match=says):
            TokenStream(path)
