"""The table of strategies by name. To add a strategy, add it to this table."""

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
    """Return the constructor of a strategy. `name`, `quorum`: the settings strategy.name and strategy.quorum. `level`: the
    setting mesh.shard, 0 to 3. `model`: the model to shard, for levels 2 and 3. Pure."""
    if level >= 2:
        return partial(Sharded, model=model, level=level)
    return Sliced if level else STRATEGIES[kind(name, quorum)]
