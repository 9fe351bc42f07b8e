#!/usr/bin/env bash
# Helix in your checkout of Megatron-LM, whose pretrain_gpt.py and arguments stay as they are, on the GPUs of
# one node:
#
#   MEGATRON=/path/to/Megatron-LM bash examples/pretrain_in_megatron_lm.sh /data/corpus /data/tokenizer.model
#
# Needs no installation of HelixPipe. With --dry-run h100 --vocab-size 32000 at its end it prints what HelixPipe's
# own program would do with the same arguments, without GPUs, data and Megatron-LM.
set -euo pipefail
cd "$(dirname "$0")/.."

usage="usage: MEGATRON=CHECKOUT $0 DATA_PREFIX TOKENIZER_MODEL [ARGUMENTS...]"
DATA_PREFIX=${1:?$usage}
TOKENIZER=${2:?$usage}
shift 2
GPUS=${GPUS:-8}

# Flash kernels have no dropout, and both programs have other defaults of it.
arguments=(
    --pipeline-schedule helix --pipeline-model-parallel-size "$GPUS"
    --num-layers 24 --hidden-size 2048 --num-attention-heads 16 --attention-dropout 0 --hidden-dropout 0
    --seq-length 16384 --max-position-embeddings 16384
    --bf16 --micro-batch-size 1 --global-batch-size $((2 * GPUS)) --train-iters 1000 --eval-iters 0
    --lr 3e-4 --min-lr 3e-5 --lr-decay-style cosine --lr-warmup-iters 50 --data-path "$DATA_PREFIX"
)
. examples/environment.sh
case " $* " in
    *" --dry-run"*) exec "${PYTHON:-python3}" -m helixpipe train --nproc-per-node "$GPUS" "${arguments[@]}" "$@" ;;
esac
cd "${MEGATRON:?$usage}"
# Their megatron package first.
export PYTHONPATH="$PWD:$OLDPWD${PYTHONPATH:+:$PYTHONPATH}"
torchrun --standalone --nproc-per-node "$GPUS" -m helixpipe.megatron_lm pretrain_gpt.py "${arguments[@]}" \
    --tokenizer-type Llama2Tokenizer --tokenizer-model "$TOKENIZER" "$@"
