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

# The method of a run and what it changes in configs/quickstart.yaml, one key=value a word.
overrides() {
    case $1 in
        dense) echo method=dense ;;
        signsgd) echo method=signsgd server.lr=0.003 ;;
        topk) echo method.name=topk method.ratio=0.05 method.feedback=true ;;
        intrinsic) echo method.name=intrinsic method.dim=640 ;;
        lookback) echo method.name=lookback method.threshold=0.5 ;;
    esac
}

show() {
    printf '\n$ %s\n' "$*"
    "$@" </dev/null
}

rm -rf runs/demo
runs=()
for name in dense signsgd topk intrinsic lookback; do
    read -ra settings <<<"$(overrides "$name")"
    show launch/mpirun.sh -n 4 fedmpi train configs/quickstart.yaml --out "runs/demo/$name" "${settings[@]}" "$@"
    runs+=("runs/demo/$name")
done
show fedmpi report "${runs[@]}" --out runs/demo/report

pictures=("$ROOT"/runs/demo/report/*.png)
[[ -e ${pictures[0]} ]] || die "the report made no picture in runs/demo/report"
printf '\nPicture: %s\n' "${pictures[@]}"
