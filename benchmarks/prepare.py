"""Compares the CPU time of `mpidp prepare` with other programs that tokenize the same text with the same tokenizer.

    python benchmarks/prepare.py                                  # 23 MB of Python sources, a vocabulary of 1,024
    python benchmarks/prepare.py --text FILE --vocab 8192 --repeats 5

- prepare: the whole command, with reading .jsonl, encoding, counting bytes, checksums and HDF5 shards;
- prepare without tiktoken: the same with the `tokenizers` library alone, which must write the same shards;
- library: the `tokenizers` library alone, in memory, with encode_batch of lists of 64 documents;
- map: datasets.map with the same library, batches of 1,000, if `datasets` is installed;
- datatrove: its JsonlReader and DocumentTokenizer, one task, without shuffling, if it is installed.

Every figure is a median of the processor seconds (user and system) of a whole process. Its ratio to `library` is shown after it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

from mpidp.data.index import read_index
from mpidp.data.tokenizer import train_bpe

LIBRARY = """
import json, sys
from tokenizers import Tokenizer
tokenizer = Tokenizer.from_file(sys.argv[2])
texts = [json.loads(line)["text"] for line in open(sys.argv[1], encoding="utf-8")]
for start in range(0, len(texts), 64):
    ids = [encoding.ids for encoding in tokenizer.encode_batch(texts[start:start + 64])]
"""
MAP = """
import sys, tempfile
from datasets import load_dataset
from tokenizers import Tokenizer
tokenizer = Tokenizer.from_file(sys.argv[2])
def encode(batch):
    return {"input_ids": [encoding.ids for encoding in tokenizer.encode_batch(batch["text"])]}
with tempfile.TemporaryDirectory() as cache:
    rows = load_dataset("json", data_files=sys.argv[1], split="train", cache_dir=cache)
    rows.map(encode, batched=True, remove_columns=["text"])
"""
DATATROVE = """
import os, shutil, sys, tempfile
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer
with tempfile.TemporaryDirectory() as work:
    os.mkdir(work + "/in")
    shutil.copy(sys.argv[1], work + "/in/text.jsonl")
    LocalPipelineExecutor([
        JsonlReader(work + "/in"),
        DocumentTokenizer(work + "/out", sys.argv[2], local_working_dir=work, eos_token="<|endoftext|>", shuffle_documents=False),
    ], tasks=1, logging_dir=work + "/logs").run()
"""
WITHOUT = """
import runpy, sys
sys.modules["tiktoken"] = None
sys.argv[0] = "prepare"
runpy.run_module("data_tools.prepare", run_name="__main__")
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="a .jsonl file with the field text; default: Python files of this machine")
    parser.add_argument("--mb", type=float, default=23.0, help="size of the default text (%(default)s)")
    parser.add_argument("--vocab", type=int, default=1024, help="size of the vocabulary, trained on the first 300 documents")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        text = options.text or python_files(Path(folder) / "text.jsonl", options.mb)
        with open(text, encoding="utf-8") as lines:
            sample = [json.loads(line)["text"] for line, _ in zip(lines, range(300), strict=False)]
        tokenizer = Path(folder) / "tokenizer.json"
        tokenizer.write_text(train_bpe(iter(sample), options.vocab).to_json())
        outs = [Path(folder) / name for name in ("ours", "without")]
        shared = ["--source", str(text), "--tokenizer", str(tokenizer), "--out"]
        commands = {
            "prepare": ["-m", "data_tools.prepare", *shared, str(outs[0])],
            "prepare without tiktoken": ["-c", WITHOUT, *shared, str(outs[1])],
            "library": ["-c", LIBRARY, str(text), str(tokenizer)],
        }
        if find_spec("datasets") is not None:
            commands["map"] = ["-c", MAP, str(text), str(tokenizer)]
        if find_spec("datatrove") is not None:
            commands["datatrove"] = ["-c", DATATROVE, str(text), str(tokenizer)]
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
        for _ in range(options.repeats):
            for name, words in commands.items():
                found[name].append(cpu_and_wall_seconds([sys.executable, *words]))
        indexes = [read_index(out) for out in outs]
        if indexes[0].files != indexes[1].files:
            sys.exit("the shards differ")
        tokens = sum(split.tokens for split in indexes[0].splits.values())
        megabytes, vocabulary = text.stat().st_size / 1e6, indexes[0].vocab_size
        print(f"{megabytes:.1f} MB, {tokens:,} tokens, vocabulary {vocabulary:,}; the shards are equal")
        reference = statistics.median(cpu for cpu, _ in found["library"])
        for name, seconds in found.items():
            cpu, wall = (statistics.median(column) for column in zip(*seconds, strict=True))
            print(f"{name:<26} {cpu:6.2f} s CPU, ratio to library {cpu / reference:.2f}; {wall:6.2f} s elapsed")


def python_files(path: Path, mb: float) -> Path:
    """Write the Python files of the standard library and of installed packages as documents, up to `mb` MB in total."""
    size = 0
    with open(path, "w", encoding="utf-8") as out:
        for file in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
            text = file.read_text(encoding="utf-8", errors="replace")
            if size < mb * 1e6 and 200 < len(text) < 60_000:
                size += out.write(json.dumps({"text": text}) + "\n")
    return path


def cpu_and_wall_seconds(command: list[str]) -> tuple[float, float]:
    """Run a command. Return its processor time and its elapsed time."""
    before, began = os.times(), time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command[:3])} failed:\n{done.stderr[-2000:]}")
    after = os.times()
    spent = after.children_user - before.children_user + after.children_system - before.children_system
    return spent, time.perf_counter() - began


if __name__ == "__main__":
    main()
