"""What the joint search says that runs: accepted by training as it is printed, and predicted alike there."""

import pytest

from helixpipe.data.prefix import DatasetInfo
from helixpipe.plan.advise import search
from helixpipe.plan.advise.context_parallel import Exchange
from helixpipe.plan.cost_model import HARDWARE, Workload, predict_pieces
from helixpipe.plan.cost_model.model import model_from_arguments
from helixpipe.plan.cost_model.script import arguments_of_script
from megatron.pretrain.dry_run import describe, predict
from megatron.pretrain.settings.arguments import parse_arguments

MODEL = "--num-layers 4 --hidden-size 2048 --num-attention-heads 16 --untie-embeddings-and-output-weights"
JOB = f"{MODEL} --seq-length 16384 --train-iters 1 --lr 1e-3 --data-path random --bf16"
DATASET = DatasetInfo("random", 50304, 0, 1, 10**6, 10**6)


@pytest.fixture(scope="module")
def findings():
    found = search(
        HARDWARE["h100"],
        Workload(
            model=model_from_arguments("the model", arguments_of_script("m", f"{MODEL} --vocab-size 50304")),
            seq_length=16384,
        ),
        num_gpus=4,
        global_batch=8,
        memory_limit_gib=20.0,
        accept=lambda layout, candidate: (
            layout.exchange is Exchange.ALL_GATHER
            and candidate.options.get("attention_range") in (None, "core")
        ),
        exhaustive=True,
    )
    return [finding for finding in found.findings if not finding.option.candidate.why_not_runnable]


def test_layouts_that_share_sequences_are_accepted_and_predicted_alike(findings, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "0")
    seen = set()
    for finding in findings:
        words = " ".join(finding.option.candidate.arguments(finding.job))
        settings = parse_arguments(f"{JOB} {words}".split(), DATASET)
        pieces = finding.job.pieces_for(finding.option.candidate.micro_batch_size)
        assert settings.workload == pieces.workload
        prediction = predict(settings, settings.schedule.plan, "h100")
        # The search simulates orders without messages, and fits and counts the best of them alone.
        assert prediction.iteration_ms == pytest.approx(finding.iteration_ms, rel=5e-3)
        if finding.option.message_bytes is not None:
            assert prediction.peak_bytes == pytest.approx(finding.peak_bytes, rel=1e-2)
        seen.add(finding.option.candidate.schedule)
    assert {"1f1b", "helix"} <= seen


def test_a_profile_tells_nothing_about_shared_sequences(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "4")
    path = tmp_path / "profile.json"
    whole = parse_arguments(f"{JOB} --micro-batch-size 1 --global-batch-size 8".split(), DATASET).workload
    path.write_text(predict_pieces(whole, HARDWARE["h100"]).to_json())
    words = "--micro-batch-size 1 --global-batch-size 8 --context-parallel-size 2"
    settings = parse_arguments(f"{JOB} {words}".split(), DATASET)
    with pytest.raises(ValueError, match=r"profile\.json is a profile, which tells nothing about sequences"):
        predict(settings, settings.schedule.plan, str(path))


def test_experts_that_a_sequences_ranks_share_are_not_predicted(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    words = (
        "--micro-batch-size 1 --global-batch-size 8 --context-parallel-size 2 --num-experts 4 "
        "--moe-router-topk 2 --pipeline-model-parallel-size 2 --expert-model-parallel-size"
    )
    told = [
        list(describe(parse_arguments(f"{JOB} {words} {size}".split(), DATASET), "h100")) for size in (1, 2)
    ]
    assert any(line.startswith("predicted on h100: ") for line in told[0])
    assert told[1][-1] == "prediction: none, for experts that are shared by ranks which share a sequence"
