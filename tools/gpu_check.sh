#!/usr/bin/env bash
# Everything that needs a GPU, in one command: builds the kernels, tests them, measures. PYTHON names an interpreter with torch
# and megatron-core; results go to $OUT if that is set, else to benchmarks/. QUICK=1 measures short sequences only.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
PYTHON=${PYTHON:-python3}
OUT=${OUT:-benchmarks}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
failed=0

"$PYTHON" -m helixpipe.kernels || exit 1
"$PYTHON" -m pytest -q -o timeout=300 -p no:cacheprovider tests/kernels 2>&1 | tee "${TMPDIR:-/tmp}/gpu_tests.log" | tail -n 40
[ "${PIPESTATUS[0]}" -eq 0 ] || failed=1
# Several ranks share the GPU over gloo; NCCL takes a GPU per rank.
"$PYTHON" -m pytest -q -o timeout=300 -p no:cacheprovider tests/equivalence -m "not slow" -k "${RANKS:-pp1 or pp2-tp1 or nccl}" 2>&1 |
    tee -a "${TMPDIR:-/tmp}/gpu_tests.log" | tail -n 40
[ "${PIPESTATUS[0]}" -eq 0 ] || failed=1
[ "$OUT" = benchmarks ] || cp "${TMPDIR:-/tmp}/gpu_tests.log" "$OUT/gpu_tests.log"
"$PYTHON" benchmarks/layer.py ${QUICK:+--quick} --minutes "${MINUTES:-7}" --output "$OUT/results.csv" || failed=1
exit "$failed"
