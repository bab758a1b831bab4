"""The templates of jobs/, submitted unedited to a real Slurm of three virtual nodes. Values marked EDIT are given by options and
environment variables. test_survive.py tests signals and failures.

| template | tested | not tested |
|---|---|---|
| single_node, multi_node_mpirun (both MPIs), multi_node_srun (pmi2, pmix), resilient | yes | |
| scaling_sweep, prepare_data, pipeline.sh, stage_env.sh | yes | |
| gpu | yes, with GPUs that exist only in Slurm's configuration | GPUs: it trains on the CPU |
| apptainer | its launch line | the container: a script that runs the command outside replaces `apptainer` |
| cray | accepted by sbatch | modules, Cray MPICH: nothing is run |
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.faults.commands import ROOT, end_record, launchers
from tests.slurm.cluster import MPICH, OPENMPI, PATIENCE, PLACE, Job, ask, check_whole, need, ranks_table, submit

pytestmark = pytest.mark.timeout(2 * PATIENCE)
ENDS = """{ mkdir -p run && echo '{"event": "end"}' >>run/metrics.jsonl; }"""


@pytest.mark.parametrize(("template", "environment", "nodes"), [
    ("single_node.sbatch", MPICH, 1),
    ("multi_node_mpirun.sbatch", MPICH, 2),
    ("multi_node_mpirun.sbatch", OPENMPI, 2),
    ("multi_node_srun.sbatch", MPICH, 2),
    ("multi_node_srun.sbatch", OPENMPI | {"MPI": "pmix"}, 2),
    ("gpu.sbatch", MPICH, 2),
])
def test_training(folder: Path, whole_hash: str, template: str, environment: dict[str, str], nodes: int) -> None:
    """The run ends with the same hash as all others; the ranks of a node have separate cores, as the table of ranks shows."""
    need(environment)
    options = ("--gpus-per-node=2",) if template == "gpu.sbatch" else ()
    job = submit(folder, template, options=options, **environment).wait()
    check_whole(job, whole_hash)
    table = ranks_table(job.said)
    assert len(table) == 2 * nodes and len({host for host, _ in table}) == nodes, job
    if len(os.sched_getaffinity(0)) > 1:
        assert len(set(table)) == len(table) and all(cores.isdigit() for _, cores in table), job


def test_srun_with_the_wrong_language(folder: Path) -> None:
    """Singletons are rejected with the correct launch line, and the job is not requeued."""
    need(OPENMPI)
    job = submit(folder, "multi_node_srun.sbatch", MPI="none", **OPENMPI).wait("FAILED")
    assert job.facts()["ExitCode"] == "2:0", job
    assert "4 ranks were started, but each is alone" in job.said and "srun --mpi=pmix" in job.said, job
    assert not (folder / "run" / "metrics.jsonl").exists() and job.restarts == 0, job


def test_wrong_settings_are_not_tried_again(folder: Path) -> None:
    job = submit(folder, "single_node.sbatch", "--train.step=3").wait("FAILED")
    assert job.facts()["ExitCode"] == "2:0" and "did you mean 'train.steps'" in job.said and job.restarts == 0, job


def test_success_is_the_end_event(folder: Path) -> None:
    """A launcher returns 0 although the run has not ended: the job fails. It returns 7 although the run has ended: the job
    succeeds."""
    liar = folder / "liar" / "bin"
    liar.mkdir(parents=True)
    (liar / "activate").write_text(f"PATH={liar}:$PATH\n")
    (liar / "mpirun").write_text("#!/bin/sh\nexit 0\n")
    (liar / "mpirun").chmod(0o755)
    job = submit(folder, "single_node.sbatch", VENV="liar").wait("FAILED")
    assert "has not ended" in job.said, job
    (liar / "mpirun").write_text(f"#!/bin/sh\n[ $1 = --version ] || {ENDS}; exit 7\n")
    submit(folder, "single_node.sbatch", VENV="liar").wait()
    (liar / "mpirun").write_text("#!/bin/sh\nexit 7\n")  # an earlier end event does not count
    assert submit(folder, "single_node.sbatch", VENV="liar").wait("FAILED").facts()["ExitCode"] == "7:0"


def test_scaling_sweep(folder: Path, whole_hash: str) -> None:
    """Each array element is a separate run on as many ranks as its index; all end with the same weights."""
    job = submit(folder, "scaling_sweep.sbatch", "--train.steps=6", options=("--array=1,2,4",))
    job.until("three ends", lambda: _states(job.number) == ["COMPLETED"] * 3)
    for ranks in (1, 2, 4):
        end = end_record(folder / f"run-{job.number}-{ranks}")
        assert end["weights_sha256"] == whole_hash
        said = (folder / f"scaling-{job.number}_{ranks}.out").read_text()
        assert f"{ranks} ranks: " in said and len(ranks_table(said)) == ranks, said


def _states(number: str) -> list[str]:
    lines = ask("scontrol", "show", "job", "-o", number).splitlines()
    return [word.split("=")[1] for line in lines for word in line.split() if word.startswith("JobState=")]


def pipeline(folder: Path, **extra: str) -> list[Job]:
    """Return the three jobs of jobs/pipeline.sh."""
    said = ask("jobs/pipeline.sh", folder=folder, CONFIG="tiny.toml", SHARDS="piped", TOKENIZER="byte", VENV=".venv", RUN="run",
               OPTIONS="--time=10 --cpus-per-task=1 --ntasks-per-node=2 --oversubscribe", **extra)
    return [Job(number, folder) for number in said.split()]


def test_pipeline(folder: Path, prepared: Path) -> None:
    prepare, train, evaluate = pipeline(folder, SOURCE=str(prepared / "text.txt"))
    evaluate.wait()
    assert prepare.facts()["JobState"] == train.facts()["JobState"] == "COMPLETED"
    assert (folder / "piped" / "index.json").exists()
    found = json.loads((folder / "run" / "evaluation.json").read_text())
    assert found["tokens"] > 0 and found["loss"] > 0
    (folder / "piped" / "index.json").write_text("{}")  # existing shards are verified, not created again
    assert submit(folder, "prepare_data.sbatch", SHARDS="piped").wait("FAILED").facts()["ExitCode"] == "3:0"


def test_pipeline_ends_when_a_part_fails(folder: Path) -> None:
    """Jobs whose dependency can never be satisfied are cancelled instead of staying pending."""
    prepare, train, evaluate = pipeline(folder, SOURCE="no_such_file")
    prepare.wait("FAILED")
    assert "no_such_file" in prepare.said
    train.wait("CANCELLED")
    evaluate.wait("CANCELLED")


def test_stage_env(folder: Path, whole_hash: str) -> None:
    """The environment is used from each node's local disk, and removed afterwards."""
    small = folder / "small"  # an environment with few files that refers to the packages of another
    subprocess.run([launchers()["mpich"] / "python", "-m", "venv", "--without-pip", small], check=True, timeout=60)
    library = launchers()["mpich"].parent / "lib"
    subprocess.run(["cp", "-a", *library.glob("libmpi*"), library / "mpich", small / "lib"], check=True, timeout=60)
    borrowed = next(library.glob("python*/site-packages"))
    (next((small / "lib").glob("python*/site-packages")) / "borrowed.pth").write_text(f"{borrowed}\n")
    local = PLACE / "local"
    template = (ROOT / "jobs" / "multi_node_srun.sbatch").read_text()
    at = template.index('. "${VENV')
    (folder / "staged.sbatch").write_text(
        template[:at] + f". jobs/stage_env.sh small {local}\npython -c 'import sys; print(sys.prefix)'\n"
        + template[template.index(". jobs/lib.sh"):]
    )
    number = ask("sbatch", "--parsable", "--time=10", "--cpus-per-task=1", "--ntasks-per-node=2", "staged.sbatch", folder=folder,
                 CONFIG="tiny.toml", RUN="run").strip()
    job = Job(number, folder).wait()
    check_whole(job, whole_hash)
    assert f"{local}/mpidp-{number}" in job.said.splitlines(), job
    for node in (1, 2):
        assert not list((PLACE / f"local.node{node}").iterdir())


def test_apptainer_launch_line(folder: Path, whole_hash: str) -> None:
    stand_in = folder / "bin"
    stand_in.mkdir()
    (stand_in / "apptainer").write_text('#!/bin/bash\nuntil [[ $1 == *.sif ]]; do shift; done; shift; exec "$@"\n')
    (stand_in / "apptainer").chmod(0o755)
    job = submit(folder, "apptainer.sbatch", PATH=f"{stand_in}:{launchers()['mpich']}:{os.environ['PATH']}").wait()
    check_whole(job, whole_hash)


def test_cray_is_accepted(folder: Path) -> None:
    assert "to start at" in ask("sbatch", "--test-only", "--ntasks-per-node=2", "--cpus-per-task=1", "jobs/cray.sbatch",
                                folder=folder, check=False)


@pytest.mark.parametrize("path", sorted((ROOT / "jobs").glob("*.s*")), ids=lambda path: path.name)
def test_templates_are_short_and_say_what_to_edit(path: Path) -> None:
    text = path.read_text()
    subprocess.run(["bash", "-n", path], check=True)
    if path.suffix == ".sbatch":
        assert text.startswith("#!/bin/bash\n# ") and f"sbatch jobs/{path.name}" in text and "EDIT" in text
    assert path.name == "lib.sh" or len(text.splitlines()) < 40
