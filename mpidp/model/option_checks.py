"""Checks each option of the Transformer, and whether options contradict each other. Pure, without torch."""

from __future__ import annotations

from collections.abc import Iterator

from mpidp.model.options import CHOICES, DEFAULTS, LETTERS
from mpidp.model.rope_scaling import rope_scaling
from mpidp.model.shape import TransformerShape

PROJECTIONS = ("q", "k", "v", "o")


def check_options(shape: TransformerShape) -> None:
    """Raise ValueError if an option is invalid or contradicts another option. Pure."""
    if problems := list(option_problems(shape)):
        raise ValueError("; ".join(problems))


def option_problems(shape: TransformerShape) -> Iterator[str]:
    """Yield a message for each option that is invalid or contradicts another option. Pure."""
    wrong = [name for name, plain in DEFAULTS.items() if type(getattr(shape, name)) is not type(plain)]
    if wrong:
        yield from (f"model.{name}={getattr(shape, name)!r} must be of type {type(DEFAULTS[name]).__name__}" for name in wrong)
        return
    for name, choices in CHOICES.items():
        if (value := getattr(shape, name)) not in choices:
            yield f"model.{name}={value!r} must be one of {', '.join(map(repr, choices))}"
    for name, letters in LETTERS.items():
        if set(value := getattr(shape, name)) - {*letters}:
            yield f"model.{name}={value!r} must have one letter per layer, {letters[0]!r} or {letters[1]!r}"
    if unknown := shape.biased() - {*PROJECTIONS, "gate", "up", "down"}:
        yield f"model.attention_bias={shape.attention_bias!r} names {', '.join(sorted(unknown))}. Use only 'q', 'k', 'v' and 'o'"
    for name in ("position_rows", "rotary_dims", "window", "window_rope_theta", "attention_scale", "attention_cap", "logit_cap"):
        if not 0 <= getattr(shape, name) < float("inf"):
            yield f"model.{name}={getattr(shape, name)} must be 0 or more"
    if shape.rotary_dims % 2 or shape.rotary_dims > shape.head_dim:
        yield f"model.rotary_dims={shape.rotary_dims} must be even and at most {shape.head_dim}, the head size"
    yield from _contradictions(shape)
    yield from scaling_problems("rope_scaling", shape.rope_scaling, shape.rotary_dims or shape.head_dim)
    yield from scaling_problems("window_rope_scaling", shape.window_rope_scaling, shape.rotary_dims or shape.head_dim)


def _contradictions(shape: TransformerShape) -> Iterator[str]:
    """Yield a message for each option that has no effect or no meaning with the other options."""
    changed = shape.changed()
    without = {
        "window_layers": ("model.window above 0", shape.window > 0),
        "window_rope_theta": ("model.window above 0", shape.window > 0),
        "window_rope_scaling": ("model.window_rope_theta above 0", shape.window_rope_theta > 0),
        "position_rows": ("model.positions=learned", shape.positions == "learned"),
        "rotary_dims": ("model.positions=rotary", shape.positions == "rotary"),
        "rotary_layers": ("model.positions=rotary", shape.positions == "rotary"),
        "parallel": ("model.norm_place=before", shape.norm_place == "before"),
    }
    for name, (needed, given) in without.items():
        if name in changed and not given:
            yield f"model.{name}={changed[name]} requires {needed}"
    if shape.positions == "learned" and shape.rope_scaling:
        yield f"model.rope_scaling={shape.rope_scaling} requires model.positions=rotary"
    if 0 < shape.position_rows < shape.seq_len:
        yield (
            f"model.seq_len={shape.seq_len} is more than model.position_rows={shape.position_rows}, the number of positions "
            f"that the model can encode. Use at most model.seq_len={shape.position_rows}"
        )


def scaling_problems(name: str, text: str, dims: int) -> Iterator[str]:
    """Yield a message if a rotary scaling is invalid or does not fit the model. name: the option that contains the scaling.
    text: its value. dims: number of rotated dimensions of a head. Pure."""
    try:
        scaling = rope_scaling(text)
    except ValueError as error:
        yield f"model.{name}={error}"
        return
    if scaling is not None and scaling.kind == "longrope" and len(scaling.short) != dims // 2:
        yield (
            f"model.{name} has {len(scaling.short)} short and {len(scaling.long)} long factors, but {dims} rotary dimensions "
            f"need {dims // 2} of each"
        )
