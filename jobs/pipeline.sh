#!/bin/bash
# Prepare, then train, then evaluate (to RUN/evaluation.json): three jobs, each waits until the one before has succeeded.
#
#   jobs/pipeline.sh [--section.key=value ...]   # in the project's folder; EDIT first
#
# The words go to the training. A job that is requeued keeps its number, so those behind it wait for its real end; do not combine
# this with NEXT=chain. When a job fails, those behind it are cancelled instead of pending for ever.
set -euo pipefail

export SOURCE=${SOURCE:-my_texts}              # EDIT: as in prepare_data.sbatch
export SHARDS=${SHARDS:-shards/mine}           # EDIT
export RUN=${RUN:-runs/mine}                   # EDIT
export VENV=${VENV:-.venv}                     # EDIT
TRAIN=${TRAIN:-jobs/multi_node_mpirun.sbatch}  # EDIT: which training
OPTIONS=${OPTIONS:-}                           # EDIT: for all three, such as --account=...

after() {
    echo "--dependency=afterok:$1 --kill-on-invalid-dep=yes"
}

prepare=$(sbatch --parsable $OPTIONS jobs/prepare_data.sbatch)
train=$(sbatch --parsable $OPTIONS $(after "$prepare") "$TRAIN" --data.path="$SHARDS" "$@")
evaluate=$(sbatch --parsable $OPTIONS $(after "$train") --job-name=evaluate --nodes=1 --ntasks=1 --output=%x-%j.out \
    --wrap=". '$VENV/bin/activate' && mpirun -n 1 python -m mpidp.evaluate '$RUN' --json >'$RUN/evaluation.json'")
echo "$prepare $train $evaluate"
