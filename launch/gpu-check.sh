#!/usr/bin/env bash
# What only a machine with a GPU can show, in about four minutes, a JSON line a figure:
#     launch/gpu-check.sh [--device cuda|cpu] [--small] [--out FILE] [PHASE ...]
# Phases, the most telling first: facts, tests, kernels, hook, ranks, train, rounds (tests/jobs/gpu_check.py says what
# each does).
# Each is a process of its own with a time limit; one that fails does not keep the others from running. The exit code
# is 0 only if all said what was expected. --device cpu --small tries the script itself where there is no GPU.
# PYTHON names the interpreter (default: .venv's, where there is one), which needs torch for the GPU's CUDA, fedmpi and
# pytest; the hook's phase takes GPT-2 where transformers is installed, else a perceptron.
# This script has not yet been run on a GPU.
set -uo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
cd "$ROOT" || exit 1

device=cuda small=() out=/dev/null phases=()
while (($#)); do
    case $1 in
        --device) device=${2:?--device: expected cuda or cpu} && shift ;;
        --small) small=(--small) ;;
        --out) out=${2:?--out: expected a file} && shift ;;
        -*)
            echo "gpu-check.sh: expected --device, --small, --out or a phase, got $1" >&2
            exit 2
            ;;
        *) phases+=("$1") ;;
    esac
    shift
done
((${#phases[@]})) || phases=(facts tests kernels hook ranks train rounds)

python=${PYTHON:-}
[[ -n $python || ! -x .venv/bin/python ]] || python=.venv/bin/python
python=${python:-python3}
export PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH}

declare -A limit=([facts]=30 [tests]=120 [train]=60 [kernels]=60 [hook]=150 [ranks]=120 [rounds]=60)
: >"$out"
failed=0 scale=1
[[ $device == cuda* ]] || scale=5 # a CPU takes longer
for phase in "${phases[@]}"; do
    timeout --kill-after 5 $((${limit[$phase]:-60} * scale)) \
        "$python" tests/jobs/gpu_check.py "$phase" --device "$device" "${small[@]}" | tee -a "$out"
    code=${PIPESTATUS[0]}
    if ((code)); then
        failed=1
        printf '{"phase": "%s", "exit": %d}\n' "$phase" "$code" | tee -a "$out"
    fi
done
exit "$failed"
