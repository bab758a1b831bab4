"""The record of a run: metrics.jsonl, the trackers, and facts that are stored in `start` lines and checkpoints."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mpidp.checkpoint.resume import fingerprint
from mpidp.config.schema import to_toml
from mpidp.data.model_files import TEMPLATE, chat_templates_of
from mpidp.data.special_tokens import FILE, read_special_tokens
from mpidp.metrics.jsonl import MetricsFile
from mpidp.metrics.progress import peak_flops
from mpidp.metrics.track.sender import Trackers
from mpidp.metrics.track.table import trackers_of
from mpidp.model.part import whole
from mpidp.model.shape import flops_per_token, num_parameters, shapes_of
from mpidp.model.starting import trained_sizes
from mpidp.runtime.agreement import versions
from mpidp.runtime.files import write_file
from mpidp.runtime.log import log
from mpidp.training.initial_weights import Origin
from mpidp.training.lr_schedule import SETTINGS
from mpidp.training.run_plan import RunPlan
from mpidp.training.state import RunState


@dataclass
class RunRecord:
    """The record of a run. Rank 0 writes the files. Every rank keeps in memory the lines that were written after the last
    update."""

    run_dir: Path
    meta: dict[str, Any]  # facts for every checkpoint: config, fingerprint, data
    facts: dict[str, Any]  # facts for the `start` line: hosts, versions, data, FLOPs
    state: RunState
    writes: bool  # whether this rank writes the files
    trackers: Sequence[str]
    file: MetricsFile | None = None  # open while the job runs

    def open(self) -> None:
        """Open metrics.jsonl and the trackers. Remove the lines of steps after the current step. Independent."""
        at = self.state.position
        if self.writes:
            latest = self.state.lines if self.state.recovered else None
            also = Trackers(self.trackers, self._about(at.step)) if self.trackers else None
            self.file = MetricsFile(self.run_dir / "metrics.jsonl", at.step, at.batch, latest, also)

    def write(self, line: dict[str, Any]) -> None:
        """Add the current time to a line, and write the line to metrics.jsonl and the trackers. Independent."""
        line = line | {"unix_seconds": round(time.time(), 3)}
        self.state.lines.append(line)
        if self.file is not None:
            self.file.write(line)

    def lost(self) -> dict[str, float]:
        """Return the total time, number of steps and energy of the lines that open() removed. Independent."""
        return self.file.lost if self.file is not None else {}

    def mfu(self, tokens_per_second: float) -> float | None:
        """Return the model FLOPs utilization at a throughput of `tokens_per_second`. Return None if the peak FLOP/s of the device
        are not known. Independent."""
        peak = self.facts["peak_flops_per_second"]
        return tokens_per_second * self.facts["flops_per_token"] / peak if peak else None

    def _about(self, step: int) -> dict[str, Any]:
        """Return facts for the trackers (see metrics.track.tracked.TrackedRun)."""
        run_dir, config = self.run_dir.resolve(), self.meta["config"]
        tags = [tag.strip() for tag in config["metrics.tags"].split(",") if tag.strip()]
        return {"folder": str(run_dir / "track"), "name": run_dir.name, "project": config["metrics.project"], "tags": tags,
                "step": step, "config": config}

    def close(self) -> None:
        """Close metrics.jsonl. From now on, send no lines to the trackers. Independent."""
        if self.file is not None:
            self.file.close()

    def finish(self) -> None:
        """Wait until the trackers have stored all lines, but only for a limited time. Independent."""
        if self.file is not None and self.file.also is not None:
            self.file.also.finish()


def make_run_record(
    plan: RunPlan, origin: Origin | None, machines: dict[str, Any], state: RunState, before: RunRecord | None
) -> RunRecord:
    """Return the record of a job. `before`: the record of the job that this job continues. In a new process, `before` is None,
    and rank 0 writes config.toml and the tokenizer. Independent."""
    config, first = plan.config, plan.world.rank == 0
    meta = {
        "config": config.flat(),
        "fingerprint": fingerprint(config, plan.device),
        "data": plan.training.index_sha256,
        "tokenizer": plan.training.tokenizer_sha256,
        "eod": plan.training.eod,
        "shape": asdict(plan.shape),
        "ranks": plan.world.size,
    }
    if origin is not None:
        meta["init_from"] = {"path": origin.path, "weights_sha256": origin.weights_sha256}
    elif before is not None and "init_from" in before.meta:
        meta["init_from"] = before.meta["init_from"]
    if first and before is None:
        _write_files(plan, origin)
    trackers = trackers_of(config.metrics.track, config.metrics.tensorboard)
    return RunRecord(plan.run_dir, meta, _facts(plan, machines, meta), state, first, trackers)


def _write_files(plan: RunPlan, origin: Origin | None) -> None:
    """Write the files of a new run. One of them is the tokenizer, so that the run can be used without its data."""
    folder = plan.training.folder
    special = plan.training.index.special_tokens_bytes(folder)
    table = None if special is None else read_special_tokens(folder)
    write_file(plan.run_dir / "config.toml", to_toml(plan.config).encode())
    write_file(plan.run_dir / "tokenizer.json", plan.training.index.tokenizer_bytes(folder))
    if origin is None or origin.weights is not None:  # RUN may have files of an earlier run that wrote no checkpoint
        shutil.rmtree(plan.run_dir / "hf", ignore_errors=True)
        (plan.run_dir / "init.json").unlink(missing_ok=True)
    if origin is not None and origin.weights is not None:
        origin.keep(plan.run_dir, plan.training.index.tokenizer_bytes(folder))
        log.info(f"weights from {origin.path}, weights_sha256 {origin.weights_sha256}")
    keep_special_tokens(special, None if table is None else table.template, plan.run_dir)


def keep_special_tokens(content: bytes | None, template: str | None, run_dir: Path) -> None:
    """Write the data's special_tokens.json to the run. `content`: the bytes of this file, or None if the data has no such
    file. `template`: the chat template of the data, or None. It replaces the model's template in RUN/hf. Independent."""
    (run_dir / FILE).unlink(missing_ok=True)
    if content is None:
        return
    write_file(run_dir / FILE, content)
    kept = run_dir / "hf" / TEMPLATE
    if template is not None and kept.parent.is_dir():
        if chat_templates_of(kept.parent).get("default") not in (None, template):
            log.info("the chat template of the data replaces the model's template in RUN/special_tokens.json and RUN/hf")
        write_file(kept, template)


def _facts(plan: RunPlan, machines: dict[str, Any], meta: dict[str, Any]) -> dict[str, Any]:
    everyone, data, device = plan.grid.everyone, plan.training, plan.device
    frozen = shapes_of(plan.shape).keys() - trained_sizes(meta["config"], plan.shape, whole(plan.shape)).keys()
    flops = flops_per_token(plan.shape, num_parameters(plan.shape), frozen)
    peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return machines | {
        "nodes": dict(zip(everyone.hosts, everyone.node_sizes, strict=True)), "versions": versions(),
        "fingerprint": meta["fingerprint"], "parameters": num_parameters(plan.shape), "flops_per_token": flops,
        "peak_flops_per_second": peak and peak * machines["devices"],
        "schedule": {key: meta["config"][key] for key in SETTINGS},
        "data": {"path": plan.config.data.path, "index_sha256": meta["data"], "train_tokens": data.num_tokens,
                 "val_tokens": plan.validation.num_tokens if plan.validation else 0, "vocab_size": data.vocab_size},
    }
