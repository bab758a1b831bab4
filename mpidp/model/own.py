"""A user's own model: model.kind=MODULE:FACTORY. Pure torch; it knows nothing of MPI.

FACTORY is a class derived from nn.Module, or a function whose return annotation is one: a name in a RUN that somebody else gave
you cannot call anything else. It is called with keyword arguments: vocab_size and those settings of section model that it names
(seq_len, num_layers, model_dim, dropout, ...), and what model.options says. What it gives maps tokens (B, T) int64,
1 <= T <= seq_len, to logits (B, T, V) of the next token, of which none may depend on a later token.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import typing
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mpidp.errors import UsageError
from mpidp.model.part import Part, whole
from mpidp.model.shape import OwnShape


class Own(nn.Module):
    """The user's model behind the calls of ours: tokens (B, T) -> logits (B, T, V). Its parameters keep the user's names."""

    recompute = False

    def new_cache(self, positions: int) -> None:
        """None: it is generated from without one. Independent."""

    def __init__(self, shape: OwnShape, seed: int = 0, part: Part | None = None) -> None:
        """The factory is called with torch's generator at this seed. UsageError when it fails."""
        super().__init__()
        self.shape, self.part = shape, part or whole(shape)
        self.own = _make(shape.factory, shape.arguments, seed)

    def named_parameters(self, *args: Any, **more: Any) -> Any:
        """Of the user's model, by its own names. Independent."""
        return self.own.named_parameters(*args, **more)

    def forward(
        self, x: Tensor, positions: Tensor | None = None, doc_ids: Tensor | None = None, key: Tensor | None = None
    ) -> Tensor:
        """x: (B, T) int64. key: torch's generators are set to it, so that what forward draws (dropout) belongs to the micro-batch
        and not to a rank. doc_ids: UsageError when given."""
        if doc_ids is not None:
            raise UsageError.on_every_rank(
                f"model.kind={self.shape.factory} on packed documents: the model is not told where one ends. Prepare the data "
                "without packing"
            )
        if key is not None:
            set_generator(int(key), x.device)
        return self.own(x)

    def facts(self) -> dict[str, str]:
        """What must be the same on every rank besides parameters, of which all get rank 0's. Independent."""
        found = {}
        for name, buffer in self.own.named_buffers():
            found[f"buffer {name}"] = hashlib.sha256(repr(buffer.tolist()).encode()).hexdigest()[:16]
        return found


def set_generator(key: int, device: torch.device) -> None:
    """torch's, of the CPU and of this device: torch.manual_seed would keep a call for every device that is not used.
    Independent."""
    torch.default_generator.manual_seed(key)
    if device.type == "cuda":
        torch.cuda.manual_seed(key)


def shape_of(kind: str, settings: Mapping[str, Any], changed: Mapping[str, Any], vocab_size: int, seed: int) -> OwnShape:
    """Make the model once, and try it. settings: of section model, by name, of which these were changed from their defaults.
    UsageError for what cannot be trained. Independent."""
    options = options_of(settings["options"])
    known = {key: value for key, value in settings.items() if key not in ("kind", "options")} | {"vocab_size": vocab_size}
    if twice := sorted(set(options) & set(known)):
        raise UsageError(f"model.options gives {twice[0]}, which is a setting: --model.{twice[0]}=VALUE")
    parameters = inspect.signature(_find(kind)).parameters.values()
    everything = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
    names = [p.name for p in parameters if p.kind in (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)]
    asked = {f"model.{key}": value for key, value in changed.items() if key not in ("kind", "options", "seq_len")}
    for key, value in asked.items() | {f"model.options={key}": value for key, value in options.items()}.items():
        if not everything and key.replace("=", ".").rpartition(".")[2] not in names:
            raise UsageError(f"{key}={value}, but {kind} takes no such argument: it takes {', '.join(names) or 'none'}")
    arguments = {key: value for key, value in (known | options).items() if everything or key in names}
    model = _make(kind, arguments, seed)
    _check_parameters(kind, model)
    _try(kind, model, vocab_size, settings["seq_len"])
    return OwnShape(vocab_size, settings["seq_len"], kind, arguments, [(n, list(p.shape)) for n, p in model.named_parameters()])


def options_of(text: str) -> dict[str, Any]:
    """model.options, "width=64,act=gelu": values that are whole numbers, numbers, true or false become that. UsageError. Pure."""
    found: dict[str, Any] = {}
    for word in filter(None, (part.strip() for part in text.split(","))):
        key, equals, raw = (part.strip() for part in word.partition("="))
        if not equals or not key.isidentifier():
            raise UsageError(f"model.options={text!r}: {word!r} is not NAME=VALUE")
        found[key] = _value(raw)
    return found


def _value(raw: str) -> Any:
    if raw in ("true", "false"):
        return raw == "true"
    for kind in (int, float):
        try:
            return kind(raw)
        except ValueError:
            continue
    return raw


def _find(kind: str) -> Callable[..., nn.Module]:
    """What model.kind names. UsageError. Independent."""
    module, _, name = kind.partition(":")
    try:
        factory = getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError as error:
        ours = error.name is not None and f"{module}.".startswith(f"{error.name}.")
        mend = "start where it lies, or put its folder on PYTHONPATH" if ours else f"which {module} imports: install it"
        raise UsageError(f"model.kind={kind}: there is no module {error.name!r}: {mend}") from error
    except Exception as error:
        raise UsageError(f"model.kind={kind}: importing {module} failed: {type(error).__name__}: {error}") from error
    if not callable(factory):
        said = "has no such name" if factory is None else f"has a {type(factory).__name__} of that name, which cannot be called"
        raise UsageError(f"model.kind={kind}: module {module} {said}")
    try:
        made = factory if inspect.isclass(factory) else typing.get_type_hints(factory).get("return")
    except Exception:  # an annotation that means nothing here
        made = None
    if not (inspect.isclass(made) and issubclass(made, nn.Module)):
        raise UsageError(
            f"model.kind={kind}: must be a class derived from torch.nn.Module, or a function with such a return annotation: "
            f"def {name}(vocab_size, ...) -> torch.nn.Module"
        )
    return factory  # type: ignore[no-any-return]


def _make(kind: str, arguments: Mapping[str, Any], seed: int) -> nn.Module:
    factory = _find(kind)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model = factory(**arguments)
        except UsageError:
            raise
        except Exception as error:
            given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
            raise UsageError(f"model.kind={kind}: called with {given} it failed: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise UsageError(f"model.kind={kind} gave a {type(model).__name__}, not a torch.nn.Module")
    return model


def _check_parameters(kind: str, model: nn.Module) -> None:
    for name, p in model.named_parameters():
        wrong = ""
        if nn.parameter.is_lazy(p):
            wrong = "is lazy: give its size"
        elif p.dtype != torch.float32:
            wrong = f"is {p.dtype}, not float32 (train.dtype=bfloat16 casts in products)"
        elif not p.requires_grad:
            wrong = "does not require a gradient: make it a buffer"
        if wrong:
            raise UsageError(f"model.kind={kind}: parameter {name} {wrong}")
    if not any(True for _ in model.parameters()):
        raise UsageError(f"model.kind={kind}: the model has no parameters")


def _try(kind: str, model: nn.Module, vocab_size: int, seq_len: int) -> None:
    """Forward in training and in evaluation. UsageError for logits of another size, without gradient, or that look ahead, and for
    buffers that training changes: they would be of the micro-batches that a rank happened to compute."""
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    tokens = torch.arange(2 * seq_len).view(2, seq_len) % vocab_size
    if not _logits(kind, model.train(), tokens, vocab_size).requires_grad:
        raise UsageError(f"model.kind={kind}: its logits have no gradient")
    changed = [name for name, buffer in model.named_buffers() if name not in before or not torch.equal(buffer, before[name])]
    if changed:
        raise UsageError(
            f"model.kind={kind}: forward changes the buffer {changed[0]}. Ranks see different micro-batches, so such running "
            "figures (of BatchNorm) would differ and depend on the number of ranks: use LayerNorm or GroupNorm, or BatchNorm "
            "with track_running_stats=False"
        )
    with torch.no_grad():
        _logits(kind, model.eval(), tokens[:1, :1], vocab_size)
        if seq_len > 1 and vocab_size > 1:
            other = tokens.clone()
            other[:, -1] = (other[:, -1] + 1) % vocab_size
            one, two = (_logits(kind, model, t, vocab_size)[:, :-1].float() for t in (tokens, other))
            if not torch.allclose(one, two, rtol=1e-4, atol=1e-5):
                raise UsageError(
                    f"model.kind={kind}: its logits depend on later tokens, which they are to foretell: mask those (causal)"
                )


def _logits(kind: str, model: nn.Module, tokens: Tensor, vocab_size: int) -> Tensor:
    size = tuple(tokens.shape)
    try:
        logits = model(tokens)
    except Exception as error:
        raise UsageError(f"model.kind={kind}: on tokens {size} it failed: {type(error).__name__}: {error}") from error
    found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if found != (*size, vocab_size) or not logits.is_floating_point():
        raise UsageError(
            f"model.kind={kind}: tokens {size} became {found}; logits {(*size, vocab_size)} are wanted, for each of the "
            f"{vocab_size} tokens of the vocabulary at each position"
        )
    return logits
