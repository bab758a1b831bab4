"""torch's optimizers over flat parameters and over shards."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from mpidp.comm.slices import ALIGN, slice_bounds
from mpidp.reducers.buckets import FlatLayout


def without_compiler(kind: type[torch.optim.Optimizer]) -> Any:
    """Return the optimizer class without its torch.compile wrappers. The wrappers would import torch._dynamo in every process,
    which takes about one second and 70 MB. Independent."""
    plain = {"add_param_group": inspect.unwrap(kind.add_param_group), "step": torch.no_grad()(inspect.unwrap(kind.step))}
    return type(kind.__name__, (kind,), plain)


def make_torch_optimizer(
    name: str, members: list[torch.nn.Parameter], decay: float, beta1: float, beta2: float
) -> torch.optim.Optimizer:
    """Return the torch optimizer for optim.name. Independent."""
    kind = without_compiler
    if name == "muon":
        return kind(torch.optim.Muon)(members, lr=0.0, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
    if name == "sgd":
        return kind(torch.optim.SGD)(members, lr=1.0, momentum=beta1, weight_decay=decay, fused=True)
    adam = torch.optim.Adam if name == "adam" else torch.optim.AdamW
    return kind(adam)(members, lr=0.0, betas=(beta1, beta2), eps=1e-8, weight_decay=decay, fused=True)


MOMENTS = {"adamw": ("exp_avg", "exp_avg_sq"), "adam": ("exp_avg", "exp_avg_sq"), "sgd": ("momentum_buffer",)}
Memory = Callable[[int], Tensor]  # takes a number of elements, and returns a zeroed float32 tensor of this size


class Optimizer:
    """A torch optimizer over flat parameters, gradients and state tensors. This rank updates its share of the parameters.
    Independent.

    Ranks that share memory update one share of the parameters each. The result does not depend on the shares. adamw, adam and sgd
    work element by element, and their shares are cut at multiples of ALIGN. A share of muon consists of whole matrices.
    """

    def __init__(
        self, name: str, layout: FlatLayout, parameters: Tensor, gradients: Tensor, weight_decay: float, beta1: float,
        beta2: float, memory: Memory | None = None, share: tuple[int, int] = (0, 1), multiple: int = ALIGN,
        holds: range | None = None,
    ) -> None:
        """Weight decay applies to tensors with two or more dimensions. name: adamw, adam, sgd (with momentum beta1) or muon. muon
        uses torch's Muon for the hidden matrices and AdamW for the other parameters. Muon's updates are scaled to the size of
        AdamW's updates, so that both can use one learning rate. parameters, gradients: (num_elements,). share: (index, count) of
        the share that this rank updates; shares are cut at multiples of `multiple` elements. holds: the indices of the shares
        whose state this rank stores (default: all). With `holds`, the caller saves the state, and muon is not supported."""
        if name not in (*MOMENTS, "muon"):
            raise ValueError(f"unknown optimizer {name!r}")
        self._layout, self._name = layout, name
        make = memory or (lambda elements: torch.zeros(elements, device=layout.device))
        self.updates = 0
        self._steps: list[Tensor] = []  # torch has one step counter per parameter
        self._matrices = _hidden_matrices(layout) if name == "muon" else {}
        bounds = slice_bounds(layout.num_elements, share[1], multiple)
        self.held = range(bounds[holds.start], bounds[holds.stop]) if holds is not None else range(layout.num_elements)
        self.mine = range(bounds[share[0]], bounds[share[0] + 1])
        self.keys = MOMENTS.get(name, MOMENTS["adamw"])
        self._moments = [make(len(self.held)) for _ in self.keys]
        groups: dict[tuple[bool, bool], list[torch.nn.Parameter]] = {}
        for offset, what, p in layout.placed():
            low, high = max(offset, bounds[share[0]]), min(offset + p.numel(), bounds[share[0] + 1])
            if what in self._matrices:
                low, high = offset, offset + (p.numel() if self._matrices[what] % share[1] == share[0] else 0)
            if low < high:
                shape = p.shape if what in self._matrices else (high - low,)
                piece = torch.nn.Parameter(parameters[low:high].view(shape))
                piece.grad = gradients[low:high].view(shape)
                groups.setdefault((what in self._matrices, p.dim() >= 2), []).append(piece)
        self._parts = [self._part(*kind, members, weight_decay, beta1, beta2) for kind, members in groups.items()]
        for part, ((muon, _), members) in zip(self._parts, groups.items(), strict=True):
            for piece in members:
                self._give_state(part, piece, muon, parameters)

    def _part(
        self, muon: bool, decays: bool, members: list[torch.nn.Parameter], weight_decay: float, beta1: float, beta2: float
    ) -> torch.optim.Optimizer:
        kind = ("muon" if muon else "adamw") if self._name == "muon" else self._name
        return make_torch_optimizer(kind, members, weight_decay if decays else 0.0, beta1, beta2)

    def _give_state(self, part: torch.optim.Optimizer, piece: torch.nn.Parameter, muon: bool, parameters: Tensor) -> None:
        """Make the state of a piece of a parameter views of the flat state tensors, so that ranks that share memory have one
        copy."""
        low = (piece.data_ptr() - parameters.data_ptr()) // 4 - self.held.start
        names = ("momentum_buffer",) if muon else MOMENTS.get(self._name, MOMENTS["adamw"])
        state = part.state[piece]
        for key, flat in zip(names, self._moments, strict=False):
            state[key] = flat[low : low + piece.numel()].view(piece.shape)
        if "exp_avg" in state:
            state["step"] = torch.zeros((), device=piece.device)
            self._steps.append(state["step"])

    def step(self, lr: float) -> None:
        """Update this rank's share of the parameters."""
        for part in self._parts:
            for group in part.param_groups:
                group["lr"] = lr
            part.step()
        self.updates += 1

    def set_updates(self, updates: int) -> None:
        """Set the number of updates made so far."""
        self.updates = updates
        for step in self._steps:
            step.fill_(updates)

    def moments(self) -> dict[str, Tensor]:
        """Return the flat state tensors (num_elements,) by name."""
        return {f"/moment_{i}": flat for i, flat in enumerate(self._moments, 1)}

    def _views(self) -> Iterator[tuple[str, str, Tensor]]:
        """Yield (parameter name, key, state tensor of the whole parameter)."""
        whole = [self._layout.views(flat) for flat in self._moments]
        for i, (_, what, _) in enumerate(self._layout.placed()):
            names = ("momentum_buffer",) if what in self._matrices else MOMENTS.get(self._name, MOMENTS["adamw"])
            for key, views in zip(names, whole, strict=False):
                yield what, key, views[i]

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state tensors of all parameters, by `parameter/key`. This includes parameters that other ranks update."""
        found = {f"{what}/{key}": view for what, key, view in self._views()}
        return found | {f"{what}/step": torch.tensor(float(self.updates)) for what, key, _ in self._views() if key == "exp_avg"}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load the state. Raises ValueError for an entry that belongs to no parameter."""
        views = {f"{what}/{key}": view for what, key, view in self._views()}
        for entry, value in state.items():
            if entry.endswith("/step") and entry.removesuffix("step") + "exp_avg" in views:
                self.set_updates(int(value))
            elif entry not in views:
                raise ValueError(f"optimizer state {entry!r} belongs to no parameter of this model")
            else:
                views[entry].copy_(value.view_as(views[entry]))


class ShardedOptimizer:
    """A torch optimizer over shards of parameters. Each shard is a separate tensor (strategies/sharded.py). Independent."""

    def __init__(
        self, name: str, pieces: list[tuple[str, Tensor, bool]], weight_decay: float, beta1: float, beta2: float
    ) -> None:
        """name: adamw, adam or sgd. pieces: (parameter name, this rank's shard, whether weight decay applies)."""
        self.updates = 0
        self._pieces = [torch.nn.Parameter(piece) for _, piece, _ in pieces]
        self.state = [{key: torch.zeros_like(piece) for key in MOMENTS[name]} for piece in self._pieces]
        self._steps: list[Tensor] = []
        self._parts = []
        for decays in (True, False):
            mine = [i for i, (_, piece, does) in enumerate(pieces) if does == decays and piece.numel()]
            if mine:
                members = [self._pieces[i] for i in mine]
                self._parts.append(make_torch_optimizer(name, members, weight_decay if decays else 0.0, beta1, beta2))
                for i in mine:
                    self._parts[-1].state[self._pieces[i]].update(self.state[i])
                    if "exp_avg" in self.state[i]:
                        self._steps.append(torch.zeros((), device=self._pieces[i].device))
                        self._parts[-1].state[self._pieces[i]]["step"] = self._steps[-1]

    def step(self, gradients: list[Tensor], lr: float) -> None:
        """Update the shards with these gradients."""
        for piece, gradient in zip(self._pieces, gradients, strict=True):
            piece.grad = gradient
        for part in self._parts:
            for group in part.param_groups:
                group["lr"] = lr
            part.step()
        for piece in self._pieces:
            piece.grad = None
        self.updates += 1

    def set_updates(self, updates: int) -> None:
        """Set the number of updates made so far."""
        self.updates = updates
        for step in self._steps:
            step.fill_(updates)


def _hidden_matrices(layout: FlatLayout) -> dict[str, int]:
    """Return the names of the matrices that Muon updates, with their positions in the order of decreasing cost. If the matrices
    are dealt to the shares in this order, all shares cost about the same."""
    outer = ("embedding.weight", "head.weight", "positions.weight")
    hidden = [(p.numel() * min(p.shape), name) for _, name, p in layout.placed() if p.dim() == 2 and not name.endswith(outer)]
    return {name: i for i, (_, name) in enumerate(sorted(hidden, reverse=True))}
