"""Arguments of pretrain_gpt.py: defaults, derived sizes, and refusals that say what to write instead."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch

from helixpipe.data.prefix import DatasetInfo, describe_prefix
from helixpipe.data.prepare.corpus import PreparationOptions, prepare_dataset
from helixpipe.layers.recomputing_layer import MemorySaving
from helixpipe.megatron_adapter.schedule import make_forward_backward
from helixpipe.plan.cost_model import Recompute
from helixpipe.plan.slice_ends import slice_ends
from helixpipe.runtime.trace import NullClock
from megatron.pretrain.settings.arguments import parse_arguments

MINIMAL = (
    "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --micro-batch-size 1 "
    "--global-batch-size 8 --train-iters 10 --lr 1e-3 --data-path unused"
)
REQUIRED = re.findall(r"--\S+", MINIMAL)
DATASET = DatasetInfo(
    prefix="unused", vocab_size=300, eod=0, num_documents=100, num_tokens=10_000, longest_document=500
)


@pytest.fixture
def parse(monkeypatch):
    """``parse(arguments, world_size=…)`` without files of data."""

    def parse(arguments="", world_size=1, rank=0, dataset=DATASET):
        monkeypatch.setenv("WORLD_SIZE", str(world_size))
        monkeypatch.setenv("RANK", str(rank))
        return parse_arguments(f"{MINIMAL} {arguments}".split(), dataset)

    return parse


def test_defaults(parse):
    settings = parse()
    assert settings.schedule.name == "1f1b"
    assert (settings.parallel.world_size, settings.parallel.rank, settings.parallel.data_parallel_size) == (
        1,
        0,
        1,
    )
    assert settings.training.num_microbatches == 8
    assert settings.schedule.virtual_stages is None
    assert settings.model.kv_channels == 16
    assert settings.model.num_query_groups == 4
    assert settings.model.ffn_hidden_size == 256
    assert settings.model.max_position_embeddings == 32
    assert settings.learning_rate.decay == 80
    assert settings.model.params_dtype is torch.float32
    assert settings.model.add_bias_linear
    assert settings.data.dataset is DATASET


def test_layout_comes_from_the_environment(parse):
    settings = parse(
        "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --micro-batch-size 2",
        world_size=8,
        rank=5,
    )
    assert (settings.parallel.world_size, settings.parallel.rank) == (8, 5)
    assert settings.parallel.data_parallel_size == 2
    assert settings.training.num_microbatches == 2
    assert settings.schedule.plan.num_ranks == 2
    assert settings.schedule.plan.num_microbatches == 2


def test_without_torchrun_there_is_one_rank(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.delenv("RANK", raising=False)
    settings = parse_arguments(MINIMAL.split(), DATASET)
    assert (settings.parallel.world_size, settings.parallel.rank) == (1, 0)


def test_given_sizes_are_kept(parse):
    settings = parse(
        "--kv-channels 8 --ffn-hidden-size 100 --max-position-embeddings 64 --lr-decay-iters 50 "
        "--group-query-attention --num-query-groups 2 --bf16 --disable-bias-linear"
    )
    assert settings.model.kv_channels == 8
    assert settings.model.ffn_hidden_size == 100
    assert settings.model.max_position_embeddings == 64
    assert settings.options["lr_decay_iters"] == 50
    assert settings.model.num_query_groups == 2
    assert settings.model.params_dtype is torch.bfloat16
    assert not settings.model.add_bias_linear


def test_head_size_may_differ_from_the_share_of_the_hidden_size(parse):
    assert parse("--hidden-size 66 --kv-channels 16").model.kv_channels == 16


@pytest.mark.parametrize(("per_chunk", "stages"), [(1, 4), (2, 2)])
def test_virtual_stages(parse, per_chunk, stages):
    settings = parse(
        "--pipeline-schedule interleaved --num-layers 8 --pipeline-model-parallel-size 2 "
        f"--num-layers-per-virtual-pipeline-stage {per_chunk}",
        world_size=2,
    )
    assert settings.schedule.virtual_stages == stages
    assert settings.schedule.plan.parameters["virtual_stages"] == stages


def test_helix_options_reach_the_schedule(parse):
    settings = parse(
        "--pipeline-schedule helix --pipeline-model-parallel-size 4 --num-fold 1 --attention-range core",
        world_size=4,
    )
    assert settings.schedule.plan.parameters == {"num_layers": 4, "num_fold": 1, "attention_range": "core"}


@pytest.mark.parametrize(("sequence", "found"), [(32, "core"), (4096, "block")])
def test_the_range_with_the_smallest_messages_is_chosen(parse, sequence, found):
    options = "--pipeline-schedule helix --pipeline-model-parallel-size 2 --attention-range auto"
    settings = parse(f"{options} --seq-length {sequence}", world_size=2)
    assert settings.schedule.plan.parameters["attention_range"] == found


def test_the_heads_placement_reaches_the_schedule(parse):
    options = "--pipeline-schedule helix --pipeline-model-parallel-size 2"
    assert "head_placement" not in parse(options, world_size=2).schedule.plan.parameters
    spread = parse(f"{options} --head-placement spread", world_size=2).schedule
    assert spread.plan.parameters["head_placement"] == "spread"
    schedule = make_forward_backward(spread.execution, spread.plan, NullClock())
    assert str(schedule) == "helix (num_layers=4, num_fold=2, attention_range=core, head_placement=spread)"


@pytest.mark.parametrize(
    ("arguments", "saving"),
    [
        ("", MemorySaving()),
        ("--pipeline-schedule helix", MemorySaving(Recompute.WITHOUT_ATTENTION)),
        ("--pipeline-schedule helix --no-recompute-without-attention", MemorySaving()),
        (
            "--pipeline-schedule helix --attention-range block --head-placement spread --loss-chunk-size 8",
            MemorySaving(Recompute.WITHOUT_ATTENTION, None, 8),
        ),
        ("--recompute-without-attention", MemorySaving(Recompute.WITHOUT_ATTENTION)),
        ("--recompute-levels products", MemorySaving(Recompute.PRODUCTS)),
        ("--pipeline-schedule helix --recompute-levels none", MemorySaving()),
        (
            "--pipeline-schedule helix --recompute-levels products:3,none:1",
            MemorySaving((Recompute.PRODUCTS,) * 3 + (Recompute.NONE,)),
        ),
        ("--mlp-chunk-size 8 --loss-chunk-size 100", MemorySaving(Recompute.NONE, 8, 100)),
        # 384 words in two precisions and 64 channels; 256 in the MLP.
        ("--seq-length 32768 --mlp-chunk-size auto", MemorySaving(Recompute.NONE, 8192)),
        (
            "--seq-length 32768 --loss-chunk-size auto",
            MemorySaving(Recompute.NONE, None, 32768 * 64 // (3 * 384)),
        ),
        ("--seq-length 32768 --swiglu --mlp-chunk-size auto", MemorySaving(Recompute.NONE, 4096)),
        ("--seq-length 32768 --geglu --mlp-chunk-size auto", MemorySaving(Recompute.NONE, 4096)),
        ("--seq-length 32768 --quick-geglu --mlp-chunk-size auto", MemorySaving(Recompute.NONE, 4096)),
        ("--mlp-chunk-size auto", MemorySaving(Recompute.NONE, 32)),
        ("--recompute-granularity selective --mlp-chunk-size 8", MemorySaving(Recompute.NONE, 8)),
    ],
)
def test_what_is_done_to_save_memory(parse, arguments, saving):
    assert parse(f"--max-position-embeddings 32768 {arguments}").memory.memory_saving == saving


def test_a_range_is_chosen_for_slices(parse):
    """On hardware that is not known by bytes: weights of attention are small beside long slices alone."""
    line = f"{PP2} --pipeline-schedule sliced-helix --attention-range auto"
    for length, found in ((32, "core"), (4096, "block")):
        settings = parse(f"{line} --seq-length {length} --max-position-embeddings {length}", 2)
        assert settings.schedule.plan.parameters["attention_range"] == found
        predicted = parse(
            f"{line} --seq-length {length} --max-position-embeddings {length} --hardware h20", 2
        )
        assert "predicted ms per iteration: core" in predicted.schedule.reason


def test_one_long_sequence_is_sliced_by_choice(parse):
    """Of all that can be executed with as many sequences as there are."""
    long = f"{PP2} --seq-length 131072 --max-position-embeddings 131072 --global-batch-size 1 --bf16"
    options = "--pipeline-schedule auto --hardware h20 --num-fold 2 --head-placement spread"
    settings = parse(f"{long} {options}", 2)
    assert settings.schedule.name == "sliced-helix"
    assert slice_ends(settings.schedule.plan)[-1] == 131072


def test_automatic_slices_are_of_one_gpus_share(parse):
    line = f"{TP2} --seq-length 32768 --mlp-chunk-size auto"
    # The MLP is cut over two GPUs, the hidden state only by sequence parallelism.
    assert parse(line, world_size=2).memory.memory_saving.mlp_chunk_size == 16384
    assert parse(f"{line} --sequence-parallel", world_size=2).memory.memory_saving.mlp_chunk_size == 8192


@pytest.mark.parametrize(
    ("vocabulary", "multiple", "tensor_size", "padded"),
    [
        (256, 128, 1, 256),
        (257, 128, 1, 384),
        (257, 128, 2, 384),
        (300, 128, 2, 384),
        (50257, 128, 1, 50304),
        (50257, 128, 8, 50304),
        (300, 1, 1, 300),
        (300, 1, 4, 300),
    ],
)
def test_vocabulary_is_padded(parse, vocabulary, multiple, tensor_size, padded):
    settings = parse(
        f"--make-vocab-size-divisible-by {multiple} --tensor-model-parallel-size {tensor_size} "
        "--hidden-size 64 --num-attention-heads 8",
        world_size=tensor_size,
        dataset=dataclasses.replace(DATASET, vocab_size=vocabulary),
    )
    assert settings.model.padded_vocab_size == padded


@pytest.mark.parametrize("vocabulary", [1, 2, 127, 257, 301, 50257])
@pytest.mark.parametrize("multiple", [1, 3, 64, 128])
def test_padding_does_not_depend_on_the_layout(parse, vocabulary, multiple):
    """Every tensor-parallel size either has the same rows, or is refused with a multiple that serves."""

    def padded(tensor_size, multiple):
        return parse(
            f"--make-vocab-size-divisible-by {multiple} --tensor-model-parallel-size {tensor_size} "
            "--hidden-size 48 --num-attention-heads 24",
            world_size=tensor_size,
            dataset=dataclasses.replace(DATASET, vocab_size=vocabulary),
        ).model.padded_vocab_size

    alone = padded(1, multiple)
    for tensor_size in (2, 3, 4, 6, 8, 12):
        if alone % tensor_size == 0:
            assert padded(tensor_size, multiple) == alone
            continue
        with pytest.raises(ValueError, match=r"does not divide; use \d+$") as refused:
            padded(tensor_size, multiple)
        assert padded(tensor_size, int(str(refused.value).rpartition(" ")[2])) % tensor_size == 0


def test_output_folders_are_made_before_training(parse, tmp_path):
    parse(f"--save {tmp_path}/a/b --trace-dir {tmp_path}/c --metrics-jsonl {tmp_path}/d/e.jsonl")
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")) == [
        "a",
        "a/b",
        "c",
        "d",
    ]


def test_output_folder_that_is_a_file(parse, tmp_path):
    (tmp_path / "file").touch()
    for flag in ("--save", "--trace-dir"):
        with pytest.raises(ValueError, match=f"{flag}: cannot write to the folder .*/file .* give another"):
            parse(f"{flag} {tmp_path}/file")


@pytest.mark.parametrize("flag", REQUIRED)
def test_missing_argument_is_named(monkeypatch, flag):
    monkeypatch.setenv("WORLD_SIZE", "1")
    words = MINIMAL.split()
    place = words.index(flag)
    wanted = {
        "--train-iters": "--train-iters --train-samples is required",
        "--data-path": "give --data-path PREFIX, or --mock-data",
    }.get(flag, f"required: {flag}")
    with pytest.raises(ValueError, match=f"{wanted}$"):
        parse_arguments(words[:place] + words[place + 2 :], DATASET)


POSITIVE = (
    "--tensor-model-parallel-size", "--pipeline-model-parallel-size", "--num-layers", "--hidden-size",
    "--num-attention-heads", "--num-query-groups", "--seq-length", "--micro-batch-size",
    "--global-batch-size", "--train-iters", "--make-vocab-size-divisible-by", "--log-interval",
    "--eval-interval", "--ffn-hidden-size", "--kv-channels", "--max-position-embeddings",
    "--num-layers-per-virtual-pipeline-stage", "--recompute-num-layers", "--distributed-timeout-minutes",
    "--save-interval",
)  # fmt: skip
NOT_NEGATIVE = (
    "--lr", "--min-lr", "--weight-decay", "--clip-grad", "--lr-warmup-iters", "--eval-iters",
    "--num-workers", "--seed",
)  # fmt: skip


@pytest.mark.parametrize("value", [0, -4])
@pytest.mark.parametrize("flag", POSITIVE)
def test_sizes_are_positive(parse, flag, value):
    with pytest.raises(ValueError, match=f"^argument {flag}: must be at least 1, not {value}$"):
        parse(f"{flag} {value}")


@pytest.mark.parametrize("flag", NOT_NEGATIVE)
def test_rates_and_counts_are_not_negative(parse, flag):
    with pytest.raises(ValueError, match=f"^argument {flag}: must be at least 0, not -1"):
        parse(f"{flag} -1")


def test_nan_is_not_a_rate(parse):
    with pytest.raises(ValueError, match="--lr: 'nan' is not a finite number; it must be at least 0"):
        parse("--lr nan")


TP2 = "--tensor-model-parallel-size 2"
PP2 = "--pipeline-model-parallel-size 2"
REFUSED = [
    # world size, arguments, what the message says: the flag, the wrong value, the remedy
    (3, PP2, "world size 3 cannot be split", "pipeline-parallel size 2", "--nproc-per-node 2"),
    (2, f"{TP2} {PP2}", "world size 2", "tensor-parallel size 2", "--nproc-per-node 4"),
    (3, "", "--global-batch-size 8", "data-parallel size 3", "use 6 or 9"),
    (1, "--micro-batch-size 16", "--global-batch-size 8", "--micro-batch-size 16", "use 16"),
    (2, f"{TP2} --sequence-parallel --seq-length 33", "--seq-length 33", "use 32 or 34"),
    (1, "--overlap-param-gather", "--overlap-param-gather needs", "--overlap-grad-reduce"),
    (1, "--hidden-size 66", "--hidden-size 66", "--num-attention-heads 4", "use 64 or 68"),
    (2, f"{TP2} --num-attention-heads 1", "--num-attention-heads 1", "size 2", "use 2"),
    (1, "--num-query-groups 2", "--num-query-groups needs --group-query-attention"),
    (1, "--group-query-attention --num-query-groups 3", "--num-query-groups 3", "use 2 or 4"),
    (1, "--group-query-attention --num-query-groups 9", "--num-query-groups 9", "use 4"),
    (
        4,
        "--tensor-model-parallel-size 4 --hidden-size 96 --num-attention-heads 12 --group-query-attention "
        "--num-query-groups 6",
        "--num-query-groups 6 must be a multiple or a divisor of --tensor-model-parallel-size 4",
    ),
    (2, f"{TP2} --ffn-hidden-size 101", "--ffn-hidden-size 101", "use 100 or 102"),
    (1, "--max-position-embeddings 16", "--seq-length 32", "--max-position-embeddings 16"),
    (1, "--attention-dropout 0.1 --pipeline-schedule seq1f1b", "--attention-dropout does not go with", "use"),
    (1, "--attention-backend unfused --pipeline-schedule seq1f1b", "--attention-backend unfused does not go"),
    (1, "--deterministic-mode --cross-entropy-loss-fusion", "--cross-entropy-loss-fusion is not determ"),
    (1, "--bf16 --fp16", "--fp16: not allowed with argument --bf16"),
    (1, "--bf16 --loss-scale 8", "--loss-scale needs --fp16"),
    (1, "--fp16 --loss-scale 8 --hysteresis 3", "--loss-scale is constant, --hysteresis is not for it"),
    (1, "--fp16 --initial-loss-scale 8 --min-loss-scale 9", "--min-loss-scale 9 is above", "use at most"),
    (1, "--grad-reduce-in-bf16", "--grad-reduce-in-bf16 needs --bf16"),
    (1, "--bf16 --grad-reduce-in-bf16 --accumulate-allreduce-grads-in-fp32", "exclude each other"),
    (1, "--lr-warmup-iters 10", "--lr-warmup-iters 10", "smaller than --lr-decay-iters 10"),
    (1, "--min-lr 0.5", "--min-lr 0.5 is above --lr 0.001"),
    (1, "--save-interval 5", "--save-interval 5 needs --save DIR"),
    (1, "--async-save", "--async-save needs --save DIR"),
    (1, "--on-save-failure continue", "--on-save-failure needs --save DIR"),
    (1, "--check-gradients-every 0", "--check-gradients-every", "1"),
    (
        1,
        "--check-gradients-every 5",
        "--check-gradients-every 5 compares data-parallel ranks",
        "leave it out",
    ),
    (1, "--optimizer sgd --save somewhere", "--optimizer sgd", "use adam"),
    (1, "--optimizer sgd --load somewhere", "--optimizer sgd", "use adam"),
    (1, "--optimizer sgd --use-distributed-optimizer", "--optimizer sgd", "use adam"),
    (1, "--optimizer lion", "--optimizer", "lion", "adam", "sgd"),
    (1, "--pipeline-schedule helix --recompute-granularity selective", "helix", "use 1f1b"),
    (
        1,
        "--recompute-without-attention --recompute-granularity selective",
        "--recompute-without-attention and --recompute-granularity selective",
        "leave one out",
    ),
    (1, "--mlp-chunk-size 0", "--mlp-chunk-size: must be at least 1, not 0"),
    (1, "--loss-chunk-size half", "--loss-chunk-size", "'half'", "give 1 to 2147483647, or auto"),
    (
        1,
        "--mlp-chunk-size 8 --transformer-impl transformer_engine",
        "--mlp-chunk-size",
        "use --transformer-impl local",
    ),
    (
        1,
        "--mlp-chunk-size 8 --disable-bias-linear --recompute-granularity selective --recompute-modules mlp",
        "--mlp-chunk-size",
        "leave mlp out of --recompute-modules",
    ),
    (1, "--recompute-granularity full", "needs --recompute-method and --recompute-num-layers"),
    (1, "--recompute-num-layers 1", "need --recompute-granularity full"),
    (
        1,
        "--recompute-granularity selective --recompute-modules mlp",
        "--recompute-modules mlp needs --disable-bias-linear",
    ),
    (1, "--recompute-modules attention", "--recompute-modules", "attention", "core_attn", "mlp"),
    (
        1,
        "--pipeline-schedule 1f1b --num-layers-per-virtual-pipeline-stage 1",
        "does not apply to 1f1b",
        "it is for interleaved",
    ),
    (1, "--pipeline-schedule interleaved", "interleaved needs two or more pipeline ranks"),
    (
        2,
        f"{PP2} --pipeline-schedule interleaved --num-layers-per-virtual-pipeline-stage 2",
        "interleaved needs",
        "below --num-layers / --pipeline-model-parallel-size",
    ),
    (
        2,
        f"{PP2} --pipeline-schedule interleaved --num-layers 5 --num-layers-per-virtual-pipeline-stage 1",
        "--num-layers 5",
        "(2 x 1)",
        "use 4 or 6",
    ),
    (2, f"{PP2} --num-layers 5", "number of layers (5)", "use 4 or 6"),
    (2, f"{PP2} --pipeline-schedule helix --num-layers 1", "number of layers (1)", "at most that many ranks"),
    (2, f"{PP2} --pipeline-schedule helix --global-batch-size 1", "micro batches (1)", "use 2, fewer ranks"),
    (2, f"{PP2} --pipeline-schedule helix --split-weight-gradients", "needs --round-order interlocked"),
    (2, f"{PP2} --round-order interlocked", "--round-order does not apply to 1f1b", "it is for helix"),
    (2, f"{PP2} --pipeline-schedule helix --round-order lifo", "'lifo'", "filo, interlocked"),
    (
        2,
        f"{PP2} --pipeline-schedule helix --hardware h20",
        "--round-order interlocked and schedules of slices; leave it out",
    ),
    (1, "--recompute-levels product", "'product'", "none, products, without-attention"),
    (1, "--recompute-levels products:3", "products:3", "each of the model's 4 layers once"),
    (1, "--recompute-levels products:3,none", "'none' needs its number of layers"),
    (1, "--recompute-levels none --recompute-without-attention", "leave one out"),
    (
        1,
        "--recompute-levels products --recompute-granularity selective",
        "--recompute-levels and",
        "leave one",
    ),
    (2, f"{PP2} --pipeline-schedule helix --num-fold 0", "--num-fold: must be at least 1, not 0"),
    (2, f"{PP2} --num-fold 2", "--num-fold does not apply to 1f1b", "it is for helix"),
    (1, "--attention-range core", "--attention-range does not apply to 1f1b"),
    (1, "--attention-range auto", "--attention-range does not apply to 1f1b"),
    (1, "--pipeline-schedule helix --attention-range all", "'all'", "core, qkv, block"),
    (1, "--pipeline-schedule helix --head-placement last", "'last'", "first, spread"),
    (1, "--head-placement spread", "--head-placement does not apply to 1f1b", "it is for helix"),
    (2, f"{PP2} --pipeline-schedule sliced-helix --num-fold 17", "--num-fold 17", "34 slices", "use fewer"),
    (1, "--pipeline-schedule helix --resend-context", "--resend-context does not apply to helix", "remove"),
    (1, "--pipeline-schedule elastic --resend-context", "--resend-context", "leave it out"),
    (1, "--pipeline-schedule sliced-helix --recompute-granularity full", "--recompute-without-attention"),
    (1, "--pipeline-schedule hellix", "'hellix'", "did you mean helix?"),
    (1, "--num-slices 2", "--num-slices does not apply to 1f1b", "it is for seq1f1b"),
    (1, "--pipeline-schedule seq1f1b --num-slices 0", "--num-slices: must be at least 1, not 0"),
    (1, "--pipeline-schedule seq1f1b --num-slices 33", "--num-slices 33", "32 tokens", "use fewer"),
    (1, "--pipeline-schedule seq1f1b --recompute-levels products", "--recompute-granularity", "leave"),
    (1, "--pipeline-schedule seq1f1b --recompute-without-attention", "--recompute-granularity", "leave"),
    (1, "--num-layers nine", "--num-layers", "'nine'"),
    (1, "--lr fast", "--lr", "'fast'"),
    (1, "--hidden-sizes 64", "--hidden-sizes"),
    (1, "--hidden 64", "--hidden 64"),
]


@pytest.mark.parametrize(("world_size", "arguments", "words"), [(w, a, p) for w, a, *p in REFUSED])
def test_refusals_name_flag_value_and_remedy(parse, world_size, arguments, words):
    with pytest.raises(ValueError, match=r".") as error:
        parse(arguments, world_size=world_size)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


# Data, from real files


@pytest.fixture(scope="module")
def prefix(tmp_path_factory):
    """Ten documents of 11 tokens."""
    folder = tmp_path_factory.mktemp("data")
    source = folder / "in.jsonl"
    source.write_text("".join(f'{{"text": "document {number}"}}\n' for number in range(10)))
    prepare_dataset(PreparationOptions([str(source)], str(folder / "set"), tokenizer="byte"))
    return folder / "set"


def test_dataset_is_inspected(parse, prefix):
    settings = parse(f"--data-path {prefix}", dataset=None)
    assert settings.data.dataset == describe_prefix(prefix)
    assert settings.data.dataset.num_tokens == 110
    assert settings.model.padded_vocab_size == 384


@pytest.mark.parametrize("split", ["969,30,1", "1,0,0", "0.9,0.1,0", "80, 10, 10", ".5,.5,0.", "100,0,0"])
def test_splits(prefix, monkeypatch, split):
    monkeypatch.setenv("WORLD_SIZE", "1")
    settings = parse_arguments([*MINIMAL.split(), "--data-path", str(prefix), "--split", split])
    assert settings.data.split == split


@pytest.mark.parametrize(
    "split", ["", "1", "90,10", "1,1,1,1", "a,b,c", "-1,1,1", "0,1,1", "1e3,1,1", "nan,1,1", "1,,1", "1;1;1"]
)
def test_split_that_is_not_three_weights(monkeypatch, prefix, split):
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(ValueError, match=f"--split: {re.escape(repr(split))} must be three weights"):
        parse_arguments([*MINIMAL.split(), "--data-path", str(prefix), f"--split={split}"])


def test_sequence_longer_than_all_text(parse, prefix):
    with pytest.raises(ValueError, match=r"holds 110 tokens, .* --seq-length 110; prepare more text"):
        parse(f"--data-path {prefix} --seq-length 110", dataset=None)
    parse(f"--data-path {prefix} --seq-length 109", dataset=None)


def test_missing_data(parse, tmp_path):
    with pytest.raises(ValueError, match="no such file: check the prefix"):
        parse(f"--data-path {tmp_path}/none", dataset=None)
