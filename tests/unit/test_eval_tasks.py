"""Law of train.eval_tasks: tasks that cannot be evaluated are found before the weights are loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

import mpidp.training.build
from mpidp.errors import UsageError
from tests.tiny import at, corpus, job_at, tiny


def test_a_missing_harness_or_task_is_found_before_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_late(*_: object) -> None:
        raise AssertionError("the weights are loaded first")

    monkeypatch.setattr(mpidp.training.build, "make_model", too_late)
    (tmp_path / "tasks").mkdir()
    train = {"eval_tasks": "no_such_task", "eval_tasks_dir": str(tmp_path / "tasks")}
    config = tiny(corpus(tmp_path), tmp_path / "run", train=train)
    with pytest.raises(UsageError, match=r"need lm-eval|no task file"):
        at(1, lambda comm: job_at(comm, config))
