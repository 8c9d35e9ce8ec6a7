#!/usr/bin/env bash
# The link study: learning rates, steps to an accuracy, time a step from 10 Mb/s to no limit; a table and a picture:
#     ./launch/link-study.sh [DIR [MODEL]]    (as root, on Linux; DIR: runs/link, MODEL: mlp or cnn)
# About an hour on two quiet cores. What is there is not measured again: started anew it goes on where it was.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
cd "$ROOT"
[[ -n ${VIRTUAL_ENV-} ]] || ensure_venv mpi
[[ -d ${FEDMPI_DATA:-$HOME/.cache/fedmpi}/fashion-mnist ]] || python -m fedmpi data fetch fashion-mnist
folder=${1:-runs/link}
for part in tune time report; do
    python -m configs.studies.link_study "$part" "$folder" --model "${2:-mlp}"
done
cat "$folder/link.md"
