"""The command line of `python -m mpidp.plan mesh`. No torch, no MPI."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mpidp.config.command_line import from_args, read_toml
from mpidp.config.schema import fields_of
from mpidp.errors import UsageError
from mpidp.hf.names import settings_of
from mpidp.planning.mesh.memory import Work
from mpidp.planning.mesh.search import (
    MICRO_BATCHES,
    Given,
    machine_of,
    machine_of_run,
    model_of,
    model_of_config,
    number,
    plan_mesh,
    vocab_size_of,
)
from mpidp.runtime.command import Parser

TOKENS = {True: 4 << 20, False: 1 << 19}  # a step, assumed, where the model has 1 B parameters or more, or fewer
BYTES = {"bfloat16": 2, "float32": 4}
OF_THE_WEIGHTS = [f"model.{key}" for key in ("kind", "num_layers", "num_heads", "num_kv_heads", "model_dim", "hidden_dim",
                                             "tie_embeddings", "head_dim", "vocab_size")]
USAGE = """which mesh of ranks (dp x pp x tp, and what dp shares out) holds a model, and how long a step takes on it.
Figures that are not given are assumed, and the table says so. docs/plan.md: how to read it, how far it was right."""
NUMBERS = (  # option, what it says, what one of it is in bytes, operations, seconds
    ("params", "of a LLaMA-like model, as 7b; or --config", 1.0), ("memory", "GB of each rank (80)", 1e9),
    ("samples", "in the data, as 100m: how many each rank has", 1.0),
    ("vocab", "tokens; default: the published model's, 32,000, or of the config's data", 1.0),
    ("seq-len", "tokens; default: the model's", 1.0), ("global-batch", "sequences a step; default: of 4 M tokens", 1.0),
    ("micro-batch", "sequences; default: 1 to 16, the best", 1.0),
    ("flops", "operations a second of a rank in products, measured, as 450t", 1.0),
    ("memory-gbyte", "GB a second of a device's memory", 1e9), ("link-gbit", "Gbit/s of a rank to another of its node", 1e9 / 8),
    ("node-gbit", "Gbit/s of a node's network", 1e9 / 8), ("latency-us", "microseconds of a message", 1e-6),
    ("ranks-per-node", "8", 1.0), ("gpus-per-node", "devices that a node's ranks share; default: one each", 1.0),
)  # fmt: skip
WHOLE = ("vocab", "seq-len", "global-batch", "micro-batch", "ranks-per-node", "gpus-per-node")


def answer(words: Sequence[str]) -> tuple[dict[str, Any], bool]:
    """(what is printed, as JSON?). UsageError. Independent."""
    parser = Parser(prog="python -m mpidp.plan mesh", usage="%(prog)s --params N --ranks P [options] [--section.key=value ...]",
                    description=USAGE, allow_abbrev=False)
    parser.add_argument("--config", metavar="CONFIG.toml", help="instead of --params: the model and batch of this run")
    parser.add_argument("--ranks", required=True, help="how many there are")
    for name, about, _ in NUMBERS:
        parser.add_argument(f"--{name}", metavar="N", help=about)
    parser.add_argument("--cluster", metavar="FILE", help="cluster.json of mpidp.doctor; default: the one here, if there is one")
    parser.add_argument("--calibrate", metavar="RUN", help="a run of one rank on such a device: how fast it computes")
    parser.add_argument("--dtype", choices=list(BYTES), help="of products (bfloat16)")
    parser.add_argument("--recompute", choices=["true", "false"], help="default: where it helps")
    parser.add_argument("--sequence", choices=["true", "false"], help="default: where it helps")
    parser.add_argument("--overlap", type=float, help="share of dp traffic that hides behind computing, of what could (0.8)")
    parser.add_argument("--top", type=int, default=5, help="how many meshes to show (%(default)s)")
    parser.add_argument("--json", action="store_true", help="one JSON line instead of the table")
    options, settings = parser.parse_known_args(list(words))
    given = {name: number(said, name) * one for name, _, one in NUMBERS if (said := getattr(options, name.replace("-", "_")))}
    for name in WHOLE:
        if given.get(name, 1.0) % 1:
            raise UsageError(f"--{name}={given[name]:g} must be a whole number")
    if ("params" in given) == bool(options.config):
        raise UsageError("give --params N, as 7b, or --config CONFIG.toml, and one of them")
    if settings and not options.config:
        raise UsageError(f"{settings[0]}: no such option; settings of a run go with --config (--help says more)")
    if (ranks := number(options.ranks, "ranks")) % 1:
        raise UsageError(f"--ranks={options.ranks} must be a whole number")
    if options.overlap is not None and not 0 <= options.overlap <= 1:
        raise UsageError(f"--overlap={options.overlap:g} must be from 0 to 1")
    if options.top < 1:
        raise UsageError(f"--top={options.top} must be at least 1")
    values = {key: value for key, _, value in fields_of(from_args([options.config, *settings]))} if options.config else {}
    whole = {name: int(given.get(name, 0)) for name in WHOLE}
    if values:
        values |= _begun_with(values["train.init_from"])
        _refuse_whole(values)
        values["model.seq_len"] = whole["seq-len"] or values["model.seq_len"]
        model, taken = model_of_config(values, whole["vocab"] or vocab_size_of(values)), options.config
        parameters = float(model.parameters)
    else:
        parameters = given["params"]
        model, taken = model_of(parameters, whole["vocab"], whole["seq-len"])
        taken = f"assumed, {taken}"
    default = values.get("train.global_batch") or max(1, TOKENS[model.parameters >= 1e9] // model.seq_len)
    number_bytes = BYTES[options.dtype or ("float32" if values.get("train.dtype") == "float32" else "bfloat16")]
    base = Work(whole["global-batch"] or default, 1, number_bytes=number_bytes)
    figures = Given(given.get("flops"), given.get("memory-gbyte"), given.get("link-gbit"), given.get("node-gbit"),
                    given.get("latency-us"), whole["ranks-per-node"] or None, whole["gpus-per-node"] or None, options.overlap)
    run = machine_of_run(Path(options.calibrate), whole["vocab"]) if options.calibrate else None
    machine, said = machine_of(figures, _cluster(options.cluster), run, number_bytes)
    micro = [whole["micro-batch"]] if whole["micro-batch"] else MICRO_BATCHES
    again, parts = ([said == "true"] if said else [False, True] for said in (options.recompute, options.sequence))
    found = plan_mesh(model, taken, parameters, int(ranks), given.get("memory", 80e9), machine, said, base, micro, again, parts,
                      given.get("samples"), options.top)
    return found, options.json


def _refuse_whole(values: Mapping[str, Any]) -> None:
    """UsageError for a model that every rank has whole: there is no mesh to choose. Pure."""
    kind, rank = values["model.kind"], values["model.lora_rank"]
    if kind != "transformer" or rank:
        why = f"model.lora_rank={rank}: adapters are" if kind == "transformer" else f"model.kind={kind}: it is"
        raise UsageError(f"{why} not cut, so that each rank has a whole replica: `python -m mpidp.plan methods` plans for those")


def _begun_with(path: str) -> dict[str, Any]:
    """{section.key: value} of the model that train.init_from names: a Hugging Face folder, or a run of ours. UsageError,
    DataError. Independent."""
    if not path:
        return {}
    config = Path(path) / "config.json"
    if not config.is_file():
        run = next((one for one in (Path(path), *Path(path).parents[1:2]) if (one / "config.toml").is_file()), Path(path))
        return {key: value for key, value in read_toml(run / "config.toml").items() if key in OF_THE_WEIGHTS}
    try:
        said = json.loads(config.read_text(errors="replace"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"train.init_from={path}: config.json cannot be read ({error})") from error
    return {f"model.{key}": value for key, value in settings_of(said if isinstance(said, dict) else {}, config).items()}


def _cluster(file: str | None) -> dict[str, Any]:
    """What the doctor wrote; nothing where no file is named and none is here. UsageError."""
    path = Path(file or "cluster.json")
    if not path.is_file():
        if file:
            raise UsageError(f"--cluster={file}: no such file; `mpirun -np N python -m mpidp.doctor` writes one")
        return {}
    try:
        said = json.loads(path.read_text(errors="replace"))
        if not isinstance(said, dict):
            raise ValueError("no object")
        for key in ("ranks_per_node", "gpus_per_node", "cores_per_node"):
            said[key] = [int(one) for one in said.get(key) or []]
        for key in ("latency_seconds", "bandwidth_bytes_per_second"):
            said[key] = None if said.get(key) is None else float(said[key])
        if said["bandwidth_bytes_per_second"] == 0:
            raise ValueError("a bandwidth of 0")
    except (ValueError, TypeError) as error:
        raise UsageError(f"{path} is not what mpidp.doctor writes ({error}): let it write it anew") from error
    return said
