# shellcheck shell=bash
# Sourced by the scripts beside it: the virtual environment in .venv, MPICH in .mpich.
#
# One environment, two MPIs. mpi4py's wheel holds an extension module for each MPI ABI and takes the libmpi
# that it finds first, which is .venv/lib (Open MPI, extra "mpi"). MPI4PY_LIBMPI points it at another folder:
#     Open MPI:  .venv/bin/mpirun -n 3 .venv/bin/python script.py      (as root: mpi_env's variables)
#     MPICH:     MPI4PY_LIBMPI="$FEDMPI_MPICH/lib" "$FEDMPI_MPICH/bin/mpiexec" -n 3 .venv/bin/python script.py
# LD_LIBRARY_PATH alone is not enough (.venv/lib still comes first, and every process becomes rank 0 of 1), and
# MPI4PY_MPIABI must not be set alone: it chooses the module without loading the library.

# shellcheck source=launch/mpi.sh
source "$(dirname "${BASH_SOURCE[0]}")/mpi.sh"
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
VENV=$ROOT/.venv
MPICH=$ROOT/.mpich

say() { printf '\n==> %s\n' "$*"; }

find_python() { # prints the first Python that is new enough and can make virtual environments
    local p
    for p in ${PYTHON:+"$PYTHON"} python3 python3.14 python3.13 python3.12 python3.11 python3.10 python; do
        if "$p" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            "$p" -c 'import ensurepip, venv' 2>/dev/null ||
                die "$p has no venv module: install it (Debian, Ubuntu: apt-get install python3-venv)"
            echo "$p"
            return
        fi
    done
    die "Python 3.10 or newer is needed (python3 here: $(python3 --version 2>/dev/null || echo none)); PYTHON=/path/to/python names another"
}

# ensure_venv EXTRAS: .venv with fedmpi[EXTRAS] in it. A stamp per EXTRAS holds the checksum of what was asked for,
# so that a second run skips pip. The busy mark outlives a killed pip: such a .venv is built anew, as is one whose
# repository was moved (pip then runs from another path, or not at all). A .venv that others made is never deleted.
ensure_venv() {
    local extras=$1 busy=$VENV/.fedmpi-busy stamp want python
    stamp=$VENV/.fedmpi-installed-$extras
    want=$(cat "$ROOT/pyproject.toml" "$ROOT/launch/constraints.txt" | cksum)
    if [[ -e $busy ]] || ! "$VENV/bin/pip" --version 2>/dev/null | grep -qF " from $VENV/"; then
        [[ ! -e $VENV ]] || compgen -G "$VENV/.fedmpi-*" >/dev/null ||
            die "$VENV exists, does not work and was not made here: move it away and try again"
        [[ -w $ROOT ]] || die "cannot write in $ROOT, where .venv has to go"
        python=$(find_python)
        say "making $VENV with $("$python" --version)"
        rm -rf "$VENV"
        mkdir "$VENV" && touch "$busy"
        "$python" -m venv "$VENV"
    fi
    if [[ ! -e $stamp || $(<"$stamp") != "$want" ]]; then
        say "installing fedmpi[$extras] into $VENV (once; some minutes)"
        touch "$busy" || die "cannot write in $VENV"
        if ! (cd "$ROOT" && "$VENV/bin/pip" install --disable-pip-version-check -c launch/constraints.txt -e ".[$extras]"); then
            rm -f "$busy"
            die "pip could not install fedmpi[$extras]; its message is above"
        fi
        printf '%s\n' "$want" >"$stamp"
        rm -f "$busy"
    fi
    activate
}

activate() {
    export VIRTUAL_ENV=$VENV PATH=$VENV/bin:$PATH
    unset PYTHONHOME
}

# MPICH's wheel in a prefix of its own (--target would drop its lib/), for tests with a second MPI.
# Exports FEDMPI_MPICH if it is there.
ensure_mpich() {
    local want stamp=$MPICH/.fedmpi-installed
    want=$(grep '^mpich==' "$ROOT/launch/constraints.txt")
    if [[ ! -e $stamp || $(<"$stamp") != "$want" ]]; then
        say "installing $want into $MPICH (once)"
        rm -rf "$MPICH"
        "$VENV/bin/pip" install --disable-pip-version-check --ignore-installed --no-deps --prefix "$MPICH" "$want" &&
            printf '%s\n' "$want" >"$stamp" || return 1
    fi
    export FEDMPI_MPICH=$MPICH
}

# Slurm from the system's packages, for the tests: only root can install it.
ensure_slurm() {
    "$ROOT/slurm/test-cluster.sh" install
}
