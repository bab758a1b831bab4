"""Laws of the engine: evaluation has the same bits on any number of ranks, and counts every token once. Dropout depends on the
position in the data."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mpi4py import MPI

from mpidp.checkpoint.local_parameters import weights_sha256
from mpidp.data.shards import TokenStream
from mpidp.model.shape import TransformerShape
from mpidp.model.transformer import Transformer
from mpidp.parallel.engine import Engine, dropout_key
from mpidp.parallel.schedule import one_f_one_b
from tests.tiny import SEQ_LEN, at, corpus, gradients_of, job_at, masked_corpus, micro_batches_of, sizes, tiny

pytestmark = pytest.mark.mpi
CPU = torch.device("cpu")


def engine_for(stream: TokenStream) -> Engine:
    shape = TransformerShape(stream.vocab_size, 2, 4, 4, 32, 64, SEQ_LEN)
    return Engine(Transformer(shape, seed=3), CPU, torch.float32, seed=1, dropout=0.0, nominal_tokens=1)


def naive(engine: Engine, stream: TokenStream, limit: int) -> tuple[float, int]:
    """Evaluate window by window and token by token, in float64."""
    model = Transformer(engine.model.shape, seed=3).double()
    ids = stream.read(0, stream.num_tokens).astype(np.int64)
    mask = stream.read_mask(0, stream.num_tokens)
    total, count = 0.0, 0
    for start in range(0, limit, SEQ_LEN):
        stop = min(start + SEQ_LEN, limit)
        with torch.no_grad():
            logits = model(torch.from_numpy(ids[None, start:stop]))[0]
        for i, place in enumerate(range(start + 1, stop + 1)):
            if mask is None or mask[place]:
                total -= float(torch.log_softmax(logits[i], dim=-1)[ids[place]])
                count += 1
    return total / count, count


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("max_tokens", [0, 5, 100, 10**6])
def test_evaluation_is_the_same_at_any_number_of_ranks_and_right(shared_folder: Path, masked: bool, max_tokens: int) -> None:
    stream = TokenStream((masked_corpus if masked else corpus)(shared_folder), "val")
    assert (stream.num_tokens - 1) % SEQ_LEN  # the last window is short
    engine = engine_for(stream)
    found = {
        (n, sequences): set(at(n, lambda comm, s=sequences: engine.evaluate(stream, comm, SEQ_LEN, s, max_tokens)))
        for n in sizes(1, 2, 3, 4) for sequences in (1, 3)
    }
    for sequences in (1, 3):
        assert len(set().union(*(found[n, sequences] for n in sizes(1, 2, 3, 4)))) == 1
    limit = stream.num_tokens - 1
    if max_tokens:
        limit = min(limit, max(SEQ_LEN, max_tokens // SEQ_LEN * SEQ_LEN))
    loss, count = naive(engine, stream, limit)
    assert masked or count == limit
    for ours, counted in found[1, 3] | found[1, 1]:
        assert counted == count and ours == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("tokens", [2, 3, SEQ_LEN, SEQ_LEN + 1, SEQ_LEN + 2])
def test_streams_shorter_than_a_window_are_evaluated(shared_folder: Path, tokens: int) -> None:
    stream = TokenStream(corpus(shared_folder, tokens=2 * tokens, shards=1, val_fraction=0.5), "val")
    assert stream.num_tokens == tokens
    engine = engine_for(stream)
    found = {one for n in sizes(1, 4) for one in at(n, lambda comm: engine.evaluate(stream, comm, SEQ_LEN, 2))}
    loss, count = naive(engine, stream, tokens - 1)
    assert len(found) == 1 and count == tokens - 1
    assert next(iter(found)) == (pytest.approx(loss, rel=1e-6), count)


def test_evaluation_changes_nothing(shared_folder: Path) -> None:
    stream = TokenStream(corpus(shared_folder), "val")
    engine = engine_for(stream)
    engine.model.train()
    before = weights_sha256(engine.model)
    engine.evaluate(stream, MPI.COMM_SELF, SEQ_LEN, 2)
    assert engine.model.training and weights_sha256(engine.model) == before
    assert all(p.grad is None for p in engine.model.parameters())


def test_dropout_keys_are_of_the_data(shared_folder: Path, shared_tmp: Path) -> None:
    keys = [dropout_key(seed, batch, v) for seed in range(3) for batch in range(30) for v in range(10)]
    assert len(set(keys)) == len(keys) and all(0 <= k < 2**32 for k in keys)
    assert dropout_key(1, 2, 3) == dropout_key(1, 2, 3) == 1311293172  # pinned: resumed runs depend on these numbers
    config = tiny(corpus(shared_folder), shared_tmp, model={"dropout": 0.3})
    alone = at(1, lambda comm: gradients_of(job_at(comm, config), 2))[0]
    for n in sizes(2, 3, 4):
        for ours in at(n, lambda comm: gradients_of(job_at(comm, config), 2)):
            assert all(torch.equal(ours[name], alone[name]) for name in alone)


def test_the_engine_gives_loss_sums_and_an_empty_micro_batch_gives_none(shared_folder: Path, shared_tmp: Path) -> None:
    config = tiny(corpus(shared_folder), shared_tmp)

    def losses(comm: MPI.Intracomm) -> None:
        job = job_at(comm, config)
        loader = job.open_loader(6)  # an epoch's last batch: 4 of 16 sequences
        batch = next(loader)
        loader.close()
        found = job.engine.run(one_f_one_b(micro_batches_of(job)), batch, job.strategy)
        assert found.micro_batches == micro_batches_of(job)
        model = copy.deepcopy(job.engine.model).double()
        for v, loss, num_tokens in zip(found.micro_batches, found.losses, found.num_tokens, strict=True):
            mb = batch[v]
            assert mb.num_tokens == num_tokens
            if mb.tokens.shape[0] == 0:
                assert loss == 0.0 and num_tokens == 0
                continue
            with torch.no_grad():
                wanted = F.cross_entropy(model(mb.tokens).flatten(0, 1), mb.targets.flatten(), reduction="sum")
            assert loss == pytest.approx(float(wanted), rel=1e-5)
        assert sum(comm.allgather(found.num_tokens.count(0))) == 6

    for n in sizes(1, 2, 3, 4):
        at(n, losses)


def test_the_hash_is_of_every_weight() -> None:
    shape = TransformerShape(11, 1, 2, 2, 8, 8, 4)
    model = Transformer(shape, seed=1)
    before = weights_sha256(model)
    assert before == weights_sha256(Transformer(shape, seed=1)) != weights_sha256(Transformer(shape, seed=2))
    for p in model.parameters():
        old = p.detach().clone()
        with torch.no_grad():
            p.view(-1)[-1] = torch.nextafter(p.view(-1)[-1], torch.tensor(9.0))
        assert weights_sha256(model) != before
        with torch.no_grad():
            p.copy_(old)
    assert weights_sha256(model) == before
