"""Writes to trackio. The database is in RUN/track/trackio, unless TRACKIO_DIR, TRACKIO_SPACE_ID or TRACKIO_SERVER_URL is set."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from mpidp.metrics.track.tracked import TrackedRun, facts_of, scalars_of


class TrackioTracker:
    """See tracked.Tracker. trackio would continue any earlier run with the same name, so the name includes the id of the run."""

    note = ""
    purges = False

    def __init__(self, run: TrackedRun) -> None:
        os.environ.setdefault("TRACKIO_DIR", f"{run.folder}/trackio")  # trackio reads this variable when it is imported
        import trackio

        config = dict(run.config) | ({"tags": ", ".join(run.tags)} if run.tags else {})
        name = f"{run.name}-{run.state['id']}"
        self._run: Any = trackio.init(project=run.project, name=name, config=config, resume="allow", embed=False)
        server = urlsplit(os.environ.get("TRACKIO_SERVER_URL", ""))
        if server.hostname and not getproxies() and not _answers(server.hostname, server.port or 443):
            self.note = (f"the server {server.hostname} does not answer; trackio keeps the numbers in "
                         f"{os.environ['TRACKIO_DIR']}, and sends them when a run with this server starts again")

    def write(self, lines: Sequence[Mapping[str, Any]]) -> None:
        for line in lines:
            values: dict[str, Any] = dict(scalars_of(line))
            if line.get("event") == "end":
                values = {f"end/{key}": value for key, value in facts_of(line).items()}
            if values:
                self._run.log(values, step=int(line["step"]))

    def close(self, ended: bool) -> None:
        self._run.finish()


def _answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=5.0).close()
    except OSError:
        return False
    return True
