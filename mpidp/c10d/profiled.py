"""Calls in torch's profiler, from where they are begun to where they end, in whichever thread, with the shapes they take."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import torch


def recorded(name: str, tensors: Sequence[torch.Tensor]) -> Callable[[], None] | None:
    """What ends the record; None while nobody profiles. Independent."""
    if not torch.autograd._profiler_enabled():  # type: ignore[attr-defined]
        return None
    handle = torch.autograd._record_function_with_args_enter(name, *tensors)  # type: ignore[attr-defined]
    bell: torch.futures.Future = torch.futures.Future()
    torch.ops.profiler._call_end_callbacks_on_jit_fut(handle, bell)

    def end() -> None:  # by another thread: that is how the profiler tells calls that went on beside the caller
        other = threading.Thread(target=bell.set_result, args=(None,))
        other.start()
        other.join()

    return end
