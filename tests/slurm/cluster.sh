#!/bin/bash
# A real Slurm on this one machine, to be thrown away: slurmctld, slurmd and munged of Debian's packages; no systemd, no cgroups.
# Its nodes are virtual (node.sh). Everything of it is in $ROOT: /etc/slurm and /etc/munge are neither read nor written.
#
#   cluster.sh start           install what is missing, start, wait until every node is idle
#   cluster.sh stop            end all of it, remove $ROOT
#   cluster.sh reset           no jobs, all nodes as after start
#   cluster.sh status
#   cluster.sh node-down N     node N crashes: its slurmd and every process on it are killed
#   cluster.sh slurmd-down N   its slurmd alone is killed: what runs on it goes on
#   cluster.sh node-up N       it comes back
#   cluster.sh net-down N      its cable is pulled; net-up N: and plugged in again
#
# Talk to it with `export SLURM_CONF=$ROOT/slurm.conf`. Environment: ROOT, NODES=3, CPUS (a node's cores; default: the machine's).
# Exit code 77, and one line that begins with "skipped:", where it cannot run.
set -euo pipefail
ROOT=${ROOT:-/var/tmp/mpidp-slurm} NODES=${NODES:-3} CPUS=${CPUS:-$(env -u OMP_NUM_THREADS nproc)}
HERE=$(cd "$(dirname "$0")" && pwd) HOST=$(hostname -s)
FIRST="nice -n -20" # daemons must answer while ranks keep every core busy; jobs get the priority of whoever submits them
PACKAGES="slurmctld slurmd slurm-client munge libpmix2 iproute2"
export SLURM_CONF=$ROOT/slurm.conf
source "$HERE/node.sh"

skipped() {
    echo "skipped: $*"
    exit 77
}

install_packages() {
    local apt="apt-get install -qq -y --no-install-recommends $PACKAGES" said
    export DEBIAN_FRONTEND=noninteractive
    if ! dpkg -s $PACKAGES >/dev/null 2>&1; then
        said=$( ($apt || { apt-get update -qq && $apt; }) 2>&1 </dev/null) ||
            skipped "packages absent (apt-get failed: $(tail -n 1 <<<"$said")): $PACKAGES"
    fi
}

configure() {
    local nodes="" i
    for i in $(seq "$NODES"); do
        nodes+="NodeName=node$i NodeAddr=$NETWORK.$i CPUs=$CPUS CoresPerSocket=$CPUS RealMemory=4000 Gres=gpu:$CPUS\n"
    done
    sed -e "s|@ROOT@|$ROOT|; s|@HOST@|$HOST|; s|@CONTROLLER@|$NETWORK.254|; s|@NODES@|$nodes|" "$HERE/slurm.conf" >"$SLURM_CONF"
    echo "NodeName=node[1-$NODES] Name=gpu File=$ROOT/gpu[1-$CPUS]" >"$ROOT/gres.conf"
    for i in $(seq "$CPUS"); do mknod "$ROOT/gpu$i" c 1 3; done
    # with no plugin named, slurmd looks for cgroups and dies where none are mounted; nothing here uses them
    echo "CgroupPlugin=cgroup/v1" >"$ROOT/cgroup.conf"
    # mpi/pmix opens a name that only libpmix-dev ships
    cp -r $PMIX "$ROOT/pmix"
    ln -sf libpmix.so.2 "$ROOT/pmix/libpmix.so"
}

start_munged() {
    (umask 077 && head -c 128 /dev/urandom >"$ROOT/munge.key")
    $FIRST munged --force --socket="$ROOT/munge.socket" --key-file="$ROOT/munge.key" --pid-file="$ROOT/munged.pid" \
        --log-file="$ROOT/munged.log" --seed-file="$ROOT/munge.seed" </dev/null
}

usable_nodes() {
    sinfo -h -N -o "%N %t" 2>/dev/null | grep -cE " (idle|mix|alloc)$" || true
}

wait_for_nodes() { # as many as should be usable
    for _ in $(seq 100); do
        [ "$(usable_nodes)" != "$1" ] || return 0
        sleep 0.1
    done
    sinfo -N -l
    tail -n 5 "$ROOT"/*.log
    exit 1
}

start() {
    [ "$(id -u)" = 0 ] || skipped "not root: virtual nodes need network namespaces"
    install_packages
    can_make_nodes || skipped "network namespaces are not permitted here"
    [ "$CPUS" -gt 1 ] || skipped "one core: the tests want two ranks a node"
    [ ! -e "$ROOT" ] || stop
    mkdir -p "$ROOT/state"
    configure
    start_munged
    make_network
    $FIRST slurmctld -c </dev/null >/dev/null 2>&1
    for i in $(seq "$NODES"); do
        start_node "$i"
    done
    wait_for_nodes "$NODES"
}

reset() {
    scancel --user=root --full --signal=KILL 2>/dev/null || true
    scancel --user=root
    for i in $(seq "$NODES"); do
        ip link set "mpidp$i" up
        if ! running "$ROOT/slurmd.node$i.pid"; then crash_node "$i" && start_node "$i"; fi
        scontrol update NodeName="node$i" State=RESUME 2>/dev/null || true
    done
    for _ in $(seq 150); do
        [ -n "$(squeue -h)" ] || break
        sleep 0.1
    done
    wait_for_nodes "$NODES"
}

stop() {
    local n
    for n in /run/netns/mpidp-node*; do
        [ ! -e "$n" ] || remove_node "${n##*node}"
    done
    end "$ROOT/slurmctld.pid" KILL
    end "$ROOT/munged.pid" TERM
    remove_network
    rm -rf "$ROOT"
}

case ${1:-} in
    start) start ;;
    stop) stop ;;
    reset) reset ;;
    status) sinfo -N -l && squeue ;;
    node-down) crash_node "$2" ;;
    slurmd-down) end "$ROOT/slurmd.node$2.pid" KILL ;;
    node-up) start_node "$2" ;;
    net-down) ip link set "mpidp$2" down ;;
    net-up) ip link set "mpidp$2" up ;;
    *)
        sed -n '2,16p' "$0"
        exit 2
        ;;
esac
