"""Laws of the predicted memory, time and traffic of a mesh: bytes match a real model, seconds match the schedule."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F

from mpidp.model.lora import attach
from mpidp.model.loss_chunks import chunk_rows
from mpidp.model.options import TransformerOptions
from mpidp.model.part import part_of
from mpidp.model.shape import TransformerShape, flops_per_token, num_parameters
from mpidp.model.transformer import Transformer
from mpidp.parallel.chunked_loss import ChunkedLoss
from mpidp.parallel.grid import Grid
from mpidp.parallel.tensor import Regather, share_layers
from mpidp.plan.mesh.activations import kept_of_block, kept_of_last_norm, logits_bytes, loss_bytes
from mpidp.plan.mesh.memory import Memory, largest, layers_of, memory_of, parameters_of, trained_of
from mpidp.plan.mesh.search import KNOWN
from mpidp.plan.mesh.sizes import ModelSizes, Shape, Work
from mpidp.plan.mesh.time import LinkSpeed, Machine, data_parallel, half_allreduce, measured_machine, message, step_of
from mpidp.reducers.rounds import plan_rounds, slots_of
from mpidp.reducers.tree import slots_needed

SMALL = ModelSizes(3, 64, 192, 4, 2, 512, 32)
BIG = KNOWN[6.74e9][1]
FAST = Machine(5e14, 2e12, LinkSpeed(0.0, 3e11), LinkSpeed(0.0, 4e11), 8, 8, 0.0)


OPTIONS: dict[str, dict[str, Any]] = {
    "gpt2": {"gated": False, "activation": "gelu", "attention_bias": "q,k,v,o", "mlp_bias": True, "norm": "layer",
             "positions": "learned", "position_rows": 40},
    "gemma": {"qk_norm": "head", "norm_plus_one": True, "norm_place": "both", "attention_cap": 5.0, "logit_cap": 9.0},
    "olmo": {"qk_norm": "layer", "norm_place": "after", "window": 8, "attention_bias": "q,k"},
    "neox": {"gated": False, "activation": "relu2", "norm": "layer", "parallel": True, "rotary_dims": 8},
    "parallel": {"parallel": True, "attention_scale": 0.3, "residual_scale": 0.5},
}
MODELS = [SMALL, *(replace(SMALL, head_size=24, options=TransformerOptions(**options)) for options in OPTIONS.values())]
NAMES = ["default", *OPTIONS]


def torch_shape(model: ModelSizes) -> TransformerShape:
    return model.shape


@pytest.mark.parametrize("model", [*MODELS, replace(SMALL, tie_embeddings=True), replace(SMALL, num_kv_heads=4)])
def test_parameters_are_those_of_the_model(model: ModelSizes) -> None:
    real = Transformer(torch_shape(model))
    assert model.parameters == sum(p.numel() for p in real.parameters()) == num_parameters(torch_shape(model))
    assert parameters_of(model, Shape(1, 1, 1), 0) == model.parameters
    assert model.block == sum(p.numel() for p in real.blocks["0"].parameters())


@pytest.mark.parametrize("name", [name for name, _ in KNOWN.values()])
def test_published_models_have_their_published_sizes(name: str) -> None:
    (parameters, model), = [(known, model) for known, (said, model) in KNOWN.items() if said == name]
    assert model.parameters == pytest.approx(parameters, rel=2e-3)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("pp", [1, 2, 3])
@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("model", MODELS, ids=NAMES)
def test_no_parameter_is_lost(tp: int, pp: int, tied: bool, model: ModelSizes) -> None:
    """Every rank holds as many parameters as the part of the real model has."""
    model, shape = replace(model, tie_embeddings=tied), Shape(1, pp, tp)
    assert sum(layers_of(model, shape, stage) for stage in range(pp)) == model.num_layers
    for stage in range(pp):
        parts = [Transformer(model.shape, part=part_of(model.shape, stage, pp, index, tp)) for index in range(tp)]
        held = [sum(p.numel() for p in part.parameters()) for part in parts]
        assert sum(held) == tp * parameters_of(model, shape, stage)


@pytest.mark.parametrize("pp", [1, 3])
@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("model", MODELS, ids=NAMES)
def test_with_lora_only_adapters_have_gradients_and_moments(tp: int, pp: int, model: ModelSizes) -> None:
    """Every rank holds and trains as many parameters as the part of the real model."""
    model, shape = replace(model, lora_rank=4, lora_targets="q,o,up"), Shape(1, pp, tp)
    for stage in range(pp):
        parts = [Transformer(model.shape, part=part_of(model.shape, stage, pp, index, tp)) for index in range(tp)]
        for part in parts:
            attach(part, model.lora_rank, 8.0, model.lora_targets, 0)
        held = [p for part in parts for p in part.parameters()]
        assert sum(p.numel() for p in held) == tp * parameters_of(model, shape, stage)
        trained = sum(p.numel() for p in held if p.requires_grad) / tp
        memory = memory_of(model, shape, Work(8, 1, number_bytes=4), stage)
        assert (trained_of(model, shape, stage), memory.gradients, memory.optimizer) == (trained, 4 * trained, 8 * trained)


def test_stages_are_cut_for_the_slowest() -> None:
    """No other number of blocks on the last stage, with its head, makes the slowest stage faster. No stage is empty."""
    for model, pp in ((BIG, 4), (BIG, 32), (replace(BIG, vocab_size=500000), 8), (SMALL, 3)):
        shape = Shape(1, pp, 1)
        layers = [layers_of(model, shape, stage) for stage in range(pp)]
        assert sum(layers) == model.num_layers and min(layers) >= 1 and max(layers[:-1]) - min(layers[:-1]) <= 1
        block, head = model.matrices + 2 * model.seq_len * model.model_dim, model.table
        took = max(max(layers[:-1]) * block, layers[-1] * block + head)
        others = range(1, model.num_layers - pp + 2)
        assert took == min(max(-(-(model.num_layers - n) // (pp - 1)) * block, n * block + head) for n in others)
        most = max((memory_of(model, shape, Work(64, 1), stage) for stage in range(pp)), key=lambda one: one.total)
        assert largest(model, shape, Work(64, 1)).total >= 0.99 * most.total


def saved_bytes(model: ModelSizes, dtype: torch.dtype, part: str) -> float:
    """Return the bytes per token that autograd keeps of one block, or of everything after the blocks, without parameters and
    casts of them."""
    real = Transformer(torch_shape(model))
    if model.lora_rank:
        attach(real, model.lora_rank, 8.0, model.lora_targets, 0)
    b, t = 3, model.seq_len
    found: dict[int, int] = {}
    weights = {shape for p in real.parameters() for shape in (tuple(p.shape), tuple(p.shape)[::-1])}

    def pack(x: torch.Tensor) -> torch.Tensor:
        if tuple(x.shape) not in weights and x.untyped_storage().data_ptr() not in buffers:
            found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            alive.append(x)
        return x

    alive: list[torch.Tensor] = []
    buffers = {x.untyped_storage().data_ptr() for x in (real.cos, real.sin)}
    x = torch.randn(b, t, model.model_dim, requires_grad=True) * 1  # autocast would keep a copy of a leaf
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            y = real.blocks["0"](x, real.cos, real.sin, None, None) if part == "block" else real._capped(real.head(real.norm(x)))
        if part != "block":
            F.cross_entropy(y.float().flatten(0, 1), torch.zeros(b * t, dtype=torch.int64), reduction="sum")
    return sum(found.values()) / (b * t)


@pytest.mark.parametrize("kv", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model", MODELS, ids=NAMES)
def test_activations_are_those_that_autograd_keeps(dtype: torch.dtype, kv: int, model: ModelSizes) -> None:
    model, size = replace(model, num_kv_heads=kv, seq_len=24), dtype.itemsize
    work = Work(1, 1, number_bytes=size)
    assert kept_of_block(model, Shape(1, 1, 1), work) == pytest.approx(saved_bytes(model, dtype, "block"), rel=0.02)
    logarithms = 4 * model.vocab_size  # kept for the backward; the formula includes other tensors that exist at the peak
    assert logits_bytes(model, Shape(1, 1, 1), size) >= 2 * logarithms
    logarithms += size * model.vocab_size * (model.options.logit_cap > 0)
    assert saved_bytes(model, dtype, "head") == pytest.approx(logarithms + kept_of_last_norm(model, size), rel=0.03)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model", MODELS, ids=NAMES)
def test_with_lora_autograd_keeps_at_most_the_activations_of_full_training(dtype: torch.dtype, model: ModelSizes) -> None:
    model = replace(model, seq_len=24, lora_rank=4, lora_targets="q,k,v,o,up,down")
    kept = kept_of_block(model, Shape(1, 1, 1), Work(1, 1, number_bytes=dtype.itemsize))
    assert saved_bytes(model, dtype, "block") <= 1.02 * kept


class Mirror:
    """Simulates a ring of ranks that all hold this rank's values."""

    def __init__(self, size: int) -> None:
        self.size, self.sequence, self.length = size, True, 0

    def gather(self, x: torch.Tensor, length: int) -> torch.Tensor:
        return torch.cat([x.detach()] * self.size, dim=1)[:, :length]

    def scatter(self, x: torch.Tensor) -> torch.Tensor:
        return self.size * x.detach()[:, : x.shape[1] // self.size]

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        return self.size * x.detach()



@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_positions_in_parts_keep_a_part(name: str, dtype: torch.dtype, tp: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Backward has the whole input again: the gradient equals that of products which keep everything."""
    model, b = replace(MODELS[NAMES.index(name)], num_heads=8, num_kv_heads=8, seq_len=24, model_dim=128), 3
    shape = torch_shape(model)
    t, found, alive = model.seq_len, {}, []
    real = Transformer(shape, 1, part_of(shape, 0, 1, 0, tp, sequence=True))
    weights = {tuple(p.shape)[::turn] for p in real.parameters() for turn in (1, -1)}
    share_layers(real, cast(Any, Mirror(tp)))

    def pack(x: torch.Tensor) -> torch.Tensor:
        if tuple(x.shape) not in weights and x.untyped_storage().data_ptr() not in buffers:
            found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            alive.append(x)
        return x

    inside = Regather.pack

    def pack_inside(self: Regather, x: torch.Tensor) -> Any:
        packed = inside(self, x)
        pack(packed if isinstance(packed, torch.Tensor) else self.part)
        return packed

    def gradients() -> list[torch.Tensor]:
        x = torch.randn(b, t // tp, model.model_dim, generator=torch.Generator().manual_seed(1)).requires_grad_() * 1
        cast_to = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), cast_to:
            y = real.blocks["0"](x, real.cos, real.sin, None, None)
        return list(torch.autograd.grad(y.square().sum(), [x, *real.blocks["0"].parameters()]))

    buffers = {x.untyped_storage().data_ptr() for x in (real.cos, real.sin)}
    monkeypatch.setattr(Regather, "pack", pack_inside)
    mine = gradients()
    kept = kept_of_block(model, Shape(1, 1, tp), Work(1, 1, number_bytes=dtype.itemsize, sequence=True))
    assert kept == pytest.approx(sum(found.values()) / (b * t), rel=0.02)
    monkeypatch.setattr(Regather, "pack", lambda self, x: x)
    assert all(torch.equal(one, other) for one, other in zip(mine, gradients(), strict=True))


def total(shape: Shape, recompute: bool = False, model: ModelSizes = BIG) -> Memory:
    return largest(model, shape, Work(64, 1, float(recompute), slots=1))


def test_a_parameter_takes_sixteen_bytes() -> None:
    alone = memory_of(SMALL, Shape(1, 1, 1), Work(8, 1, number_bytes=4), 0)
    n = SMALL.parameters
    assert (alone.parameters, alone.gradients, alone.optimizer) == (4 * n, 4 * n, 8 * n)
    slots = memory_of(SMALL, Shape(1, 1, 1), Work(8, 1, number_bytes=4, slots=3), 0)
    assert slots.gradients == 3 * alone.gradients


def test_memory_falls_with_every_axis_and_level() -> None:
    for shard in range(4):
        for more in ("tp", "pp"):
            series = [total(replace(Shape(8, 1, 1, shard), **{more: n})).total for n in (1, 2, 4, 8)]
            assert series == sorted(series, reverse=True) and len(set(series)) == 4, (shard, more)
    levels = [total(Shape(8, 1, 1, shard)) for shard in range(4)]
    n, blocks = BIG.parameters, BIG.num_layers * BIG.block
    assert [one.optimizer for one in levels] == [8 * n, n, n, n]
    assert [one.gradients for one in levels] == [4 * n, 4 * n, n / 2, n / 2]
    assert [one.parameters for one in levels] == [4 * n, 4 * n, 4 * n, 4 * (n - blocks) + blocks / 2]
    assert [one.working for one in levels[1:]] == [2 * n, 2 * n + 8 * BIG.block, 2 * n + 12 * BIG.block]
    fsdp = memory_of(BIG, Shape(8, 1, 1, 3), Work(64, 1, slots=1, fsdp=True), 0)
    assert (fsdp.parameters, fsdp.working) == (n / 2, 2 * (2 + 4) * BIG.block)
    assert len({one.activations for one in levels}) == 1
    assert [one.total for one in levels] == sorted((one.total for one in levels), reverse=True)


def test_micro_batches_in_flight_are_those_of_1f1b() -> None:
    """A stage keeps as many micro-batches as there are stages from it to the end, and at most all."""
    each = memory_of(BIG, Shape(1, 8, 1), Work(1, 1), 0).activations
    assert [memory_of(BIG, Shape(1, 8, 1), Work(m, 1), 0).activations / each for m in (2, 8, 64)] == [2, 8, 8]
    assert memory_of(BIG, Shape(1, 8, 1), Work(64, 1), 6).activations == pytest.approx(2 * each)
    most = max((memory_of(BIG, Shape(1, 8, 1), Work(64, 1), stage) for stage in range(8)), key=lambda one: one.total)
    assert largest(BIG, Shape(1, 8, 1), Work(64, 1)) == most
    kept = [total(Shape(1, 4, 1), recompute).activations for recompute in (False, True)]
    assert kept[1] < kept[0] / 4


def test_autograd_keeps_a_16_bit_copy_of_the_weights_for_each_micro_batch_in_flight() -> None:
    """With recompute, there is one copy, in the forward pass."""
    real, copies = Transformer(torch_shape(SMALL)), dict[int, int]()
    weights = {tuple(p.shape)[::turn] for p in real.blocks.parameters() if p.dim() > 1 for turn in (1, -1)}

    def pack(x: torch.Tensor) -> torch.Tensor:
        if tuple(x.shape) in weights and x.dtype == torch.bfloat16:
            copies[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    kept, matrices = [], SMALL.num_layers * SMALL.matrices
    for count in (1, 2, 3):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), torch.autocast("cpu", torch.bfloat16):
            kept.append(real(torch.zeros(1, 9, dtype=torch.int64)))
        assert sum(copies.values()) == 2 * matrices * count
    work, shape = Work(8, 1), Shape(1, 4, 1)
    model = replace(SMALL, num_layers=4)
    for stage in range(4):
        p = parameters_of(model, shape, stage)
        assert memory_of(model, shape, work, stage).working == 2 * p * (4 - stage)
        assert memory_of(model, shape, replace(work, recompute=1.0), stage).working == 2 * p


@pytest.mark.parametrize(("batch", "lanes", "dp"), [(64, 0, 1), (64, 64, 1), (64, 16, 3), (60, 20, 8), (7, 7, 2), (30, 4, 6)])
def test_micro_batches_and_gradient_buffers_are_those_of_training(batch: int, lanes: int, dp: int) -> None:
    """With lanes=0 each replica has one lane. The plan never has fewer lanes than replicas."""
    work = Work(batch, 1, lanes=lanes)
    cut = work.cut(dp)
    assert cut.num_lanes == max(lanes, dp)
    mine = [cut.of_rank(rank, dp) for rank in range(dp)]
    assert work.micro_batches(Shape(dp, 1, 1)) == max(sum(len(cut.micro_batches(lane)) for lane in lanes) for lanes in mine)
    slots = max(slots_needed(cut, lanes, 0, True, False) for lanes in mine)
    assert memory_of(SMALL, Shape(dp, 1, 1), work, 0).gradients == 4 * slots * SMALL.parameters
    assert slots == 1 or lanes > dp
    if dp > 1:
        assert work.micro_batches(Shape(dp, 1, 1, 2)) == math.ceil(batch / dp)
        slots = slots_of(plan_rounds(cut, dp))
        assert memory_of(SMALL, Shape(dp, 1, 1, 2), work, 0).gradients == pytest.approx(4 * slots * SMALL.parameters / dp)


def one_f_one_b(stages: int, count: int, forward: float, backward: float, late: float) -> float:
    """Return the seconds of 1F1B by simulating every event."""
    order = []
    for s in range(stages):
        warm = min(count, stages - s)
        mine = [("F", v) for v in range(warm)]
        for v in range(count):
            mine += [("B", v)] + ([("F", v + warm)] if v + warm < count else [])
        order.append(mine)
    done: dict[tuple[str, int, int], float] = {}
    clock, at = [0.0] * stages, [0] * stages
    while any(at[s] < len(order[s]) for s in range(stages)):
        for s in range(stages):
            while at[s] < len(order[s]):
                what, v = order[s][at[s]]
                before = ("F", s - 1, v) if what == "F" else ("B", s + 1, v)
                if 0 <= before[1] < stages and before not in done:
                    break
                ready = done[before] + late if 0 <= before[1] < stages else 0.0
                clock[s] = max(clock[s], ready) + (forward if what == "F" else backward)
                done[what, s, v] = clock[s]
                at[s] += 1
    return max(clock)


@pytest.mark.parametrize(("stages", "count"), [(1, 4), (2, 2), (2, 8), (4, 4), (4, 16), (8, 32)])
@pytest.mark.parametrize("late", [0.0, 0.02])
def test_a_pipeline_takes_what_its_schedule_takes(stages: int, count: int, late: float) -> None:
    """With equal stages: a model with a negligible vocabulary."""
    model = replace(BIG, vocab_size=0)
    machine = replace(FAST, ranks_a_node=1, devices_a_node=1, between=LinkSpeed(late, math.inf))
    step = step_of(model, Shape(1, stages, 1), Work(count, 1), machine)
    each = step.compute_seconds / count
    seconds = step.compute_seconds + step.pipeline_seconds
    took = one_f_one_b(stages, count, each / 3, each * 2 / 3, late)
    assert took * (1 - 1e-3) <= seconds <= took * (1 + 1e-3) + 1.1 * late  # exact if pp divides M - 1, else one message more
    if not late:
        assert step.pipeline_seconds / seconds == pytest.approx((stages - 1) / (count + stages - 1), rel=1e-2, abs=1e-4)


def test_operations_are_those_of_mfu() -> None:
    for recompute in (0.0, 1.0):
        for shape in (Shape(1, 1, 1), Shape(2, 2, 2), Shape(4, 1, 4, 3)):
            step = step_of(BIG, shape, Work(16, 1, recompute), FAST)
            wanted = flops_per_token(torch_shape(BIG), BIG.parameters) * 16 * BIG.seq_len
            assert step.flops * shape.ranks == pytest.approx(wanted, rel=1e-3)  # norm gains are not matrix products
    again = step_of(BIG, Shape(1, 1, 1), Work(16, 1, 1.0), FAST).compute_seconds
    assert 1.25 < again / step_of(BIG, Shape(1, 1, 1), Work(16, 1), FAST).compute_seconds < 1.45


def test_bytes_follow_the_formulas() -> None:
    n, d, t, L = BIG.parameters, BIG.model_dim, BIG.seq_len, BIG.num_layers
    sent = [data_parallel(BIG, Shape(8, 1, 1, shard), Work(32, 1), FAST)[0].sent_bytes for shard in range(4)]  # M = 4
    gathered = 4 * (2 * 4 * (L - 1) + 1) * BIG.block + 4 * (n - L * BIG.block)  # blocks, and once per step the rest
    assert [one / (7 / 8) for one in sent] == pytest.approx([8 * n, 12 * n, (4 * 4 + 4) * n, 4 * 4 * n + gathered])
    fsdp = [data_parallel(BIG, Shape(8, 1, 1, shard), Work(32, 1, fsdp=True), FAST)[0].sent_bytes for shard in range(4)]
    assert [one / (n * 7 / 8) for one in fsdp] == pytest.approx([8, 8, 4 * 4 + 4, 4 * (4 + 2 * 2)])
    more = [data_parallel(BIG, Shape(8, 1, 1, shard), Work(32, 1, slices=2), FAST)[0].sent_bytes for shard in range(4)]
    assert [(one - other) / (n * 7 / 8) for one, other in zip(more, sent, strict=True)] == pytest.approx([0, 0, 4 / 8, 4 / 8])
    step = step_of(BIG, Shape(1, 1, 4), Work(3, 1), FAST)
    small = 6 * 4 * t * 3 / 4
    assert step.tp_bytes == pytest.approx(3 * ((4 * L + 2) * 2 * 3 / 4 * 4 * t * d + small))
    assert step.tp_seconds == pytest.approx(step.tp_bytes / 3e11)
    assert (step.pp_bytes, step.dp_bytes, step.between_bytes) == (0, 0, 0)
    wide = step_of(BIG, Shape(1, 4, 1), Work(3, 1), FAST)
    assert wide.pp_bytes == 2 * 3 * 4 * t * d and wide.between_bytes == 0
    away = step_of(BIG, Shape(4, 4, 1), Work(12, 1), FAST)
    assert away.between_bytes == away.dp_bytes  # the four stages of a replica are on one node, replicas are not
    joined = replace(BIG, tie_embeddings=True)  # the last stage sends its gradient of the embedding, with slices M times more
    for pp, slices, times in ((2, 1, 1), (2, 2, 4), (4, 2, 4)):
        tie = step_of(joined, Shape(1, pp, 1), Work(3, 1, slices=slices), FAST)
        assert tie.pp_bytes == max(wide.pp_bytes / 2 * min(2, pp - 1), wide.pp_bytes / 2 + 4 * times * BIG.table)
    assert step_of(replace(joined, lora_rank=1, lora_targets="q"), Shape(1, 2, 1), Work(3, 1), FAST).pp_bytes == wide.pp_bytes / 2


def test_with_lora_replicas_exchange_only_adapters() -> None:
    """With mesh.shard=3, replicas also gather the frozen parameters. The ranks of a stage sum the gradients of the factors that
    each of them holds in full."""
    model = replace(BIG, lora_rank=8, lora_targets="q,v")
    n = BIG.num_layers * 2 * 2 * 8 * BIG.model_dim
    assert model.trained == n
    sent = [data_parallel(model, Shape(8, 1, 1, shard), Work(32, 1), FAST)[0].sent_bytes for shard in range(4)]  # M = 4
    gathered = 4 * (2 * 4 * (BIG.num_layers - 1) + 1) * (BIG.block + n / BIG.num_layers)  # blocks with frozen parameters
    assert [one / (7 / 8) for one in sent] == pytest.approx([8 * n, 12 * n, (4 * 4 + 4) * n, 4 * 4 * n + gathered])
    plain, lora = (step_of(one, Shape(1, 1, 4), Work(3, 1), FAST) for one in (BIG, model))
    assert lora.tp_bytes - plain.tp_bytes == pytest.approx(3 * BIG.num_layers * 2 * 2 * 3 / 4 * 4 * 8 * BIG.model_dim)
    assert 2 / 3 < lora.flops / plain.flops < 0.75 and lora.update_seconds / plain.update_seconds < 0.01


def test_links_are_shared_as_ranks_lie() -> None:
    one = 8e9
    assert half_allreduce(FAST, 1, 1, one).seconds == 0
    assert half_allreduce(FAST, 8, 1, one).seconds == pytest.approx(7e9 / 3e11)
    whole = half_allreduce(FAST, 16, 1, one)  # one ring through both nodes
    assert whole.between and whole.seconds == pytest.approx(max(7.5e9 / 4e11, 7.5e9 / 3e11))
    rails = half_allreduce(FAST, 4, 8, one)  # eight rings, one for each local rank
    assert rails.between and rails.seconds == pytest.approx(8 * 6e9 / 4e11)
    assert message(FAST, Shape(1, 2, 8), one).seconds == pytest.approx(8 * one / 4e11)
    assert not message(FAST, Shape(1, 2, 4), one).between and not message(FAST, Shape(4, 2, 4), one).between
    assert message(FAST, Shape(1, 16, 1), one).seconds == pytest.approx(one / 4e11)  # one rank of each node sends to another node


MESHES = [(8, 1, 1), (4, 4, 1), (2, 8, 1), (1, 16, 1), (2, 2, 8), (8, 2, 2), (4, 2, 4), (16, 4, 2)]


@pytest.mark.parametrize(("dp", "pp", "tp"), MESHES)
def test_traffic_leaves_a_node_where_the_ranks_of_the_mesh_do(dp: int, pp: int, tp: int) -> None:
    """The prediction assumes the numbering of ranks in parallel/grid.py."""
    sizes = {"model": SimpleNamespace(size=pp * tp), "pp": SimpleNamespace(size=pp), "tp": SimpleNamespace(size=tp)}
    nodes: dict[tuple[str, int, int], set[int]] = {}
    for rank in range(dp * pp * tp):
        replica, stage, index = Grid.coordinates(SimpleNamespace(**sizes), rank)  # type: ignore[arg-type]
        nodes.setdefault(("dp", stage, index), set()).add(rank // FAST.ranks_a_node)
        nodes.setdefault(("pp", replica, index), set()).add(rank // FAST.ranks_a_node)
    leaves = {kind: any(len(found) > 1 for (of, *_), found in nodes.items() if of == kind) for kind in ("dp", "pp")}
    assert data_parallel(BIG, Shape(dp, pp, tp), Work(dp, 1), FAST)[0].between == leaves["dp"]
    assert message(FAST, Shape(dp, pp, tp), 1.0).between == leaves["pp"]


def hidden_of(shape: Shape, work: Work) -> list[float]:
    """Return the hidden seconds at three shares of overlap, relative to the compute time of a step."""
    slow = replace(FAST, between=LinkSpeed(0.0, 1e10), inside=LinkSpeed(0.0, 1e10))
    steps = [step_of(BIG, shape, work, replace(slow, overlap=share)) for share in (0.0, 0.5, 1.0)]
    return [(steps[0].dp_seconds - one.dp_seconds) / one.compute_seconds for one in steps]


def test_hidden_traffic_is_not_waited_for() -> None:
    """In mpidp.train, sums overlap with the backward pass of the last micro-batch (here of two). Nothing else overlaps."""
    for shard in (0, 1):
        assert hidden_of(Shape(64, 1, 1, shard), Work(128, 1)) == pytest.approx([0, 1 / 6, 1 / 3])
    for shape in (Shape(64, 1, 1, 2), Shape(64, 1, 1, 3), Shape(32, 1, 2), Shape(32, 2, 1, 1)):
        assert hidden_of(shape, Work(128, 1)) == [0, 0, 0]
    assert hidden_of(Shape(64, 1, 1, 3), Work(128, 1, fsdp=True)) == pytest.approx([0, 0.5, 1])


def test_ranks_that_share_devices_take_as_long_as_all_their_work() -> None:
    crowded = replace(FAST, devices_a_node=2, inside=LinkSpeed(0.0, math.inf))
    free = [step_of(BIG, Shape(dp, 1, 1), Work(64, 1), crowded) for dp in (1, 2, 4, 8)]
    path = [one.compute_seconds + one.pipeline_seconds for one in free]
    assert path == pytest.approx([path[0], path[0] / 2, path[0] / 2, path[0] / 2])


def test_a_measured_run_is_predicted_exactly() -> None:
    for machine in (FAST, replace(FAST, flops=3e10, memory_bytes_per_second=8e9)):
        work = Work(8, 2, number_bytes=4)
        step = step_of(SMALL, Shape(1, 1, 1), work, machine)
        flops, memory = measured_machine(SMALL, 2, step.compute_seconds, step.update_seconds, 4, 4)
        again = step_of(SMALL, Shape(1, 1, 1), replace(work, recompute=1.0), machine)
        if machine.flops < 1e12:
            assert (flops, memory) == pytest.approx((machine.flops, machine.memory_bytes_per_second))
            assert measured_machine(SMALL, 2, again.compute_seconds, again.update_seconds, 4, 4, 1.0)[0] == pytest.approx(flops)
        else:  # a small model on this machine is bound by memory: no rate of products is measured, and nothing is negative
            assert flops > 0


@pytest.mark.parametrize("loss", ["whole", "chunked", "auto"])
def test_the_memory_of_the_loss_is_what_training_allocates(loss: str) -> None:
    """The largest sum of the tensors that exist at a time, with a vocabulary of 100,000 and two chunks."""
    model = replace(SMALL, vocab_size=100_000, seq_len=160, model_dim=32)
    work = Work(2, 2, number_bytes=4, loss=loss)
    rows = chunk_rows(loss, model.shape, 320)
    hidden, targets = torch.randn(320, 32, requires_grad=True), torch.randint(0, 100_000, (320,))
    head = torch.nn.Linear(32, 100_000, bias=False)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        if rows:
            total = ChunkedLoss(model.shape, lambda: [head.weight], rows, torch.float32)(hidden, targets)
        else:
            total = torch.nn.functional.cross_entropy(head(hidden), targets, reduction="sum")
        total.backward()
        head.weight.grad = hidden.grad = None
    at = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            at += event.nbytes()
            most = max(most, at)
    assert 0.85 < loss_bytes(model, Shape(1, 1, 1), work) / most < 1.2
    assert bool(rows) == (loss == "chunked")  # the logits are small for auto
    assert loss_bytes(model, Shape(1, 1, 2), work) < 0.6 * loss_bytes(model, Shape(1, 1, 1), work)
    large = replace(work, micro_batch=64)  # auto needs no more memory for more tokens, except the gradient of hidden states
    assert (loss_bytes(model, Shape(1, 1, 1), large) < 2**28) == (loss != "whole")
