#!/bin/sh
# submitit: with slurm_teardown, Slurm takes a failed job for a completed one, and starts the jobs that depend on its success.
#
# Versions: submitit 1.5.4, Python 3.11. Slurm is not needed: the program runs submitit's batch script with an srun that fails.
#
# What a good engineer would guess: teardown commands (copy files, remove a folder) run at the end of the job and do not change its result.
#
# Behaviour: submitit writes the teardown commands after srun into the batch script, and does not keep srun's exit status. The status of
# the script is that of the last teardown command. Slurm determines the state of a batch job from the status of its script, so a job
# whose function raised an exception is COMPLETED with exit code 0:0. Without teardown, the job is FAILED.
#
# Consequence: sbatch --dependency=afterok starts the next stage, such as the evaluation or the upload of a model, after a failed
# training. sacct and mail messages show success. Only submitit's own job.result() raises the error. A teardown that reads $? in its
# first command, and ends with exit, keeps the status.
#
# Output seen:
#   submitit 1.5.4: exit status of the batch script if srun returns 1
#   no teardown:            1
#   setup:                  1
#   teardown:               0
#   teardown that reads $?: 1
# Exit status: 0 if the status is still lost, 1 if the behaviour changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet submitit==1.5.4
mkdir "$folder/bin"
printf '#!/bin/sh\necho "Submitted batch job 12"\n' > "$folder/bin/sbatch"
printf '#!/bin/sh\nexit 1\n' > "$folder/bin/srun"
chmod +x "$folder/bin/sbatch" "$folder/bin/srun"
cat > "$folder/program.py" <<'PROGRAM'
import subprocess
import sys

import submitit

CASES = {
    "no teardown": {}, "setup": {"slurm_setup": ["true"]}, "teardown": {"slurm_teardown": ["true"]},
    "teardown that reads $?": {"slurm_teardown": ["status=$?", "true", "exit $status"]},
}
print(f"submitit {submitit.__version__}: exit status of the batch script if srun returns 1")
found = []
for number, (name, parameters) in enumerate(CASES.items()):
    executor = submitit.AutoExecutor(f"{sys.argv[1]}/{number}", cluster="slurm")
    executor.update_parameters(timeout_min=5, **parameters)
    job = executor.submit(print, "training")
    found.append(subprocess.run(["bash", job.paths.submission_file]).returncode)
    print(f"{name + ':':23}", found[-1])
if found != [1, 1, 0, 1]:
    sys.exit("changed: another status")
PROGRAM
PATH="$folder/bin:$PATH" "$folder/env/bin/python" "$folder/program.py" "$folder/jobs"
