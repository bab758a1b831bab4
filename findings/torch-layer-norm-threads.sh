#!/bin/sh
# On the CPU, the gradients of torch's layer_norm for weight and bias depend on the number of threads.
#
# Version: torch 2.13.0 (+cpu build, x86-64), Python 3.11.7. Seen on an AMD EPYC with AVX-512.
#
# What a good engineer would guess: torch divides the rows of a tensor among threads, so a thread adds whole sums. The bits of a
# gradient then depend on the input, but not on torch.set_num_threads. For a matrix X of the same size, X.sum(0) and the gradient of
# rms_norm's weight behave in this way.
#
# Behaviour: the bits of the gradients of layer_norm's weight and bias are different with 1, 2 and 3 threads. The output and the
# gradient of the input are the same. The probable cause, which is not proven, is that each thread adds its own rows, and that the
# sums of the threads are then added. If weight and bias are applied after layer_norm(x, shape) as x * weight + bias, all gradients
# are the same with any of these numbers of threads.
#
# Consequence: a training with LayerNorm gives other weights with another number of threads, for example if the threads of a process
# are the cores divided by the number of processes.
#
# Output seen:
#   torch 2.13.0+cpu
#   layer_norm with weight and bias, 2 threads: differ: weight, bias
#   layer_norm with weight and bias, 3 threads: differ: weight, bias
#   layer_norm, then weight and bias, 2 threads: differ: nothing
#   layer_norm, then weight and bias, 3 threads: differ: nothing
# Exit status: 0 if the gradients still differ, 1 if the behaviour changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy
cat > "$folder/program.py" <<'PROGRAM'
import sys

import torch
import torch.nn.functional as F

ROWS, WIDTH = 512, 192
generator = torch.Generator().manual_seed(0)
given = {name: torch.randn(*size, generator=generator) for name, size in (("x", (ROWS, WIDTH)), ("weight", (WIDTH,)), ("bias", (WIDTH,)))}
upstream = torch.randn(ROWS, WIDTH, generator=generator)
ways = {
    "layer_norm with weight and bias": lambda x, weight, bias: F.layer_norm(x, (WIDTH,), weight, bias),
    "layer_norm, then weight and bias": lambda x, weight, bias: F.layer_norm(x, (WIDTH,)) * weight + bias,
}


def results(way, threads):
    torch.set_num_threads(threads)
    leaves = {name: one.clone().requires_grad_() for name, one in given.items()}
    output = way(**leaves)
    output.backward(upstream)
    return {"output": output.detach(), **{name: leaf.grad for name, leaf in leaves.items()}}


print("torch", torch.__version__)
found = {}
for name, way in ways.items():
    alone = results(way, 1)
    for threads in (2, 3):
        differ = [key for key, one in results(way, threads).items() if not torch.equal(one, alone[key])]
        found[name, threads] = differ
        print(f"{name}, {threads} threads: differ: {', '.join(differ) or 'nothing'}")
if any((differ == ["weight", "bias"]) != name.startswith("layer_norm with") for (name, _), differ in found.items()):
    sys.exit("changed: another set of results depends on the number of threads")
PROGRAM
"$folder/env/bin/python" "$folder/program.py"
