#!/usr/bin/env bash
# Draw the pictures in docs/: schedules with the same work per layer (1 before attention, 8 for attention, 3 after
# it; backward twice forward), free messages and one time axis; and rounds of helix one after the other and
# interlocked, where attention takes most of the time.
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

cat > "$WORK/interleaved-costs.json" <<'JSON'
{"segments": {"stage0": {"F": 12, "B": 24}, "stage1": {"F": 12, "B": 24}, "stage2": {"F": 12, "B": 24},
              "stage3": {"F": 12, "B": 24}, "stage4": {"F": 12, "B": 24}, "stage5": {"F": 12, "B": 24},
              "stage6": {"F": 12, "B": 24}, "stage7": {"F": 12, "B": 24}}}
JSON
# Attention has no weights; of the rest of a layer's backward, half is for them.
cat > "$WORK/zb-h1-costs.json" <<'JSON'
{"segments": {"stage0": {"F": 24, "B": 40, "W": 8}, "stage1": {"F": 24, "B": 40, "W": 8},
              "stage2": {"F": 24, "B": 40, "W": 8}, "stage3": {"F": 24, "B": 40, "W": 8}}}
JSON

draw() { # schedule, title, further options
    local schedule=$1 title=$2
    shift 2
    "$PYTHON" -m helixpipe plan --schedule "$schedule" --num-layers 8 --pipeline-model-parallel-size 4 \
        --num-microbatches 8 "$@" --output "$WORK/$schedule.json"
    "$PYTHON" -m helixpipe draw --plan "$WORK/$schedule.json" --costs "$WORK/$schedule-costs.json" --until 800 \
        --title "$title" --output "docs/$schedule-p4.svg"
}
cat > "$WORK/rounds-costs.json" <<'JSON'
{"segments": {"first": {"F": 1, "B": 2}, "middle": {"F": 2, "B": 2, "W": 2}, "last": {"F": 3, "B": 4, "W": 2},
              "attention": {"F": 8, "B": 18, "W": 2}}}
JSON
draw_rounds() { # round order, name, title, further options
    local order=$1 name=$2 title=$3
    shift 3
    "$PYTHON" -m helixpipe plan --schedule helix --num-layers 8 --pipeline-model-parallel-size 4 --num-fold 1 \
        --num-microbatches 12 --attention-range block --head-placement spread --round-order "$order" "$@" \
        --output "$WORK/$name.json"
    "$PYTHON" -m helixpipe draw --plan "$WORK/$name.json" --costs "$WORK/rounds-costs.json" --until 950 \
        --title "$title" --output "docs/$name.svg"
}
draw_rounds filo rounds-filo "Helix, rounds one after the other: 4 ranks, 8 layers, 12 micro batches"
draw_rounds interlocked rounds-interlocked "The same work, rounds interlocked, with weight gradients apart" \
    --split-weight-gradients --costs "$WORK/rounds-costs.json"
cat > "$WORK/sliced.py" <<'PY'
# Eight slices, each with the work of a micro batch of the other pictures.
import json, sys

times = {"first": (1, 2), "middle": (4, 8), "last": (3, 6), "attention": (8, 16)}
segments = {f"{name}/slice{i}": {"F": f, "B": b} for name, (f, b) in times.items() for i in range(8)}
json.dump({"segments": segments}, sys.stdout)
PY
"$PYTHON" "$WORK/sliced.py" > "$WORK/sliced-costs.json"
"$PYTHON" -m helixpipe plan --schedule sliced-helix --num-layers 8 --pipeline-model-parallel-size 4 \
    --num-microbatches 1 --num-fold 2 --head-placement spread --output "$WORK/sliced.json"
"$PYTHON" -m helixpipe draw --plan "$WORK/sliced.json" --costs "$WORK/sliced-costs.json" --until 800 \
    --title "Sliced helix: 4 ranks, 8 layers, one sequence in 8 slices" --output docs/sliced-p4.svg
draw helix "Helix: 4 ranks, 8 layers, 8 micro batches, two-fold"
draw 1f1b "1F1B: 4 ranks, 8 layers, 8 micro batches"
draw interleaved "Interleaved 1F1B: 4 ranks, 8 layers, 8 micro batches, 2 virtual stages" --virtual-stages 2
draw zb-h1 "ZB-H1: 4 ranks, 8 layers, 8 micro batches"
