#!/usr/bin/env bash
# Lint, format, types and tests, from a fresh machine with Python 3.10+:
#     ./launch/test.sh [--full] [pytest arguments]
# --full runs the tests marked "slow" too (and sets FEDMPI_FULL=1). Everything is installed into .venv, a second MPI
# (MPICH) into .mpich, named to the tests by FEDMPI_MPICH; root gets Slurm from the system's packages; Horovod is built
# once, which takes minutes. All steps run; the exit code is 0 only if all passed.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

[[ " $* " != *" --full "* ]] || export FEDMPI_FULL=1 # tests/conftest.py knows --full too

cd "$ROOT"
extras=mpi,test,dev,hf,lightning
[[ -z ${FEDMPI_FULL:-} ]] || extras+=,docs,triton # the pages; 280 MB of kernels for GPUs, interpreted and compiled without one
ensure_venv "$extras"
ensure_mpich || echo "warning: no MPICH here; the tests that need it will be skipped" >&2
ensure_slurm || echo "warning: no Slurm here; the tests that need it will be skipped" >&2
"$ROOT/launch/install-horovod.sh" || echo "warning: no Horovod here; its tests will be skipped (with CI=true: fail)" >&2
mpi_env "$(cores)" # the tests start mpirun themselves

failed=()
step() {
    say "$*"
    "$@" || failed+=("$*")
}
step ruff check
step ruff format --check
step mypy
((${#failed[@]} == 0)) || say "failed so far: ${failed[*]}"
workers=$(($(cores) + 1)) # tests wait for processes, time limits and Slurm
# Last: its closing line is the last one printed. Its own arguments come after ours and win.
step pytest -n "$((workers > 4 ? 4 : workers))" --dist worksteal --cpu "$@"
((${#failed[@]} == 0))
