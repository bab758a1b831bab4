"""Evaluates a model with EleutherAI's evaluation harness (lm-eval). The harness runs on rank 0. All ranks compute the answers to
the harness's requests (shared_requests.py).

The results equal those of the exported model with `hf`, the harness's model type for the transformers library.
"""

from __future__ import annotations

import contextlib
import json
import math
import random
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mpi4py import MPI

from mpidp.data.chat_template import BEGIN, END, Template, TemplateRejection
from mpidp.data.encoder import Encoder
from mpidp.data.special_tokens import special_names
from mpidp.errors import DataError, MpidpError, UsageError
from mpidp.inference.sampling import Sampling
from mpidp.inference.shared_requests import SharedRequests, TextRequest
from mpidp.inference.tasks import TaskOptions, harness
from mpidp.runtime.files import write_file, writing
from mpidp.runtime.log import log

USUAL_NEW_TOKENS = 256  # maximum number of new tokens if a task sets none; the harness's default
USUAL_TOP_K = 50  # top_k if a task sets none, as in transformers
BOOTSTRAP = 1000  # bootstrap samples, for standard errors that have no formula
SEEDS = (0, 1234, 1234)  # seeds of random, numpy and torch: the harness's defaults
NEUTRAL = {"num_beams": 1, "repetition_penalty": 1.0, "num_return_sequences": 1, "use_cache": True}  # values without effect


def run_tasks(
    requests: SharedRequests, tasks: dict[str, Any] | None, options: TaskOptions, name: str, prefix: int, seq_len: int,
    samples: bool = False,
) -> dict[str, Any] | None:
    """Evaluate the model on tasks. Return the harness's results on rank 0, and None on other ranks. The results have the keys
    results, groups, versions and n-shot. If `samples` is True, they also have the key samples.

    tasks: the result of load_tasks() on rank 0, and None on other ranks. name: name of the model. prefix: the token id that
    precedes a text without context. seq_len: the length of the context. Raises DataError if a request does not fit into the
    context, or if the harness fails. Collective over requests.loaded.grid.world.
    """
    def work() -> dict[str, Any]:
        assert tasks is not None
        model = _model_class()(requests, name, prefix, seq_len)
        with _own_seeds(), contextlib.redirect_stdout(sys.stderr), _errors_named():
            found: dict[str, Any] = harness().evaluator.evaluate(
                lm=model, task_dict=tasks, limit=options.limit or None, bootstrap_iters=BOOTSTRAP, log_samples=samples,
                apply_chat_template=options.chat, system_instruction=options.system, fewshot_as_multiturn=True,
            )
        if model.cut:
            log.warning("warning: %d requests exceed the context of %d tokens. The beginning of these requests was left out",
                        model.cut, seq_len)
        return found

    return requests.serve(work)


def prefix_of(encoder: Encoder, has_base: bool) -> int:
    """Return the token id that precedes a text without context. The harness uses the same id for the exported model: BOS, or
    the end-of-text token if there is no BOS. has_base: whether the model is a Hugging Face folder, or was fine-tuned from one.
    If True, BOS and the end-of-text token are those of the base model. Pure."""
    table, ids = encoder.table, special_names(encoder.tokenizer)
    named = [ids[name] for key in ("bos_token", "eos_token") if (name := table.names.get(key, "")) in ids]
    if has_base:
        return named[0] if named and ("bos_token" in table.names or table.bos is None) else encoder.begin
    if table.bos is None and table.template is not None and "bos_token" in table.template and "bos_token" in table.names:
        return named[0] if named else encoder.begin
    return encoder.begin


def figures_of(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return {task or group: {metric: value}} from the harness's results. The suffix ",none" is removed from the name of a
    metric. A value that is not finite becomes None. Pure."""
    found: dict[str, dict[str, Any]] = {}
    for name, figures in (results["results"] | results.get("groups", {})).items():
        found[name] = {
            key.removesuffix(",none"): value if isinstance(value, int) or math.isfinite(value) else None
            for key, value in figures.items() if isinstance(value, (int, float)) and not isinstance(value, bool)
        }
    return found


def write_results(path: Path, results: dict[str, Any]) -> None:
    """Write the harness's results as JSON. A number that is not finite becomes null. A value of a type that JSON does not have
    becomes a string. Raises UsageError if the file cannot be written. Independent."""
    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {str(key): plain(inner) for key, inner in value.items()}
        if isinstance(value, (list, tuple, set)):
            return [plain(inner) for inner in value]
        if isinstance(value, np.generic):
            value = value.item()
        if isinstance(value, float) and not math.isfinite(value):
            return None
        return value if value is None or isinstance(value, (str, int, float)) else str(value)

    with writing(path, "free space, or give another --out"):
        write_file(path, json.dumps(plain(results), ensure_ascii=False).encode(errors="backslashreplace"))


@contextlib.contextmanager
def _own_seeds() -> Iterator[None]:
    """Return a context manager that sets the global random generators to the harness's seeds. At its end, it restores the
    earlier states of the generators."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(SEEDS[0])
    np.random.seed(SEEDS[1])
    torch.default_generator.manual_seed(SEEDS[2])
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


@contextlib.contextmanager
def _errors_named() -> Iterator[None]:
    """Return a context manager that converts an exception of the harness or of a task to a DataError. It does not change
    exceptions of mpidp and of MPI."""
    try:
        yield
    except (MpidpError, MPI.Exception):
        raise
    except Exception as error:
        log.debug("%s", traceback.format_exc())
        problem = f"the evaluation harness failed ({type(error).__name__}: {error})"
        raise DataError(f"{problem}. Set MPIDP_LOG=debug to see where") from error


def _model_class() -> Any:
    """Import the harness, and return a subclass of its model class."""
    library = harness()

    base: Any = library.api.model.TemplateLM

    class HarnessModel(base):
        """The model as the harness sees it. It passes the requests of the harness on to SharedRequests."""

        def __init__(self, requests: SharedRequests, name: str, prefix: int, seq_len: int) -> None:
            super().__init__()
            self._requests, self._encoder, self._name = requests, requests.encoder, name
            self._prefix, self.max_length = prefix, seq_len
            self.cut = 0  # requests whose context was truncated
            self._template: Template | None = None

        @property
        def eot_token_id(self) -> int:
            return self._encoder.table.ends[0]

        @property
        def prefix_token_id(self) -> int:
            return self._prefix

        @property
        def tokenizer_name(self) -> str:
            return self._name.replace("/", "__")

        def chat_template(self, chat_template: bool | str = False) -> str | None:
            return self._encoder.table.template

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            if self._template is None:
                from mpidp.inference.chats import template_of

                self._template = template_of(self._encoder.table, self._name, time.time())
            return _chat(self._template, chat_history, add_generation_prompt)

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            ids = self._encoder.ids(string)
            found: list[int] = (ids if add_special_tokens is False else self._encoder.begins(ids)).tolist()
            return found

        def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
            return super().loglikelihood(requests, disable_tqdm=True)

        def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
            rows = []
            for _texts, context, continuation in requests:
                if not 0 < len(continuation) <= self.max_length:
                    raise DataError(f"a continuation has {len(continuation)} tokens, but must have 1 to {self.max_length}, the "
                                    "length of the model's context. Leave this task out, or use a model with a longer context")
                self.cut += len(context) + len(continuation) > self.max_length + 1
                rows.append(((context + continuation)[-(self.max_length + 1) :], len(continuation)))
            return self._requests.scores(rows)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> list[float]:
            windows, of_text = [], []
            for i, (text,) in enumerate(one.args for one in requests):
                pairs = library.utils.get_rolling_token_windows(
                    token_list=self.tok_encode(text), prefix_token=self._prefix, max_seq_len=self.max_length, context_len=1
                )
                for context, continuation in map(library.utils.make_disjoint_window, pairs):
                    windows.append((context + continuation, len(continuation)))
                    of_text.append(i)
            found = [0.0] * len(requests)
            for i, (score, _) in zip(of_text, self._requests.scores(windows) if windows else [], strict=True):
                found[i] += score
            return found

        def generate_until(self, requests: Any, disable_tqdm: bool = True) -> list[str]:
            asked = [self._text_request(*one.args) for one in requests]
            return [
                _text(self._encoder, ids, one.stops) for ids, one in zip(self._requests.generated(asked), asked, strict=True)
            ]

        def _text_request(self, context: str, given: dict[str, Any]) -> TextRequest:
            tokens, stops, sampling = _generation(given, self._encoder)
            if (room := self.max_length - tokens) <= 0:
                raise UsageError(
                    f"a task generates up to {tokens} tokens, so the model's context of {self.max_length} tokens has no room "
                    "for a prompt. Set a smaller max_gen_toks in the generation_kwargs of a local task file, or use a model "
                    "with a longer context"
                )
            ids = self.tok_encode(context) or [self._encoder.begin]
            self.cut += len(ids) > room
            return TextRequest(ids[-room:], tokens, stops, sampling)

    return HarnessModel


def _generation(given: dict[str, Any], encoder: Encoder) -> tuple[int, tuple[str, ...], Sampling]:
    """Return (maximum number of new tokens, stop strings, sampling). given: the generation_kwargs of a task. Raises UsageError
    if an option in `given` is not supported. Pure."""
    rest = dict(given)
    until = rest.pop("until", None) or []
    lengths = [rest.pop(key, None) for key in ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")]
    tokens = int(next((one for one in lengths if one is not None), USUAL_NEW_TOKENS))
    temperature, samples = float(rest.pop("temperature", None) or 0.0), rest.pop("do_sample", None)
    top_k, top_p = int(rest.pop("top_k", USUAL_TOP_K) or 0), float(rest.pop("top_p", 1.0) or 1.0)
    others = [f"{key}={value}" for key, value in rest.items() if NEUTRAL.get(key, ...) != value]
    if others:
        raise UsageError(f"the generation option {others[0]} of a task is not supported. Remove it in a local copy of the task "
                         "file")
    stops = [until] if isinstance(until, str) else [*until]
    eos = encoder.table.names.get("eos_token", "")
    if samples is False:
        temperature = 0.0
    return tokens, tuple(one for one in dict.fromkeys([*stops, eos]) if one), Sampling(temperature, top_k, top_p)


def _text(encoder: Encoder, ids: Sequence[int], stops: Sequence[str]) -> str:
    """Return the text of generated ids, up to the first stop string. Special tokens are left out. Pure."""
    special = set(special_names(encoder.tokenizer).values())
    text = encoder.tokenizer.decode([i for i in ids if i not in special])
    for stop in stops:
        text = text.split(stop)[0]
    return text


def _chat(template: Template, messages: Sequence[dict[str, str]], prompt: bool) -> str:
    """Return the text of a chat. prompt: if True, the text ends with the generation prompt. If False, it ends with the content
    of the last message, which the model then continues. If the template rejects the chat, the system messages are left out.
    Raises DataError if the template also rejects the chat without system messages."""
    try:
        text = template.render(messages, prompt)
    except TemplateRejection as error:
        rest = [one for one in messages if one["role"] != "system"]
        if len(rest) == len(messages):
            raise DataError(str(error)) from None
        return _chat(template, rest, prompt)
    text = text.replace(BEGIN, "").replace(END, "")
    if prompt:
        return text
    last = messages[-1]["content"]
    found = last if last in text else last.strip()
    return text[: text.rindex(found) + len(found)] if found in text else text
