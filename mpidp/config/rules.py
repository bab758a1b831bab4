"""Unsupported combinations of settings. Training checks these rules, and docs/methods.md shows them as a table. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from mpidp.config.defaults import DEFAULTS, METHODS, Settings, kind, method_of, sync_intervals
from mpidp.model.options import DEFAULTS as OPTIONS

KINDS = ("transformer", "lstm")  # built-in values of model.kind; other values are MODULE:FACTORY
TRANSFORMER_ONLY = {  # settings and defaults
    "num_heads": 4, "num_kv_heads": 0, "head_dim": 0, "hidden_dim": 0, "rope_theta": 10000.0, "rope_scaling": "",
    "norm_eps": 1e-5, **OPTIONS,
}


@dataclass(frozen=True)
class Rule:
    """Two settings that cannot be combined, and the reason."""

    one: str  # the first setting, as shown to the user
    other: str  # the second setting
    has_one: Callable[[Settings], bool]  # returns whether the first setting is in use
    has_other: Callable[[Settings], bool]
    why: str


def _is(key: str, *values: object) -> Callable[[Settings], bool]:
    return lambda settings: settings[key] in values


def _is_not(key: str, value: object) -> Callable[[Settings], bool]:
    return lambda settings: settings[key] != value


def method_setting(name: str, quorum: float) -> str:
    """Return the setting that selects the method, as written on the command line, for example "strategy.quorum=0.5". Pure."""
    return f"strategy.quorum={quorum:g}" if kind(name, quorum) == "quorum" else f"strategy.name={name}"


def _other(settings: Settings) -> bool:
    return method_of(settings) != "synchronous"


def _cut(settings: Settings) -> bool:
    return bool(settings["mesh.tp"] * settings["mesh.pp"] > 1)


_NOT = "model.kind=lstm|MODULE:FACTORY"
_not = _is_not("model.kind", "transformer")
_CUT = "mesh.tp or mesh.pp above 1"
_OTHERS = "strategy.name=delayed|local|server or quorum<1"
_SHARDS, _TWO = "mesh.shard=1|2|3", "mesh.shard=2|3"
_shards, _two = _is_not("mesh.shard", 0), _is("mesh.shard", 2, 3)
_THREE, _three = "mesh.shard=3", _is("mesh.shard", 3)
_lora = _is_not("model.lora_rank", 0)
_HEAD = "model.lora_rank with head in model.lora_targets"
_head: Callable[[Settings], bool] = lambda s: _lora(s) and "head" in s["model.lora_targets"].replace(" ", "").split(",")  # noqa: E731
_TIMES, _times = "mesh.interleave above 1", _is_not("mesh.interleave", 1)
_partial = _is_not("strategy.group", "all")
_tasks = _is_not("train.eval_tasks", "")
_auto = _is("train.micro_batch", 0)
_momentum = _is_not("optim.momentum_warmup", 0)
_UPDATES = "checkpoints store the number of updates only with parameters that AdamW trains, and there may be no such parameter"
_SLICES, _slices = "model.slices above 1", _is_not("model.slices", 1)
RULES = [
    Rule(_OTHERS, "comm.reducer=tree|root", _other, _is("comm.reducer", "tree", "root"),
         "these methods reduce one buffer per rank at their own intervals; use comm.reducer=allreduce or naive"),
    Rule(_OTHERS, "train.balance=measured|steal", _other, _is_not("train.balance", "even"),
         "micro-batches can move between ranks only if all ranks synchronize at every step"),
    Rule(_OTHERS, "train.audit_every", _other, _is_not("train.audit_every", 0),
         "an audit compares gradients and replicas, which differ between ranks or arrive late with these methods"),
    Rule(_OTHERS, "train.noise_every", _other, _is_not("train.noise_every", 0),
         "the measurement needs several gradients at the same parameters, and only comm.reducer=tree keeps these gradients"),
    Rule(_OTHERS, "comm.overlap=thread|poll", _other, _is("comm.overlap", "thread", "poll"),
         "these methods overlap communication in their own way; use strategy.overlap or strategy.name=delayed"),
    Rule(_OTHERS, "comm.gpu=nccl", _other, _is("comm.gpu", "nccl"),
         "NCCL runs in the compute stream, so communication would not overlap with compute (not tested)"),
    Rule("strategy.name=local|server", "train.spike", _is("strategy.name", "local", "server"), _is_not("train.spike", 0.0),
         "ranks would skip different steps"),
    Rule("strategy.name=server", "comm.compress", _is("strategy.name", "server"), _is_not("comm.compress", "none"),
         "compression works on sums over ranks, and workers send their gradients to servers individually"),
    Rule("comm.compress", "comm.gpu=nccl", _is_not("comm.compress", "none"), _is("comm.gpu", "nccl"),
         "compressed gradients are sent in MPI messages; use comm.gpu=auto"),
    Rule("strategy.group=node|rotating|pairs|exponential", "strategy.overlap=true", _partial, _is("strategy.overlap", True),
         "these groups average parameters directly and have no outer step that could be delayed"),
    Rule("strategy.group=node|rotating|pairs|exponential", "comm.compress", _partial, _is_not("comm.compress", "none"),
         "these groups average parameters directly, but error feedback works only for gradients and updates"),
    Rule("strategy.group=node|rotating|pairs|exponential", "strategy.fragments", _partial, _is_not("strategy.fragments", 1),
         "these groups always average the whole model"),
    Rule("strategy.group=node|rotating|pairs|exponential", "strategy.outer_lr|outer_momentum", _partial,
         lambda s: s["strategy.outer_lr"] >= 0 or s["strategy.outer_momentum"] >= 0,
         "an outer step starts from parameters that all ranks share; use strategy.group=all"),
    Rule(_CUT, "strategy.name=server or quorum<1", _cut, lambda s: method_of(s) in ("server", "quorum"),
         "the ranks of a replica would apply updates in different orders"),
    Rule(_CUT, "comm.reducer=naive|root", _cut, _is("comm.reducer", "naive", "root"),
         "these reference implementations need the whole model on each rank"),
    Rule(_CUT, "train.balance=measured|steal", _cut, _is_not("train.balance", "even"),
         "all ranks of a replica would have to move the same micro-batches at the same time"),
    Rule(_CUT, "train.noise_every", _cut, _is_not("train.noise_every", 0),
         "the measurement needs gradients of the whole model, but each rank has only a part of each gradient"),
    Rule(_CUT, "comm.overlap=thread|poll", _cut, _is("comm.overlap", "thread", "poll"),
         "the ranks of a replica already communicate with each other during backward"),
    Rule(_CUT, "comm.gpu=nccl", _cut, _is("comm.gpu", "nccl"), "comm.gpu=nccl supports data parallelism only"),
    Rule(_TIMES, "mesh.pp=1", _times, _is("mesh.pp", 1), "interleaving needs at least two stages"),
    Rule(_TIMES, _OTHERS, _times, _other, "not tested"),
    Rule(_TIMES, "comm.compress", _times, _is_not("comm.compress", "none"), "not tested"),
    Rule(_TIMES, "train.audit_every", _times, _is_not("train.audit_every", 0),
         "no rank ever has the complete gradient of one lane (sequence of micro-batches)"),
    Rule("mesh.sequence=true", "mesh.tp=1", _is("mesh.sequence", True), _is("mesh.tp", 1),
         "sequence parallelism divides positions among the tp ranks, so it needs at least two"),
    Rule("mesh.tp above 1", "train.compile", _is_not("mesh.tp", 1), _is("train.compile", True),
         "tensor parallelism communicates in the middle of a block, which cannot be compiled"),
    Rule("mesh.pp above 1", "model.tie_embeddings with strategy.name=delayed|local", _is_not("mesh.pp", 1),
         lambda s: s["model.tie_embeddings"] and s["strategy.name"] in ("delayed", "local"),
         "the first and the last stage share the embedding and must add its gradients at every step"),
    Rule(_SHARDS, _OTHERS, _shards, _other, "sharding needs one model that all ranks update together at every step"),
    Rule(_SHARDS, "comm.compress", _shards, _is_not("comm.compress", "none"),
         "error feedback would need as much memory as the gradients that sharding distributes (not tested)"),
    Rule(_SHARDS, "train.audit_every", _shards, _is_not("train.audit_every", 0),
         "an audit compares replicas, and with sharding no two ranks hold the same state"),
    Rule(_SHARDS, "comm.gpu=nccl", _shards, _is("comm.gpu", "nccl"), "not tested"),
    Rule("mesh.shard=1", "comm.reducer=root", _is("mesh.shard", 1), _is("comm.reducer", "root"),
         "with comm.reducer=root, rank 0 updates all parameters, but mesh.shard=1 divides the update among ranks"),
    Rule(_TWO, "comm.reducer=allreduce|naive|root", _two, _is("comm.reducer", "allreduce", "naive", "root"),
         "each rank adds a part of the gradients, in the order of comm.reducer=tree; use comm.reducer=auto"),
    Rule(_TWO, "train.noise_every", _two, _is_not("train.noise_every", 0),
         "after each micro-batch, each rank keeps only its shard of the gradients, but the measurement needs complete gradients"),
    Rule(_TWO, "train.balance=measured|steal", _two, _is_not("train.balance", "even"),
         "all ranks must compute the same number of micro-batches"),
    Rule(_TWO, "train.compile", _two, _is("train.compile", True), "not tested"),
    Rule(_TWO, "comm.overlap=thread|poll", _two, _is("comm.overlap", "thread", "poll"),
         "the thread that computes the backward pass also reduces the gradients"),
    Rule(_TWO, "comm.transport=window", _two, _is("comm.transport", "window"), "shards are sent as MPI messages"),
    Rule(_TWO, "comm.copies=node", _two, _is("comm.copies", "node"), "ranks exchange shards in messages and share no memory"),
    Rule(_CUT, _HEAD, _cut, _head, "the adapter of the head is not split; use other model.lora_targets"),
    Rule(_NOT, "model.lora_rank", _not, _lora, "LoRA is implemented for the built-in Transformer only"),
    Rule(_SLICES, _OTHERS, _slices, _other, "not tested"),
    Rule(_SLICES, "comm.compress", _slices, _is_not("comm.compress", "none"),
         "the compression error would depend on mesh.tp, because mesh.tp determines where a gradient is stored"),
    Rule(_SLICES, _HEAD, _slices, _head, "the adapter of the head is not split; use other model.lora_targets"),
    Rule(_SLICES, "train.compile", _slices, _is("train.compile", True), "tensor parallelism cannot be compiled"),
    Rule(_SLICES, "train.eval_tasks", _slices, _tasks,
         "a model that is cut into slices has no key-value cache; use mpidp evaluate --tasks"),
    Rule(_NOT, _SLICES, _not, _slices, "only the built-in Transformer can be cut into slices"),
    Rule(_NOT, _CUT, _not, _cut, "model parallelism is implemented for the built-in Transformer only"),
    Rule(_NOT, _THREE, _not, _three, "parameters are sharded by block of the built-in Transformer only; use mesh.shard=2"),
    Rule(_NOT, "train.loss=chunked", _not, _is("train.loss", "chunked"),
         "only the built-in Transformer can compute its head for some positions at a time"),
    Rule(_NOT, "train.recompute", _not, _is("train.recompute", True),
         "recomputation is implemented for the blocks of the built-in Transformer only"),
    Rule(_NOT, "train.compile", _not, _is("train.compile", True),
         "compilation is implemented for the blocks of the built-in Transformer only"),
    Rule("mesh.pp above 1", "model.input_mix", _is_not("mesh.pp", 1), _is("model.input_mix", True),
         "every block needs the embedding's output, which only the first stage has"),
    Rule(_NOT, "model.zero_init", _not, _is("model.zero_init", True),
         "this initialization is implemented for the built-in Transformer only"),
    Rule("train.init_from", "model.zero_init", _is_not("train.init_from", ""), _is("model.zero_init", True),
         "the initial weights come from the model in train.init_from"),
    Rule("optim.name=adam|sgd", "optim.cautious_decay", _is("optim.name", "adam", "sgd"), _is("optim.cautious_decay", True),
         "these optimizers add weight decay to the gradient, so weight decay is a part of the update"),
    Rule("optim.name=adamw|adam|sgd", "optim.momentum_warmup", _is("optim.name", "adamw", "adam", "sgd"), _momentum,
         "the momentum of these optimizers is always optim.beta1"),
    Rule("optim.momentum_warmup", "model.lora_rank", _momentum, _lora, _UPDATES),
    Rule("optim.momentum_warmup", "optim.freeze", _momentum, _is_not("optim.freeze", ""), _UPDATES),
    Rule("train.micro_batch=auto", _CUT, _auto, _cut,
         "the measurement needs the whole model on each rank; set train.micro_batch to a number"),
    Rule("train.micro_batch=auto", _TWO, _auto, _two,
         "the measurement needs the whole model on each rank; set train.micro_batch to a number"),
    Rule("train.eval_tasks", _CUT, _tasks, _cut,
         "ranks answer different requests, but ranks that share a model compute each batch together; use mpidp evaluate --tasks"),
    Rule("train.eval_tasks", _THREE, _tasks, _three,
         "a forward pass needs all replicas, which answer different numbers of requests; use mpidp evaluate --tasks"),
    Rule("train.eval_tasks", "train.compile", _tasks, _is("train.compile", True),
         "torch would compile the model again for each length of request; use mpidp evaluate --tasks"),
]


def problems(settings: Settings) -> Iterator[str]:
    """Yield an error message for each value or combination of settings that is not valid. Independent."""
    name = method_of(settings)
    for key, names in METHODS.items():
        value = settings[f"strategy.{key}"]
        if not {name, settings["strategy.name"]} & {*names} and value != DEFAULTS[key]:
            those = " or ".join(one for one in names if one != "quorum") + " or strategy.quorum below 1" * ("quorum" in names)
            yield f"strategy.{key}={value} requires strategy.name={those}; it has no effect with {name}"
    yield from _kind_problems(settings)
    if settings["strategy.quorum"] <= 0:
        yield (f"strategy.quorum={settings['strategy.quorum']} must be above 0 and at most 1, because it is the share of the "
               "lanes (sequences of micro-batches) for whose gradients a step waits")
    for rule in RULES:
        if rule.has_one(settings) and rule.has_other(settings):
            yield f"{rule.one} cannot be combined with {rule.other}: {rule.why}"
    every, meet = sync_intervals(settings)
    if meet % every:
        chosen = "" if settings["strategy.sync_every"] else ", its automatic value. Set strategy.sync_every, too"
        yield f"strategy.meet_every={meet} must be a multiple of strategy.sync_every={every}{chosen}"
    if name == "local" and settings["strategy.fragments"] > every:
        yield (f"strategy.fragments={settings['strategy.fragments']} is more than the {every} steps between two averages, but "
               "each fragment (part of the model) must be averaged at a different step")
    try:
        first, last = steps_of(settings["metrics.timeline"])
        if settings["metrics.kernels"] and not last:
            yield "metrics.kernels=true needs a timeline: set the steps of the timeline, as in metrics.timeline=10:12"
        if 0 < settings["train.steps"] < last:
            yield f"metrics.timeline={first}:{last} ends after the last step of the run, train.steps={settings['train.steps']}"
    except ValueError as error:
        yield f"metrics.timeline='{settings['metrics.timeline']}' is not valid, because {error}"


MAX_STEPS = 100  # maximum number of steps in a timeline


def steps_of(timeline: str) -> tuple[int, int]:
    """Return (first, last), the first and the last step of a timeline. Steps are counted from 1. Return (0, 0) if there is no
    timeline.

    `timeline`: the value of metrics.timeline. Raises ValueError if it does not have the form FIRST:LAST, or if a step is not
    valid. Pure."""
    if not timeline:
        return 0, 0
    words = timeline.split(":")
    if len(words) != 2 or not all(word.isascii() and word.isdecimal() for word in words):
        raise ValueError("it must have the form FIRST:LAST, the first and the last step, as in 10:12")
    first, last = map(int, words)
    if not 1 <= first <= last < first + MAX_STEPS:
        raise ValueError(f"steps are counted from 1, the last step must not be before the first, and at most {MAX_STEPS} steps "
                         "are recorded")
    return first, last


def _kind_problems(settings: Settings) -> Iterator[str]:
    """Yield a message for each problem of model.kind, and for each setting that has no effect with this kind of model."""
    model = settings["model.kind"]
    module, colon, factory = model.partition(":")
    if model not in KINDS and not (colon and factory.isidentifier() and all(map(str.isidentifier, module.split(".")))):
        yield f"model.kind={model} must be {', '.join(KINDS)}, or MODULE:FACTORY for your own model, as in models.rnn:make"
    if model in KINDS and settings["model.options"]:
        yield f"model.options={settings['model.options']} requires model.kind=MODULE:FACTORY, your own model, not {model}"
    for key, value in TRANSFORMER_ONLY.items() if model == "lstm" else ():
        if settings[f"model.{key}"] != value:
            yield f"model.{key}={settings[f'model.{key}']} requires model.kind=transformer; it has no effect with lstm"


def table() -> str:
    """Return the table of unsupported combinations, in Markdown, for docs/methods.md. Independent."""
    rows = [("setting", "cannot be combined with", "reason")]
    rows += [(f"`{rule.one}`", f"`{rule.other}`", rule.why) for rule in RULES]
    lines = [" | ".join(cell.replace("|", "\\|") for cell in row) for row in rows]
    lines.insert(1, "--- | --- | ---")
    return "\n".join(f"| {line} |" for line in lines)
