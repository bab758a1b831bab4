"""Damage files at random and read them: each must be refused with the right exit code, or give the same result.

    python -m tests.faults.fuzz [--odd] [--cases 2000] [--seed 1] [--kind NAME ...] [--show 3]

Each case changes one byte, flips one bit, removes one byte or cuts the file. With --odd, each case replaces one value of a JSON
or TOML file with a value of another type or size, and makes the checksum anew. The readers run in a forked child, so that a crash
or an endless loop is counted, too. Files without a checksum (config.toml, metrics.jsonl, config.json, ...) may also give another
valid result: a damaged figure in a text is a figure. Prints a row for each kind of file, and exits with 1 if any case ended in a
traceback, a crash, the wrong exit code or, where there is a checksum, another result.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import pickle
import random
import re
import resource
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np

from tests.faults.commands import TINY, Shell

SECONDS = 20  # for one case
MEMORY = 6 << 30  # bytes of data of the reading process
TEXT = "".join(f"def f{i}(x):\n    return x + {i * 7 % 13}\n\n" for i in range(200))
CHAT = '{"messages": [{"role": "user", "content": "say %d"}, {"role": "assistant", "content": "it is %d"}]}\n'
SAME, OTHER, REFUSED, WRONG_CODE, TRACEBACK, HANG, CRASH = (
    "same", "other result", "refused", "wrong exit code", "traceback", "hang", "crash"
)
ALWAYS_BAD = (WRONG_CODE, TRACEBACK, HANG, CRASH)


@dataclass(frozen=True)
class Kind:
    """A kind of file. read: reads the folder with the damaged file; returns what may not change."""

    file: str
    code: int  # exit code of a refusal; UsageError (2) is also right for settings that do not fit the file
    read: Callable[[Path], Any]
    checksummed: bool = False  # another result is never right


def digest(*values: Any) -> str:
    found = hashlib.sha256()
    for value in values:
        found.update(value.tobytes() if isinstance(value, np.ndarray) else pickle.dumps(value))
    return found.hexdigest()


# --- readers; they import late, so that --help is quick


def checkpoint(place: Path) -> str:
    from mpi4py import MPI

    from mpidp.checkpoint.resume import open_run

    reader = open_run(place / "run" / "checkpoints" / "step_00000006", MPI.COMM_SELF)
    return digest(reader.meta, *(reader[name].numpy() for name in sorted(reader)))


def shards(place: Path) -> str:
    from mpidp.data.shards import TokenStream

    found: list[Any] = []
    for split in ("train", "val"):
        stream = TokenStream(place / "shards", split)
        stream.keep_apart("auto", 64)
        stream.check(contents=stream.is_cheap(range(len(stream.files))))
        ids = stream.read(0, stream.num_tokens)
        stream.check_ids(0, ids)
        stream.index.tokenizer_bytes(stream.path)
        found += [ids, stream.read_mask(0, len(ids)), stream.read_starts(0, len(ids)), stream.eod, stream.vocab_size]
        found.append(stream.apart)
    return digest(*found)


def tokenizer_of_run(place: Path) -> str:
    from mpi4py import MPI

    from mpidp.checkpoint.resume import open_run
    from mpidp.data.tokenizer import load_tokenizer
    from mpidp.inference.loading import own_tokenizer

    path = own_tokenizer(open_run(place / "run" / "checkpoints" / "step_00000006", MPI.COMM_SELF))
    return digest(load_tokenizer(path).to_json())


def tokenizer_given(place: Path) -> str:
    from mpidp.data.token_bytes import bytes_of_tokens
    from mpidp.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(place / "bpe" / "tokenizer.json")
    ids, table = tokenizer.encode(TEXT[:300]), bytes_of_tokens(tokenizer)
    return digest(ids, tokenizer.decode(ids), table and table.of, tokenizer.eod, tokenizer.vocab_size)


def special_tokens(place: Path) -> str:
    from mpidp.data.special_tokens import read_special_tokens

    return digest(read_special_tokens(place / "special"))


def config(place: Path) -> str:
    from mpidp.config.command_line import from_args

    return digest(from_args([str(place / "run" / "config.toml")]).flat())


def config_of_run(place: Path) -> str:
    from mpidp.plan.ranks import measured
    from mpidp.report.__main__ import report
    from mpidp.report.read import read

    page = report([read(place / "run")])
    return digest(re.sub(r"mpidp report, [-0-9: ]+", "", page), measured.read(place / "run").lanes.num_lanes)


def metrics(place: Path) -> str:
    from mpi4py import MPI

    from mpidp.metrics.jsonl import MetricsFile, past
    from mpidp.plan.ranks import measured
    from mpidp.report.__main__ import report
    from mpidp.report.read import read
    from mpidp.training.replay_record import read_record

    run = place / "run"
    content = (run / "metrics.jsonl").read_bytes()
    page = report([read(run)])
    timed = measured.seconds([measured.read(run)])
    record = read_record(str(run), MPI.COMM_SELF)
    history = past(run / "metrics.jsonl")
    file = MetricsFile(run / "metrics.jsonl", 6, 6)
    file.close()
    (run / "metrics.jsonl").write_bytes(content)
    page = re.sub(r"mpidp report, [-0-9: ]+", "", page)  # the present time
    return digest(page, timed, record.lines, record.last, history)


def arrivals(place: Path) -> str:
    from mpidp.strategies.arrivals import read_arrivals

    return digest(read_arrivals(str(place / "arrivals.jsonl"), 3, 2, 4))


def cluster(place: Path) -> str:
    from mpidp.plan.cluster_file import read_cluster

    return digest(read_cluster(place / "cluster.json"))


def tries(place: Path) -> str:
    from mpidp.errors import UsageError
    from mpidp.faults.restarts import RestartLog

    log = RestartLog(place)
    with suppress(UsageError):
        log.begin(3, 5, 0)
    log.failed("again")
    return ""  # a damaged count starts anew


def lock(place: Path) -> str:
    from mpidp.faults.run_lock import RunLock

    content = (place / "run" / "lock").read_bytes()
    try:
        RunLock(place / "run", patience_seconds=0.0, watch_seconds=0.0).release()
    finally:
        (place / "run" / "lock").write_bytes(content)
    return ""


def hf_model(place: Path) -> str:
    from mpidp.hf.folder import ModelFolder, whole

    folder = ModelFolder(place / "hf")
    weights = (folder.box(f"model/{name}", whole(folder.sizes, name)).numpy() for name in sorted(folder.sizes))
    return digest(folder.settings, *weights)


def tokens_in(form: str, source: str) -> Callable[[Path], str]:
    """Return a reader of tokens in a format of data_tools.convert."""
    def read(place: Path) -> str:
        from data_tools.from_tokens import FromOptions, from_tokens

        with redirect_stdout(StringIO()):
            lines = from_tokens(form, place / source, place / "new", FromOptions("byte", 1, 0.0))
        content = (place / "new" / "train_00000.h5").read_bytes()
        for path in (place / "new").iterdir():
            path.unlink()
        (place / "new").rmdir()
        return digest(lines, content)

    return read


FORMS = ("nanogpt", "llmc", "olmo", "datatrove", "hf")
STEP = "run/checkpoints/step_00000006"
KINDS = {
    "manifest.json": Kind(f"{STEP}/manifest.json", 4, checkpoint, checksummed=True),
    "pieces": Kind(f"{STEP}/rank_00000.safetensors", 4, checkpoint, checksummed=True),
    "index.json": Kind("shards/index.json", 3, shards, checksummed=True),
    "shard": Kind("shards/train_00000.h5", 3, shards, checksummed=True),
    "shards' tokenizer.json": Kind("shards/tokenizer.json", 3, shards, checksummed=True),
    "RUN/tokenizer.json": Kind("run/tokenizer.json", 3, tokenizer_of_run, checksummed=True),
    "given tokenizer.json": Kind("bpe/tokenizer.json", 3, tokenizer_given),
    "special_tokens.json": Kind("special/special_tokens.json", 3, special_tokens),
    "config.toml": Kind("run/config.toml", 2, config),
    "config.toml in report": Kind("run/config.toml", 2, config_of_run),
    "metrics.jsonl": Kind("run/metrics.jsonl", 2, metrics),
    "arrivals": Kind("arrivals.jsonl", 2, arrivals),
    "cluster.json": Kind("cluster.json", 2, cluster),
    "tries.json": Kind("tries.json", 2, tries),
    "lock": Kind("run/lock", 2, lock),
    "HF config.json": Kind("hf/config.json", 3, hf_model),
    "HF index": Kind("hf/model.safetensors.index.json", 3, hf_model),
    "HF weights": Kind("hf/model-00001-of-00003.safetensors", 3, hf_model),
    ".bin": Kind("meg_train.bin", 3, tokens_in("megatron", "meg_train")),
    ".idx": Kind("meg_train.idx", 3, tokens_in("megatron", "meg_train")),
    "nanoGPT's .bin": Kind("as_nanogpt/train.bin", 3, tokens_in("nanogpt", "as_nanogpt")),
    "llm.c's .bin": Kind("as_llmc/tokens_train_000000.bin", 3, tokens_in("llmc", "as_llmc")),
    "OLMo's .csv.gz": Kind("as_olmo/train/token_ids_part_0000.csv.gz", 3, tokens_in("olmo", "as_olmo")),
    ".ds.index": Kind("as_datatrove/train/00000_unshuffled.ds.index", 3, tokens_in("datatrove", "as_datatrove")),
    ".ds.metadata": Kind("as_datatrove/train/00000_unshuffled.ds.metadata", 3, tokens_in("datatrove", "as_datatrove")),
    ".parquet": Kind("as_hf/train-00000-of-00001.parquet", 3, tokens_in("hf", "as_hf")),
}

TREES = ["manifest.json", "index.json", "given tokenizer.json", "special_tokens.json", "config.toml", "config.toml in report",
         "metrics.jsonl", "arrivals",          "cluster.json", "tries.json", "lock", "HF config.json", "HF index"]


def prepare(place: Path) -> None:
    """Write all files into a folder, with the commands that users have."""
    shell = Shell(place)
    (place / "text.txt").write_text(TEXT)
    (place / "chat.jsonl").write_text("".join(CHAT % (i, i * 7) for i in range(200)))
    (place / "chat.jinja").write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    (place / "tiny.toml").write_text(TINY)
    data = ("--source", "text.txt", "--shards", "2", "--val-fraction", "0.1", "--out")
    rows = ("--source", "chat.jsonl", "--format", "chat", "--chat-template", "chat.jinja", "--seq-len", "64", "--shards", "2")
    for words in (
        ("data_tools.prepare", *data, "plain"), ("data_tools.prepare", *data, "bpe", "--tokenizer", "bpe:300"),
        ("data_tools.prepare", *rows, "--val-fraction", "0.2", "--out", "shards"),
        ("data_tools.convert", "--to", "megatron", "plain", "--out", "meg"),
        *(("data_tools.convert", "--to", form, "plain", "--out", f"as_{form}") for form in FORMS),
        ("mpidp.train", "tiny.toml", "--data.path=plain", "--train.eval_every=2"), ("mpidp.export", "run", "--out", "whole"),
    ):
        ended = shell.run("-m", *words, seconds=300)
        assert ended.code == 0, ended
    _write_others(place)


def _write_others(place: Path) -> None:
    from transformers import AutoModelForCausalLM

    from mpidp.data.special_tokens import for_run
    from mpidp.data.tokenizer import load_tokenizer
    from mpidp.faults.restarts import RestartLog
    from mpidp.faults.run_lock import RunLock

    AutoModelForCausalLM.from_pretrained(place / "whole").save_pretrained(place / "hf", max_shard_size="20KB")
    (place / "special").mkdir()
    table = for_run(place / "bpe", load_tokenizer(place / "bpe"))
    (place / "special" / "special_tokens.json").write_text(table.to_json())
    orders = [{"step": 3 * i, "train_loss": 1.0, "arrivals": [[0, 1, 2] * 3, [2, 0, 1] * 3]} for i in range(1, 20)]
    (place / "arrivals.jsonl").write_text("".join(json.dumps(line) + "\n" for line in orders))
    figures = {"ranks": 4, "ranks_per_node": [2, 2], "cores_per_node": [2, 2], "gpus_per_node": [0, 0], "gpu": None,
               "between": "nodes", "latency_seconds": 1e-5, "bandwidth_bytes_per_second": 1e9}
    (place / "cluster.json").write_text(json.dumps(figures, indent=1))
    log = RestartLog(place)
    log.begin(3, 5, 0)
    log.failed("some reason")
    held = RunLock(place / "run")
    content = held.path.read_bytes().replace(b'"pid": ', b'"pid": 99')
    held.release()
    (place / "run" / "lock").write_bytes(content)


def damaged(content: bytes, chance: random.Random) -> bytes:
    """Return the content with one byte changed or removed, one bit flipped, or its end cut off."""
    at, way = chance.randrange(len(content)), chance.random()
    if way < 0.5:
        other = chance.choice([byte for byte in range(256) if byte != content[at]])
        return content[:at] + bytes([other]) + content[at + 1 :]
    if way < 0.7:
        return content[:at] + bytes([content[at] ^ 1 << chance.randrange(8)]) + content[at + 1 :]
    return content[:at] + content[at + 1 :] if way < 0.8 else content[:at]


ODD = [
    None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63), 10**400, 0.5, -0.5, 1e308, float("nan"), float("inf"), "", "0",
    "x" * 10_000, "\x00", "\ud800", "../../etc/passwd", "\x1b[2J", [], [[]], [None], ["x"], [1, "x"], [0] * 10_000, {}, {"": {}},
    {"x": [1]}, [[1 << 40]],
]


def odd(content: bytes, name: str, chance: random.Random) -> bytes:
    """Return the content of a JSON or TOML file with one value replaced."""
    value = chance.choice(ODD)
    if name.startswith("config.toml"):
        lines = content.decode().splitlines()
        at = chance.choice([i for i, line in enumerate(lines) if " = " in line])
        text = json.dumps(value).replace("null", "[]").replace("NaN", "nan").replace("Infinity", "inf")
        lines[at] = lines[at].partition(" = ")[0] + " = " + text
        return "\n".join(lines).encode() + b"\n"
    if name in ("metrics.jsonl", "arrivals"):
        lines = content.decode().splitlines()
        at = chance.randrange(len(lines))
        lines[at] = json.dumps(replaced(json.loads(lines[at]), value, chance))
        return "\n".join(lines).encode() + b"\n"
    body = json.loads(content)
    if name == "manifest.json":
        from mpidp.checkpoint import manifest

        return manifest._seal(replaced(body["body"], value, chance))
    return json.dumps(replaced(body, value, chance)).encode()


def replaced(tree: Any, value: Any, chance: random.Random) -> Any:
    """Return the tree with a random part of it replaced, removed or renamed."""
    if not isinstance(tree, (dict, list)) or not tree or chance.random() < 0.15:
        return value
    if isinstance(tree, list):
        at = chance.randrange(len(tree))
        return [*tree[:at], replaced(tree[at], value, chance), *tree[at + 1 :]]
    key = chance.choice(list(tree))
    if (way := chance.random()) < 0.1:
        return {name: one for name, one in tree.items() if name != key}
    new = chance.choice(["", "other", key + "_"]) if way < 0.15 else key
    return {(new if name == key else name): replaced(one, value, chance) if name == key else one for name, one in tree.items()}


class TooLong(BaseException):
    """Raised by the alarm."""


def outcome(kind: Kind, place: Path, right: str) -> tuple[str, str]:
    """Read once; return (what happened, the message or the place of the error)."""
    from mpidp.errors import MpidpError

    signal.alarm(SECONDS)
    try:
        found = kind.read(place)
        return (SAME if found == right else OTHER), ""
    except MpidpError as error:
        clear = error.exit_code == kind.code or "Use model.seq_len=" in str(error)
        return (REFUSED if clear else WRONG_CODE), f"{error.exit_code}: {error}"
    except TooLong:
        return HANG, "".join(traceback.format_exc()[-800:])
    except BaseException as error:
        calls = traceback.extract_tb(error.__traceback__)
        where = [call for call in calls if "/mpidp/" in call.filename or "/data_tools/" in call.filename or call is calls[0]][-1]
        return TRACEBACK, f"{type(error).__name__}: {str(error)[:200]} at {where.filename}:{where.lineno}"
    finally:
        signal.alarm(0)


def cases(name: str, place: Path, options: argparse.Namespace, first: int, right: str) -> Iterator[tuple[int, str, str]]:
    kind = KINDS[name]
    path = place / kind.file
    whole = path.read_bytes()
    for number in range(first, options.cases):
        chance = random.Random(f"{options.seed}/{name}/{number}")
        path.write_bytes(odd(whole, name, chance) if options.odd else damaged(whole, chance))
        yield number, *outcome(kind, place, right)
        path.write_bytes(whole)


def _too_long(*_: Any) -> None:
    raise TooLong


def in_child(
    name: str, place: Path, options: argparse.Namespace, first: int, right: str
) -> tuple[list[tuple[int, str, str]], int]:
    """Run cases in a forked child. Return what it reported, and the signal that ended it (0: none)."""
    whole = (place / KINDS[name].file).read_bytes()
    with tempfile.TemporaryFile() as log:
        if (child := os.fork()) == 0:
            try:
                signal.signal(signal.SIGALRM, _too_long)
                resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
                for found in cases(name, place, options, first, right):
                    os.write(log.fileno(), pickle.dumps(found))
            finally:
                os._exit(0)
        status = os.waitpid(child, 0)[1]
        (place / KINDS[name].file).write_bytes(whole)
        log.seek(0)
        found = []
        with suppress(EOFError):
            while True:
                found.append(pickle.load(log))
    return found, os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def fuzz(name: str, place: Path, options: argparse.Namespace) -> tuple[Counter[str], dict[str, list[str]]]:
    """Run all cases of a kind. Return the counts and some examples of each outcome."""
    counts, examples, number = Counter[str](), dict[str, list[str]](), 0
    right = KINDS[name].read(place)
    while number < options.cases:
        found, ended_by = in_child(name, place, options, number, right)
        if len(found) < options.cases - number:
            found.append((number + len(found), CRASH, f"signal {ended_by}"))
        for case, what, words in found:
            counts[what] += 1
            examples.setdefault(what, []).append(f"case {case}: {words}")
        number += len(found)
    return counts, examples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--odd", action="store_true", help="replace values of JSON and TOML files instead of bytes")
    parser.add_argument("--cases", type=int, default=2000, help="for each kind of file")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kind", action="append", choices=list(KINDS))
    parser.add_argument("--show", type=int, default=3, help="examples of each bad outcome")
    options = parser.parse_args()
    bad = 0
    print(f"| file | {SAME} | {REFUSED} | {OTHER} | {' | '.join(ALWAYS_BAD)} |", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        logging.getLogger("mpidp").setLevel(logging.CRITICAL)
        for name in options.kind or (TREES if options.odd else KINDS):
            counts, examples = fuzz(name, Path(folder), options)
            print(f"| {name} | {' | '.join(f'{counts[what]:,}' for what in (SAME, REFUSED, OTHER, *ALWAYS_BAD))} |", flush=True)
            wrong = [*ALWAYS_BAD, *([OTHER] if KINDS[name].checksummed and not options.odd else [])]
            bad += sum(counts[what] for what in wrong)
            for what in wrong:
                different = dict.fromkeys(words.partition(": ")[2] for words in examples.get(what, []))
                for words in list(different)[: options.show]:
                    first = next(one for one in examples[what] if one.endswith(words))
                    print(f"    {what}, {first}", file=sys.stderr, flush=True)
    sys.exit(bad > 0)


if __name__ == "__main__":
    main()
