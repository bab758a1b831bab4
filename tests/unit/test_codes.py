"""Laws of codes: decoded values are close to the input and unbiased, sizes are as predicted, and errors are smaller than values;
also which values sparse methods choose."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mpidp.reducers.buckets import Bucket
from mpidp.reducers.compression.codes import BLOCK, CODES, PLAIN, Code, Integer, blocks, pack, seed_of, unpack
from mpidp.reducers.compression.compressed import method_of, padding_of, trimmed
from mpidp.reducers.compression.exchange import HEADER, bytes_sent, read, slice_bytes, wire_bytes, write
from mpidp.reducers.compression.topk import RandomKMethod, TopK, count, ratio_at
from tests.registries import COMPRESSIONS

ALL: dict[str, Code] = {"plain": PLAIN, **CODES, "topk": TopK(0.05)}
LARGEST = torch.finfo(torch.float32).max
LENGTHS = [1, 2, 3, 63, 64, 65, BLOCK, BLOCK + 1, 1000, 5 * BLOCK]


def values(n: int, seed: int = 0) -> Tensor:
    """Draw values of very different magnitudes, between and within blocks."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, generator=generator) * 10.0 ** torch.randint(-4, 5, (n,), generator=generator)


def through(code: Code, x: Tensor, seed: int = 0) -> Tensor:
    """Encode into memory of the predicted size, and decode."""
    wire = torch.full((code.num_bytes(x.numel()) + 8,), 0xA5, dtype=torch.uint8)
    code.encode(x, wire[4:-4], seed)
    assert (wire[:4] == 0xA5).all() and (wire[-4:] == 0xA5).all()
    found = code.decode(wire[4:-4], x.numel())
    assert found.dtype == torch.float32 and found.shape == x.shape
    return found


def largest(x: Tensor) -> Tensor:
    """Return the largest absolute value of each value's block."""
    return blocks(x).abs().amax(1, keepdim=True).expand(-1, BLOCK).reshape(-1)[: x.numel()]


@pytest.mark.parametrize("n", LENGTHS)
def test_what_comes_back_is_near(n: int) -> None:
    x = values(n)
    error = {name: (x - through(code, x)).abs() for name, code in ALL.items()}
    assert not error["plain"].any()
    assert (error["bf16"] <= 2.0**-8 * x.abs()).all()
    assert (error["fp16"] <= 2.0**-11 * x.abs() + 2.0**-39 * largest(x)).all()
    for name, levels in (("int8", 127), ("int4", 7)):
        assert (error[name] <= largest(x) / levels * (1 + 1e-6)).all()
    found = through(CODES["int2"], x)
    sizes = blocks(found).abs().amax(1, keepdim=True).expand(-1, BLOCK).reshape(-1)[:n]
    assert ((found == 0) | ((found.sign() == x.sign()) & (found.abs() == sizes))).all()
    assert float((blocks(found) ** 2).sum()) <= float((blocks(x) ** 2).sum())
    found = through(CODES["onebit"], x)
    assert ((found >= 0) == (x >= 0)).all()
    assert found.abs()[:BLOCK].max() == pytest.approx(float(x[:BLOCK].abs().mean()), rel=1e-5)
    kept = through(ALL["topk"], x)
    k = count(0.05, n)
    assert int((kept != 0).sum()) == k and (kept[kept != 0] == x[kept != 0]).all()
    assert error["topk"].max() <= x.abs().sort(descending=True).values[k - 1] or k == n


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-38, 1.0, 3e38, LARGEST, math.nextafter(LARGEST / 2, math.inf)])
@pytest.mark.parametrize("n", [1, 3, 160, BLOCK, BLOCK + 3])
def test_no_size_overflows_or_becomes_nan(name: str, size: float, n: int) -> None:
    for pattern in ([size, -size, size / 2, 0.0], [size], [-size, size]):
        x = torch.tensor(pattern * n)[:n]
        found = through(ALL[name], x)
        assert found.isfinite().all() and (x - found).isfinite().all()
        if size == 0.0:
            assert not found.any()


@pytest.mark.parametrize("name", ALL)
def test_zeros_among_others_stay_zero_where_a_code_says_so(name: str) -> None:
    x = values(4 * BLOCK)
    x[::3] = 0.0
    assert ALL[name].keeps_zeros == (not through(ALL[name], x)[::3].any())


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 300_000))
def test_lengths_are_known_from_the_count_alone(n: int) -> None:
    assert PLAIN.num_bytes(n) == 4 * n and CODES["bf16"].num_bytes(n) == 2 * n
    scales = 4 * math.ceil(n / BLOCK)
    for name, bits in (("fp16", 16), ("int8", 8), ("int4", 4), ("int2", 2), ("onebit", 1)):
        assert CODES[name].num_bytes(n) == scales + math.ceil(n * bits / 8)
    assert TopK(0.01).num_bytes(n) == 6 * (n // 4096 * 41 + (max(1, round(n % 4096 / 100)) if n % 4096 else 0))
    assert TopK(1e-4).num_bytes(n) == 6 * (n // 65536 * 7 + (max(1, round(n % 65536 / 1e4)) if n % 65536 else 0))
    assert TopK(1.0).num_bytes(n) == 6 * n


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("n", LENGTHS)
def test_packed_is_dense_and_comes_back(bits: int, n: int) -> None:
    x = torch.randint(0, 2**bits, (n,), dtype=torch.uint8, generator=torch.Generator().manual_seed(n))
    packed = pack(x, bits)
    assert packed.numel() == math.ceil(n * bits / 8) and torch.equal(unpack(packed, bits, n), x)


@pytest.mark.parametrize("n", [4095, 4096, 4097, 65535, 65536, 65537, 200_000])
@pytest.mark.parametrize("ratio", [1 / 4096, 0.01])
def test_the_largest_of_each_chunk_come_back(n: int, ratio: float) -> None:
    x, width = values(n), 4096 if ratio == 0.01 else 65536
    for part, found in zip(x.split(width), through(TopK(ratio), x).split(width), strict=True):
        k = max(1, round(ratio * len(part)))
        sent = torch.zeros(len(part), dtype=torch.bool)
        sent[part.abs().topk(k).indices] = True
        assert torch.equal(found, part * sent)


@pytest.mark.parametrize(("name", "rounds"), [("int8", 400), ("int4", 400)])
def test_random_rounding_is_right_in_the_mean(name: str, rounds: int) -> None:
    """The limit is five standard errors: the variance of a rounding is at most a quarter of the squared step."""
    x = values(2 * BLOCK, seed=3)
    code = CODES[name]
    assert isinstance(code, Integer)
    scale = code.scale(blocks(x)).expand(-1, BLOCK).reshape(-1)
    mean = sum(through(code, x, seed).double() for seed in range(rounds)) / rounds
    assert ((mean - x).abs() <= 5 * scale / 2 / math.sqrt(rounds)).all()


def test_rounding_repeats_with_its_seed_alone() -> None:
    x = values(1000)
    for name in ("int8", "int4"):
        assert torch.equal(through(CODES[name], x, 5), through(CODES[name], x, 5))
        assert not torch.equal(through(CODES[name], x, 5), through(CODES[name], x, 6))
    assert len({seed_of(*numbers) for numbers in [(1, 2), (2, 1), (12,), (1, 2, 0), (0, 1, 2)]}) == 5


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(
    "kind", ["normal", "one large", "two sizes", "equal", "constant", "sizes", "1 of 100", "1 of 10", "1 of 2"]
)
@pytest.mark.parametrize("size", [2.0**-126, 1e-36, 1e-20, 1.0, 1e30])
def test_less_is_left_than_was_there(name: str, kind: str, size: float) -> None:
    """In the mean over roundings. Otherwise residuals would grow without bound. size: the unit of the values."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8 * BLOCK, generator=generator)
    if kind == "one large":
        x[::BLOCK] = 1000.0
    elif kind == "two sizes":
        x = torch.where(torch.arange(len(x)) % BLOCK == 0, 1.0, 1 / math.sqrt(BLOCK))
    elif kind == "equal":
        x = x.sign()
    elif kind == "constant":
        x = torch.full((8 * BLOCK,), -0.3)
    elif kind == "sizes":
        x = values(8 * BLOCK)
    elif kind.startswith("1 of"):
        x *= torch.rand(len(x), generator=generator) < 1 / int(kind[5:])
    x *= size
    left = sum(float((x - through(ALL[name], x, seed)).double().square().sum()) for seed in range(20)) / 20
    assert left <= (1 - 1e-4) * float(x.double().square().sum())


@pytest.mark.parametrize("name", ALL)
def test_a_single_value_is_sent_wherever_it_stands(name: str) -> None:
    """Otherwise error feedback would keep it forever. In the mean over roundings the remaining error is smaller than the value.
    """
    n = BLOCK + 70
    for place in range(n):
        for value in (1.0, -3e-5, 2.0**-126, LARGEST):
            x = torch.zeros(n)
            x[place] = value
            left = sum(float((x - through(ALL[name], x, seed)).double().square().sum()) for seed in range(2)) / 2
            assert left <= (1 - 1e-4) * float(x[place].double().square()), f"value {value} at place {place}"


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("nonzero", [1, 7, 128, 2 * BLOCK])
def test_error_feedback_sends_every_value_in_time(name: str, nonzero: int) -> None:
    """With a constant gradient, applied values and residual add up to it, and the residual of each value stops growing. So the
    mean of the applied values converges to the gradient."""
    rounds, n = 1024, 2 * BLOCK
    places = torch.randperm(n, generator=torch.Generator().manual_seed(nonzero))[:nonzero]
    gradient = torch.zeros(n)
    gradient[places] = torch.where(places % 3 == 0, -1.0, 1.0)
    held, applied = torch.zeros(n), torch.zeros(n, dtype=torch.float64)
    for seed in range(rounds):
        x = gradient + held
        sent = through(ALL[name], x, seed)
        held, applied = x - sent, applied + sent.double()
    torch.testing.assert_close(applied + held.double(), rounds * gradient.double(), rtol=1e-4, atol=0.05)
    worst = (rounds * gradient.double() - applied).abs().max()
    assert worst < 0.5 * rounds, f"{worst:.0f} of {rounds} gradients of some value were never applied"


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("n", LENGTHS)
def test_the_length_depends_on_the_count_alone(name: str, n: int) -> None:
    """For any values: zeros, few, many. It is at most the length in float32 plus a scale and 6 bytes per value kept."""
    for x in (torch.zeros(n), values(n), values(n) * (torch.arange(n) % 5 == 0)):
        through(ALL[name], x)
    assert 0 < ALL[name].num_bytes(n) <= 4 * n + 8


@pytest.mark.parametrize("name", ALL)
def test_a_slice_on_the_wire_says_whether_it_is_finite(name: str) -> None:
    code, x = ALL[name], values(100)
    wire = torch.full((wire_bytes(code, 100),), 0xA5, dtype=torch.uint8)
    write(code, x, wire, 0, finite=True)
    found, finite = read(code, wire, 100)
    assert finite and torch.equal(found, through(code, x)) and wire.numel() % 4 == 0
    x[3] = math.nan
    write(code, x, wire, 0, finite=False)
    found, finite = read(code, wire, 100)
    assert not finite and not found.any() and not wire.any()  # no values are sent
    assert wire_bytes(code, 0) == 0 and read(code, wire[:0], 0)[1]


def test_bytes_sent_add_up() -> None:
    for code in ALL.values():
        for n in (1, 64, 1000, 5000):
            for size in (1, 2, 3, 4, 7):
                sizes = slice_bytes(code, n, size)
                sent = [bytes_sent(code, n, rank, size) for rank in range(size)]
                assert len(sizes) == size and sum(sent) == 2 * (size - 1) * sum(sizes)
    assert bytes_sent(CODES["int8"], 2560, 0, 1) == 0
    assert bytes_sent(CODES["int8"], 2560, 0, 2) == 2 * (HEADER + 4 * 5 + 1280)


def test_the_ratio_falls_to_what_is_wanted() -> None:
    assert [round(ratio_at(0.001, 4, step), 4) for step in range(6)] == [0.2512, 0.0631, 0.0158, 0.004, 0.001, 0.001]
    assert ratio_at(0.01, 0, 0) == 0.01


def bucket_of(*shapes: tuple[int, ...]) -> Bucket:
    """A bucket of consecutive parameters, as FlatLayout places them, from element 640 on."""
    offsets, sizes = [640], [torch.Size(shape) for shape in shapes]
    for size in sizes:
        offsets.append(offsets[-1] + -(-size.numel() // 64) * 64)
    return Bucket(3, 640, offsets[-1], tuple(map(str, range(len(shapes)))), tuple(sizes), tuple(offsets[:-1]))


def test_random_places_are_distinct_and_every_place_has_its_turn() -> None:
    bucket, method = bucket_of((10, 10), (27,)), RandomKMethod(0.1, 0)
    seen = torch.zeros(192)
    for number in range(2000):
        places = method.places(bucket, number, seed=1)
        assert len(places) == 19 and (places[1:] > places[:-1]).all() and places[0] >= 0 and places[-1] < 192
        seen[places] += 1
    assert (seen - 2000 * 19 / 192).abs().max() <= 5 * math.sqrt(2000 * 0.11)
    assert torch.equal(method.places(bucket, 7, 1), method.places(bucket, 7, 1))
    assert not torch.equal(method.places(bucket, 7, 1), method.places(bucket, 7, 2))
    assert RandomKMethod(1.0, 0).places(bucket, 0, 0).tolist() == list(range(192))


def test_padding_is_what_no_parameter_has() -> None:
    bucket = bucket_of((10, 10), (64,), (1,))
    assert trimmed(bucket) == bucket == trimmed(replace(bucket, stop=1 << 16))
    assert padding_of(bucket).tolist() == [*range(100, 128), *range(193, 256)]


def test_every_name_has_its_method() -> None:
    for name in COMPRESSIONS:
        method = method_of(name, 0.1, 0, 4, 0)
        sent = method.bytes_sent(bucket_of((400, 400)), 0, 0, 2)
        assert 0 < sent < 4 * 400 * 400 * 2 / 1.9, name
    assert set(CODES) <= set(COMPRESSIONS), "a code that comm.compress in settings.py does not name"
