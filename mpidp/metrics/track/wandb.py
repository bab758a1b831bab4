"""Writes to Weights & Biases. Without a server in the environment variables, the run is stored offline in RUN/track/wandb.
`wandb sync` can upload it later."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from mpidp.metrics.track.tracked import TrackedRun, facts_of, scalars_of

SERVER = ("WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_MODE")  # if one of these variables is set, wandb chooses the mode


class WandbTracker:
    """See tracked.Tracker. wandb accepts only increasing steps, so each step is written only once."""

    purges = False
    note = ""

    def __init__(self, run: TrackedRun) -> None:
        offline = not any(os.environ.get(name) for name in SERVER)
        try:
            self._run = self._open(run, offline)
        except Exception as error:
            if offline:
                raise
            import wandb

            wandb.teardown()  # otherwise wandb's service says that the id of the run is in use
            self.note = f"the server does not answer ({type(error).__name__}), so the run is stored offline in {run.folder}"
            self._run = self._open(run, offline=True)

    @staticmethod
    def _open(run: TrackedRun, offline: bool) -> Any:
        import wandb

        return wandb.init(
            project=os.environ.get("WANDB_PROJECT") or run.project, id=run.state["id"], resume="allow",
            name=os.environ.get("WANDB_NAME") or run.name, dir=os.environ.get("WANDB_DIR") or run.folder,
            mode="offline" if offline else None, config=dict(run.config), tags=list(run.tags),
            settings=wandb.Settings(console="off", init_timeout=20),
        )

    def write(self, lines: Sequence[Mapping[str, Any]]) -> None:
        for line in lines:
            if values := scalars_of(line):
                self._run.log(values, step=int(line["step"]))
            if facts := facts_of(line):
                self._run.summary.update({f"{line['event']}/{key}": value for key, value in facts.items()})

    def close(self, ended: bool) -> None:
        self._run.finish(exit_code=0 if ended else 1)
