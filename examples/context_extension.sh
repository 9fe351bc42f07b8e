#!/usr/bin/env bash
# Extend the context of a model on Hugging Face from 256 to 1024 tokens: a tiny Llama that transformers makes is
# imported and trained at 256 tokens, exported, given YaRN, imported again, trained on with packed documents at
# 1024 tokens under helix, and exported. A picture shows loss by position before and after; transformers generates
# from the result.
# Two ranks on two CPU cores, about four minutes.
#
#   PYTHON  the interpreter to use (default: python3)
#   RUN     where everything goes (default: runs/context_extension)
#   ITERS   iterations at 256 tokens; a third as many follow at 1024 (default: 300)
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
RUN=${RUN:-runs/context_extension}
ITERS=${ITERS:-300}
SHORT=256
LONG=1024
CORPUS=$RUN/stdlib
STDLIB=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')
HELD_OUT=$STDLIB/asyncio
export OMP_NUM_THREADS=1

if [ ! -e "$CORPUS.idx" ]; then
    echo "== Corpus: the Python standard library's sources, without asyncio"
    "$PYTHON" tools/prepare_data.py --input "$STDLIB" --pattern '*.py' \
        --exclude site-packages test tests idlelib encodings pydoc_data asyncio \
        --vocab-size 1024 --output-prefix "$CORPUS"
fi

for folder in random before yarn-untrained after imported-{random,yarn-untrained} saved-{short,long}; do
    rm -rf "${RUN:?}/$folder"
done

train() { # model on Hugging Face, where checkpoints go, options
    local model=$1 saved=$2 printed
    local -a options=()
    shift 2
    printed=$("$PYTHON" tools/convert_hf.py import --input "$RUN/$model" --output "$RUN/imported-$model")
    echo "$printed"
    # The import prints the model's options quoted for a shell.
    eval "options=($printed)"
    # Steps are short here, and cores that other programs use may pause a rank for longer than three of them.
    "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node 2 pretrain_gpt.py \
        "${options[@]}" --data-path "$CORPUS" --save "$RUN/$saved" --hang-timeout-s 300 "$@"
}

echo "== A random Llama, trained at $SHORT tokens: 1F1B, 2 data-parallel ranks, $ITERS iterations"
"$PYTHON" examples/long_context.py make \
    --tokenizer-file "$CORPUS.tokenizer.json" --seq-length "$SHORT" --output "$RUN/random"
train random saved-short --pipeline-schedule 1f1b --seq-length "$SHORT" \
    --micro-batch-size 8 --global-batch-size 16 --train-iters "$ITERS" \
    --lr 3e-3 --min-lr 3e-4 --lr-decay-style cosine --lr-warmup-fraction 0.05 --log-interval 20
"$PYTHON" tools/convert_hf.py export \
    --input "$RUN/saved-short" --output "$RUN/before" --reference "$RUN/random"

iterations=$(((ITERS + 2) / 3))
echo "== YaRN, then training at $LONG tokens: helix, 2 pipeline ranks, packed documents, $iterations iterations"
"$PYTHON" examples/long_context.py yarn \
    --input "$RUN/before" --factor $((LONG / SHORT)) --output "$RUN/yarn-untrained"
train yarn-untrained saved-long --pipeline-schedule helix --pipeline-model-parallel-size 2 \
    --seq-length "$LONG" --reset-attention-mask --reset-position-ids --eod-mask-loss \
    --micro-batch-size 1 --global-batch-size 4 --train-iters "$iterations" \
    --lr 1e-3 --min-lr 1e-4 --lr-decay-style cosine --lr-warmup-fraction 0.05 --log-interval 10
"$PYTHON" tools/convert_hf.py export \
    --input "$RUN/saved-long" --output "$RUN/after" --reference "$RUN/yarn-untrained"

echo "== Loss by position on asyncio, which no model was trained on"
"$PYTHON" examples/long_context.py losses --models "$RUN/before" "$RUN/yarn-untrained" "$RUN/after" \
    --text "$HELD_OUT" --seq-length "$LONG" --output "$RUN/loss_by_position.png"

echo "== transformers goes on from the export"
"$PYTHON" examples/long_context.py generate --input "$RUN/after" --text "$HELD_OUT" --seq-length "$LONG"
