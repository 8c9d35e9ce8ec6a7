#!/usr/bin/env bash
# A Slurm cluster on this machine alone, for trying and testing the sbatch files beside this script:
#     slurm/test-cluster.sh up       starts it, then prints the line that makes sbatch and srun find it
#     slurm/test-cluster.sh status   shows its nodes; exit code 0 when they are there
#     slurm/test-cluster.sh down     ends its jobs and stops its daemons, and only those
#     slurm/test-cluster.sh install  installs Debian's and Ubuntu's packages where they are missing; up does so too
# It has two nodes, each with this machine's CPUs (at least 8, so that small machines take the files as they are) and
# two GPUs that are none: this machine, and a slurmd with a host name of its own, which MPI takes for another machine.
# Where such a name cannot be had (not root, or a strict container), it has one node. Ports, keys, state and logs are
# its own, in $FEDMPI_SLURM (default: fedmpi-slurm-UID in $XDG_RUNTIME_DIR or $TMPDIR); nothing outside is touched.
set -euo pipefail

PACKAGES=(slurm-wlm munge libpmix-dev) # libpmix-dev holds the libpmix.so that slurmd loads for --mpi=pmix
DIR=${FEDMPI_SLURM:-${XDG_RUNTIME_DIR:-${TMPDIR:-/tmp}}/fedmpi-slurm-$(id -u)}
HOST=$(hostname -s)
export PATH=$PATH:/usr/sbin:/sbin SLURM_CONF=$DIR/slurm.conf

die() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

ready() {
    local program
    for program in slurmctld slurmd srun sbatch munged; do
        command -v $program >/dev/null || return 1
    done
    compgen -G '/usr/lib*/libpmix.so' >/dev/null || compgen -G '/usr/lib/*/libpmix.so' >/dev/null
}

install_packages() {
    ready && return
    if [[ $(id -u) != 0 ]] || ! command -v apt-get >/dev/null; then
        die "Slurm is missing; only root can install it, and here only with apt-get: ${PACKAGES[*]}"
    fi
    echo "installing ${PACKAGES[*]} (once)" >&2
    local options=(-q -y -o DPkg::Lock::Timeout=300 --no-install-recommends)
    { apt-get -q update && DEBIAN_FRONTEND=noninteractive apt-get "${options[@]}" install "${PACKAGES[@]}"; } \
        </dev/null >&2 || die "apt-get could not install ${PACKAGES[*]}; its messages are above"
    ready || die "Slurm is still incomplete with ${PACKAGES[*]} installed"
}

free_ports() { # prints $1 ports that nobody listens on
    local port=$((20000 + RANDOM % 10000)) left=$1
    while ((left > 0)); do
        port=$((port + 1))
        if ! (: <>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
            echo "$port"
            left=$((left - 1))
        fi
    done
}

write_conf() { # write_conf NODE...
    local ports cpus memory node me
    mapfile -t ports < <(free_ports $((1 + $#)))
    cpus=$(nproc --all) me=$(id -un)
    memory=$(($(getconf _PHYS_PAGES) * $(getconf PAGE_SIZE) / 1048576))
    cat <<END
ClusterName=fedmpi
SlurmctldHost=$HOST(127.0.0.1)
SlurmctldPort=${ports[0]}
SlurmUser=$me
SlurmdUser=$me
# A requeued job starts again when its old credential has expired.
AuthInfo=socket=$DIR/munge.socket,cred_expire=5
StateSaveLocation=$DIR/state
SlurmdSpoolDir=$DIR/%n
TmpFS=$DIR/%n
SlurmctldPidFile=$DIR/slurmctld.pid
SlurmdPidFile=$DIR/%n.pid
SlurmctldLogFile=$DIR/slurmctld.log
SlurmdLogFile=$DIR/%n.log
# Neither cgroups nor binding: containers often have neither.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
# Declared CPUs count, not those found.
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=0,bf_interval=1
ReturnToService=2
# A job of "urgent" takes the place of jobs of "compute", which have 30 seconds from SIGTERM to SIGKILL and start again.
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=30
GresTypes=gpu
NodeName=DEFAULT CPUs=$((cpus > 8 ? cpus : 8)) RealMemory=$memory Gres=gpu:2
PartitionName=DEFAULT Nodes=ALL MaxTime=1:00:00
PartitionName=compute Default=YES PriorityTier=1
PartitionName=gpu PriorityTier=1
PartitionName=urgent PriorityTier=2 PreemptMode=OFF
END
    ports=("${ports[@]:1}")
    for node; do
        echo "NodeName=$node NodeHostname=$node NodeAddr=127.0.0.1 Port=${ports[0]}"
        ports=("${ports[@]:1}")
    done
}

daemons() { # prints the process ids of this cluster's daemons: their command lines name its folder
    local file pid
    for file in "$DIR"/*.pid; do
        pid=$(cat "$file" 2>/dev/null) || continue
        ! tr '\0' ' ' 2>/dev/null <"/proc/$pid/cmdline" | grep -qF "$DIR/" || echo "$pid"
    done
}

running() { # every node answers
    local nodes
    [[ -n $(daemons) ]] && nodes=$(timeout 10 sinfo -h -N -p compute -o %T 2>/dev/null) && [[ -n $nodes ]] &&
        ! grep -qvE '^(idle|mixed|allocated|completing)$' <<<"$nodes"
}

up() {
    if running; then return; fi
    stop
    install_packages
    rm -rf "$DIR/state" "$DIR"/*.log "$DIR"/munge*
    local nodes=("$HOST") node
    if unshare --uts hostname "$HOST-2" 2>/dev/null; then nodes+=("$HOST-2"); fi
    mkdir -p "$DIR/state" "${nodes[@]/#/$DIR/}"
    write_conf "${nodes[@]}" >"$SLURM_CONF"
    echo "Name=gpu File=/dev/null,/dev/zero" >"$DIR/gres.conf"
    (umask 077 && head -c 1024 /dev/urandom >"$DIR/munge.key")
    # --force: others cannot reach a socket in a folder of ours, which munged would rather have.
    munged --force --socket="$DIR/munge.socket" --key-file="$DIR/munge.key" --pid-file="$DIR/munged.pid" \
        --seed-file="$DIR/munge.seed" --log-file="$DIR/munged.log" || die "munged did not start: see $DIR/munged.log"
    slurmctld -f "$SLURM_CONF" -c || die "slurmctld did not start: see $DIR/slurmctld.log"
    slurmd -f "$SLURM_CONF" -N "$HOST" || die "slurmd did not start: see $DIR/$HOST.log"
    for node in "${nodes[@]:1}"; do
        # shellcheck disable=SC2016  # the inner shell expands them
        unshare --uts sh -c 'hostname "$0" && exec slurmd -f "$SLURM_CONF" -N "$0"' "$node" ||
            die "slurmd did not start: see $DIR/$node.log"
    done
    local tries
    for tries in {1..300}; do
        if running; then return; fi
        sleep 0.1
    done
    sinfo -N >&2 || true
    die "the nodes did not become idle within $((tries / 10)) seconds: see the logs in $DIR"
}

stop() {
    local pids tries
    if running; then
        squeue -h -o %A | xargs -r scancel --full --signal=KILL || true
        squeue -h -o %A | xargs -r scancel || true
        for tries in {1..100}; do
            [[ -n $(squeue -h) ]] || break
            sleep 0.1
        done
    fi
    for tries in {1..100}; do
        pids=$(daemons)
        [[ -n $pids ]] || return 0
        # shellcheck disable=SC2086  # one word a process
        ((tries % 50 != 1)) || kill $pids 2>/dev/null || true
        sleep 0.1
    done
    die "still running after ten seconds: $pids"
}

locked() { # one at a time; the daemons must not inherit the lock
    (
        flock 9
        "$1" 9>&-
    ) 9>"$DIR/lock"
}

mkdir -p "$DIR"
[[ -O $DIR ]] || die "$DIR belongs to somebody else: set FEDMPI_SLURM to a folder of your own"
chmod 700 "$DIR"
case ${1-} in
    install) install_packages ;;
    up)
        locked up
        echo "export SLURM_CONF=$SLURM_CONF"
        ;;
    status)
        running || die "no cluster runs in $DIR; $0 up starts one"
        sinfo -N -o '%10N %10P %10T %5c %G'
        ;;
    down) locked stop ;;
    *) die "usage: $0 up|status|down|install" ;;
esac
