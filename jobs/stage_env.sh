# Copy the Python environment to the local disk of every node, so that a thousand ranks do not import torch from the shared file
# system. In a job script, use this line instead of `. .venv/bin/activate`:
#
#   . jobs/stage_env.sh .venv /tmp        # EDIT: the environment, and a folder on the local disk of each node
#
# The environment is packed once, and again after pip has changed it. The archive is sent with sbcast and unpacked on every node. Then
# `python -m ...` and mpirun run from the copies. Other scripts in bin/ still use the path of the original environment. The copies
# are removed when the job ends.
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
