"""Laws of the source tree: which file may import which, the length of files, what may start MPI, and that every collective call
is documented as one."""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = {str(p.relative_to(ROOT)): p for folder in ("mpidp", "data_tools") for p in sorted((ROOT / folder).rglob("*.py"))}
MPIDP = sorted(name for name in FILES if name.startswith("mpidp/"))

# Which packages a package may import. One row per package; the commands at the top of mpidp/ may import any of them.
EVERY = "errors runtime"
CONTRACT = {
    "errors": "",
    "runtime": "errors",
    "model": "errors",
    "storage": EVERY,
    "data": f"{EVERY} storage",
    "comm": EVERY,
    "config": f"{EVERY} data model storage",
    "metrics": f"{EVERY} storage",
    "checkpoint": f"{EVERY} config model storage",
    "reducers": f"{EVERY} checkpoint comm data",
    "parallel": f"{EVERY} checkpoint comm data model reducers",
    "strategies": f"{EVERY} checkpoint comm config parallel reducers",
    "faults": f"{EVERY} comm parallel reducers",
    "hf": f"{EVERY} checkpoint data model",
    "inference": f"{EVERY} checkpoint comm data hf model parallel",
    "training": f"{EVERY} checkpoint comm config data faults hf inference metrics model parallel reducers strategies storage",
    "plan": f"{EVERY} checkpoint comm config data doctor hf metrics model parallel reducers strategies training",
    "report": f"{EVERY} config metrics",
    "doctor": f"{EVERY} comm config",
    "c10d": f"{EVERY} comm",
    "data_tools": f"{EVERY} data faults storage",
}
COMMANDS = {"__main__", "train", "evaluate", "generate", "chat", "export", "replay", "library"}
AT_THE_TOP = COMMANDS | {"__init__", "errors"}  # at most 12 files: a command or the public API

# Packages and modules without MPI, and without torch and MPI. `python -m mpidp.train --help` works on a login node.
NO_MPI = {"mpidp.model", "mpidp.data", "mpidp.storage", "mpidp.config", "mpidp.report", "mpidp.metrics", "mpidp.hf"}
NO_TORCH = {
    "mpidp.errors", "mpidp.runtime.environment", "mpidp.runtime.command", "mpidp.runtime.files", "mpidp.runtime.log",
    "mpidp.runtime.options", "mpidp.report",
    "mpidp.config.settings", "mpidp.config.schema", "mpidp.config.rules", "mpidp.config.defaults", "mpidp.config.command_line",
    "mpidp.data.lanes", "mpidp.data.permutation", "mpidp.data.sampler", "mpidp.reducers.tree_order", "mpidp.parallel.schedule",
    "mpidp.model.shape", "mpidp.model.part", "mpidp.model.loss_chunks", "mpidp.model.adapter_sizes",
    "mpidp.faults.inject", "mpidp.faults.heartbeat", "mpidp.faults.watchdog",
    "mpidp.faults.stop", "mpidp.faults.restarts", "mpidp.metrics.clock", "mpidp.metrics.jsonl", "mpidp.metrics.progress",
    "mpidp.metrics.energy", "mpidp.metrics.gradient_noise", "mpidp.strategies.quorum_rounds", "mpidp.strategies.arrivals",
    "mpidp.strategies.averaging_groups", "mpidp.plan.mesh", "mpidp.plan.ranks", "mpidp.training.balance",
    "mpidp.hf.names", "mpidp.hf.tokens", "mpidp.plan.__main__",
}


@cache
def tree_of(name: str) -> ast.Module:
    return ast.parse(FILES[name].read_text())


def each_of(names: Iterable[str]) -> Callable[[Callable[[str], None]], Callable[[], None]]:
    """A decorator that makes one test of a test of one file. The test reports every file that fails. With one test per file,
    pytest itself would take most of the time."""

    def decorated(test: Callable[[str], None]) -> Callable[[], None]:
        def whole() -> None:
            wrong = []
            for name in names:
                try:
                    test(name)
                except AssertionError as error:
                    wrong.append(f"{name}: {error}")
            assert not wrong, "\n".join(wrong)

        whole.__name__, whole.__doc__ = test.__name__, test.__doc__
        return whole

    return decorated


def module_of(name: str) -> str:
    return name.removesuffix(".py").replace("/", ".").removesuffix(".__init__")


MODULES = {module_of(name) for name in FILES}


def for_types(tree: ast.Module) -> set[ast.AST]:
    """Return the lines under `if TYPE_CHECKING`, which are never executed."""
    guards = [n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test)]
    return {inner for guard in guards for inner in ast.walk(guard)}


@cache
def imports(name: str) -> list[tuple[str, bool]]:
    """Return (imported module or module.name, at the top of the file?) for all executed imports of a file."""
    tree = tree_of(name)
    unseen, top, found = for_types(tree), set(tree.body), []
    for node in ast.walk(tree):
        if node in unseen:
            continue
        if isinstance(node, ast.Import):
            found += [(alias.name, node in top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{name}: relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.append((full if full in MODULES or node.module == "mpidp" else node.module, node in top))
    return found


def libraries(name: str, top_alone: bool = False) -> set[str]:
    return {what.split(".")[0] for what, top in imports(name) if top or not top_alone}


def package_of(module: str) -> str:
    """The row of CONTRACT that a module belongs to."""
    parts = module.split(".")
    return parts[0] if parts[0] == "data_tools" or len(parts) == 1 else parts[1]


def in_project(name: str) -> Iterator[tuple[str, bool]]:
    """(module of this project that a file imports, at the top of the file?)."""
    for what, top in imports(name):
        if what.split(".")[0] in ("mpidp", "data_tools") and not what.startswith("mpidp.__"):
            yield (what if what in MODULES else what.rpartition(".")[0]), top


@each_of(sorted(FILES))
def test_packages_keep_their_contract(name: str) -> None:
    own = package_of(module_of(name))
    if own in COMMANDS or module_of(name) == "mpidp":
        return
    for module, _ in in_project(name):
        if module != "mpidp":
            assert package_of(module) in {own, *CONTRACT[own].split()}, f"{name} imports {module}: see CONTRACT"


def test_no_circle_of_imports() -> None:
    """Neither between packages nor between files, for imports at any place."""
    for unit in (lambda module: module, package_of):
        below: dict[str, set[str]] = {}
        for name in FILES:
            mine = unit(module_of(name))
            theirs = {unit(module) for module, _ in in_project(name)} - {mine, "mpidp"}
            below.setdefault(mine, set()).update(theirs)
        below.pop("mpidp", None)
        while ground := [name for name, theirs in below.items() if not theirs & below.keys()]:
            for name in ground:
                del below[name]
        assert not below, f"a circle among {sorted(below)}"


def test_the_top_of_the_package_is_commands_and_the_public_api() -> None:
    top = {module_of(name).removeprefix("mpidp.") for name in MPIDP if name.count("/") == 1}
    assert top <= AT_THE_TOP | {"mpidp"} and len(top) <= 12


@each_of(sorted(FILES))
def test_nobody_imports_commands(name: str) -> None:
    if name == "mpidp/__main__.py":
        return
    assert not {package_of(module) for module, _ in in_project(name) if module.startswith("mpidp.")} & COMMANDS
    assert not [module for module, _ in in_project(name) if module.endswith(".__main__")]
    tools = {(module, top) for module, top in in_project(name) if module.startswith("data_tools")}
    if name == "mpidp/train.py":  # the default corpus is prepared when it is first needed
        assert tools == {("data_tools.prepare", False)}
    elif name.startswith("mpidp/"):
        assert not tools


@each_of(MPIDP)
def test_libraries_stay_where_they_belong(name: str) -> None:
    used, module = libraries(name), module_of(name)
    within = {module, module.rpartition(".")[0], ".".join(module.split(".")[:2])}
    if within & NO_MPI:
        assert "mpi4py" not in used
    if within & NO_TORCH:
        assert not used & {"torch", "mpi4py"}
    assert "h5py" not in used or module in ("mpidp.data.shards", "mpidp.data.shard_writer", "mpidp.runtime.agreement")
    assert "safetensors" not in used or module.startswith(("mpidp.checkpoint.", "mpidp.hf."))


def test_only_environment_changes_the_environment_at_import() -> None:
    for name in MPIDP:
        tree = tree_of(name)
        at_import = [node for top in tree.body if not isinstance(top, (ast.FunctionDef, ast.ClassDef)) for node in ast.walk(top)]
        calls = [ast.unparse(node) for node in at_import if isinstance(node, (ast.Call, ast.Assign, ast.Delete))]
        changes = [call for call in calls if re.search(r"os\.(environ(\[.*\] = |\.setdefault|\.update|\.pop)|putenv)", call)]
        assert not changes or name == "mpidp/runtime/environment.py", name


PARTS = {"engine", "reducer", "strategy", "saver", "watchdog", "timeline", "observers", "audit", "faults"}  # of a job


@each_of(MPIDP)
def test_no_part_of_a_job_is_changed_from_outside(name: str) -> None:
    """A part gets what it needs from its constructor: nobody assigns its attributes, or replaces its methods, afterwards."""
    for node in ast.walk(tree_of(name)):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AugAssign) else []
        for target in (inner for outer in targets for inner in ast.walk(outer) if isinstance(inner, ast.Attribute)):
            owner = target.value
            held = owner.attr if isinstance(owner, ast.Attribute) else owner.id if isinstance(owner, ast.Name) else ""
            assert held.lstrip("_") not in PARTS or not isinstance(target.ctx, ast.Store), f"{name}:{node.lineno}"


@each_of(sorted(FILES))
def test_nobody_assigns_attributes_of_imported_objects(name: str) -> None:
    tree = tree_of(name)
    froms = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and (n.module or "").startswith(("mpidp", "data_"))]
    imported = {alias.asname or alias.name for node in froms for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and isinstance(node.value, ast.Name):
            assert node.value.id not in imported, f"{name}:{node.lineno}"


def test_one_class_name_has_one_meaning() -> None:
    places: dict[str, list[str]] = {}
    for name in FILES:
        for node in tree_of(name).body:
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(name)
    assert not {name: where for name, where in places.items() if len(where) > 1}


def test_tools_leave_torch_and_mpi_alone_until_they_run() -> None:
    for name in FILES:
        if name.startswith("data_tools/"):
            assert not libraries(name, top_alone=True) & {"mpi4py", "torch", "h5py", "tokenizers", "pyarrow", "zstandard"}, name


QUIET = [
    "mpidp", "mpidp.config.schema", "mpidp.runtime.command", "mpidp.train", "mpidp.evaluate", "mpidp.generate", "mpidp.chat",
    "mpidp.export", "mpidp.errors", "mpidp.data.lanes", "mpidp.reducers.tree_order", "mpidp.parallel.schedule",
    "mpidp.training.balance", "mpidp.faults.inject", "mpidp.plan.__main__", "mpidp.replay", "mpidp.doctor.__main__",
    "mpidp.report.__main__", "mpidp.__main__", "data_tools.prepare",
]


def test_importing_the_entry_points_starts_neither_mpi_nor_torch() -> None:
    """--help works on a login node, and a wrong option is reported before MPI starts."""
    code = (
        "import importlib, sys\n"
        f"for name in {QUIET}:\n"
        "    importlib.import_module(name)\n"
        "    found = {'torch', 'mpi4py', 'h5py'} & set(sys.modules)\n"
        "    found -= {'h5py'} if name.startswith('data_tools') else set()\n"
        "    assert not found, (name, found)\n"
    )
    child = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr


@each_of(sorted(FILES))
def test_a_file_can_be_read_in_one_sitting(name: str) -> None:
    assert len(FILES[name].read_text().splitlines()) <= 310


def lines_of_code(name: str) -> int:
    """Count lines of code, without comments and docstrings (docs/decisions.md)."""
    text = FILES[name].read_text()
    words = {
        line
        for node in ast.walk(tree_of(name))
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None
        for line in range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1)
    }
    blank = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    tokens = [t for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.type not in blank]
    return len({line for t in tokens for line in range(t.start[0], t.end[0] + 1)} - words)


def test_what_training_runs_is_small() -> None:
    """Count everything that mpidp.train imports, at once or later. Commands that read finished runs have only a limit per file.
    """
    seen, rest = set(), ["mpidp.train"]
    names = {module_of(name): name for name in MPIDP}
    while rest:
        if (module := rest.pop()) in names and module not in seen:
            seen.add(module)
            rest += [part for what, _ in imports(names[module]) for part in (what, what.rpartition(".")[0])]
            assert not any(what.startswith(("mpidp.c10d", "torch.distributed")) for what, _ in imports(names[module])), module
    assert sum(lines_of_code(names[module]) for module in seen) < 19500
    assert sum(map(lines_of_code, MPIDP)) < 26900


COLLECTIVES = {
    "allgather", "allreduce", "bcast", "gather", "scatter", "barrier", "Allgather", "Allgatherv", "Allreduce", "Alltoall",
    "Alltoallv", "Barrier", "Bcast", "Gather", "Iallgather", "Iallgatherv", "Iallreduce", "Ialltoallv", "Ibarrier", "Split",
    "Split_type", "Dup", "Allocate_shared", "fence",
}


def takes_a_communicator(function: ast.FunctionDef) -> bool:
    arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    return any(
        a.arg in ("comm", "world") or (a.annotation is not None and "Intracomm" in ast.unparse(a.annotation)) for a in arguments
    )


def communicates(function: ast.FunctionDef) -> bool:
    """Does the function call a collective of a communicator directly?"""
    calls = [n.func for n in ast.walk(function) if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)]
    whose = re.compile("comm|world|node$|dp$|rail$|group$|MPI.Win$")
    return any(call.attr in COLLECTIVES and whose.search(ast.unparse(call.value)) for call in calls)


def public_functions(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef, str]]:
    """Return (name, function, docstrings of it, of its class and of what it overrides in this file) for public functions and
    methods."""
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}

    def said(function: ast.FunctionDef, owner: ast.ClassDef | None) -> str:
        words = ast.get_docstring(function) or ""
        while owner is not None:
            words += " " + (ast.get_docstring(owner) or "")
            owner = next((classes[b.id] for b in owner.bases if isinstance(b, ast.Name) and b.id in classes), None)
            for node in owner.body if owner is not None else []:
                if isinstance(node, ast.FunctionDef) and node.name == function.name:
                    words += " " + (ast.get_docstring(node) or "")
        return " ".join(words.split())

    for node in tree.body:
        owner = node if isinstance(node, ast.ClassDef) else None
        for function in owner.body if owner is not None else [node]:
            if isinstance(function, ast.FunctionDef) and not function.name.startswith("_"):
                yield function.name, function, said(function, owner)


@each_of(sorted(FILES))
def test_what_takes_a_communicator_says_whether_it_communicates(name: str) -> None:
    for what, function, said in public_functions(tree_of(name)):
        if takes_a_communicator(function):
            assert "Collective" in said or "Independent" in said, f"{name}: {what}"
        if communicates(function):
            assert "Collective" in said, f"{name}: {what}"


MISSPELT = """
import pytest

@pytest.mark.mpi({argument})
def test_nothing():
    pass
"""


@pytest.mark.check
@pytest.mark.parametrize(("argument", "code"), [("min_size=1", 0), ("min_sizes=2", 4)])
def test_misspelt_markers_are_refused(tmp_path: Path, argument: str, code: int) -> None:
    (tmp_path / "test_it.py").write_text(MISSPELT.format(argument=argument))
    (tmp_path / "conftest.py").write_text((ROOT / "tests/conftest.py").read_text())
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), str(tmp_path)]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert child.returncode == code, child.stdout + child.stderr
    assert code == 0 or "takes min_size= alone" in child.stdout + child.stderr
