"""Laws of the source tree: which file may import which, the length of files, what may start MPI, and that every collective call
is documented as one."""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = {str(p.relative_to(ROOT)): p for folder in ("mpidp", "data_tools") for p in sorted((ROOT / folder).rglob("*.py"))}
MPIDP = sorted(name for name in FILES if name.startswith("mpidp/"))

# A file may import only from layers below its own. A new file needs an entry here.
LAYERS = [
    "__init__ errors files lanes schedule state stopping balance noise planning.table comm.__init__ model.__init__ "
    "checkup.__init__ checkup.findings hf.__init__ planning.__init__ inference.__init__ methods strategies.groups "
    "comm.background energy reporting.__init__ reporting.page reporting.charts "
    "board comm.codes comm.tree comm.buffers comm.buckets comm.probe comm.tickets comm.waiting model.shape "
    "model.cache model.rowwise inference.speech",
    "settings scalars model.part model.lora model.frozen boxes "
    "hf.names comm.transport c10d.sums c10d.hosted c10d.profiled c10d.monitored c10d.waiting",
    "held planning.mesh_memory model.transformer model.own c10d.neighbours "
    "arrivals config entry watchdog optim inject planning.predict tries data.sampler data.tokenizer data.index checkup.facts "
    "comm.exchange strategies.roll hf.folder inference.rows inference.sampling",
    "model.lstm data.dataset holding hf.tokens "
    "c10d.calls c10d.works comm.faults comm.powersgd comm.sparse checkup.launch checkup.hardware "
    "checkup.memory checkup.sessions",
    "model.kinds data.__init__ inference.choices hf.write c10d.turns arguments metrics comm.mesh comm.respawn data.shards",
    "model.starting c10d.base checkpoint planning.measured comm.grid comm.group comm.nccl data.loader checkup.network "
    "checkup.storage "
    "planning.mesh_table planning.mesh_time timeline reporting.read",
    "reporting.waterfall reporting.costs "
    "planning.mesh audit comm.ring comm.stages parts c10d.moves c10d.reductions resolve rundir saving comm.reducers comm.peers",
    "reporting.about planning.mesh_ask c10d.group comm.parallel_layers saver comm.compressed comm.owners comm.overlap "
    "strategies.protocol",
    "reporting.sections c10d.meeting engine inference.loading sharing strategies.synchronous planning.sums",
    "origin inference.decode reporting.compare",
    "inference.scoring planned c10d.__init__ strategies.delayed strategies.local strategies.quorum strategies.server "
    "strategies.sliced "
    "planning.methods",
    "strategies.sharded reporting.pictures",
    "job strategies.__init__",
    "build step library",
    "telling",
    "fit recover",
    "course rerun trials",
    "train evaluate generate export plan replay doctor report",
]
LAYER = {f"mpidp.{name}".removesuffix(".__init__"): i for i, names in enumerate(LAYERS) for name in names.split()}
LATE = {("mpidp.entry", "mpidp.comm.mesh")}  # inside a function: it starts MPI after the command line is read
C10D = {"mpidp.strategies.sharded"}  # the only part of training that uses torch.distributed, inside a function, on demand
ENTRIES = {f"mpidp.{name}" for name in LAYERS[-1].split()}

# External libraries by file; all other files use only the standard library. `rich` and others are imported late, where needed.
MPI4PY = {
    "comm.buffers", "comm.exchange", "comm.faults", "comm.group", "comm.mesh", "comm.overlap", "comm.owners", "comm.probe",
    "comm.reducers", "comm.nccl", "comm.tickets", "comm.transport", "comm.waiting", "comm.background", "comm.peers",
    "comm.respawn", "comm.grid", "comm.parallel_layers", "comm.ring", "comm.stages", "planned",
    "strategies.delayed", "strategies.local", "strategies.quorum", "strategies.server",
    "strategies.protocol", "strategies.synchronous", "strategies.sliced", "strategies.sharded",
    "audit", "build", "checkpoint", "engine", "job", "library", "inference.loading", "origin", "resolve", "sharing",
    "doctor", "rundir", "inference.scoring", "saver", "step", "trials",
    "c10d.base", "c10d.calls", "c10d.group", "c10d.turns", "c10d.meeting", "c10d.monitored", "c10d.sums", "c10d.waiting",
    "c10d.works",
}
TORCH = MPI4PY - {
    "comm.background", "comm.faults", "comm.mesh", "comm.respawn", "comm.tickets", "comm.waiting", "doctor", "job", "rundir",
    "origin", "saver", "step", "trials", "c10d.group", "c10d.monitored", "c10d.waiting",
} | {
    "boxes", "parts", "held", "holding", "c10d.hosted", "c10d.moves", "c10d.neighbours", "c10d.profiled", "c10d.reductions",
    "comm.buckets", "comm.codes", "comm.compressed", "comm.powersgd", "comm.sparse",
    "data.dataset", "data.loader", "inference.decode", "scalars", "timeline", "fit", "hf.folder", "hf.write", "model.cache",
    "model.rowwise", "model.transformer", "model.lstm", "model.own", "optim", "inference.sampling", "saving", "state",
    "model.lora",
    "model.frozen", "model.starting",
}
H5PY = {"data.shards", "resolve"}  # resolve reads its version
SEES_CONFIG = {
    "arguments", "train", "course", "build", "origin", "planned", "resolve", "rundir", "sharing", "planning.methods",
    "planning.sums",
    "trials", "library",
}


def module_of(name: str) -> str:
    return name.removesuffix(".py").replace("/", ".").removesuffix(".__init__")


def for_types(tree: ast.Module) -> set[ast.AST]:
    """Return the lines under `if TYPE_CHECKING`, which are never executed."""
    guards = [n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test)]
    return {inner for guard in guards for inner in ast.walk(guard)}


def imports(name: str) -> Iterator[tuple[str, bool]]:
    """Return (imported module or module.name, at the top of the file?) for all executed imports of a file."""
    tree = ast.parse(FILES[name].read_text())
    unseen, top = for_types(tree), set(tree.body)
    for node in ast.walk(tree):
        if node in unseen:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, node in top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{name}: relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield (full if full in LAYER or node.module == "mpidp" else node.module), node in top


def libraries(name: str, top_alone: bool = False) -> set[str]:
    return {what.split(".")[0] for what, top in imports(name) if top or not top_alone}


def test_every_file_has_a_layer() -> None:
    assert {module_of(name) for name in MPIDP} == set(LAYER)


@pytest.mark.parametrize("name", MPIDP)
def test_imports_lead_downwards(name: str) -> None:
    mine = module_of(name)
    for what, top in imports(name):
        if what.split(".")[0] == "mpidp" and not what.startswith("mpidp.__"):
            module = what if what in LAYER else what.rpartition(".")[0]
            if not top and (mine, module) in LATE:
                continue
            assert LAYER[module] < LAYER[mine], f"{mine} (layer {LAYER[mine]}) imports {module} (layer {LAYER[module]})"


@pytest.mark.parametrize("name", sorted(FILES))
def test_nobody_imports_entry_points(name: str) -> None:
    assert not {what for what, _ in imports(name)} & ENTRIES
    tools = {what for what, top in imports(name) if what.startswith("data_tools")}
    if name == "mpidp/build.py":  # the default corpus is prepared only when it is needed
        assert {(what, top) for what, top in imports(name) if what.startswith("data_tools")} == {("data_tools.prepare", False)}
    elif name.startswith("mpidp/"):
        assert not tools


@pytest.mark.parametrize(("library", "users"), [("mpi4py", MPI4PY), ("torch", TORCH), ("h5py", H5PY), ("numpy", None),
                                                ("safetensors", {"checkpoint", "hf.folder", "hf.write"})])
def test_libraries_stay_where_they_belong(library: str, users: set[str] | None) -> None:
    found = {module_of(name).removeprefix("mpidp.") for name in MPIDP if library in libraries(name)}
    if users is not None:
        assert found == users
    pure = {
        "settings", "lanes", "schedule", "config",
        "errors", "files", "stopping", "comm.tree", "model.transformer", "model", "balance",
        "noise", "strategies.roll", "hf.names", "hf.tokens", "model.shape", "model.part", "model.lora", "model.frozen",
        "model.starting",
        "arrivals", "methods", "strategies.groups", "inject", "metrics", "plan", "planning.predict", "arguments",
        "planning.measured",
        "planning.table", "board", "watchdog", "tries", "planning.mesh_memory", "planning.mesh_time", "planning.mesh_table",
        "planning.mesh_ask", "planning.mesh",
        "energy", "report", *(name for name in {module_of(name).removeprefix("mpidp.") for name in MPIDP} if "reporting" in name),
    }
    assert library == "torch" or not found & pure
    assert not found & (pure - {"model.transformer", "model.lora", "model.frozen", "model.starting"})


def test_the_data_layer_and_the_model_know_nothing_of_mpi() -> None:
    for name in MPIDP:
        if name.startswith(("mpidp/data/", "mpidp/model/")):
            assert "mpi4py" not in libraries(name) and not any(what.startswith("mpidp.comm") for what, _ in imports(name)), name


def test_tools_leave_torch_and_mpi_alone_until_they_run() -> None:
    for name in FILES:
        if name.startswith("data_tools/"):
            assert not libraries(name, top_alone=True) & {"mpi4py", "torch", "h5py", "tokenizers", "pyarrow", "zstandard"}, name


def test_only_entry_side_files_see_the_config() -> None:
    def sees(name: str) -> bool:
        return any(isinstance(node, ast.Name) and node.id == "Config" for node in ast.walk(ast.parse(FILES[name].read_text())))

    assert {module_of(name).removeprefix("mpidp.") for name in MPIDP if sees(name)} == SEES_CONFIG | {"config"}


QUIET = ["mpidp", "mpidp.config", "mpidp.entry", "mpidp.train", "mpidp.evaluate", "mpidp.generate", "mpidp.export",
         "mpidp.errors", "mpidp.lanes", "mpidp.comm.tree", "mpidp.schedule", "mpidp.balance", "mpidp.inject", "mpidp.plan",
         "mpidp.doctor", "mpidp.report", "data_tools.prepare"]


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


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_file_can_be_read_in_one_sitting(name: str) -> None:
    assert len(FILES[name].read_text().splitlines()) <= 310


def lines_of_code(name: str) -> int:
    """Count lines of code, without comments and docstrings (docs/decisions.md)."""
    text = FILES[name].read_text()
    words = {
        line
        for node in ast.walk(ast.parse(text))
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
        if (module := rest.pop()) in names and module not in seen and not module.startswith("mpidp.c10d"):
            seen.add(module)
            rest += [part for what, _ in imports(names[module]) for part in (what, what.rpartition(".")[0])]
            if module not in C10D:
                assert not any(what.startswith(("mpidp.c10d", "torch.distributed")) for what, _ in imports(names[module])), module
    for module in C10D:
        uses = {what: top for what, top in imports(names[module]) if what.startswith(("mpidp.c10d", "torch.distributed"))}
        assert uses and not any(uses.values()), "late, inside a function"
    assert sum(lines_of_code(names[module]) for module in seen) < 11000
    assert sum(map(lines_of_code, MPIDP)) < 17500


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


@pytest.mark.parametrize("name", sorted(FILES))
def test_what_takes_a_communicator_says_whether_it_communicates(name: str) -> None:
    for what, function, said in public_functions(ast.parse(FILES[name].read_text())):
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


@pytest.mark.parametrize(("argument", "code"), [("min_size=1", 0), ("min_sizes=2", 4)])
def test_misspelt_markers_are_refused(tmp_path: Path, argument: str, code: int) -> None:
    (tmp_path / "test_it.py").write_text(MISSPELT.format(argument=argument))
    (tmp_path / "conftest.py").write_text((ROOT / "tests/conftest.py").read_text())
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), str(tmp_path)]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert child.returncode == code, child.stdout + child.stderr
    assert code == 0 or "takes min_size= alone" in child.stdout + child.stderr
