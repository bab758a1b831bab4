"""Wrong commands, configurations and launches: exit code 2 and one message that says what is wrong, where, and how to fix it.

| fault | expected | checked |
|---|---|---|
| none: train, prepare, evaluate, generate under mpirun | 0 | mpirun's exit code, files, stdout |
| --help where mpi4py cannot be imported | 0, the settings | exit code, a key on stdout |
| unknown key, wrong value, two config files, none, malformed TOML, contradictions | 2 before MPI starts | code, key, one line |
| global_batch < micro_batch; more ranks than lanes | 2 | code of both mpiruns, what to change |
| run.dir below a file, in /proc; options of prepare, evaluate, generate | 2 | code, key, one line |
| changed seed, model, batch, data on resume | 2, each key named, the run unchanged | code, keys, the checkpoints' bytes |
| ranks that read different data | 2, what differs and where | code of both mpiruns |
| N processes that are N jobs of one rank | 2, the right command, no data prepared | code, output, no folder created |
| the same variables in a valid launch | 0 | code |
| --dry-run | 0, writes nothing | the folder's listing |
| the command of a finished run again | 0, reports this, changes nothing | bytes and times of checkpoints and metrics |
| run.resume=never | 0, the earlier run is moved aside | bytes of the moved files |
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.faults.commands import ROOT, Forks, Shell, end_record, expect, launchers


def listing(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Return (time, bytes) of every file under a folder, except those written by the tests' shells."""
    files = [p for p in folder.rglob("*") if p.is_file() and not p.name.startswith((".out_", ".err_"))]
    return {str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.read_bytes()) for p in files}


@pytest.mark.quick
def test_the_four_commands_work_under_mpirun(shell: Shell, whole_hash: str) -> None:
    (shell.folder / "text.txt").write_text("some text\n" * 50)
    prepared = shell.run("-m", "data_tools.prepare", "--source", "text.txt", "--out", "mine", ranks=2)
    expect(prepared, 0)
    assert "mine: 5 shards" in prepared.out
    trained = shell.train(ranks=2)
    expect(trained, 0)
    assert end_record(shell.folder / "run")["weights_sha256"] == whole_hash
    evaluated = shell.run("-m", "mpidp.evaluate", "run", "--json", ranks=2)
    expect(evaluated, 0)
    assert json.loads(evaluated.out)["tokens"] > 0
    generated = shell.run("-m", "mpidp.generate", "run", "--prompt", "def f", "--tokens", 3, ranks=2)
    expect(generated, 0)
    assert generated.out.startswith("def f")


@pytest.mark.quick
@pytest.mark.parametrize(
    ("module", "word"),
    [("mpidp.train", "train.global_batch"), ("mpidp.evaluate", "--data"), ("mpidp.generate", "--prompt"),
     ("data_tools.prepare", "--source"), ("data_tools.verify", "DIR")],
)
def test_help_without_mpi(shell: Shell, module: str, word: str) -> None:
    broken = shell.folder / "broken" / "mpi4py"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise ImportError('no MPI here')")
    ended = shell.run("-m", module, "--help", PYTHONPATH=f"{broken.parent}:{ROOT}")
    expect(ended, 0)
    assert word in ended.out


WRONG = {
    "unknown key": (["--model.num_layer=2"], ["'model.num_layer'", "did you mean 'model.num_layers'"]),
    "unknown section": (["--modle.num_layers=2"], ["did you mean 'model.num_layers'"]),
    "unknown word": (["--optim.name=adamv"], ["optim.name='adamv'", "did you mean 'adam"]),
    "not a number": (["--train.steps=ten"], ["train.steps='ten' must be an integer"]),
    "fraction": (["--train.steps=1.5"], ["train.steps='1.5' must be an integer"]),
    "too small": (["--train.global_batch=0"], ["train.global_batch=0 must be at least 1"]),
    "too large": (["--model.dropout=1.5"], ["model.dropout=1.5 must be from 0.0 to 0.99"]),
    "not finite": (["--optim.lr=nan"], ["optim.lr='nan' must be a number"]),
    "no value": (["--train.steps"], ["--train.steps has no value; write --train.steps=VALUE"]),
    "second file": (["tiny.toml"], ["a second configuration file 'tiny.toml'"]),
    "missing file": (["absent.toml"], ["a second configuration file 'absent.toml'"]),
    "batch below micro-batch": (["--train.micro_batch=8"], ["train.global_batch=4 is smaller than train.micro_batch=8"]),
    "heads": (["--model.num_heads=3"], ["the head size, model.model_dim=16 / model.num_heads=3, must be an even integer"]),
    "two lengths": (["--train.tokens=500"], ["set only one of train.steps, train.tokens and train.epochs"]),
    "lanes": (["--train.lanes=9"], ["train.lanes=9 is more than the 4 micro-batches"]),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_words(shell: Shell, name: str) -> None:
    words, phrases = WRONG[name]
    expect(shell.train(*words), 2, *phrases)
    assert not (shell.folder / "run").exists()


BAD_FILES = {
    "malformed": (b"[train\nsteps = 3", "cannot read this configuration file"),
    "not UTF-8": (b"[run]\ndir = '\xff'", "cannot read this configuration file"),
    "outside a section": (b"steps = 3", "'steps' is outside a section"),
    "unknown key": (b"[train]\nstep = 3", "unknown setting 'train.step'; did you mean 'train.steps'?"),
}
WRONG_KINDS = {
    "a table for a number": (b"[train.steps]\nx = 3", "train.steps="),
    "a list for a number": (b"[train]\nsteps = [3]", "train.steps="),
    "a list for a word": (b"[data]\npath = ['shards']", "data.path="),
    "a date for a word": (b"[data]\npath = 2024-01-01", "data.path="),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_configuration_files(shell: Shell, name: str) -> None:
    content, phrase = BAD_FILES[name]
    (shell.folder / "bad.toml").write_bytes(content)
    expect(shell.run("-m", "mpidp.train", "bad.toml", "--run.dir=run"), 2, "bad.toml", phrase)


@pytest.mark.parametrize("name", WRONG_KINDS)
def test_values_of_a_wrong_kind(shell: Shell, name: str) -> None:
    content, phrase = WRONG_KINDS[name]
    (shell.folder / "bad.toml").write_bytes(content)
    expect(shell.run("-m", "mpidp.train", "bad.toml", "--run.dir=run"), 2, "bad.toml", phrase)


@pytest.mark.parametrize("name", ["absent.toml", "shards"])
def test_configuration_files_that_cannot_be_opened(shell: Shell, name: str) -> None:
    expect(shell.run("-m", "mpidp.train", name), 2, f"{name}: cannot read this configuration file")


@pytest.mark.quick
def test_a_wrong_word_under_mpirun(either: Shell) -> None:
    expect(either.train("--model.num_layer=2", ranks=3), 2, "did you mean 'model.num_layers'")


def test_a_wrong_word_on_one_rank_alone(either: Shell) -> None:
    train = ["python", "-m", "mpidp.train", "tiny.toml"]
    started = either.start_command(["mpirun", "-n", "1", *train, ":", "-n", "1", *train, "--model.num_layer=2"])
    ended = started.wait()
    expect(ended, 2, "rank 1: ", "did you mean 'model.num_layers'")


@pytest.mark.parametrize("module", ["mpidp.evaluate", "mpidp.generate", "data_tools.prepare"])
def test_unknown_options(shell: Shell, module: str) -> None:
    expect(shell.run("-m", module, "run", "--no-such-option"), 2, "unrecognized arguments", "--no-such-option", "--help")


def test_an_unknown_option_is_said_once_under_mpirun(either: Shell) -> None:
    expect(either.run("-m", "mpidp.evaluate", ranks=2), 2, "the following arguments are required: RUN")


def test_more_ranks_than_lanes(either: Shell) -> None:
    expect(either.train("--train.micro_batch=4", ranks=2), 2, "2 ranks, but the global batch has 1 lanes", "Start at most 1")
    assert not (either.folder / "run").exists()


@pytest.mark.parametrize("run_dir", ["tiny.toml/run", "tiny.toml", "/proc/run"])
def test_a_run_dir_that_cannot_be_written_to(place: Path, forks: Forks, run_dir: str) -> None:
    ended = forks.run(place, "mpidp.train", "tiny.toml", f"--run.dir={run_dir}")
    expect(ended, 2, f"run.dir={run_dir} cannot be written to", "Choose another --run.dir=DIR")


CHANGED = {
    "train.seed": "train.seed was 1337 and is now 7",
    "model.num_layers": "model.num_layers was 1 and is now 7",
    "train.global_batch": "train.global_batch was 4 and is now 7",
    "optim.name": "optim.name was 'adamw' and is now 'sgd'",
}


@pytest.mark.parametrize("key", CHANGED)
def test_a_change_on_resume_that_would_be_another_run(place: Path, half_run: Path, forks: Forks, key: str) -> None:
    before = listing(half_run / "checkpoints")
    ended = forks.run(place, "mpidp.train", "tiny.toml", f"--{key}={'sgd' if key == 'optim.name' else 7}")
    expect(ended, 2, CHANGED[key], "--run.resume=never")
    assert listing(half_run / "checkpoints") == before


def test_other_data_on_resume(place: Path, half_run: Path, forks: Forks) -> None:
    (place / "other.txt").write_text("other text\n" * 300)
    expect(forks.run(place, "data_tools.prepare", "--source", "other.txt", "--out", "others"), 0)
    ended = forks.run(place, "mpidp.train", "tiny.toml", "--data.path=others")
    expect(ended, 2, "data.path=others is not the data that the run in run was trained on")


def test_changes_on_resume_that_are_legal(place: Path, half_run: Path, forks: Forks) -> None:
    ended = forks.run(place, "mpidp.train", "tiny.toml", "--train.steps=5", "--optim.lr=0.001", "--train.save_every=3")
    expect(ended, 0)
    assert "resuming from run/checkpoints/step_00000004" in ended.out
    assert end_record(half_run)["step"] == 5


def test_ranks_that_do_not_read_the_same_data(either: Shell) -> None:
    (either.folder / "other.txt").write_text("other text\n" * 300)
    expect(either.run("-m", "data_tools.prepare", "--source", "other.txt", "--out", "others", "--shards", 2), 0)
    train = ["python", "-m", "mpidp.train", "tiny.toml"]
    command = ["mpirun", "-n", "1", *train, ":", "-n", "1", *train, "--data.path=others"]
    expect(either.start_command(command).wait(), 2, "the ranks differ", "data.path: rank 0 has shards, rank 1 has others",
           "data index: rank 0 has ")
    assert not (either.folder / "run").exists()


SINGLETONS = {
    "Open MPI's mpirun": {"OMPI_COMM_WORLD_SIZE": "4"},
    "Hydra's mpirun": {"PMI_SIZE": "4"},
    "srun": {"SLURM_STEP_NUM_TASKS": "4", "SLURM_NTASKS": "4"},
}


@pytest.mark.parametrize("mpi", ["mpich", "openmpi"])
@pytest.mark.parametrize("name", SINGLETONS)
def test_singletons(tmp_path: Path, mpi: str, name: str) -> None:
    shell = Shell(tmp_path, mpi)
    if (name, mpi) in (("Open MPI's mpirun", "openmpi"), ("Hydra's mpirun", "mpich")):
        pytest.skip("the launcher's own library would not be alone")
    ended = shell.run("-m", "mpidp.train", **SINGLETONS[name])
    expect(ended, 2, "4 ranks were started, but each is alone", "mpirun -np 4 python -m mpidp.train", "srun --mpi=pmi")
    assert not (tmp_path / "shards").exists(), "data was prepared before the launch was checked"
    expect(shell.run("-m", "data_tools.prepare", **SINGLETONS[name]), 2, "4 ranks were started")
    assert not (tmp_path / "shards").exists()


def test_singletons_say_it_once(tmp_path: Path) -> None:
    shell = Shell(tmp_path, "mpich")
    ranks = [shell.start("-m", "mpidp.train", OMPI_COMM_WORLD_SIZE="3", OMPI_COMM_WORLD_RANK=str(rank)) for rank in range(3)]
    ended = [rank.wait() for rank in ranks]
    assert [e.code for e in ended] == [2, 2, 2], ended
    assert ["3 ranks were started" in e.err for e in ended] == [True, False, False], ended


@pytest.mark.parametrize("variables", [{"SLURM_NTASKS": "4"}, {"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "4"}], ids=str)
def test_one_rank_that_is_meant_to_be_alone(shell: Shell, variables: dict[str, str]) -> None:
    (shell.folder / "text.txt").write_text("some text\n" * 50)
    expect(shell.run("-m", "data_tools.prepare", "--source", "text.txt", "--out", "mine", **variables), 0)


@pytest.mark.parametrize("ranks", [1, 2])
def test_mpirun_inside_a_larger_slurm_step(either: Shell, ranks: int) -> None:
    (either.folder / "text.txt").write_text("some text\n" * 50)
    words = ("-m", "data_tools.prepare", "--source", "text.txt", "--out", "mine")
    ended = either.run(*words, ranks=ranks, SLURM_STEP_NUM_TASKS="4")
    expect(ended, 0)
    assert f"on {ranks} rank" in ended.out


SUMMARY = ("settings that differ from the defaults: ",
           "model: transformer, ", "memory: ", "batch: 4 sequences x ", "data: shards, ", "ranks: 1 on ")


@pytest.mark.parametrize("level", ["", "debug", "warning"])
def test_a_run_starts_with_a_summary(place: Path, forks: Forks, level: str) -> None:
    """The changed settings and five lines; every setting and a table of ranks at level debug; nothing at level warning."""
    ended = forks.run(place, "mpidp.train", "tiny.toml", "--train.steps=1", MPIDP_LOG=level)
    expect(ended, 0)
    assert "done: step 1" in ended.out and ended.err == ""
    lines = ended.out.splitlines()
    assert [sum(line.startswith(start) for line in lines) for start in SUMMARY] == [int(level != "warning")] * len(SUMMARY)
    assert ("grams_per_kwh = 0.0" in lines and any(line.startswith(" rank  host") for line in lines)) == (level == "debug")
    if not level:
        first = lines.index(next(line for line in lines if line.startswith(SUMMARY[0])))
        assert "train.steps=1" in lines[first].split() and "run.dir=run" in lines[first].split()
        assert all(line.startswith(start) for line, start in zip(lines[first:], SUMMARY, strict=False)) and lines[first + 6] == ""


def test_dry_run_writes_nothing(place: Path, forks: Forks) -> None:
    before = listing(place)
    ended = forks.run(place, "mpidp.train", "tiny.toml", "--dry-run")
    expect(ended, 0)
    assert "[optim]" in ended.out and "\n rank  host" in ended.out and "64 tokens per step" in ended.out
    assert listing(place) == before and not (place / "run").exists()


def test_dry_run_without_data_writes_nothing(tmp_path: Path, forks: Forks) -> None:
    expect(forks.run(tmp_path, "mpidp.train", "--dry-run", "--train.device=cpu"), 3, "no shards at shards/stdlib")
    assert not list(tmp_path.iterdir())


def test_dry_run_reports_what_is_wrong(place: Path, forks: Forks) -> None:
    expect(forks.run(place, "mpidp.train", "tiny.toml", "--dry-run", "--data.path=absent"), 3, "no shards at absent")


def test_the_command_of_a_finished_run_once_more(place: Path, finished: Path, forks: Forks, whole_hash: str) -> None:
    shutil.copytree(finished, place / "run")
    before = listing(place / "run")
    ended = forks.run(place, "mpidp.train", "tiny.toml")
    expect(ended, 0)
    assert "has ended at step 6" in ended.out and "nothing to do" in ended.out and whole_hash in ended.out
    assert listing(place / "run") == before


def test_resume_never_sets_the_earlier_run_aside(place: Path, half_run: Path, forks: Forks, whole_hash: str) -> None:
    before = listing(half_run / "checkpoints")
    ended = forks.run(place, "mpidp.train", "tiny.toml", "--run.resume=never")
    expect(ended, 0)
    assert "the earlier run was moved to run/previous_1" in ended.out
    assert listing(half_run / "previous_1" / "checkpoints") == before
    assert end_record(half_run)["weights_sha256"] == whole_hash


def test_what_mpirun_prints_into_a_file_is_plain(either: Shell, whole_hash: str) -> None:
    """Open MPI gives each rank a terminal, whatever mpirun's output is."""
    ended = either.train(ranks=2)
    expect(ended, 0)
    lines = ended.out.replace("\r\n", "\n").splitlines()
    assert not [line for line in lines if "\x1b" in line], ended
    assert [line for line in lines if line.startswith("done: step 6") and whole_hash in line], ended


def test_both_environments_are_different_mpis() -> None:
    """Otherwise the parametrised tests would test one MPI twice."""
    if len(launchers()) < 2:
        pytest.skip(f"SKIPPED FOR LACK OF a second MPI: only {', '.join(launchers())} is here")
    assert len(set(launchers().values())) == 2
