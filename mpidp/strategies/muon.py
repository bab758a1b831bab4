"""Muon (Jordan 2024) and NorMuon (Li 2025, arXiv 2510.05491) for matrices, or boxes of matrices, on one or several ranks.

A rank computes momentum, weight decay and the update element by element, on the boxes that it holds. Only the update direction of
a matrix is gathered on one rank, which makes the whole matrix orthogonal (parallel/whole_matrices.py). Therefore optimizer state
and checkpoints are the same on every mesh.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mpidp.parallel.whole_matrices import Box, Hidden, Matrix, WholeMatrices
from mpidp.strategies.newton_schulz import orthogonalized

MATRIX_STATE = {"muon": ("momentum_buffer",), "normuon": ("momentum_buffer", "second_momentum_buffer")}
MOMENTUM = 0.95  # as in torch.optim.Muon, with Nesterov momentum
FIRST_MOMENTUM = 0.85  # momentum in the first step if optim.momentum_warmup is set
BETA2, EPS = 0.95, 1e-8  # decay and epsilon of NorMuon


class Muon:
    """Updates this rank's boxes of hidden matrices."""

    def __init__(
        self, name: str, hidden: Hidden, held: Sequence[tuple[Box, torch.nn.Parameter, dict[str, Tensor]]],
        weight_decay: float, cautious: bool = False, warmup: int = 0,
    ) -> None:
        """name: muon or normuon. held: the boxes of this rank. Each has a parameter, with the gradient in .grad, and state
        tensors, which are named as in MATRIX_STATE and have the shape of the box. The second state of NorMuon has one value per
        row, which is repeated along the row. cautious: decay only elements that the update moves towards 0. warmup: number of
        updates over which the momentum rises to its final value. Collective over hidden.comm."""
        self._name, self._decay, self._cautious, self._warmup = name, weight_decay, cautious, warmup
        self._momentum = MOMENTUM
        self._held = {box.name: (p, state) for box, p, state in held}
        self._matrices = WholeMatrices(hidden, [box for box, _, _ in held], len(MATRIX_STATE[name]))
        self._shapes = {box.name: box.shape for box, _, _ in held}

    @torch.no_grad()
    def step(self, lr: float, updates: int) -> None:
        """Update the boxes. updates: number of earlier updates. Collective over hidden.comm.

        The update is 0.2 sqrt(max(m, n)) times the orthogonal matrix, so its elements are about as large as AdamW's (Liu 2025,
        "Muon is Scalable for LLM Training")."""
        warm = min(1.0, updates / self._warmup) if self._warmup else 1.0
        self._momentum = FIRST_MOMENTUM + (MOMENTUM - FIRST_MOMENTUM) * warm if warm < 1.0 else MOMENTUM
        for now in self._matrices.rounds:
            pieces = {box.name: self._direction(box.name) for box in now.held}
            found = self._matrices.compute(now, pieces, self._orthogonal)
            for name, result in found.items():
                self._apply(name, result, lr)

    def _direction(self, name: str) -> Matrix:
        p, state = self._held[name]
        assert p.grad is not None
        state["momentum_buffer"].lerp_(p.grad, 1 - self._momentum)
        return [p.grad.lerp(state["momentum_buffer"], self._momentum), *(second[:, :1] for second in list(state.values())[1:])]

    def _orthogonal(self, matrices: list[tuple[str, Matrix]]) -> list[Matrix]:
        """Return the updates of whole matrices, and with NorMuon also the new second moments (m, 1)."""
        found = orthogonalized([matrix[0] for _, matrix in matrices])
        if self._name == "muon":
            return [[one] for one in found]
        return [normalized(one, matrix[1]) for one, (_, matrix) in zip(found, matrices, strict=True)]

    def _apply(self, name: str, result: Matrix, lr: float) -> None:
        p, state = self._held[name]
        if self._cautious:
            decay_towards_zero(p, result[0], lr * self._decay)
        else:
            p.mul_(1 - lr * self._decay)
        p.add_(result[0], alpha=-lr * 0.2 * math.sqrt(max(self._shapes[name])))
        if len(result) > 1:
            state["second_momentum_buffer"].copy_(result[1].expand_as(p))


def decay_towards_zero(p: Tensor, update: Tensor, rate: float) -> None:
    """Subtract rate p from the elements of p that have the sign of the update, which will be subtracted (cautious weight decay,
    Chen 2025, arXiv 2510.12402). Pure, except for p."""
    p.sub_(p * (p * update >= 0), alpha=rate)


def normalized(update: Tensor, second: Tensor) -> Matrix:
    """Return [update, second moment] of NorMuon (algorithm 1). Each row of the orthogonal matrix is divided by the square root of
    the moving average of its mean square. Then all rows are scaled by one factor, so that the root mean square of the elements is
    that of an orthogonal matrix. update: (m, n). second: (m, 1). Pure."""
    wide = update.float().contiguous()  # a sum over strided rows would have other bits
    second = second.lerp(wide.square().mean(1, keepdim=True), 1 - BETA2)
    rows = wide / (second.sqrt() + EPS)
    norm = torch.linalg.vector_norm(torch.linalg.vector_norm(rows, dim=1))
    return [rows * (math.sqrt(min(rows.shape)) / norm.clamp(min=EPS)), second]
