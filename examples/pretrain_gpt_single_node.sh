#!/usr/bin/env bash
# A GPT on the GPUs of one node: helix over all of them.
#
#   bash examples/pretrain_gpt_single_node.sh /data/corpus [more pretrain_gpt.py arguments]
#
# With --dry-run h100 --vocab-size 32000 at its end it prints what it would do, without GPUs and data.
set -euo pipefail
cd "$(dirname "$0")/.."

DATA_PREFIX=${1:?usage: $0 DATA_PREFIX [ARGUMENTS...]}
shift
GPUS=${GPUS:-8}

. examples/environment.sh
"${PYTHON:-python3}" -m helixpipe train --nproc-per-node "$GPUS" \
    --pipeline-schedule helix --pipeline-model-parallel-size "$GPUS" \
    --num-layers 24 --hidden-size 2048 --num-attention-heads 16 --seq-length 16384 \
    --bf16 --micro-batch-size 1 --global-batch-size $((2 * GPUS)) --train-iters 1000 \
    --lr 3e-4 --min-lr 3e-5 --lr-decay-style cosine --lr-warmup-iters 50 \
    --data-path "$DATA_PREFIX" --metrics-jsonl metrics.jsonl "$@"
