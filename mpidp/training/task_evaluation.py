"""Evaluation on tasks of lm-eval during training (train.eval_tasks)."""

from __future__ import annotations

from typing import Any

import torch

from mpidp.config.schema import Config
from mpidp.data.encoder import Encoder
from mpidp.data.tokenizer import load_tokenizer
from mpidp.errors import DataError, UsageError
from mpidp.inference.harness import figures_of, prefix_of, run_tasks
from mpidp.inference.loading import Loaded, table_of_run
from mpidp.inference.shared_requests import SharedRequests
from mpidp.inference.tasks import TaskOptions, load_tasks
from mpidp.runtime.observers import StepObservers
from mpidp.runtime.world import raise_together
from mpidp.training.run_plan import RunPlan


class TaskEvaluation:
    """Evaluates the model on tasks during training. All replicas must have the same model at that time."""

    def __init__(self, plan: RunPlan, model: Any, observers: StepObservers, tasks: dict[str, Any] | None) -> None:
        """`tasks`: the result of tasks_of(). `observers`: objects that are notified of the progress."""
        self._plan, self._model, self._observers, self.tasks = plan, model, observers, tasks
        self._requests: SharedRequests | None = None

    def run(self) -> tuple[dict[str, float | None], str]:
        """Return ({TASK/METRIC: value}, ""). If the tasks cannot be evaluated, return ({}, reason). The result is the same on
        every rank. Collective over plan.world."""
        plan, training = self._plan, self._model.training
        self._model.eval()
        try:
            requests = self._requests = self._requests or self._open()
            prefix = prefix_of(requests.encoder, (plan.run_dir / "hf").is_dir())
            found = run_tasks(requests, self.tasks, options_of(plan.config), str(plan.run_dir), prefix, plan.config.model.seq_len)
        except (DataError, UsageError) as error:
            if not error.everywhere:
                raise
            return {}, str(error)
        finally:
            self._model.train(training)
        figures = {} if found is None else {
            f"{task}/{metric}": value for task, of in figures_of(found).items() for metric, value in of.items()
            if metric != "sample_len"
        }
        return plan.world.bcast(figures), ""

    def _open(self) -> SharedRequests:
        """Return an object that answers the requests of the tasks with the model. Collective over plan.world."""
        plan = self._plan
        with raise_together(plan.world):
            tokenizer = load_tokenizer(plan.run_dir / "tokenizer.json", plan.training.eod)
            encoder = Encoder(tokenizer, table_of_run(plan.run_dir, tokenizer), "tokens")
        loaded = Loaded(
            self._model, plan.device, getattr(torch, plan.config.train.dtype), plan.grid, name=f"{plan.run_dir}, at this step"
        )
        return SharedRequests(loaded, encoder, plan.config.train.micro_batch, lambda: self._observers.enter("evaluate"))


def options_of(config: Config) -> TaskOptions:
    """Return the options for evaluating the tasks in train.eval_tasks, including their names. Pure."""
    names = [name.strip() for name in config.train.eval_tasks.split(",")]
    return TaskOptions(names, config.train.eval_tasks_dir, limit=config.train.eval_tasks_limit)


def tasks_of(plan: RunPlan, before: TaskEvaluation | None) -> dict[str, Any] | None:
    """Load the tasks in train.eval_tasks on rank 0, and return them. Return None on other ranks, and if this setting is empty.
    `before`: the `TaskEvaluation` object of the job that this job continues, or None.

    Raises UsageError if lm-eval is not installed or a task is unknown, and DataError if a task cannot be read. Collective over
    plan.world.
    """
    if not plan.config.train.eval_tasks:
        return None
    tasks = None if before is None else before.tasks
    with raise_together(plan.world):
        if plan.world.rank == 0 and tasks is None:
            tasks = load_tasks(options_of(plan.config))
    return tasks
