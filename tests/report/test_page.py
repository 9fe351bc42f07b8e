"""The page of timelines: what stands in the file, before any browser reads it."""

import json
import re
from html.parser import HTMLParser

import pytest

from helixpipe.plan import Operation, ScheduleRequest, build_plan
from helixpipe.plan.simulation.costs import Costs, uniform_costs
from helixpipe.plan.simulation.simulate import simulate
from helixpipe.plan.simulation.timeline import Level, Span, Timeline
from helixpipe.report.page import write_page
from helixpipe.report.summary import LabelledTimeline, summary_columns, worst_wait

GIB = 2**30


class Reader(HTMLParser):
    """Collects tags, the rows of the table, and the text of scripts."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.rows, self.scripts, self.inside = [], [], [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag in ("script", "th", "td", "h2"):
            self.inside.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        if self.inside and self.inside[-1] == tag:
            self.inside.pop()

    def handle_data(self, data):
        if "script" in self.inside:
            self.scripts[-1] += data
        elif "th" in self.inside or "td" in self.inside:
            self.rows[-1][-1] += data

    def named(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def data(self):
        return json.loads(self.scripts[0])


def timeline_of(schedule, p=4, layers=8, m=8):
    plan = build_plan(schedule, ScheduleRequest(num_ranks=p, num_layers=layers, num_microbatches=m))
    return simulate(plan, Costs(uniform_costs(plan).segments, {"*": 0.5})).timeline


def by_hand(scale=1.0, peak=3 * GIB, source="by hand"):
    parse = Operation.parse
    spans = (
        (Span(parse("0F2"), 10, 10 + scale), Span(parse("0B2"), 10 + 4.5 * scale, 10 + 6 * scale)),
        (Span(parse("1F2"), 10 + 2 * scale, 10 + 3 * scale),),
    )
    waits = ((), (Span(parse("0RECV_F2@0"), 10 + scale, 10 + 2 * scale),))
    memory = ((Level(0, GIB), Level(10, peak), Level(11, GIB)), (Level(0, GIB),))
    return Timeline(spans, source, ("stage0", "attention"), waits, memory)


def test_table_says_what_the_timelines_say(tmp_path):
    path = tmp_path / "page.html"
    entries = [
        LabelledTimeline(by_hand(), "quick", iteration_ms=8, facts={"fold": 2}),
        LabelledTimeline(by_hand(2.0, 2 * GIB, "measured"), "frugal", iteration_ms=14),
    ]
    write_page(entries, path, title="Two", memory_limit_bytes=2 * GIB)
    head, quick, frugal = Reader(path).rows
    assert head == [
        "timeline",
        "makespan",
        "iteration",
        "bubble",
        "peak memory",
        "waiting, all ranks",
        "longest wait",
    ]
    assert quick == [
        "quickby hand",
        "6 ms, best",
        "8 ms, best",
        "70.8%",
        "3 GiBrank 0, over the limit",
        "1 ms, best",
        "1 ms, bestrank 1 for 0RECV_F2@0",
    ]
    assert frugal[:5] == ["frugalmeasured", "12 ms+100.0%", "14 ms+75.0%", "70.8%", "2 GiB, bestrank 0"]
    links = [link["href"] for link in Reader(path).named("a")]
    assert links == ["#timeline-1", "#op=1F2&in=1", "#timeline-2", "#op=1F2&in=2"]


def test_unknown_values_take_no_column():
    known, unknown = LabelledTimeline(by_hand()), LabelledTimeline(Timeline(by_hand().spans, "measured"))
    assert [column.name for column in summary_columns([unknown])] == ["makespan", "bubble"]
    peak = next(column for column in summary_columns([known, unknown]) if column.name == "peak memory")
    assert [(cell.text, cell.best) for cell in peak.cells] == [("3 GiB", False), ("–", False)]


def test_values_over_the_limit_are_never_best():
    entries = [LabelledTimeline(by_hand(peak=5 * GIB)), LabelledTimeline(by_hand(peak=4 * GIB))]
    for limit, best in ((None, [False, True]), (3 * GIB, [False, False])):
        columns = {column.name: column.cells for column in summary_columns(entries, limit)}
        assert [cell.best for cell in columns["peak memory"]] == best


def test_no_wait_at_all_is_known():
    timeline = Timeline(by_hand().spans, waits=((), ()))
    columns = {column.name: column.cells[0].text for column in summary_columns([LabelledTimeline(timeline)])}
    assert worst_wait(timeline) is None
    assert (columns["longest wait"], columns["waiting, all ranks"]) == ("none", "0 ms")


@pytest.mark.parametrize("schedule", ["helix", "zb-h1"])
def test_page_holds_every_operation_wait_and_level(schedule, tmp_path):
    timeline = timeline_of(schedule)
    write_page([timeline], tmp_path / "page.html", title="One")
    data = Reader(tmp_path / "page.html").data
    (shown,) = data["timelines"]
    tick = shown["tick"]
    for numbers, spans in zip(shown["spans"], timeline.spans, strict=True):
        time = 0
        fields = zip(*[iter(numbers)] * 5, strict=True)
        for (role, segment, micro_batch, gap, duration), span in zip(fields, spans, strict=True):
            kind = data["roles"][role]["kind"]
            assert f"{segment}{kind}{micro_batch}" == str(span.operation)
            assert (time + gap) * tick == pytest.approx(span.start_ms, abs=1e-6)
            time += gap + duration
            assert time * tick == pytest.approx(span.end_ms, abs=1e-6)
    for numbers, waits in zip(shown["waits"], timeline.waits, strict=True):
        fields = list(zip(*[iter(numbers)] * 6, strict=True))
        names = [f"{edge}RECV_{'FBPG'[kind]}{i}@{peer}" for edge, kind, i, peer, _, _ in fields]
        assert names == [str(wait.operation) for wait in waits]
        assert sum(field[5] for field in fields) * tick == pytest.approx(sum(w[2] - w[1] for w in waits))
    for numbers, peak in zip(shown["memory"], timeline.peak_bytes, strict=True):
        held = [sum(numbers[1 : i + 1 : 2]) * shown["quantum"] for i in range(1, len(numbers), 2)]
        assert max(held) == peak


def test_the_page_fetches_nothing(tmp_path):
    write_page([timeline_of("helix"), by_hand()], tmp_path / "page.html", title="Still")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert not re.search(r"https?:|//cdn|@import|url\(", text)
    reader = Reader(tmp_path / "page.html")
    assert not [attributes for _, attributes in reader.tags if "src" in attributes]
    assert not reader.named("link")
    assert all(attributes["href"].startswith("#") for attributes in reader.named("a"))
    (policy,) = (meta["content"] for meta in reader.named("meta") if "http-equiv" in meta)
    assert policy.startswith("default-src 'none';")


def test_words_from_users_stay_words(tmp_path):
    """Neither markup, nor the end of a script, nor a placeholder."""
    evil = "</script><script>alert(1)</script><b onclick='x'>&{{data}}\"<!--"
    timeline = Timeline(by_hand().spans, evil, (evil, evil))
    path, tame = tmp_path / "page.html", tmp_path / "tame.html"
    write_page([LabelledTimeline(timeline, evil, facts={evil: evil})], path, title=evil)
    write_page(
        [LabelledTimeline(Timeline(timeline.spans, "s", ("a", "b")), "t", facts={"f": 1})], tame, title="t"
    )
    reader = Reader(path)
    # The same elements as in a page with tame words, nothing more.
    assert [tag for tag, _ in reader.tags] == [tag for tag, _ in Reader(tame).tags]
    assert len(reader.scripts) == 2
    assert reader.data["timelines"][0]["segments"] == [evil, evil]
    assert reader.rows[1][0] == evil + evil
    assert "alert" not in reader.scripts[1]


def test_pages_are_accessible_without_a_picture(tmp_path):
    write_page([timeline_of("helix"), by_hand()], tmp_path / "page.html", title="Two")
    reader = Reader(tmp_path / "page.html")
    bars = [canvas for canvas in reader.named("canvas") if canvas["class"] == "bars"]
    assert len(bars) == 2
    assert all(canvas["tabindex"] == "0" and "Operations of" in canvas["aria-label"] for canvas in bars)
    assert all(canvas.get("aria-label") or canvas.get("aria-hidden") for canvas in reader.named("canvas"))
    assert {cell["scope"] for cell in reader.named("th")} == {"col", "row"}
    ids = [attributes["id"] for _, attributes in reader.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in reader.tags:
        for name in ("aria-labelledby", "aria-describedby", "aria-controls"):
            assert attributes.get(name, ids[0]) in ids
        assert attributes.get("href", "#op=").startswith("#op=") or attributes["href"][1:] in ids


def test_equal_input_gives_equal_pages(tmp_path):
    for name in ("first.html", "second.html"):
        write_page([timeline_of("helix")], tmp_path / name, title="Same")
    assert (tmp_path / "first.html").read_bytes() == (tmp_path / "second.html").read_bytes()


def test_large_plans_stay_compact(tmp_path):
    timeline = timeline_of("1f1b", p=16, layers=16, m=500)
    write_page([timeline], tmp_path / "page.html", title="Large")
    operations = sum(len(spans) for spans in timeline.spans)
    assert operations == 16_000
    assert (tmp_path / "page.html").stat().st_size < 60_000 + 60 * operations


def test_what_cannot_be_shown_is_refused(tmp_path):
    path = tmp_path / "page.html"
    with pytest.raises(ValueError, match="there is no timeline"):
        write_page([], path, title="None")
    with pytest.raises(ValueError, match="the timeline 'idle' is empty"):
        write_page([by_hand(), Timeline(((), ()), "idle")], path, title="Empty")
    with pytest.raises(ValueError, match="memory limit must be above 0"):
        write_page([by_hand()], path, title="No memory", memory_limit_bytes=0)
    assert not path.exists()
