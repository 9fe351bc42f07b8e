#!/usr/bin/env bash
#SBATCH --job-name=helixpipe-llama-70b
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
# Llama 70B with 131072 tokens on 64 GPUs: slices of one sequence in the slots of helix, so that a rank keeps the
# activations of one sequence, not of sixteen. From the checkout:
#
#   sbatch examples/pretrain_llama_70b_slurm.sh /data/corpus /checkpoints/70b [more pretrain_gpt.py arguments]
#
# What it would do, on a machine of any kind and without the data:
#
#   bash examples/pretrain_llama_70b_slurm.sh /data/corpus /checkpoints/70b --dry-run h20 --vocab-size 128256
set -euo pipefail

usage="usage: sbatch examples/pretrain_llama_70b_slurm.sh DATA_PREFIX CHECKPOINT_DIR [ARGUMENTS...]"
DATA_PREFIX=${1:?$usage}
CHECKPOINTS=${2:?$usage}
shift 2
# As above, for --dry-run.
export NODES=8 GPUS_PER_NODE=8

cd "${SLURM_SUBMIT_DIR:-$PWD}"
exec bash examples/slurm/job.sh pretrain_gpt.py \
    --pipeline-schedule sliced-helix --num-fold 2 --head-placement spread \
    --pipeline-model-parallel-size 8 --tensor-model-parallel-size 8 --sequence-parallel \
    --num-layers 80 --hidden-size 8192 --ffn-hidden-size 28672 --num-attention-heads 64 \
    --group-query-attention --num-query-groups 8 --rotary-base 500000 \
    --seq-length 131072 --max-position-embeddings 131072 \
    --micro-batch-size 1 --global-batch-size 16 --train-iters 10000 --eval-iters 0 \
    --lr 1.5e-4 --min-lr 1.5e-5 --lr-decay-style cosine --lr-warmup-iters 200 --clip-grad 1.0 \
    --swiglu --normalization RMSNorm --position-embedding-type rope --disable-bias-linear \
    --untie-embeddings-and-output-weights --bf16 --use-distributed-optimizer --loss-chunk-size auto \
    --data-path "$DATA_PREFIX" --save "$CHECKPOINTS" --save-interval 100 --load "$CHECKPOINTS" \
    --metrics-jsonl "$CHECKPOINTS/metrics.jsonl" "$@"
