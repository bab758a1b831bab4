"""Laws of settings: every key has a default and a description, a wrong key gets a suggestion, and files and command lines are
equivalent."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpidp.config import rules
from mpidp.config.command_line import from_args, read_run_config, read_toml, settings_help
from mpidp.config.recipes import RECIPES
from mpidp.config.schema import Config, checked, fields_of, to_toml
from mpidp.config.settings import FIXED
from mpidp.config.suggest import SYNONYMS, suggestion
from mpidp.errors import UsageError
from mpidp.model.options import DEFAULTS as OPTIONS

# Changing an option requires a deliberate edit of this list: users' files and scripts contain these names.
KEYS = """
data.path data.cache_dir data.cache_gb data.retry_seconds data.verify data.order data.resident data.documents
model.kind model.options model.num_layers model.num_heads model.num_kv_heads model.model_dim model.hidden_dim model.seq_len
model.dropout
model.tie_embeddings model.rope_theta model.rope_scaling model.norm_eps model.head_dim model.vocab_size
model.activation model.gated model.attention_bias model.mlp_bias model.qk_norm model.norm model.norm_plus_one model.norm_place
model.parallel model.positions model.position_rows model.rotary_dims model.rotary_layers model.window model.window_layers
model.window_rope_theta model.window_rope_scaling model.embedding_scale model.input_mix model.residual_scale model.attention_scale
model.logit_scale model.attention_cap model.logit_cap
model.slices model.zero_init model.recipe model.lora_rank model.lora_alpha model.lora_targets
train.init_from train.steps train.tokens train.epochs train.target_loss train.patience train.global_batch train.micro_batch
train.lanes train.seed train.device train.dtype train.compile train.recompute train.loss train.deterministic train.threads
train.eval_every train.eval_tokens train.eval_tasks train.eval_tasks_dir train.eval_tasks_limit train.save_every
train.balance train.audit_every
train.noise_every train.spike train.max_skipped
optim.name optim.schedule optim.lr optim.min_lr optim.warmup_steps optim.weight_decay optim.beta1 optim.beta2 optim.clip
optim.cautious_decay optim.momentum_warmup optim.freeze
strategy.name strategy.quorum strategy.sync_every strategy.meet_every strategy.staleness strategy.compensation strategy.group
strategy.group_size strategy.outer_lr strategy.outer_momentum strategy.overlap strategy.servers
strategy.mode strategy.replay strategy.fragments
comm.reducer comm.compress comm.ratio comm.ratio_warmup comm.momentum comm.rank
comm.transport comm.copies comm.overlap comm.bucket_mb comm.gpu
mesh.tp mesh.pp mesh.dp mesh.interleave mesh.sequence mesh.shard
run.dir run.resume run.keep run.mirror run.hang_seconds run.tries run.stop_early_seconds
faults.min_ranks faults.respawn
metrics.timeline metrics.kernels metrics.track metrics.project metrics.tags metrics.tensorboard metrics.energy
energy.grams_per_kwh energy.price_per_node_hour
"""


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_sets_what_is_not_given(name: str) -> None:
    found, plain = from_args([f"--model.recipe={name}"]).flat(), Config().flat()
    assert {key: value for key, value in found.items() if value != plain[key]} == RECIPES[name] | (
        {"model.recipe": name} if name != "none" else {}
    )
    for key, value in RECIPES[name].items():
        given = from_args([f"--{key}={plain[key]}", f"--model.recipe={name}"])
        assert given.flat() == found | {key: plain[key]}, value


def test_a_saved_recipe_is_read_as_it_was(tmp_path: Path) -> None:
    """Saved settings have priority over the recipe, so another version of a recipe does not change a run."""
    config = from_args(["--model.recipe=modern", "--model.qk_norm=layer", "--optim.name=adamw"])
    (tmp_path / "config.toml").write_text(to_toml(config))
    assert from_args([str(tmp_path / "config.toml")]) == config


def test_the_names_of_options_are_pinned() -> None:
    assert [key for key, _, _ in fields_of()] == KEYS.split()


@pytest.mark.parametrize(("key", "about", "default"), list(fields_of()), ids=KEYS.split())
def test_every_key_has_a_default_within_its_limits_and_words(key: str, about: dataclasses.Field[Any], default: Any) -> None:
    meta = about.metadata
    assert meta["text"] and type(default).__name__ == about.type
    assert not meta["choices"] or default in meta["choices"]
    assert meta["low"] is None or default >= meta["low"]
    assert meta["high"] is None or default <= meta["high"]
    lines = [line for line in settings_help().splitlines() if line[3:].split(" ")[0] == key]
    assert len(lines) == 1 and meta["text"] in lines[0] and (lines[0][1] == "*") == (meta["resume"] == FIXED)
    assert all(choice in lines[0] for choice in meta["choices"])


def test_the_defaults_are_a_run() -> None:
    assert from_args([]) == Config() == checked(Config())


def refused(*words: str) -> str:
    with pytest.raises(UsageError) as caught:
        from_args(words)
    assert caught.value.exit_code == 2
    return str(caught.value)


@pytest.mark.parametrize(
    ("word", "near"),
    [("--train.step=3", "train.steps"), ("--model.num_layer=3", "model.num_layers"), ("--lr=3", "optim.lr"),
     ("--train.microbatch=1", "train.micro_batch"), ("--run.directory=x", "run.dir"), ("--optimizer.lr=1", "optim.lr"),
     ("--train.lr=1", "optim.lr"), ("--optim.learning_rate=1", "optim.lr"), ("--train.batch_size=1", "train.global_batch"),
     ("--model.n_layer=1", "model.num_layers"), ("--data.dir=x", "data.path"), ("--optim.momentum=0.9", "optim.beta1"),
     ("--optim.steps=3", "train.steps"), ("--train.Max-Iters=3", "train.steps"), ("--model.hiddensize=8", "model.model_dim")],
)
def test_an_unknown_key_names_the_nearest(word: str, near: str) -> None:
    said = refused(word)
    assert word[2:].split("=")[0] in said and f"did you mean {near!r}" in said and "--help" in said


def test_unknown_keys_of_any_kind_are_refused_with_words() -> None:
    for key in ("", "x", "é", "train", "train.", ".steps", "data.path.x", "a" * 1000):
        assert "unknown setting" in refused(f"--{key}=1")


@pytest.mark.parametrize(
    ("word", "near"),
    [("--optim.name=adamW", "adamw"), ("--optim.name=adan", "adam"),
     ("--comm.reducer=three", "tree"), ("--comm.compress=power", "powersgd"), ("--train.device=gpu", "cpu"),
     ("--run.resume=new", "never"), ("--optim.schedule=cos", "cosine")],
)
def test_an_unknown_value_names_the_nearest(word: str, near: str) -> None:
    said = refused(word)
    assert "is not one of" in said and f"did you mean {near!r}" in said


@pytest.mark.parametrize(
    "word",
    ["--train.steps=3.5", "--train.steps=many", "--train.steps=", "--optim.lr=nan", "--optim.lr=inf", "--optim.lr=-1e-3",
     "--train.compile=yes", "--model.dropout=1.0", "--model.dropout=-0.1", "--train.steps=-1", "--run.keep=0",
     "--optim.warmup_steps=-2", "--train.steps=1e400", "--comm.bucket_mb=0", "--train.seed=²",
     "--train.seed=9223372036854775808", "--data.verify=maybe",
     "--comm.ratio=1.01", "--comm.ratio=-0.1", "--comm.rank=0", "--comm.momentum=1"],
)
def test_values_out_of_kind_or_limits_are_refused_by_name(word: str) -> None:
    assert word[2:].split("=")[0] in refused(word)


@pytest.mark.parametrize(
    ("words", "found"),
    [(["--train.steps=1e3"], 1000), (["--train.steps=1_000"], 1000), (["--train.steps", "+7"], 7),
     (["--train.steps=5", "--train.steps=6"], 6)],
)
def test_numbers_may_be_written_in_several_ways(words: list[str], found: int) -> None:
    assert from_args(words).train.steps == found


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--train.global_batch=2", "--train.micro_batch=4"], ["train.global_batch=2", "train.micro_batch=4"]),
        (["--train.global_batch=16", "--train.micro_batch=4", "--train.lanes=5"], ["train.lanes=5"]),
        (["--model.model_dim=100", "--model.num_heads=8"], ["model.model_dim=100", "model.num_heads=8"]),
        (["--model.model_dim=12", "--model.num_heads=4"], ["model.model_dim=12"]),  # an odd head size cannot be rotated
        (["--model.num_heads=4", "--model.num_kv_heads=3"], ["model.num_kv_heads=3"]),
        (["--model.head_dim=3"], ["model.head_dim=3 must be even"]),
        (["--model.rope_scaling=yarn:2"], ["model.rope_scaling='yarn:2'", "llama3:8,1,4,8192"]),
        (["--model.rope_scaling=llama3:8,4,1,8192"], ["model.rope_scaling="]),
        (["--model.rope_scaling=llama3:8,1,x,8192"], ["model.rope_scaling="]),
        (["--train.steps=5", "--train.epochs=1"], ["train.steps", "train.epochs"]),
        (["--train.tokens=5", "--train.epochs=0.5"], ["train.tokens"]),
        (["--optim.lr=1e-3", "--optim.min_lr=1e-2"], ["optim.min_lr=0.01"]),
        (["--train.steps=5", "--optim.warmup_steps=6"], ["optim.warmup_steps=6"]),
        (["--comm.reducer=root", "--train.balance=measured"], ["train.balance=measured", "comm.reducer=root"]),
        (["--comm.reducer=naive", "--train.audit_every=3", "--train.noise_every=1"], ["train.audit_every", "train.noise_every"]),
        (["--comm.reducer=allreduce", "--comm.transport=window", "--comm.copies=node"], ["comm.transport", "comm.copies=node"]),
        (["--comm.compress=int8", "--comm.reducer=tree"], ["comm.compress=int8", "comm.reducer=tree"]),
        (["--comm.compress=topk", "--comm.reducer=naive"], ["comm.compress=topk", "comm.reducer=naive"]),
        (["--comm.compress=bf16", "--train.audit_every=3"], ["comm.compress=bf16", "train.audit_every=3"]),
        (["--comm.compress=bf16", "--train.balance=steal"], ["comm.compress=bf16", "train.balance=steal"]),
        (["--comm.compress=onebit", "--comm.transport=window"], ["comm.compress=onebit", "comm.transport=window"]),
        (["--comm.compress=int4", "--comm.momentum=0.9"], ["comm.momentum=0.9", "topk or randomk", "comm.compress=int4"]),
        (["--comm.compress=powersgd", "--comm.ratio=0.1"], ["comm.ratio=0.1", "topk or randomk"]),
        (["--comm.ratio_warmup=5"], ["comm.ratio_warmup=5", "topk or randomk", "comm.compress=none"]),
        (["--metrics.timeline=12"], ["metrics.timeline='12'", "as in 10:12"]),
        (["--metrics.timeline=3:x"], ["metrics.timeline='3:x'", "as in 10:12"]),
        (["--metrics.timeline=0:2"], ["metrics.timeline='0:2'", "counted from 1"]),
        (["--metrics.timeline=5:4"], ["not be before the first"]),
        (["--metrics.timeline=1:101"], ["at most 100"]), (["--metrics.kernels=true"], ["metrics.kernels=true", "needs a"]),
        (["--train.steps=11", "--metrics.timeline=10:12"], ["metrics.timeline=10:12", "train.steps=11"]),
        (["--train.spike=0.5"], ["train.spike=0.5 must be more than 1"]),
        (["--train.balance=steal", "--comm.transport=messages"], ["train.balance=steal", "comm.transport=messages"]),
        (["--train.balance=steal", "--comm.overlap=thread"], ["comm.overlap", "train.balance=steal"]),
        (["--comm.gpu=nccl", "--train.device=cpu", "--comm.reducer=root"], ["=nccl", "train.device=cpu, comm.reducer=root"]),
        (["--comm.gpu=nccl", "--comm.overlap=poll"], ["comm.gpu=nccl", "comm.overlap=poll"]),
        (["--comm.gpu=nccl", "--comm.compress=int8"], ["comm.compress cannot be combined with comm.gpu=nccl"]),
    ],
)
def test_contradictions_are_refused_by_name(words: list[str], named: list[str]) -> None:
    said = refused(*words)
    assert all(name in said for name in named)


def test_all_contradictions_are_told_at_once() -> None:
    said = refused("--optim.lr=0", "--optim.min_lr=1", "--model.num_kv_heads=3", "--train.lanes=9999")
    assert said.count(";") == 2


@pytest.mark.parametrize(
    ("text", "said"),
    [("[train\n", "cannot read this"), ("steps = 3\n", "is outside a section"), ("[train]\nstep = 3\n", "train.steps"),
     ("[training]\nsteps = 3\n", "train.steps"), ("[train]\nsteps = '3x'\n", "must be an integer"),
     ("[train]\nsteps = true\n", "must be an integer"), ("[train]\ncompile = 1\n", "true or false"),
     ("[optim]\nlr = nan\n", "a number"), ("[train]\nsteps = [1]\n", "must be an integer"),
     ("[run]\ndir = []\n", "a string"),
     ("[train.steps]\nx = 1\n", "must be an integer")],
)
def test_a_wrong_file_is_refused_by_its_name(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "job.toml"
    path.write_text(text)
    words = refused(str(path))
    assert str(path) in words and said in words


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    for path in (tmp_path / "none.toml", tmp_path, tmp_path / "bytes.toml"):
        assert str(path) in refused(str(path))


def test_the_command_line_outweighs_the_file_whatever_the_order(tmp_path: Path) -> None:
    path = tmp_path / "job.toml"
    path.write_text("[train]\nsteps = 7\nseed = 8\n[data]\nresident = true\n")
    for words in ([str(path), "--train.steps=9"], ["--train.steps", "9", str(path)]):
        config = from_args(words)
        assert (config.train.steps, config.train.seed, config.data.resident) == (9, 8, "true")
    assert "second configuration file" in refused(str(path), str(path))
    assert "has no value" in refused("--train.steps")


def numbers(about: dataclasses.Field[Any]) -> st.SearchStrategy[Any]:
    low, high = about.metadata["low"], about.metadata["high"]
    if about.type == "int":
        return st.integers(int(low), int(high) if high is not None else 2**60)
    return st.floats(low, high, allow_nan=False, allow_infinity=False)


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x7f"), max_size=20)
FREE = {  # settings that contradict no other, at any value
    key: st.sampled_from(about.metadata["choices"]) if about.metadata["choices"]
    else st.booleans() if about.type == "bool"
    else TEXT.filter(lambda text: text[:1] != "~" and "$" not in text) if about.metadata["unit"] == "path"
    else TEXT if about.type == "str"
    else numbers(about)
    for key, about, _ in fields_of()
    if key.split(".")[1] not in {
        *OPTIONS, "global_batch", "micro_batch", "lanes", "model_dim", "num_heads", "num_kv_heads", "tokens", "head_dim",
        "rope_scaling", "timeline", "kernels", "kind", "options", "epochs", "min_lr", "warmup_steps",
    } and not key.startswith("strategy.")
}
STRATEGIES = st.sampled_from([
    {}, {"name": "delayed", "staleness": 3, "compensation": 0.5}, {"name": "local", "sync_every": 7, "outer_lr": 0.3},
    {"name": "local", "group": "pairs", "meet_every": 9}, {"name": "local", "overlap": True, "fragments": 4},
])
TREE_ALONE = {
    "train.balance": "even", "train.audit_every": 0, "train.noise_every": 0, "comm.transport": "auto", "comm.copies": "rank",
}


@st.composite
def configs(draw: st.DrawFn) -> Config:
    chosen = {key: draw(values) for key, values in FREE.items()}
    micro, heads = draw(st.integers(1, 20)), draw(st.integers(1, 8))
    micro_batches = draw(st.integers(1, 50))
    chosen |= {
        "train.micro_batch": micro, "train.global_batch": micro * micro_batches,
        "train.lanes": draw(st.integers(0, micro_batches)), "model.num_heads": heads,
        "model.model_dim": 2 * heads * draw(st.integers(1, 9)), "optim.min_lr": draw(st.floats(0, chosen["optim.lr"])),
        "model.num_kv_heads": draw(st.sampled_from([k for k in range(heads + 1) if k == 0 or heads % k == 0])),
        "optim.warmup_steps": draw(st.integers(-1, chosen["train.steps"])),
        "train.spike": chosen["train.spike"] * (chosen["train.spike"] > 1),
        "train.eval_tasks": draw(st.sampled_from(["", "a", "a,b"])), "model.slices": draw(st.sampled_from([1, 2, 8])),
    }
    without_tasks = {"train.eval_tasks_dir": "", "train.eval_tasks_limit": 0}
    chosen |= {"train.compile": False} if chosen["train.eval_tasks"] else without_tasks
    if chosen["optim.name"] in ("adam", "sgd"):
        chosen["optim.cautious_decay"] = False
    if chosen["optim.name"] not in ("muon", "normuon") or chosen["optim.freeze"] or chosen["model.lora_rank"]:
        chosen["optim.momentum_warmup"] = 0
    if chosen["train.init_from"]:
        chosen["model.zero_init"] = False
    if not chosen["train.eval_every"]:
        chosen |= {"train.patience": 0, "train.target_loss": 0.0}
    strategy: dict[str, Any] = draw(STRATEGIES)
    if "group" in strategy:
        chosen["comm.compress"] = "none"
    if strategy:
        chosen |= {"comm.reducer": "allreduce", "comm.overlap": "none", "train.spike": 0.0}
    if chosen["comm.reducer"] not in ("auto", "tree"):
        chosen |= TREE_ALONE
    if chosen["comm.compress"] != "none":
        chosen |= TREE_ALONE | {"comm.reducer": draw(st.sampled_from(["auto", "allreduce"]))}
    if chosen["comm.compress"] not in ("topk", "randomk"):
        chosen |= {"comm.ratio": 0.0, "comm.ratio_warmup": 0, "comm.momentum": 0.0}
    if chosen["train.balance"] == "steal":
        chosen |= {"comm.transport": "window", "comm.overlap": "none"}
    plain = chosen["comm.compress"] == "none" and not strategy
    if not plain or {chosen["train.device"], chosen["comm.reducer"], chosen["comm.overlap"]} & {"cpu", "root", "thread", "poll"}:
        chosen["comm.gpu"] = "auto" if chosen["comm.gpu"] == "nccl" else chosen["comm.gpu"]
    settings = Config().flat() | chosen | {f"strategy.{key}": v for key, v in strategy.items()}
    of_meshes = [rule for rule in rules.RULES if rule.one.startswith(("mesh.", "train.eval_tasks"))]
    if any(rule.has_one(settings) and rule.has_other(settings) for rule in of_meshes):
        chosen |= {"mesh.shard": 0, "mesh.tp": 1, "mesh.pp": 1, "mesh.sequence": False, "mesh.interleave": 1}
    settings |= chosen
    if any(rule.has_one(settings) and rule.has_other(settings) for rule in rules.RULES if rule.one == "model.slices above 1"):
        chosen["model.slices"] = 1
    sections: dict[str, dict[str, Any]] = {"strategy": strategy}
    for key, value in chosen.items():
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = value
    return checked(Config().with_values(**sections))


@settings(max_examples=60, deadline=None)
@given(configs())
def test_a_config_comes_back_from_its_words(config: Config) -> None:
    values = {key: str(value).lower() if isinstance(value, bool) else str(value) for key, _, value in fields_of(config)}
    assert from_args([f"--{key}={value}" for key, value in values.items()]) == config
    assert from_args([word for key, value in values.items() for word in (f"--{key}", value)]) == config


@settings(max_examples=60, deadline=None)
@given(config=configs())
def test_a_config_comes_back_from_its_file(tmp_path_factory: pytest.TempPathFactory, config: Config) -> None:
    path = tmp_path_factory.getbasetemp() / "config.toml"
    path.write_bytes(to_toml(config).encode())
    assert from_args([str(path)]) == config
    assert read_toml(path) == config.flat()


@pytest.mark.parametrize("name", ["plain", 'quo"te', "back\\slash", "new\nline", "ünï cödé 漢字", "tab\t", "\x00\x1f",
                                  "\x7f"])
def test_any_path_comes_back_from_its_file(tmp_path: Path, name: str) -> None:
    config = Config().with_values(run={"dir": name})
    (tmp_path / "c.toml").write_bytes(to_toml(config).encode())
    assert from_args([str(tmp_path / "c.toml")]) == config


def test_with_values_leaves_the_rest() -> None:
    config = Config().with_values(train={"steps": 3}, run={"dir": "x"})
    changed = {key for (key, _, a), (_, _, b) in zip(fields_of(config), fields_of(Config()), strict=True) if a != b}
    assert changed == {"train.steps", "run.dir"}


def test_synonyms_name_settings_and_are_no_settings() -> None:
    keys = {key for key, _, _ in fields_of()}
    words = [word for words in SYNONYMS.values() for word in words.split()]
    assert keys >= set(SYNONYMS) and len(words) == len(set(words))
    for setting, names in SYNONYMS.items():
        assert all(suggestion(name, keys) == setting for name in names.split() if name not in {k.partition(".")[2] for k in keys})


@pytest.mark.parametrize("key", [key for key, about, _ in fields_of() if about.metadata["unit"] == "path"])
def test_paths_begin_at_the_home_folder(key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In `--run.dir=~/x` and in a file no shell replaces ~."""
    monkeypatch.setenv("HOME", "/home/me")
    (tmp_path / "a.toml").write_text(f'[{key.partition(".")[0]}]\n{key.partition(".")[2]} = "~/x"\n')
    extra = {"strategy.replay": ["--strategy.name=server", "--train.steps=5"], "train.eval_tasks_dir": ["--train.eval_tasks=a"]
             }.get(key, [])
    for words in ([f"--{key}=~/x"], [f"--{key}", "~/x"], [str(tmp_path / "a.toml")]):
        assert from_args([*words, *extra]).flat()[key] == "/home/me/x"
    assert "the home folder of ~nobody-here is unknown" in refused(f"--{key}=~nobody-here/x")
    assert f"{key}=$HOME/x: $HOME is not expanded here" in refused(f"--{key}=$HOME/x")
    assert from_args([f"--{key}=a~b/$none", *extra]).flat()[key] == "a~b/$none"


@pytest.mark.parametrize(("words", "why"), [
    (["--train.eval_tasks_dir=x"], "require train.eval_tasks"), (["--train.eval_tasks=a,,b"], "give names of tasks"),
    (["--train.eval_tasks=a", "--mesh.tp=2"], "ranks answer different requests"),
    (["--train.eval_tasks=a", "--mesh.shard=3"], "a forward pass needs all replicas"),
    (["--train.eval_tasks=a", "--train.compile=true"], "compile the model again for each length of request"),
])
def test_tasks_that_cannot_be_evaluated_during_training_are_refused(words: list[str], why: str) -> None:
    assert why in refused(*words)


@pytest.mark.parametrize("stop", ["train.patience=3", "train.target_loss=2.5"])
def test_stopping_by_loss_needs_evaluations(stop: str) -> None:
    assert f"{stop} requires train.eval_every above 0" in refused(f"--{stop}", "--train.eval_every=0")


def test_the_settings_of_a_run_have_their_types(tmp_path: Path) -> None:
    """Choices and settings of other versions are kept, but a report must not stumble over a text where it needs a number."""
    path = tmp_path / "config.toml"
    old = '[old]\nkey = "x"\nmany = [1]\n[data]\nverify = false\n[comm]\nreducer = "other"\n'
    path.write_text(f"[mesh]\ntp = 1\n[optim]\nlr = 1\n{old}")
    found = read_run_config(path)
    assert found["old.key"] == "x" and found["data.verify"] is False and found["comm.reducer"] == "other"
    for wrong in ('[mesh]\ntp = "1"', "[mesh]\ntp = [1]", "[mesh]\ntp = 1.5", "[mesh]\ntp = true", "[run]\ndir = 3", "tp = 1",
                  "[optim]\nlr = {}", "[optim]\nlr = inf", "[energy]\ngrams_per_kwh = 1" + "0" * 400, "[mesh"):
        path.write_text(wrong)
        with pytest.raises(UsageError, match="config.toml: "):
            read_run_config(path)
