#!/usr/bin/env bash
# Train a small GPT on real text twice, under 1F1B and under helix, with the same weights and batches. Losses are
# printed side by side as they come; at the end stand both schedules, as an iteration of median time executed them, in one
# picture and on one page, and a page of the whole run under helix.
# Two ranks on two CPU cores, about two minutes.
#
#   PYTHON  the interpreter to use (default: python3)
#   RUN     where everything goes (default: runs/quickstart)
#   ITERS   iterations (default: 12)
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
RUN=${RUN:-runs/quickstart}
ITERS=${ITERS:-12}
CORPUS=$RUN/stdlib
export OMP_NUM_THREADS=1

if [ ! -e "$CORPUS.idx" ]; then
    echo "== Corpus: the Python standard library's sources"
    "$PYTHON" tools/prepare_data.py \
        --input "$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')" \
        --pattern '*.py' --exclude site-packages test tests idlelib \
        --vocab-size 1024 --output-prefix "$CORPUS"
fi

train() { # schedule, [schedule to compare with]
    rm -rf "${RUN:?}/$1"
    mkdir -p "$RUN/$1"
    echo "== Training under $1: 2 pipeline ranks, 4 micro batches of 4096 tokens, $ITERS iterations"
    "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node 2 pretrain_gpt.py \
        --pipeline-schedule "$1" --pipeline-model-parallel-size 2 \
        --num-layers 4 --hidden-size 128 --num-attention-heads 4 --seq-length 4096 \
        --swiglu --ffn-hidden-size 352 --normalization RMSNorm --position-embedding-type rope \
        --disable-bias-linear --untie-embeddings-and-output-weights \
        --micro-batch-size 1 --global-batch-size 4 --train-iters "$ITERS" \
        --lr 6e-3 --min-lr 6e-4 --lr-decay-style cosine --lr-warmup-iters 2 \
        --data-path "$CORPUS" --metrics-jsonl "$RUN/$1/metrics.jsonl" --trace-dir "$RUN/$1/trace" |
        "$PYTHON" examples/side_by_side.py follow "$RUN" "$@"
}
train 1f1b
train helix 1f1b

"$PYTHON" examples/side_by_side.py summary "$RUN" 1f1b helix
mapfile -t typical < <("$PYTHON" examples/side_by_side.py typical "$RUN" 1f1b helix)
"$PYTHON" -m helixpipe draw --timeline "${typical[@]}" --output "$RUN/schedules.png"
"$PYTHON" -m helixpipe draw --timeline "${typical[@]}" --output "$RUN/schedules.html"
"$PYTHON" -m helixpipe report "$RUN/helix"
cat <<EOT

Next:
  your own text      python tools/prepare_data.py --input FOLDER --output-prefix data/corpus
  your own job       helixpipe advise --model llama-7b --hardware h20 --seq-length 131072 \\
                         --tensor-model-parallel-size 8 --pipeline-model-parallel-size 8 --num-microbatches 16
  how it works       docs/concepts.md
EOT
