"""Advice on slices: ranked with their memory and what short kernels lose, for one sequence and for many."""

from functools import cache

import pytest

from helixpipe.plan.advise import advise, make_job, slice_verdict
from helixpipe.plan.cost_model import HARDWARE, MODELS, Workload
from helixpipe.plan.simulation.memory import peak_bytes
from helixpipe.report.advice import print_advice

SLICED = "sliced-helix"


@cache
def found(model="llama-7b", machine="h20", seq_length=131072, p=8, m=1):
    workload = Workload(model=MODELS[model], seq_length=seq_length, tensor_parallel=8, whole_logits=False)
    job = make_job(HARDWARE[machine], workload, num_ranks=p, num_microbatches=m)
    labels = ("1f1b", f"{SLICED} fold=2 core spread head", f"{SLICED} fold=2 core spread head resend")
    return job, advise(job, lambda candidate: candidate.label in labels and candidate.micro_batch_size == 1)


def test_one_sequence_of_a_model_that_fits_no_other_way():
    """Llama 70B at 128k on 64 H20: several times as fast as 1F1B."""
    job, advice = found("llama-70b")
    best = advice.options[0]
    assert best.candidate.schedule == SLICED
    assert not best.candidate.why_not_runnable
    assert best.peak_bytes == max(peak_bytes(best.plan, best.costs)) < job.memory_limit_bytes
    rival = next(o for o in advice.options if o.candidate.schedule == "1f1b")
    assert rival.iteration_ms > 5 * best.iteration_ms
    assert len([o for o in advice.options if o.candidate.schedule == SLICED]) == 2


def test_sequences_repeat_the_pipeline_but_not_its_end():
    """Reduction and optimizer once per iteration, whatever the number of sequences."""
    one, four = (next(o for o in found(m=m)[1].options if o.candidate.schedule == SLICED) for m in (1, 4))
    assert four.candidate.options == one.candidate.options
    assert four.peak_bytes == one.peak_bytes
    assert 3.9 * one.iteration_ms < four.iteration_ms < 4 * one.iteration_ms


def test_what_short_kernels_lose_is_said_apart(capsys):
    job, advice = found("llama-70b")
    verdict = slice_verdict(advice, job)
    assert verdict.pays
    assert verdict.full_rate_ms < verdict.option.iteration_ms < 1.1 * verdict.full_rate_ms
    print_advice(advice, job)
    text = capsys.readouterr().out
    assert "with what attention loses on short ones" in text
    assert "Slices pay: 7." in text


def test_short_sequences_do_not_pay(capsys):
    job, advice = found(machine="h100", seq_length=8192, p=2, m=16)
    verdict = slice_verdict(advice, job)
    assert not verdict.pays
    assert verdict.rival.candidate.schedule == "1f1b"
    print_advice(advice, job)
    assert "Slices do not pay: 1f1b, with whole sequences, is 1." in capsys.readouterr().out


def test_sequences_that_cannot_be_cut_are_rejected():
    job, advice = found(seq_length=1024)
    assert slice_verdict(advice, job) is None
    reasons = [r.reason for r in advice.rejections if r.candidate.schedule == SLICED]
    assert len(reasons) == 2
    assert all("cannot be cut into 16 slices of a multiple of 128" in reason for reason in reasons)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "machine", "seq_length", "m"),
    [
        ("llama-70b", "h20", 131072, 16),
        ("llama-70b", "h20", 131072, 1),
        ("llama-7b", "h100", 524288, 1),
        ("llama-7b", "h100", 1048576, 1),
    ],
)
def test_long_sequences_have_a_helix_plan_that_runs(model, machine, seq_length, m):
    """On 64 GPUs, with the whole logits, and with its messages."""
    workload = Workload(model=MODELS[model], seq_length=seq_length, tensor_parallel=8)
    job = make_job(HARDWARE[machine], workload, num_ranks=8, num_microbatches=m)
    advice = advise(job, lambda candidate: candidate.schedule in ("helix", SLICED))
    best = advice.best
    assert best is not None
    assert best.candidate.schedule in ("helix", SLICED)
    assert best.peak_bytes + best.message_bytes <= job.memory_limit_bytes
