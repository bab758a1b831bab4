"""Makes the sections of the report that describe a run: its model, data and machines, its energy and cost, its events, and its
settings. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from typing import Any

from mpidp.config.schema import Config
from mpidp.metrics.jsonl import number
from mpidp.report.charts import duration, short
from mpidp.report.costs import J_PER_KWH, Costs, machines
from mpidp.report.page import folded, paragraph, section, table
from mpidp.report.read import RecordedRun

MOST_EVENTS = 200  # maximum number of events shown
MOST_HOSTS = 16  # maximum number of hosts shown


def what_ran(run: RecordedRun) -> str:
    """Return the section about model, data, machines and versions. Pure."""
    config, facts, unknown = run.config, run.facts, "not recorded"
    prints, data, nodes = facts.get("fingerprint") or {}, facts.get("data") or {}, facts.get("nodes") or {}

    def setting(*keys: str) -> list[str]:
        return [str(config.get(key, "?")) for key in keys]

    hosts = ", ".join(f"{host} ({count})" for host, count in list(nodes.items())[:MOST_HOSTS])
    hosts += f", and {len(nodes) - MOST_HOSTS} more" if len(nodes) > MOST_HOSTS else ""
    cut = [f"mesh {name} {config[f'mesh.{name}']}" for name in ("tp", "pp", "shard") if config.get(f"mesh.{name}", 1) > 1]
    name, device = str(prints.get("device", "")), ", ".join(setting("train.device", "train.dtype"))
    versions = facts.get("versions") or {key: prints[key] for key in ("torch", "cpu") if key in prints}
    model = "{}, num_layers {}, model_dim {}".format(*setting("model.kind", "model.num_layers", "model.model_dim"))
    batch = "{} sequences x {} tokens".format(*setting("train.global_batch", "model.seq_len"))
    method = "{}, reducer {}, compression {}".format(*setting("strategy.name", "comm.reducer", "comm.compress"))
    where, index = data.get("path", setting("data.path")[0]), str(data.get("index_sha256", "?"))[:12]
    tokens = [f"{data[f'{split}_tokens']:,} {split} tokens" for split in ("train", "val") if f"{split}_tokens" in data]
    rows = [
        ("Model", model + (f", {facts['parameters']:,} parameters" if "parameters" in facts else "")),
        ("Batch", f"{batch}, {facts.get('micro_batches', '?')} micro-batches in {facts.get('lanes', '?')} lanes (groups of "
                  "micro-batches)"),
        ("Method", ", ".join([method, *cut])),
        ("Ranks", f"{run.ranks}" + (f" on {machines(facts)} machine{'s' * (machines(facts) != 1)}: {hosts}" if nodes else "")),
        ("Device", f"{device}{f', {name}' if name not in ('', 'cpu') else ''}, {setting('train.threads')[0]} threads per rank"),
        ("Data", ", ".join([str(where), *tokens, f"index {index}"])),
        ("Versions", ", ".join(f"{key} {' '.join(str(one).split())}" for key, one in versions.items()) or unknown),
    ]
    ended = run.end or {}
    if "weights_sha256" in ended:
        rows.append(("Result", f"end reason: {ended.get('reason')}; weights {str(ended['weights_sha256'])[:16]}"))
    return section("What was run", table(("", ""), rows))


def dict_by_line(rows: Sequence[tuple[dict[str, Any], float]]) -> dict[int, float]:
    """Return {id(line): value} for rows of (line, value). Pure."""
    return {id(line): value for line, value in rows}


def energy(run: RecordedRun, spent: Costs) -> str:
    """Return the section about energy, node-hours, CO2e and price. Pure."""
    rows = []
    if spent.joules is None:
        rows.append(("energy", f"not available: {spent.why}"))
    else:
        kwh = spent.joules / J_PER_KWH
        rows += [
            ("energy", f"{short(spent.joules)}J = {kwh:.4g} kWh, {spent.of}{f' only ({spent.why})' if spent.why else ''}"),
            ("energy per token", f"{spent.joules / max(1, run.tokens):.4g} J"),
        ]
        rows.append(("CO2e", f"{spent.grams:.4g} g at the given factor" if spent.grams is not None
                     else "not available: no factor was given (energy.grams_per_kwh)"))
    hours = spent.node_hours
    rows.append(("node-hours", f"{hours:.4g}" if hours is not None else "not available: times and hosts were not recorded"))
    rows.append(("price", f"{spent.price:.4g} at the given rate" if spent.price is not None
                 else "not available: no rate was given (energy.price_per_node_hour)" if hours is not None else "not available"))
    return section("Energy and cost", table(("", ""), rows))


def events(run: RecordedRun) -> str:
    """Return the section that lists the events in metrics.jsonl, except the end of the run. Pure."""
    found = [line for line in run.lines if "event" in line and line["event"] not in ("end",)]
    worked = dict_by_line(run.worked())
    rows = []
    for line in found[-MOST_EVENTS:]:
        known = {"event", "step", "unix_seconds", *run.facts} - {"ranks", "seconds", "lost_seconds", "lost_steps"}
        if line["event"] == "skipped":
            known |= {key for key in line if key.endswith("_seconds") or key == "comm_bytes"}
        more = ", ".join(
            f"{key} {_formatted(key, value)}" for key, value in line.items() if key not in known and value not in (0, 0.0, [], "")
        )
        when, passed = _formatted_time(number(line, "unix_seconds")), duration(worked[id(line)]) if id(line) in worked else ""
        rows.append((when, passed, str(line["step"]), str(line["event"]), more))
    cut = paragraph(f"The last {MOST_EVENTS} of {len(found)} events.", "soft") if len(found) > MOST_EVENTS else ""
    return section("Events", cut, table(("time", "run time", "step", "event", "details"), rows, numbers=(1, 2)) if rows else "")


def _formatted_time(moment: float | None) -> str:
    with suppress(ValueError, OverflowError, OSError):  # a time that the calendar does not contain
        return f"{datetime.fromtimestamp(moment):%Y-%m-%d %H:%M:%S}" if moment else ""
    return ""


def _formatted(key: str, value: Any) -> str:
    if key.endswith("seconds") and (seconds := number({key: value}, key)) is not None:
        return duration(seconds)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def settings(run: RecordedRun) -> str:
    """Return the section about settings. It first shows the settings that differ from the defaults, and then all settings.
    Pure."""
    defaults = Config().flat()
    rows = [(key, str(value)) for key, value in run.config.items()]
    other = [(key, value) for key, value in rows if str(defaults.get(key)) != value]
    return section("Settings", paragraph("Settings that differ from the defaults:"), table(("setting", "value"), other),
                   folded("all settings", table(("setting", "value"), rows)))
