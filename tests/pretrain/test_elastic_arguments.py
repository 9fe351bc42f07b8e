"""Arguments of the elastic schedule."""

from __future__ import annotations

from dataclasses import replace

import pytest

from helixpipe.data.prefix import DatasetInfo
from helixpipe.elastic import costs_to_json, ideal_costs
from helixpipe.megatron_adapter.elastic_forward_backward import ElasticForwardBackward
from helixpipe.megatron_adapter.schedule import make_forward_backward
from helixpipe.runtime.trace import NullClock
from megatron.pretrain.model import build_config
from megatron.pretrain.settings.arguments import parse_arguments

LINE = (
    "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --micro-batch-size 1 "
    "--global-batch-size 8 --train-iters 10 --lr 1e-3 --data-path unused --pipeline-model-parallel-size 2"
)
ELASTIC = f"{LINE} --pipeline-schedule elastic --memory-limit-gib 2"
HELIX = f"{LINE} --pipeline-schedule elastic-helix --memory-limit-gib 2 --elastic-costs {{costs}}"
DATASET = DatasetInfo("unused", 300, 0, 100, 10_000, 500)


@pytest.fixture
def parse(monkeypatch, tmp_path):
    """``parse(words)``, where {costs} stands for a file of costs."""
    path = tmp_path / "costs.json"
    path.write_text(costs_to_json(ideal_costs()), encoding="utf-8")
    monkeypatch.setenv("WORLD_SIZE", "4")
    return lambda words: parse_arguments(words.format(costs=path).split(), DATASET)


def test_the_job_is_derived(parse):
    settings = parse(f"{ELASTIC} --elastic-costs {{costs}}")
    assert settings.training.max_seq_length == 32
    assert settings.training.calculate_per_token_loss
    job = settings.elastic_job
    assert (job.num_stages, job.num_layers, job.memory_limit_bytes) == (2, 4, 2 << 30)
    schedule = make_forward_backward(settings.schedule.execution, settings.schedule.plan, NullClock())
    assert isinstance(schedule, ElasticForwardBackward)
    assert job.costs.token_multiple == 1
    longer = parse(f"{ELASTIC} --elastic-costs {{costs}} --max-seq-length 90 --position-embedding-type rope")
    assert longer.training.max_seq_length == 90


def test_documents_are_apart_anyhow(parse):
    args = parse(f"{ELASTIC} --elastic-costs {{costs}} --reset-attention-mask --reset-position-ids")
    assert not args.data.ends_at_documents


def test_sequence_parallelism_pads_chunks(parse, tmp_path):
    path = tmp_path / "tensor.json"
    path.write_text(costs_to_json(replace(ideal_costs(), tensor_parallel=2)), encoding="utf-8")
    words = f"{ELASTIC} --elastic-costs {path} --tensor-model-parallel-size 2"
    assert parse(words).elastic_job.costs.token_multiple == 1
    assert parse(f"{words} --sequence-parallel").elastic_job.costs.token_multiple == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            f"{LINE} --elastic-costs {{costs}}",
            "--elastic-costs is for --pipeline-schedule elastic, elastic-helix and elastic-auto",
        ),
        (f"{LINE} --max-seq-length 8", "--max-seq-length is for --pipeline-schedule elastic, elastic-"),
        (ELASTIC, "elastic needs --elastic-costs FILE, as python -m helixpipe elastic-costs writes it"),
        (f"{ELASTIC} --max-seq-length 0", "--max-seq-length: must be at least 1"),
        (
            f"{ELASTIC} --elastic-costs {{costs}} --max-seq-length 90",
            "--max-seq-length 90 is longer than the model's --max-position-embeddings 32",
        ),
        (
            f"{ELASTIC} --elastic-costs {{costs}} --tensor-model-parallel-size 2",
            "are for tensor-parallel size 1, the job has 2; make them anew",
        ),
        (f"{HELIX} --num-fold 2", "cannot honour --num-fold: .*; leave it out"),
        (
            f"{HELIX} --recompute-levels none --attention-range block",
            "the costs do not know the attention range block, only core; make them anew",
        ),
        (f"{HELIX} --recompute-levels none --attention-range all", "'all'; choose one of core, qkv, block"),
        (f"{HELIX} --attention-range auto", "auto does not apply to elastic-helix, .*; name the range"),
        (f"{ELASTIC} --attention-range core", "cannot honour --attention-range: .*; leave it out"),
        (f"{HELIX} --recompute-levels products", "know no level of recomputation 'products'; known: none"),
        (
            f"{HELIX} --recompute-levels none:2,products:2",
            "elastic-helix has one level for all layers; give one",
        ),
        (f"{HELIX} --recompute-granularity selective", "recomputes by --recompute-without-attention"),
        (f"{ELASTIC} --elastic-costs {{costs}} --num-layers 5", "number of layers .* multiple"),
        (
            f"{ELASTIC} --elastic-costs {{costs}} --decoder-first-pipeline-num-layers 2 "
            "--decoder-last-pipeline-num-layers 1",
            "are 3 layers of --num-layers 4; let them add up to it",
        ),
        (f"{ELASTIC} --micro-batch-size 2", "cannot honour --micro-batch-size: .*; give 1"),
        (f"{ELASTIC} --num-fold 2", "cannot honour --num-fold: .*; leave it out"),
        (f"{ELASTIC} --eod-mask-loss", "cannot honour --eod-mask-loss"),
        (f"{ELASTIC} --recompute-without-attention", "cannot honour --recompute-without-attention"),
        (
            f"{ELASTIC} --recompute-granularity selective",
            "cannot honour --recompute-granularity: .* plans decide how they are cut, packed and recomputed",
        ),
    ],
    ids=lambda value: value[-40:],
)
def test_what_does_not_fit_is_refused(parse, words, message):
    with pytest.raises(ValueError, match=message) as caught:
        parse(words)
    assert "\n" not in str(caught.value)


def test_stages_may_differ(parse):
    """A layer fewer beside the head, of any number; helix has no stages."""
    words = "--elastic-costs {costs} --decoder-last-pipeline-num-layers 1"
    settings = parse(f"{ELASTIC} {words}")
    assert settings.elastic_job.layers_by_stage == (3, 1)
    assert build_config(settings).num_layers_in_last_pipeline_stage == 1
    assert parse(f"{ELASTIC} {words} --num-layers 5").elastic_job.layers_by_stage == (4, 1)
    helix = parse(f"{HELIX} --recompute-levels none --decoder-last-pipeline-num-layers 1")
    assert helix.elastic_job.stage_layers == ()
    assert build_config(helix).num_layers_in_last_pipeline_stage is None
    assert "--decoder-last-pipeline-num-layers (layers are in no stages)" in helix.needless_flags


def test_elastic_helix_is_planned_at_the_models_level(parse, tmp_path):
    settings = parse(f"{HELIX} --recompute-levels none")
    assert (settings.elastic_job.schedule, settings.elastic_job.recompute) == ("elastic-helix", "none")
    assert settings.elastic_job.attention_range == "core"
    assert not settings.memory.memory_saving.recomputes
    assert settings.schedule.plan is None
    made = make_forward_backward(settings.schedule.execution, None, NullClock())
    assert isinstance(made, ElasticForwardBackward)
    whole = parse(f"{ELASTIC} --elastic-costs {{costs}}").elastic_job
    assert (whole.schedule, whole.attention_range) == ("elastic", None)
    block = tmp_path / "block.json"
    of_block = replace(ideal_costs().cut, attention_range="block")
    block.write_text(costs_to_json(replace(ideal_costs(), cuts_with_weights=(of_block,))), encoding="utf-8")
    lending = f"{HELIX.replace('{costs}', str(block))} --recompute-levels none --attention-range block"
    assert parse(lending).elastic_job.attention_range == "block"
    old = tmp_path / "old.json"
    old.write_text(costs_to_json(replace(ideal_costs(), cut=None)), encoding="utf-8")
    with pytest.raises(ValueError, match="do not say how a layer's costs fall to attention and the rest"):
        parse(f"{HELIX.replace('{costs}', str(old))} --recompute-levels none")
