"""Strategies by name: the only place where a name becomes a class."""

from functools import partial
from typing import Any

from mpidp.config.defaults import kind
from mpidp.strategies.delayed import Delayed
from mpidp.strategies.local import Local
from mpidp.strategies.quorum import Quorum
from mpidp.strategies.server import Server
from mpidp.strategies.sharded import Sharded
from mpidp.strategies.sliced import Sliced
from mpidp.strategies.synchronous import Synchronous

STRATEGIES: dict[str, Any] = {
    "synchronous": Synchronous, "quorum": Quorum, "delayed": Delayed, "local": Local, "server": Server,
}  # fmt: skip


def strategy_of(name: str, quorum: float, level: int = 0, model: Any = None) -> Any:
    """What makes the strategy that strategy.name, strategy.quorum and mesh.shard ask for; level: 1 where there are slices to deal
    out (sharing.py), 2 and 3: of this model. Pure."""
    if level >= 2:
        return partial(Sharded, model=model, level=level)
    return Sliced if level else STRATEGIES[kind(name, quorum)]
