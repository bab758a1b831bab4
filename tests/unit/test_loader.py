"""Laws of the loader: the sampler's windows, with targets shifted by one; a state of one integer; invalid ids are reported; long
reads, each once; the same bits for expected and unexpected micro-batches, from any thread."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mpidp.data import sampler as sampler_module
from mpidp.data.index import FileRecord, Index, SplitRecord
from mpidp.data.lanes import Lanes
from mpidp.data.loader import Batch, Loader, MicroBatch, _Resident
from mpidp.data.sampler import Sampler
from mpidp.data.shard_writer import write_shard
from mpidp.data.shards import TokenStream
from mpidp.errors import DataError

CPU = torch.device("cpu")


def make_stream(folder: Path, tokens: np.ndarray, cuts: list[int], vocab_size: int = 300, mask: bool = False) -> TokenStream:
    """A training split of these tokens, divided at these positions; a loss mask excludes odd tokens."""
    folder.mkdir(exist_ok=True)
    records = []
    for i, piece in enumerate(np.split(tokens, cuts)):
        attributes: dict[str, Any] = {"split": "train", "vocab_size": vocab_size, "tokenizer_sha256": "ab"}
        masks = [(piece % 2 == 0).astype(np.uint8)] if mask else None
        said = write_shard(folder / f"train_{i}.h5", [piece], len(piece), np.array([0]), attributes, masks)
        records.append(FileRecord(f"train_{i}.h5", "train", len(piece), 1, 0, *said))
    split = SplitRecord(len(tokens), len(records), 0, mask)
    index = Index(vocab_size, 0, "byte", "ab", {"train": split}, records, {})
    (folder / "index.json").write_text(index.to_json())
    return TokenStream(folder)


def random_tokens(n: int, vocab_size: int = 300) -> np.ndarray:
    return np.random.default_rng(n).integers(0, vocab_size, n)


def take(loader: Loader, n: int) -> list[Batch]:
    batches = [next(loader) for _ in range(n)]
    loader.close()
    return batches


@pytest.mark.parametrize("order", sampler_module.ORDERS)
@pytest.mark.parametrize("vocab_size", [300, 100_000])
def test_micro_batches_are_the_samplers_windows(tmp_path: Path, order: str, vocab_size: int) -> None:
    tokens = random_tokens(1000, vocab_size)
    stream = make_stream(tmp_path, tokens, [100, 101, 600], vocab_size)
    sampler = Sampler(1000, 9, Lanes(16, 3), seed=1, order=order, token_bytes=stream.token_bytes)
    batches = take(Loader(stream, sampler, [1, 2, 5], CPU), 2 * sampler.steps_per_epoch + 1)
    for number, batch in enumerate(batches):
        assert (batch.batch, batch.epoch) == (number, number // sampler.steps_per_epoch)
        assert list(batch.micro_batches) == [m.v for m in batch.micro_batches.values()] == [1, 2, 5]
        for m in batch.micro_batches.values():
            windows = sampler.windows(number, m.v)
            block = np.stack([tokens[w * 9 : w * 9 + 10] for w in windows]) if len(windows) else np.empty((0, 10))
            assert m.tokens.dtype == m.targets.dtype == torch.int64
            assert m.tokens.shape == m.targets.shape == (len(windows), 9) and m.num_tokens == 9 * len(windows)
            assert m.tokens.is_contiguous() and m.targets.is_contiguous() and m.positions is None
            np.testing.assert_array_equal(m.tokens.numpy(), block[:, :-1])
            np.testing.assert_array_equal(m.targets.numpy(), block[:, 1:])
    assert any(m.num_tokens == 0 for b in batches for m in b.micro_batches.values())  # 111 windows: the last batch is short


def test_the_loss_mask_takes_targets_out(tmp_path: Path) -> None:
    tokens = random_tokens(500)
    stream = make_stream(tmp_path, tokens, [77], mask=True)
    sampler = Sampler(500, 10, Lanes(4, 4), seed=1)
    for batch in take(Loader(stream, sampler, [0], CPU), sampler.steps_per_epoch):
        m = batch[0]
        expected = np.stack([tokens[w * 10 + 1 : w * 10 + 11] for w in sampler.windows(batch.batch, 0)])
        np.testing.assert_array_equal(m.targets.numpy(), np.where(expected % 2 == 0, expected, -100))
        assert m.num_tokens == int((m.targets != -100).sum()) < m.targets.numel()


def test_the_state_is_one_integer(tmp_path: Path) -> None:
    stream = make_stream(tmp_path, random_tokens(1000), [500])
    sampler = Sampler(1000, 10, Lanes(8, 2), seed=1)
    straight = take(Loader(stream, sampler, [0, 3], CPU), 30)
    first = Loader(stream, sampler, [0, 3], CPU, prefetch=5)
    take(first, 11)
    assert first.next_batch == 11  # prefetched batches do not count
    again = take(Loader(stream, sampler, [0, 3], CPU, start_batch=first.next_batch, prefetch=1), 19)
    for a, b in zip(straight[11:], again, strict=True):
        assert a.batch == b.batch and a.epoch == b.epoch
        assert all(torch.equal(a[v].tokens, b[v].tokens) for v in (0, 3))


def test_the_order_does_not_depend_on_the_shards(tmp_path: Path) -> None:
    tokens = random_tokens(3000)
    sampler = Sampler(3000, 10, Lanes(8, 2), seed=1)
    streams = [make_stream(tmp_path / str(len(cuts)), tokens, cuts) for cuts in ([], [1], [7, 1000, 2999])]
    runs = [take(Loader(stream, sampler, range(4), CPU), 40) for stream in streams]
    for batches in zip(*runs, strict=True):
        first = torch.cat([batches[0][v].tokens for v in range(4)])
        assert all(torch.equal(torch.cat([other[v].tokens for v in range(4)]), first) for other in batches[1:])


@pytest.mark.parametrize("order", sampler_module.ORDERS)
@pytest.mark.parametrize("ranks", [1, 3])
def test_bytes_are_fetched_once_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: str, ranks: int) -> None:
    """Over an epoch, counted in blocks, at most 1.1 times the bytes used are read. Blocks of 3 KiB replace those of 1 MiB."""
    monkeypatch.setattr(sampler_module, "BLOCK_BYTES", 3 * 2**10)
    tokens = random_tokens(100_001)
    make_stream(tmp_path, tokens, [50_000])
    lanes = Lanes(24, 2, 6)
    sampler = Sampler(len(tokens), 16, lanes, seed=1, order=order)
    assert sampler.block_windows == 96 or order == "sequential"
    fetched = 0
    for rank in range(ranks):
        stream = TokenStream(tmp_path)
        mine = [v for lane in lanes.of_rank(rank, ranks) for v in lanes.micro_batches(lane)]
        loader = Loader(stream, sampler, mine, CPU, prefetch=1)
        for _ in range(sampler.steps_per_epoch - 3):  # not to the end: the thread reads ahead into the next epoch
            next(loader)
        loader.close()
        fetched += stream.bytes_fetched
    consumed = sampler.num_windows * 16 * 2
    assert 0.9 * consumed < fetched <= 1.1 * consumed


def test_an_id_outside_the_vocabulary_is_named(tmp_path: Path) -> None:
    tokens = random_tokens(1000)
    tokens[700] = 300
    stream = make_stream(tmp_path, tokens, [600])
    loader = Loader(stream, Sampler(1000, 10, Lanes(4, 4), seed=1), [0], CPU)
    with pytest.raises(DataError, match=r"train_1.h5: token 100 is 300, not below vocab_size 300.*verify"):
        take(loader, 30)
    assert not loader._thread.is_alive()
    with pytest.raises(DataError, match="token 100"):
        next(loader)


def test_an_error_of_the_thread_is_raised_by_next(tmp_path: Path) -> None:
    stream = make_stream(tmp_path, random_tokens(1000), [600])
    (tmp_path / "train_1.h5").unlink()
    with pytest.raises(DataError, match="train_1.h5.*missing"):
        take(Loader(stream, Sampler(1000, 10, Lanes(4, 4), seed=1), [0], CPU), 30)


def test_closing_ends_the_thread(tmp_path: Path) -> None:
    stream = make_stream(tmp_path, random_tokens(1000), [])
    before = threading.active_count()
    for taken in (0, 1, 5):
        loader = Loader(stream, Sampler(1000, 10, Lanes(4, 4), seed=1), [0], CPU, prefetch=1)
        take(loader, taken)
        loader.close()
    assert threading.active_count() == before
    with pytest.raises(ValueError, match="closed"):
        next(loader)


def test_a_rank_without_micro_batches_gets_empty_batches(tmp_path: Path) -> None:
    stream = make_stream(tmp_path, random_tokens(100), [])
    batches = take(Loader(stream, Sampler(100, 10, Lanes(4, 4), seed=1), [], CPU), 3)
    assert [b.micro_batches for b in batches] == [{}, {}, {}]


@pytest.mark.parametrize("vocab_size", [65536, 100_000])
def test_resident_tokens_are_the_same(tmp_path: Path, vocab_size: int) -> None:
    """The part that runs on the device, here on the CPU: bit patterns above 2^15 and a range in the middle of the stream."""
    tokens = random_tokens(1000, vocab_size)
    stream = make_stream(tmp_path, tokens, [300], vocab_size)
    resident = _Resident(stream, 9, range(20, 90), CPU)
    windows = torch.tensor([20, 89, 55])
    inputs, targets = resident.gather(windows)
    expected = np.stack([tokens[w * 9 : w * 9 + 10] for w in windows.tolist()])
    np.testing.assert_array_equal(inputs.numpy(), expected[:, :-1])
    np.testing.assert_array_equal(targets.numpy(), expected[:, 1:])
    assert inputs.dtype == targets.dtype == torch.int64 and inputs.is_contiguous() and targets.is_contiguous()
    assert resident.gather(torch.empty(0, dtype=torch.int64))[0].shape == (0, 9)


def test_resident_tokens_are_checked(tmp_path: Path) -> None:
    tokens = random_tokens(1000)
    tokens[700] = 300
    with pytest.raises(DataError, match="train_1.h5: token 100 is 300"):
        _Resident(make_stream(tmp_path, tokens, [600]), 10, range(50, 80), CPU)


def test_resident_has_no_effect_on_the_cpu_and_bad_words_are_refused(tmp_path: Path) -> None:
    stream = make_stream(tmp_path, random_tokens(100), [])
    sampler = Sampler(100, 10, Lanes(4, 4), seed=1)
    assert take(Loader(stream, sampler, [0], CPU, resident="true"), 1)[0][0].num_tokens == 40
    with pytest.raises(ValueError, match="must be 'auto', 'true' or 'false'"):
        Loader(stream, sampler, [0], CPU, resident="yes")


def test_the_extent_holds_all_windows_of_a_rank() -> None:
    lanes = Lanes(24, 2, 6)
    for order in sampler_module.ORDERS:
        sampler = Sampler(10_000, 7, lanes, seed=1, order=order)
        for rank in range(4):
            mine = [v for lane in lanes.of_rank(rank, 4) for v in lanes.micro_batches(lane)]
            extent = sampler.extent(mine)
            seen = np.concatenate([sampler.windows(b, v) for b in range(2 * sampler.steps_per_epoch) for v in mine])
            assert all(w in extent for w in seen)
            assert order == "sequential" or (min(seen), max(seen) + 1) == (extent.start, extent.stop)


def equal(a: MicroBatch, b: MicroBatch) -> bool:
    return (a.v, a.num_tokens) == (b.v, b.num_tokens) and torch.equal(a.tokens, b.tokens) and torch.equal(a.targets, b.targets)


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("order", sampler_module.ORDERS)
def test_micro_batches_on_demand_are_those_read_ahead(tmp_path: Path, order: str, mask: bool) -> None:
    stream = make_stream(tmp_path, random_tokens(700), [100, 101, 600], mask=mask)
    sampler = Sampler(700, 9, Lanes(16, 3), seed=1, order=order)
    number = sampler.steps_per_epoch + 2
    expected = take(Loader(stream, sampler, range(6), CPU), number)
    for mine in ([], [4], [1, 2]):
        loader = Loader(TokenStream(tmp_path), sampler, mine, CPU)
        for ahead in expected:
            batch = next(loader)
            assert list(batch.micro_batches) == mine
            for v in (5, 0, 1, 3, 4, 2):  # any order
                assert equal(batch[v], ahead[v]) and batch[v] is batch[v]
        loader.close()
    assert any(batch[5].num_tokens == 0 for batch in expected)


def test_expected_micro_batches_change_and_nothing_is_lost(tmp_path: Path) -> None:
    stream = make_stream(tmp_path, random_tokens(1000), [300])
    sampler = Sampler(1000, 9, Lanes(8, 2), seed=1)
    expected = take(Loader(stream, sampler, range(4), CPU), 12)
    loader = Loader(stream, sampler, [0, 1], CPU, prefetch=2)
    for number, ahead in enumerate(expected):
        if number == 3:
            loader.expect([1, 2])
        batch = next(loader)
        known = list(batch.micro_batches)
        assert known == [0, 1] if number < 3 else known in ([0, 1], [1, 2])
        assert known == [1, 2] or number < 3 + 2 + 1  # in the queue, and held by the thread
        assert all(equal(batch[v], ahead[v]) for v in range(4))
    loader.close()


def test_many_threads_read_the_same_bits(tmp_path: Path) -> None:
    """While the loader's own thread opens the same files."""
    make_stream(tmp_path, random_tokens(6000), list(range(200, 6000, 200)))
    sampler = Sampler(6000, 9, Lanes(64, 4), seed=1)
    expected = take(Loader(TokenStream(tmp_path), sampler, range(16), CPU), 3)
    for _ in range(4):
        stream = TokenStream(tmp_path)
        loader = Loader(stream, sampler, [0, 1], CPU, prefetch=3)
        with ThreadPoolExecutor(8) as pool:
            for ahead in expected:
                batch = next(loader)
                wanted = [v for turn in range(16) for v in (turn, (turn * 7) % 16)]
                found = pool.map(batch.__getitem__, wanted)
                assert all(equal(micro, ahead[v]) for v, micro in zip(wanted, found, strict=True))
        loader.close()
        assert len(stream._mapped) == 30


def test_an_error_on_demand_is_one_of_the_loader(tmp_path: Path) -> None:
    """It is raised at the access, and by next() from then on."""
    tokens = random_tokens(1000)
    tokens[700] = 300
    stream = make_stream(tmp_path, tokens, [600])
    loader = Loader(stream, Sampler(1000, 10, Lanes(4, 1), seed=1), [0], CPU)  # lane 2 of 4 reads token 700
    with pytest.raises(DataError, match=r"train_1.h5: token 100 is 300"):  # noqa: PT012
        for _ in range(30):
            next(loader)[2]
    assert not loader._thread.is_alive()
    with pytest.raises(DataError, match="token 100"):
        next(loader)


def test_a_micro_batch_that_is_not_there(tmp_path: Path) -> None:
    (batch,) = take(Loader(make_stream(tmp_path, random_tokens(100), []), Sampler(100, 10, Lanes(4, 2), seed=1), [0], CPU), 1)
    for v in (-1, 2):
        with pytest.raises(IndexError, match=f"micro-batch {v} is not in 0..1"):
            batch[v]
    assert [micro.v for micro in batch] == [0, 1]


def test_what_is_not_resident_is_read_from_the_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The part that runs on the device, here on the CPU: lanes 1 and 2 are resident, others change hands."""
    stream = make_stream(tmp_path, random_tokens(1000), [300])
    sampler = Sampler(1000, 9, Lanes(8, 2), seed=1)
    expected = take(Loader(stream, sampler, range(4), CPU), sampler.steps_per_epoch + 1)
    gathered: list[int] = []

    class Counted(_Resident):
        def gather(self, windows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            gathered.append(len(windows))
            return super().gather(windows)

    monkeypatch.setattr(
        _Resident, "make", lambda stream, sampler, mine, device, resident: Counted(stream, 9, sampler.extent(mine), device)
    )
    loader = Loader(stream, sampler, [1, 2], CPU)
    for ahead in expected:
        batch = next(loader)
        assert all(equal(batch[v], ahead[v]) for v in range(4))
        assert batch[1].tokens.is_contiguous() and len(gathered) == 2
        gathered.clear()
    loader.close()
