"""Replay: recomputing recorded steps on one rank gives the same results, and any alteration is found and named."""

from __future__ import annotations

import json
import shutil
import zlib
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from mpidp.checkpoint import manifest
from tests.faults.commands import Forks, Shell, expect


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def told(forks: Forks, place: Path, *words: object, code: int = 0) -> dict[str, Any]:
    """Return what `replay WORDS --json` found."""
    ended = forks.run(place, "mpidp.replay", *words, "--json")
    assert ended.code == code, ended
    assert len(ended.out.splitlines()) == 1, ended
    found: dict[str, Any] = json.loads(ended.out)
    assert found["same"] == (code == 0)
    return found


def flip_a_bit(folder: Path, name: str) -> None:
    """Flip a bit of one tensor element as if memory had failed before the checkpoint was written: checksums are valid."""
    body = manifest.read_manifest(folder)
    for record in body["files"]:
        tensors = safetensors.torch.load((folder / record["file"]).read_bytes())
        if name in tensors:
            tensors[name].view(-1)[5:6].view(torch.int32).bitwise_xor_(1 << 20)
        data = safetensors.torch.save(tensors)
        (folder / record["file"]).write_bytes(data)
        record |= {"bytes": len(data), "crc32": zlib.crc32(data)}
    (folder / "manifest.json").write_bytes(manifest._seal(body))


def alter_line(run: Path, step: int, key: str, value: float) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines = [line | {key: value} if line.get("step") == step and key in line else line for line in lines]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def run(place: Path, finished: Path) -> Path:
    """place/run: a copy of the finished run."""
    shutil.copytree(finished, place / "run")
    return place / "run"


def test_three_ranks_are_replayed_on_one_and_left_untouched(shell: Shell, forks: Forks) -> None:
    place = shell.folder
    assert shell.train("--model.dropout=0.1", "--train.lanes=3", ranks=3).code == 0
    before = content(place / "run")
    ended = forks.run(place, "mpidp.replay", "run")
    expect(ended, 0)
    assert "run: 2 steps to replay, 5 to 6, from run/checkpoints/step_00000004" in ended.out
    assert "step 6  train_loss same  grad_norm same  lr same  checkpoint same: " in ended.out
    first = told(forks, place, "run", "--step", 1)
    assert first["from"] == "the initial weights"
    rows = first["micro_batches"]
    assert [(row["micro_batch"], row["lane"]) for row in rows] == [(0, 0), (1, 1), (2, 2), (3, 2)]
    assert sum(row["loss"] for row in rows) / 4 == pytest.approx(first["train_loss"], rel=1e-6)
    assert max(row["grad_norm"] for row in rows) > first["grad_norm"] > 0  # the norm of a mean is at most the largest norm
    expect(shell.run("-m", "mpidp.replay", "run", "--step", 6, ranks=2), 0)
    assert content(place / "run") == before


def test_a_tampered_line_is_named(run: Path, forks: Forks) -> None:
    alter_line(run, 5, "grad_norm", 3.5)
    ended = forks.run(run.parent, "mpidp.replay", "run", "--step", 6)
    expect(ended, 1, "run: steps 5 to 6", "first difference: step 5: grad_norm differs: 3.5 recorded, ")
    assert "step 6  train_loss same" in ended.out


def test_a_flipped_bit_is_named(run: Path, forks: Forks) -> None:
    flip_a_bit(run / "checkpoints/step_00000004", "model/head.weight")
    ended = forks.run(run.parent, "mpidp.replay", "run", "--step", 4)
    expect(ended, 1, "first difference: step 4: checkpoint differs: model/head.weight in 1 of ", " elements, by up to ")
    assert "step 4  train_loss same  grad_norm same" in ended.out
    expect(forks.run(run.parent, "mpidp.replay", "run", "--step", 5), 1, "first difference: step 5: train_loss differs: ")
    (run / "checkpoints/step_00000004/rank_00000.safetensors").write_bytes(b"")
    found = told(forks, run.parent, "run", "--step", 5, code=1)  # replayed from the checkpoint before; only the damage differs
    assert found["from"] == "run/checkpoints/step_00000002"
    assert len(found["differences"]) == 1 and "step 4: checkpoint differs: " in found["differences"][0]


@pytest.mark.parametrize(("words", "setting", "first"), [
    (["--optim.lr=0.004"], "optim.lr: 0.003 -> 0.004", ["step 1", "model/embedding.weight"]),
    (["--model.dropout=0.1"], "model.dropout: 0.0 -> 0.1", ["step 1", "gradient/embedding.weight"]),
    (["--train.seed=5"], "train.seed: 1337 -> 5",
     ["the state after step 0, before the first replayed step", "model/embedding.weight"]),
])
def test_where_two_runs_part(run: Path, forks: Forks, words: list[str], setting: str, first: list[str]) -> None:
    expect(forks.run(run.parent, "mpidp.train", "tiny.toml", "--run.dir=other", *words), 0)
    found = told(forks, run.parent, "run", "--against", "other", code=1)
    assert (found["step"], found["settings"], found["first"]) == (1, [setting], first)


def test_runs_that_settings_did_not_part(run: Path, forks: Forks) -> None:
    shutil.copytree(run, run.parent / "other")
    ended = forks.run(run.parent, "mpidp.replay", "run", "--against", "other")
    expect(ended, 0)
    assert ended.out == "run and other are the same up to step 6, the last in both records\n"
    assert told(forks, run.parent, "run", "--against", "other", "--step", 3)["first"] is None
    alter_line(run.parent / "other", 3, "train_loss", 5.0)
    ended = forks.run(run.parent, "mpidp.replay", "run", "--against", "other")
    expect(ended, 1, "do not explain why the records differ", "the record of other differs from its replay (step 3: ")
    assert "the record of run differs" not in ended.err


def test_memory_that_failed_in_one_of_two_runs(run: Path, forks: Forks) -> None:
    fault = {"MPIDP_FAULT": "flip:0:3,tensor=2,bit=20"}
    expect(forks.run(run.parent, "mpidp.train", "tiny.toml", "--run.dir=other", **fault), 0)
    ended = forks.run(run.parent, "mpidp.replay", "other", "--against", "run")
    expect(ended, 1, "do not explain why the records differ", "the record of other differs from its replay (step 4: ")
    assert "the record of run differs" not in ended.err


def test_other_settings_after_a_resume(place: Path, forks: Forks) -> None:
    expect(forks.run(place, "mpidp.train", "tiny.toml", "--train.steps=4"), 0)
    expect(forks.run(place, "mpidp.train", "tiny.toml", "--optim.lr=0.002"), 0)
    for step in (3, 6):
        assert told(forks, place, "run", "--step", step)["differences"] == []


def test_a_longer_schedule_after_a_resume(place: Path, forks: Forks) -> None:
    """No checkpoint of the shorter run is left."""
    expect(forks.run(place, "mpidp.train", "tiny.toml", "--train.steps=4"), 0)
    expect(forks.run(place, "mpidp.train", "tiny.toml", "--run.keep=1", "--optim.warmup_steps=1", "--optim.lr=0.002"), 0)
    assert [path.name for path in (place / "run/checkpoints").iterdir()] == ["step_00000006"]
    for step in (1, 3, 6):
        assert told(forks, place, "run", "--step", step)["differences"] == []


def test_a_step_that_was_tried_in_vain(place: Path, forks: Forks) -> None:
    ended = forks.run(place, "mpidp.train", "tiny.toml", "--optim.lr=1e38", "--train.max_skipped=3")
    expect(ended, 1, "3 batches in a row")
    ended = forks.run(place, "mpidp.replay", "run")
    expect(ended, 0)
    assert "step 2  batch 3 skipped: True in the record, True in the replay" in ended.out
    assert "loss not finite, grad_norm not finite; windows [" in ended.out


def test_a_run_that_went_back_and_passed_over_batches(place: Path, forks: Forks) -> None:
    """It returned to step 2 and passed over batches 2 to 5."""
    fault = {"MPIDP_FAULT": "nan:0:4,times=3"}
    expect(forks.run(place, "mpidp.train", "tiny.toml", "--train.max_skipped=3", **fault), 0)
    assert '"event": "rolled_back"' in (place / "run/metrics.jsonl").read_text()
    for step in (2, 3, 4, 6):
        found = told(forks, place, "run", "--step", step)
        assert (found["batch"], found["differences"]) == (step - 1 + 4 * (step > 2), [])


def test_sums_that_depend_on_ranks_are_compared_closely(shell: Shell, forks: Forks) -> None:
    assert shell.train("--comm.reducer=allreduce", ranks=2).code == 0
    ended = forks.run(shell.folder, "mpidp.replay", "run")
    expect(ended, 0)
    assert "bits may differ (reducer allreduce, ranks 2 -> 1): relative tolerance 1e-05" in ended.out
    alter_line(shell.folder / "run", 6, "train_loss", 5.0)
    expect(forks.run(shell.folder, "mpidp.replay", "run"), 1, "are not close to the record; first difference: step 6: train_loss")


@pytest.mark.parametrize("words", [
    ["--comm.compress=int8"],
    ["--comm.compress=topk", "--comm.momentum=0.5", "--comm.ratio=0.2", "--optim.name=sgd"],
    ["--comm.compress=powersgd"],
], ids=["int8", "topk", "powersgd"])
def test_compressed_sums_are_replayed_bit_for_bit_on_as_many_ranks(shell: Shell, words: list[str]) -> None:
    """Each rank has its own residual, and a checkpoint stores their sum."""
    assert shell.train(*words, ranks=2).code == 0
    for step in (2, 6):
        ended = shell.run("-m", "mpidp.replay", "run", "--step", step, ranks=2)
        expect(ended, 0)
        assert f"step {step}  train_loss same  grad_norm same  lr same  checkpoint same: " in ended.out
    flip_a_bit(shell.folder / "run/checkpoints/step_00000006", "strategy/reducer/residual")
    expect(shell.run("-m", "mpidp.replay", "run", ranks=2), 1, "checkpoint differs: strategy/reducer/residual in 1 of")


def test_compressed_sums_need_the_number_of_ranks_of_the_run(shell: Shell, forks: Forks) -> None:
    assert shell.train("--comm.compress=int8", "--train.steps=4", ranks=2).code == 0
    expect(forks.run(shell.folder, "mpidp.train", "tiny.toml", "--comm.compress=int8"), 0)
    expect(forks.run(shell.folder, "mpidp.replay", "run", "--step", 6), 0)
    ended = forks.run(shell.folder, "mpidp.replay", "run", "--step", 4)
    expect(ended, 2, "trained with comm.compress=int8 on 2 ranks", "the replay has 1. Start it with `mpirun -np 2`")
    assert "steps to replay" not in ended.out


def test_what_cannot_be_replayed(run: Path, forks: Forks) -> None:
    place = run.parent
    expect(forks.run(place, "mpidp.replay", "run", "--step", 7), 2, "run: step 7 cannot be replayed. Give --step from 1 to 6")
    expect(forks.run(place, "mpidp.replay", "run", "--step", 0), 2, "Give --step from 1 to 6")
    expect(forks.run(place, "mpidp.replay", "nowhere"), 2, "nowhere is not a run")
    expect(forks.run(place, "mpidp.replay", "run", "--step", "x"), 2, "invalid int value")
    shutil.move(place / "shards", place / "moved")
    expect(forks.run(place, "mpidp.replay", "run"), 3, "trained on shards, which holds no shards here. Give --data")
    expect(forks.run(place, "mpidp.replay", "run", "--data", "moved"), 0)
    index = json.loads((place / "moved/index.json").read_text())
    (place / "moved/index.json").write_text(json.dumps(index, indent=3))
    expect(forks.run(place, "mpidp.replay", "run", "--data", "moved"), 3, "moved is not the data that run was trained on")


def test_steps_that_ranks_did_not_make_together(place: Path, forks: Forks) -> None:
    for run, word in (("run", "name=local"), ("other", "quorum=0.5")):
        assert forks.run(place, "mpidp.train", "tiny.toml", f"--strategy.{word}", f"--run.dir={run}").code == 0
        ended = forks.run(place, "mpidp.replay", run, "--step=3")
        expect(ended, 2, f"trained with strategy.{word}", "replay supports only synchronous runs")
