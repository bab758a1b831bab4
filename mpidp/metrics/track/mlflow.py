"""Writes to MLflow. The metrics are stored in RUN/track/mlflow.db, unless MLFLOW_TRACKING_URI names another place."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from mpidp.metrics.track.tracked import TrackedRun, facts_of, scalars_of

PER_CALL = {"metrics": 1000, "params": 100, "tags": 100}  # maximum number of entries in one call of log_batch
DEFAULTS = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20", "GIT_PYTHON_REFRESH": "quiet"}


class MlflowTracker:
    """See tracked.Tracker. MLflow keeps every value that it gets for a step, so each step is written only once."""

    note = ""
    purges = False

    def __init__(self, run: TrackedRun) -> None:
        for name, value in DEFAULTS.items():
            os.environ.setdefault(name, value)
        server = os.environ.get("MLFLOW_TRACKING_URI", "")
        try:
            self._open(run, server, "run_id")
        except Exception as error:
            if not server:
                raise
            self.note = (f"the server {server} does not answer ({type(error).__name__}), so the metrics of this job are stored "
                         f"in {run.folder}/mlflow.db")
            self._open(run, "", "offline_run_id")

    def _open(self, run: TrackedRun, server: str, key: str) -> None:
        """Open the run. run.state[key] stores MLflow's id of the run. server: the address of a server, or "" for a database in
        run.folder."""
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient(tracking_uri=server or f"sqlite:///{run.folder}/mlflow.db")
        if key not in run.state:
            experiment = self._experiment(run, "" if server else f"{run.folder}/mlartifacts")
            run.state[key] = self._client.create_run(experiment, run_name=run.name).info.run_id
        self._id = run.state[key]
        self._client.update_run(self._id, status="RUNNING")
        self._params(run.config)
        self._tags({f"tag.{tag}": "true" for tag in run.tags})

    def _experiment(self, run: TrackedRun, artifacts: str) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or run.project
        found = self._client.get_experiment_by_name(name)
        return found.experiment_id if found is not None else self._client.create_experiment(name, artifacts or None)

    def _params(self, config: Mapping[str, Any]) -> None:
        """Store the settings as parameters. MLflow cannot change a parameter, so the changed settings of a later job are stored
        as tags."""
        from mlflow.entities import Param

        known = self._client.get_run(self._id).data.params
        self._batches("params", [Param(key, str(value)) for key, value in config.items() if key not in known])
        self._tags({f"resumed.{key}": str(value) for key, value in config.items() if known.get(key, str(value)) != str(value)})

    def _tags(self, tags: Mapping[str, Any]) -> None:
        from mlflow.entities import RunTag

        self._batches("tags", [RunTag(key, str(value)) for key, value in tags.items()])

    def _batches(self, kind: str, entries: Sequence[Any]) -> None:
        rest = iter(entries)
        while some := list(islice(rest, PER_CALL[kind])):
            self._client.log_batch(self._id, **{kind: some})

    def write(self, lines: Sequence[Mapping[str, Any]]) -> None:
        self._batches("metrics", list(_metrics(lines)))
        for line in lines:
            self._tags({f"{line['event']}.{key}": value for key, value in facts_of(line).items()} if "event" in line else {})

    def close(self, ended: bool) -> None:
        self._client.set_terminated(self._id, status="FINISHED" if ended else "KILLED")


def _metrics(lines: Sequence[Mapping[str, Any]]) -> Iterator[Any]:
    from mlflow.entities import Metric

    for line in lines:
        for name, value in scalars_of(line).items():
            yield Metric(name, value, round(1000 * line.get("unix_seconds", 0.0)), int(line["step"]))
