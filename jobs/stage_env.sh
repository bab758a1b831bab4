# Copy the environment to every node's local disk, so that a thousand ranks do not import torch from the shared file system.
# Source this file in a job script in place of `. .venv/bin/activate`:
#
#   . jobs/stage_env.sh .venv /tmp        # EDIT: the environment; a folder on each node's local disk
#
# The environment is packed once (and again after pip changed it), sent with sbcast and unpacked on every node. Python and mpirun
# then come from the copies, which are removed when the job ends. `python -m ...` uses the copies; other scripts in bin/ still
# refer to the original's path.
venv=$(realpath "$1")
archive=$venv.tar
staged=$2/mpidp-$SLURM_JOB_ID
on_every_node() {
    srun --overlap --mpi=none --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --ntasks-per-node=1 "$@"
}
stage() {
    if [ -n "$(find "$venv"/lib/python*/site-packages -maxdepth 0 -newer "$archive" 2>&1)" ]; then
        tar -cf "$archive.$SLURM_JOB_ID" -C "$venv" . && mv "$archive.$SLURM_JOB_ID" "$archive" || return
    fi
    sbcast --force "$archive" "$staged.tar" &&
        on_every_node sh -c "mkdir -p '$staged' && tar -xf '$staged.tar' -C '$staged' && rm '$staged.tar'"
}
trap 'on_every_node rm -rf "$staged" "$staged.tar"' EXIT
stage || { echo "jobs: $venv could not be copied to $2 on every node"; exit 1; }
export PATH=$staged/bin:$PATH
echo "jobs: $venv was copied to $staged on $SLURM_NNODES nodes"
