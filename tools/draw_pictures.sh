#!/usr/bin/env bash
# Draw the pictures in docs/: helix and 1F1B with the same work per layer (1 before attention, 8 for
# attention, 3 after it; backward twice forward) and free messages.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT

cat > "$WORK/helix-costs.json" <<'JSON'
{"segments": {"first": {"F": 1, "B": 2}, "middle": {"F": 4, "B": 8}, "last": {"F": 3, "B": 6},
              "attention": {"F": 8, "B": 16}}}
JSON
cat > "$WORK/1f1b-costs.json" <<'JSON'
{"segments": {"stage0": {"F": 24, "B": 48}, "stage1": {"F": 24, "B": 48},
              "stage2": {"F": 24, "B": 48}, "stage3": {"F": 24, "B": 48}}}
JSON

draw() { # schedule title
    "$PYTHON" -m helixpipe plan --schedule "$1" --num-layers 8 --pipeline-model-parallel-size 4 \
        --num-microbatches 8 --output "$WORK/$1.json"
    "$PYTHON" -m helixpipe draw --plan "$WORK/$1.json" --costs "$WORK/$1-costs.json" --until 800 \
        --title "$2" --output "docs/$1-p4.svg"
}
draw helix "Helix: 4 ranks, 8 layers, 8 micro batches, two-fold"
draw 1f1b "1F1B: 4 ranks, 8 layers, 8 micro batches"
