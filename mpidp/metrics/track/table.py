"""The table of trackers. A tracker is a program that stores and plots metrics. To add one, add a row here, and a file in this
folder."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Sequence

from mpidp.errors import UsageError

PACKAGES = {  # tracker: the packages that it needs; without sqlalchemy and alembic, mlflow can only write to a server
    "trackio": ("trackio",), "wandb": ("wandb",), "mlflow": ("mlflow", "sqlalchemy", "alembic"), "tensorboard": ("tensorboard",),
}  # fmt: skip


def trackers_of(track: str, tensorboard: bool = False) -> list[str]:
    """Return the names of the trackers. Each name occurs once. Pure.

    track: metrics.track, a comma-separated list of names. tensorboard: metrics.tensorboard. If True, the tracker tensorboard is
    added. Raises UsageError if a name is not in the table.
    """
    names = [name.strip() for name in track.split(",") if name.strip()]
    for name in names:
        if name not in PACKAGES:
            near = difflib.get_close_matches(name.lower(), PACKAGES, n=1, cutoff=0.6)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UsageError(f"metrics.track={track}: {name!r} is not one of {', '.join(PACKAGES)}{hint}")
    return list(dict.fromkeys([*names, *["tensorboard"] * tensorboard]))


def check_trackers(names: Sequence[str]) -> None:
    """Raise UsageError if a package that one of these trackers needs is not installed. The packages are not imported.
    Independent."""
    for name, package in ((tracker, package) for tracker in names for package in PACKAGES[tracker]):
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:  # a folder wandb/ without __init__.py has a spec, but no origin
            raise UsageError(
                f"metrics.track={name}, but the package {package} is not installed. Run pip install 'mpidp[track-{name}]', or "
                f"remove {name} from metrics.track (metrics.jsonl has the same numbers)"
            )
