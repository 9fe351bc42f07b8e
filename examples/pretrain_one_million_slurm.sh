#!/usr/bin/env bash
#SBATCH --job-name=helixpipe-one-million
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
# One sequence of 1048576 tokens per iteration through Llama 8B on 64 GPUs: sliced helix fills the pipeline with
# the slices of a single sequence. From the checkout:
#
#   sbatch examples/pretrain_one_million_slurm.sh /data/corpus /checkpoints/1m [more pretrain_gpt.py arguments]
#
# What it would do, on a machine of any kind and without the data:
#
#   bash examples/pretrain_one_million_slurm.sh /data/corpus /checkpoints/1m --dry-run h100 --vocab-size 128256
set -euo pipefail

usage="usage: sbatch examples/pretrain_one_million_slurm.sh DATA_PREFIX CHECKPOINT_DIR [ARGUMENTS...]"
DATA_PREFIX=${1:?$usage}
CHECKPOINTS=${2:?$usage}
shift 2
# As above, for --dry-run.
export NODES=8 GPUS_PER_NODE=8

cd "${SLURM_SUBMIT_DIR:-$PWD}"
exec bash examples/slurm/job.sh pretrain_gpt.py \
    --pipeline-schedule sliced-helix --num-fold 2 --head-placement spread \
    --pipeline-model-parallel-size 8 --tensor-model-parallel-size 8 --sequence-parallel \
    --num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32 \
    --group-query-attention --num-query-groups 8 --rotary-base 500000000 \
    --seq-length 1048576 --max-position-embeddings 1048576 \
    --micro-batch-size 1 --global-batch-size 1 --train-iters 1000 --eval-iters 0 \
    --lr 2e-5 --min-lr 2e-6 --lr-decay-style cosine --lr-warmup-iters 20 --clip-grad 1.0 \
    --swiglu --normalization RMSNorm --position-embedding-type rope --disable-bias-linear \
    --untie-embeddings-and-output-weights --bf16 --use-distributed-optimizer --loss-chunk-size auto \
    --data-path "$DATA_PREFIX" --save "$CHECKPOINTS" --save-interval 100 --load "$CHECKPOINTS" \
    --metrics-jsonl "$CHECKPOINTS/metrics.jsonl" "$@"
