#!/bin/bash
# Prepare, then train, then evaluate (to RUN/evaluation.json): three jobs, each of which waits for the success of the one before.
#
#   jobs/pipeline.sh [--section.key=value ...]   # from the project's folder; EDIT first
#
# The arguments are passed to the training. A requeued job keeps its number, so the following jobs wait until it has ended. Do not
# use NEXT=chain. If a job fails, the following jobs are cancelled instead of staying pending.
set -euo pipefail

export SOURCE=${SOURCE:-my_texts}              # EDIT: as in prepare_data.sbatch
export SHARDS=${SHARDS:-shards/mine}           # EDIT
export RUN=${RUN:-runs/mine}                   # EDIT
export VENV=${VENV:-.venv}                     # EDIT
TRAIN=${TRAIN:-jobs/multi_node_mpirun.sbatch}  # EDIT: the training template
OPTIONS=${OPTIONS:-}                           # EDIT: sbatch options for all three, such as --account=...

after() {
    echo "--dependency=afterok:$1 --kill-on-invalid-dep=yes"
}

prepare=$(sbatch --parsable $OPTIONS jobs/prepare_data.sbatch)
train=$(sbatch --parsable $OPTIONS $(after "$prepare") "$TRAIN" --data.path="$SHARDS" "$@")
evaluate=$(sbatch --parsable $OPTIONS $(after "$train") --job-name=evaluate --nodes=1 --ntasks=1 --output=%x-%j.out \
    --wrap=". '$VENV/bin/activate' && mpirun -n 1 python -m mpidp.evaluate '$RUN' --json >'$RUN/evaluation.json'")
echo "$prepare $train $evaluate"
