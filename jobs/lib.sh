# What the job scripts share. They source it from the folder they were submitted from: Slurm itself runs a copy elsewhere.
#
#   launch COMMAND...         run it; a USR1 to this script (time is nearly up) goes on to it; its exit code is in $code
#   bound_mpirun -n N ...     the same under the mpirun of either MPI, every rank on cores of its own
#   energy                    what Slurm says that the job's steps used, where its accounting has it
#   finish SCRIPT [WORDS]     is the run done? Else put the job back into the queue, or fail. SCRIPT: what to submit when chaining
#
# RUN is the run's folder. NEXT says how to go on: requeue, chain (a new job, where `scontrol requeue` is forbidden) or stop.

code="" asked="" child="" interrupted="" last="" latest=""

pass_on() {
    asked=yes interrupted=yes
    if [ "$child" ]; then kill -USR1 "$child"; fi
}
trap pass_on USR1

end_event() { # the last line of the run's metrics, if that is its end
    tail -qn 1 "$RUN/metrics.jsonl" 2>/dev/null | grep '"event": "end"'
}

run_ended() { # an end that this launch wrote, or of which it said that there is nothing left to do
    local now
    now=$(end_event) && { [ "$code" = 0 ] || [ "$now" != "$last" ]; }
}

launch() {
    local said
    code=127 last=$(end_event) latest=$(cat "$RUN/latest" 2>/dev/null)
    if [ "$asked" ]; then code=75 && return; fi
    "$@" &
    child=$!
    while interrupted=""; do # a signal ends `wait`, not the command
        wait "$child"
        said=$?
        [ "$said" = 127 ] || code=$said
        [ "$interrupted" ] || break
    done
    child=""
}

bound_mpirun() {
    local cores=${SLURM_CPUS_PER_TASK:-1}
    # the daemons that mpirun starts through srun must not be bound to one core, or all their ranks are
    export HYDRA_LAUNCHER_EXTRA_ARGS=--cpu-bind=none
    if mpirun --version | grep -q HYDRA; then
        launch mpirun -bind-to "core:$cores" -map-by "core:$cores" "$@"
    else
        launch mpirun --bind-to core --map-by "slot:PE=$cores" "$@"
    fi
}

living_nodes() { # those of this allocation that answer, this one first
    local node nodes
    nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
    local -A asking
    for node in $nodes; do
        timeout 15 srun --overlap --mpi=none --nodes=1 --ntasks=1 --nodelist="$node" true >/dev/null 2>&1 &
        asking[$node]=$!
    done
    for node in $nodes; do
        wait "${asking[$node]}" && echo "$node"
    done
}

again() {
    local restarts
    restarts=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/.* Restarts=\([0-9]*\) .*/\1/p' | head -n 1)
    if [ "${SLURM_RESTART_COUNT:-0}" -lt "${restarts:-0}" ]; then
        echo "jobs: an old copy of this job, which runs elsewhere since"
        exit 75
    fi
    if [ "${SLURM_RESTART_COUNT:-0}" -ge 10 ] && [ "$(cat "$RUN/latest" 2>/dev/null)" = "$latest" ]; then
        echo "jobs: start $((SLURM_RESTART_COUNT + 1)) of this job, and it made no progress: not tried again"
        exit $((code ? code : 1))
    fi
    case ${NEXT:-requeue} in
        requeue) scontrol requeue "$SLURM_JOB_ID" && sleep 60 ;; # which ends this script
        chain) # with this job's own size and time, wherever they were given
            sbatch --dependency="afterany:$SLURM_JOB_ID" --time="$(squeue -h -j "$SLURM_JOB_ID" -o %l)" \
                --nodes="$SLURM_NNODES" --ntasks-per-node="$SLURM_NTASKS_PER_NODE" --cpus-per-task="$SLURM_CPUS_PER_TASK" "$@"
            ;;
    esac
    exit 75
}

energy() { # of steps that are over; the figure of the whole job comes after its end: `sacct -j JOB -o JobID,ConsumedEnergy`
    local said
    said=$(timeout 15 sacct -n -P -j "${SLURM_JOB_ID:-0}" -o JobID,ConsumedEnergy 2>/dev/null | awk -F'|' '$2 != "" && $2 != "0"')
    if [ "$said" ]; then
        echo "jobs: energy by Slurm's accounting (step|J): $(echo $said)"
    else
        echo "jobs: energy: not available from Slurm's accounting"
    fi
}

finish() {
    energy
    if run_ended; then
        echo "jobs: the run in $RUN has ended (the last exit code was $code)"
        exit 0
    fi
    case $code in
        2 | 3 | 4) ;; # usage, data, checkpoints: a restart mends none of them
        75) echo "jobs: the run in $RUN was stopped; next: ${NEXT:-requeue}" && again "$@" ;;
        *) if [ "$asked" ]; then again "$@"; fi ;;
    esac
    echo "jobs: the run in $RUN has not ended: the last exit code was $code"
    exit $((code ? code : 1))
}
