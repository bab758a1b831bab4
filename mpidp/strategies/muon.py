"""Muon (Jordan 2024) and NorMuon (Li 2025, arXiv 2510.05491) for the hidden matrices, which are all matrices except embeddings
and the head.

A rank computes momentum, weight decay and the update for the elements that it holds. Only the orthogonal update direction needs
the whole matrix, so one rank gathers the matrix and computes the direction (parallel/whole_matrices.py). Therefore optimizer
state and checkpoints are the same on every mesh.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mpidp.parallel.whole_matrices import Box, Hidden, Matrix, WholeMatrices
from mpidp.strategies.newton_schulz import orthogonalized

MATRIX_STATE = {"muon": ("momentum_buffer",), "normuon": ("momentum_buffer", "second_momentum_buffer")}
MOMENTUM = 0.95  # as in torch.optim.Muon, with Nesterov momentum
FIRST_MOMENTUM = 0.85  # momentum in the first step if optim.momentum_warmup is set
BETA2, EPS = 0.95, 1e-8  # decay and epsilon of NorMuon


@dataclass(frozen=True)
class HeldElements:
    """The elements of a hidden matrix that a rank updates: the whole matrix, or consecutive elements of it. Consecutive
    elements form at most three boxes (rectangular blocks of the matrix)."""

    parameter: torch.nn.Parameter  # with the gradient in .grad
    state: dict[str, Tensor]  # named as in MATRIX_STATE, with the shape of the parameter
    boxes: Sequence[Box]  # the boxes of the elements, in order

    def cut(self, tensor: Tensor) -> dict[Box, Tensor]:
        """Return {box: view of `tensor`} for every box (rectangular block) of the elements. `tensor` has the parameter's
        shape. Pure."""
        views = tensor.view(-1).split([box.size[0] * box.size[1] for box in self.boxes])
        return {box: view.view(box.size) for box, view in zip(self.boxes, views, strict=True)}

    def joined(self, of_boxes: Sequence[Tensor]) -> Tensor:
        """Join the tensors `of_boxes`, one for each box, into a tensor of the parameter's shape, and return it. Pure."""
        if len(of_boxes) == 1 and of_boxes[0].shape == self.parameter.shape:
            return of_boxes[0]
        return torch.cat([one.reshape(-1) for one in of_boxes]).view_as(self.parameter)


class Muon:
    """Updates the elements of hidden matrices that this rank holds."""

    def __init__(
        self, name: str, hidden: Hidden, held: Sequence[HeldElements], weight_decay: float, cautious: bool = False,
        warmup: int = 0,
    ) -> None:
        """`name`: muon or normuon. `hidden`: all hidden matrices, and the ranks that update them. `held`: the elements of this
        rank. In the second state tensor of NorMuon, all elements of a row have the same value. `cautious`: decay only elements
        that the update moves towards 0. `warmup`: number of updates in which the momentum rises to its final value. Collective
        over hidden.comm."""
        self._name, self._decay, self._cautious, self._warmup = name, weight_decay, cautious, warmup
        self._momentum = MOMENTUM
        self._held = {one.boxes[0].name: one for one in held}
        self._matrices = WholeMatrices(hidden, [box for one in held for box in one.boxes], len(MATRIX_STATE[name]))

    @torch.no_grad()
    def step(self, lr: float, updates: int) -> None:
        """Update the elements. `updates`: number of earlier updates. Collective over hidden.comm.

        The update is lr * 0.2 sqrt(max(m, n)) times the orthogonal matrix (m, n). This factor makes the elements about as large
        as in an update of AdamW (Liu 2025, "Muon is Scalable for LLM Training")."""
        warm = min(1.0, updates / self._warmup) if self._warmup else 1.0
        self._momentum = FIRST_MOMENTUM + (MOMENTUM - FIRST_MOMENTUM) * warm if warm < 1.0 else MOMENTUM
        for now in self._matrices.rounds:
            held = [self._held[name] for name in dict.fromkeys(box.name for box in now.held)]
            pieces = {box: matrix for one in held for box, matrix in self._direction(one).items()}
            found = self._matrices.compute(now, pieces, self._orthogonal)
            for one in held:
                self._apply(one, [found[box] for box in one.boxes], lr)

    def _direction(self, held: HeldElements) -> dict[Box, Matrix]:
        momentum, *seconds = held.state.values()
        assert held.parameter.grad is not None
        momentum.lerp_(held.parameter.grad, 1 - self._momentum)
        found = {box: [one] for box, one in held.cut(held.parameter.grad.lerp(momentum, self._momentum)).items()}
        for second in seconds:
            for box, one in held.cut(second).items():
                found[box].append(one[:, :1])
        return found

    def _orthogonal(self, matrices: list[tuple[str, Matrix]]) -> list[Matrix]:
        """Return [orthogonal update (m, n)] for each whole matrix. With NorMuon, a result is [update (m, n), new second moment
        (m, 1)]."""
        found = orthogonalized([matrix[0] for _, matrix in matrices])
        if self._name == "muon":
            return [[one] for one in found]
        return [normalized(one, matrix[1]) for one, (_, matrix) in zip(found, matrices, strict=True)]

    def _apply(self, held: HeldElements, results: Sequence[Matrix], lr: float) -> None:
        p, update = held.parameter, held.joined([result[0] for result in results])
        if self._cautious:
            decay_towards_zero(p, update, lr * self._decay)
        else:
            p.mul_(1 - lr * self._decay)
        p.add_(update, alpha=-lr * 0.2 * math.sqrt(max(held.boxes[0].shape)))
        for second in list(held.state.values())[1:]:
            for (box, view), result in zip(held.cut(second).items(), results, strict=True):
                view.copy_(result[1].expand(box.size))


def decay_towards_zero(p: Tensor, update: Tensor, rate: float) -> None:
    """Apply cautious weight decay to `p` (Chen 2025, arXiv 2510.12402): multiply some elements by 1 - rate. These are the
    elements that move towards 0 when the caller subtracts `update` from `p`. Pure, except for p."""
    p.sub_(p * (p * update >= 0), alpha=rate)


def normalized(update: Tensor, second: Tensor) -> Matrix:
    """Return NorMuon's update (m, n) and its new second moment (m, 1) (algorithm 1). The second moment is a moving average of
    each row's mean square. Each row of the orthogonal matrix is divided by the square root of the second moment. Then all rows
    are scaled by one factor, so that the root mean square of the elements is that of an orthogonal matrix. `update`: the
    orthogonal matrix (m, n). `second`: the second moment (m, 1). Pure."""
    wide = update.float().contiguous()  # a sum over strided rows would have other bits
    second = second.lerp(wide.square().mean(1, keepdim=True), 1 - BETA2)
    rows = wide / (second.sqrt() + EPS)
    norm = torch.linalg.vector_norm(torch.linalg.vector_norm(rows, dim=1))
    return [rows * (math.sqrt(min(rows.shape)) / norm.clamp(min=EPS)), second]
