from typing import Any


def __getattr__(name: str) -> Any:
    """mpidp.data.from_dataset, once it is asked for: whoever looks for a tokenizer needs no numpy."""
    if name == "from_dataset":
        from mpidp.data.dataset import from_dataset

        return from_dataset
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
