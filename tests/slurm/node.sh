# A virtual node: a network namespace with one cable to a bridge, and in it a slurmd that has a host name, a /dev/shm and a local
# disk ($ROOT/local) of its own. All other files are the machine's: the cluster's shared file system. Sourced by cluster.sh.
NETWORK=10.213.77 # .1, .2, ... are the nodes, .254 is the machine itself, where slurmctld runs
PMIX=/usr/lib/$(uname -m)-linux-gnu/pmix2/lib

quietly() {
    "$@" </dev/null >/dev/null 2>&1
}

can_make_nodes() {
    quietly ip netns add mpidp-try && quietly ip link add mpidp-try type bridge && quietly unshare --mount --uts true
    local can=$?
    quietly ip link del mpidp-try
    quietly ip netns del mpidp-try
    return $can
}

make_network() {
    ip link add mpidp0 type bridge
    ip addr add "$NETWORK.254/24" dev mpidp0
    ip link set mpidp0 up
    {
        echo "127.0.0.1 localhost"
        echo "$NETWORK.254 $HOST"
        for i in $(seq "$NODES"); do echo "$NETWORK.$i node$i"; done
    } >"$ROOT/hosts"
}

remove_network() {
    quietly ip link del mpidp0 || true
}

start_node() { # also one that has crashed
    local ns=mpidp-node$1
    if [ ! -e "/run/netns/$ns" ]; then
        ip netns add "$ns"
        ip link add "mpidp$1" type veth peer name eth0 netns "$ns"
        ip link set "mpidp$1" master mpidp0 up
        ip -n "$ns" link set lo up
        ip -n "$ns" addr add "$NETWORK.$1/24" dev eth0
        ip -n "$ns" link set eth0 up
    fi
    mkdir -p "$ROOT/local" "$ROOT"/{spool,tmp,local}."node$1"
    # not `ip netns exec`: it mounts /sys anew, and slurmd dies. The Open MPI of PyPI has no psec/munge: offer what it knows.
    PMIX_MCA_psec=native quietly nsenter --net="/run/netns/$ns" unshare --uts --mount sh -ec "
        hostname node$1
        mount --bind '$ROOT/hosts' /etc/hosts
        mount --bind '$ROOT/local.node$1' '$ROOT/local'
        mount --bind '$ROOT/pmix' $PMIX
        mount -t tmpfs tmpfs /dev/shm
        exec $FIRST slurmd -N node$1"
}

crash_node() {
    end "$ROOT/slurmd.node$1.pid" KILL
    ip netns pids "mpidp-node$1" | xargs -r kill -KILL 2>/dev/null || true
}

remove_node() {
    crash_node "$1"
    quietly ip link del "mpidp$1" || true
    quietly ip netns del "mpidp-node$1" || true
}

running() { # a daemon, by its pid file
    local pid
    pid=$(cat "$1" 2>/dev/null) && grep -qsE "\((slurmd|slurmctld|munged)\) [^Z]" "/proc/$pid/stat"
}

end() { # a daemon, by its pid file; returns when it is gone
    if running "$1"; then kill -"$2" "$(cat "$1")" || true; fi
    while running "$1"; do sleep 0.05; done
    rm -f "$1"
}
