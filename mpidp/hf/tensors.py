"""Describes the tensors in which the files of a model family store the parameters of the model. A tensor can hold several
parameters, or a transposed parameter. Pure, without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Place:
    """Describes which rows of a tensor contain a parameter. If `run` is 0, row r of the parameter is row start + r of the
    tensor. Otherwise, row r of the parameter is row start + (r // run) * stride + r % run of the tensor.

    name: the name of the tensor. transposed: True if the rows of the parameter are columns of the tensor. The formulas then
    apply to the transposed tensor. start: the row that contains row 0 of the parameter. run: the number of rows in a group of
    consecutive rows. stride: the number of rows of the tensor from the start of one group to the start of the next.
    """

    name: str
    transposed: bool = False
    start: int = 0
    run: int = 0
    stride: int = 0

    def slices(self, first: int, count: int) -> list[slice]:
        """Return the slices of the tensor's rows that contain `count` rows of the parameter, from row `first` on, in order.
        Pure."""
        if not self.run:
            return [slice(self.start + first, self.start + first + count)]
        found, row, end = [], first, first + count
        while row < end:
            upto = min(end, (row // self.run + 1) * self.run)
            at = self.start + row // self.run * self.stride + row % self.run
            found.append(slice(at, at + upto - row))
            row = upto
        return found


@dataclass(frozen=True)
class Layout:
    """The names of the tensors of a family, without .weight and .bias.

    prefix: the beginning of the names. If a model was saved without its head, the names lack the prefix. layer: the beginning
    of the names in a layer, with {} in place of the layer's number. outside: maps the name of a parameter outside the layers
    to the name of its tensor. inside: the same for a parameter inside a layer. fused: maps the name of a tensor that contains
    several parameters to the names of these parameters, in order. by_head: True if a fused tensor is ordered by head. It then
    starts with the rows of all its parameters for head 0, followed by the rows for head 1, and so on. transposed: the
    parameters that are stored transposed. ignored: name endings of tensors that are not parameters.
    """

    prefix: str
    layer: str
    outside: Mapping[str, str]
    inside: Mapping[str, str]
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    by_head: bool = False
    transposed: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ("rotary_emb.inv_freq",)

    def name(self, parameter: str) -> str:
        """Return the name of the tensor in which `parameter` is stored. Pure."""
        stem, _, kind = parameter.rpartition(".")
        if not stem.startswith("blocks."):
            return f"{self.outside[stem]}.{kind}"
        _, layer, inner = stem.split(".", 2)
        fused = next((name for name, members in self.fused.items() if inner in members), "")
        return f"{self.layer.format(layer)}.{fused or self.inside[inner]}.{kind}"

    def has(self, parameter: str) -> bool:
        """Return whether the family has a tensor for `parameter`. Pure."""
        stem = parameter.rpartition(".")[0]
        inner = stem.split(".", 2)[-1] if stem.startswith("blocks.") else ""
        return stem in self.outside or inner in self.inside or any(inner in members for members in self.fused.values())

    def places(self, sizes: Mapping[str, tuple[int, ...]], head_dim: int) -> dict[str, Place]:
        """Return {name: `Place` of the parameter in the family's tensors} for all parameters. sizes: the shapes of all
        parameters. head_dim: the size of a head. Pure."""
        found = {}
        for name in sizes:
            stem, _, kind = name.rpartition(".")
            inner = stem.split(".", 2)[-1] if stem.startswith("blocks.") else ""
            transposed = inner in self.transposed and kind == "weight"
            members = next((members for members in self.fused.values() if inner in members), ())
            base, at = name.removesuffix(f"{inner}.{kind}"), members.index(inner) if inner in members else 0
            if members and self.by_head:
                place = Place(self.name(name), transposed, at * head_dim, head_dim, len(members) * head_dim)
            else:
                before = sum(sizes[f"{base}{member}.{kind}"][0] for member in members[:at])
                place = Place(self.name(name), transposed, before)
            found[name] = place
        return found


def stored_sizes(sizes: Mapping[str, tuple[int, ...]], places: Mapping[str, Place]) -> dict[str, tuple[int, ...]]:
    """Return {name: shape} for the tensors in the files of this model family. sizes, places: the shape and the `Place` of each
    parameter. Pure."""
    found: dict[str, tuple[int, ...]] = {}
    for name, place in places.items():
        rows, *rest = sizes[name]
        if place.transposed:
            found[place.name] = (*rest, found.get(place.name, (0, 0))[-1] + rows)
        else:
            found[place.name] = (found.get(place.name, (0,))[0] + rows, *rest)
    return found
