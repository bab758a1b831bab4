"""Replays steps of a run on any number of ranks: restores a state, repeats the steps, and compares the results with the record.

The replay starts from the newest checkpoint before the step, or from the initial weights. It does not write to RUN.
"""

from __future__ import annotations

import io
import math
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import closing, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mpidp.config import rules
from mpidp.config.defaults import kind
from mpidp.errors import CheckpointError, DataError, UsageError
from mpidp.metrics.jsonl import read_lines
from mpidp.runtime.log import counted
from mpidp.runtime.observers import StepObserver
from mpidp.storage.address import is_remote
from mpidp.training.checkpoints import restore
from mpidp.training.run_plan import plan

# Largest relative difference that counts as close: by default, for Muon (rounds to bfloat16), and for NorMuon's row means
CLOSE, CLOSE_MUON, CLOSE_ROWS = 1e-5, 1e-3, 2e-2
FIGURES = ("train_loss", "grad_norm", "lr")  # the keys of metrics.jsonl that are compared
PLAIN = {"train.balance": "even", "train.audit_every": 0, "train.noise_every": 0, "comm.transport": "messages",
         "comm.copies": "rank", "comm.gpu": "staged", "comm.overlap": "none", "mesh.shard": 0,
         "mesh.tp": 1, "mesh.pp": 1, "mesh.dp": 0, "mesh.sequence": False, "mesh.interleave": 1,
         "metrics.track": "", "metrics.tensorboard": False,
         "run.hang_seconds": 0.0}  # the fingerprint records whether these settings change the bits


def print_on_rank_0(world: Any, text: str) -> None:
    """Print `text` on rank 0, unless it is empty. Independent."""
    if world.rank == 0 and text:
        print(text, flush=True)


@dataclass(frozen=True)
class Record:
    """What a replay needs from the files of a run."""

    path: Path
    lines: dict[int, dict[str, Any]]  # lines of metrics.jsonl, by step
    skipped: list[int]  # numbers of the batches that made no update
    passed: dict[int, int]  # step to which the run returned -> last batch that it then skipped
    checkpoints: dict[int, Path]  # folders of checkpoints, by step
    last: int  # last step that can be replayed, even if its update was skipped
    ranks: dict[int, int] = field(default_factory=dict)  # step after which the number of ranks was set -> number of ranks

    def ranks_in(self, start: int, last: int) -> set[int]:
        """Return the numbers of ranks with which the run computed steps start + 1 to last, or an empty set if unknown. Pure."""
        begun = max((at for at in self.ranks if at <= start), default=0)
        return {ranks for at, ranks in self.ranks.items() if at == begun or start < at < last}


def read_record(run: str, world: Any) -> Record:
    """Return the record of a run. `run`: the folder of the run. Rank 0 reads the record, and all ranks return it. Raises
    UsageError if there is no such run. Collective over world."""
    from mpidp.checkpoint.manifest import committed
    from mpidp.runtime.world import raise_together

    with raise_together(world):
        file = Path(run) / "metrics.jsonl"
        records = read_lines(file)
        lines = {line["step"]: line for line in records if all(key in line for key in FIGURES)}
        skipped = [line["batch"] for line in records if line.get("event") == "skipped" and "batch" in line]
        passed = {line["step"]: line["batch"] for line in records if line.get("event") == "rolled_back" and "batch" in line}
        begun = [line for line in records if line.get("event") in ("start", "recovered", "respawned")]
        ranks = {line["step"]: line["ranks"] for line in begun if isinstance(line.get("ranks"), int)}
        saved = {int(p.name.rpartition("_")[2]): p for p in reversed(committed(file.with_name("checkpoints")))}
        last = max([*lines, *saved], default=0)
        last += max(skipped, default=-1) >= last + lines.get(last, {}).get("skipped", 0)
        if not last:
            raise UsageError(f"{run} is not a run: it has neither a step in metrics.jsonl nor a checkpoint")
    return world.bcast(Record(Path(run), lines, skipped, passed, saved, last, ranks), root=0)


@dataclass
class Seen:
    """The results of a replayed batch. If `figures` is empty, the object represents the state from which the replay starts."""

    step: int  # the step of the batch, even if its update was skipped
    batch: int
    skipped: bool = False
    figures: dict[str, float | None] = field(default_factory=dict)
    micro_batches: list[dict[str, Any]] = field(default_factory=list)
    gradient: dict[str, int] = field(default_factory=dict)  # checksums of the gradient sum, before it is scaled


class SumObserver(StepObserver):
    """Stores the sum of the gradients of each step, before the sum is scaled. Computes checksums of the sum."""

    def __init__(self) -> None:
        self._total: Any = None

    def summed(self, total: Any) -> None:
        self._total = total.clone()

    def checksums(self, layout: Any) -> dict[str, int]:
        """Return {"gradient/" + name of a parameter: checksum} of the last sum, in the order of the model. Independent."""
        from mpidp.faults.audit import checksum

        sums = list(zip(layout.placed(), layout.views(self._total), strict=True))
        return {f"gradient/{name}": checksum(total) for (_, name, _), total in reversed(sums)}


class Replay:
    """A job that holds an earlier state of a run, and repeats the run's steps from this state."""

    def __init__(self, record: Record, last: int, options: Namespace, world: Any) -> None:
        """Restore the newest checkpoint before step `last`, or the initial weights. `options`: the options of the command. Raises
        UsageError if the run did not reach step `last`, and DataError if the run's data is missing. Collective over world."""
        from mpidp.checkpoint import manifest
        from mpidp.checkpoint.resume import open_run
        from mpidp.config import command_line
        from mpidp.model.kinds import check_named
        from mpidp.parallel.grid import make_grid
        from mpidp.runtime.world import raise_together
        from mpidp.training import build

        if not 1 <= last <= record.last:
            raise UsageError.on_every_rank(f"{record.path}: step {last} cannot be replayed. Give --step from 1 to {record.last}")
        self.record, self.last, self.source, reader = record, last, "the initial weights", None
        for at in sorted((at for at in record.checkpoints if at < last), reverse=True):
            try:
                reader = open_run(record.checkpoints[at], world)
                break
            except CheckpointError as error:
                print_on_rank_0(world, f"skipped an invalid checkpoint: {error}")
        with raise_together(world):  # settings: of the first checkpoint from step `last` on, or else of the last start
            later = [at for at in record.checkpoints if at >= last]
            nearest = min(later) if later else max(record.checkpoints, default=0)
            meta = manifest.read_manifest(record.checkpoints[nearest]) if nearest else {}
            settings = (meta["config"] if later else command_line.read_run_config(record.path / "config.toml"))
            check_named(settings.get("model.kind", "transformer"), options.model_kind, record.path)
            check_method(record, settings, reader.meta["step"] if reader else 0, last, meta.get("ranks"), world.size)
            settings |= PLAIN
            if reader is not None and not settings.get("model.lora_rank", 0):
                settings["train.init_from"] = ""  # the checkpoint has all weights except the base weights of adapters
            elif options.base:
                settings["train.init_from"] = options.base
            settings |= {f"train.{key}": value for key in ("device", "threads") if (value := getattr(options, key)) is not None}
            data = settings["data.path"] = options.data or settings["data.path"]
            if not is_remote(data) and not (Path(data) / "index.json").exists():
                raise DataError(f"{record.path} was trained on {data}, which holds no shards here. Give --data DIR")
        with TemporaryDirectory() as scratch, redirect_stdout(io.StringIO()):
            settings["run.dir"] = world.bcast(scratch, root=0)
            plain = command_line.from_args([f"--{key}={value}" for key, value in settings.items()])
            # Audits that are never due: they allocate a spare buffer, which holds the gradient of one micro-batch.
            self.plan = plan(plain.with_values(train={"audit_every": 1 << 62}), make_grid(world))
            if meta and meta["data"] != self.plan.training.index_sha256:
                raise DataError.on_every_rank(f"{data} is not the data that {record.path} was trained on. Give --data DIR")
            self._sums = SumObserver()
            self.job = build.build(self.plan, observers=[self._sums])
        if (begun := self.job.record.meta.get("init_from")) is not None:
            self.source = f"the weights of {begun['path']}"
            if begun["weights_sha256"] != meta.get("init_from", begun)["weights_sha256"]:
                raise DataError.on_every_rank(f"{begun['path']} has changed since {record.path} started from it: see --base")
        if reader is not None:
            restore(self.job, reader)
            self.source = str(reader.path)
        self.start = self.job.position.step
        saved, now = meta.get("fingerprint", {}), self.job.record.meta["fingerprint"]
        self.loose = [f"{key} {saved[key]} -> {now.get(key)}" for key in saved if saved[key] != now.get(key)]
        exact = now["reducer"] == "tree" or self.plan.config.comm.compress != "none"  # compressed sums always have the same order
        if not exact and not meta.get("ranks") == world.size == 1:
            self.loose.append(f"reducer {now['reducer']}, ranks {meta.get('ranks')} -> {world.size}")
        self.close = CLOSE_MUON if self.plan.config.optim.name in ("muon", "normuon") else CLOSE
        steps = f"{counted(last - self.start, 'step')} to replay, {self.start + 1} to {last}, from {self.source}"
        loose = f"; bits may differ ({', '.join(self.loose)}): relative tolerance {self.close:g}" if self.loose else ""
        print_on_rank_0(world, f"{record.path}: {steps}{loose}")

    def batches(self, inside: bool) -> Iterator[Seen]:
        """Yield `Seen` objects: one for the state before the first batch, then one for each batch up to the last step. `inside`:
        whether to record the micro-batches of the last step. Collective over job.comm."""
        from mpidp.training.loop import close
        from mpidp.training.step import compute
        from mpidp.training.step_report import exchange_reports

        job, at, record = self.job, self.job.position, self.record
        sums, spike, max_skipped = self._sums, job.config.train.spike, job.config.train.max_skipped
        seen = Seen(at.step, at.batch - 1)
        made = self.last in record.lines or self.last in record.checkpoints
        with closing(job.open_loader(at.batch)) as loader:
            yield seen
            while at.step < self.last and at.skipped_in_a_row < max_skipped and (made or at.batch <= max(record.skipped)):
                for passed in range(at.batch, record.passed.get(at.step, -1) + 1):
                    next(loader)
                    at.skip_to(passed + 1)
                batch, seen = next(loader), Seen(at.step + 1, at.batch)
                seen.micro_batches = self._inside(batch) if inside and seen.step == self.last else []
                report, lr = exchange_reports(job, compute(job, batch), 0.0, False), job.schedule.lr_at(seen.step)
                stats = job.strategy.step(lr, report.tokens, at.norm_limit(spike))
                seen.skipped, seen.gradient = stats.skipped, {} if inside else sums.checksums(job.strategy.buffer.layout)
                seen.figures = dict(zip(FIGURES, map(_finite, (report.loss, stats.grad_norm, lr)), strict=True))
                at.count(stats, report.tokens)
                yield seen
        close(job)

    def _inside(self, batch: Any) -> list[dict[str, Any]]:
        """Compute each micro-batch of `batch` separately, in a spare buffer. Return a row for each micro-batch, with its mean
        loss and its gradient norm. Collective over job.comm."""
        from mpidp.comm.slices import global_norm
        from mpidp.faults.audit import SpareSlot
        from mpidp.parallel.schedule import one_f_one_b

        job, rows = self.job, []
        for v in job.micro_batches():
            aside = SpareSlot(job.audit.buffer, len(job.audit.buffer.flat) - 1)
            done = job.engine.run(one_f_one_b([v]), batch, aside)
            tokens = max(1, done.num_tokens[0])
            norm = global_norm(aside.gradient) * job.engine.nominal_tokens / tokens
            rows.append({"micro_batch": v, "lane": job.lanes.lane_of(v), "loss": _finite(done.losses[0] / tokens),
                         "grad_norm": _finite(norm), "windows": self.plan.sampler.windows(batch.batch, v).tolist()})
        return [row for part in job.comm.allgather(rows) for row in part]

    def tensors(self) -> dict[str, Any]:
        """Return {name in a checkpoint: tensor}: the parameters in model order, then the optimizer state. If every rank holds a
        summand of a tensor, return the sum. Collective over job.comm."""
        from mpidp.checkpoint.local_parameters import parameters_of

        found = {f"model/{name}": entry.tensor for name, entry in parameters_of(self.job.engine.model).items()}
        for name, entry in self.job.strategy.state_dict().items():
            summands = self.job.comm.size if entry.layout == "additive" else 1
            found[f"strategy/{name}"] = entry.tensor if summands == 1 else _sum_in_rank_order(entry.tensor, self.job.comm)
        return found

    def compare(self, seen: Seen) -> list[tuple[bool, str]]:
        """Return (whether equal or close, message) for each recorded value of a replayed batch. Collective over job.comm."""
        line, recorded, found = self.record.lines.get(seen.step, {}), seen.batch in self.record.skipped, []
        if not seen.figures or seen.skipped or recorded:
            words = f"batch {seen.batch} skipped: {recorded} in the record, {seen.skipped} in the replay"
            return [(seen.skipped == recorded, words)] if seen.figures else []
        for key in FIGURES if line else ():
            then, now = line[key], seen.figures[key]
            close = self.loose and then is not None and now is not None and math.isclose(then, now, rel_tol=self.close)
            words = "same" if then == now else f"{'close' if close else 'differs'}: {then} recorded, {now} now"
            found.append((then == now or bool(close), f"{key} {words}"))
        if seen.step in self.record.checkpoints:
            found.append(self._compare_tensors(self.record.checkpoints[seen.step]))
        return found

    def _compare_tensors(self, path: Path) -> tuple[bool, str]:
        from mpidp.checkpoint.resume import open_run

        try:
            reader = open_run(path, self.job.comm)
        except CheckpointError as error:
            return False, f"checkpoint differs: {error}"
        mine = self.tensors()
        for name, tensor in mine.items():
            now, then = (t.cpu().numpy().reshape(-1) for t in (tensor, reader[name]))
            wrong, gap = int((now.view("u4") != then.view("u4")).sum()), now.astype("f8") - then
            bound = CLOSE_ROWS if "second_momentum_buffer" in name else self.close
            if wrong and not (self.loose and (gap**2).sum() <= bound**2 * (then.astype("f8") ** 2).sum()):
                return False, f"checkpoint differs: {name} in {wrong} of {now.size} elements, by up to {abs(gap).max():g}"
        return True, f"checkpoint {'close' if self.loose else 'same'}: {len(mine)} tensors"


def check_method(
    record: Record, settings: Mapping[str, Any], start: int, last: int, saved_ranks: int | None, size: int
) -> None:
    """Raise UsageError if the run's method does not permit `size` ranks to replay the steps start + 1 to last. `saved_ranks`: the
    number of ranks in the nearest checkpoint, which is used if metrics.jsonl does not state it. Independent."""
    name, quorum = settings.get("strategy.name", "synchronous"), settings.get("strategy.quorum", 1.0)
    if kind(name, quorum) != "synchronous":
        raise UsageError(
            f"{record.path} was trained with {rules.method_setting(name, quorum)}, but replay supports only synchronous runs"
        )
    if (compress := settings.get("comm.compress", "none")) == "none":
        return
    said = f"{record.path} was trained with comm.compress={compress}"
    if settings.get("mesh.tp", 1) * settings.get("mesh.pp", 1) > 1:
        raise UsageError(f"{said} and mesh.tp or mesh.pp above 1. Replay supports compression only with mesh.tp=1 and mesh.pp=1")
    ranks = record.ranks_in(start, last) or {saved_ranks or size}
    if len(ranks) > 1:
        numbers = ", then ".join(map(str, (record.ranks[at] for at in sorted(record.ranks) if record.ranks[at] in ranks)))
        raise UsageError(
            f"{said}. Between step {start} and step {last}, it ran on {numbers} ranks. The compression errors of the lost ranks "
            f"were not recorded. Replay steps up to {min(at for at in record.ranks if at > start)}, or after the next checkpoint"
        )
    if ranks != {size}:
        (number,) = ranks
        raise UsageError(
            f"{said} on {number} rank{'s' * (number > 1)}. The result depends on the number of ranks, but the replay has "
            f"{size}. Start it with `mpirun -np {number}`"
        )


def _sum_in_rank_order(mine: Any, comm: Any) -> Any:
    """Return zeros plus every rank's tensor `mine`, added in rank order. Collective over comm."""
    from mpidp.comm.buffers import buf

    own = mine.detach().cpu()
    total = own.new_zeros(own.shape)
    for rank in range(comm.size):
        summand = own.clone() if rank == comm.rank else own.new_empty(own.shape)
        comm.Bcast(buf(summand), root=rank)
        total += summand
    return total


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None
