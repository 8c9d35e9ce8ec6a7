#!/usr/bin/env bash
# mpirun for one machine, without the traps (root, more ranks than cores, binding, threads: see mpi_env):
#     launch/mpirun.sh -n 4 fedmpi train configs/quickstart.yaml
# Takes the mpiexec of the active environment, else of .venv, be it Open MPI or MPICH. FEDMPI_MPI=mpich takes the
# MPICH that ./launch/test.sh has put into .mpich (or the one at $FEDMPI_MPICH), with the same Python environment.
# With Open MPI, --with-ft ulfm before -n lets a run go on without a rank that dies.
# For several machines use mpirun or srun themselves.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

if ! command -v fedmpi >/dev/null && [[ -x $VENV/bin/fedmpi ]]; then
    activate
fi

ranks=$(cores) # Open MPI's own default
previous=
for argument; do
    if [[ $previous =~ ^(-n|-np|--np)$ && $argument =~ ^[1-9][0-9]*$ ]]; then
        ranks=$argument
        break
    fi
    previous=$argument
done
mpi_env "$ranks"

if [[ ${FEDMPI_MPI-} == mpich ]]; then
    prefix=${FEDMPI_MPICH:-$MPICH}
    [[ -x $prefix/bin/mpiexec ]] || die "no MPICH in $prefix: ./launch/test.sh installs it"
    export MPI4PY_LIBMPI=$prefix/lib
    exec "$prefix/bin/mpiexec" "$@"
fi
command -v mpiexec >/dev/null || die "no mpiexec found: ./launch/demo.sh installs one, or load your site's MPI module"
exec mpiexec "$@"
