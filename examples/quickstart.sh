#!/usr/bin/env bash
# Build a small corpus from the Python standard library's own sources, train a GPT on it under the helix
# schedule on four gloo ranks, and draw the schedule that the last iteration really ran.
#
#   PYTHON  the interpreter to use (default: python3)
#   RUN     where everything goes (default: runs/quickstart)
#   ITERS   iterations (default: 40)
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
RUN=${RUN:-runs/quickstart}
ITERS=${ITERS:-40}
CORPUS=$RUN/stdlib

if [ ! -e "$CORPUS.idx" ]; then
    echo "== Corpus: the Python standard library"
    "$PYTHON" tools/prepare_data.py \
        --input "$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')" \
        --pattern '*.py' --exclude site-packages test tests idlelib \
        --vocab-size 4096 --output-prefix "$CORPUS"
fi

echo "== Training: helix, 4 pipeline ranks, two-fold, $ITERS iterations"
# Eight layers and sequences of 1024 tokens; 8 micro batches are one round of 4 slots x fold 2.
OMP_NUM_THREADS=1 "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node 4 pretrain_gpt.py \
    --pipeline-schedule helix --num-fold 2 --pipeline-model-parallel-size 4 \
    --num-layers 8 --hidden-size 256 --num-attention-heads 8 --seq-length 1024 \
    --swiglu --ffn-hidden-size 704 --normalization RMSNorm --position-embedding-type rope \
    --disable-bias-linear --untie-embeddings-and-output-weights \
    --micro-batch-size 1 --global-batch-size 8 --train-iters "$ITERS" \
    --lr 3e-3 --min-lr 3e-4 --lr-decay-style cosine --lr-warmup-iters 4 \
    --data-path "$CORPUS" --metrics-jsonl "$RUN/metrics.jsonl" --trace-dir "$RUN/trace"

LAST=$(ls "$RUN"/trace/iteration_*.json | tail -n 1)
echo "== The schedule that the last iteration executed"
if [ "$(nproc)" -lt 4 ]; then
    echo "Four ranks share $(nproc) cores here: a rank is also idle while another one has its core."
fi
"$PYTHON" -m helixpipe draw --timeline "$LAST"
"$PYTHON" -m helixpipe draw --timeline "$LAST" --output "$RUN/schedule.png"
echo "Losses: $RUN/metrics.jsonl · timelines: $RUN/trace · picture: $RUN/schedule.png"
