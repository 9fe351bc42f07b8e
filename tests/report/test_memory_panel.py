"""Memory over time in pictures."""

import re
import xml.etree.ElementTree as ElementTree

import pytest

from helixpipe.plan import Operation, ScheduleRequest, build_plan
from helixpipe.plan.simulation.costs import Costs, RankCost, SegmentCost
from helixpipe.plan.simulation.simulate import simulate
from helixpipe.plan.simulation.timeline import Level, Span, Timeline
from helixpipe.report.byte_units import byte_unit
from helixpipe.report.palette import rank_colour
from helixpipe.report.picture import draw_timeline

SVG = "{http://www.w3.org/2000/svg}"
GIB = 2**30


def by_hand():
    """Two ranks over 10 ms from 5 ms on; rank 0 holds 1, 3, 1 GiB, rank 1 always 2 GiB."""
    spans = ((Span(Operation.parse("0F0"), 5, 7), Span(Operation.parse("0B0"), 11, 15)), ())
    memory = ((Level(5, GIB), Level(7, 3 * GIB), Level(12, GIB)), (Level(0, 2 * GIB),))
    return Timeline(spans, memory=memory)


def groups(path):
    return {group.get("id"): group for group in ElementTree.parse(path).getroot().iter(f"{SVG}g")}


def corners(group):
    """Points of a group's first path, in the picture's own units."""
    numbers = [float(number) for number in re.findall(r"[-\d.]+", next(group.iter(f"{SVG}path")).get("d"))]
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def test_curves_are_steps_at_their_times_and_levels(tmp_path):
    path = tmp_path / "picture.svg"
    draw_timeline(by_hand(), path, memory=True, memory_limit_bytes=4 * GIB)
    found = groups(path)
    ((left, limit), *_, (right, _)) = corners(found["memory-limit"])
    curve = corners(found["memory-0"])
    width = right - left
    # The whole axis is 10 ms wide; 4 GiB lie as high above 3 GiB as 3 GiB above 2 GiB.
    (_, level_of_2), *_ = corners(found["memory-1"])
    level_of_3 = min(y for _, y in curve)
    level_of_1 = max(y for _, y in curve)
    unit = level_of_2 - level_of_3
    assert limit == pytest.approx(level_of_3 - unit, abs=0.01)
    assert level_of_1 == pytest.approx(level_of_2 + unit, abs=0.01)
    rises = [(x, y) for x, y in curve if y == level_of_3]
    assert rises[0][0] == pytest.approx(left + 0.2 * width, abs=0.01)
    assert rises[-1][0] == pytest.approx(left + 0.7 * width, abs=0.01)
    assert curve[-1] == pytest.approx((right, level_of_1), abs=0.01)
    assert rank_colour(1, 2) in ElementTree.tostring(found["memory-1"]).decode()


def test_every_rank_has_a_curve_and_the_rows_stay_as_they_are(tmp_path):
    plan = build_plan("helix", ScheduleRequest(num_ranks=4, num_layers=8, num_microbatches=8))
    costs = Costs(
        dict.fromkeys(plan.cost_names, SegmentCost(1, 2, bytes=GIB)), {}, ranks=(RankCost(20 * GIB),) * 4
    )
    timeline = simulate(plan, costs).timeline
    heights = {}
    for memory in (False, True):
        path = tmp_path / f"{memory}.svg"
        draw_timeline(timeline, path, memory=memory)
        root = ElementTree.parse(path).getroot()
        heights[memory] = float(root.get("viewBox").split()[3])
        assert sum(name.startswith("memory-") for name in groups(path) if name) == 4 * memory
        idle = groups(path)["idle"]
        tops = [corner for outline in idle.iter(f"{SVG}path") for corner in [outline.get("d")]]
        heights["rows", memory] = tops
    assert heights[True] - heights[False] == pytest.approx(1.8 * 72)
    assert heights["rows", True] == heights["rows", False]
    draw_timeline(timeline, tmp_path / "again.svg", memory=True)
    assert (tmp_path / "again.svg").read_bytes() == (tmp_path / "True.svg").read_bytes()


def test_memory_of_many_ranks_and_of_nothing(tmp_path):
    plan = build_plan("1f1b", ScheduleRequest(num_ranks=40, num_layers=40, num_microbatches=8))
    costs = Costs(dict.fromkeys(plan.cost_names, SegmentCost(1, 2)), {})
    draw_timeline(simulate(plan, costs).timeline, tmp_path / "picture.png", memory=True)
    assert (tmp_path / "picture.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory": True}, "does not say how much was held"),
        ({"memory_limit_bytes": 5}, "goes with a picture of memory"),
    ],
)
def test_memory_that_cannot_be_drawn_is_refused(options, message, tmp_path):
    timeline = Timeline(by_hand().spans)
    with pytest.raises(ValueError, match=message):
        draw_timeline(timeline, tmp_path / "picture.png", **options)
    assert not list(tmp_path.iterdir())


def test_units_suit_the_numbers():
    assert [byte_unit(size).name for size in (80 * GIB, GIB // 8, GIB // 16, 3000, 8, 0)] == [
        "GiB",
        "GiB",
        "MiB",
        "KiB",
        "bytes",
        "bytes",
    ]
    assert byte_unit(80 * GIB).text(1.5 * GIB) == "1.5 GiB"


def test_rank_colours_are_colours_and_differ():
    for ranks in (1, 2, 4, 64, 1000):
        colours = [rank_colour(rank, ranks) for rank in range(ranks)]
        assert all(re.fullmatch("#[0-9a-f]{6}", colour) for colour in colours)
        assert len(set(colours)) >= min(ranks, 64)
