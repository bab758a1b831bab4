#!/bin/bash
# Prepare data, train, and evaluate, in three jobs. Each job starts when the job before it has succeeded. The result of the evaluation
# is written to RUN/evaluation.json.
#
#   jobs/pipeline.sh [--section.key=value ...]   # from the project's folder; EDIT first
#
# The arguments are passed to the training job. A requeued job keeps its job number, so the following jobs wait until that job ends.
# Do not use NEXT=chain, because a new job would have another number. If a job fails, the following jobs are cancelled.
set -euo pipefail

export SOURCE=${SOURCE:-my_texts}              # EDIT: as in prepare_data.sbatch
export SHARDS=${SHARDS:-shards/mine}           # EDIT
export RUN=${RUN:-runs/mine}                   # EDIT
export VENV=${VENV:-.venv}                     # EDIT
TRAIN=${TRAIN:-jobs/multi_node_mpirun.sbatch}  # EDIT: the training template
OPTIONS=${OPTIONS:-}                           # EDIT: sbatch options for all three jobs, such as --account=...

after() {
    echo "--dependency=afterok:$1 --kill-on-invalid-dep=yes"
}

prepare=$(sbatch --parsable $OPTIONS jobs/prepare_data.sbatch)
train=$(sbatch --parsable $OPTIONS $(after "$prepare") "$TRAIN" --data.path="$SHARDS" "$@")
evaluate=$(sbatch --parsable $OPTIONS $(after "$train") --job-name=evaluate --nodes=1 --ntasks=1 --output=%x-%j.out \
    --wrap=". '$VENV/bin/activate' && mpirun -n 1 python -m mpidp.evaluate '$RUN' --json >'$RUN/evaluation.json'")
echo "$prepare $train $evaluate"
