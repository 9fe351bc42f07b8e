"""Options for rotary positions: what goes together, and what is filled in."""

import pytest

from helixpipe.data.prefix import DatasetInfo
from helixpipe.plan import ScheduleRequest, build_plan
from megatron.pretrain.settings.arguments import parse_arguments

DATASET = DatasetInfo(
    prefix="unused", vocab_size=300, eod=0, num_documents=100, num_tokens=10_000, longest_document=500
)
MINIMAL = (
    "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --micro-batch-size 1 "
    "--global-batch-size 8 --train-iters 10 --lr 1e-3 --data-path unused"
)
YARN = "--position-embedding-type yarn --rotary-scaling-factor 4 --yarn-original-max-position-embeddings 16"


def parse(options):
    return parse_arguments(f"{MINIMAL} {options}".split(), dataset=DATASET)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--rotary-scaling-factor 4", "--rotary-scaling-factor needs --position-embedding-type yarn"),
        ("--position-embedding-type rope --yarn-beta-fast 3", "--yarn-beta-fast needs --position-embedding"),
        ("--position-embedding-type yarn --rotary-scaling-factor 4", "needs --yarn-original-max-position"),
        (
            "--position-embedding-type rope --no-yarn-correction-range-round-to-int",
            "--no-yarn-correction-range-round-to-int needs --position-embedding-type yarn",
        ),
        (f"{YARN} --rotary-percent 0.5", "scales all channels itself; leave --rotary-percent"),
        (f"{YARN} --use-rope-scaling", "scales all channels itself"),
        ("--use-rope-scaling", "--use-rope-scaling needs --position-embedding-type rope"),
        ("--position-embedding-type rope --rope-scaling-factor 9", "factor needs --use-rope-scaling"),
        ("--no-rope-freq 2", "--no-rope-freq needs --position-embedding-type rope"),
        ("--position-embedding-type rope --no-rope-freq 3", "3 must divide --num-layers 4"),
        ("--position-embedding-type rope --no-rope-freq [0,1]", "has 2 layers, and --num-layers is 4"),
        ("--rotary-base-local 100", "--rotary-base-local needs --position-embedding-type rope"),
        ("--position-embedding-type rope --rotary-base-local 100", "needs --window-size"),
        ("--openai-gelu --geglu", "--geglu and --openai-gelu are two"),
        ("--openai-gelu --swiglu", "two activation functions; leave one out"),
        ("--window-attn-skip-freq 2", "--window-attn-skip-freq needs --window-size"),
        ("--window-size 3,0 --window-attn-skip-freq [1,0]", "has 2 layers, and --num-layers is 4"),
        ("--padded-vocab-size 299", "--padded-vocab-size 299 must be .* vocabulary of 300; use 300 or more"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        parse(options)


@pytest.mark.parametrize(
    "positions",
    [YARN, "--position-embedding-type rope --window-size 3,0 --rotary-base-local 100"],
)
def test_documents_go_with_all_kinds_of_rotary_positions(positions):
    assert parse(f"{positions} --reset-position-ids --reset-attention-mask").data.ends_at_documents


def test_yarn_has_the_values_of_its_paper():
    args = parse(YARN).model
    assert (args.yarn_beta_fast, args.yarn_beta_slow, args.rotary_scaling_factor) == (32.0, 1.0, 4.0)
    assert parse(f"{YARN} --yarn-beta-fast 8").model.yarn_beta_fast == 8.0
    assert parse("--padded-vocab-size 512").model.padded_vocab_size == 512


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--attention-range core", "under helix needs --attention-range qkv or block, .*, not core$"),
        ("--attention-range auto", "needs --attention-range qkv or block, which lends sinks, not core$"),
        (
            "--pipeline-schedule sliced-helix --attention-range qkv",
            "under sliced-helix needs --attention-range block, which lends sinks, not qkv$",
        ),
    ],
)
def test_learned_sinks_need_lent_weights(options, message, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    line = "--softmax-type learnable --pipeline-model-parallel-size 2 --pipeline-schedule helix"
    with pytest.raises(ValueError, match=message):
        parse(f"{line} {options}")
    for schedule in ("", "--pipeline-schedule sliced-helix --hardware h20"):
        assert parse(f"{line} --attention-range block {schedule}").model.softmax_type == "learnable"


@pytest.mark.parametrize(("attention_range", "goes"), [("core", False), ("block", True)])
def test_learned_sinks_go_by_the_range_of_a_plan(attention_range, goes, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    request = ScheduleRequest(num_layers=4, num_ranks=2, num_microbatches=8, attention_range=attention_range)
    (tmp_path / "plan.json").write_text(build_plan("helix", request).to_json())
    line = f"--softmax-type learnable --pipeline-model-parallel-size 2 --plan {tmp_path / 'plan.json'}"
    if goes:
        assert parse(line).model.softmax_type == "learnable"
    else:
        with pytest.raises(ValueError, match=r"needs --attention-range qkv or block, .*, not core$"):
            parse(line)


def test_layers_with_windows_have_names_and_costs_of_their_own(monkeypatch):
    """Or an order could not be fitted to the costs of a machine."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    line = "--pipeline-model-parallel-size 2 --pipeline-schedule helix --window-size 7,0"
    fitted = "--round-order interlocked --hardware h20"
    plan = parse(f"{line} --window-attn-skip-freq 2 {fitted}").schedule.plan
    assert {"attention.window8", "attention.full"} < set(plan.segment_names)
    assert "attention" in parse(f"{line} {fitted}").schedule.plan.segment_names


@pytest.mark.parametrize("option", ["--glu-linear-offset 1", "--activation-func-clamp-value 7"])
def test_what_is_of_a_gate_needs_one(option):
    with pytest.raises(ValueError, match="is for a gated MLP; add --swiglu or --geglu or --quick-geglu"):
        parse(option)
    assert parse(f"--quick-geglu {option}").model.quick_geglu
