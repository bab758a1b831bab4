"""Laws of gradient buffers: the flat layout does not depend on the bucket size; .grad are views; full buckets are passed on;
MPI's requirements hold."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mpi4py import MPI

from mpidp.comm.buffers import buf, bufv, datatype, memory
from mpidp.comm.slices import ALIGN, NORM_BLOCK, global_norm, norm_of_squares, slice_bounds, squares_of_blocks, sum_in_order
from mpidp.comm.transport import PIECE_BYTES, Messages, pieces
from mpidp.parallel.grid import whole
from mpidp.reducers.buckets import Bucket, FlatLayout, GradientBuffer
from mpidp.runtime.topology import make_topology

SHAPES = [(3, 5), (64,), (7,), (1, 1), (33, 4), (128, 2)]


def parameters() -> list[tuple[str, torch.nn.Parameter]]:
    generator = torch.Generator().manual_seed(1)
    return [(f"p{i}", torch.nn.Parameter(torch.randn(s, generator=generator))) for i, s in enumerate(SHAPES)]


def backward(named: list[tuple[str, torch.nn.Parameter]]) -> None:
    """Backward of a loss whose gradients are 2 p, in the reverse order of definition."""
    total = torch.zeros(())
    for _, p in named:
        total = total + (p * p).sum()
    total.backward()


@pytest.mark.parametrize("bucket_bytes", [1, 300, 700, 10**9])
def test_the_layout_does_not_depend_on_the_bucket_size(bucket_bytes: int) -> None:
    named = parameters()
    buffer = GradientBuffer(named, 2, bucket_bytes)
    whole = GradientBuffer(named, 1, 10**9)
    assert buffer.num_elements == whole.num_elements and buffer.num_elements % NORM_BLOCK == 0
    where = {n: (o, s) for b in buffer.buckets for n, o, s in zip(b.names, b.offsets, b.shapes, strict=True)}
    assert where == {n: (o, s) for b in whole.buckets for n, o, s in zip(b.names, b.offsets, b.shapes, strict=True)}
    assert {n: s for n, (_, s) in where.items()} == {n: p.shape for n, p in named}
    assert all(offset % ALIGN == 0 for offset, _ in where.values())
    ends = sorted((o, o + s.numel()) for o, s in where.values())
    assert all(stop <= start for (_, stop), (start, _) in zip(ends, ends[1:], strict=False))
    edges = [(b.start, b.stop) for b in buffer.buckets]
    assert edges[0][0] == 0 and edges[-1][1] == buffer.num_elements
    assert all(stop == start for (_, stop), (start, _) in zip(edges, edges[1:], strict=False))
    assert all((stop - start) * 4 >= bucket_bytes for start, stop in edges[:-1])
    if bucket_bytes == 1:
        assert len(edges) == len(SHAPES)
    if bucket_bytes == 10**9:
        assert len(edges) == 1


def test_gradients_are_views_of_the_slot_pointed_at() -> None:
    named = parameters()
    buffer = GradientBuffer(named, 3, 300)
    for slot, times in ((1, 2), (0, 1)):
        buffer.point(slot)
        for _ in range(times):
            backward(named)
    for slot, times in enumerate((1, 2, 0)):
        for bucket in buffer.buckets:
            for name, shape, offset in zip(bucket.names, bucket.shapes, bucket.offsets, strict=True):
                view = buffer.flat[slot, offset : offset + shape.numel()].view(shape)
                torch.testing.assert_close(view, 2 * times * dict(named)[name].detach())
    inside = sum(p.numel() for _, p in named)
    assert int((buffer.flat[0] != 0).sum()) <= inside  # padding between parameters stays zero
    buffer.point(0)
    assert all(p.grad is not None and p.grad.untyped_storage().data_ptr() == buffer.flat.data_ptr() for _, p in named)


def test_parameters_become_views_and_keep_their_values() -> None:
    named = parameters()
    before = {name: p.detach().clone() for name, p in named}
    layout = FlatLayout(named)
    flat = torch.full((layout.num_elements,), 7.0)
    layout.adopt(flat)
    for (offset, name, p), view in zip(layout.placed(), layout.views(flat), strict=True):
        assert torch.equal(p, before[name]) and p.data_ptr() == view.data_ptr() == flat[offset:].data_ptr()
    flat.fill_(2.0)
    assert all(bool((p == 2.0).all()) for _, p in named)


@pytest.mark.parametrize("me", [0, 1, 2])
def test_ranks_that_share_memory_see_each_others_slots(me: int) -> None:
    slots = [2, 1, 3]  # ranks may have different numbers
    named = parameters()
    asked: list[int] = []

    def memory(elements: int) -> list[torch.Tensor]:
        asked.append(elements)
        return [torch.zeros(n * elements // slots[me]) for n in slots]

    buffer = GradientBuffer(named, slots[me], 300, memory, me)
    assert asked == [slots[me] * buffer.num_elements]
    assert [part.shape for part in buffer.parts] == [(n, buffer.num_elements) for n in slots]
    assert buffer.flat.data_ptr() == buffer.parts[me].data_ptr()
    assert buffer.total.data_ptr() == buffer.parts[0][0].data_ptr(), "the sum lies with the first"
    buffer.point(slots[me] - 1)
    backward(named)
    assert all(bool(part.any()) == (rank == me) for rank, part in enumerate(buffer.parts))


def test_a_bucket_is_begun_once_when_its_last_gradient_is_in() -> None:
    named = parameters()
    buffer = GradientBuffer(named, 1, 300)
    buffer.point(0)
    begun = []

    def begin(bucket: Bucket) -> None:
        flat = buffer.flat[0, bucket.start : bucket.stop]
        assert sum(int((flat[o - bucket.start : o - bucket.start + s.numel()] == 0).sum())
                   for o, s in zip(bucket.offsets, bucket.shapes, strict=True)) == 0
        begun.append(bucket.index)

    buffer.on_full(begin)
    backward(named)
    assert begun == []  # it is not the last backward of the step
    for _ in range(2):
        begun.clear()
        buffer.expect(True)
        backward(named)
        assert sorted(begun) == [bucket.index for bucket in buffer.buckets]
        backward(named)
        assert len(begun) == len(buffer.buckets)
    buffer.expect(True)
    buffer.expect(False)
    backward(named)
    assert len(begun) == len(buffer.buckets)


@pytest.mark.parametrize("unused", range(len(SHAPES)))
def test_a_parameter_without_a_gradient_does_not_affect_the_next_step(unused: int) -> None:
    """In the next step, each bucket is begun only after all of its gradients are in."""
    named = parameters()
    buffer, full = GradientBuffer(named, 1, 10**9), []
    buffer.point(0)
    buffer.on_full(lambda bucket: full.append(all(bool((view[0] != 0).all()) for view in buffer.views)))
    buffer.expect(True)
    backward([one for i, one in enumerate(named) if i != unused])
    assert full == []
    buffer.flat.zero_()
    buffer.expect(True)
    backward(named)
    assert full == [True]


@given(st.integers(0, 5000), st.integers(1, 40), st.sampled_from([ALIGN, 256]))
def test_slices_are_cut_at_multiples(length: int, size: int, multiple: int) -> None:
    bounds = slice_bounds(length, size, multiple)
    assert len(bounds) == size + 1 and bounds[0] == 0 and bounds[-1] == length
    assert bounds == sorted(bounds) and all(b % multiple == 0 or b == length for b in bounds)
    lengths = [b - a for a, b in pairwise(bounds)]
    assert max(lengths) - min(lengths) <= 2 * multiple


def test_squares_of_blocks_are_the_same_bits_whichever_are_computed_together() -> None:
    flat = torch.randn(5 * NORM_BLOCK, generator=torch.Generator().manual_seed(1))
    together = squares_of_blocks(flat)
    assert together.dtype == torch.float64 and together.shape == (5,)
    torch.testing.assert_close(together, flat.double().view(5, -1).square().sum(1), rtol=1e-6, atol=0.0)
    for cuts in ([0, 1, 5], [0, 2, 3, 5], [0, 1, 2, 3, 4, 5]):
        parts = [squares_of_blocks(flat[a * NORM_BLOCK : b * NORM_BLOCK]) for a, b in pairwise(cuts)]
        assert torch.equal(torch.cat(parts), together)


@given(st.lists(st.integers(0, 9)), st.integers(0, 15), st.integers(0, 9), st.integers(1, 2), st.integers(0, 2**32))
def test_the_norm_does_not_depend_on_cuts_alignment_threads_or_zero_blocks(
    cuts: list[int], shift: int, zeros: int, threads: int, seed: int
) -> None:
    """Ranks and pipeline stages compute the squares of different blocks, and stages pad with blocks of zeros."""
    flat = torch.randn(9 * NORM_BLOCK, generator=torch.Generator().manual_seed(seed))
    flat.view(9, -1).mul_(10.0 ** -torch.arange(9).view(-1, 1))  # parameters of different sizes
    wanted, norm = squares_of_blocks(flat), global_norm(flat)
    moved = torch.empty(flat.numel() + 16)[shift : shift + flat.numel()].copy_(flat)  # at another address modulo 64 bytes
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        parts = [squares_of_blocks(moved[a * NORM_BLOCK : b * NORM_BLOCK]) for a, b in pairwise(sorted({0, 9, *cuts}))]
    finally:
        torch.set_num_threads(before)
    found = torch.cat(parts)
    assert torch.equal(found, wanted)
    assert norm == norm_of_squares(torch.cat([found[:zeros], torch.zeros(zeros, dtype=torch.float64), found[zeros:]]))
    assert norm == math.sqrt(sum_in_order(found.tolist()))


def test_sums_of_losses_have_the_same_bits_on_every_python() -> None:
    """Python 3.12's sum() gives 1.0 here."""
    assert sum_in_order([1e16, 1.0, -1e16]) == 0.0


def test_the_norm_is_rounded_correctly() -> None:
    squares = 1.400332652719972  # torch.sqrt returns 1.1833565197014686 on some CPUs
    assert norm_of_squares(torch.tensor([squares], dtype=torch.float64)) == 1.1833565197014684
    assert norm_of_squares(torch.tensor([1.0, -2.0], dtype=torch.float64)) == 0.0


def test_a_grid_of_one_rank_and_a_reducer_round_the_norm_alike() -> None:
    grid = whole(make_topology(MPI.COMM_SELF))
    for seed in range(100):
        squares = torch.rand(9, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        assert grid.norm([squares[4:], squares[:4]]) == norm_of_squares(squares)  # later chunks come first in flat order


@given(st.integers(0, 3 * PIECE_BYTES), st.integers(0, 3 * PIECE_BYTES), st.sampled_from([1, 4]))
def test_pieces_cover_a_run(start: int, length: int, element_bytes: int) -> None:
    found = list(pieces(start, start + length, element_bytes))
    assert sum(b - a for a, b in found) == length and all(0 < (b - a) * element_bytes <= PIECE_BYTES for a, b in found)
    assert [a for a, _ in found] == ([start] + [b for _, b in found])[: len(found)]


def test_mpi_gets_the_memory_itself() -> None:
    x = torch.arange(6, dtype=torch.float32)
    view = buf(x[2:5])
    assert view[1] == 3 and bytes(view[0]) == x[2:5].numpy().tobytes()
    x[2] = 17.0
    assert bytes(view[0]) == x[2:5].numpy().tobytes()
    assert bufv(x, [1, 2], [0, 4])[1] == ([1, 2], [0, 4])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_mpi_cannot_add_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match="no portable sum"):
        datatype(torch.zeros(2, dtype=dtype))


@pytest.mark.parametrize("tensor", [torch.zeros(4, 4).t(), torch.zeros(8)[::2]])
def test_what_mpi_would_misread_is_refused(tensor: Any) -> None:
    with pytest.raises(ValueError, match="contiguous"):
        memory(tensor)


def test_wire_tensors_on_the_cpu_are_the_pieces_themselves() -> None:
    wire, x = Messages(torch.device("cpu")), torch.arange(4.0)
    assert wire.load(x[1:3], "k").data_ptr() == x[1:3].data_ptr()
    assert wire.scratch("a", 10).data_ptr() == wire.scratch("a", 5).data_ptr()  # the buffer is reused
    assert wire.scratch("a", 10).data_ptr() != wire.scratch("b", 10).data_ptr()
    wire.store(torch.full((2,), 9.0), x[1:3])
    assert x.tolist() == [0.0, 9.0, 9.0, 3.0]
    with wire.timed():
        pass
    assert wire.seconds > 0
