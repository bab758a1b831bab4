"""Laws of the lines at the start of a run."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mpidp.config.schema import Config
from mpidp.runtime import device
from mpidp.runtime.log import log
from mpidp.training import run_summary
from mpidp.training.run_summary import ranks_line


@pytest.mark.parametrize(("rows", "tip"), [
    ([("here", "0,1", "cpu", 2, 8, 100)], "2 threads per rank; mpirun -np 2 is usually faster, with one thread per rank ("),
    ([("here", "0", "cpu", 1, 8, 100)], "1 thread per rank ("),
    ([("here", "0,1", "cpu", 2, 1, 100)], "2 threads per rank ("),  # one lane cannot be divided among ranks
    ([("here", "0,1", "cuda:0 GPU", 2, 8, 100)], "2 threads per rank ("),
    ([("here", "0,1", "cpu", 2, 8, 100), ("here", "2,3", "cpu", 2, 8, 100)], "2 threads per rank ("),
])
def test_a_run_on_one_rank_names_the_faster_launch(rows: list[tuple[str, str, str, int, int, int]], tip: str) -> None:
    assert ranks_line(rows).startswith(f"ranks: {len(rows)} on here, {tip}")


@pytest.mark.parametrize(("dtype", "fast", "on", "warned"), [
    ("bfloat16", False, "cpu", True), ("bfloat16", True, "cpu", False), ("bfloat16", False, "meta", False),
    ("float32", False, "cpu", False),
])
def test_bfloat16_on_a_cpu_without_such_instructions_names_float32(
    monkeypatch: pytest.MonkeyPatch, dtype: str, fast: bool, on: str, warned: bool
) -> None:
    said: list[str] = []
    lines = [f"{what}_line" for what in ("model", "memory", "batch", "data", "ranks")]
    for name in ("changed_settings", "rank_table", "_parameters", *lines):
        monkeypatch.setattr(run_summary, name, lambda *given: "")
    monkeypatch.setattr(log, "warning", said.append)
    monkeypatch.setattr(device.torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: fast, raising=False)
    dp = SimpleNamespace(rank=0, size=1)
    plan: Any = SimpleNamespace(
        config=Config().with_values(train={"dtype": dtype}), device=torch.device(on), mesh=SimpleNamespace(dp=dp),
        lanes=SimpleNamespace(of_rank=lambda rank, size: range(1)), world=SimpleNamespace(gather=lambda row, root: [row]),
        grid=SimpleNamespace(everyone=SimpleNamespace(host="here")),
    )
    run_summary.log_summary(plan, plan.config)
    assert len(said) == warned and all("Use train.dtype=float32" in words for words in said)
