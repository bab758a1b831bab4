# Functions for the job scripts. A job script reads this file from the folder in which the job was submitted, because Slurm runs a
# copy of the script in another folder.
#
#   launch COMMAND...         run COMMAND, and forward USR1 (the time limit is near) to it. Its exit code is in $code
#   bound_mpirun -n N ...     the same with mpirun (for Intel MPI, mpiexec.hydra). Every rank is bound to cores of its own
#   energy                    print the energy that the Slurm steps of the job used, if Slurm's accounting records it
#   finish SCRIPT [ARGS]      exit with 0 if the run has ended. Otherwise requeue the job, or submit SCRIPT (NEXT=chain), or fail
#
# RUN is the run's folder. NEXT sets how to continue a run that was stopped. requeue: requeue the job. chain: submit a new job, for
# sites that forbid `scontrol requeue`. stop: do not continue.

code="" stop_requested="" child="" interrupted="" last="" latest=""

forward_usr1() {
    stop_requested=yes interrupted=yes
    if [ "$child" ]; then kill -USR1 "$child"; fi
}
trap forward_usr1 USR1

end_event() { # print the last line of metrics.jsonl if it is the end event
    tail -qn 1 "$RUN/metrics.jsonl" 2>/dev/null | grep '"event": "end"'
}

run_ended() { # true if this launch wrote the end event, or if it exited with 0 because the run had already ended
    local now
    now=$(end_event) && { [ "$code" = 0 ] || [ "$now" != "$last" ]; }
}

launch() {
    local status
    code=127 last=$(end_event) latest=$(cat "$RUN/latest" 2>/dev/null)
    if [ "$stop_requested" ]; then code=75 && return; fi
    "$@" &
    child=$!
    while interrupted=""; do # a signal ends `wait`, not the command
        wait "$child"
        status=$?
        [ "$status" = 127 ] || code=$status
        [ "$interrupted" ] || break
    done
    child=""
}

bound_mpirun() {
    local cores=${SLURM_CPUS_PER_TASK:-1}
    # mpirun starts daemons with srun. Do not bind them to one core, because their ranks would inherit this binding.
    export HYDRA_LAUNCHER_EXTRA_ARGS=--cpu-bind=none I_MPI_HYDRA_BOOTSTRAP_EXEC_EXTRA_ARGS=--cpu-bind=none
    case $(mpirun --version) in
        *"Intel(R) MPI"*) # Intel's mpirun is a script that does not forward signals
            export I_MPI_PIN_DOMAIN="$cores:compact"
            launch mpiexec.hydra "$@"
            ;;
        *HYDRA*) launch mpirun -bind-to "core:$cores" -map-by "core:$cores" "$@" ;;
        *) launch mpirun --bind-to core --map-by "slot:PE=$cores" "$@" ;;
    esac
}

living_nodes() { # print the nodes of this allocation that respond; the node of this script comes first
    local node nodes
    nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
    local -A probes
    for node in $nodes; do
        timeout 15 srun --overlap --mpi=none --nodes=1 --ntasks=1 --nodelist="$node" true >/dev/null 2>&1 &
        probes[$node]=$!
    done
    for node in $nodes; do
        wait "${probes[$node]}" && echo "$node"
    done
}

continue_later() { # requeue the job or submit a new one, unless this is an old copy of the job or the job makes no progress
    local restarts
    restarts=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/.* Restarts=\([0-9]*\) .*/\1/p' | head -n 1)
    if [ "${SLURM_RESTART_COUNT:-0}" -lt "${restarts:-0}" ]; then
        echo "jobs: this is an old copy of a job that was requeued and runs elsewhere: exiting"
        exit 75
    fi
    if [ "${SLURM_RESTART_COUNT:-0}" -ge 10 ] && [ "$(cat "$RUN/latest" 2>/dev/null)" = "$latest" ]; then
        echo "jobs: start $((SLURM_RESTART_COUNT + 1)) of this job made no progress: the job is not requeued"
        exit $((code ? code : 1))
    fi
    case ${NEXT:-requeue} in
        requeue) scontrol requeue "$SLURM_JOB_ID" && sleep 60 ;; # the requeue ends this script
        chain) # the new job has the size and the time limit of this job
            sbatch --dependency="afterany:$SLURM_JOB_ID" --time="$(squeue -h -j "$SLURM_JOB_ID" -o %l)" \
                --nodes="$SLURM_NNODES" --ntasks-per-node="$SLURM_NTASKS_PER_NODE" --cpus-per-task="$SLURM_CPUS_PER_TASK" "$@"
            ;;
    esac
    exit 75
}

energy() { # print the energy of finished Slurm steps. After the job, `sacct -j JOB -o JobID,ConsumedEnergy` prints the total
    local joules
    joules=$(timeout 15 sacct -n -P -j "${SLURM_JOB_ID:-0}" -o JobID,ConsumedEnergy 2>/dev/null | awk -F'|' '$2 != "" && $2 != "0"')
    if [ "$joules" ]; then
        echo "jobs: energy from Slurm's accounting (Slurm step|J): $(echo $joules)"
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
        2 | 3 | 4) ;; # usage, data and checkpoint errors, which a restart does not fix
        75) echo "jobs: the run in $RUN was stopped; next: ${NEXT:-requeue}" && continue_later "$@" ;;
        *) if [ "$stop_requested" ]; then continue_later "$@"; fi ;;
    esac
    echo "jobs: the run in $RUN has not ended: the last exit code was $code"
    exit $((code ? code : 1))
}
