#!/usr/bin/env bash
# Documents of very different lengths on the GPUs of one node, each a sample of its own, the longest of 131072
# tokens: elastic pipelines split long ones and pack short ones, anew for every batch.
#
#   bash examples/pretrain_variable_lengths.sh /data/corpus h100 [more pretrain_gpt.py arguments]
#
# What chunks cost is predicted for the named machine, into elastic-costs.json; better measured once:
# docs/elastic.md. With --dry-run at its end it plans the first batch of the data, without GPUs.
set -euo pipefail
cd "$(dirname "$0")/.."

usage="usage: $0 DATA_PREFIX HARDWARE [ARGUMENTS...]"
DATA_PREFIX=${1:?$usage}
HARDWARE=${2:?$usage}
shift 2
GPUS=${GPUS:-8}
COSTS=${COSTS:-elastic-costs.json}
PYTHON=${PYTHON:-python3}

. examples/environment.sh
[ -e "$COSTS" ] || "$PYTHON" -m helixpipe elastic-costs --model examples/pretrain_variable_lengths.sh --vocab-size 32000 \
    --hardware "$HARDWARE" --pipeline-model-parallel-size "$GPUS" --output "$COSTS"
"$PYTHON" -m helixpipe train --nproc-per-node "$GPUS" \
    --pipeline-schedule elastic --elastic-costs "$COSTS" --memory-limit-gib 72 --max-seq-length 131072 \
    --pipeline-model-parallel-size "$GPUS" \
    --num-layers 24 --hidden-size 2048 --ffn-hidden-size 5504 --num-attention-heads 16 --seq-length 131072 \
    --swiglu --normalization RMSNorm --position-embedding-type rope --disable-bias-linear \
    --untie-embeddings-and-output-weights \
    --bf16 --micro-batch-size 1 --global-batch-size 128 --train-iters 1000 --eval-iters 0 \
    --lr 3e-4 --min-lr 3e-5 --lr-decay-style cosine --lr-warmup-iters 50 \
    --data-path "$DATA_PREFIX" --metrics-jsonl metrics.jsonl "$@"
