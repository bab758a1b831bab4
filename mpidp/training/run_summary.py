"""The lines that a run prints at its start."""

from __future__ import annotations

import math
import os
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import torch

from mpidp.config.defaults import kind
from mpidp.config.schema import Config, to_toml
from mpidp.model.shape import num_parameters, shapes_of
from mpidp.model.starting import trained_sizes
from mpidp.runtime.device import is_bfloat16_slow
from mpidp.runtime.environment import numbers
from mpidp.runtime.log import VARIABLE, counted, log
from mpidp.strategies import STRATEGIES
from mpidp.strategies.optimizer import MOMENTS
from mpidp.strategies.protocol import StrategyOptions
from mpidp.training.data_parallel import gradient_slots, held_buffers, ranks_per_copy

if TYPE_CHECKING:
    from mpidp.training.run_plan import RunPlan

NAMED_HOSTS = 4  # number of hosts that the line of ranks names
Row = tuple[str, str, str, int, int, int]  # one rank's host, cores, device, threads, lanes, parameters


def log_summary(plan: RunPlan, given: Config, everything: bool = False) -> None:
    """On rank 0, log the settings that differ from the defaults. Also log lines about model, memory, batch, data and ranks. At
    level debug, also log all settings and a table of ranks. If `everything` is true, log both at level info. `given`: the
    configuration before automatic values were resolved. Collective over plan.world."""
    dp = plan.mesh.dp
    lanes = plan.lanes.of_rank(dp.rank, dp.size - plan.config.strategy.servers)
    device = f"{plan.device} {torch.cuda.get_device_name(plan.device)}" if plan.device.type == "cuda" else "cpu"
    cores = numbers(sorted(os.sched_getaffinity(0)))
    row = (plan.grid.everyone.host, cores, device, plan.config.train.threads, len(lanes), _parameters(plan))
    rows = plan.world.gather(row, root=0)
    if rows is None:
        return
    details = log.info if everything else log.debug
    details("%s", to_toml(plan.config))
    details("%s", "\n".join([*rank_table(plan, rows), ""]))
    log.info("%s", changed_settings(given))
    log.info("%s", model_line(plan, rows))
    log.info("%s", memory_line(plan, rows))
    log.info("%s", batch_line(plan))
    log.info("%s", data_line(plan))
    log.info("%s\n", ranks_line(rows))
    if plan.config.train.dtype == "bfloat16" and is_bfloat16_slow(plan.device):
        log.warning(
            "warning: train.dtype=bfloat16, but this CPU has no instructions for bfloat16, so matrix products take 20 to 50 "
            "times as long as in float32. Use train.dtype=float32"
        )


def changed_settings(given: Config) -> str:
    """Return a line with the settings in `given` that differ from the defaults. Pure."""
    defaults = Config().flat()
    text = {key: str(value).lower() if isinstance(value, bool) else str(value) for key, value in given.flat().items()}
    changed = [shlex.quote(f"{key}={text[key]}") for key, value in given.flat().items() if value != defaults[key]]
    return f"settings that differ from the defaults: {' '.join(changed) or 'none'}"


def rank_table(plan: RunPlan, rows: Sequence[Row]) -> list[str]:
    """Return a heading, and a line for each rank with its host, cores, device, threads and lanes. If mesh.tp or mesh.pp divides
    the model, the line also states the rank's place in the mesh. Pure."""
    cut = plan.grid.parts > 1
    places = "  dp pp tp   parameters" * cut
    lines = [f"{'rank':>5}  {'host':<20} {'cores':<12} {'device':<24} {'threads':>7} {'lanes':>6}{places}"]
    for rank, (host, cores, device, threads, lanes, parameters) in enumerate(rows):
        place = "  {:>2} {:>2} {:>2} ".format(*plan.grid.coordinates(rank)) + f"{parameters:>12,}" if cut else ""
        lines.append(f"{rank:>5}  {host:<20} {cores:<12} {device:<24} {threads:>7} {lanes:>6}{place}")
    return lines


def model_line(plan: RunPlan, rows: Sequence[Row]) -> str:
    """Return a line with the kind of the model and its number of parameters. If the model is divided, the line also states the
    size of the largest part. Pure."""
    words = [f"model: {plan.config.model.kind}, {num_parameters(plan.shape):,} parameters"]
    if plan.grid.parts > 1:
        words.append(f"at most {max(row[-1] for row in rows):,} on a rank")
    if _is_partly_frozen(plan.config):
        words.append(f"{_trained_parameters(plan):,} of them trained on rank 0")
    return ", ".join(words)


def memory_line(plan: RunPlan, rows: Sequence[Row]) -> str:
    """Return a line with the memory that a rank needs between steps. Pure."""
    count = max(row[-1] for row in rows)
    floats, saved = held_floats(plan, count)
    slots, others, sharing = held_copies(plan)
    what = ["weights", "optimizer state"] if sharing == 1 else ["its share of the node's weights and optimizer state"]
    what += [counted(slots, "gradient buffer")] + [counted(others, "other buffer")] * (others > 0)
    return (f"memory: {floats / 2**18:,.0f} MiB per rank ({', '.join(what)}); "
            f"{saved / plan.mesh.num_nodes / 2**18:,.0f} MiB per node to buffer a checkpoint while it is written")


def held_floats(plan: RunPlan, count: int) -> tuple[float, float]:
    """Return (float32 values that a rank stores between steps, float32 values of a checkpoint). If ranks share one copy of
    parameters and optimizer state, each counts an equal part of it. `count`: the largest number of parameters of a rank, without
    adapters. Pure."""
    c, size = plan.config, plan.mesh.dp.size
    slots, others, sharing = held_copies(plan)
    shard = c.mesh.shard if size > 1 else 0
    trained = _trained_parameters(plan) if _is_partly_frozen(c) else count
    states = len(MOMENTS[c.optim.name]) if c.optim.name in MOMENTS else 2
    parameters = count + trained * (c.model.lora_rank > 0)
    sizes = plan.part.sizes(shapes_of(plan.shape))
    divided = parameters - sum(math.prod(size) for name, size in sizes.items() if not name.startswith("blocks."))
    stored = parameters / sharing if shard < 3 else parameters - divided + divided / size
    floats = stored + states * trained / (size if shard else sharing) + (slots + others) * trained / (size if shard >= 2 else 1)
    return floats, states * trained + (trained if c.model.lora_rank else count)


def held_copies(plan: RunPlan) -> tuple[int, int, int]:
    """Return (number of gradient buffers of a rank, number of other buffers of this size, number of ranks that share one copy of
    parameters and optimizer state). Pure."""
    c, size = plan.config, plan.mesh.dp.size
    more_slots = STRATEGIES[kind(c.strategy.name, c.strategy.quorum)].more_slots
    slots = gradient_slots(c, plan.lanes, 0, size)[0] + (c.train.audit_every > 0)
    slots += more_slots(StrategyOptions.of(asdict(c.strategy)), size - 1, size)
    return slots, held_buffers(c), ranks_per_copy(c, plan.mesh, plan.device)


def batch_line(plan: RunPlan) -> str:
    """Return a line with the size of the global batch, its numbers of micro-batches and lanes, and the number of ranks. Pure."""
    c, t = plan.config, plan.config.train
    return (f"batch: {t.global_batch} sequences x {c.model.seq_len} = {t.global_batch * c.model.seq_len:,} tokens per step, in "
            f"{plan.lanes.num_micro_batches} micro-batches, grouped into {t.lanes} lanes, on "
            f"{counted(plan.world.size, 'rank')} of {counted(plan.grid.everyone.num_machines, 'machine')}")


def data_line(plan: RunPlan) -> str:
    """Return a line with the data folder, the sizes of the splits, and the length of the run. Pure."""
    steps, epochs = plan.config.train.steps, plan.config.train.steps / plan.sampler.steps_per_epoch
    validation = f", {plan.validation.num_tokens:,} validation tokens" if plan.validation is not None else ""
    return (f"data: {plan.config.data.path}, {plan.training.num_tokens:,} training tokens{validation}; {counted(steps, 'step')}, "
            f"{epochs:.2f} epochs")


def ranks_line(rows: Sequence[Row]) -> str:
    """Return a line with the number of ranks on each host, and with the way to list all ranks and settings. If another launch is
    probably faster, the line recommends it. Pure."""
    sizes, threads = Counter(row[0] for row in rows), sorted({row[3] for row in rows})
    hosts = [f"{host} ({size})" if len(sizes) > 1 else host for host, size in sizes.items()]
    more = [f"{len(hosts) - NAMED_HOSTS} more hosts"] * (len(hosts) > NAMED_HOSTS)
    each = f"{threads[0]} to {threads[-1]} threads" if len(threads) > 1 else counted(threads[0], "thread")
    _, _, device, count, lanes, _ = rows[0]
    tip = ""
    if len(rows) == 1 and device == "cpu" and 1 < count <= lanes:  # threads wait for each other in every operation
        tip = f"; mpirun -np {count} is usually faster, with one thread per rank"
    return (f"ranks: {len(rows)} on {', '.join(hosts[:NAMED_HOSTS] + more)}, {each} per rank{tip} "
            f"({VARIABLE}=debug lists every rank and all settings)")


def _is_partly_frozen(config: Config) -> bool:
    return bool(config.model.lora_rank or config.optim.freeze)


def _parameters(plan: RunPlan) -> int:
    return sum(math.prod(size) for size in plan.part.sizes(shapes_of(plan.shape)).values())


def _trained_parameters(plan: RunPlan) -> int:
    return sum(map(math.prod, trained_sizes(plan.config.flat(), plan.shape, plan.part).values()))
