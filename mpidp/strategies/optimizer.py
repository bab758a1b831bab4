"""Optimizers for flat parameters, and for parameters that are divided among ranks. Muon can update the hidden matrices, which
are all matrices except embeddings and the head. torch's optimizers update all other parameters."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mpidp.checkpoint.boxes import boxes_of_run
from mpidp.comm.slices import ALIGN, round_up, slice_bounds
from mpidp.parallel.whole_matrices import Hidden
from mpidp.reducers.buckets import FlatLayout
from mpidp.strategies.muon import MATRIX_STATE, HeldElements, Muon


def without_compiler(kind: type[torch.optim.Optimizer]) -> Any:
    """Return the optimizer class `kind` without torch.compile's wrappers. These wrappers would import torch._dynamo in every
    process, which takes about one second and 70 MB. Independent."""
    plain = {"add_param_group": inspect.unwrap(kind.add_param_group), "step": torch.no_grad()(inspect.unwrap(kind.step))}
    return type(kind.__name__, (kind,), plain)


def cautious_adamw() -> Any:
    """Return a subclass of AdamW with cautious weight decay (muon.decay_towards_zero()). Independent."""

    class Cautious(without_compiler(torch.optim.AdamW)):  # type: ignore[misc]
        """AdamW with cautious weight decay. Weight decay applies only to elements that the update has moved towards 0."""

        @torch.no_grad()
        def step(self) -> None:
            """Update the parameters."""
            decays = [group["weight_decay"] for group in self.param_groups]
            before = [[p.clone() for p in group["params"]] for group in self.param_groups]
            for group in self.param_groups:
                group["weight_decay"] = 0.0
            super().step()
            for group, decay, old in zip(self.param_groups, decays, before, strict=True):
                group["weight_decay"] = decay
                for p, was in zip(group["params"], old, strict=True):
                    p.sub_(was * (was * (was - p) >= 0), alpha=group["lr"] * decay)

    return Cautious


MOMENTS = {"adamw": ("exp_avg", "exp_avg_sq"), "adam": ("exp_avg", "exp_avg_sq"), "sgd": ("momentum_buffer",)}
Memory = Callable[[int], Tensor]  # from a number of elements to a zeroed float32 tensor of this size


@dataclass(frozen=True)
class UpdateRule:
    """How an optimizer updates parameters. Weight decay applies to tensors with two or more dimensions."""

    name: str  # adamw, adam, sgd (with momentum beta1), or muon or normuon: Muon for hidden matrices, AdamW for the rest
    weight_decay: float
    beta1: float
    beta2: float
    cautious: bool = False  # optim.cautious_decay
    momentum_warmup: int = 0  # optim.momentum_warmup
    hidden: Hidden = field(default_factory=Hidden)  # the hidden matrices, and the ranks that update them together
    # Whether to update also the zeros that pad a parameter in the buffer. The zeros stay 0. With this padding, torch computes all
    # elements of the parameter with SIMD instructions. Without the padding, torch rounds the last elements differently in AdamW.
    # Therefore, with `padded`, the bits do not depend on how tensor parallelism cuts a parameter.
    padded: bool = False

    def __post_init__(self) -> None:
        if self.name not in (*MOMENTS, *MATRIX_STATE):
            raise ValueError(f"unknown optimizer {self.name!r}")

    @property
    def matrices(self) -> frozenset[str]:
        """The names of the parameters that are updated as whole matrices."""
        return frozenset(self.hidden.names) if self.name in MATRIX_STATE else frozenset()

    @property
    def moments(self) -> tuple[str, ...]:
        """The names of the state tensors of parameters that are not in `matrices`."""
        return MOMENTS.get(self.name, MOMENTS["adamw"])

    def states(self, what: str) -> tuple[str, ...]:
        """Return the names of the state tensors of parameter `what`. Pure."""
        return MATRIX_STATE[self.name] if what in self.matrices else self.moments

    def torch_optimizer(self, members: list[torch.nn.Parameter], decays: bool) -> torch.optim.Optimizer:
        """Return torch's optimizer for parameters that are not hidden matrices. `decays`: whether weight decay applies.
        Independent."""
        decay = self.weight_decay if decays else 0.0
        if self.name == "sgd":
            return without_compiler(torch.optim.SGD)(members, lr=1.0, momentum=self.beta1, weight_decay=decay, fused=True)
        plain = without_compiler(torch.optim.Adam if self.name == "adam" else torch.optim.AdamW)
        kind = cautious_adamw() if self.cautious and decay else plain
        return kind(members, lr=0.0, betas=(self.beta1, self.beta2), eps=1e-8, weight_decay=decay, fused=True)

    def make(self, layout: FlatLayout, parameters: Tensor, gradients: Tensor, memory: Memory, **share: Any) -> Optimizer:
        """Return the `Optimizer` of this rule with these arguments. Collective over hidden.comm."""
        return Optimizer(self, layout, parameters, gradients, memory, **share)


class PieceOptimizer:
    """Updates this rank's share of the parameters in place. The share consists of pieces. A piece is a whole parameter, or a
    part of one. Muon updates the hidden matrices, and an optimizer of torch updates the other pieces."""

    def __init__(
        self, rule: UpdateRule, pieces: Sequence[tuple[torch.nn.Parameter, bool, dict[str, Tensor]]], matrices: list[HeldElements]
    ) -> None:
        """`pieces`: a tuple (piece with its gradient, whether weight decay applies, {key: state tensor}) for each piece.
        `matrices`: this rank's elements of the hidden matrices. Collective over rule.hidden.comm."""
        self.rule, self.updates = rule, 0
        self._steps: list[Tensor] = []  # torch has one step counter per parameter
        groups: dict[bool, list[torch.nn.Parameter]] = {}
        states = {piece: state for piece, _, state in pieces}
        for piece, decays, _ in pieces:
            groups.setdefault(decays, []).append(piece)
        self._parts = [rule.torch_optimizer(members, decays) for decays, members in groups.items()]
        for part, members in zip(self._parts, groups.values(), strict=True):
            for piece in members:
                part.state[piece].update(states[piece])
                if "exp_avg" in states[piece]:
                    self._steps.append(torch.zeros((), device=piece.device))
                    part.state[piece]["step"] = self._steps[-1]
        muon = (rule.name, rule.hidden, matrices, rule.weight_decay, rule.cautious, rule.momentum_warmup)
        self._muon = Muon(*muon) if rule.name in MATRIX_STATE else None

    def step(self, lr: float) -> None:
        """Update this rank's share of the parameters. Collective over rule.hidden.comm."""
        for part in self._parts:
            for group in part.param_groups:
                group["lr"] = lr
            part.step()
        if self._muon is not None:
            self._muon.step(lr, self.updates)
        self.updates += 1

    def set_updates(self, updates: int) -> None:
        """Set the number of updates made so far. Independent."""
        self.updates = updates
        for step in self._steps:
            step.fill_(updates)


class Optimizer(PieceOptimizer):
    """An optimizer of parameters, gradients and state in flat tensors. It updates one share of the parameters.

    Ranks that share memory update different shares. The result does not depend on how the parameters are divided into shares. The
    optimizers adamw, adam and sgd work element by element. The optimizers muon and normuon update whole matrices.
    """

    def __init__(
        self, rule: UpdateRule, layout: FlatLayout, parameters: Tensor, gradients: Tensor, memory: Memory | None = None,
        share: tuple[int, int] = (0, 1), bounds: list[int] | None = None, holds: range | None = None,
    ) -> None:
        """`parameters`, `gradients`: (num_elements,). `memory`: allocates the state. `share`: (index, count). This rank
        updates share number `index` of `count` shares. `bounds`: the count + 1 bounds of the shares. No bound is inside a
        hidden matrix. Without `bounds`, shares are cut at multiples of ALIGN, and hidden matrices are distributed by their
        cost. `holds`: the indices of the shares whose state this rank stores (default: all). With `holds`, the caller must
        save the state itself, without state_dict(). Collective over rule.hidden.comm."""
        self._layout = layout
        make = memory or (lambda elements: torch.zeros(elements, device=layout.device))
        matrices = _order(layout, rule.matrices)
        cuts = bounds or slice_bounds(layout.num_elements, share[1])
        self.held = range(cuts[holds.start], cuts[holds.stop]) if holds is not None else range(layout.num_elements)
        self.mine = range(cuts[share[0]], cuts[share[0] + 1])
        self.rule = rule
        self._moments = [make(len(self.held)) for _ in rule.moments]
        pieces: list[tuple[torch.nn.Parameter, bool, dict[str, Tensor]]] = []
        whole: list[HeldElements] = []
        for offset, what, p in layout.placed():
            end = offset + (round_up(p.numel(), ALIGN) if rule.padded and what not in matrices else p.numel())
            low, high = max(offset, self.mine.start), min(end, self.mine.stop)
            if what in matrices and bounds is None:
                low, high = offset, offset + (p.numel() if matrices[what] % share[1] == share[0] else 0)
            if low < high:
                shape = p.shape if what in matrices else (high - low,)
                piece = torch.nn.Parameter(parameters[low:high].view(shape))
                piece.grad = gradients[low:high].view(shape)
                state = self._state(what, low, piece)
                if what in matrices:
                    whole.append(HeldElements(piece, state, [rule.hidden.box(what, (0, 0), p.shape)]))
                else:
                    pieces.append((piece, p.dim() >= 2, state))
        super().__init__(rule, pieces, whole)

    def _state(self, what: str, low: int, piece: torch.nn.Parameter) -> dict[str, Tensor]:
        """Return {key: state tensor} of a piece of parameter `what`. The tensors are views of the flat state tensors, so ranks
        that share memory have one copy. `low`: index of the piece's first element in the flat parameters."""
        low -= self.held.start
        flats = zip(self.rule.states(what), self._moments, strict=False)
        return {key: flat[low : low + piece.numel()].view(piece.shape) for key, flat in flats}

    def moments(self) -> dict[str, Tensor]:
        """Return {name: flat state tensor}. A tensor has the shape (num_elements,), or with `holds` fewer elements."""
        return {f"/moment_{i}": flat for i, flat in enumerate(self._moments, 1)}

    def _views(self) -> Iterator[tuple[str, str, Tensor]]:
        """Yield (parameter name, key, state tensor) for each state tensor of each parameter."""
        whole = [self._layout.views(flat) for flat in self._moments]
        for i, (_, what, _) in enumerate(self._layout.placed()):
            for key, views in zip(self.rule.states(what), whole, strict=False):
                yield what, key, views[i]

    def state_dict(self) -> dict[str, Tensor]:
        """Return {parameter/key: state tensor} of all parameters, including parameters that other ranks update."""
        found = {f"{what}/{key}": view for what, key, view in self._views()}
        return found | {f"{what}/step": torch.tensor(float(self.updates)) for what, key, _ in self._views() if key == "exp_avg"}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load the state. Raises ValueError if an entry belongs to no parameter."""
        views = {f"{what}/{key}": view for what, key, view in self._views()}
        for entry, value in state.items():
            if entry.endswith("/step") and entry.removesuffix("step") + "exp_avg" in views:
                self.set_updates(int(value))
            elif entry not in views:
                raise ValueError(f"optimizer state {entry!r} belongs to no parameter of this model")
            else:
                views[entry].copy_(value.view_as(views[entry]))


@dataclass(frozen=True)
class RunOfElements:
    """Consecutive elements [low, high) of one parameter. One rank updates these elements (mesh.shard=2|3)."""

    name: str
    shape: tuple[int, ...]  # shape of the parameter
    low: int
    high: int
    elements: Tensor  # (high - low,), a part of the parameter; there may be zeros at the end (`padded` of Optimizer)
    gradient: Tensor  # with the shape of `elements`


class ShardedOptimizer(PieceOptimizer):
    """The optimizer of mesh.shard=2|3. It updates this rank's ranges of consecutive elements (strategies/sharded.py)."""

    def __init__(self, rule: UpdateRule, runs: Sequence[RunOfElements]) -> None:
        """`runs`: the ranges of consecutive elements that this rank updates, at most one of each parameter. Collective
        over rule.hidden.comm."""
        self.runs = runs
        self.state = [{key: torch.zeros_like(run.elements) for key in rule.states(run.name)} for run in runs]
        pieces, held = list[tuple[torch.nn.Parameter, bool, dict[str, Tensor]]](), list[HeldElements]()
        for run, state in zip(runs, self.state, strict=True):
            piece = torch.nn.Parameter(run.elements)
            piece.grad = run.gradient
            if run.name in rule.matrices:
                at = boxes_of_run(run.shape, run.low, run.high)
                held.append(HeldElements(piece, state, [rule.hidden.box(run.name, *one, run.shape) for one in at]))
            else:
                pieces.append((piece, len(run.shape) >= 2, state))
        super().__init__(rule, pieces, held)


def _order(layout: FlatLayout, matrices: Collection[str]) -> dict[str, int]:
    """Return {name: position} of the hidden matrices, where position 0 has the highest cost. The matrix at position i belongs to
    share number i mod (number of shares). Therefore all shares cost about the same."""
    found = [(p.numel() * min(p.shape), name) for _, name, p in layout.placed() if name in matrices]
    return {name: i for i, (_, name) in enumerate(sorted(found, reverse=True))}


def bounds_outside(layout: FlatLayout, count: int, multiple: int, matrices: Collection[str]) -> list[int]:
    """Return the count + 1 bounds of `count` slices of a flat tensor. Each bound is divisible by `multiple`, or is the number
    of elements. A bound that would be inside a parameter named in `matrices` is moved to the nearest possible index outside.
    Pure."""
    inside = [(offset, offset + p.numel()) for offset, name, p in layout.placed() if name in matrices]

    def moved(bound: int, down: bool) -> int:
        for low, high in reversed(inside) if down else inside:
            if low < bound < high:
                bound = low // multiple * multiple if down else -(-high // multiple) * multiple
        return min(bound, layout.num_elements)

    equal = slice_bounds(layout.num_elements, count, multiple)
    return [min(moved(bound, True), moved(bound, False), key=lambda one: abs(one - bound)) for bound in equal]
