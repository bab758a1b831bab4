"""Laws of `mpidp.plan mesh`: meshes that fit come first, every figure has a source, and invalid input is reported."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mpidp.config.schema import Config, to_toml
from mpidp.errors import UsageError
from mpidp.plan import __main__ as planning
from mpidp.plan.mesh import command_line
from mpidp.plan.mesh.search import model_of, number, shapes
from mpidp.plan.mesh.sizes import ModelSizes
from mpidp.plan.mesh.table import mesh_table

SMALL = ModelSizes(3, 64, 192, 4, 2, 512, 32)
PARTS = ("parameters", "gradients", "optimizer", "working", "activations", "logits")


def ask(*words: str) -> dict[str, Any]:
    return command_line.plan_from_options(*planning.read_options(["mesh", *words]))


def test_the_sample_of_the_issue(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = ask("--params", "2b", "--samples", "100m", "--ranks", "16")
    data, model, hybrid = found["three_ways"]
    assert (data["samples"], data["parameters"]) == (6.25e6, 2e9)
    assert (model["samples"], model["parameters"]) == (1e8, 125e6)
    assert hybrid["samples"] == 1e8 / hybrid["dp"] and 1 < hybrid["dp"] < 16
    assert hybrid["samples"] / 1e8 * hybrid["parameters"] / 2e9 == pytest.approx(1 / 16)
    assert found["parameters"] == pytest.approx(2e9, rel=0.05)
    monkeypatch.setattr("sys.argv", ["plan", "mesh", "--params", "2b", "--samples", "100m", "--ranks", "16"])
    planning.main()
    said = capsys.readouterr().out
    assert "6.25 million" in said and "125 million" in said and "assumed" in said and "--mesh.dp=" in said
    monkeypatch.setattr("sys.argv", ["plan", "mesh", "--params", "2b", "--ranks", "16", "--json"])
    planning.main()
    assert json.loads(capsys.readouterr().out)["ranks"] == 16


def test_what_fits_comes_first_and_the_fastest_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = ask("--params", "7b", "--ranks", "64", "--top", "99")
    took = [row["step_seconds"] for row in found["rows"]]
    assert took == sorted(took) and len(took) == found["fitting"]
    for row in found["rows"]:
        assert row["dp"] * row["pp"] * row["tp"] == 64
        assert sum(row["memory_bytes"][part] for part in PARTS) == pytest.approx(row["memory_bytes"]["total"])
        assert row["memory_bytes"]["total"] <= 0.9 * 80e9
    one = ("--params", "1b", "--ranks", "1", "--micro-batch", "1", "--recompute", "true", "--memory")
    needs = ask(*one, "99")["rows"][0]["memory_bytes"]["total"] / 1e9
    assert [ask(*one, str(needs / share))["fitting"] for share in (0.89, 0.91)] == [1, 0]  # a tenth is left free
    small = ask("--params", "7b", "--ranks", "2", "--memory", "16")
    assert not small["fitting"] and "NONE" in mesh_table(small)
    assert ask("--params", "70b", "--ranks", "16384", "--global-batch", "2048")["fitting"]


def test_meshes_are_all_and_only_those_that_can_be() -> None:
    found = list(shapes(SMALL, 12, 99))
    assert all(one.ranks == 12 and one.tp in (1, 2) and one.pp <= 3 for one in found)
    assert {(one.dp, one.pp, one.tp) for one in found} == {(12, 1, 1), (6, 2, 1), (4, 3, 1), (6, 1, 2), (3, 2, 2), (2, 3, 2)}
    assert {one.shard for one in found if (one.dp, one.pp, one.tp) == (3, 2, 2)} == {0, 1, 2, 3}
    assert not [one for one in shapes(SMALL, 12, 3) if one.dp > 3]


def test_meshes_of_a_model_of_slices() -> None:
    heads = replace(SMALL, num_kv_heads=SMALL.num_heads)
    assert {one.tp for one in shapes(heads, 16, 99)} > {1, 2}
    found = list(shapes(heads, 16, 99, slices=2))
    assert {one.tp for one in found} == {1, 2} and max(one.pp for one in found) > 1
    assert {one.shard for one in found} == {0, 1, 2, 3}
    assert list(shapes(replace(heads, tie_embeddings=True), 16, 99, slices=2)) == found


@pytest.mark.parametrize("asked", [1e7, 1.3e8, 3.5e8, 2e9, 3e10, 1.75e11, 1e12])
def test_a_model_of_so_many_parameters(asked: float) -> None:
    model, _ = model_of(asked, 1000 if asked < 1e8 else 0)
    assert model.parameters == pytest.approx(asked, rel=0.1)
    assert model.model_dim % model.num_heads == 0 and model.model_dim // model.num_heads % 2 == 0


def test_a_config_gives_the_model_and_the_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.toml").write_text("[model]\nmodel_dim = 256\nnum_heads = 8\n[train]\nglobal_batch = 32\ndtype = 'float32'\n")
    found = ask("--config", "my.toml", "--ranks", "8", "--vocab", "256", "--model.num_layers=6")
    assert found["model"] == {"num_layers": 6, "model_dim": 256, "hidden_dim": 704, "num_heads": 8, "num_kv_heads": 8,
                              "vocab_size": 256, "seq_len": 128, "tie_embeddings": False}
    assert (found["global_batch"], found["number_bytes"], found["parameters_asked"]) == (32, 4, found["parameters"])


def test_settings_that_predictions_ignore_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.toml").write_text("[optim]\nfreeze = 'embedding.*'\nname = 'sgd'\n[comm]\ncompress = 'int8'\n")
    words = ("--config", "my.toml", "--ranks", "4", "--vocab", "256")
    found = ask(*words)
    assert found["ignored"] == ["comm.compress=int8", "optim.name=sgd", "optim.freeze=embedding.*"]
    assert "These settings are ignored: comm.compress=int8, optim.name=sgd, optim.freeze=embedding.*." in mesh_table(found)
    plain = ask(*words, "--optim.freeze=", "--optim.name=adamw", "--comm.compress=none")
    assert plain["rows"] == found["rows"] and plain["ignored"] == [] and "ignored" not in mesh_table(plain)


def test_the_dtype_is_that_of_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.toml").write_text("[train]\ndevice = 'cpu'\n")
    (tmp_path / "cpu.json").write_text('{"ranks": 2, "gpu": null}')
    (tmp_path / "gpu.json").write_text('{"ranks": 2, "gpu": "NVIDIA H100"}')
    (tmp_path / "run").mkdir()
    config, one = ("--config", "my.toml", "--vocab", "256", "--ranks", "2"), ("--params", "1b", "--ranks", "2")
    for words, size in ((config, 4), ((*config, "--train.dtype=bfloat16"), 2), ((*config, "--dtype", "bfloat16"), 2),
                        ((*config, "--train.device=auto"), 2), (one, 2), ((*one, "--cluster", "cpu.json"), 4),
                        ((*one, "--cluster", "gpu.json"), 2), ((*one, "--cluster", "cpu.json", "--dtype", "bfloat16"), 2)):
        assert ask(*words)["number_bytes"] == size, words


def test_lanes_of_the_config_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More lanes than replicas need more gradient buffers. The settings to paste have as many lanes as the prediction."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.toml").write_text("[train]\nglobal_batch = 64\n")
    words = ("--config", "my.toml", "--ranks", "2", "--vocab", "256", "--micro-batch", "2", "--top", "99")
    for lanes, wanted in ((0, 2), (8, 8), (32, 32)):
        found = ask(*words, f"--train.lanes={lanes}")
        two = next(row for row in found["rows"] if row["dp"] == 2)
        assert (two["lanes"], two["micro_batches"]) == (wanted, 16)
        assert (two["memory_bytes"]["gradients"] > 4 * found["parameters"]) == (lanes > 2)
        assert f"--train.lanes={found['rows'][0]['lanes']} " in mesh_table(found)


def test_a_config_with_lora_trains_only_adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.toml").write_text("[model]\nmodel_dim = 256\nnum_heads = 8\nnum_layers = 6\nlora_targets = 'q,o'\n")
    words = ("--config", "my.toml", "--ranks", "4", "--vocab", "256")
    plain, found = ask(*words), ask(*words, "--model.lora_rank=4")
    assert found["trained"] == 6 * 2 * 2 * 4 * 256 and plain["trained"] == plain["parameters"] == found["parameters"]
    assert "LoRA: 24.58 thousand parameters of adapters are trained" in mesh_table(found) and "LoRA" not in mesh_table(plain)
    for one, other in zip(found["three_ways"], plain["three_ways"], strict=True):
        assert one["memory_bytes"] < other["memory_bytes"] and one["step_seconds"] < other["step_seconds"]
    with pytest.raises(UsageError, match="model.lora_targets=q,head: the predictions do not include an adapter of the head"):
        ask(*words, "--model.lora_rank=4", "--model.lora_targets=q,head")
    with pytest.raises(UsageError, match="model.lora_rank=400 exceeds the smaller dimension"):
        ask(*words, "--model.lora_rank=400")


def test_the_model_is_that_of_the_weights_which_the_run_begins_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not the default model, which the initial weights replace."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hf").mkdir()
    said = {"hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 5, "num_attention_heads": 6, "vocab_size": 1000,
            "num_key_value_heads": 2, "tie_word_embeddings": True, "model_type": "llama"}
    (tmp_path / "hf/config.json").write_text(json.dumps(said))
    made = {"num_layers": 5, "model_dim": 96, "hidden_dim": 160, "num_heads": 6, "num_kv_heads": 2, "vocab_size": 1000,
            "tie_embeddings": True}
    (tmp_path / "my.toml").write_text("[model]\nseq_len = 64\n")
    wanted = {**made, "seq_len": 64}
    assert ask("--config", "my.toml", "--ranks", "2", "--train.init_from=hf")["model"] == wanted
    (tmp_path / "run/checkpoints/step_00000001").mkdir(parents=True)
    (tmp_path / "run/config.toml").write_text(to_toml(Config().with_values(model={**made, "seq_len": 32})))
    for place in ("run", "run/checkpoints/step_00000001"):
        assert ask("--config", "my.toml", "--ranks", "2", f"--train.init_from={place}")["model"] == wanted
    (tmp_path / "run/config.toml").write_text(to_toml(Config().with_values(model={"kind": "lstm"})))
    for words, why in [("--train.init_from=run", "kind=lstm: the predictions"), ("--model.kind=lstm", "only for Transformers"),
                       ("--model.kind=a:b", "model.kind=a:b: the predictions"), ("--train.init_from=none", "none/config.toml")]:
        with pytest.raises(UsageError, match=why):
            ask("--config", "my.toml", "--ranks", "2", "--vocab", "256", words)
    (tmp_path / "hf/config.json").write_text("{")
    with pytest.raises(UsageError, match=r"train\.init_from=hf: config\.json cannot be read"):
        ask("--config", "my.toml", "--ranks", "2", "--train.init_from=hf")


def test_a_config_json_gives_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file, or its folder; the longest context is that of the model."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hf").mkdir()
    said = {"hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 5, "num_attention_heads": 6, "vocab_size": 1000,
            "num_key_value_heads": 2, "tie_word_embeddings": True, "model_type": "llama", "max_position_embeddings": 512}
    (tmp_path / "hf/config.json").write_text(json.dumps(said))
    wanted = {"num_layers": 5, "model_dim": 96, "hidden_dim": 160, "num_heads": 6, "num_kv_heads": 2, "vocab_size": 1000,
              "tie_embeddings": True, "seq_len": 512}
    assert ask("--config", "hf/config.json", "--ranks", "2")["model"] == wanted
    found = ask("--config", "hf", "--ranks", "2", "--seq-len", "64", "--train.global_batch=16")
    assert found["model"] == {**wanted, "seq_len": 64} and found["global_batch"] == 16
    with pytest.raises(UsageError, match=r"--config=none\.json: config\.json cannot be read"):
        ask("--config", "none.json", "--ranks", "2")


def test_a_run_of_one_rank_says_how_fast_it_computes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The prediction then equals the measured step of this run."""
    monkeypatch.chdir(tmp_path)
    config = Config().with_values(train={"dtype": "float32", "lanes": 8}, run={"dir": "run"})
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.toml").write_text(to_toml(config))
    times = {"compute_seconds": 0.4, "update_seconds": 0.002, "data_seconds": 0.0, "step_seconds": 0.41, "comm_wait_seconds": 0.0}
    lines = [{"event": "start", "step": 0, "ranks": 1}, *({"step": s, "tokens": 2048 * s, **times} for s in range(1, 21))]
    (tmp_path / "run/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = ask("--config", "run/config.toml", "--calibrate", "run", "--vocab", "300", "--ranks", "1", "--micro-batch", "2",
                "--recompute", "false")
    (row,) = found["rows"]
    assert (row["compute_seconds"], row["update_seconds"]) == pytest.approx((0.4, 0.002))
    assert [said for said in found["machine"] if "measured" in said] == found["machine"][:2]
    assert "matrix products" in found["machine"][0] and "(measured" in found["machine"][0] and found["number_bytes"] == 4
    other = ("--params", "1b", "--vocab", "300", "--ranks", "1", "--calibrate", "run")
    assert ask(*other)["number_bytes"] == 4  # as in the run
    with pytest.raises(UsageError, match="--calibrate=run computed in float32, but the plan is for bfloat16"):
        ask(*other, "--dtype", "bfloat16")
    assert ask(*other, "--dtype", "bfloat16", "--flops", "1t")["number_bytes"] == 2
    for section, key, value in (("optim", "freeze", "embedding.*"), ("optim", "name", "sgd"), ("model", "kind", "lstm")):
        (tmp_path / "run/config.toml").write_text(to_toml(config.with_values(**{section: {key: value}})))
        with pytest.raises(UsageError, match=rf"--calibrate=run was trained with {section}.{key}={value}, but the speeds can be"):
            ask(*other)
    (tmp_path / "run/config.toml").write_text(to_toml(config))
    with pytest.raises(UsageError, match="the vocabulary size is not known"):
        ask("--params", "1b", "--ranks", "1", "--calibrate", "run")


def test_figures_are_given_or_the_doctors_or_assumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cluster = {"ranks": 8, "ranks_per_node": [4, 4], "gpus_per_node": [4, 4], "cores_per_node": [64, 64],
               "gpu": "NVIDIA A100-SXM4", "between": "nodes", "latency_seconds": 2e-6, "bandwidth_bytes_per_second": 2.5e9}
    (tmp_path / "cluster.json").write_text(json.dumps(cluster))
    said = ask("--params", "1b", "--ranks", "8", "--link-gbit", "600")["machine"]
    assert "network of a node: 20 Gbit/s (cluster.json)" in said and "ranks per node: 4 (cluster.json)" in said
    assert "link within a node: 600 Gbit/s per rank (given)" in said and "latency: 2 us (cluster.json)" in said
    assert "matrix products: 156 TFLOP/s per rank (assumed: half of the peak of NVIDIA A100-SXM4)" in said
    said = ask("--params", "1b", "--ranks", "8", "--flops", "99t", "--node-gbit", "10")["machine"]
    assert "matrix products: 99 TFLOP/s per rank (given)" in said and "network of a node: 10 Gbit/s (given)" in said


def test_the_number_of_ranks_is_that_of_the_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("cluster.json").write_text('{"ranks": 16}')
    assert ask("--params", "1b")["ranks"] == 16 and ask("--params", "1b", "--ranks", "8")["ranks"] == 8


WRONG = {  # command line: part of the message
    "--ranks 8": "give the model: either --params N",
    "--params 7b --config x.toml --ranks 8": "either --params N",
    "--params seven --ranks 8": "--params=seven: give a number above 0",
    "--params -7b --ranks 8": "--params",
    "--params 7b": "give the number of ranks with --ranks",
    "--params 7b --ranks 2,4": "give one whole number",
    "--params 7b --cluster bad-ranks.json": "bad-ranks.json is not a file of mpidp.doctor",
    "--params 7b --ranks 1.5": "--ranks: '1.5': give one whole number",
    "--params 7b --ranks 0": "--ranks: '0': give one",
    "--params 7b --ranks 8 --global-batch 2.5": "--global-batch=2.5 must be a whole number",
    "--params 7b --ranks 8 --overlap 2": "--overlap=2 must be from 0 to 1",
    "--params 7b --ranks 8 --top 0": "--top=0",
    "--params 7b --ranks 8 --dtype fp8": "fp8",
    "--params 7b --ranks 8 --model.model_dim=3": "--model.model_dim=3: no such option",
    "--params 7b --ranks 7919": "no mesh has this number of ranks",
    "--params 1000 --ranks 8": "--params=1000: no model of this size fits a vocabulary of 32,000",
    "--params 7b --ranks 8 --cluster nowhere.json": "nowhere.json: no such file",
    "--config nowhere.toml --ranks 8": "nowhere.toml",
    "--params 7b --ranks 8 --cluster bad.json": "bad.json is not a file of mpidp.doctor",
    "--params 7b --ranks 8 --calibrate nowhere": "nowhere: no metrics.jsonl",
    "--params 7b --ranks 8 --global-batch 2 --micro-batch 4": "exceeds the global batch of 2",
}


@pytest.mark.parametrize("words", list(WRONG))
def test_bad_input_is_named(words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.json").write_text('{"bandwidth_bytes_per_second": "fast"}')
    (tmp_path / "bad-ranks.json").write_text('{"ranks": "two"}')
    with pytest.raises(UsageError) as caught:
        ask(*words.split())
    assert WRONG[words] in str(caught.value)


def test_numbers() -> None:
    assert [number(word, "x") for word in ("7b", "100M", "1.5k", "4e9", "2t")] == [7e9, 1e8, 1500, 4e9, 2e12]
    for wrong in ("", "b", "nan", "inf", "0", "-1k", "7bb"):
        with pytest.raises(UsageError, match="--x"):
            number(wrong, "x")


def test_who_reads_no_further_gets_no_traceback() -> None:
    """`python -m mpidp.plan mesh ... | head -1`"""
    command = [sys.executable, "-m", "mpidp.plan", "mesh", "--params=7b", "--ranks=64"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as plan:
        assert plan.stdout is not None and plan.stderr is not None
        plan.stdout.close()
        assert plan.stderr.read() == ""
    assert plan.returncode == 1
