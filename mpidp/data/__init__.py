from typing import Any


def __getattr__(name: str) -> Any:
    """Import and return from_dataset when it is first used. Therefore an import of another module of mpidp.data does not
    import mpidp.data.dataset."""
    if name == "from_dataset":
        from mpidp.data.dataset import from_dataset

        return from_dataset
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
