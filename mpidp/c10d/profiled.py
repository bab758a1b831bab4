"""Records calls in torch's profiler. A record begins when the call starts. It ends when the call completes, even if the call
completes in another thread. The record shows the shapes of the call's tensors."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import torch


def recorded(name: str, tensors: Sequence[torch.Tensor]) -> Callable[[], None] | None:
    """Start a profiler record for the call `name`. Return the function that ends the record, or None if the profiler is off.
    Independent."""
    if not torch.autograd._profiler_enabled():  # type: ignore[attr-defined]
        return None
    handle = torch.autograd._record_function_with_args_enter(name, *tensors)  # type: ignore[attr-defined]
    trigger: torch.futures.Future = torch.futures.Future()
    torch.ops.profiler._call_end_callbacks_on_jit_fut(handle, trigger)

    def end() -> None:  # in another thread, so that the profiler treats the call as asynchronous
        other = threading.Thread(target=trigger.set_result, args=(None,))
        other.start()
        other.join()

    return end
