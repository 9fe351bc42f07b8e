"""What the joint search says that runs is accepted by training as it is printed."""

import pytest

from helixpipe.data.prefix import DatasetInfo
from helixpipe.plan.advise import search
from helixpipe.plan.advise.context_parallel import Exchange
from helixpipe.plan.cost_model import HARDWARE, Workload
from helixpipe.plan.cost_model.model import model_from_arguments
from helixpipe.plan.cost_model.script import arguments_of_script
from megatron.pretrain.settings.arguments import parse_arguments

MODEL = "--num-layers 4 --hidden-size 2048 --num-attention-heads 16 --untie-embeddings-and-output-weights"
JOB = f"{MODEL} --seq-length 16384 --train-iters 1 --lr 1e-3 --data-path random --bf16"
DATASET = DatasetInfo("random", 50304, 0, 1, 10**6, 10**6)


@pytest.fixture(scope="module")
def findings():
    found = search(
        HARDWARE["h100"],
        Workload(
            model=model_from_arguments("m", arguments_of_script("m", f"{MODEL} --vocab-size 50304")),
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


def test_layouts_that_share_sequences_are_accepted(findings, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "0")
    seen = set()
    for finding in findings:
        words = " ".join(finding.option.candidate.arguments(finding.job))
        settings = parse_arguments(f"{JOB} {words}".split(), DATASET)
        assert settings.workload.data_parallel == finding.layout.data * finding.layout.context
        seen.add(finding.option.candidate.schedule)
    assert {"1f1b", "helix"} <= seen
