"""Laws of the predictions for methods: seconds follow the formulas, rejections have a reason, and a small gain does not change
the recommendation."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mpi4py import MPI

from mpidp.config.command_line import from_args
from mpidp.config.resolve import model_shape
from mpidp.config.schema import Config, checked, fields_of
from mpidp.errors import DataError, UsageError
from mpidp.model.shape import TransformerShape, num_parameters
from mpidp.plan import __main__ as planning
from mpidp.plan.methods.predict import (
    METHODS,
    MethodRow,
    predict,
    recommend,
    sent_bytes,
    step_seconds,
    to_paste,
    variant,
    with_speeds,
)
from mpidp.plan.methods.traffic import Cluster, cluster_of, link_of, one_sum, sizes_of
from mpidp.plan.methods.trials import TrialOptions, _read, compare_methods, find_cluster
from mpidp.plan.ranks.table import methods_table

CONFIG = Config().with_values(train={"global_batch": 32, "micro_batch": 2}, comm={"overlap": "none"})
SLOW = link_of("100,20", 4)
SAID = {"ranks": 8, "ranks_per_node": [4, 4], "latency_seconds": 1e-4, "bandwidth_bytes_per_second": 1e8}
SIZES = sizes_of(CONFIG, 1024)


def of(name: str, config: Config = CONFIG) -> Config:
    return variant(config, name)


def test_sizes_are_the_models_without_its_memory() -> None:
    shape: TransformerShape = model_shape(CONFIG, 1024)
    assert sum(s.numel() for bucket in SIZES.buckets for s in bucket.shapes) == num_parameters(shape)
    assert SIZES.buckets[-1].stop == SIZES.num_elements


def test_seconds_are_those_of_the_formulas() -> None:
    compute, n, band, late = 0.5, SIZES.num_bytes, 1e8 / 8, 0.02
    tell = 2 * 2 * late
    ring = one_sum(CONFIG.with_values(comm={"reducer": "allreduce"}), SIZES, SLOW)
    assert ring.sent_bytes == pytest.approx(2 * 3 / 4 * n, rel=1e-3)
    a_sum = ring.seconds(SLOW)
    assert a_sum == pytest.approx(2 * 3 / 4 * n / band + ring.messages * late, rel=1e-3) and ring.messages % 6 == 0

    def seconds(name: str, config: Config = CONFIG) -> float:
        return step_seconds(of(name, config.with_values(comm={"reducer": "allreduce"})), SIZES, SLOW, compute)

    assert seconds("synchronous") == pytest.approx(compute + a_sum + tell)
    hides = CONFIG.with_values(comm={"overlap": "auto"})
    assert seconds("synchronous", hides) == pytest.approx(compute + a_sum + tell - 2 / 3 * compute / 4)  # of 4 micro-batches
    assert seconds("delayed") == pytest.approx(max(compute, a_sum + tell) + tell / 10)
    assert seconds("local") == pytest.approx(compute + (a_sum + 2 * tell) / 50)
    round_trip = compute * 6 / 4 + 2 * n / band + 2 * late  # three workers compute the 16 micro-batches
    assert seconds("server-async") == pytest.approx(max(round_trip, 3 * n / band) + (n / band + tell) / 10)
    pair, met = n / band + late, a_sum + tell
    assert seconds("local-pairs") == pytest.approx(compute + (49 * pair + met) / 50)
    assert seconds("local-overlap") == pytest.approx(compute + (9 * tell + met + tell) / 500)  # hidden except at the meeting
    assert step_seconds(of("local"), SIZES, replace(SLOW, ranks=1, nodes=1), compute) == compute


def test_ranks_of_a_node_share_its_link_and_the_tree_its_memory() -> None:
    one, two = Cluster(8, 8, 0.0, 1e8), Cluster(8, 2, 0.0, 1e8)
    apart, together = (one_sum(CONFIG, SIZES, cluster) for cluster in (one, two))
    assert apart.link_bytes == pytest.approx(2 * 7 / 8 * SIZES.num_bytes, rel=1e-2)
    assert together.link_bytes == pytest.approx(2 * 1 / 2 * SIZES.num_bytes, rel=1e-2)
    assert together.sent_bytes == pytest.approx(together.link_bytes / 4, rel=0.2)  # slices consist of whole blocks
    assert one_sum(CONFIG, SIZES, Cluster(8, 1, 0.0, 1e8)).sent_bytes == 0
    coded = [one_sum(of("int8"), SIZES, cluster) for cluster in (one, two)]
    assert coded[0].sent_bytes == coded[1].sent_bytes  # every rank sends for itself
    assert coded[1].link_bytes == pytest.approx(coded[0].link_bytes * 4 * 4 / 7)


def test_what_is_seldom_sent_is_spread_over_the_steps() -> None:
    a_sum = one_sum(of("local"), SIZES, SLOW).sent_bytes
    assert sent_bytes(of("local"), SIZES, SLOW, 100) == 2 * a_sum
    assert sent_bytes(of("delayed"), SIZES, SLOW, 7) == 7 * one_sum(of("delayed"), SIZES, SLOW).sent_bytes
    assert sent_bytes(of("server-async"), SIZES, SLOW, 7) == 7 * SIZES.num_bytes
    assert sent_bytes(of("local-pairs"), SIZES, SLOW, 50) == 49 * SIZES.num_bytes + a_sum


def test_settings_to_paste_make_the_method() -> None:
    mine = checked(CONFIG.with_values(comm={"compress": "topk", "ratio": 0.5}, optim={"lr": 0.001}))
    words = [f"--{key}={value}" for key, _, value in fields_of(mine) if value != ""]
    for name in METHODS:
        assert from_args([*words, *to_paste(of(name, mine), mine)]) == of(name, mine)
    assert to_paste(of("synchronous"), CONFIG) == [] and "--comm.ratio=0.0" in to_paste(of("bf16", mine), mine)


def test_what_a_config_cannot_take_is_listed_with_the_reason() -> None:
    rows = {row.method: row for row in predict(CONFIG.with_values(train={"audit_every": 5}), 1024, SLOW, 0.1)}
    assert not rows["synchronous"].refused and "train.audit_every" in rows["delayed"].refused
    assert all(row.step_seconds is None and row.speed is None for row in rows.values() if row.refused)
    alone = {row.method: row for row in predict(CONFIG, 1024, Cluster(1, 1, 0.0, 1e9), 0.1)}
    assert "no rank remains" in alone["server-async"].refused and "nothing is sent" in alone["powersgd"].refused
    assert alone["topk"].sent_bytes == 0 and recommend(list(alone.values()), tried=False)[0] == "synchronous"
    assert [row.method for row in predict(CONFIG, 1024, SLOW, 0.1, ["topk"])] == ["synchronous", "topk"]
    with pytest.raises(UsageError, match="--methods: there is no method top. The methods are synchronous, bf16"):
        predict(CONFIG, 1024, SLOW, 0.1, ["top"])


def rows_of(**seconds: float) -> list[MethodRow]:
    return with_speeds([MethodRow(name.replace("_", "+"), [], "", 1.0, s) for name, s in seconds.items()])


def test_nothing_is_risked_for_less_than_a_tenth() -> None:
    best, why = recommend(rows_of(synchronous=1.0, bf16=0.95, local=0.92), tried=False)
    assert best == "synchronous" and "no other method makes a step at least 10% faster" in why
    best, why = recommend(rows_of(synchronous=1.0, bf16=0.9), tried=False)
    assert best == "bf16" and "the fastest" in why


def test_the_method_that_changes_least_of_those_near_the_fastest() -> None:
    assert recommend(rows_of(synchronous=1.0, bf16=0.6, int8=0.42, local=0.4), tried=False)[0] == "int8"
    assert recommend(rows_of(synchronous=1.0, bf16=0.6, int8=0.5, local=0.2), tried=False)[0] == "local"
    assert recommend(rows_of(bf16=0.6), tried=False)[0] == ""


def test_what_was_tried_is_judged_by_its_loss() -> None:
    def tried(**found: tuple[float, float]) -> tuple[str, str]:
        rows = rows_of(**{name: seconds for name, (seconds, _) in found.items()})
        return recommend([replace(row, loss=found[row.method][1]) for row in rows], tried=True)

    assert tried(synchronous=(1.0, 3.0), int8=(0.5, 2.9), local=(0.1, 2.95))[0] == "int8"
    assert tried(synchronous=(1.0, 3.0), int8=(0.5, 3.1))[0] == "synchronous"
    assert tried(synchronous=(1.0, 3.0), int8=(0.95, 2.0))[0] == "synchronous"  # a lower loss by chance: its steps are not faster


def test_the_doctors_file_says_how_ranks_lie() -> None:
    assert cluster_of(SAID, 0, "x") == Cluster(8, 2, 1e-4, 1e8)
    assert cluster_of(SAID, 5, "x") == Cluster(5, 2, 1e-4, 1e8)
    assert cluster_of(SAID, 16, "x").nodes == 4
    for wrong in ({"latency_seconds": None}, {"bandwidth_bytes_per_second": 0}, {"ranks_per_node": 3}, {"ranks": None}):
        with pytest.raises(UsageError, match=r"cluster\.json has no measurement of a link.* Run `mpirun .* mpidp\.doctor`"):
            cluster_of(SAID | wrong, 0, "cluster.json")


@pytest.mark.parametrize("words", ["100", "100,", "0,1", "-1,1", "100,-1", "nan,1", "inf,1", "a,b", "1,2,3"])
def test_a_link_that_is_none(words: str) -> None:
    with pytest.raises(UsageError, match=r"--link=.*: give the bandwidth in Mbit/s"):
        link_of(words, 2)


def test_who_says_how_fast_the_link_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config, alone = CONFIG.with_values(run={"dir": "run"}), MPI.COMM_SELF
    with pytest.raises(UsageError, match=r"no cluster\.json.*mpidp\.doctor.*--link"):
        find_cluster(config, TrialOptions(), alone)
    with pytest.raises(UsageError, match=r"--cluster=there\.json: no such file"):
        find_cluster(config, TrialOptions(cluster="there.json"), alone)
    with pytest.raises(UsageError, match="Give --ranks"):
        find_cluster(config, TrialOptions(link="100,1"), alone)
    Path("cluster.json").write_text(json.dumps(SAID))
    assert find_cluster(config, TrialOptions(), alone) == (Cluster(8, 2, 1e-4, 1e8), "cluster.json")
    Path("run").mkdir()
    Path("run/cluster.json").write_text(json.dumps({**SAID, "ranks": 2}))
    assert find_cluster(config, TrialOptions(ranks=4), alone) == (Cluster(4, 1, 1e-4, 1e8), "run/cluster.json")
    Path("run/cluster.json").write_text("{")
    with pytest.raises(UsageError, match="is not a file of mpidp.doctor"):
        find_cluster(config, TrialOptions(), alone)
    with pytest.raises(UsageError, match="mpirun -np N"):
        compare_methods(config, TrialOptions(seconds=1.0, link="100,1"), alone)
    with pytest.raises(DataError, match="no shards"):
        compare_methods(config.with_values(data={"path": "none"}), TrialOptions(ranks=2, link="100,1"), alone)


@pytest.mark.parametrize(("sections", "why"), [
    ({"mesh": {"tp": 2, "pp": 2}}, "mesh.tp=2, mesh.pp=2: `plan methods` compares methods only for models that are not divided"),
    ({"mesh": {"shard": 1}}, "mesh.shard=1: .* Omit these settings, or use `plan mesh`"),
    ({"train": {"micro_batch": 0}}, "train.micro_batch=auto: `plan methods` needs a number"),
])  # fmt: skip
def test_what_the_formulas_do_not_cover_is_rejected(sections: dict[str, Any], why: str) -> None:
    with pytest.raises(UsageError, match=why):
        compare_methods(CONFIG.with_values(**sections), TrialOptions(ranks=4, link="100,1", step_seconds=0.1), MPI.COMM_SELF)


def said_by(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["plan", "methods", *words])
    planning.main()


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--modle.num_layers=2"], "unknown setting 'modle.num_layers'"), (["--nonsense"], "--nonsense has no value"),
        (["a.toml"], "a.toml: cannot read"), (["--plot", "a.png"], "Add --run"), (["--run", "0"], "more than 0"),
        (["--run=nan"], "more than 0"), (["--ranks", "0"], "give one whole number"), (["--step-seconds=-1"], "more than 0"),
    ],
)
def test_wrong_words(words: list[str], why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=why):
        said_by(words, monkeypatch)


def test_a_plot_without_matplotlib_is_refused_before_anything_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="needs matplotlib"):
        said_by(["--run", "--plot", "a.png"], monkeypatch)


def test_the_table_says_all_of_it() -> None:
    rows = [vars(row) for row in predict(CONFIG.with_values(train={"audit_every": 5}), 1024, SLOW, 0.1)]
    found: dict[str, Any] = {
        **vars(SLOW), "link_from": "--link=100,20", "compute_seconds": 0.1, "compute_given": False, "tried_seconds": 0.0,
        "loss_name": "", "rows": rows, "foretold": rows, "took_seconds": {}, "recommended": "local", "why": "local: it pays.",
    }  # fmt: skip
    said = methods_table(found)
    assert "4 ranks on 4 nodes; slowest link: 20 ms, 100 Mbit/s (--link=100,20); compute: 0.1 s per step (measured)" in said
    assert "Predictions, not measurements" in said and "rejected: " in said and "(none)" in said and "local: it pays." in said
    tried = [row | ({} if row["refused"] else {"loss": 3.25}) for row in rows]
    found |= {"tried_seconds": 5.0, "loss_name": "val_loss", "rows": tried, "took_seconds": dict.fromkeys(METHODS, 5.1)}
    assert "Measured, 5 s each" in (said := methods_table(found)) and "3.2500" in said and "5.1 s" in said
    assert math.isclose(rows[0]["speed"], 1.0)


def test_a_trial_with_a_skipped_batch(tmp_path: Path) -> None:
    """The time and the bytes of the batch count."""
    plain = {"step": 1, "step_seconds": 2.0, "comm_bytes": 8}
    lines = [plain | {"train_loss": 5.0}, plain | {"event": "skipped", "batch": 1}, plain | {"step": 2, "train_loss": 4.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert _read(tmp_path / "metrics.jsonl", 4.5).curve == [(2.0, 8, 5.0), (6.0, 24, 4.0)]
