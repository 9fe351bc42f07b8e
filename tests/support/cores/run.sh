#!/usr/bin/env bash
# The tests that depend on megatron-core, once with each release in $CORES; ends with an error if any fails.
set -u
# Whole paths: some tests start processes in other folders.
here=$PWD
failed=()
for core in "$(realpath "$CORES")"/[0-9]*; do
    echo "== megatron-core $(basename "$core")"
    PYTHONPATH="$core:$here/tests/support/cores:$here" OMP_NUM_THREADS=1 "$PYTHON" -m pytest -q -m "not slow" \
        tests/layers tests/adapter tests/equivalence tests/megatron_lm tests/pretrain tests/e2e/test_pretrain.py \
        tests/architecture/test_contact_points.py tests/architecture/test_wheel.py || failed+=("$(basename "$core")")
done
if ((${#failed[@]})); then
    echo "failed with: ${failed[*]}" >&2
    exit 1
fi
