"""Loads tasks of EleutherAI's evaluation harness (lm-eval). The tasks are the harness's own, or come from a folder of task
files. These functions run on one rank."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mpidp.errors import DataError, UsageError

FEW_SHOT_SEED = 1234  # the harness's own default
OFFLINE = (
    "lm-eval's own tasks fetch their data from the Hugging Face Hub. Without a network, either load the tasks once on a "
    "machine with a network and copy the cache of that machine (HF_HOME), or write a task file with `dataset_path: json` and "
    "`dataset_kwargs: {data_files: FILE.jsonl}`, and give the folder of this file (--tasks-dir DIR, train.eval_tasks_dir=DIR; "
    "docs/use.md has an example)"
)


@dataclass(frozen=True)
class TaskOptions:
    """The options of an evaluation on tasks. names: names of tasks, of groups of tasks, or of tags, which the harness or the
    task files in `folder` define. folder: "" if there are no task files."""

    names: Sequence[str]
    folder: str = ""
    few_shot: int | None = None  # number of examples before each question; None: as the task file states
    limit: int = 0  # maximum number of items per task; 0: all items
    chat: bool = False  # whether prompts are chats, in the model's chat template
    system: str | None = None  # the system message of these chats
    code: bool = False  # whether the task files in `folder` may call Python functions


def harness() -> Any:
    """Import the harness and return its module lm_eval. Raises UsageError if it is not installed. Independent."""
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # a process that uses MPI must not fork
    try:
        import datasets
        import lm_eval.api.model
        import lm_eval.api.task
        import lm_eval.evaluator
        import lm_eval.tasks
        import lm_eval.utils
        import tqdm
    except ImportError as error:
        raise UsageError(f"evaluation tasks need lm-eval, which cannot be imported ({error}): pip install 'mpidp[evaluation]'"
                         ) from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if not sys.stderr.isatty():  # progress bars are for terminals
        datasets.disable_progress_bars()
        lm_eval.api.task.tqdm = partial(tqdm.tqdm, disable=True)
    return lm_eval


def load_tasks(options: TaskOptions) -> dict[str, Any]:
    """Load the tasks and their data. Return {"tasks": {name: task}, "groups": {name: group}, ...}, as the harness's
    TaskManager.load() does.

    Raises UsageError if a name is unknown, and DataError if a task or its data cannot be read. Independent.
    """
    library = harness()
    found: dict[str, Any] | None = None
    if options.folder:
        _check_folder(Path(options.folder), options.code)
        with suppress(KeyError):  # KeyError: a name, or a member of a group, is one of the harness's own tasks
            found = _load(library, options, own_alone=True)
    if found is None:
        try:
            found = _load(library, options, own_alone=False)
        except KeyError as error:
            where = f"the task files of {options.folder}" if options.folder else "local task files (--tasks-dir is not given)"
            raise UsageError(f"task {''.join(error.args)} is neither in {where} nor a task of lm-eval") from None
    for name, task in found["tasks"].items():
        if options.few_shot is not None and task.get_config("num_fewshot") != 0:  # 0 in a task file cannot be overridden
            task.set_config(key="num_fewshot", value=options.few_shot)
        elif task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=FEW_SHOT_SEED)
        if getattr(task, "UNSAFE_CODE", False):
            raise UsageError(f"task {name} runs code that the model writes. Such tasks are not supported")
    return found


def _load(library: Any, options: TaskOptions, own_alone: bool) -> dict[str, Any]:
    try:
        manager = library.tasks.TaskManager(include_path=options.folder or None, include_defaults=not own_alone)
        missing = [name for name in options.names if name not in manager.task_index]
        if missing:
            raise KeyError(f"{missing[0]!r}")
        found: dict[str, Any] = manager.load(list(options.names))
        return found
    except KeyError:
        raise
    except Exception as error:
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise DataError(f"tasks {','.join(options.names)} cannot be loaded ({why}). {OFFLINE}") from None


def _check_folder(folder: Path, code: bool) -> None:
    """Check the task files of a folder and the files that they include. code: whether the files may name Python functions.
    Raises UsageError if there is no task file, or if a file names a Python function that `code` does not allow. Raises DataError
    if a file cannot be read or is not YAML."""
    import yaml

    waiting, seen = sorted(folder.rglob("*.yaml")), set[Path]()
    if not waiting:
        raise UsageError(f"--tasks-dir {folder}: it has no task file (*.yaml)")
    while waiting:
        file = Path(os.path.realpath(waiting.pop()))  # an included path is relative to the folder of the file behind a link
        if file in seen:
            continue
        seen.add(file)
        try:
            nodes = _nodes(yaml.compose(file.read_bytes(), yaml.SafeLoader))
        except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
            raise DataError(f"{file} is not a readable YAML file: {' '.join(str(error).split())}") from None
        functions = [node for node in nodes if not node.tag.startswith("tag:yaml.org,2002:") or "python" in node.tag]
        if functions and not code:
            name = functions[0].value if isinstance(functions[0].value, str) else functions[0].tag
            raise UsageError(f"{file} names Python code ({name}), which runs only with --allow-code. Read the code, then "
                             "add this option")
        pairs = [pair for node in nodes if isinstance(node, yaml.MappingNode) for pair in node.value]
        included = [one.value for key, value in pairs if key.value == "include" for one in _nodes(value)]
        waiting += [file.parent / name for name in included if isinstance(name, str) and os.path.isfile(file.parent / name)]


def _nodes(root: Any) -> list[Any]:
    """Return the node `root` of a YAML document and all nodes below it, each once. An alias is the node that it names. root: a
    node, or None for an empty document."""
    waiting, found = [] if root is None else [root], dict[int, Any]()
    while waiting:
        node = waiting.pop()
        if id(node) not in found:
            found[id(node)] = node
            below = node.value if isinstance(node.value, list) else []  # the nodes of a list, or pairs of nodes
            waiting += [one for entry in below for one in (entry if isinstance(entry, tuple) else (entry,))]
    return list(found.values())
