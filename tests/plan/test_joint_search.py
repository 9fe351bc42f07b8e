"""The joint search: the same best as without bounds, bounds that hold, layouts that add up."""

from __future__ import annotations

import gc
import re
from dataclasses import replace

import pytest

from helixpipe.__main__ import main
from helixpipe.plan.advise import bounds, joint
from helixpipe.plan.advise.advice import LIGHTER, Option, _pipeline, evaluate, improve, mixed
from helixpipe.plan.advise.bounds import Outlook, least_bytes, least_ms, least_ms_in_memory
from helixpipe.plan.advise.candidates import candidates
from helixpipe.plan.advise.context_parallel import Exchange
from helixpipe.plan.advise.joint import search
from helixpipe.plan.advise.layouts import Layout, layout_job, layouts
from helixpipe.plan.advise.limits import main_limit, time_shares
from helixpipe.plan.advise.messages import peak_with_messages
from helixpipe.plan.cost_model import HARDWARE, MODELS, Recompute, Workload
from helixpipe.plan.cost_model.segments import rank_parameters
from helixpipe.plan.schedules import SCHEDULES
from helixpipe.plan.simulation.memory import peak_bytes
from helixpipe.plan.simulation.simulate import simulate
from tests.plan.test_planned_families import model_of

SMALL = replace(MODELS["gpt-1.3b"], num_layers=4)
# Slow links between small nodes, so that many layouts are close to each other.
MACHINE = replace(HARDWARE["h20"], gpus_per_node=2, nics_per_node=2)


def workload(**changes):
    return Workload(**{"model": SMALL, "seq_length": 16384, **changes})


def with_few_options(layout, candidate):
    """A third of helix is enough."""
    return candidate.options.get("attention_range") in (None, "block")


def found(num_gpus=4, batch=4, limit_gib=9.0, accept=with_few_options, **options):
    return search(
        MACHINE,
        workload(),
        num_gpus=num_gpus,
        global_batch=batch,
        memory_limit_gib=limit_gib,
        accept=accept,
        **options,
    )


@pytest.fixture(scope="module")
def pruned():
    return found()


@pytest.fixture(scope="module")
def exhaustive():
    return found(exhaustive=True)


def key(finding):
    candidate = finding.option.candidate
    return finding.layout.label, candidate.label, candidate.recompute_label, round(finding.iteration_ms, 6)


def test_the_best_are_those_of_an_exhaustive_search(pruned, exhaustive):
    """All that is shown, and the best of every family, with fewer simulations."""
    assert [key(f) for f in pruned.shown] == [key(f) for f in exhaustive.shown]
    assert [key(f) for f in pruned.best_of_families] == [key(f) for f in exhaustive.best_of_families]
    assert key(pruned.best_that_runs) == key(exhaustive.best_that_runs)
    assert pruned.num_simulated < 0.8 * exhaustive.num_simulated
    assert len(exhaustive.findings) > len(pruned.shown) == joint.SHOWN


def test_memory_that_is_left_is_filled_wherever_that_may_be_shown(exhaustive):
    """Not only in what would be shown without: some layers compute less again."""
    filled = [finding for finding in exhaustive.findings if finding.option.candidate.lighter]
    assert len(filled) > 5
    for finding in exhaustive.findings[joint.SHOWN :]:
        mixture = mixed(finding.job, finding.option.candidate)
        assert mixture is None or mixture.iteration_ms >= finding.iteration_ms * (1 - 1e-9)


WIDER = (
    pytest.param(2, 4, 20.0, "gpt-1.3b", 16384, id="every option on 2 GPUs"),
    pytest.param(4, 8, 30.0, "llama-7b", 8192, marks=pytest.mark.slow, id="every option on 4 GPUs"),
    pytest.param(8, 8, 9.0, "gpt-1.3b", 32768, marks=pytest.mark.slow, id="every option on 8 GPUs"),
)


@pytest.mark.parametrize(("num_gpus", "batch", "limit_gib", "model", "seq_length"), WIDER)
def test_bounds_lose_nothing_that_is_shown(num_gpus, batch, limit_gib, model, seq_length):
    shape = replace(MODELS[model], num_layers=4)
    pruned, whole = (
        search(
            MACHINE,
            Workload(model=shape, seq_length=seq_length),
            num_gpus=num_gpus,
            global_batch=batch,
            memory_limit_gib=limit_gib,
            exhaustive=exhaustive,
        )
        for exhaustive in (False, True)
    )
    assert [key(f) for f in pruned.shown] == [key(f) for f in whole.shown]
    assert [key(f) for f in pruned.best_of_families] == [key(f) for f in whole.best_of_families]
    assert key(pruned.best_that_runs) == key(whole.best_that_runs)
    assert pruned.num_simulated < whole.num_simulated


def test_the_fastest_that_runs_is_found_wherever_it_ranks(monkeypatch):
    """Even if neither it nor its family's best is shown: here all are one family, and one of it is shown."""
    monkeypatch.setattr(joint, "SHOWN", 1)
    monkeypatch.setattr(joint, "_family", lambda layout, candidate: "")
    monkeypatch.setattr(joint, "_family_of", lambda layout, kind: "")

    def accept(layout, candidate):
        others = layout.context == 1 and layout.pipeline == 4
        return (layout.exchange is Exchange.ALL_TO_ALL or others) and with_few_options(layout, candidate)

    fewer, whole = (found(accept=accept, exhaustive=exhaustive) for exhaustive in (False, True))
    assert fewer.best_that_runs.iteration_ms > fewer.findings[0].iteration_ms
    assert key(fewer.best_that_runs) == key(whole.best_that_runs)


def test_sequences_that_are_shared_run_as_training_shares_them(exhaustive):
    """It gathers keys and values."""
    shared = [finding for finding in exhaustive.findings if finding.layout.context > 1]
    reasons = {
        (f.layout.exchange, f.option.candidate.why_not_runnable)
        for f in shared
        if f.option.candidate.why_not_runnable != "recompute"
    }
    assert reasons == {
        (Exchange.RING, "exchange"),
        (Exchange.ALL_TO_ALL, "exchange"),
        (Exchange.ALL_GATHER, ""),
        (Exchange.ALL_GATHER, "tied weights"),
    }


def test_a_bound_that_is_too_high_loses_the_best(monkeypatch, exhaustive):
    """So the test above would notice one."""
    true = Outlook.least_ms
    monkeypatch.setattr(
        Outlook, "least_ms", lambda self, level: true(self, level) * (1 + len(str(self._work.plan.num_ranks)))
    )
    monkeypatch.setattr(joint, "SHOWN", 1)
    assert found().num_simulated < exhaustive.num_simulated
    monkeypatch.setattr(joint, "least_ms_in_memory", lambda *_: 1e9)
    assert [key(f) for f in found().findings[:3]] != [key(f) for f in exhaustive.findings[:3]]


LAYOUTS = (
    Layout(pipeline=4),
    Layout(tensor=2, pipeline=2),
    Layout(context=2, exchange=Exchange.RING, pipeline=2),
    Layout(pipeline=2, data=2),
)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.label)
def test_bounds_hold_for_every_candidate(layout):
    """What is simulated takes at least the bound of its layout, of its memory and of its group."""
    job = layout_job(MACHINE, workload(), layout, 8, 14.0)
    seen = 0
    for group in candidates(job):
        for candidate in group:
            outcome = evaluate(job, candidate)
            if not isinstance(outcome, Option):
                continue
            seen += 1
            pieces = job.pieces_for(candidate.micro_batch_size)
            m, level = candidate.num_microbatches, candidate.recompute
            limit = job.memory_limit_bytes
            outlook = Outlook(job, candidate)
            assert outlook.least_bytes(level) <= outcome.peak_bytes
            rounding = 1 - 1e-9
            assert outlook.least_ms(level) * rounding <= outcome.iteration_ms
            assert least_ms(pieces, layout.pipeline, m) * rounding <= outcome.iteration_ms
            if not SCHEDULES[candidate.schedule].slices_sequences:
                in_memory = least_ms_in_memory(pieces, layout.pipeline, m, limit)
                assert in_memory * rounding <= outcome.iteration_ms
    assert seen > 20


@pytest.mark.parametrize("layout", [LAYOUTS[0], LAYOUTS[3]], ids=lambda layout: layout.label)
def test_bounds_hold_where_memory_that_is_left_is_filled(layout):
    """And they are no lower than they need be: no more than the heavier recomputation's alone."""
    shape = replace(SMALL, num_layers=8)
    job = layout_job(MACHINE, workload(model=shape, whole_logits=False), layout, 8, 8.0)
    seen = 0
    for candidate in (c for group in candidates(job) for c in group if with_few_options(layout, c)):
        if candidate.micro_batch_size > 1 or not isinstance(evaluate(job, candidate), Option):
            continue
        mixture = mixed(job, candidate)
        if mixture is not None:
            seen += 1
            outlook, level = Outlook(job, candidate), candidate.recompute
            bound_ms = outlook.least_mixed_ms(level, LIGHTER[level], job.memory_limit_bytes)
            assert bound_ms * (1 - 1e-9) <= mixture.iteration_ms
            assert outlook.least_ms(LIGHTER[level]) <= bound_ms <= outlook.least_ms(level) * (1 + 1e-9)
    assert seen > 5


@pytest.mark.parametrize(
    ("limit_gib", "level"), [(9.0, Recompute.WITHOUT_ATTENTION), (12.0, Recompute.PRODUCTS)]
)
def test_layers_that_compute_less_again_lower_the_bound(limit_gib, level):
    """Without a pipeline nothing else delays: the heavier recomputation alone takes longer."""
    shape = replace(SMALL, num_layers=8)
    job = layout_job(MACHINE, workload(model=shape, whole_logits=False), Layout(data=4), 8, limit_gib)
    candidate = next(c for group in candidates(job) for c in group if c.recompute is level)
    found_ms = mixed(job, candidate).iteration_ms
    outlook = Outlook(job, candidate)
    bound_ms = outlook.least_mixed_ms(level, LIGHTER[level], job.memory_limit_bytes)
    assert bound_ms <= found_ms < outlook.least_ms(level)
    assert found_ms < 1.04 * bound_ms


def test_the_bound_of_stages_is_their_time_where_nothing_else_delays_them():
    """1F1B without messages: (m - 1 + p) times the slowest stage, which has the head."""
    free = replace(MACHINE, nvlink_gb_per_s=1e12, nic_gb_per_s=1e12, latency_ms=1e-9, node_latency_ms=1e-9)
    job = layout_job(free, workload(), Layout(pipeline=4), 8, 95.0)
    first = next(group[0] for group in candidates(job) if group[0].schedule == "1f1b")
    outcome = evaluate(job, first)
    assert Outlook(job, first).least_ms(Recompute.NONE) == pytest.approx(outcome.iteration_ms, rel=1e-6)


def test_what_its_links_carry_bounds_a_schedule_that_sends_much():
    """Keys and values of slices between nodes of one GPU."""
    apart = replace(MACHINE, gpus_per_node=1, nics_per_node=1, nic_gb_per_s=0.5)
    job = layout_job(apart, workload(), Layout(pipeline=4), 8, 95.0)
    first = next(group[0] for group in candidates(job) if group[0].schedule == "sliced-helix")
    bound_ms = Outlook(job, first).least_ms(Recompute.NONE)
    work_ms = Outlook(layout_job(MACHINE, workload(), Layout(pipeline=4), 8, 95.0), first).least_ms(
        Recompute.NONE
    )
    assert 5 * work_ms < bound_ms < evaluate(job, first).iteration_ms < 2 * bound_ms


def test_nothing_looks_for_cycles_during_a_search():
    seen = []
    search(
        MACHINE,
        workload(),
        num_gpus=2,
        global_batch=2,
        accept=lambda layout, candidate: seen.append(gc.isenabled()) or False,
    )
    assert gc.isenabled()
    assert seen
    assert not any(seen)


def test_little_memory_means_few_micro_batches_under_way():
    job = layout_job(MACHINE, workload(), Layout(pipeline=4), 8)
    pieces = job.pieces()
    static = least_bytes(pieces, 4)
    ample = least_ms_in_memory(pieces, 4, 8, static + 100 * 2**30)
    assert ample == least_ms(pieces, 4, 8)
    tight = [least_ms_in_memory(pieces, 4, 8, static + room * 2**30) for room in (4, 1, 0.2)]
    assert ample <= tight[0] < tight[1] < tight[2]
    assert least_ms_in_memory(pieces, 4, 8, static) == float("inf")


def test_the_mean_of_static_bytes_is_no_more_than_the_worst_rank():
    for model in (SMALL, replace(model_of("deepseek-v2-lite"), num_layers=28)):
        job = layout_job(MACHINE, workload(model=model), Layout(pipeline=4), 8)
        group = next(g for g in candidates(job) if g[0].schedule == "1f1b")
        outcome = Outlook(job, group[0])
        plan = outcome._work.plan
        totals = [sum(rank_parameters(job.pieces(), plan, of_experts=of)) for of in (False, True)]
        ends = job.workload.parameters["head"] if model.tied else 0
        assert bounds.held_parameters(job.pieces()) == (totals[0] - ends, totals[1])
        assert least_bytes(job.pieces(), 4) <= max(rank.static_bytes for rank in outcome._costs.ranks)


@pytest.mark.parametrize("batch", [8, 6])
def test_layouts_use_every_gpu_once_and_share_the_batch_evenly(batch):
    all_layouts = list(layouts(MACHINE, workload(), 8, batch))
    assert len(set(all_layouts)) == len(all_layouts) > 10
    for layout in all_layouts:
        assert layout.tensor * layout.context * layout.pipeline * layout.data == 8
        assert (layout.exchange is None) == (layout.context == 1)
        assert layout.tensor <= 2
        assert SMALL.num_layers % layout.pipeline == batch % layout.data == 0
        job = layout_job(MACHINE, workload(), layout, batch)
        assert job.num_gpus == 8
        assert job.tokens_per_iteration == batch * 16384
        assert job.workload.distributed_optimizer == (layout.context * layout.data > 1)


def test_experts_are_shared_by_gpus_of_a_stage():
    sizes = {
        layout.expert
        for layout in layouts(MACHINE, workload(model=model_of("mixtral-8x7b")), 8, 8)
        if (layout.tensor, layout.data, layout.context) == (2, 4, 1)
    }
    assert sizes == {1, 2, 4, 8}


def test_families_are_told_apart(pruned):
    families = {finding.family for finding in pruned.best_of_families}
    assert {"stages", "attention apart", "slices", "context parallel alone"} <= families
    assert len(families) == len(pruned.best_of_families)


def test_accept_narrows_the_search():
    narrowed = found(
        limit_gib=20.0, accept=lambda layout, candidate: layout.pipeline == 4 and candidate.schedule == "1f1b"
    )
    assert {f.layout.pipeline for f in narrowed.findings} == {4}
    assert {f.option.candidate.schedule for f in narrowed.findings} == {"1f1b"}


def test_nothing_fits():
    nothing = found(limit_gib=0.5)
    assert nothing.findings == []
    assert nothing.best_that_runs is None
    assert sum(nothing.num_rejected.values()) > 0


def test_no_layout_is_possible():
    with pytest.raises(ValueError, match="no layout of 3 GPUs can train batches of 4 sequences"):
        found(num_gpus=3)


def test_context_parallelism_costs_the_links_between_its_gpus():
    """Two GPUs of a node share a sequence over NVLink; four over their cards."""
    near, far = (
        layout_job(
            HARDWARE["h20"], workload(), Layout(context=size, exchange=Exchange.ALL_GATHER, tensor=4), 8
        ).pieces()
        for size in (2, 4)
    )
    kv_bytes = 2 * 2048 * 2 * 16384 / 4
    attention = layout_job(HARDWARE["h20"], workload(), Layout(tensor=4), 8).pieces().times["core"].forward
    gathered = [pieces.times["core"].forward - attention / size for pieces, size in ((near, 2), (far, 4))]
    assert gathered[0] == pytest.approx(0.01 + kv_bytes / 2 / (450 * 0.8 * 1e6))
    assert gathered[1] == pytest.approx(0.02 + 3 * kv_bytes / 4 / (25 * 0.8 * 1e6))
    assert far.workload.layer_workspace_bytes > near.workload.layer_workspace_bytes * 0.5


def test_windows_and_shared_sequences_do_not_go_together():
    windows = replace(SMALL, windows=(0, 128, 0, 128))
    with pytest.raises(ValueError, match="not for windows"):
        layout_job(MACHINE, workload(model=windows), Layout(context=2, exchange=Exchange.RING), 8)


def test_shares_add_up_and_name_what_limits(pruned):
    for finding in (*pruned.shown, *pruned.best_of_families):
        shares = time_shares(finding, MACHINE)
        assert sum(share.milliseconds for share in shares) == pytest.approx(finding.iteration_ms)
        assert all(share.milliseconds > -1e-6 * finding.iteration_ms for share in shares)
        assert main_limit(shares).name != "work"
    alone = next(f for f in pruned.findings if f.family == "context parallel alone")
    by_name = dict(time_shares(alone, MACHINE))
    assert by_name["exchanges within stages"] > 0
    assert by_name["bubble"] == pytest.approx(0, abs=1e-6)


def test_options_that_are_shown_are_what_their_plans_simulate_to(pruned):
    for finding in pruned.shown:
        option = finding.option
        simulated = simulate(option.plan, option.costs)
        if not SCHEDULES[option.candidate.schedule].repeats_sequences:
            assert simulated.iteration_ms == option.iteration_ms
        assert max(peak_bytes(option.plan, option.costs)) == option.peak_bytes
        assert option.peak_bytes + option.message_bytes <= finding.job.memory_limit_bytes


def test_the_command(capsys):
    words = (
        "advise --model gpt-1.3b --hardware h100 --gpus 2 --global-batch-size 2 --seq-length 2048 --explain 1"
    )
    assert main(words.split()) == 0
    output = capsys.readouterr().out
    assert "The best of each family" in output
    assert re.search(r"No layout takes less than [\d.]+ m?s: it is within [\d.]+% of any layout", output)
    assert "Fastest that runs:" in output
    assert "--pipeline-schedule" in output
    assert "weights, gradients, optimizer states" in output


def test_kernels_and_precision_are_searched_with(capsys):
    """An older attention kernel takes longer, fp8 products less; fp8 is planned and not said to run."""
    words = "advise --model gpt-1.3b --hardware h100 --gpus 2 --global-batch-size 2 --seq-length 8192"
    fastest = {}
    for more in ("", "--attention-backend flash-attn-2", "--fp8"):
        assert main([*words.split(), *more.split()]) == 0
        output = capsys.readouterr().out
        fastest[more] = float(re.search(r"^1 .* ([\d.]+) ms ", output, re.MULTILINE)[1])
        assert ("None of these can be executed" in output) == (more == "--fp8")
    assert fastest["--fp8"] < fastest[""] < fastest["--attention-backend flash-attn-2"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--gpus 2", "--global-batch-size is missing"),
        ("--gpus 2 --global-batch-size 2 --num-microbatches 2", "--gpus searches --num-microbatches"),
        ("--gpus 2 --global-batch-size 2 --data-parallel-size 2", "--gpus searches --data-parallel-size"),
        ("--global-batch-size 2", "--global-batch-size belongs to --gpus"),
        ("--pipeline-model-parallel-size 2", "--num-microbatches is missing"),
        ("--num-microbatches 2", "--pipeline-model-parallel-size is missing"),
    ],
)
def test_commands_that_are_refused(words, message, capsys):
    assert main(f"advise --model gpt-1.3b --hardware h100 --seq-length 2048 {words}".split()) == 2
    assert message in capsys.readouterr().err


def test_plans_with_a_name_for_every_layer_are_the_same_plans():
    """To the last bit, alike or mixed: so that all ways to recompute can share one."""
    shape = replace(SMALL, num_layers=8)
    job = layout_job(MACHINE, workload(model=shape, whole_logits=False), Layout(pipeline=4), 8, 8.0)
    seen = set()
    for group in (g for g in candidates(job) if g[0].schedule in ("helix", "1f1b", "sliced-helix")):
        for candidate in (c for c in group if c.micro_batch_size == 1 and with_few_options(None, c)):
            apart = evaluate(job, candidate)
            if not isinstance(apart, Option):
                continue
            mixture = mixed(job, candidate)
            for found in (apart, mixture) if isinstance(mixture, Option) else (apart,):
                named = _pipeline(job, found.candidate)
                assert named.plan.orders == found.plan.orders
                assert named.iteration_ms == found.iteration_ms
                assert named.peak_bytes == found.peak_bytes
                seen.add((candidate.schedule, found is mixture))
    assert {("helix", True), ("helix", False), ("1f1b", True), ("sliced-helix", False)} <= seen


def test_what_takes_too_long_is_given_up():
    job = layout_job(MACHINE, workload(whole_logits=False), Layout(pipeline=4), 8, 10.0)
    given_up = 0
    for candidate in (g[-1] for g in candidates(job) if g[0].micro_batch_size == 1):
        if not with_few_options(None, candidate):
            continue
        outcome = evaluate(job, candidate)
        if isinstance(outcome, Option):
            in_time = evaluate(job, candidate, outcome.iteration_ms)
            assert isinstance(in_time, Option)
            assert in_time.iteration_ms == outcome.iteration_ms
            late = evaluate(job, candidate, 0.5 * outcome.iteration_ms)
            assert late.is_late
            given_up += 1
    assert given_up > 10


def test_what_was_beaten_comes_back_when_the_faster_one_falls_out(monkeypatch):
    """The best helix of its layout does not fit with its buffers, say: the next best of it is found."""
    dropped = []

    def drop_interlocked(job, option, accept, *, fits_order):
        if option.candidate.fits_order_to_costs:
            dropped.append(option)
            return None
        return improve(job, option, accept, fits_order=fits_order)

    layout = Layout(pipeline=4)
    accept = lambda found, candidate: found == layout and candidate.schedule == "helix"  # noqa: E731
    usual = found(accept=accept, limit_gib=14.0)
    assert usual.findings[0].option.candidate.fits_order_to_costs
    monkeypatch.setattr(joint, "improve", drop_interlocked)
    without = found(accept=accept, limit_gib=14.0)
    assert dropped
    assert not without.findings[0].option.candidate.fits_order_to_costs
    assert without.findings[0].iteration_ms > usual.findings[0].iteration_ms


def test_layers_make_room_for_buffers():
    """What fits, but not with its buffers, computes more again in a few layers more, not in all."""
    shape = replace(SMALL, num_layers=16)
    job = layout_job(MACHINE, workload(model=shape, whole_logits=False), Layout(pipeline=4), 8, 12.0)
    first = next(g for g in candidates(job) if g[0].label == "helix fold=1 block spread head interlocked")
    mixture = next(
        m for m in (mixed(job, c) for c in first if isinstance(evaluate(job, c), Option)) if m is not None
    )
    tight = replace(job, memory_limit_bytes=peak_with_messages(mixture.plan, mixture.costs, 1) - 1)
    assert mixture.peak_bytes < tight.memory_limit_bytes
    options = [improve(tight, mixture, lambda _: True, fits_order=fits) for fits in (False, True)]
    for option in options:
        assert option.candidate.recompute is mixture.candidate.recompute
        assert option.peak_bytes + option.message_bytes <= tight.memory_limit_bytes
    assert 0 < options[0].candidate.lighter[0] < mixture.candidate.lighter[0]
    # An order that is fitted may need less for its buffers.
    assert options[1].candidate.lighter[0] >= options[0].candidate.lighter[0]
    assert options[1].iteration_ms < options[0].iteration_ms


def test_what_is_shown_is_what_its_layout_alone_gives(pruned):
    for shown in (pruned.shown[0], pruned.shown[-1]):
        alone = found(
            accept=lambda layout, c, own=shown.layout: layout == own and with_few_options(layout, c)
        )
        same = next(f for f in alone.findings if f.key == shown.key)
        assert key(same) == key(shown)
