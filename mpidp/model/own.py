"""Custom models: model.kind=MODULE:FACTORY. Pure torch, no MPI.

FACTORY is a subclass of nn.Module, or a function whose return annotation is such a class. It is called with keyword arguments.
These are vocab_size, the arguments in model.options, and those settings `model.*` that FACTORY accepts (seq_len, num_layers,
model_dim, dropout, ...). The model maps tokens (B, T) int64, 1 <= T <= seq_len, to logits (B, T, V) of the next token. Logits
must not depend on later tokens. Importing MODULE executes its code. For the folder of a run from an untrusted source, call
kinds.check_named() first.
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
from mpidp.model.options import DEFAULTS as OPTIONS
from mpidp.model.part import Part, whole
from mpidp.model.shape import CustomShape


class CustomModel(nn.Module):
    """Gives the user's model the interface of mpidp's models. It maps tokens (B, T) to logits (B, T, V).

    Parameters keep their names.
    """

    recompute = False

    def new_cache(self, positions: int) -> None:
        """Return None, because custom models generate without a cache. Independent."""

    def __init__(self, shape: CustomShape, seed: int = 0, part: Part | None = None) -> None:
        """Call the factory. torch's generator has the seed `seed` during this call. Raises UsageError if the factory fails."""
        super().__init__()
        self.shape, self.part = shape, part or whole(shape)
        self.own = _make(shape.factory, shape.arguments, seed)

    def named_parameters(self, *args: Any, **more: Any) -> Any:
        """Yield (name, parameter) of the user's model. Names have no prefix. Independent."""
        return self.own.named_parameters(*args, **more)

    def forward(
        self, x: Tensor, positions: Tensor | None = None, doc_ids: Tensor | None = None, key: Tensor | None = None
    ) -> Tensor:
        """Return logits (B, T, V) for tokens x (B, T) int64.

        key: a seed for torch's generators, or None. It makes random numbers (dropout) independent of the rank. positions:
        ignored. Raises UsageError if doc_ids is given, because packed documents are not supported.
        """
        if doc_ids is not None:
            raise UsageError.on_every_rank(f"model.kind={self.shape.factory}: custom models do not support packed documents. "
                                           "Prepare the data without packing")
        if key is not None:
            set_generator(int(key), x.device)
        return self.own(x)

    def facts(self) -> dict[str, str]:
        """Return {name: hash} for the buffers of the model. Buffers are not broadcast, so ranks compare these hashes.
        Independent."""
        found = {}
        for name, buffer in self.own.named_buffers():
            found[f"buffer {name}"] = hashlib.sha256(repr(buffer.tolist()).encode()).hexdigest()[:16]
        return found


def set_generator(key: int, device: torch.device) -> None:
    """Seed torch's generators of the CPU and of `device` with `key`. Independent."""
    torch.default_generator.manual_seed(key)
    if device.type == "cuda":
        torch.cuda.manual_seed(key)


def shape_of(kind: str, settings: Mapping[str, Any], changed: Mapping[str, Any], vocab_size: int, seed: int) -> CustomShape:
    """Make the model once, test it, and return its shape.

    settings: all settings `model.*`, by name without this prefix. changed: the settings that differ from their defaults.
    Raises UsageError if the model cannot be trained. Independent.
    """
    options = options_of(settings["options"])
    unused = {"kind", "options", *(OPTIONS.keys() - changed.keys())}  # unchanged options of the Transformer are not passed on
    known = {key: value for key, value in settings.items() if key not in unused} | {"vocab_size": vocab_size}
    if twice := sorted(set(options) & set(known)):
        raise UsageError(f"model.options contains {twice[0]}, which is a setting of its own. Use --model.{twice[0]}=VALUE")
    parameters = inspect.signature(_find(kind)).parameters.values()
    everything = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
    names = [p.name for p in parameters if p.kind in (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)]
    chosen = {f"model.{key}": value for key, value in changed.items() if key not in ("kind", "options", "seq_len")}
    for key, value in chosen.items() | {f"model.options={key}": value for key, value in options.items()}.items():
        if not everything and key.replace("=", ".").rpartition(".")[2] not in names:
            raise UsageError(f"{key}={value}, but {kind} has no such argument. Its arguments: {', '.join(names) or 'none'}")
    arguments = {key: value for key, value in (known | options).items() if everything or key in names}
    model = _make(kind, arguments, seed)
    _check_parameters(kind, model)
    _try(kind, model, vocab_size, settings["seq_len"])
    sizes = [(name, list(p.shape)) for name, p in model.named_parameters()]
    return CustomShape(vocab_size, settings["seq_len"], kind, arguments, sizes)


def options_of(text: str) -> dict[str, Any]:
    """Return the arguments in model.options, by name. An example of `text` is "width=64,act=gelu". A value that is a number,
    true or false is converted. Pure.

    Raises UsageError if an entry is not NAME=VALUE.
    """
    found: dict[str, Any] = {}
    for option in filter(None, (part.strip() for part in text.split(","))):
        key, equals, raw = (part.strip() for part in option.partition("="))
        if not equals or not key.isidentifier():
            raise UsageError(f"model.options={text!r}: {option!r} does not have the form NAME=VALUE")
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
    """Import the factory that model.kind names, and return it. Raises UsageError if the factory does not exist, or does not
    make an nn.Module. Independent."""
    module, _, name = kind.partition(":")
    try:
        factory = getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError as error:
        itself = error.name is not None and f"{module}.".startswith(f"{error.name}.")
        fix = (". Start mpidp in the folder of the module, or add this folder to PYTHONPATH" if itself
               else f", which {module} imports. Install it")
        raise UsageError(f"model.kind={kind}: no module {error.name!r}{fix}") from error
    except Exception as error:
        raise UsageError(f"model.kind={kind}: importing {module} failed: {type(error).__name__}: {error}") from error
    if not callable(factory):
        problem = f"module {module} has no {name}" if factory is None else f"{name} ({type(factory).__name__}) is not callable"
        raise UsageError(f"model.kind={kind}: {problem}")
    try:
        made = factory if inspect.isclass(factory) else typing.get_type_hints(factory).get("return")
    except Exception:  # an annotation that cannot be evaluated
        made = None
    if not (inspect.isclass(made) and issubclass(made, nn.Module)):
        raise UsageError(
            f"model.kind={kind} must be a subclass of torch.nn.Module, or a function that is annotated to return one, as in "
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
            raise UsageError(f"model.kind={kind}: calling it with {given} failed: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise UsageError(f"model.kind={kind} returned a {type(model).__name__}, not a torch.nn.Module")
    return model


def _check_parameters(kind: str, model: nn.Module) -> None:
    for name, p in model.named_parameters():
        wrong = ""
        if nn.parameter.is_lazy(p):
            wrong = "is lazy, so its size is not known. Create it with its size"
        elif p.dtype != torch.float32:
            wrong = f"is {p.dtype}, but must be float32. For matrix products in bfloat16, set train.dtype=bfloat16"
        elif not p.requires_grad:
            wrong = "does not require a gradient. Register it as a buffer"
        if wrong:
            raise UsageError(f"model.kind={kind}: parameter {name} {wrong}")
    if not any(True for _ in model.parameters()):
        raise UsageError(f"model.kind={kind}: the model has no parameters")


def _try(kind: str, model: nn.Module, vocab_size: int, seq_len: int) -> None:
    """Run the model in training and evaluation mode.

    Raises UsageError if the logits have a wrong size, have no gradient, or depend on later tokens. Also raises UsageError if a
    forward pass in training mode changes a buffer.
    """
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    tokens = torch.arange(2 * seq_len).view(2, seq_len) % vocab_size
    if not _logits(kind, model.train(), tokens, vocab_size).requires_grad:
        raise UsageError(f"model.kind={kind}: its logits have no gradient. Use no detach() or no_grad() in forward")
    changed = [name for name, buffer in model.named_buffers() if name not in before or not torch.equal(buffer, before[name])]
    if changed:
        raise UsageError(
            f"model.kind={kind}: forward changes the buffer {changed[0]}. Ranks compute different micro-batches, so running "
            "statistics (as in BatchNorm) would differ between ranks. Use LayerNorm or GroupNorm, or BatchNorm with "
            "track_running_stats=False"
        )
    with torch.no_grad():
        _logits(kind, model.eval(), tokens[:1, :1], vocab_size)
        if seq_len > 1 and vocab_size > 1:
            other = tokens.clone()
            other[:, -1] = (other[:, -1] + 1) % vocab_size
            one, two = (_logits(kind, model, t, vocab_size)[:, :-1].float() for t in (tokens, other))
            if not torch.allclose(one, two, rtol=1e-4, atol=1e-5):
                raise UsageError(
                    f"model.kind={kind}: its logits depend on later tokens, which the model must predict. Use causal attention"
                )


def _logits(kind: str, model: nn.Module, tokens: Tensor, vocab_size: int) -> Tensor:
    size = tuple(tokens.shape)
    try:
        logits = model(tokens)
    except Exception as error:
        raise UsageError(f"model.kind={kind}: forward failed for shape {size}: {type(error).__name__}: {error}") from error
    found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if found != (*size, vocab_size) or not logits.is_floating_point():
        raise UsageError(
            f"model.kind={kind}: for tokens of shape {size}, forward returned {found}, but it must return floating-point "
            f"logits of shape {(*size, vocab_size)}, one for each of the vocabulary's {vocab_size} tokens at each position"
        )
    return logits
