#!/usr/bin/env bash
#SBATCH --job-name=helixpipe-llama-7b
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
# Llama 7B on 64 GPUs: tensor parallel inside a node, helix pipeline across 8 nodes.
#
#   sbatch examples/pretrain_llama_7b_slurm.sh /data/corpus /checkpoints/7b [more pretrain_gpt.py arguments]
#
# Every rank keeps two-fold x 32 layers of activations (see docs/choosing.md): about 36 GB at 32k tokens.
set -euo pipefail

DATA_PREFIX=${1:?usage: sbatch $0 DATA_PREFIX CHECKPOINT_DIR [ARGUMENTS...]}
CHECKPOINTS=${2:?usage: sbatch $0 DATA_PREFIX CHECKPOINT_DIR [ARGUMENTS...]}
shift 2

HEAD_NODE=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# Kernels of communication and compute must be able to run side by side in the order they were launched.
export CUDA_DEVICE_MAX_CONNECTIONS=1

srun torchrun \
    --nnodes "$SLURM_NNODES" --nproc-per-node 8 \
    --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$HEAD_NODE:29500" \
    pretrain_gpt.py \
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
