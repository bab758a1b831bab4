"""The names that a user can choose, from the settings. Laws are parametrized over them, so that a new one is tested by itself."""

from __future__ import annotations

from mpidp.config.schema import fields_of

CHOICES: dict[str, tuple[str, ...]] = {
    key: tuple(about.metadata["choices"]) for key, about, _ in fields_of() if about.metadata.get("choices")
}
OPTIMIZERS = CHOICES["optim.name"]
COMPRESSIONS = tuple(name for name in CHOICES["comm.compress"] if name != "none")
STRATEGIES = CHOICES["strategy.name"]
