# shellcheck shell=bash
# Sourced by the scripts beside it: what an MPI on one machine needs.

die() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

cores() { # processors that this process may use, a container's quota included
    local n quota period
    n=$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc 2>/dev/null || getconf _NPROCESSORS_ONLN) # nproc obeys both
    if read -r quota period 2>/dev/null </sys/fs/cgroup/cpu.max && [[ $quota != max ]]; then
        quota=$(((quota + period - 1) / period))
        n=$((quota < n ? quota : n))
    fi
    echo "$n"
}

# mpi_env RANKS: what Open MPI needs on one machine (MPICH needs nothing and ignores it): root allowed, more ranks
# than cores allowed, no binding, and no more threads than cores. Whatever is set already stays as it is, and inside a
# Slurm job slots, binding and threads are Slurm's business.
mpi_env() {
    export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
    [[ -z ${SLURM_JOB_ID-} ]] || return 0
    export PRTE_MCA_rmaps_default_mapping_policy=${PRTE_MCA_rmaps_default_mapping_policy-:oversubscribe}
    export PRTE_MCA_hwloc_default_binding_policy=${PRTE_MCA_hwloc_default_binding_policy-none}
    if [[ -z ${OMP_NUM_THREADS-} ]]; then
        local threads=$(($(cores) / $1))
        export OMP_NUM_THREADS=$((threads > 1 ? threads : 1))
    fi
}
