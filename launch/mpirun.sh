#!/usr/bin/env bash
# mpirun for one machine, without the traps (root, more ranks than cores, binding, threads: see mpi_env):
#     launch/mpirun.sh -n 4 fedmpi train configs/quickstart.yaml
# Takes the mpiexec of the active environment, else that of .venv beside launch/, be it Open MPI or MPICH.
# FEDMPI_MPI=mpich takes an MPICH of its own beside the environment's Open MPI: the one in FEDMPI_MPICH, or in .mpich,
# where ./launch/test.sh of the repository puts one.
# With Open MPI, --with-ft ulfm before -n lets a run go on without a rank that dies.
# For several machines use mpirun or srun themselves.
set -euo pipefail
# shellcheck source=launch/mpi.sh
source "$(dirname "${BASH_SOURCE[0]}")/mpi.sh"
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)

if ! command -v fedmpi >/dev/null && [[ -x $root/.venv/bin/fedmpi ]]; then
    export PATH=$root/.venv/bin:$PATH
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
    prefix=${FEDMPI_MPICH:-$root/.mpich}
    [[ -x $prefix/bin/mpiexec ]] || die "no MPICH in $prefix: name its folder in FEDMPI_MPICH"
    export MPI4PY_LIBMPI=$prefix/lib
    exec "$prefix/bin/mpiexec" "$@"
fi
command -v mpiexec >/dev/null || die "no mpiexec found: pip install 'fedmpi[mpi]' brings one, or load your site's module"
exec mpiexec "$@"
