"""Law: with train.init_from a run has the same initial weights on every mesh, each rank holding its part, and the same losses as
on one rank."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mpidp.checkpoint.reader import Reader
from mpidp.config.schema import Config
from mpidp.data.special_tokens import SpecialTokens
from mpidp.data.tokenizer import ByteTokenizer
from mpidp.errors import DataError
from mpidp.hf.families import BY_MODEL_TYPE
from mpidp.hf.tokens import huggingface_json
from mpidp.hf.write import write_folder
from mpidp.model.shape import TransformerShape
from mpidp.model.transformer import Transformer
from tests.tiny import WORLD, Ran, corpus, tiny, train_at

pytestmark = pytest.mark.mpi
MESHES = [(2, 1, 1, 0), (1, 2, 1, 0), (1, 1, 2, 0), (2, 1, 1, 3), (1, 2, 2, 0), (2, 1, 2, 1)]  # dp, pp, tp, shard


def folder(where: Path, tied: bool) -> Path:
    """A Hugging Face folder with several weight files, its own head size and a padded vocabulary. Collective over WORLD."""
    out = where / f"tied_{tied}"
    if WORLD.rank == 0 and not out.exists():
        shape = TransformerShape(272, 3, 4, 2, 32, 40, 16, 0.0, tied, 5e4, 1e-6, 12, "llama3:8,1,4,8")
        weights = Transformer(shape, seed=5).state_dict()
        write_folder(out, shape, weights.__getitem__, huggingface_json(ByteTokenizer()), SpecialTokens(None, (256,)),
                     max_file_bytes=20_000)
    WORLD.Barrier()
    return out


def begun(data: Path, run: Path, source: Path, mesh: tuple[int, int, int, int] = (1, 1, 1, 0), rows: int = 0) -> Config:
    plain = Config().model
    model: dict[str, Any] = {key: getattr(plain, key) for key in ("num_layers", "num_heads", "model_dim", "hidden_dim")}
    train = {"init_from": str(source), "steps": 3, "eval_every": 0, "global_batch": 8}
    return tiny(
        data, run, model=model | {"vocab_size": rows}, train=train,
        optim={"weight_decay": 0.0, "lr": 3e-3}, mesh=dict(zip(("dp", "pp", "tp", "shard"), mesh, strict=True)),
    )


def told(run: Path) -> str:
    meta = Reader(run / "checkpoints" / (run / "latest").read_text()).meta
    return str(meta["init_from"]["weights_sha256"])


@pytest.mark.parametrize(("tied", "rows"), [(False, 0), (True, 0), (True, 280)], ids=["", "tied", "added rows"])
def test_every_mesh_begins_with_the_same_weights(shared_folder: Path, shared_tmp: Path, tied: bool, rows: int) -> None:
    data, source = corpus(shared_folder), folder(shared_folder, tied)
    alone: Ran = train_at(1, begun(data, shared_tmp / "alone", source, rows=rows))
    for mesh in [mesh for mesh in MESHES if mesh[0] * mesh[1] * mesh[2] <= WORLD.size]:
        run = shared_tmp / "x".join(map(str, mesh))
        ran = train_at(mesh[0] * mesh[1] * mesh[2], begun(data, run, source, mesh, rows))
        assert told(run) == told(shared_tmp / "alone"), mesh
        assert ran.losses == pytest.approx(alone.losses, rel=1e-5), mesh
        if mesh[1:3] == (1, 1):
            assert ran.sha256 == alone.sha256


@pytest.mark.parametrize("family", BY_MODEL_TYPE)
def test_every_mesh_trains_every_family_the_same(shared_folder: Path, shared_tmp: Path, family: str) -> None:
    """Fused and transposed tensors, biases, norms, learned positions and windows: each rank reads its part. Stages and
    sharding change no bit, except that stages round the gradient of a tied embedding differently."""
    data, source = corpus(shared_folder), shared_tmp / "source"
    if WORLD.rank == 0:
        from tests.families import folder_of_row  # takes seconds, because it imports transformers

        folder_of_row(family, source, num_key_value_heads=2)
        (source / "tokenizer.json").write_text(huggingface_json(ByteTokenizer()))
    WORLD.Barrier()
    alone: Ran = train_at(1, begun(data, shared_tmp / "alone", source))
    tied = json.loads((source / "config.json").read_text()).get("tie_word_embeddings", True)
    meshes = [(1, 2, 1, 0), (1, 1, 2, 0), (2, 1, 1, 1), (2, 1, 1, 3), (1, 2, 2, 0)]
    for mesh in [mesh for mesh in meshes if mesh[0] * mesh[1] * mesh[2] <= WORLD.size]:
        run = shared_tmp / "x".join(map(str, mesh))
        ran = train_at(mesh[0] * mesh[1] * mesh[2], begun(data, run, source, mesh))
        assert told(run) == told(shared_tmp / "alone"), mesh
        assert ran.losses == pytest.approx(alone.losses, rel=1e-5), mesh
        if mesh[:3] == (2, 1, 1) or (mesh == (1, 2, 1, 0) and not tied):
            assert ran.sha256 == alone.sha256, mesh


def test_a_run_of_ours_is_as_good_and_faults_are_everybody_s(shared_folder: Path, shared_tmp: Path) -> None:
    data, source, most = corpus(shared_folder), folder(shared_folder, True), min(2, WORLD.size)
    first = train_at(most, begun(data, shared_tmp / "first", source, (1, most, 1, 0)))
    train_at(most, begun(data, shared_tmp / "second", shared_tmp / "first", (1, 1, most, 0)))
    assert told(shared_tmp / "second") == first.sha256
    if WORLD.rank == 0:
        max(source.glob("*.safetensors")).unlink()
    WORLD.Barrier()
    with pytest.raises(DataError, match="1 of .* weight files are missing"):
        train_at(most, begun(data, shared_tmp / "third", source, (most, 1, 1, 0)))
