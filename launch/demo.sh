#!/usr/bin/env bash
# From a fresh machine with Python 3.10+ to a table of five methods and a picture:
#     ./launch/demo.sh [key.path=value ...]
# Installs into .venv (the first time only), trains the quickstart once per method on 4 MPI ranks, writes runs/demo.
# Arguments are appended to every run, e.g. rounds=20.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
cd "$ROOT"
ensure_venv mpi

launch/mpirun.sh -n 4 fedmpi demo --out runs/demo "$@" </dev/null

pictures=("$ROOT"/runs/demo/report/*.png)
[[ -e ${pictures[0]} ]] || die "the report made no picture in runs/demo/report"
printf '\nPicture: %s\n' "${pictures[@]}"
