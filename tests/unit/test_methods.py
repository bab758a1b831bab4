"""Unsupported combinations are rejected before training with the reason, and the table in the documentation matches the code."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from mpidp.config import rules
from mpidp.config.command_line import from_args
from mpidp.config.defaults import METHODS, outer, ratio, sync_intervals
from mpidp.config.resolve import resolve
from mpidp.config.schema import Config, to_toml
from mpidp.data.lanes import Lanes
from mpidp.errors import UsageError

ROOT = Path(__file__).resolve().parents[2]
PLAIN: dict[str, Any] = Config().flat()
WORDS = {  # an example of each side of a rule
    "strategy.name=delayed|local|server or quorum<1": (
        "strategy.name=delayed", "strategy.name=local", "strategy.name=server", "strategy.quorum=0.5",
    ),
    "strategy.name=local|server": ("strategy.name=local", "strategy.name=server"),
    "strategy.name=server": ("strategy.name=server",),
    "mesh.tp or mesh.pp above 1": ("mesh.tp=2", "mesh.pp=2", "mesh.tp=2 mesh.pp=2"),
    "mesh.interleave above 1": ("mesh.interleave=2",), "mesh.pp=1": ("mesh.pp=1",),
    "mesh.sequence=true": ("mesh.sequence=true",), "mesh.tp=1": ("mesh.tp=1", "mesh.pp=2"),
    "mesh.tp above 1": ("mesh.tp=2",), "mesh.pp above 1": ("mesh.pp=2",), "train.compile": ("train.compile=true",),
    "strategy.name=server or quorum<1": ("strategy.name=server", "strategy.quorum=0.5"),
    "comm.reducer=naive|root": ("comm.reducer=naive", "comm.reducer=root"),
    "model.tie_embeddings with strategy.name=delayed|local": tuple(
        f"model.tie_embeddings=true strategy.name={name}" for name in ("delayed", "local")
    ),
    "comm.reducer=tree|root": ("comm.reducer=tree", "comm.reducer=root"),
    "train.balance=measured|steal": ("train.balance=measured", "train.balance=steal"),
    "train.audit_every": ("train.audit_every=5",),
    "train.noise_every": ("train.noise_every=5",),
    "comm.overlap=thread|poll": ("comm.overlap=thread", "comm.overlap=poll"),
    "comm.compress": ("comm.compress=int8", "comm.compress=topk"),
    "comm.gpu=nccl": ("comm.gpu=nccl",),
    "train.spike": ("train.spike=3",),
    "model.kind=lstm|MODULE:FACTORY": ("model.kind=lstm", "model.kind=mine:make"),
    "model.kind=MODULE:FACTORY": ("model.kind=mine:make",), "train.recompute": ("train.recompute=true",),
    "train.micro_batch=auto": ("train.micro_batch=auto",),
    "train.loss=chunked": ("train.loss=chunked",), "train.eval_tasks": ("train.eval_tasks=one",),
    "strategy.group=node|rotating|pairs|exponential": tuple(
        f"strategy.name=local strategy.group={group}" for group in ("node", "rotating", "pairs", "exponential")
    ),
    "strategy.overlap=true": ("strategy.overlap=true",),
    "strategy.fragments": ("strategy.fragments=2 strategy.sync_every=4 strategy.meet_every=4",),
    "mesh.shard=1|2|3": ("mesh.shard=1", "mesh.shard=2", "mesh.shard=3"), "mesh.shard=1": ("mesh.shard=1",),
    "mesh.shard=2|3": ("mesh.shard=2", "mesh.shard=3"), "mesh.shard=3": ("mesh.shard=3",),
    "comm.reducer=root": ("comm.reducer=root",),
    "comm.reducer=allreduce|naive|root": ("comm.reducer=allreduce", "comm.reducer=naive", "comm.reducer=root"),
    "comm.transport=window": ("comm.transport=window",), "comm.copies=node": ("comm.copies=node",),
    "model.slices above 1": ("model.slices=2",),
    "model.lora_rank with head in model.lora_targets": ("model.lora_rank=4 model.lora_targets=q,head",),
    "model.lora_rank": ("model.lora_rank=4",), "optim.freeze": ("optim.freeze=embedding.*",),
    "model.input_mix": ("model.input_mix=true",),
    "model.zero_init": ("model.zero_init=true",), "train.init_from": ("train.init_from=other",),
    "optim.name=adam|sgd": ("optim.name=adam", "optim.name=sgd"), "optim.cautious_decay": ("optim.cautious_decay=true",),
    "optim.name=adamw|adam|sgd": ("optim.name=adamw", "optim.name=adam", "optim.name=sgd"),
    "optim.momentum_warmup": ("optim.momentum_warmup=9",),
    "strategy.outer_lr|outer_momentum": ("strategy.outer_lr=0.5", "strategy.outer_momentum=0.5"),
}


def refused(*words: str) -> str:
    with pytest.raises(UsageError) as caught:
        from_args([f"--{word}" for part in words for word in part.split()])
    return str(caught.value)


@pytest.mark.parametrize("rule", rules.RULES, ids=lambda rule: f"{rule.one}, {rule.other}")
def test_each_rule_refuses(rule: rules.Rule) -> None:
    for one, other in itertools.product(WORDS[rule.one], WORDS[rule.other]):
        assert f"{rule.one} cannot be combined with {rule.other}: {rule.why}" in refused(one, other)


@pytest.mark.parametrize(("words", "said"), [
    (("strategy.staleness=2",), "requires strategy.name=delayed or server or strategy.quorum below 1; it has no effect with"),
    (("strategy.name=delayed", "strategy.quorum=0.5"), "requires strategy.name=synchronous; it has no effect with delayed"),
    (("strategy.quorum=0.5", "strategy.group=pairs"), "requires strategy.name=local; it has no effect with quorum"),
    (("strategy.quorum=0",), "strategy.quorum=0.0 must be above 0"), (("strategy.quorum=1.1",), "must be from 0.0 to 1.0"),
    (("strategy.quorum=nan",), "must be a number"), (("strategy.quorum=-0.5",), "must be from 0.0 to 1.0"),
    (("strategy.name=delayed", "strategy.group=pairs"), "requires strategy.name=local; it has no effect with delayed"),
    (("strategy.name=delayed", "strategy.staleness=-1"), "must be at least 0"),
    (("strategy.name=local", "strategy.sync_every=4", "strategy.meet_every=6"), "must be a multiple of strategy.sync_every=4"),
    (("strategy.name=local", "strategy.meet_every=30"), "must be a multiple of strategy.sync_every=50, its automatic value. Set"),
    (("strategy.name=local", "strategy.sync_every=4", "strategy.fragments=5"), "more than the 4 steps between two averages"),
    (("strategy.name=local", "strategy.fragments=51"), "more than the 50 steps between two averages"),
    (("strategy.name=locl",), "did you mean 'local'"),
])  # fmt: skip
def test_what_means_nothing_is_refused(words: tuple[str, ...], said: str) -> None:
    assert said in refused(*words)


@pytest.mark.parametrize(("settings", "found"), [
    ({"quorum": 0.5}, (1, 10)), ({"quorum": 0.5, "meet_every": 3}, (1, 3)),
    ({"name": "synchronous"}, (1, 1)), ({"name": "delayed"}, (1, 10)), ({"name": "local"}, (50, 50)),
    ({"name": "local", "group": "pairs"}, (1, 50)), ({"name": "local", "group": "pairs", "sync_every": 8}, (8, 56)),
    ({"name": "local", "overlap": True, "sync_every": 20}, (20, 80)), ({"name": "local", "meet_every": 150}, (50, 150)),
])  # fmt: skip
def test_what_is_left_open(settings: dict[str, Any], found: tuple[int, int]) -> None:
    assert sync_intervals(PLAIN | {f"strategy.{key}": value for key, value in settings.items()}) == found


@pytest.mark.parametrize("words", [
    (), ("group=pairs",), ("overlap=true",), ("fragments=4",), ("meet_every=100",), ("sync_every=400",),
    ("group=node", "meet_every=7"),
])  # fmt: skip
def test_what_was_filled_in_is_accepted_and_depends_on_no_number_of_steps(tmp_path: Path, words: tuple[str, ...]) -> None:
    """Otherwise a run could not resume with more steps, and a new rank could not read the settings of the run."""
    config, found = from_args(["--strategy.name=local", *(f"--strategy.{word}" for word in words)]), []
    for steps in (20, 60, 1000):
        resolved = filled_in(config.with_values(train={"steps": steps}))
        (tmp_path / "config.toml").write_text(to_toml(resolved))
        again = from_args([str(tmp_path / "config.toml")])
        assert again == resolved == filled_in(again)
        found.append(resolved.strategy)
    assert found == found[:1] * 3


def filled_in(config: Config) -> Config:
    return resolve(config, 100, Lanes(16, 2, 8), 1, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize(("settings", "found"), [
    ({"strategy.name": "synchronous"}, (-1, -1)), ({"strategy.name": "local", "strategy.group": "pairs"}, (-1, -1)),
    ({"strategy.name": "local"}, (0.7, 0.7)), ({"strategy.name": "local", "strategy.overlap": True}, (0.7, 0.5)),
    ({"strategy.name": "local", "comm.compress": "int2"}, (0.7, 0.7)),
    ({"strategy.name": "local", "comm.compress": "topk", "strategy.overlap": True}, (1, 0)),
    ({"strategy.name": "local", "comm.compress": "randomk", "strategy.outer_momentum": 0.9}, (1, 0.9)),
    ({"strategy.name": "local", "strategy.outer_lr": 0.0, "strategy.outer_momentum": 0.0}, (0, 0)),
])  # fmt: skip
def test_an_outer_step_repeats_less_of_what_is_late(settings: dict[str, Any], found: tuple[float, float]) -> None:
    assert outer(PLAIN | settings) == found


def test_the_ratio_is_the_method_s_unless_it_was_given() -> None:
    found = {(kind, name): ratio(PLAIN | {"comm.compress": kind, "strategy.name": name})
             for kind in ("topk", "randomk", "int8") for name in ("synchronous", "local")}
    assert list(found.values()) == [0.01, 0.03, 0.1, 0.1, 0.0, 0.0]
    assert ratio(PLAIN | {"comm.compress": "topk", "comm.ratio": 0.5, "strategy.name": "local"}) == 0.5


def test_the_table_in_the_docs_is_the_code_s() -> None:
    assert rules.table() in (ROOT / "docs/methods.md").read_text()


def test_every_setting_of_the_section_is_somebody_s() -> None:
    keys = {key.partition(".")[2] for key in PLAIN if key.startswith("strategy.")} - {"name"}
    assert keys == set(METHODS)
