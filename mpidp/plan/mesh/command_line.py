"""The command line of `python -m mpidp.plan mesh`. This module imports neither torch nor MPI."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mpidp.config.command_line import from_args, read_run_config
from mpidp.errors import UsageError
from mpidp.hf.names import longest_of, settings_of
from mpidp.model.options import DEFAULTS as OPTIONS
from mpidp.plan.cluster_file import read_cluster
from mpidp.plan.mesh.search import (
    MICRO_BATCHES,
    GivenFigures,
    ignored_of,
    machine_of,
    machine_of_run,
    model_of,
    model_of_config,
    number,
    plan_mesh,
    vocab_size_of,
)
from mpidp.plan.mesh.sizes import Work
from mpidp.runtime.json_file import read_json
from mpidp.runtime.options import add_ranks

TOKENS = {True: 4 << 20, False: 1 << 19}  # assumed tokens per step; key: whether the model has at least 1e9 parameters
BYTES = {"bfloat16": 2, "float32": 4}
OF_THE_WEIGHTS = [f"model.{key}" for key in ("kind", "num_layers", "num_heads", "num_kv_heads", "model_dim", "hidden_dim",
                                             "tie_embeddings", "head_dim", "vocab_size", *OPTIONS)]
DESCRIPTION = """\
Find the meshes (dp x pp x tp, and the level of sharding over dp) of N ranks that have enough memory for a model, and predict
the step time of each mesh. Figures that are not given are assumed and listed. docs/plan.md explains the output and its accuracy.
Settings of a run (--section.key=value) are accepted only together with --config."""
NUMBERS = (  # option, help, factor to convert the value to bytes, operations or seconds
    ("params", "number of parameters of a LLaMA-like model, for example 7b (or use --config)", 1.0),
    ("memory", "memory per rank in GB (default: 80)", 1e9),
    ("samples", "number of samples in the data, for example 100m, to print the samples per rank", 1.0),
    ("vocab", "vocabulary size (default: that of the published model or of the config's data, or 32,000)", 1.0),
    ("seq-len", "tokens per sequence (default: the sequence length of the model)", 1.0),
    ("global-batch", "sequences per step (default: that of --config, else 4 million tokens, or 0.5 million below 1B)", 1.0),
    ("micro-batch", "sequences per forward pass (default: the best of 1 to 16)", 1.0),
    ("flops", "measured FLOP/s of a rank in matrix products, for example 450t", 1.0),
    ("memory-gbyte", "memory bandwidth of a device in GB/s", 1e9),
    ("link-gbit", "bandwidth between two ranks of a node in Gbit/s", 1e9 / 8),
    ("node-gbit", "bandwidth of a node's network in Gbit/s", 1e9 / 8),
    ("latency-us", "latency of a message in microseconds", 1e-6),
    ("ranks-per-node", "number of ranks on each node (default: 8)", 1.0),
    ("gpus-per-node", "number of devices that the ranks of a node share (default: one per rank)", 1.0),
)  # fmt: skip
WHOLE = ("vocab", "seq-len", "global-batch", "micro-batch", "ranks-per-node", "gpus-per-node")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add all options of `plan mesh` except --json to `parser`. Independent."""
    parser.add_argument("--config", metavar="FILE", help="instead of --params: take the model from "
                        "CONFIG.toml of a run, which also gives the batch, or from config.json of a Hugging Face model")
    add_ranks(parser, "the number in cluster.json")
    for name, about, _ in NUMBERS:
        parser.add_argument(f"--{name}", metavar="N", help=about)
    parser.add_argument("--cluster", metavar="FILE", help="cluster.json of mpidp.doctor (default: ./cluster.json, if it exists)")
    parser.add_argument("--calibrate", metavar="RUN", help="compute the speed of a device from RUN, a run on one rank that used "
                        "the same type of device")
    parser.add_argument("--dtype", choices=list(BYTES), help="type of matrix products (default: that of --config or "
                        "--calibrate, else float32 on CPUs and bfloat16 on GPUs)")
    parser.add_argument("--recompute", choices=["true", "false"], help="whether activations are recomputed (default: try both)")
    parser.add_argument("--sequence", choices=["true", "false"], help="value of mesh.sequence (default: try both)")
    parser.add_argument("--overlap", type=float, help="how well data-parallel traffic overlaps with compute, from 0 (not "
                        "at all) to 1 (as much as possible; default: 0.8)")
    parser.add_argument("--top", type=int, default=5, help="number of meshes to show (default: %(default)s)")


def plan_from_options(options: argparse.Namespace, settings: Sequence[str]) -> dict[str, Any]:
    """Return the results of plan_mesh() for parsed options. settings: the arguments --section.key=value.

    Raises UsageError if an option is missing or not valid, or if no mesh is possible. Independent."""
    given = {name: number(text, name) * one for name, _, one in NUMBERS if (text := getattr(options, name.replace("-", "_")))}
    for name in WHOLE:
        if given.get(name, 1.0) % 1:
            raise UsageError(f"--{name}={given[name]:g} must be a whole number")
    if ("params" in given) == bool(options.config):
        raise UsageError("give the model: either --params N, for example --params 7b, or --config FILE (CONFIG.toml of a run, or "
                         "config.json of a Hugging Face model)")
    if settings and not options.config:
        raise UsageError(f"{settings[0]}: no such option (see --help). To change a setting of a run, also give --config")
    cluster = _cluster(options.cluster)
    ranks = options.ranks or cluster.get("ranks") or 0
    if not ranks:
        raise UsageError("give the number of ranks with --ranks, or give a cluster.json of mpidp.doctor with --cluster")
    if options.overlap is not None and not 0 <= options.overlap <= 1:
        raise UsageError(f"--overlap={options.overlap:g} must be from 0 to 1")
    if options.top < 1:
        raise UsageError(f"--top={options.top} must be at least 1")
    published = _config_json(options.config) if options.config else None
    values = from_args([*([] if published else [options.config]), *settings]).flat() if options.config else {}
    whole = {name: int(given.get(name, 0)) for name in WHOLE}
    if values:
        given_model = _settings_of(published, f"--config={options.config}") if published else {}
        values |= given_model or _initial_model(values["train.init_from"])
        _reject_uncut(values)
        values["model.seq_len"] = whole["seq-len"] or values["model.seq_len"]
        model, taken = model_of_config(values, whole["vocab"] or vocab_size_of(values)), options.config
        parameters = float(model.parameters)
    else:
        parameters = given["params"]
        model, taken = model_of(parameters, whole["vocab"], whole["seq-len"])
        taken = f"assumed, {taken}"
    default = values.get("train.global_batch") or max(1, TOKENS[model.parameters >= 1e9] // model.seq_len)
    measured = _dtype_of_run(options.calibrate) if options.calibrate else "auto"
    dtype = options.dtype or _dtype(values, cluster, measured)
    if measured not in (dtype, "auto") and "flops" not in given:
        raise UsageError(f"--calibrate={options.calibrate} computed in {measured}, but the plan is for {dtype}. Give a run with "
                         f"train.dtype={dtype}, or --dtype {measured}, or --flops")
    number_bytes = BYTES[dtype]
    base = Work(whole["global-batch"] or default, 1, number_bytes=number_bytes, loss=values.get("train.loss", "auto"),
                slices=values.get("model.slices", 1), lanes=values.get("train.lanes", 0))
    figures = GivenFigures(
        given.get("flops"), given.get("memory-gbyte"), given.get("link-gbit"), given.get("node-gbit"), given.get("latency-us"),
        whole["ranks-per-node"] or None, whole["gpus-per-node"] or None, options.overlap,
    )
    run = machine_of_run(Path(options.calibrate), whole["vocab"]) if options.calibrate else None
    machine, sources = machine_of(figures, cluster, run, number_bytes)
    micro = [whole["micro-batch"]] if whole["micro-batch"] else MICRO_BATCHES
    again, parts = ([choice == "true"] if choice else [False, True] for choice in (options.recompute, options.sequence))
    found = plan_mesh(model, taken, parameters, ranks, given.get("memory", 80e9), machine, sources, base, micro, again,
                      parts, given.get("samples"), options.top)
    return found | {"ignored": ignored_of(values)}


def _dtype(values: Mapping[str, Any], cluster: Mapping[str, Any], measured: str) -> str:
    """Return the dtype that a run would have: that of train.dtype, or `measured`, the dtype of a run on the same type of device.
    If both are auto, return float32 for a CPU, and bfloat16 for a GPU. values: {section.key: value}. cluster: the content of
    cluster.json, or {}. Pure."""
    on_cpu = values.get("train.device") == "cpu" or cluster.get("gpu", "not known") is None
    wanted = (values.get("train.dtype", "auto"), measured, "float32" if on_cpu else "bfloat16")
    return next(str(dtype) for dtype in wanted if dtype != "auto")


def _dtype_of_run(run: str) -> str:
    """Return train.dtype of the run in the folder `run`, or auto if it is not recorded. Independent."""
    file = Path(run) / "config.toml"
    return str(read_run_config(file).get("train.dtype", "auto")) if file.is_file() else "auto"


def _reject_uncut(values: Mapping[str, Any]) -> None:
    """Raise UsageError if the time and memory of the model cannot be predicted. values: {section.key: value}. Pure."""
    kind, targets = values["model.kind"], values["model.lora_targets"]
    if kind != "transformer":
        raise UsageError(f"model.kind={kind}: the predictions are only for Transformers. Use `python -m mpidp.plan methods`")
    if values["model.lora_rank"] and "head" in targets.replace(" ", "").split(","):
        raise UsageError(f"model.lora_targets={targets}: the predictions do not include an adapter of the head. Use other layers")


def _initial_model(path: str) -> dict[str, Any]:
    """Return the model settings {section.key: value} of the model in `path`. path: the value of train.init_from, which is a
    Hugging Face folder, a run, or "". Raises UsageError or DataError if the model's configuration cannot be read. Independent."""
    if not path:
        return {}
    config = Path(path) / "config.json"
    if not config.is_file():
        run = next((one for one in (Path(path), *Path(path).parents[1:2]) if (one / "config.toml").is_file()), Path(path))
        return {key: value for key, value in read_run_config(run / "config.toml").items() if key in OF_THE_WEIGHTS}
    return {key: value for key, value in _settings_of(config, f"train.init_from={path}").items() if key != "model.seq_len"}


def _config_json(given: str) -> Path | None:
    """Return the path of the config.json of a Hugging Face model. given: the path of this file, of its folder, or of a TOML file.
    Return None for a TOML file."""
    path = Path(given) / "config.json" if Path(given).is_dir() else Path(given)
    return path if path.suffix == ".json" else None


def _settings_of(config: Path, what: str) -> dict[str, Any]:
    """Return the model settings {section.key: value} of the model whose config.json has the path `config`. model.seq_len is
    the model's longest context. what: name of the model in error messages. Raises UsageError or DataError if config.json
    cannot be read. Independent."""
    try:
        content = read_json(config)
    except (OSError, ValueError) as error:
        raise UsageError(f"{what}: config.json cannot be read ({error})") from error
    found = settings_of(content, config)
    return {f"model.{key}": value for key, value in found.items()} | {"model.seq_len": longest_of(content, config) or 2048}


def _cluster(file: str | None) -> dict[str, Any]:
    """Return the content of cluster.json. file: the path of cluster.json, or None for cluster.json in the current folder. Return
    {} if `file` is None and there is no such file. Raises UsageError if the file cannot be read."""
    path = Path(file or "cluster.json")
    if not path.is_file():
        if file:
            raise UsageError(f"--cluster={file}: no such file. Write it with `mpirun -np N python -m mpidp.doctor`")
        return {}
    return read_cluster(path)
