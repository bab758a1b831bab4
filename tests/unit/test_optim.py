"""Laws of updates: the values of the schedule, the textbook formulas, transferable states, and one norm."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from mpidp.comm.slices import NORM_BLOCK, global_norm
from mpidp.model.hidden import hidden_by_name
from mpidp.parallel.whole_matrices import Hidden
from mpidp.reducers.buckets import FlatLayout
from mpidp.strategies import newton_schulz
from mpidp.strategies.optimizer import Optimizer, UpdateRule
from mpidp.training.lr_schedule import Schedule, change
from tests.registries import OPTIMIZERS
from tests.unit.references import REFERENCES, Hyper


def test_warm_up_is_linear_and_ends_at_the_top() -> None:
    schedule = Schedule("cosine", 2.0, 0.1, warmup_steps=4, total_steps=20)
    assert [schedule.lr_at(step) for step in (1, 2, 3, 4)] == [0.5, 1.0, 1.5, 2.0]


@pytest.mark.parametrize("warmup", [0, 5])
@pytest.mark.parametrize(("kind", "middle", "end"), [("cosine", 1.05, 0.1), ("linear", 1.05, 0.1), ("constant", 2.0, 2.0),
                                                     ("wsd", 2.0, 0.1)])
def test_schedules(kind: str, middle: float, end: float, warmup: int) -> None:
    schedule = Schedule(kind, 2.0, 0.1, warmup, warmup + 20)
    assert schedule.lr_at(warmup + 11) == pytest.approx(middle)
    assert schedule.lr_at(warmup + 21) == pytest.approx(end)  # one step after the last
    after = [schedule.lr_at(step) for step in range(warmup + 1, warmup + 21)]
    assert after == sorted(after, reverse=True)


def test_decays_are_those_of_torch() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=2.0)
    cosine, linear = Schedule("cosine", 2.0, 0.5, 0, 8), Schedule("linear", 2.0, 0.5, 0, 8)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8, eta_min=0.5)
    for step in range(1, 9):
        assert cosine.lr_at(step) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=2.0)
    other = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.25, total_iters=8)
    for step in range(1, 9):
        assert linear.lr_at(step) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        other.step()
    wsd = Schedule("wsd", 1.0, 0.0, 0, 20)
    assert [wsd.lr_at(s) for s in (1, 16, 17, 18, 19, 20)] == pytest.approx([1.0, 1.0, 1.0, 0.75, 0.5, 0.25])


@pytest.mark.parametrize("warmup", [0, 3])
@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_decays_are_those_of_transformers(kind: str, warmup: int) -> None:
    """Except the warm-up, whose first step has a learning rate of 0 in transformers."""
    optimization = pytest.importorskip("transformers.optimization")
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=2.0)
    make = getattr(optimization, f"get_{kind}_schedule_with_warmup")
    theirs, schedule = make(optimizer, warmup, 12), Schedule(kind, 2.0, 0.0, warmup, 12)
    for step in range(1, 13):
        if step > warmup:
            assert schedule.lr_at(step) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd", "constant"])
@pytest.mark.parametrize("steps", [1, 2, 10])
def test_every_step_learns(kind: str, steps: int) -> None:
    for warmup in {0, 1, steps}:
        assert all(Schedule(kind, 1.0, 0.0, warmup, steps).lr_at(step) > 0 for step in range(1, steps + 1))


def test_a_run_that_is_all_warm_up() -> None:
    assert Schedule("cosine", 1.0, 0.0, 5, 5).lr_at(5) == 1.0


def test_the_line_about_a_schedule_that_changes() -> None:
    saved = {"train.steps": 20, "optim.schedule": "cosine", "optim.lr": 0.003, "optim.min_lr": 0.0, "optim.warmup_steps": 2}
    now = saved | {"train.steps": 2000}
    assert change(saved, saved | {"comm.overlap": "none"}, 20) == ""
    assert change(saved, now, 20) == "train.steps 20 -> 2000: the learning rate at step 21 is 0.003, after 2.28e-05 at step 20"
    assert change(saved, now | {"optim.lr": 0.001}, 0) == (
        "train.steps 20 -> 2000, optim.lr 0.003 -> 0.001: the learning rate at step 1 is 0.0005"
    )


SHAPES = {  # about one block of the flat layout each, so that shares divide most of them
    "embedding.weight": (300, 64), "blocks.0.w.weight": (64, 100), "blocks.0.norm.weight": (64,), "blocks.0.v.weight": (128, 130),
    "blocks.1.w.weight": (7, 11), "norm.weight": (5,), "head.weight": (300, 64),
}


class Flat:
    """Parameters, gradients and moments as seen by ranks that share memory: several optimizers work on them."""

    def __init__(self, name: str = "adamw", shares: int = 1, weight_decay: float = 0.1, beta1: float = 0.9) -> None:
        generator = torch.Generator().manual_seed(3)
        self.named = [(n, torch.nn.Parameter(torch.randn(shape, generator=generator))) for n, shape in SHAPES.items()]
        self.layout = FlatLayout(self.named)
        self.parameters, self.gradients = torch.zeros(2, self.layout.num_elements)
        self.layout.adopt(self.parameters)
        self._memories: list[torch.Tensor] = []
        self.optimizers = []
        for share in range(shares):
            asked = iter(range(10))
            rule = UpdateRule(name, weight_decay, beta1, 0.99, hidden=Hidden(hidden_by_name(self.named)))
            self.optimizers.append(Optimizer(
                rule, self.layout, self.parameters, self.gradients,
                lambda elements, asked=asked: self._memory(next(asked), elements), (share, shares),
            ))

    def _memory(self, which: int, elements: int) -> torch.Tensor:
        """Return the same memory for the same number `which`."""
        if which == len(self._memories):
            self._memories.append(torch.zeros(elements))
        return self._memories[which]

    def gradient(self, step: int) -> dict[str, torch.Tensor]:
        """Write the gradients of a step; the padding between parameters stays unchanged."""
        self.gradients.fill_(math.nan)
        generator = torch.Generator().manual_seed(step)
        for (_, p), view in zip(self.layout.parameters, self.layout.views(self.gradients), strict=True):
            view.copy_(torch.randn(p.shape, generator=generator))
        names = [name for name, _ in self.layout.parameters]
        return dict(zip(names, self.layout.views(self.gradients), strict=True))

    def steps(self, *steps: int) -> None:
        for step in steps:
            self.gradient(step)
            for optimizer in self.optimizers:
                optimizer.step(0.01 * step)

    def state(self) -> dict[str, list[float]]:
        """Return parameters and the optimizer's state, which are the same for all that share them."""
        states = [{key: value.tolist() for key, value in o.state_dict().items()} for o in self.optimizers]
        assert all(state == states[0] for state in states)
        return states[0] | {name: p.tolist() for name, p in self.named}


@pytest.mark.parametrize("beta1", [0.9, 0.5])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_updates_are_those_of_the_reference(name: str, beta1: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over steps with different learning rates. Weight decay applies to matrices only. References are in bfloat16."""
    monkeypatch.setattr(newton_schulz, "CPU_DTYPE", torch.bfloat16)
    assert name in REFERENCES, f"add a reference implementation of {name} to tests/unit/references.py"
    flat = Flat(name, beta1=beta1)
    expected = {key: p.detach().double() for key, p in flat.named}
    states: dict[str, dict[str, Any]] = {key: {} for key in expected}
    for step, lr in enumerate([0.1, 0.05, 0.2], start=1):
        for key, gradient in flat.gradient(step).items():
            matrix = len(SHAPES[key]) == 2
            hyper = Hyper(lr, 0.1 if matrix else 0.0, beta1, 0.99, matrix and key.startswith("blocks"))
            expected[key] = REFERENCES[name](expected[key], gradient.double(), states[key], step, hyper)
        flat.optimizers[0].step(lr)
    for key, p in flat.named:
        torch.testing.assert_close(p.detach().double(), expected[key], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_shares_together_are_the_whole_bit_for_bit(name: str) -> None:
    whole = Flat(name)
    whole.steps(1, 2, 3)
    for shares in (2, 3, 4, 5, 8):
        parts = Flat(name, shares)
        parts.steps(1, 2, 3)
        assert parts.state() == whole.state(), f"{shares} shares"
        parts.gradients.fill_(1.0)
        before = parts.parameters.clone()
        moved = []
        for optimizer in parts.optimizers:
            optimizer.step(0.1)
            moved.append(parts.parameters != before)
            before = parts.parameters.clone()
        assert int(torch.stack(moved).sum(0).max()) == 1, "an element belongs to one share"
        assert sum(bool(one.any()) for one in moved) > 1, "and not all to the same"


@pytest.mark.parametrize("shares", [1, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_state_can_be_carried_over(name: str, shares: int) -> None:
    through, before, after = Flat(name), Flat(name, shares), Flat(name, 4 - shares)
    through.steps(1, 2, 3, 4)
    before.steps(1, 2)
    state = {key: value.clone() for key, value in before.optimizers[0].state_dict().items()}
    assert {key.rpartition("/")[0] for key in state} == set(SHAPES)
    after.parameters.copy_(before.parameters)
    for optimizer in after.optimizers:
        optimizer.load_state_dict(state)
    after.steps(3, 4)
    assert after.state() == through.state()


def test_what_no_optimizer_knows_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown optimizer 'adam2'"):
        Flat("adam2")
    with pytest.raises(ValueError, match="'stranger/exp_avg' belongs to no parameter"):
        Flat("adamw").optimizers[0].load_state_dict({"stranger/exp_avg": torch.zeros(1)})


def test_replicas_agree_on_the_flat_moments() -> None:
    """An audit compares them: all state except the number of updates is there."""
    for name in OPTIMIZERS:
        flat = Flat(name)
        flat.steps(1, 2)
        moments = flat.optimizers[0].moments()
        assert len(moments) == len(flat.optimizers[0].rule.moments)
        assert all(m.shape == (flat.layout.num_elements,) for m in moments.values())
        for m in moments.values():
            m.zero_()
        left = {key for key, value in flat.optimizers[0].state_dict().items() if value.any()}
        assert all(key.endswith("/step") for key in left)


@pytest.mark.parametrize("blocks", [1, 2, 3, 17])
def test_the_norm_is_torchs_and_does_not_depend_on_threads(blocks: int) -> None:
    flat = torch.randn(blocks * NORM_BLOCK, generator=torch.Generator().manual_seed(blocks))
    flat.view(blocks, -1).mul_(10.0 ** -torch.arange(blocks).view(-1, 1))  # parameters of different sizes
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(global_norm(flat))
    torch.set_num_threads(1)
    assert found[0] == pytest.approx(float(torch.linalg.vector_norm(flat.double())), rel=1e-6)
    assert len(set(found)) == 1


def test_the_norm_shows_what_is_not_finite() -> None:
    for bad in (math.nan, math.inf, -math.inf):
        flat = torch.ones(2 * NORM_BLOCK)
        flat[-3] = bad
        assert not math.isfinite(global_norm(flat))
