from typing import Any


def __getattr__(name: str) -> Any:
    """Import and return from_dataset when it is first used. Imports of other modules of mpidp.data then need not import it."""
    if name == "from_dataset":
        from mpidp.data.dataset import from_dataset

        return from_dataset
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
