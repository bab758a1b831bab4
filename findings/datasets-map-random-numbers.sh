#!/bin/sh
# datasets: map and filter with num_proc give every process the same random numbers of numpy (and of torch).
#
# Versions: datasets 5.2.0, numpy 2.4.6, Python 3.11, Linux x86-64.
#
# What a good engineer would guess: num_proc changes the speed. A function that draws random numbers gets other numbers for other rows, as
# with num_proc=1, and as in torch's DataLoader, which seeds numpy and torch in each worker.
#
# Behaviour: the processes are forks of one process and start with the same state of numpy's global generator (torch's, too). Nothing
# seeds them. So with num_proc=N, the numbers of the first part of the rows repeat in each of the N parts. Python's own module random
# differs between the processes, but then differs from run to run, too, in spite of random.seed.
#
# Consequence: with 64 processes, a random mask, a random crop or a fill-in-the-middle split is drawn for a 64th of the rows and
# repeated 64 times. A random filter keeps the same pattern of rows in all 64 parts. The result is cached and used again.
#
# Output seen:
#   datasets 5.2.0, 12 rows, numpy.random.seed(0)
#   1 process: 12 different numbers
#   4 processes: 3 different numbers, in the order 548 715 602 548 715 602 548 715 602 548 715 602
#   random, 4 processes: 12 different numbers
# Exit status: 0 if the processes still draw the same numbers, 1 if the behaviour changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet datasets==5.2.0 numpy==2.4.6
cat > "$folder/program.py" <<'PROGRAM'
import random
import sys

import datasets
import numpy


def draw(row):
    return {"numpy": int(1000 * numpy.random.random()), "random": random.random()}


def drawn(processes):
    """Return what the rows drew, after the generators of this process were seeded."""
    numpy.random.seed(0)
    random.seed(0)
    return datasets.Dataset.from_dict({"row": list(range(12))}).map(draw, num_proc=processes)


if __name__ == "__main__":
    datasets.disable_progress_bars()
    print(f"datasets {datasets.__version__}, 12 rows, numpy.random.seed(0)")
    one, four = drawn(1), drawn(4)
    print(f"1 process: {len(set(one['numpy']))} different numbers")
    print(f"4 processes: {len(set(four['numpy']))} different numbers, in the order", *four["numpy"])
    print(f"random, 4 processes: {len(set(four['random']))} different numbers")
    if (len(set(one["numpy"])), len(set(four["numpy"])), len(set(four["random"]))) != (12, 3, 12):
        sys.exit("changed: the processes draw other numbers")
PROGRAM
cd "$folder"
HF_HOME="$folder/cache" HF_HUB_OFFLINE=1 "$folder/env/bin/python" "$folder/program.py"
