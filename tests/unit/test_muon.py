"""Laws of Muon's parts: which matrices are hidden, where slices end, and that batches change no bit."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim._muon import _zeropower_via_newtonschulz

from mpidp.comm.slices import ALIGN, NORM_BLOCK, slice_bounds
from mpidp.errors import UsageError
from mpidp.model.hidden import hidden_of_own
from mpidp.parallel.whole_matrices import Hidden
from mpidp.reducers.buckets import FlatLayout
from mpidp.strategies import newton_schulz
from mpidp.strategies.muon import HeldElements, Muon, normalized
from mpidp.strategies.newton_schulz import orthogonalized
from mpidp.strategies.optimizer import UpdateRule, bounds_outside


class Own(nn.Module):
    """A model whose width equals the size of its vocabulary."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.inner, self.kernel = nn.Embedding(8, 8), nn.Linear(8, 8), nn.Conv1d(8, 8, 3)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 8)


def test_hidden_matrices_of_an_own_model() -> None:
    model = Own()
    assert hidden_of_own(model, 8) == {"inner.weight"}
    model.head.weight = model.table.weight  # tied: then there is no head besides the table
    assert hidden_of_own(model, 9) == {"inner.weight"}
    model.hidden_matrices = ["inner.weight", "head.weight"]  # type: ignore[assignment]
    with pytest.raises(UsageError, match="hidden_matrices has 'head.weight', which is not a parameter with two dimensions"):
        hidden_of_own(model, 8)


def test_slices_end_outside_of_matrices() -> None:
    shapes = [(70, 50), (33,), (9, 90)]
    named = [(f"blocks.{i}.{n}", nn.Parameter(torch.zeros(s))) for i in range(3) for n, s in enumerate(shapes)]
    layout = FlatLayout([("embedding.weight", nn.Parameter(torch.zeros(99, 64))), *named])
    matrices = {name for name, p in named if p.dim() == 2}
    for multiple in (ALIGN, NORM_BLOCK):
        assert bounds_outside(layout, 7, multiple, ()) == slice_bounds(layout.num_elements, 7, multiple)
        for count in range(1, 20):
            bounds = bounds_outside(layout, count, multiple, matrices)
            assert bounds == sorted(bounds) and len(bounds) == count + 1
            assert (bounds[0], bounds[-1]) == (0, layout.num_elements) and all(bound % multiple == 0 for bound in bounds)
            for offset, name, p in layout.placed():
                if name in matrices:
                    assert not any(offset < bound < offset + p.numel() for bound in bounds)


@pytest.mark.parametrize("shape", [(1, 5), (16, 16), (33, 7), (7, 33), (64, 96), (96, 64), (130, 130)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_batch_of_matrices_has_the_bits_of_single_matrices(
    dtype: torch.dtype, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(newton_schulz, "CPU_DTYPE", dtype)
    generator = torch.Generator().manual_seed(1)
    matrices = [torch.randn(shape, generator=generator) for _ in range(7)]
    second = torch.rand(shape[0], 1, generator=generator)
    alone = [orthogonalized([one])[0] for one in matrices]
    for count in (2, 3, 7):
        together = orthogonalized(matrices[:count])
        for one, other in zip(together, alone, strict=False):
            assert torch.equal(one, other)
            assert all(map(torch.equal, normalized(one, second), normalized(other.contiguous(), second)))
    theirs = _zeropower_via_newtonschulz(matrices[0], (3.4445, -4.7750, 2.0315), 5, 1e-7)
    if dtype == torch.bfloat16:
        assert torch.equal(alone[0], theirs)
    torch.testing.assert_close(alone[0].float(), theirs.float(), rtol=0, atol=0.05)
    if min(shape) > 1:
        values = torch.linalg.svdvals(alone[0].float())
        assert values.median() > 0.6 and values.max() < 1.4, "nearly orthogonal"


@pytest.mark.parametrize("cautious", [False, True])
def test_cautious_decay_is_of_elements_that_move_towards_zero(cautious: bool) -> None:
    """The difference to a step without decay is lr decay p, for these elements or for all."""
    generator, lr, decay = torch.Generator().manual_seed(3), 0.1, 0.5
    start, gradient = torch.randn(2, 12, 20, generator=generator)
    for name in ("adamw", "muon"):
        found = []
        for rate in (0.0, decay):
            p = nn.Parameter(start.clone())
            p.grad = gradient.clone()
            if name == "adamw":
                part = UpdateRule(name, rate, 0.9, 0.99, cautious).torch_optimizer([p], True)
                part.param_groups[0]["lr"] = lr
                part.step()
            else:
                hidden = Hidden(frozenset({"w"}))
                held = [HeldElements(p, {"momentum_buffer": torch.zeros_like(p)}, [hidden.box("w", (0, 0), p.shape)])]
                Muon(name, hidden, held, rate, cautious).step(lr, 0)
            found.append(p.detach())
        towards = (start - found[0]) * start >= 0
        expected = lr * decay * start * (towards if cautious else 1)
        torch.testing.assert_close(found[0] - found[1], expected, rtol=1e-4, atol=1e-6)


def test_momentum_rises_to_that_of_torch() -> None:
    hidden, p = Hidden(frozenset({"w"})), nn.Parameter(torch.zeros(2, 2))
    state = {"momentum_buffer": torch.zeros(2, 2)}
    muon = Muon("muon", hidden, [HeldElements(p, state, [hidden.box("w", (0, 0), (2, 2))])], 0.0, warmup=4)
    seen = []
    for updates in range(6):
        p.grad = torch.eye(2)
        before = float(state["momentum_buffer"][0, 0])
        muon.step(0.0, updates)
        seen.append((1 - float(state["momentum_buffer"][0, 0])) / (1 - before))
    assert seen == pytest.approx([0.85, 0.875, 0.9, 0.925, 0.95, 0.95])
