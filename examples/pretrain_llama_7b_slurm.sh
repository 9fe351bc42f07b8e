#!/usr/bin/env bash
#SBATCH --job-name=helixpipe-llama-7b
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
# Llama 7B on 64 GPUs: tensor parallel inside a node, helix pipeline across 8 nodes. From the checkout:
#
#   sbatch examples/pretrain_llama_7b_slurm.sh /data/corpus /checkpoints/7b [more pretrain_gpt.py arguments]
#
# What it would do, on a machine of any kind and without the data:
#
#   bash examples/pretrain_llama_7b_slurm.sh /data/corpus /checkpoints/7b --dry-run h20 --vocab-size 32000
#
# Every rank keeps two-fold x 32 layers of activations (see docs/choosing.md): about 36 GB at 32k tokens.
set -euo pipefail

usage="usage: sbatch examples/pretrain_llama_7b_slurm.sh DATA_PREFIX CHECKPOINT_DIR [ARGUMENTS...]"
DATA_PREFIX=${1:?$usage}
CHECKPOINTS=${2:?$usage}
shift 2

# As above, for --dry-run.
export NODES=8 GPUS_PER_NODE=8

cd "${SLURM_SUBMIT_DIR:-$PWD}"
exec bash examples/slurm/job.sh pretrain_gpt.py \
    --pipeline-schedule helix --num-fold 2 \
    --pipeline-model-parallel-size 8 --tensor-model-parallel-size 8 --sequence-parallel \
    --num-layers 32 --hidden-size 4096 --ffn-hidden-size 11008 --num-attention-heads 32 \
    --seq-length 32768 --max-position-embeddings 32768 \
    --swiglu --normalization RMSNorm --position-embedding-type rope --rotary-base 500000 \
    --disable-bias-linear --untie-embeddings-and-output-weights \
    --bf16 --use-distributed-optimizer \
    --micro-batch-size 1 --global-batch-size 32 --train-iters 10000 \
    --lr 3e-4 --min-lr 3e-5 --lr-decay-style cosine --lr-warmup-iters 200 --clip-grad 1.0 \
    --data-path "$DATA_PREFIX" --num-workers 2 --eval-interval 500 --eval-iters 4 \
    --save "$CHECKPOINTS" --save-interval 500 --load "$CHECKPOINTS" \
    --metrics-jsonl "$CHECKPOINTS/metrics.jsonl" "$@"
