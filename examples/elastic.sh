#!/usr/bin/env bash
# Train on the Python standard library's files as they are, short and long, under the elastic schedule on two
# gloo ranks: measure what chunks cost here, train, evaluate. Each iteration's line tells how long its plan
# took, which was made while the iteration before trained, and how long training waited for it.
#
#   PYTHON  the interpreter to use (default: python3)
#   RUN     where everything goes (default: runs/elastic)
#   ITERS   iterations (default: 12)
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
RUN=${RUN:-runs/elastic}
ITERS=${ITERS:-12}
CORPUS=$RUN/stdlib
export OMP_NUM_THREADS=1

if [ ! -e "$CORPUS.idx" ]; then
    echo "== Corpus: the Python standard library, one document per file"
    "$PYTHON" tools/prepare_data.py \
        --input "$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')" \
        --pattern '*.py' --exclude site-packages --vocab-size 1024 --output-prefix "$CORPUS"
fi

echo "== Costs of chunks, measured on both ranks at once"
"$PYTHON" -m torch.distributed.run --standalone --nproc-per-node 2 -m helixpipe elastic-profile \
    --model examples/elastic.sh --max-seq-length 4096 --pipeline-model-parallel-size 2 --fp32 --repeats 2 \
    --output "$RUN/costs.json"

echo "== Training: elastic, 2 pipeline ranks, $ITERS iterations"
"$PYTHON" -m torch.distributed.run --standalone --nproc-per-node 2 pretrain_gpt.py \
    --pipeline-schedule elastic --elastic-costs "$RUN/costs.json" --memory-limit-gib 4 --max-seq-length 8192 \
    --pipeline-model-parallel-size 2 --num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 8192 \
    --swiglu --ffn-hidden-size 176 --normalization RMSNorm --position-embedding-type rope \
    --disable-bias-linear --untie-embeddings-and-output-weights \
    --micro-batch-size 1 --global-batch-size 16 --train-iters "$ITERS" --eval-iters 1 \
    --lr 3e-3 --min-lr 3e-4 --lr-decay-style cosine --lr-warmup-iters 2 \
    --data-path "$CORPUS" --metrics-jsonl "$RUN/metrics.jsonl"
