"""Laws of the sampler: every window once per epoch, a pure function of its arguments, well mixed, with long reads."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mpidp.data import sampler as module
from mpidp.data.lanes import Lanes
from mpidp.data.permutation import keys_of, permute, unpermute
from mpidp.data.sampler import Sampler
from mpidp.errors import DataError


def of_epoch(sampler: Sampler, epoch: int) -> list[list[np.ndarray]]:
    """Return the windows of each micro-batch of each batch of an epoch."""
    first = epoch * sampler.steps_per_epoch
    return [[sampler.windows(batch, v) for v in range(sampler.lanes.num_micro_batches)]
            for batch in range(first, first + sampler.steps_per_epoch)]


def flat(batches: list[list[np.ndarray]]) -> np.ndarray:
    return np.concatenate([windows for batch in batches for windows in batch])


@st.composite
def samplers(draw: st.DrawFn) -> Sampler:
    """Draw small corpora with small blocks (token_bytes gives blocks of 1 to 50 windows), so that every edge case occurs."""
    global_batch = draw(st.integers(1, 24))
    micro_batch = draw(st.integers(1, global_batch))
    lanes = Lanes(global_batch, micro_batch, draw(st.integers(1, -(-global_batch // micro_batch))))
    seq_len, block = draw(st.integers(1, 9)), draw(st.integers(1, 50))
    num_tokens = draw(st.integers(seq_len + 1, 2500))
    token_bytes = max(1, module.BLOCK_BYTES // (block * seq_len))
    return Sampler(num_tokens, seq_len, lanes, draw(st.integers(0, 2**70)), draw(st.sampled_from(module.ORDERS)), token_bytes)


@settings(max_examples=150, deadline=None)
@given(samplers(), st.integers(0, 3))
def test_every_window_once_an_epoch(sampler: Sampler, epoch: int) -> None:
    batches = of_epoch(sampler, epoch)
    assert sorted(flat(batches)) == list(range(sampler.num_windows))
    sizes = [sum(map(len, batch)) for batch in batches]
    assert sizes[:-1] == [sampler.lanes.global_batch] * (len(sizes) - 1) and 1 <= sizes[-1] <= sampler.lanes.global_batch
    first = epoch * sampler.steps_per_epoch
    assert sizes == [sampler.batch_sequences(first + i) for i in range(len(sizes))]
    for v, windows in enumerate(batches[0] if len(batches) > 1 else []):
        assert len(windows) == len(sampler.lanes.sequences(v)) and windows.dtype == np.int64


@settings(max_examples=60, deadline=None)
@given(samplers(), st.integers(0, 2), st.randoms(use_true_random=False))
def test_windows_depend_on_nothing_but_the_arguments(sampler: Sampler, epoch: int, random) -> None:
    expected = of_epoch(sampler, epoch)
    for cached in (keys_of, module._blocks_of, module._slot_of):
        cached.cache_clear()
    calls = [(batch, v) for batch in range(len(expected)) for v in range(len(expected[0]))]
    random.shuffle(calls)
    for batch, v in calls[:20]:
        found = sampler.windows(epoch * sampler.steps_per_epoch + batch, v)
        np.testing.assert_array_equal(found, expected[batch][v])


@settings(max_examples=60, deadline=None)
@given(samplers(), st.integers(0, 1))
def test_a_lane_reads_its_own_part_in_pools_fetched_once(sampler: Sampler, epoch: int) -> None:
    fetched: dict[module.Pool, set[int]] = {}
    for step in range(sampler.steps_per_epoch):
        batch = epoch * sampler.steps_per_epoch + step
        for lane in range(sampler.lanes.num_lanes):
            for v in sampler.lanes.micro_batches(lane):
                windows, pools = sampler.windows(batch, v), sampler.pools(batch, v)
                for pool in pools:
                    if pool not in fetched:
                        fetched[pool] = {w for first, n in sampler.blocks(pool) for w in range(first, first + n)}
                assert set(windows) <= set().union(*(fetched[pool] for pool in pools))
                assert not len(windows) or bool(pools)
                if sampler.order == "shuffled":
                    assert set(windows) <= set(sampler.part(lane))
    assert sum(map(len, fetched.values())) == sampler.num_windows  # nothing is read twice or unnecessarily
    if sampler.order == "shuffled":
        follow = {sampler.following(pool) for pool in fetched} - {None}
        assert follow <= set(fetched) and all(pool in follow for pool in fetched if pool.number > 0)


def test_sequential_order_is_the_order_of_the_stream() -> None:
    sampler = Sampler(1003, 10, Lanes(8, 3), seed=5, order="sequential")
    assert list(flat(of_epoch(sampler, 0))) == list(range(100))
    assert list(flat(of_epoch(sampler, 7))) == list(range(100))


def test_the_order_is_pinned() -> None:
    """Changing these numbers breaks the resume of existing runs."""
    sampler = Sampler(100_001, 10, Lanes(8, 2, 2), seed=1, token_bytes=2**10)
    assert sampler.windows(0, 0).tolist() == [3371, 3997]
    assert sampler.windows(9_999, 3).tolist() == [6982, 8555]


@pytest.mark.parametrize("windows", [300, 5_000, 60_000])
def test_shuffled_order_mixes(windows: int) -> None:
    """Neighbours in the corpus rarely follow each other, epochs and seeds differ, and early windows also occur late."""
    lanes = Lanes(32, 32, 1)
    sampler = Sampler(windows * 64 + 1, 64, lanes, seed=3)
    order = flat(of_epoch(sampler, 0))
    assert np.count_nonzero(np.diff(order) == 1) < 12  # one is expected
    assert np.count_nonzero(order == flat(of_epoch(sampler, 1))) < 12
    assert np.count_nonzero(order == flat(of_epoch(Sampler(windows * 64 + 1, 64, lanes, seed=4), 0))) < 12
    assert abs(np.corrcoef(order, np.arange(windows))[0, 1]) < 0.5  # with 60,000 windows: eight blocks, one pool


def test_blocks_of_a_large_corpus_are_permuted() -> None:
    sampler = Sampler(10**9, 1024, Lanes(1, 1), seed=0)
    pools = {pool: sampler.blocks(pool) for batch in range(0, 40_000, 1000) for pool in sampler.pools(batch, 0)}
    firsts = np.array([first for blocks in pools.values() for first, _ in blocks]) // sampler.block_windows
    assert len(set(firsts)) == len(firsts) == module.POOL_BLOCKS * len(pools)
    assert np.count_nonzero(np.diff(firsts) == 1) < 5 and firsts.max() - firsts.min() > 1500


def test_a_corpus_of_a_hundred_billion_tokens_starts_at_once() -> None:
    sampler = Sampler(10**14, 2048, Lanes(512, 4), seed=0)
    last = sampler.steps_per_epoch - 1
    for batch in (0, last // 2, last, last + 1):
        for v in (0, 127):
            assert all(0 <= w < sampler.num_windows for w in sampler.windows(batch, v))


@given(st.integers(1, 5000), st.integers())
@settings(max_examples=60, deadline=None)
def test_permutations_are_permutations(n: int, key: int) -> None:
    keys, x = keys_of(key), np.arange(n, dtype=np.uint64)
    y = permute(x, n, keys)
    assert sorted(y) == list(range(n))
    np.testing.assert_array_equal(unpermute(y, n, keys), x)


@pytest.mark.parametrize("n", [2, 3, 5, 7])
def test_small_permutations_are_about_uniform(n: int) -> None:
    where = np.array([permute(np.zeros(1, dtype=np.uint64), n, keys_of(i))[0] for i in range(3000)])
    share = np.bincount(where.astype(int), minlength=n) / 3000
    assert share.min() > 0.8 / n and share.max() < 1.2 / n


@pytest.mark.parametrize("num_tokens", [0, 1, 8])
def test_a_stream_without_a_window_is_refused(num_tokens: int) -> None:
    with pytest.raises(DataError, match="smaller seq_len"):
        Sampler(num_tokens, 8, Lanes(1, 1), seed=0)


@given(st.integers(1, 200), st.integers(1, 200), st.data())
@settings(deadline=None)
def test_lane_of_a_micro_batch(global_batch: int, micro_batch: int, data: st.DataObject) -> None:
    assume(micro_batch <= global_batch)
    lanes = Lanes(global_batch, micro_batch, data.draw(st.integers(1, -(-global_batch // micro_batch))))
    for lane in range(lanes.num_lanes):
        assert all(lanes.lane_of(v) == lane for v in lanes.micro_batches(lane))
