"""Drawings: what they show and where, for text and pictures."""

import re
import struct
import xml.etree.ElementTree as ElementTree
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helixpipe.plan import Kind, Operation, ScheduleRequest, build_plan
from helixpipe.plan.simulation.costs import Costs, SegmentCost, uniform_costs
from helixpipe.plan.simulation.simulate import simulate
from helixpipe.plan.simulation.timeline import Span, Timeline
from helixpipe.report.picture import draw_timeline, draw_timelines
from helixpipe.report.text import text_grid

SVG = "{http://www.w3.org/2000/svg}"
ROLES = ("forward", "attention-forward", "backward", "attention-backward", "weight-gradient")


def timeline_of(schedule, p=4, layers=8, m=8, **options):
    wanted = ScheduleRequest(num_ranks=p, num_layers=layers, num_microbatches=m, **options)
    plan = build_plan(schedule, wanted, compute_only=True)
    return simulate(plan, uniform_costs(plan)).timeline


def by_hand(*ranks, names=()):
    """Rows of (operation, start, end)."""
    spans = tuple(
        tuple(Span(Operation.parse(text), float(start), float(end)) for text, start, end in rank)
        for rank in ranks
    )
    return Timeline(spans, "by hand", names)


def bars(path):
    """Corners of the bars by role: (left, top, right, bottom) in the picture's own units."""
    found = {}
    for group in ElementTree.parse(path).getroot().iter(f"{SVG}g"):
        if group.get("id") in (*ROLES, "idle"):
            outlines = [
                [float(number) for number in re.findall(r"[-\d.]+", path.get("d"))]
                for path in group.iter(f"{SVG}path")
            ]
            found[group.get("id")] = [
                (min(o[::2]), min(o[1::2]), max(o[::2]), max(o[1::2])) for o in outlines
            ]
    return found


def rows(text):
    """The part of every rank's row that shows time."""
    return [line.split("│")[1] for line in text.splitlines() if line.count("│") == 2]


def test_text_of_one_f_one_b():
    assert text_grid(timeline_of("1f1b", p=2, layers=2, m=3), width=42).splitlines() == [
        "predicted · makespan 12 ms · bubble 25.0% · 1 column = 0.5 ms",
        "rank 0 │F0F1····B0──F2B1──··B2──│",
        "rank 1 │··F0B0──F1B1──F2B2──····│",
        "F forward, B backward of the micro batch that follows; · idle",
    ]


def test_text_of_helix_tells_attention_apart():
    assert text_grid(timeline_of("helix", p=2, layers=2, m=2, num_fold=1), width=42).splitlines() == [
        "predicted · makespan 18 ms · bubble 16.7% · 1 column = 1 ms",
        "rank 0 │01¹⁰01bbaaᵃᵃᵇᵇbbaa│",
        "rank 1 │·⁰01¹···ᵇᵇbbaaᵃᵃ··│",
        "0… forward, ⁰… attention forward, a… backward, ᵃ… attention backward by micro batch mod 10; · idle",
    ]


def test_text_of_weight_gradients():
    timeline = by_hand([("0F0", 0, 1), ("0B0", 1, 2), ("0W0", 3, 4)])
    assert rows(text_grid(timeline, width=40)) == ["F0─────B0─────·······W0─────"]
    assert "W weight gradient" in text_grid(timeline, width=40)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["1f1b", "gpipe", "interleaved", "helix"]),
    st.integers(1, 12),
    st.integers(1, 3),
    st.integers(30, 250),
)
def test_text_fits_and_its_columns_are_equal_times(schedule, p, rounds, width):
    timeline = timeline_of(schedule, p, 2 * p, 2 * p * rounds)
    text = text_grid(timeline, width)
    grid = rows(text)
    assert len(grid) == p
    body = text.splitlines()[1:-1]
    assert len(body) == p
    assert len({len(line) for line in body}) == 1
    assert len(body[0]) <= width
    columns = len(grid[0])
    for row, spans in zip(grid, timeline.spans, strict=True):
        for column, cell in enumerate(row):
            middle = (column + 0.5) * timeline.makespan_ms / columns
            # A middle on a border, to the precision of floats, may belong to either side.
            near = {
                any(start <= at < end for _, start, end in spans) for at in (middle - 1e-6, middle + 1e-6)
            }
            assert (cell != "·") in near


def test_text_rows_are_equal_where_time_ends_within_a_column():
    timeline = by_hand([("0F0", 0, 1), ("0F1", 1, 2.5)], [("1F0", 1, 2)])
    assert {len(row) for row in rows(text_grid(timeline, width=72))} == {63}  # 62.5 columns of 0.04 ms


def test_text_has_a_width_of_its_own_accord(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    for timeline in (timeline_of("helix"), timeline_of("1f1b")):
        lines = text_grid(timeline).splitlines()
        assert len(lines) == 6
        assert max(map(len, lines)) <= 100
    # Too narrow a terminal still shows something.
    assert len(rows(text_grid(timeline_of("1f1b"), width=1))) == 4


def test_text_gives_up_micro_batches_before_roles():
    grid = rows(text_grid(timeline_of("helix", p=4, layers=16, m=32), width=60))
    assert set("".join(grid)) <= set("FfBb·")


def test_text_counts_ranks_of_two_digits():
    lines = text_grid(timeline_of("1f1b", p=12, layers=12, m=4), width=100).splitlines()
    assert lines[1].startswith(" rank 0 │F0")
    assert lines[12].startswith("rank 11 │···")


@pytest.mark.parametrize("schedule", ["1f1b", "helix"])
def test_every_operation_is_a_bar(schedule, tmp_path):
    timeline = timeline_of(schedule)
    draw_timeline(timeline, tmp_path / "picture.svg")
    counts = {role: len(found) for role, found in bars(tmp_path / "picture.svg").items()}
    if schedule == "1f1b":
        assert counts == {"idle": 4, "forward": 32, "backward": 32}
    else:
        both = {"forward": 9 * 8, "attention-forward": 8 * 8}
        assert counts == {"idle": 4, **both, "backward": 9 * 8, "attention-backward": 8 * 8}


def test_bars_lie_where_their_times_say(tmp_path):
    timeline = by_hand(
        [("0F0", 5, 6), ("0B0", 12, 14), ("0W0", 14, 15)],
        [("1F0", 6, 9), ("1B0", 9, 12)],
        names=("stage", "attention"),
    )
    path = tmp_path / "picture.svg"
    draw_timeline(timeline, path)
    found = bars(path)
    left, _, right, _ = found["idle"][0]
    unit = (right - left) / 10
    for role, start, end in [
        ("forward", 0, 1),
        ("attention-forward", 1, 4),
        ("attention-backward", 4, 7),
        ("backward", 7, 9),
        ("weight-gradient", 9, 10),
    ]:
        ((bar_left, _, bar_right, _),) = found[role]
        assert bar_left == pytest.approx(left + start * unit, abs=0.01)
        assert bar_right == pytest.approx(left + end * unit, abs=0.01)
    # Rank 0 is on top, and rows do not touch.
    assert found["forward"][0][1] == found["backward"][0][1]
    assert found["forward"][0][3] < found["attention-forward"][0][1]


def test_pictures_with_one_end_have_one_scale(tmp_path):
    widths = []
    for schedule in ("1f1b", "helix"):
        path = tmp_path / f"{schedule}.svg"
        timeline = timeline_of(schedule)
        draw_timeline(timeline, path, until_ms=200)
        left, _, right, _ = bars(path)["idle"][0]
        widths.append((right - left) / timeline.makespan_ms)
    assert widths[0] == pytest.approx(widths[1], rel=1e-4)


def test_timelines_stand_one_above_the_other_on_one_axis(tmp_path):
    """The shorter one ends where its time says on the axis of the longer one."""
    short, long = (
        Timeline(((Span(Operation(0, Kind.F, 0), 0.0, end),),), source=f"ends at {end}")
        for end in (5.0, 10.0)
    )
    path = tmp_path / "both.svg"
    draw_timelines([short, long], path)
    text = path.read_text()
    assert text.index("ends at 5.0") < text.index("ends at 10.0")
    first, second = (
        max(float(x) for x in re.findall(r"[ML] ([\d.]+) ", group))
        for group in re.findall(r'<g id="forward">.*?</g>', text, re.DOTALL)[:2]
    )
    left = min(
        float(x)
        for x in re.findall(r"[ML] ([\d.]+) ", re.findall(r'<g id="forward">.*?</g>', text, re.DOTALL)[0])
    )
    assert (first - left) * 2 == pytest.approx(second - left, rel=0.01)
    with pytest.raises(ValueError, match="nothing to draw"):
        draw_timelines([], path)


def test_svg_is_deterministic(tmp_path):
    first, second = tmp_path / "first.svg", tmp_path / "second.svg"
    for path in (first, second):
        draw_timeline(timeline_of("helix"), path, title="A title")
    assert first.read_bytes() == second.read_bytes()
    assert b"<dc:date>" not in first.read_bytes()


def test_png_has_the_promised_width(tmp_path):
    path = tmp_path / "picture.PNG"
    draw_timeline(timeline_of("helix"), path)
    header = path.read_bytes()[:24]
    assert header.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", header[16:])
    assert width == 1600
    assert height < width


def test_numbers_only_where_they_fit(tmp_path):
    """Glyphs are references in SVG: many bars draw none, few bars draw theirs."""

    def glyphs(timeline):
        draw_timeline(timeline, tmp_path / "picture.svg")
        return (tmp_path / "picture.svg").read_text().count('xlink:href="#DejaVuSans-')

    wide = timeline_of("1f1b", m=4)
    narrow = timeline_of("1f1b", m=400)
    # 4 ranks, 4 micro batches, 2 directions; both pictures have about the same heading, axis and legend.
    assert 0 < glyphs(narrow) <= glyphs(wide) - 4 * 4 * 2 + 10


def test_thousands_of_bars(tmp_path):
    timeline = timeline_of("helix", p=8, layers=16, m=64)
    draw_timeline(timeline, tmp_path / "picture.png")
    assert sum(len(spans) for spans in timeline.spans) > 4000
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_many_ranks_fit_one_picture(tmp_path):
    draw_timeline(timeline_of("gpipe", p=100, layers=100, m=2), tmp_path / "picture.svg")
    boxes = [box for found in bars(tmp_path / "picture.svg").values() for box in found]
    tops = sorted({round(top, 3) for _, top, _, _ in boxes})
    assert len(tops) == 100
    assert min(b - a for a, b in pairwise(tops)) > 5


def test_titles_are_plain_text(tmp_path):
    """Dollar signs would start a formula."""
    draw_timeline(
        timeline_of("1f1b", p=1, layers=1, m=1), tmp_path / "picture.png", title="costs $1_{$ & <b>"
    )


@pytest.mark.parametrize("name", ["picture.pdf", "picture", "picture.svgz", "png"])
def test_other_suffixes_are_refused(name, tmp_path):
    with pytest.raises(ValueError, match=r"must end in \.png or \.svg") as caught:
        draw_timeline(timeline_of("1f1b"), tmp_path / name)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("until_ms", [0, -1, float("inf"), float("nan")])
def test_impossible_ends_are_refused(until_ms, tmp_path):
    with pytest.raises(ValueError, match="the time axis must end after 0 ms"):
        draw_timeline(timeline_of("1f1b"), tmp_path / "picture.png", until_ms=until_ms)


def test_empty_timelines_are_refused(tmp_path):
    for draw in (text_grid, lambda timeline: draw_timeline(timeline, tmp_path / "picture.png")):
        with pytest.raises(ValueError, match="nothing to draw: the timeline is empty"):
            draw(by_hand([], []))


def test_idle_ranks_and_operations_without_duration_are_drawn(tmp_path):
    timeline = by_hand([("0F0", 0, 0), ("0F1", 0, 4)], [])
    assert len(rows(text_grid(timeline, width=40))) == 2
    draw_timeline(timeline, tmp_path / "picture.svg")
    assert len(bars(tmp_path / "picture.svg")["idle"]) == 2


def test_costs_decide_the_picture(tmp_path):
    """Attention twice as long as the rest is drawn twice as wide."""
    plan = build_plan("helix", ScheduleRequest(num_ranks=2, num_layers=2, num_microbatches=4))
    segments = {name: SegmentCost(1, 2) for name in ("first", "middle", "last")}
    timeline = simulate(plan, Costs({**segments, "attention": SegmentCost(2, 4)}, {})).timeline
    draw_timeline(timeline, tmp_path / "picture.svg")
    found = bars(tmp_path / "picture.svg")

    def width(role):
        left, _, right, _ = found[role][0]
        return right - left

    assert width("attention-forward") == pytest.approx(2 * width("forward"), abs=0.01)
    assert width("attention-backward") == pytest.approx(4 * width("forward"), abs=0.01)
