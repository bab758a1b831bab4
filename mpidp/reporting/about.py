"""What the report says of one run besides its curves: what was run and on what, what it cost, what happened. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from mpidp.config.schema import fields_of
from mpidp.metrics.jsonl import number
from mpidp.reporting.charts import duration, short
from mpidp.reporting.costs import J_PER_KWH, Costs, machines
from mpidp.reporting.page import folded, section, table, words
from mpidp.reporting.read import Run

MOST_EVENTS = 200
MOST_HOSTS = 16


def what_ran(run: Run) -> str:
    """Model, data, machines, versions. Pure."""
    config, facts, unknown = run.config, run.facts, "not recorded"
    prints, data, nodes = facts.get("fingerprint") or {}, facts.get("data") or {}, facts.get("nodes") or {}

    def said(*keys: str) -> list[str]:
        return [str(config.get(key, "?")) for key in keys]

    hosts = ", ".join(f"{host} ({count})" for host, count in list(nodes.items())[:MOST_HOSTS])
    hosts += f", and {len(nodes) - MOST_HOSTS} more" if len(nodes) > MOST_HOSTS else ""
    cut = [f"mesh {name} {config[f'mesh.{name}']}" for name in ("tp", "pp", "shard") if config.get(f"mesh.{name}", 1) > 1]
    name, device = str(prints.get("device", "")), ", ".join(said("train.device", "train.dtype"))
    versions = facts.get("versions") or {key: prints[key] for key in ("torch", "cpu") if key in prints}
    model = "{}, {} layers x {}".format(*said("model.kind", "model.num_layers", "model.model_dim"))
    batch = "{} sequences x {} tokens".format(*said("train.global_batch", "model.seq_len"))
    method = "{}, reducer {}, compression {}".format(*said("strategy.name", "comm.reducer", "comm.compress"))
    where, index = data.get("path", said("data.path")[0]), str(data.get("index_sha256", "?"))[:12]
    tokens = [f"{data[f'{split}_tokens']:,} tokens of {split}" for split in ("train", "val") if f"{split}_tokens" in data]
    rows = [
        ("Model", model + (f", {facts['parameters']:,} parameters" if "parameters" in facts else "")),
        ("Batch", f"{batch}, {facts.get('micro_batches', '?')} micro-batches in {facts.get('lanes', '?')} lanes"),
        ("Method", ", ".join([method, *cut])),
        ("Ranks", f"{run.ranks}" + (f" on {machines(facts)} machine{'s' * (machines(facts) != 1)}: {hosts}" if nodes else "")),
        ("Device", f"{device}{f', {name}' if name not in ('', 'cpu') else ''}, {said('train.threads')[0]} threads a rank"),
        ("Data", ", ".join([str(where), *tokens, f"index {index}"])),
        ("Versions", ", ".join(f"{key} {' '.join(str(one).split())}" for key, one in versions.items()) or unknown),
    ]
    ended = run.end or {}
    if "weights_sha256" in ended:
        rows.append(("Result", f"ended by {ended.get('reason')}, weights {str(ended['weights_sha256'])[:16]}"))
    return section("What was run", table(("", ""), rows))


def dict_by_line(rows: Sequence[tuple[dict[str, Any], float]]) -> dict[int, float]:
    """By the identity of the line. Pure."""
    return {id(line): value for line, value in rows}


def energy(run: Run, spent: Costs) -> str:
    """Joules, and what they stand for. Pure."""
    rows = []
    if spent.joules is None:
        rows.append(("energy", f"not available: {spent.why}"))
    else:
        kwh = spent.joules / J_PER_KWH
        rows += [
            ("energy", f"{short(spent.joules)}J = {kwh:.4g} kWh, of {spent.of}{f' alone ({spent.why})' if spent.why else ''}"),
            ("a token", f"{spent.joules / max(1, run.tokens):.4g} J"),
        ]
        rows.append(("CO2e", f"{spent.grams:.4g} g at the stated factor" if spent.grams is not None
                     else "not available: no factor was stated (energy.grams_per_kwh)"))
    hours = spent.node_hours
    rows.append(("node-hours", f"{hours:.4g}" if hours is not None else "not available: times and hosts were not recorded"))
    rows.append(("price", f"{spent.price:.4g} at the stated rate" if spent.price is not None
                 else "not available: no rate was stated (energy.price_per_node_hour)" if hours is not None else "not available"))
    return section("Energy and cost", table(("", ""), rows))


def events(run: Run) -> str:
    """What happened besides steps. Pure."""
    told = [line for line in run.lines if "event" in line and line["event"] not in ("end",)]
    worked = dict_by_line(run.worked())
    rows = []
    for line in told[-MOST_EVENTS:]:
        known = {"event", "step", "unix_seconds", *run.facts} - {"ranks", "seconds", "lost_seconds", "lost_steps"}
        if line["event"] == "skipped":
            known |= {key for key in line if key.endswith("_seconds") or key == "comm_bytes"}
        more = ", ".join(
            f"{key} {_said(key, value)}" for key, value in line.items() if key not in known and value not in (0, 0.0, [], "")
        )
        moment = number(line, "unix_seconds")
        when = f"{datetime.fromtimestamp(moment):%Y-%m-%d %H:%M:%S}" if moment else ""
        rows.append((when, duration(worked[id(line)]) if id(line) in worked else "", str(line["step"]), str(line["event"]), more))
    cut = words(f"The last {MOST_EVENTS} of {len(told)}.", "soft") if len(told) > MOST_EVENTS else ""
    return section("Events", cut, table(("when", "into the run", "step", "event", "more"), rows, numbers=(1, 2)) if rows else "")


def _said(key: str, value: Any) -> str:
    if key.endswith("seconds") and isinstance(value, (int, float)):
        return duration(value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def settings(run: Run) -> str:
    """The config: what is not the default, then all. Pure."""
    defaults = {key: value for key, _, value in fields_of()}
    rows = [(key, str(value)) for key, value in run.config.items()]
    other = [(key, value) for key, value in rows if str(defaults.get(key)) != value]
    return section("Settings", words("Those that are not the defaults:"), table(("setting", "value"), other),
                   folded("all settings", table(("setting", "value"), rows)))
