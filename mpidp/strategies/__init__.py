"""Strategies by name: the only place where a name becomes a class."""

from typing import Any

from mpidp import methods
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


def strategy_of(name: str, quorum: float, shard: int = 0) -> Any:
    """The class that strategy.name and strategy.quorum ask for; shard: mesh.shard, 1 where there are slices to deal out. Pure."""
    return (STRATEGIES[methods.kind(name, quorum)], Sliced, Sharded, Sharded)[shard]
