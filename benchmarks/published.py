"""Compares published measurements on 8 to 16,384 GPUs with the predictions of `python -m mpidp.plan mesh`.

    python benchmarks/published.py

In each source one row (*) determines the rate of a GPU in matrix products. All other rows are predicted with this rate. Memory
and link speeds are from data sheets and from the sources. docs/plan.md has the tables and a discussion.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from mpidp.plan.mesh.memory import largest
from mpidp.plan.mesh.search import KNOWN
from mpidp.plan.mesh.sizes import ModelSizes, Shape, Work
from mpidp.plan.mesh.time import LinkSpeed, Machine, step_of


@dataclass(frozen=True)
class Row:
    """A published measurement."""

    name: str
    model: ModelSizes
    shape: Shape
    work: Work
    published: float
    unit: str  # TFLOP/s or tokens/s, per GPU
    counts_again: bool = False  # the published figure includes recomputed operations
    calibrates: bool = False  # this row fixes the rate in matrix products

    def __post_init__(self) -> None:
        # The sources send activations in 16 bits, and have one gradient buffer.
        object.__setattr__(self, "work", replace(self.work, wire_bytes=2, slots=1, fsdp=True))


def a100(network: float, overlap: float) -> Machine:
    """Return a machine with 8 A100 and NVLink. network: bytes per second of a node."""
    return Machine(1.0, 2.0e12, LinkSpeed(5e-6, 300e9), LinkSpeed(1e-5, network), 8, 8, overlap)


def h100(memory: float, overlap: float = 1.0) -> Machine:
    """Return a machine with 8 H100, NVLink and 400 Gbit/s per GPU. memory: bytes per second."""
    return Machine(1.0, memory, LinkSpeed(5e-6, 450e9), LinkSpeed(1e-5, 400e9), 8, 8, overlap)


def gpt(layers: int, width: int, heads: int, vocab_size: int = 51200) -> ModelSizes:
    """Return a GPT. Its hidden layer with two matrices of 4 x width is replaced by a SwiGLU of 8/3 x width, which has the same
    number of parameters and operations."""
    return ModelSizes(layers, width, 8 * width // 3, heads, heads, vocab_size, 2048)


MEGATRON = [  # 1 per row: B parameters, heads, width, layers, tp, pp, GPUs, batch, TFLOP/s a GPU
    (1.7, 24, 2304, 24, 1, 1, 32, 512, 137), (3.6, 32, 3072, 30, 2, 1, 64, 512, 138), (7.5, 32, 4096, 36, 4, 1, 128, 512, 142),
    (18.4, 48, 6144, 40, 8, 1, 256, 1024, 135), (39.1, 64, 8192, 48, 8, 2, 512, 1536, 138),
    (76.1, 80, 10240, 60, 8, 4, 1024, 1792, 140),
    (145.6, 96, 12288, 80, 8, 8, 1536, 2304, 148), (310.1, 128, 16384, 96, 8, 16, 1920, 2160, 155),
    (529.6, 128, 20480, 105, 8, 35, 2520, 2520, 163), (1008.0, 160, 25600, 128, 8, 64, 3072, 3072, 163),
]  # fmt: skip
_, LLAMA_8B = KNOWN[8.03e9]
_, LLAMA_13B = KNOWN[13.02e9]
_, LLAMA_70B = KNOWN[70.55e9]
_, LLAMA_405B = KNOWN[405.85e9]
LLAMA2_70B = replace(LLAMA_70B, vocab_size=32000, seq_len=4096)

SOURCES: dict[str, tuple[Machine, list[Row]]] = {
    "Megatron-LM, Narayanan 2021, table 1 (A100; micro-batch taken to be 1 with pp, else 4)": (a100(200e9, 0.0), [
        Row(f"{b:g} B, {gpus} GPUs", gpt(layers, width, heads), Shape(gpus // (tp * pp), pp, tp),
            Work(batch, 1 if pp > 1 else 4, recompute=1.0, fused=False), tflops, "TFLOP/s", True, gpus == 32)
        for b, heads, width, layers, tp, pp, gpus, batch, tflops in MEGATRON
    ]),
    "PyTorch FSDP, Zhao 2023, section 5.4 (A100, 2 Tbit/s a node)": (a100(250e9, 1.0), [
        Row(f"GPT 175 B, {gpus} GPUs, batch {batch}", gpt(96, 12288, 96, 50000), Shape(gpus, 1, 1, 3),
            Work(batch * gpus, batch, recompute=1.0), tflops, "TFLOP/s", counts_again=True, calibrates=batch == 2 and gpus == 128)
        for gpus, batch, tflops in ((128, 2, 186), (128, 1, 173))
    ]),
    "torchtitan, docs/performance.md of 2024 (64 A100, FSDP2)": (a100(200e9, 1.0), [
        Row("Llama 3 8B, recompute selective", LLAMA_8B, Shape(64, 1, 1, 3), Work(64, 1, recompute=0.5), 2973, "tokens/s"),
        Row("Llama 3 70B, recompute", LLAMA_70B, Shape(64, 1, 1, 3), Work(64, 1, recompute=1.0), 331, "tokens/s"),
        Row("Llama 2 13B", LLAMA_13B, Shape(64, 1, 1, 3), Work(128, 2), 2162, "tokens/s", calibrates=True),
        Row("Llama 2 70B, recompute", LLAMA2_70B, Shape(64, 1, 1, 3), Work(128, 2, recompute=1.0), 353, "tokens/s"),
    ]),
    "torchtitan, benchmarks/ 2024-12 and 2025-06 (H100 of 500 W, 2.4 TB/s, torch.compile, bfloat16)": (h100(2.4e12), [
        Row("Llama 3.1 8B, 8 GPUs", LLAMA_8B, Shape(8, 1, 1, 3), Work(16, 2, recompute=0.5), 6667, "tokens/s", calibrates=True),
        Row("Llama 3.1 8B, 128 GPUs", LLAMA_8B, Shape(128, 1, 1, 3), Work(256, 2, recompute=0.5), 6514, "tokens/s"),
        Row("Llama 3 8B, 64 GPUs, tp 8", LLAMA_8B, Shape(8, 1, 8, 3),
            Work(96, 12, recompute=0.5, sequence=True), 4378, "tokens/s"),
        Row("Llama 3 70B, 256 GPUs, tp 8, recompute", LLAMA_70B, Shape(32, 1, 8, 3),
            Work(512, 16, recompute=1.0, sequence=True), 597.3, "tokens/s"),
    ]),
    "Llama 3, Dubey 2024, table 4 (H100, pp interleaved)": (h100(3.35e12), [
        Row("405B, 8,192 GPUs, tp 8 pp 16", LLAMA_405B, Shape(64, 16, 8, 1), Work(2048, 1, sequence=True), 430,
            "TFLOP/s", calibrates=True),
        Row("405B, 16,384 GPUs, tp 8 pp 16", LLAMA_405B, Shape(128, 16, 8, 1), Work(2048, 1, sequence=True), 400, "TFLOP/s"),
    ]),
}  # fmt: skip


def predicted(row: Row, machine: Machine) -> float:
    """Return the prediction in the row's unit."""
    step, model = step_of(row.model, row.shape, row.work, machine), row.model
    tokens = row.work.global_batch * model.seq_len
    if row.unit == "tokens/s":
        return tokens / step.seconds / row.shape.ranks
    block = tokens * (2 * model.matrices + 4 * model.seq_len * model.model_dim)
    again = block * model.num_layers if row.counts_again and row.work.recompute else 0.0
    return (step.flops + again / row.shape.ranks) / step.seconds / 1e12


def calibrated(row: Row, machine: Machine) -> Machine:
    """Find by bisection the rate in matrix products that reproduces this row. Return the machine with this rate."""
    low, high = 1e12, 1e17
    for _ in range(100):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if predicted(row, replace(machine, flops=middle)) < row.published else (low, middle)
    return replace(machine, flops=low)


def main() -> None:
    for source, (machine, rows) in SOURCES.items():
        fitted = calibrated(next(row for row in rows if row.calibrates), machine)
        print(f"\n{source}; {fitted.flops / 1e12:.0f} TFLOP/s in products\n")
        print("| row | mesh | memory, predicted | published | predicted | error |\n|---|---|---|---|---|---|")
        for row in rows:
            found = predicted(row, fitted)
            memory = largest(row.model, row.shape, replace(row.work, loss="whole")).total / 1e9
            off = "*" if row.calibrates else f"{100 * (found / row.published - 1):+.0f}%"
            print(f"| {row.name} | {row.shape} | {memory:.0f} GB | {row.published:,g} {row.unit} | {found:,.4g} | {off} |")


if __name__ == "__main__":
    main()
