#!/usr/bin/env bash
# Everything that needs a GPU, in one command, on a machine with torch and megatron-core and nothing else:
#
#   tools/gpu_check.sh [--wheels FOLDER] [--output FOLDER] [--quick] [PART...]
#
#   --wheels   where the wheels of what is missing lie, for a machine without network (the first line names them)
#   --output   where logs and the layer's table go (default: runs/gpu_check)
#   --quick    measure short sequences only
#   PART       build, kernels, units, nccl, train, rates, layer (default: all)
#   PYTHON     the interpreter to use (default: python3)
#
# Ends with a row per part and one verdict: exit code 0, 1 if a part failed, 2 if it cannot start.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2
PYTHON=${PYTHON:-python3}
PARTS=(build kernels units nccl train rates layer)

fail() {
    printf 'gpu_check: error: %s\n' "$1"
    exit 2
}

wheels='' output=runs/gpu_check quick='' wanted=()
while [ $# -gt 0 ]; do
    case $1 in
        --wheels | --output)
            [ $# -gt 1 ] || fail "$1 needs a folder"
            [ "$1" = --wheels ] && wheels=$2 || output=$2
            shift
            ;;
        --quick) quick=1 ;;
        *)
            [[ " ${PARTS[*]} " == *" $1 "* ]] || fail "there is no part $1; choose from ${PARTS[*]}"
            wanted+=("$1")
            ;;
    esac
    shift
done
[ "${#wanted[@]}" -gt 0 ] || wanted=("${PARTS[@]}")
[ -z "$wheels" ] || [ -d "$wheels" ] || fail "--wheels $wheels is no folder"
mkdir -p "$output" || exit 2
output=$(cd "$output" && pwd)
export PYTHONPATH="$PWD:$output/site${PYTHONPATH:+:$PYTHONPATH}" OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# Four lines: packages that are missing, the number of GPUs, the machine, the number of tests to run at once.
look() {
    "$PYTHON" -W ignore -c '
from importlib.util import find_spec
# By module, with what they import themselves: packages are brought without their dependencies.
needed = {"numpy": "numpy", "megatron": "megatron-core", "packaging": "packaging", "psutil": "psutil", "scipy": "scipy",
          "pytest": "pytest", "iniconfig": "iniconfig", "pluggy": "pluggy", "pygments": "pygments", "pytest_timeout": "pytest-timeout",
          "hypothesis": "hypothesis", "sortedcontainers": "sortedcontainers", "rich": "rich", "markdown_it": "markdown-it-py",
          "mdurl": "mdurl"}
missing = [package for module, package in needed.items() if find_spec(module) is None]
print(*missing)
import platform, torch
gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
print(gpus)
device = f"{gpus} x {torch.cuda.get_device_name()}" if gpus else "no GPU"
print(f"{device}, Python {platform.python_version()}, torch {torch.__version__}")
import os
print(min(8, (os.cpu_count() or 1) // 2) if find_spec("xdist") else 0)
'
}

found=$(look 2>/dev/null) || fail "$PYTHON has no torch; set PYTHON to an interpreter that has it"
mapfile -t machine <<<"$found"
read -ra missing <<<"${machine[0]}"
gpus=${machine[1]}
hardware=$(grep -oiE '\b(gb200|b200|h200|h100|h800|h20|a100|a800)\b' <<<"${machine[2]}" | head -n 1 | tr '[:upper:]' '[:lower:]')
workers=()
[ "${machine[3]:-0}" -lt 2 ] || workers=(-n "${machine[3]}")
if [ "${#missing[@]}" -gt 0 ]; then
    source=(--retries 0 --timeout 10)
    [ -z "$wheels" ] || source=(--no-index --find-links "$wheels")
    # Without dependencies: another numpy in front of the one that torch was tried with would be a second change.
    "$PYTHON" -m pip install --quiet --no-deps --target "$output/site" "${source[@]}" "${missing[@]}" >"$output/pip.log" 2>&1 ||
        fail "${missing[*]} cannot be installed ($output/pip.log); with network, run pip download --no-deps --dest FOLDER ${missing[*]}, then give --wheels FOLDER"
    echo "gpu_check: ${machine[2]}; brought ${missing[*]} from ${wheels:-the package index}"
else
    echo "gpu_check: ${machine[2]}; nothing is missing"
fi

verdicts=() seconds=() failed=()

note() { # part, verdict
    verdicts+=("$1"$'\t'"$2")
    seconds+=("$((SECONDS - started))")
    [[ $2 != FAILED* ]] || failed+=("$1")
    echo "gpu_check: $1: $2"
}

# Run a part's command, and note how it ended; skipped tests are not passed ones.
attempt() { # part, command...
    local part=$1 log=$output/$1.log status=0 last
    shift
    "$@" 2>&1 | tee "$log" | tail -n 20
    status=${PIPESTATUS[0]}
    last=$(grep -E '[0-9]+ (passed|skipped|failed)' "$log" | tail -n 1)
    if [ "$status" -ne 0 ] && [ "$status" -ne 5 ]; then
        note "$part" "FAILED with $status, see $log"
    elif [ "$status" -eq 5 ] || [[ -n $last && $last != *passed* ]]; then
        note "$part" "FAILED: no test ran, see $log"
    else
        note "$part" "passed${last:+ ($last)}"
    fi
}

tests() { # part, pytest arguments...
    local part=$1
    shift
    attempt "$part" "$PYTHON" -m pytest -q -o timeout=300 -p no:cacheprovider -m "not slow" --durations=20 \
        "${workers[@]}" "$@"
}

for part in "${wanted[@]}"; do
    started=$SECONDS
    if [ "$gpus" -eq 0 ]; then
        note "$part" "skipped: no GPU"
        continue
    fi
    case $part in
        build)
            if "$PYTHON" -c 'import sys; from helixpipe.kernels.build import find_nvcc; sys.exit(find_nvcc() is None)'; then
                attempt build "$PYTHON" -m helixpipe.kernels
            else
                note build "skipped: no nvcc"
            fi
            ;;
        kernels) tests kernels tests/kernels tests/layers/test_attention_on_gpu.py ;;
        # What computes on a CPU everywhere, with this machine's Python and torch.
        units) CUDA_VISIBLE_DEVICES='' tests units tests/layers tests/runtime tests/adapter ;;
        # Ranks that share the GPU, where there are fewer: against Megatron's schedules, then whole jobs.
        nccl) tests nccl tests/equivalence/test_nccl.py ;;
        train) tests train tests/e2e/test_training_on_gpu.py ;;
        rates)
            if [ -z "$hardware" ]; then
                note rates "skipped: the planner has no rates of this GPU"
            else
                attempt rates "$PYTHON" benchmarks/rates.py ${quick:+--seq-lengths 2048} --hardware "$hardware"
            fi
            ;;
        layer) attempt layer "$PYTHON" benchmarks/layer.py ${quick:+--quick} --minutes "${MINUTES:-7}" --output "$output/results.csv" ;;
    esac
done

echo
printf '%-8s %8s  %s\n' part seconds verdict
for index in "${!verdicts[@]}"; do
    printf '%-8s %8s  %s\n' "${verdicts[index]%%$'\t'*}" "${seconds[index]}" "${verdicts[index]#*$'\t'}"
done
if [ "${#failed[@]}" -gt 0 ]; then
    echo "gpu_check failed: ${failed[*]}"
    exit 1
fi
if [[ "${verdicts[*]}" != *$'\t'passed* ]]; then
    echo "gpu_check: nothing ran"
else
    echo "gpu_check passed, but for what was skipped"
fi
