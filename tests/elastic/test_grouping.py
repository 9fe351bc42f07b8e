"""Pipelines: when memory forces several, and that the dynamic program finds the cheapest cuts."""

from itertools import accumulate, combinations

import pytest

from helixpipe.elastic import ideal_costs
from helixpipe.elastic.chunk_schedule import order_chunks, sequence_groups
from helixpipe.elastic.search.grouping import group_sequences, recompute_delay_ms
from helixpipe.elastic.search.memory_rows import pipeline_memory
from helixpipe.elastic.search.recomputation import OutOfMemory
from helixpipe.elastic.search.sequence_processor import equal_time_mesh, make_chunks

COSTS = ideal_costs(balanced_length=1000.0)
LENGTHS = [4000, 2500, 2100, 1200, *([300] * 300)]
P, L = 4, 16
LAYERS = (L // P,) * P


def setting(num_slices=8):
    mesh = equal_time_mesh(max(LENGTHS), num_slices, COSTS)
    return order_chunks(make_chunks(LENGTHS, mesh, COSTS, max(LENGTHS)), COSTS)


def group(chunks, limit_bytes):
    return group_sequences(chunks, COSTS, stage_layers=LAYERS, limit_bytes=limit_bytes)


def memory(chunks, limit_bytes):
    return pipeline_memory(chunks, COSTS, stage_layers=LAYERS, limit_bytes=limit_bytes)


def test_with_room_there_is_one_pipeline():
    chunks = setting()
    assert group(chunks, 2**50) == ((len(chunks),), 0.0)


@pytest.mark.parametrize("share", [0.9, 0.5, 0.3, 0.2])
def test_the_grouping_is_the_cheapest(share):
    """Against every grouping of the sequences, cuts between sequences of equally many slices included."""
    chunks = setting()
    kept = memory(chunks, 2**50)
    limit = int(share * max(kept.held(kept.rows(0), kept.kept[0])))
    delta = (P - 1) * L / P * sum(COSTS.layer_ms(c.area, c.tokens) for c in chunks) / len(chunks)

    def cost(sizes):
        total = 0.0
        for end, size in zip(accumulate(sizes), sizes, strict=True):
            part = chunks[end - size : end]
            total += delta + recompute_delay_ms(memory(part, limit), [COSTS.recompute_ms(c) for c in part])
        return total

    ends = list(accumulate(sequence_groups(chunks)))
    # All cuts among the long sequences; a few among those of one chunk stand for the rest.
    inner = [end for end in ends[:-1] if end <= ends[4]] + ends[20:-1:40]
    best = min(
        cost([b - a for a, b in zip((0, *cuts), (*cuts, ends[-1]), strict=True)])
        for count in range(len(inner) + 1)
        for cuts in combinations(inner, count)
    )
    sizes, delay_ms = group(chunks, limit)
    assert sum(sizes) == len(chunks)
    assert cost(sizes) == pytest.approx(delay_ms + delta * len(sizes))
    assert cost(sizes) <= best * 1.01


def test_tight_memory_separates_long_from_short():
    chunks = setting()
    kept = memory(chunks, 2**50)
    whole = max(kept.held(kept.rows(0), kept.kept[0]))
    assert sequence_groups(chunks)[:4] == [8, 4, 3, 2]
    assert group(chunks, int(whole * 0.7)) == ((8, len(chunks) - 8), 0.0)
    assert group(chunks, int(whole * 0.5)) == ((8 + 4 + 3, len(chunks) - 15), 0.0)


def test_a_stage_with_fewer_layers_delays_by_the_share_of_its_own():
    """Where the last stage alone lacks memory, the others checkpoint as large a share."""
    chunks = setting()
    recompute_ms = [COSTS.recompute_ms(chunk) for chunk in chunks]
    delays = []
    for layers in ((1, 1), (4, 1)):
        roomy = pipeline_memory(chunks, COSTS, stage_layers=layers, limit_bytes=2**50)
        rows = roomy.rows(1)
        needed = int(roomy.held(rows, roomy.kept[1] - roomy.saved // 2).max() + rows.recomputing.max())
        reserved = (0, 2**50 - needed)
        memory = pipeline_memory(
            chunks, COSTS, stage_layers=layers, limit_bytes=2**50, reserved_bytes=reserved
        )
        delays.append(recompute_delay_ms(memory, recompute_ms))
    assert delays[0] > 0
    assert delays[1] == pytest.approx(4 * delays[0])


def test_what_fits_in_no_grouping():
    with pytest.raises(OutOfMemory, match="short of memory"):
        group(setting(), 1000)
