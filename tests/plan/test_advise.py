"""Advice: candidates, memory, context parallelism, and what is said about them."""

from dataclasses import replace
from functools import partial

import pytest

from helixpipe.plan import ScheduleRequest, build_plan
from helixpipe.plan.advise import Candidate, advise, make_job
from helixpipe.plan.advise.advice import Option, _counted, _has_room, _pipeline, efficiency, iteration_ms
from helixpipe.plan.advise.candidates import candidates
from helixpipe.plan.advise.context_parallel import Exchange, predict_context_parallel, share_sequence
from helixpipe.plan.advise.messages import peak_with_messages
from helixpipe.plan.cost_model import (
    HARDWARE,
    MODELS,
    Pieces,
    Recompute,
    Workload,
    costs_of_plan,
    predict_pieces,
)
from helixpipe.plan.cost_model.work import PIECES
from helixpipe.plan.lower import lower
from helixpipe.plan.schedules.request import KnownCosts
from helixpipe.plan.simulation.memory import peak_bytes
from helixpipe.plan.simulation.network import Network
from helixpipe.plan.simulation.simulate import simulate

GIB = 2**30


def job(seq_length=131072, model="gpt-7b", limit_gib=91.0, p=8, m=16, **changes):
    workload = Workload(**{"model": MODELS[model], "seq_length": seq_length, "tensor_parallel": 8, **changes})
    return make_job(HARDWARE["h20"], workload, num_ranks=p, num_microbatches=m, memory_limit_gib=limit_gib)


@pytest.fixture(scope="module")
def long():
    return advise(job())


def test_options_are_ranked_and_fit(long):
    times = [option.iteration_ms for option in long.options]
    assert times == sorted(times)
    assert all(option.peak_bytes <= 91 * GIB for option in long.options)
    assert all(0 < option.mfu < 1 and 0 <= option.bubble < 1 for option in long.options)
    assert long.num_candidates > 100


@pytest.mark.slow
def test_an_option_is_what_its_plan_simulates_to(long):
    """The table's figures belong to the very arguments that stand beside them."""
    the_job = job()
    for option in long.options:
        candidate = option.candidate
        if candidate.schedule in {exchange.value for exchange in Exchange}:
            continue
        pieces = the_job.pieces_for(candidate.micro_batch_size)
        levels = candidate.levels(32)
        # What is fitted to costs is fitted to these: built anew it is the same plan.
        plan = build_plan(candidate.schedule, candidate.request(the_job), compute_only=True)
        if candidate.fits_order_to_costs and option.plan != plan:
            known = KnownCosts(partial(costs_of_plan, pieces, recompute=levels), the_job.memory_limit_bytes)
            plan = build_plan(candidate.schedule, candidate.request(the_job, known), compute_only=True)
        assert option.plan == plan
        found = simulate(option.plan, costs_of_plan(pieces, option.plan, levels))
        assert iteration_ms(candidate, found) == option.iteration_ms
        assert max(found.peak_bytes) == option.peak_bytes
        assert candidate.micro_batch_size * candidate.num_microbatches == 16


def test_the_best_keeps_its_time_with_receives_posted_where_its_plan_has_them(long):
    assert long.best is not None
    plan, costs = long.best.plan, long.best.costs
    assert simulate(lower(plan, costs), costs).iteration_ms == long.best.iteration_ms


def test_rejections_say_why(long):
    reasons = {rejection.candidate.label: rejection.reason for rejection in long.rejections}
    assert reasons["helix fold=2 core"].startswith("needs 1")
    assert "GiB over the limit, recomputing full" in reasons["helix fold=2 core"]
    assert "32 key/value heads cannot be split" in reasons["context-parallel all-to-all"]
    shown = {option.candidate.label for option in long.options}
    assert not shown & set(reasons)


@pytest.mark.slow
def test_every_candidate_is_shown_or_rejected():
    the_job = job(limit_gib=30)
    found = advise(the_job)
    labels = {candidate.label for group in candidates(the_job) for candidate in group}
    named = {o.candidate.label for o in found.options} | {r.candidate.label for r in found.rejections}
    assert labels <= named


def test_nothing_fits():
    found = advise(job(limit_gib=1))
    assert found.options == []
    assert found.best is None
    assert all(rejection.reason for rejection in found.rejections)


def test_the_best_is_the_fastest_that_runs(long):
    assert long.best.candidate.label == "helix fold=1 block spread head interlocked W"
    assert long.best.candidate.arguments(job()) == [
        "--pipeline-schedule helix",
        "--pipeline-model-parallel-size 8",
        "--tensor-model-parallel-size 8",
        "--sequence-parallel",
        "--micro-batch-size 1",
        "--global-batch-size 16",
        "--num-fold 1",
        "--attention-range block",
        "--head-placement spread",
        "--round-order interlocked",
        "--split-weight-gradients",
        "--recompute-levels none",
    ]
    short = advise(job(seq_length=32768))
    assert short.best.candidate.label == "helix fold=2 block spread head"
    stages = advise(job(), accept=lambda candidate: candidate.schedule == "interleaved")
    assert stages.best.candidate.arguments(job())[-1] == "--num-layers-per-virtual-pipeline-stage 1"


def test_more_recomputation_only_where_memory_forces_it():
    """Where everything fits, no option that runs recomputes."""
    found = advise(job(seq_length=8192))
    assert {o.candidate.recompute for o in found.options if not o.candidate.why_not_runnable} == {
        Recompute.NONE
    }


def test_memory_that_is_left_is_filled_with_layers_that_recompute_less(long):
    unmixed = {(o.candidate.label, o.candidate.recompute): o for o in long.options if not o.candidate.lighter}
    mixtures = [option for option in long.options if option.candidate.lighter]
    assert mixtures
    for mixed in mixtures:
        plain = unmixed[mixed.candidate.label, mixed.candidate.recompute]
        assert mixed.iteration_ms < plain.iteration_ms
        assert plain.peak_bytes < mixed.peak_bytes <= 91 * GIB
        count, lighter = mixed.candidate.lighter
        levels = mixed.candidate.levels(32)
        assert levels.count(lighter) == count
        assert levels.count(mixed.candidate.recompute) == 32 - count
        more = _pipeline(job(), replace(mixed.candidate, lighter=(count + 1, lighter)))
        # With the buffers of its messages.
        fits = isinstance(more, Option) and _has_room(job(), _counted(job(), more))
        assert not fits, "one more layer would not fit"


def test_lighter_layers_are_spread_evenly():
    candidate = Candidate("helix", Recompute.PRODUCTS, 1, 16, lighter=(3, Recompute.NONE))
    assert [level is Recompute.NONE for level in candidate.levels(7)] == [0, 0, 1, 0, 1, 0, 1]
    assert candidate.recompute_label == "products, in 3 none"


def test_layers_with_windows_are_planned_and_run():
    windows = replace(MODELS["gpt-7b"], windows=(4096, 4096, 4096, 0) * 8)
    workload = Workload(model=windows, seq_length=131072, tensor_parallel=8)
    the_job = make_job(HARDWARE["h20"], workload, num_ranks=8, num_microbatches=16)

    def accept(candidate):
        options = candidate.options
        return candidate.micro_batch_size == 1 and (
            candidate.schedule == "1f1b"
            or (options.get("attention_range"), options.get("num_fold")) == ("block", 1)
        )

    found = advise(the_job, accept)
    assert found.best.candidate.options["round_order"] == "interlocked"
    assert {"attention.window4096", "attention.full"} < set(found.best.plan.segment_names)
    assert {r.candidate.label for r in found.rejections} >= {exchange.value for exchange in Exchange}


def test_accept_narrows_the_search():
    found = advise(job(), accept=lambda candidate: candidate.schedule == "1f1b")
    pipelines = {o.candidate.schedule for o in found.options} - {exchange.value for exchange in Exchange}
    assert pipelines == {"1f1b"}


def test_arguments_name_every_choice():
    the_job = job(data_parallel=2, distributed_optimizer=True)
    candidate = Candidate("helix", Recompute.FULL, 2, 8, {"num_fold": 1, "attention_range": "core"})
    words = " ".join(candidate.arguments(the_job))
    assert "--micro-batch-size 2 --global-batch-size 32 --use-distributed-optimizer" in words
    assert "--num-fold 1 --attention-range core" in words
    assert words.endswith("--recompute-granularity full --recompute-method uniform --recompute-num-layers 1")


def test_arguments_say_what_helix_recomputes_and_how_the_loss_is_computed():
    options = {"num_fold": 2, "attention_range": "core"}

    def words(recompute, **changes):
        return Candidate("helix", recompute, 2, 8, options).arguments(job(**changes))

    assert words(Recompute.NONE)[-1] == "--recompute-levels none"
    assert words(Recompute.WITHOUT_ATTENTION)[-1] == "--recompute-levels without-attention"
    assert words(Recompute.NONE, whole_logits=False)[-1] == "--loss-chunk-size auto"
    assert words(Recompute.NONE, mlp_chunk_size="auto")[-1] == "--mlp-chunk-size auto"
    assert not Candidate("helix", Recompute.WITHOUT_ATTENTION, 2, 8, options).why_not_runnable
    block = {**options, "attention_range": "block", "head_placement": "spread"}
    borrowing = Candidate("helix", Recompute.WITHOUT_ATTENTION, 2, 8, block, chunked_loss=True)
    assert not borrowing.why_not_runnable


# Context parallelism, against sums written out here.


def even_pieces(**changes):
    """Every piece takes 1 ms forward, 2 backward and none for weights; attention 80 and 200."""
    workload = Workload(model=MODELS["llama-7b"], seq_length=8000, **changes)
    found = predict_pieces(workload, HARDWARE["h20"])
    one = replace(found.times["norm1"], forward=1.0, backward=2.0, weight=0.0)
    core = replace(one, forward=80.0, backward=200.0)
    times = {name: core if name == "core" else one for name in PIECES}
    return replace(found, times=times, optimizer_ns=1e-9, overhead_ms=0.0)


def test_a_ring_hides_what_attention_covers():
    pieces = even_pieces()
    fast = Network(latency_ms=0, gb_per_s=1e9)
    found = predict_context_parallel(pieces, Exchange.RING, 4, 3, Recompute.NONE, fast)
    layer = (6 * 3 + 280 / 0.9) / 4
    reduction = share_sequence(pieces, Exchange.RING, 4, fast).reduction_ms(MODELS["llama-7b"].parameters)
    assert found.exposed_ms == 0
    assert found.iteration_ms == pytest.approx(3 * (32 * layer + 2 * 3 / 4) + reduction, rel=1e-6)


def test_a_slow_ring_is_exposed():
    pieces = even_pieces()
    # Keys and values of 2000 tokens: 2 x 2000 x 4096 x 2 bytes, 32.8 ms at 1 GB/s; backward twice that.
    slow = Network(latency_ms=0, gb_per_s=1)
    found = predict_context_parallel(pieces, Exchange.RING, 4, 1, Recompute.NONE, slow)
    step = 2 * 2000 * 4096 * 2 / 1e6
    forward = 3 * max(0, step - 80 / 4 / 0.9 / 4)
    backward = 3 * max(0, 2 * step - 200 / 4 / 0.9 / 4)
    assert found.exposed_ms == pytest.approx(32 * (forward + backward))


def test_all_to_all_is_exposed_and_needs_heads():
    pieces = even_pieces()
    slow = Network(latency_ms=0, gb_per_s=1)
    found = predict_context_parallel(pieces, Exchange.ALL_TO_ALL, 4, 1, Recompute.NONE, slow)
    step = 2000 * 2 * (4 * 4096) * 3 / 4 / 1e6
    assert found.exposed_ms == pytest.approx(32 * 2 * step)
    with pytest.raises(ValueError, match="32 key/value heads cannot be split"):
        predict_context_parallel(pieces, Exchange.ALL_TO_ALL, 64, 1, Recompute.NONE, slow)


@pytest.mark.parametrize("exchange", Exchange)
def test_stages_that_share_sequences_cost_what_context_parallelism_alone_does(exchange):
    """One stage, in two ways: the closed form, and a plan of one rank with shared pieces."""
    pieces = even_pieces(distributed_optimizer=True, data_parallel=2)
    slow = Network(latency_ms=0.5, gb_per_s=1)
    shared = share_sequence(pieces, exchange, 4, slow)
    assert (shared.workload.tokens, shared.workload.context_parallel) == (2000, 4)
    plan = build_plan("1f1b", ScheduleRequest(num_layers=32, num_ranks=1, num_microbatches=3))
    for recompute in (Recompute.NONE, Recompute.FULL):
        alone = predict_context_parallel(pieces, exchange, 4, 3, recompute, slow)
        costs = costs_of_plan(shared, plan, recompute)
        assert simulate(plan, costs).iteration_ms == pytest.approx(alone.iteration_ms, rel=1e-6)
        assert max(peak_bytes(plan, costs)) == pytest.approx(alone.peak_bytes, rel=0.02)
    with pytest.raises(ValueError, match="8000 tokens cannot be shared by context-parallel size 3"):
        share_sequence(pieces, exchange, 3, slow)


def test_one_rank_has_nothing_to_exchange():
    pieces = even_pieces()
    slow = Network(latency_ms=0, gb_per_s=1)
    for exchange in Exchange:
        assert predict_context_parallel(pieces, exchange, 1, 1, Recompute.NONE, slow).exposed_ms == 0


def test_context_parallelism_is_ranked_among_the_pipelines(long):
    """At 128k a ring beats stages, and helix beats the ring; at 32k the ring's messages are exposed."""
    stages = advise(job(), accept=lambda candidate: candidate.schedule != "helix")
    assert stages.options[0].candidate.schedule == "context-parallel ring"
    assert long.options[0].candidate.schedule == "helix"
    short = advise(job(seq_length=32768), accept=lambda candidate: candidate.schedule == "1f1b")
    assert short.options[0].candidate.schedule == "1f1b"


def test_efficiency_is_one_over_the_bubble_without_recomputation():
    plan = build_plan("gpipe", ScheduleRequest(num_layers=8, num_ranks=4, num_microbatches=4))
    workload = Workload(model=replace(MODELS["gpt-1.3b"], num_layers=8), seq_length=4096)
    pieces: Pieces = predict_pieces(workload, HARDWARE["h100"])
    costs = costs_of_plan(pieces, plan, Recompute.NONE)
    assert efficiency(plan, costs) == pytest.approx(1 - simulate(plan, costs).timeline.bubble_ratio)
    again = costs_of_plan(pieces, plan, Recompute.FULL)
    assert efficiency(plan, again) < 0.9 * efficiency(plan, costs)


# Buffers of messages.


def test_messages_of_the_fastest_count_and_must_fit(long):
    """As the executor's own rule counts them, on the plan with its messages."""
    for option in long.options[:10]:
        if option.plan is None:
            continue
        worst = peak_with_messages(option.plan, option.costs, 8)
        assert option.message_bytes == worst - option.peak_bytes > 0
        assert worst <= job().memory_limit_bytes
    first = long.options[0]
    tight = replace(job(), memory_limit_bytes=first.peak_bytes + first.message_bytes // 2)
    label = first.candidate.label
    again = advise(tight, accept=lambda candidate: candidate.label == label)
    # It would fit without them: more is computed again instead.
    assert again.best.candidate.recompute_label != first.candidate.recompute_label
    assert again.best.peak_bytes + again.best.message_bytes <= tight.memory_limit_bytes


def test_memory_that_messages_leave_is_filled():
    """Nothing recomputed fits, but not beside its messages: then some layers keep everything, not none."""
    model = replace(MODELS["gpt-7b"], num_layers=8)

    def best(limit_bytes):
        workload = Workload(model=model, seq_length=131072, tensor_parallel=8)
        sizes = make_job(HARDWARE["h20"], workload, num_ranks=4, num_microbatches=8)
        the_job = replace(sizes, memory_limit_bytes=limit_bytes)
        options = {"num_fold": 2, "attention_range": "block", "head_placement": "spread"}
        return advise(the_job, lambda c: (c.micro_batch_size, c.options) == (1, options)).best

    free = best(2**40)
    assert free.candidate.recompute_label == "none"
    limit = free.peak_bytes + free.message_bytes // 2
    filled = best(limit)
    count, level = filled.candidate.lighter
    assert (filled.candidate.recompute, level) == (Recompute.PRODUCTS, Recompute.NONE)
    assert 0 < count < 8
    assert filled.peak_bytes + filled.message_bytes <= limit
