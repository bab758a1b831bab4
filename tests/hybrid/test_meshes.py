"""Laws of mesh.tp and mesh.pp: losses on every mesh are those of one rank. Stages change no bit, tensor parallelism changes sums
by rounding, and the number of replicas changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from mpi4py import MPI

import mpidp.evaluate
import mpidp.generate
from mpidp.config.schema import Config
from mpidp.errors import UsageError
from mpidp.model.options import DEFAULTS, TransformerOptions
from mpidp.model.shape import TransformerShape
from mpidp.parallel.grid import make_grid
from mpidp.plan.mesh.sizes import ModelSizes, Shape, Work
from mpidp.plan.mesh.time import LinkSpeed, Machine, step_of
from mpidp.training.step import compute
from tests.hybrid.gradients import assert_gradients
from tests.tiny import DEVICE, WORLD, Ran, at, corpus, job_at, sizes, tiny, train_at

pytestmark = pytest.mark.mpi
CLOSE = 1e-5  # relative tolerance
Mesh = tuple[int, int, int]
MESHES: list[Mesh] = [  # (dp, pp, tp)
    (1, 2, 1), (1, 1, 2), (2, 2, 1), (2, 1, 2), (1, 3, 1), (1, 4, 1), (1, 2, 2), (1, 1, 4),
    (2, 2, 2), (1, 4, 2), (1, 2, 4), (4, 1, 2),
]
MODEL: dict[str, Any] = {"num_layers": 4, "num_heads": 4, "dropout": 0.1}
TRAIN: dict[str, Any] = {"steps": 20, "global_batch": 13, "eval_every": 8, "eval_tokens": 150}


def with_mesh(data: Path, run: Path, mesh: tuple[int, int, int], /, **sections: dict[str, Any]) -> Config:
    optim = {"clip": 0.5, "warmup_steps": 2, "schedule": "constant", "lr": 3e-3}
    found: dict[str, Any] = {"model": MODEL, "train": TRAIN, "optim": optim}
    for name, values in sections.items():
        found[name] = found.get(name, {}) | values
    found["mesh"] = {"dp": mesh[0], "pp": mesh[1], "tp": mesh[2]} | found.get("mesh", {})
    return tiny(data, run, **found)


def on(mesh: tuple[int, int, int], config: Config) -> Ran:
    return train_at(mesh[0] * mesh[1] * mesh[2], config)


def assert_close(run: Ran, alone: Ran, what: str, rel: float = CLOSE) -> None:
    """Compare the losses of every step and evaluation, and the norms."""
    assert len(run.learned) == len(alone.learned), what
    for mine, line in zip(run.learned, alone.learned, strict=True):
        for key in ("train_loss", "val_loss", "grad_norm"):
            if key in line:
                near = pytest.approx(line[key], rel=rel if key != "grad_norm" else 100 * rel)
                assert mine[key] == near, f"{what}: {key}, {line}"


def fits(mesh: tuple[int, int, int]) -> bool:
    return mesh[0] * mesh[1] * mesh[2] <= WORLD.size


@pytest.mark.parametrize("mesh", MESHES, ids=lambda mesh: "x".join(map(str, mesh)))
@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
def test_every_mesh_learns_what_one_rank_learns(
    shared_folder: Path, shared_tmp: Path, mesh: tuple[int, int, int], tied: bool
) -> None:
    """With dropout, clipping, a short last micro-batch and grouped heads. Stages alone are exact to the bit, except with a tied
    embedding."""
    if not fits(mesh):
        pytest.skip("more ranks than there are")
    data, model = corpus(shared_folder), {"tie_embeddings": tied, "num_kv_heads": 4 if mesh[2] == 4 else 2}
    alone = on((1, 1, 1), with_mesh(data, shared_tmp / "alone", (1, 1, 1), model=model))
    run = on(mesh, with_mesh(data, shared_tmp / "run", mesh, model=model))
    assert_close(run, alone, str(mesh))
    if mesh[2] == 1 and not tied:
        assert (run.sha256, run.learned) == (alone.sha256, alone.learned)
    if mesh[0] > 1:  # for any number of replicas
        assert run.sha256 == on((1, *mesh[1:]), with_mesh(data, shared_tmp / "fewer", (1, *mesh[1:]), model=model)).sha256


@pytest.mark.parametrize("mesh", [mesh for mesh in MESHES if mesh[2] > 1], ids=lambda mesh: "x".join(map(str, mesh)))
def test_positions_in_parts_teach_what_whole_ones_do(shared_folder: Path, shared_tmp: Path, mesh: tuple[int, int, int]) -> None:
    """With dropout, windows that tp does not divide, and recompute, also when an evaluation ends with a short window."""
    if not fits(mesh):
        pytest.skip("more ranks than there are")
    data, model, steps = corpus(shared_folder), {"seq_len": 15, "num_kv_heads": 4}, {"steps": 8, "recompute": mesh[1] > 1}
    alone = on((1, 1, 1), with_mesh(data, shared_tmp / "alone", (1, 1, 1), model=model, train=steps))
    run = on(mesh, with_mesh(data, shared_tmp / "run", mesh, model=model, train=steps, mesh={"sequence": True}))
    assert_close(run, alone, str(mesh))
    if mesh[0] > 1:  # for any number of replicas
        fewer = with_mesh(data, shared_tmp / "fewer", (1, *mesh[1:]), model=model, train=steps, mesh={"sequence": True})
        assert run.sha256 == on((1, *mesh[1:]), fewer).sha256


@pytest.mark.parametrize("sequence", [False, True], ids=["", "sequence"])
@pytest.mark.parametrize("mesh", [mesh for mesh in MESHES if mesh[0] == 1], ids=lambda mesh: "x".join(map(str, mesh)))
def test_gradients_are_those_of_one_rank(
    shared_folder: Path, shared_tmp: Path, mesh: tuple[int, int, int], sequence: bool
) -> None:
    """Compare every parameter, each in its box, and the norm over the whole model."""
    if not fits(mesh):
        pytest.skip("more ranks than there are")
    if sequence and mesh[2] == 1:
        pytest.skip("nobody to share positions with")
    data, heads, cut = corpus(shared_folder), {"num_kv_heads": 4}, {"sequence": sequence}
    alone = with_mesh(data, shared_tmp / "alone", (1, 1, 1), model=heads)
    assert_gradients(alone, with_mesh(data, shared_tmp / "run", mesh, model=heads, mesh=cut), CLOSE)


def test_a_run_goes_on_on_any_other_mesh(shared_folder: Path, shared_tmp: Path) -> None:
    """dp4 -> dp2 x tp2, sharded -> pp2 x tp2 -> one rank -> pp2: the result equals that of an uninterrupted run."""
    data = corpus(shared_folder)
    alone = on((1, 1, 1), with_mesh(data, shared_tmp / "alone", (1, 1, 1)))
    steps = 0
    for mesh, level in [((4, 1, 1), 1), ((2, 1, 2), 3), ((1, 2, 2), 0), ((1, 1, 1), 0), ((1, 2, 1), 0)]:
        steps += 4
        if fits(mesh):
            run = on(mesh, with_mesh(data, shared_tmp / "run", mesh, train={"steps": steps}, mesh={"shard": level}))
            assert run.end["step"] == steps
    run = on((1, 1, 1), with_mesh(data, shared_tmp / "run", (1, 1, 1)))
    assert run.losses == pytest.approx(alone.losses, rel=CLOSE) and run.end["val_loss"] == pytest.approx(alone.end["val_loss"])


def test_what_is_saved_on_a_mesh_is_the_whole_model(shared_folder: Path, shared_tmp: Path) -> None:
    """One rank that resumes without making a step reports the hash that the mesh reported."""
    data = corpus(shared_folder)
    for mesh in [mesh for mesh in ((1, 2, 2), (1, 1, 2), (2, 2, 1), (1, 2, 1)) if fits(mesh)]:
        run = on(mesh, with_mesh(data, shared_tmp / str(mesh), mesh, train={"steps": 3}))
        again = on((1, 1, 1), with_mesh(data, shared_tmp / str(mesh), (1, 1, 1), train={"steps": 3, "patience": 9}))
        assert again.sha256 == run.sha256

        def loaded(comm: MPI.Intracomm, mesh: tuple[int, int, int] = mesh) -> str:
            import mpidp.training.loop
            from mpidp.checkpoint.resume import find_checkpoint

            job = job_at(comm, with_mesh(data, shared_tmp / str(mesh), (1, 1, 1), train={"steps": 3}))
            reader, _ = find_checkpoint(job.run_dir, "must", comm)
            assert reader is not None
            mpidp.training.checkpoints.restore(job, reader)
            return job.parts.sha256(job.engine.model)

        assert at(1, loaded) == [run.sha256]


@pytest.mark.check
@pytest.mark.parametrize("how", [
    {"strategy": {"name": "local", "sync_every": 5}}, {"strategy": {"name": "delayed"}}, {"comm": {"compress": "int8"}},
    {"comm": {"compress": "fp16"}}, {"comm": {"reducer": "allreduce"}}, {"optim": {"name": "sgd"}},
    {"train": {"recompute": True}}, {"comm": {"transport": "messages"}}, {"train": {"lanes": 3}},
    {"mesh": {"shard": 1}, "comm": {"transport": "messages"}}, {"mesh": {"shard": 2}}, {"mesh": {"shard": 3}},
    {"mesh": {"sequence": True}, "strategy": {"name": "local", "sync_every": 5}, "train": {"dtype": "bfloat16"}},
    {"mesh": {"sequence": True}, "comm": {"compress": "fp16"}},
    {"mesh": {"sequence": True, "shard": 3}, "train": {"lanes": 3, "steps": 6}},
], ids=str)
def test_methods_of_replicas_compose(shared_folder: Path, shared_tmp: Path, how: dict[str, dict[str, Any]]) -> None:
    """Two replicas of two parts have nearly the losses of two whole replicas with the same method; codes round by bucket."""
    if not fits((2, 2, 1)):
        pytest.skip("needs four ranks")
    data = corpus(shared_folder)
    cut = how.get("mesh", {})
    whole = how | {"mesh": cut | {"sequence": False}}
    plain = on((2, 1, 1), with_mesh(data, shared_tmp / "plain", (2, 1, 1), **whole))
    for mesh in ((2, 1, 2),) if "sequence" in cut else ((2, 2, 1), (2, 1, 2)):
        run = on(mesh, with_mesh(data, shared_tmp / str(mesh), mesh, **how))
        rounds = how.get("comm", {}).get("compress") == "int8" or "dtype" in how.get("train", {})
        near = 1e-2 if rounds else 2e-4 if "compress" in how.get("comm", {}) else CLOSE
        assert_close(run, plain, f"{mesh} {how}", near)


def test_evaluate_and_generate_on_a_mesh(shared_folder: Path, shared_tmp: Path) -> None:
    """The loss of shards and of a text, the answers and the texts equal those of one rank; replicas divide the work."""
    data, run = corpus(shared_folder), shared_tmp / "run"
    on((1, 1, 1), with_mesh(data, run, (1, 1, 1), train={"steps": 12}))
    prompts, questions = shared_tmp / "prompts.txt", shared_tmp / "questions.jsonl"
    if WORLD.rank == 0:
        prompts.write_text("the \nrank of\nin order so th\n")
        questions.write_text('{"context": "the ", "choices": ["rank of", "zqx", "when it"], "label": 0}\n' * 2)
    WORLD.barrier()

    def use(comm: MPI.Intracomm, pp: int, tp: int) -> tuple[float, int, list[str], float, float]:
        found = mpidp.evaluate.evaluate(str(run), str(data), comm, device=DEVICE, threads=1, tp=tp, pp=pp)
        how = [f"--device={DEVICE}", "--threads=1", f"--tp={tp}", f"--pp={pp}"]
        given = ["--tokens=12", "--temperature=0.7", "--top-k=9", "--seed=3", "--batch=2", f"--prompts={prompts}"]
        rows = mpidp.generate.generate(comm, mpidp.generate.read_options([str(run), *given, *how]))
        options = mpidp.evaluate.read_options([str(run), f"--text={prompts}", *how])
        text = mpidp.evaluate.evaluate_text(options, comm)
        options = mpidp.evaluate.read_options([str(run), f"--choices={questions}", *how])
        choices = mpidp.evaluate.evaluate_choices(options, comm)
        return found["loss"], found["tokens"], [row["text"] for row in rows], text["loss"], choices["accuracy"]

    loss, tokens, texts, of_text, accuracy = at(1, lambda comm: use(comm, 1, 1))[0]
    for mesh in [mesh for mesh in MESHES if fits(mesh) and 4 % mesh[2] == 0]:
        found = at(mesh[0] * mesh[1] * mesh[2], lambda comm, mesh=mesh: use(comm, *mesh[1:]))
        near = pytest.approx(loss, rel=CLOSE), tokens, texts, pytest.approx(of_text, rel=CLOSE), accuracy
        assert found[0] == near, mesh
        assert {(one[0], *one[3:]) for one in found} == {(found[0][0], *found[0][3:])}


def test_ranks_that_have_the_same_hold_the_same_bits(shared_folder: Path, shared_tmp: Path) -> None:
    """Norms are whole on every rank of a stage, and stay equal."""
    if not fits((1, 1, 2)):
        pytest.skip("needs two ranks")
    data = corpus(shared_folder)

    def norms(comm: MPI.Intracomm) -> list[list[float]]:
        job = job_at(comm, with_mesh(data, shared_tmp / "run", (1, 1, 2)))
        loader = job.open_loader(0)
        for _ in range(5):
            compute(job, next(loader))
            job.strategy.step(1e-2, 13 * 16)
        loader.close()
        return [p.tolist() for name, p in job.engine.model.named_parameters() if not job.parts.part.is_cut(name)]

    first, second = at(2, norms)
    assert first == second and first


def test_memory_falls_with_the_number_of_parts(shared_folder: Path, shared_tmp: Path) -> None:
    """The parameters of all parts add up to those of the model, with shared ones counted on every rank of a stage."""
    data = corpus(shared_folder)
    for mesh in [mesh for mesh in MESHES if mesh[0] == 1 and fits(mesh)]:

        def count(comm: MPI.Intracomm, mesh: tuple[int, int, int] = mesh) -> tuple[int, int]:
            job = job_at(comm, with_mesh(data, shared_tmp / str(mesh), mesh, model={"num_kv_heads": 4}))
            named = list(job.engine.model.named_parameters())
            return sum(p.numel() for _, p in named), sum(p.numel() for n, p in named if not job.parts.part.is_cut(n))

        rows = at(mesh[1] * mesh[2], count)
        whole = at(1, lambda comm: count(comm, (1, 1, 1)))[0][0]
        twice = sum(norms for i, (_, norms) in enumerate(rows) if i % mesh[2])
        assert sum(total for total, _ in rows) - twice == whole
        assert max(total for total, _ in rows) <= 0.75 * whole


@pytest.mark.parametrize(("mesh", "model", "said"), [
    ((1, 1, 2), {"num_heads": 3, "model_dim": 36, "num_kv_heads": 3}, r"3 key-value heads.*Use mesh.tp=1 or 3"),
    ((1, 2, 1), {"num_layers": 1}, "mesh.pp=2: .* the model has only 1. Use at most mesh.pp=1"),
])
def test_a_cut_that_is_not_to_be_had_is_refused(
    shared_folder: Path, shared_tmp: Path, mesh: tuple[int, int, int], model: dict[str, Any], said: str
) -> None:
    if not fits(mesh):
        pytest.skip("needs two ranks")
    data = corpus(shared_folder)
    with pytest.raises(UsageError, match=said):
        on(mesh, with_mesh(data, shared_tmp / "run", mesh, model=model))


def test_ranks_that_make_no_mesh_are_told_how_many_would() -> None:
    if WORLD.size < 3:
        pytest.skip("needs three ranks")
    with pytest.raises(UsageError, match=r"mesh.tp=2 x mesh.pp=1 does not fit the 3 ranks of this job. Start 2 or 4"):
        at(3, lambda comm: make_grid(comm, 2))


def test_everybody_has_a_place() -> None:
    for n in sizes(2, 4, 8):

        def place(comm: MPI.Intracomm, n: int = n) -> tuple[Any, ...]:
            grid = make_grid(comm, 2, max(1, n // 4))
            dp, pp, tp = grid.coordinates(grid.world.rank)
            return (dp, pp, tp) == (grid.replicas.dp.rank, grid.pp.rank, grid.tp.rank), grid.world.rank, (dp, pp, tp)

        found = at(n, place)
        assert all(same for same, _, _ in found)
        assert len({coordinates for _, _, coordinates in found}) == n


def sizes_of(s: TransformerShape) -> ModelSizes:
    heads = s.num_heads, s.num_kv_heads
    options = TransformerOptions(**{name: getattr(s, name) for name in DEFAULTS})
    return ModelSizes(
        s.num_layers, s.model_dim, s.hidden_dim, *heads, s.vocab_size, s.seq_len, s.tie_embeddings, s.head_size, options
    )


def assert_foretold(config: Config) -> None:
    """Compare the bytes sent between the ranks of a stage with `mpidp plan mesh`. Collective over WORLD."""

    def sent(comm: MPI.Intracomm) -> tuple[int, TransformerShape]:
        job = job_at(comm, config)
        loader = job.open_loader(0)
        batch = next(loader)
        loader.close()
        job.transport.pop_counts()
        compute(job, batch)
        return job.transport.pop_counts()[0], job.parts.shape

    (found, shape), _ = at(2, sent)
    number_bytes = 2 if config.train.dtype == "bfloat16" else 4
    work = Work(2, 2, float(config.train.recompute), number_bytes, sequence=config.mesh.sequence)
    machine = Machine(1.0, 1.0, LinkSpeed(0.0, 1.0), LinkSpeed(0.0, 1.0), 8, 8)
    assert found == step_of(sizes_of(shape), Shape(1, 1, 2), work, machine).tp_bytes


@pytest.mark.parametrize("recompute", [False, True], ids=["", "recompute"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sequence", [False, True], ids=["", "sequence"])
def test_sent_bytes_are_those_foretold(
    shared_folder: Path, shared_tmp: Path, sequence: bool, dtype: str, recompute: bool
) -> None:
    if not fits((1, 1, 2)):
        pytest.skip("needs two ranks")
    train = {"global_batch": 2, "dtype": dtype, "recompute": recompute}
    config = with_mesh(corpus(shared_folder), shared_tmp / "run", (1, 1, 2), train=train, mesh={"sequence": sequence})
    assert_foretold(config)
