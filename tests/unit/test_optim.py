"""Laws of updates: the schedule's values, the textbook's formulas, states that can be carried over, one norm."""

from __future__ import annotations

import math

import pytest
import torch

from mpidp.comm.buckets import NORM_BLOCK
from mpidp.optim import Optimizer, Schedule, global_norm

NAMES = ["adamw", "adam", "sgd", "muon"]


def test_warm_up_is_linear_and_ends_at_the_top() -> None:
    schedule = Schedule("cosine", 2.0, 0.1, warmup_steps=4, total_steps=20)
    assert [schedule.lr_at(step) for step in (1, 2, 3, 4)] == [0.5, 1.0, 1.5, 2.0]


@pytest.mark.parametrize("warmup", [0, 5])
@pytest.mark.parametrize(("kind", "middle", "end"), [("cosine", 1.05, 0.1), ("linear", 1.05, 0.1), ("constant", 2.0, 2.0),
                                                     ("wsd", 2.0, 0.1)])
def test_schedules(kind: str, middle: float, end: float, warmup: int) -> None:
    schedule = Schedule(kind, 2.0, 0.1, warmup, warmup + 20)
    assert schedule.lr_at(warmup + 10) == pytest.approx(middle)
    assert schedule.lr_at(warmup + 20) == pytest.approx(end)
    after = [schedule.lr_at(step) for step in range(warmup + 1, warmup + 21)]
    assert after == sorted(after, reverse=True)


def test_cosine_is_a_cosine_and_wsd_decays_over_the_last_fifth() -> None:
    cosine = Schedule("cosine", 1.0, 0.0, 0, 8)
    assert [cosine.lr_at(s) for s in range(1, 9)] == pytest.approx([0.5 * (1 + math.cos(math.pi * s / 8)) for s in range(1, 9)])
    wsd = Schedule("wsd", 1.0, 0.0, 0, 20)
    assert [wsd.lr_at(s) for s in (1, 16, 17, 18, 19, 20)] == pytest.approx([1.0, 1.0, 0.75, 0.5, 0.25, 0.0])


def test_a_run_that_is_all_warm_up() -> None:
    assert Schedule("cosine", 1.0, 0.0, 5, 5).lr_at(5) == 1.0


def two_parameters() -> list[tuple[str, torch.nn.Parameter]]:
    generator = torch.Generator().manual_seed(3)
    shapes = {"embedding.weight": (7, 4), "blocks.0.w.weight": (4, 6), "blocks.0.norm.weight": (4,), "head.weight": (7, 4)}
    return [(name, torch.nn.Parameter(torch.randn(shape, generator=generator))) for name, shape in shapes.items()]


def give_gradients(named: list[tuple[str, torch.nn.Parameter]], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for _, p in named:
        p.grad = torch.randn(p.shape, generator=generator)


def test_adamw_is_the_textbooks() -> None:
    named = two_parameters()
    optimizer = Optimizer("adamw", named, weight_decay=0.1, beta1=0.9, beta2=0.99)
    expected = {name: p.detach().double() for name, p in named}
    m = {name: torch.zeros_like(p) for name, p in expected.items()}
    v = {name: torch.zeros_like(p) for name, p in expected.items()}
    for step, lr in enumerate([0.1, 0.05, 0.2], start=1):
        give_gradients(named, step)
        for name, p in named:
            g = p.grad.double()
            m[name] = 0.9 * m[name] + 0.1 * g
            v[name] = 0.99 * v[name] + 0.01 * g * g
            decay = 0.1 if p.dim() >= 2 else 0.0  # gains do not decay
            update = (m[name] / (1 - 0.9**step)) / ((v[name] / (1 - 0.99**step)).sqrt() + 1e-8)
            expected[name] = expected[name] * (1 - lr * decay) - lr * update
        optimizer.step(lr)
    for name, p in named:
        torch.testing.assert_close(p.detach().double(), expected[name], rtol=1e-5, atol=1e-6)


def test_sgd_is_the_textbooks() -> None:
    named = two_parameters()
    optimizer = Optimizer("sgd", named, weight_decay=0.0, beta1=0.5, beta2=0.0)
    expected = {name: p.detach().double() for name, p in named}
    momentum = {name: torch.zeros_like(p) for name, p in expected.items()}
    for step in (1, 2, 3):
        give_gradients(named, step)
        for name, p in named:
            momentum[name] = 0.5 * momentum[name] + p.grad.double()
            expected[name] = expected[name] - 0.1 * momentum[name]
        optimizer.step(0.1)
    for name, p in named:
        torch.testing.assert_close(p.detach().double(), expected[name], rtol=1e-5, atol=1e-6)


def test_muon_serves_hidden_matrices_alone() -> None:
    named = two_parameters()
    muon, adamw = Optimizer("muon", named, 0.1, 0.9, 0.99).parts
    hidden = [p for group in muon.param_groups for p in group["params"]]
    assert hidden == [dict(named)["blocks.0.w.weight"]] and type(muon).__name__ == "Muon"
    assert sum(len(group["params"]) for group in adamw.param_groups) == 3


@pytest.mark.parametrize("name", NAMES)
def test_a_state_can_be_carried_over(name: str) -> None:
    through, first = two_parameters(), two_parameters()
    optimizer = Optimizer(name, through, 0.1, 0.9, 0.99)
    for step in (1, 2, 3, 4):
        give_gradients(through, step)
        optimizer.step(0.01 * step)
    before = Optimizer(name, first, 0.1, 0.9, 0.99)
    for step in (1, 2):
        give_gradients(first, step)
        before.step(0.01 * step)
    state = {key: value.clone() for key, value in before.state_dict().items()}
    assert state and all("/" in key for key in state)
    second = [(n, torch.nn.Parameter(p.detach().clone())) for n, p in first]
    after = Optimizer(name, second, 0.1, 0.9, 0.99)
    after.load_state_dict(state)
    for step in (3, 4):
        give_gradients(second, step)
        after.step(0.01 * step)
    for (n, p), (_, q) in zip(through, second, strict=True):
        assert torch.equal(p, q), n
    assert {k: v.tolist() for k, v in after.state_dict().items()} == {k: v.tolist() for k, v in optimizer.state_dict().items()}


def test_what_no_optimizer_knows_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown optimizer 'adam2'"):
        Optimizer("adam2", two_parameters(), 0.1, 0.9, 0.99)
    with pytest.raises(ValueError, match="unknown parameter 'stranger'"):
        Optimizer("adamw", two_parameters(), 0.1, 0.9, 0.99).load_state_dict({"stranger/exp_avg": torch.zeros(1)})


@pytest.mark.parametrize("blocks", [1, 2, 3, 17])
def test_the_norm_is_torchs_and_does_not_depend_on_threads(blocks: int) -> None:
    flat = torch.randn(blocks * NORM_BLOCK, generator=torch.Generator().manual_seed(blocks))
    flat.view(blocks, -1).mul_(10.0 ** -torch.arange(blocks).view(-1, 1))  # parameters of different sizes
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(global_norm(flat))
    torch.set_num_threads(1)
    assert found[0].dtype == torch.float64
    assert float(found[0]) == pytest.approx(float(torch.linalg.vector_norm(flat.double())), rel=1e-6)
    assert len({float(one) for one in found}) == 1


def test_the_norm_shows_what_is_not_finite() -> None:
    for bad in (math.nan, math.inf, -math.inf):
        flat = torch.ones(2 * NORM_BLOCK)
        flat[-3] = bad
        assert not math.isfinite(float(global_norm(flat)))
