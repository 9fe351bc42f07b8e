"""Checkpointing: the solver's memory is the simulator's, the limit holds, and the delay is least."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helixpipe.elastic import ElasticJob, Recipe, costs_of_recipe, ideal_costs
from helixpipe.elastic.chunk_schedule import elastic_plan, order_chunks, sequence_groups
from helixpipe.elastic.search.memory_rows import pipeline_memory
from helixpipe.elastic.search.planner import solve
from helixpipe.elastic.search.recomputation import OutOfMemory, solve_checkpointing, uniform_checkpointing
from helixpipe.elastic.search.sequence_processor import equal_time_mesh, make_chunks
from helixpipe.plan.simulation.memory import peak_bytes
from helixpipe.plan.stage_layers import stage_counts

COSTS = replace(
    ideal_costs(balanced_length=100.0, token_bytes=17.0),
    logits_bytes=20.0,
    head_workspace_bytes=25.0,
    layer_workspace_bytes=5.0,
    tensor_parallel=2,
    token_multiple=2,
    layer_state_bytes=300,
    head_state_bytes=500,
)
BIG = 2**60

batches = st.lists(st.one_of(st.integers(1, 60), st.integers(1, 600)), min_size=1, max_size=25)


def chunks_of(lengths, num_slices):
    longest = max(lengths)
    mesh = equal_time_mesh(longest, min(num_slices, longest), COSTS)
    return order_chunks(make_chunks(lengths, mesh, COSTS, longest), COSTS)


def memory_of(chunks, num_stages, num_layers, limit_bytes=BIG, stage_layers=()):
    layers = stage_counts(stage_layers, num_layers, num_stages)
    return pipeline_memory(chunks, COSTS, stage_layers=layers, limit_bytes=limit_bytes)


def simulated_peaks(chunks, counts, num_layers, stage_layers=()):
    recipe = Recipe(chunks, (len(chunks),), counts, stage_layers)
    costs = costs_of_recipe(recipe, num_layers, COSTS)
    return peak_bytes(elastic_plan(recipe, num_layers), costs)


UNEVEN = {1: (3,), 2: (4, 2), 4: (2, 4, 4, 2)}


@given(batches, st.integers(1, 6), st.sampled_from([1, 2, 4]), st.integers(0, 2), st.booleans())
@settings(max_examples=60, deadline=None)
def test_rows_are_what_the_simulator_holds(lengths, num_slices, num_stages, count, is_even):
    chunks = chunks_of(lengths, num_slices)
    layers = (3,) * num_stages if is_even else UNEVEN[num_stages]
    memory = memory_of(chunks, num_stages, 3 * num_stages, stage_layers=layers)
    counts = ((count,) * len(chunks),) * num_stages
    peaks = simulated_peaks(chunks, counts, 3 * num_stages, () if is_even else layers)
    for stage, own in enumerate(layers):
        rows = memory.rows(stage)
        held = memory.held(rows, memory.kept[stage] - count * memory.saved)
        held += rows.recomputing if count else rows.plain
        states = COSTS.state_bytes(stage, num_stages, own)
        assert int(held.max()) + states == peaks[stage]


@given(
    batches,
    st.integers(1, 6),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 2, 8]),
    st.floats(0.0, 1.0),
    st.booleans(),
    st.sampled_from([-1, 0, 1]),
)
@settings(max_examples=120, deadline=None)
def test_peaks_never_exceed_the_limit(lengths, num_slices, num_stages, layers, share, many, moved):
    """Over limits from just enough with everything checkpointed to just enough with nothing.

    With a layer moved from one end to the other, too.
    """
    chunks = chunks_of(lengths, num_slices)
    num_layers = layers * num_stages
    own = [layers] * num_stages
    own[0], own[-1] = own[0] + moved, own[-1] - moved
    uneven = tuple(own) if moved and num_stages > 1 and min(own) > 0 else ()
    own = stage_counts(uneven, num_layers, num_stages)
    everything = tuple((count,) * len(chunks) for count in own)
    least = max(simulated_peaks(chunks, everything, num_layers, uneven))
    most = max(simulated_peaks(chunks, ((0,) * len(chunks),) * num_stages, num_layers, uneven))
    limit = least + int(share * max(0, most - least))
    sizes = {"num_stages": num_stages, "num_layers": num_layers, "stage_layers": uneven}
    job = ElasticJob(costs=COSTS, memory_limit_bytes=limit, **sizes)
    pipelines = tuple(sequence_groups(chunks)) if many else (len(chunks),)
    recipe, _ = solve(chunks, pipelines, job)
    peaks = peak_bytes(elastic_plan(recipe, num_layers), costs_of_recipe(recipe, num_layers, COSTS))
    assert max(peaks) <= limit
    rows = zip(recipe.checkpointed, own, strict=True)
    assert all(0 <= count <= most_layers for row, most_layers in rows for count in row)
    if limit >= most:
        assert not any(map(any, recipe.checkpointed))


def test_counts_are_shared_along_diagonals():
    chunks = chunks_of([400, 300, 50, 50, 50, 40], 4)
    unchecked = max(simulated_peaks(chunks, ((0,) * len(chunks),) * 3, 24))
    memory = memory_of(chunks, 3, 24, int(unchecked * 0.7))
    found = solve_checkpointing(memory, [1.0] * len(chunks))
    shared = {}
    for stage in range(3):
        for count, diagonal in zip(found.counts[stage], memory.diagonals(stage), strict=True):
            assert shared.setdefault(int(diagonal), count) == count
    assert len(shared) == len(chunks) + 3 - 1
    assert any(shared.values())


@pytest.mark.parametrize("share", [0.5, 0.7, 0.9])
def test_the_delay_is_least(share):
    """Against all choices for a pipeline that is small enough to try them."""
    chunks = chunks_of([90, 60, 25, 20], 3)
    p, layers = 2, 2
    most = max(simulated_peaks(chunks, ((0,) * len(chunks),) * p, p * layers))
    least = max(simulated_peaks(chunks, ((layers,) * len(chunks),) * p, p * layers))
    limit = int(least + share * (most - least))
    memory = memory_of(chunks, p, p * layers, limit)
    recompute_ms = [COSTS.recompute_ms(chunk) for chunk in chunks]
    weights = np.zeros(len(chunks) + p - 1)
    for stage in range(p):
        np.maximum.at(weights, memory.diagonals(stage), recompute_ms)

    def fits(choice):
        for stage in range(p):
            rows = memory.rows(stage)
            kept = memory.kept[stage] - choice[memory.diagonals(stage)] * memory.saved
            if (memory.held(rows, kept) + rows.recomputing > memory.available[stage]).any():
                return False
        return True

    choices = (np.array(c) for c in product(range(layers + 1), repeat=len(weights)))
    best = min(weights @ choice for choice in choices if fits(choice))
    found = solve_checkpointing(memory, recompute_ms, gap=0.0)
    solution = np.zeros(len(weights))
    for stage in range(p):
        solution[memory.diagonals(stage)] = found.counts[stage]
    assert weights @ solution == pytest.approx(best)


def test_stages_with_fewer_layers_checkpoint_the_same_share():
    chunks = chunks_of([400, 300, 50, 50, 50, 40], 4)
    layers = (6, 6, 3)
    unchecked = max(simulated_peaks(chunks, ((0,) * len(chunks),) * 3, 15, layers))
    memory = memory_of(chunks, 3, 15, int(unchecked * 0.7), layers)
    found = solve_checkpointing(memory, [1.0] * len(chunks))
    shared = {}
    for stage in (0, 1):
        for count, diagonal in zip(found.counts[stage], memory.diagonals(stage), strict=True):
            assert shared.setdefault(int(diagonal), count) == count
    last = [(shared[int(d)] + 1) // 2 for d in memory.diagonals(2) if int(d) in shared]
    assert list(found.counts[2])[-len(last) :] == last
    assert any(last)
    five = tuple((count,) * len(chunks) for count in (5, 5, 3))
    limit = max(simulated_peaks(chunks, five, 15, layers))
    assert uniform_checkpointing(memory_of(chunks, 3, 15, limit, layers)).counts == five


def test_what_a_short_stage_lacks():
    """It has few layers to checkpoint, and the logits."""
    chunks, layers = chunks_of([400, 300, 50, 50], 4), (5, 1)
    least = simulated_peaks(chunks, tuple((count,) * len(chunks) for count in layers), 6, layers)
    assert least.index(max(least)) == 1
    assert memory_of(chunks, 2, 6, max(least) - 7, layers).shortage() == (1, 7)
    assert memory_of(chunks, 2, 6, max(least), layers).shortage() is None


def test_out_of_memory_names_stage_bytes_and_change():
    chunks = chunks_of([400, 300, 50, 50], 4)
    least = simulated_peaks(chunks, ((2,) * len(chunks),) * 2, 4)
    with pytest.raises(OutOfMemory) as caught:
        solve_checkpointing(memory_of(chunks, 2, 4, max(least) - 7), [1.0] * len(chunks))
    assert caught.value.missing_bytes == 7
    assert caught.value.stage == least.index(max(least))
    text = str(caught.value)
    assert text.startswith(
        f"stage {caught.value.stage} is 7 bytes (0.00 GiB) short of memory: with all layers "
    )
    assert "use a lower token capacity, more slices" in text
    with pytest.raises(OutOfMemory, match="optimizer states alone exceed the limit; use more stages"):
        solve_checkpointing(memory_of(chunks, 2, 4, 100), [1.0] * len(chunks))
    with pytest.raises(OutOfMemory):
        uniform_checkpointing(memory_of(chunks, 2, 4, max(least) - 7))


def test_uniform_is_the_least_that_fits():
    chunks = chunks_of([400, 300, 50, 50, 30], 4)
    peaks = [max(simulated_peaks(chunks, ((c,) * len(chunks),) * 2, 16)) for c in range(9)]
    for count in (0, 3, 8):
        found = uniform_checkpointing(memory_of(chunks, 2, 16, peaks[count]))
        assert {c for row in found.counts for c in row} == {count}
