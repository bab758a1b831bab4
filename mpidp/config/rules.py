"""Which settings go together: one list of rules, for refusals before training and for the table of docs/methods.md. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from mpidp.config.defaults import DEFAULTS, OF, Settings, _kind, kind

KINDS = ("transformer", "lstm")  # of models; any other is MODULE:FACTORY
TRANSFORMERS = {"num_heads": 4, "num_kv_heads": 0, "hidden_dim": 0, "rope_theta": 10000.0}  # settings that the LSTM has not


@dataclass(frozen=True)
class Rule:
    """What does not go together: these two, and why."""

    one: str
    other: str
    has_one: Callable[[Settings], bool]
    has_other: Callable[[Settings], bool]
    why: str


def _is(key: str, *values: object) -> Callable[[Settings], bool]:
    return lambda settings: settings[key] in values


def _is_not(key: str, value: object) -> Callable[[Settings], bool]:
    return lambda settings: settings[key] != value


def method_setting(name: str, quorum: float) -> str:
    """The setting that asks for it, as one writes it. Pure."""
    return f"strategy.quorum={quorum:g}" if kind(name, quorum) == "quorum" else f"strategy.name={name}"


def _other(settings: Settings) -> bool:
    return _kind(settings) != "synchronous"


def _cut(settings: Settings) -> bool:
    return bool(settings["mesh.tp"] * settings["mesh.pp"] > 1)


_NOT = "model.kind=lstm|MODULE:FACTORY"
_not = _is_not("model.kind", "transformer")
_CUT = "mesh.tp or mesh.pp above 1"
_OTHERS = "strategy.name=delayed|local|server or quorum<1"
_SHARDS, _FSDP = "mesh.shard=1|2|3", "mesh.shard=2|3"
_shards, _fsdp = _is_not("mesh.shard", 0), _is("mesh.shard", 2, 3)
_lora = _is_not("model.lora_rank", 0)
_TIMES, _times = "mesh.interleave above 1", _is_not("mesh.interleave", 1)
_partial = _is_not("strategy.group", "all")
RULES = [
    Rule(_OTHERS, "comm.reducer=tree|root", _other, _is("comm.reducer", "tree", "root"),
         "it sums one buffer a rank, at its own rhythm: comm.reducer=allreduce or naive"),
    Rule(_OTHERS, "train.balance=measured|steal", _other, _is_not("train.balance", "even"),
         "lanes move only where all ranks meet at every step"),
    Rule(_OTHERS, "train.audit_every", _other, _is_not("train.audit_every", 0),
         "an audit compares lanes and replicas at every step, and here they differ or are late"),
    Rule(_OTHERS, "train.noise_every", _other, _is_not("train.noise_every", 0),
         "it needs every lane's gradient at the same parameters, kept apart by comm.reducer=tree"),
    Rule(_OTHERS, "comm.overlap=thread|poll", _other, _is("comm.overlap", "thread", "poll"),
         "it has a rhythm of its own: strategy.overlap, or strategy.name=delayed"),
    Rule(_OTHERS, "comm.gpu=nccl", _other, _is("comm.gpu", "nccl"),
         "NCCL's sums stand in the stream that computes: nothing would be hidden, and it has not been tried"),
    Rule("strategy.name=local|server", "train.spike", _is("strategy.name", "local", "server"), _is_not("train.spike", 0.0),
         "ranks would skip different steps"),
    Rule("strategy.name=server", "comm.compress", _is("strategy.name", "server"), _is_not("comm.compress", "none"),
         "a worker's push goes to the servers as it is: compression is of sums over ranks"),
    Rule("strategy.name=server", "optim.name=muon", _is("strategy.name", "server"), _is("optim.name", "muon"),
         "servers hold slices of the parameters, and Muon updates whole matrices"),
    Rule("strategy.group=node|rotating|pairs|exponential", "strategy.overlap=true", _partial, _is("strategy.overlap", True),
         "there is no outer step to delay: parameters themselves are averaged"),
    Rule("strategy.group=node|rotating|pairs|exponential", "comm.compress", _partial, _is_not("comm.compress", "none"),
         "parameters are averaged, and an error in them is no gradient that could be made good for later"),
    Rule("strategy.group=node|rotating|pairs|exponential", "strategy.fragments", _partial, _is_not("strategy.fragments", 1),
         "the whole model is averaged within a group"),
    Rule("strategy.group=node|rotating|pairs|exponential", "strategy.outer_lr|outer_momentum", _partial,
         lambda s: s["strategy.outer_lr"] >= 0 or s["strategy.outer_momentum"] >= 0,
         "an outer step needs an anchor that all ranks have in common: strategy.group=all"),
    Rule(_CUT, "strategy.name=server or quorum<1", _cut, lambda s: _kind(s) in ("server", "quorum"),
         "the parts of one replica would apply what arrives in different orders"),
    Rule(_CUT, "comm.reducer=naive|root", _cut, _is("comm.reducer", "naive", "root"),
         "they are oracles of the others, for whole models"),
    Rule(_CUT, "train.balance=measured|steal", _cut, _is_not("train.balance", "even"),
         "lanes would have to move in all parts of a replica at once"),
    Rule(_CUT, "train.noise_every", _cut, _is_not("train.noise_every", 0), "a lane's gradient lies in several ranks"),
    Rule(_CUT, "comm.overlap=thread|poll", _cut, _is("comm.overlap", "thread", "poll"),
         "the ranks of a replica talk to each other during backward already"),
    Rule(_CUT, "comm.gpu=nccl", _cut, _is("comm.gpu", "nccl"), "it knows of replicas alone"),
    Rule(_TIMES, "mesh.pp=1", _times, _is("mesh.pp", 1), "a stage comes again after the others, and there is one"),
    Rule(_TIMES, _OTHERS, _times, _other, "it has not been tried"),
    Rule(_TIMES, "comm.compress", _times, _is_not("comm.compress", "none"), "it has not been tried"),
    Rule(_TIMES, "train.audit_every", _times, _is_not("train.audit_every", 0), "a lane's gradient is never there as a whole"),
    Rule("mesh.sequence=true", "mesh.tp=1", _is("mesh.sequence", True), _is("mesh.tp", 1),
         "positions are shared out over the ranks that share a layer, and there is one"),
    Rule("mesh.tp above 1", "optim.name=muon", _is_not("mesh.tp", 1), _is("optim.name", "muon"),
         "Muon updates whole matrices, and each rank has a part of them: mesh.pp cuts between layers"),
    Rule("mesh.tp above 1", "train.compile", _is_not("mesh.tp", 1), _is("train.compile", True),
         "sums over ranks stand in the middle of a block"),
    Rule("mesh.pp above 1", "model.tie_embeddings with strategy.name=delayed|local", _is_not("mesh.pp", 1),
         lambda s: s["model.tie_embeddings"] and s["strategy.name"] in ("delayed", "local"),
         "the first and the last stage share the embedding, and add its gradients at every step"),
    Rule(_SHARDS, _OTHERS, _shards, _other, "slices and shards are of one model that all ranks update together at every step"),
    Rule(_SHARDS, "optim.name=muon", _shards, _is("optim.name", "muon"),
         "Muon updates whole matrices, and a slice or a shard ends within one"),
    Rule(_SHARDS, "comm.compress", _shards, _is_not("comm.compress", "none"),
         "what is held back is as large as the gradients that sharding is to share out, and it has not been tried"),
    Rule(_SHARDS, "train.audit_every", _shards, _is_not("train.audit_every", 0),
         "an audit compares replicas, and nobody else holds the same state"),
    Rule(_SHARDS, "comm.gpu=nccl", _shards, _is("comm.gpu", "nccl"), "it has not been tried"),
    Rule(_FSDP, "mesh.pp above 1", _fsdp, _is_not("mesh.pp", 1),
         "every forward and backward is collective over the replicas, and stages run several ahead: mesh.shard=1"),
    Rule("mesh.shard=1", "comm.reducer=root", _is("mesh.shard", 1), _is("comm.reducer", "root"), "rank 0 alone updates"),
    Rule(_FSDP, "comm.reducer=tree|naive|root", _fsdp, _is("comm.reducer", "tree", "naive", "root"),
         "each rank receives the sum of its rows alone, from MPI's own reduce_scatter: comm.reducer=auto"),
    Rule(_FSDP, "train.noise_every", _fsdp, _is_not("train.noise_every", 0),
         "gradients are summed micro-batch by micro-batch: there is none of a lane"),
    Rule(_FSDP, "train.balance=measured|steal", _fsdp, _is_not("train.balance", "even"),
         "all ranks run as many micro-batches as any: nobody is faster"),
    Rule(_FSDP, "train.compile", _fsdp, _is("train.compile", True), "it has not been tried"),
    Rule(_FSDP, "comm.overlap=thread|poll", _fsdp, _is("comm.overlap", "thread", "poll"),
         "FSDP2 begins its sums in backward by itself"),
    Rule(_FSDP, "comm.transport=window", _fsdp, _is("comm.transport", "window"), "shards go by messages"),
    Rule(_FSDP, "comm.copies=node", _fsdp, _is("comm.copies", "node"), "no rank or node has a copy"),
    Rule(_FSDP, "optim.freeze", _fsdp, _is_not("optim.freeze", ""), "it has not been tried"),
    Rule(_CUT, "model.lora_rank", _cut, _lora, "adapters are small and are not cut: replicas alone, mesh.dp"),
    Rule(_FSDP, "model.lora_rank", _fsdp, _lora,
         "what is trained is small: there is nothing to share out but a base that never changes"),
    Rule(_NOT, "model.lora_rank", _not, _lora, "adapters stand on the Transformer's layers"),
    Rule(_NOT, _CUT, _not, _cut, "of the Transformer alone it is known how to cut it into parts"),
    Rule(_NOT, _FSDP, _not, _fsdp, "of the Transformer alone it is known what to gather at once: mesh.shard=1"),
    Rule(_NOT, "train.recompute", _not, _is("train.recompute", True), "it is of the Transformer's blocks"),
    Rule(_NOT, "train.compile", _not, _is("train.compile", True), "it is of the Transformer's blocks"),
    Rule("model.kind=MODULE:FACTORY", "optim.name=muon", lambda s: s["model.kind"] not in KINDS, _is("optim.name", "muon"),
         "Muon is for hidden matrices, and of your own model it is not known which those are"),
]


def problems(settings: Settings) -> Iterator[str]:
    """What is wrong, a sentence each. Independent."""
    name = _kind(settings)
    for key, names in OF.items():
        value = settings[f"strategy.{key}"]
        if not {name, settings["strategy.name"]} & {*names} and value != DEFAULTS[key]:
            those = " or ".join(one for one in names if one != "quorum") + " or strategy.quorum below 1" * ("quorum" in names)
            yield f"strategy.{key}={value} means something with strategy.name={those} alone, not with {name}"
    yield from _kind_problems(settings)
    if settings["strategy.quorum"] <= 0:
        yield f"strategy.quorum={settings['strategy.quorum']} must be above 0, and 1 at most: the share of the lanes to wait for"
    for rule in RULES:
        if rule.has_one(settings) and rule.has_other(settings):
            yield f"{rule.one} does not go with {rule.other}: {rule.why}"
    every, meet = settings["strategy.sync_every"], settings["strategy.meet_every"]
    if every and meet % every:
        yield f"strategy.meet_every={meet} must be a multiple of strategy.sync_every={every}"
    if settings["strategy.fragments"] > (every or 50):
        yield f"strategy.fragments={settings['strategy.fragments']} is more than the {every or 50} steps between two averages"
    try:
        first, last = steps_of(settings["metrics.timeline"])
        if settings["metrics.kernels"] and not last:
            yield "metrics.kernels=true is about the steps of a timeline: say which, as in metrics.timeline=10:12"
        if 0 < settings["train.steps"] < last:
            yield f"metrics.timeline={first}:{last} ends beyond the run's train.steps={settings['train.steps']}"
    except ValueError as error:
        yield f"metrics.timeline={settings['metrics.timeline']}: {error}"


LONGEST = 100  # steps of a timeline


def steps_of(timeline: str) -> tuple[int, int]:
    """(first, last) step of a timeline, from 1 on, both included; (0, 0) of none. ValueError. Pure."""
    if not timeline:
        return 0, 0
    words = timeline.split(":")
    if len(words) != 2 or not all(word.isascii() and word.isdecimal() for word in words):
        raise ValueError("give the first and the last step, as in 10:12")
    first, last = map(int, words)
    if not 1 <= first <= last < first + LONGEST:
        raise ValueError(f"steps count from 1, the last is not before the first, and at most {LONGEST} can be looked at")
    return first, last


def _kind_problems(settings: Settings) -> Iterator[str]:
    """Of model.kind, and of what goes with one kind alone."""
    model = settings["model.kind"]
    module, colon, factory = model.partition(":")
    if model not in KINDS and not (colon and factory.isidentifier() and all(map(str.isidentifier, module.split(".")))):
        yield f"model.kind={model} must be {', '.join(KINDS)}, or MODULE:FACTORY of your own, as in models.rnn:make"
    if model in KINDS and settings["model.options"]:
        yield f"model.options={settings['model.options']} means something with a model.kind of your own alone, not with {model}"
    for key, value in TRANSFORMERS.items() if model == "lstm" else ():
        if settings[f"model.{key}"] != value:
            yield f"model.{key}={settings[f'model.{key}']} means something with model.kind=transformer alone, not with lstm"


def table() -> str:
    """Of docs/methods.md: what does not go together; all else does. Independent."""
    rows = [(f"`{rule.one}`", f"`{rule.other}`", rule.why) for rule in RULES]
    lines = [" | ".join(cell.replace("|", "\\|") for cell in row) for row in [("this", "does not go with", "because"), *rows]]
    lines.insert(1, "--- | --- | ---")
    return "\n".join(f"| {line} |" for line in lines)
