"""The page in a real browser: its scripts draw, and answer to mouse, keyboard and address."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from helixpipe.plan import Kind, Operation, ScheduleRequest, build_plan
from helixpipe.plan.simulation.costs import Costs, SegmentCost
from helixpipe.plan.simulation.simulate import simulate
from helixpipe.plan.simulation.timeline import Span, Timeline
from helixpipe.report.page import write_page
from helixpipe.report.palette import STYLES
from helixpipe.report.role import Role
from helixpipe.report.summary import LabelledTimeline

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine to open the page in")

# Goes before the page's own script: in virtual time a browser makes only a few frames.
FRAMES = "<script>window.requestAnimationFrame = (draw) => setTimeout(draw, 0);</script>"
# Goes behind it. Each step waits for the next frame, in which the page draws.
DRIVER = """
<pre id="found"></pre>
<script>
const found = {};
const canvases = [...document.querySelectorAll("canvas.bars")];
const [bars, others] = canvases;
const frame = () => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
const details = () => document.querySelector(".details").textContent;
const tip = () => document.getElementById("tip");
function mouse(type, canvas, x, y, extra = {}) {
  const { left, top } = canvas.getBoundingClientRect();
  const at = { clientX: left + x, clientY: top + y, bubbles: true, cancelable: true, pointerId: 1 };
  const kind = type === "wheel" ? WheelEvent : PointerEvent;
  canvas.dispatchEvent(new kind(type, { button: 0, ...at, ...extra }));
}
function press(key, extra = {}) {
  bars.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true, ...extra }));
}
async function drive() {
  // Synthetic pointers cannot be captured; real ones can.
  for (const canvas of canvases) canvas.setPointerCapture = () => {};
  await frame();
  found.whole = canvases.map((canvas) => canvas.dataset.drawn);
  mouse("pointermove", bars, 70, 12);
  found.tip = tip().hidden ? "" : tip().innerText;
  mouse("pointermove", bars, 70, 12 + 26);
  found.idleTip = tip().innerText;
  mouse("pointermove", document.querySelector("canvas.memory"), 300, 40);
  found.memoryTip = tip().innerText;
  mouse("pointermove", canvases[2], 70, 12);
  found.measuredTip = tip().innerText;
  mouse("pointerleave", canvases[2], 0, 0);
  found.tipGone = tip().hidden;
  mouse("wheel", bars, 400, 12, { deltaY: -300 });
  await frame();
  found.scrolled = bars.dataset.drawn;
  mouse("wheel", bars, 400, 12, { deltaY: -300, ctrlKey: true });
  await frame();
  found.zoomed = canvases.map((canvas) => canvas.dataset.drawn);
  mouse("pointerdown", bars, 400, 12);
  mouse("pointermove", bars, 300, 12);
  mouse("pointerup", bars, 300, 12);
  await frame();
  found.panned = bars.dataset.drawn;
  document.getElementById("together").click();
  mouse("dblclick", bars, 400, 12);
  await frame();
  found.apart = canvases.map((canvas) => canvas.dataset.drawn);
  mouse("pointerdown", bars, 70, 12);
  mouse("pointerup", bars, 70, 12);
  found.clicked = details();
  press("ArrowRight");
  found.right = details();
  press("n");
  found.next = details();
  press("p");
  found.previous = details();
  press("ArrowDown");
  found.down = details();
  found.address = location.hash;
  press("Escape");
  found.escaped = [details(), location.hash];
  press("+");
  await frame();
  found.keyZoom = bars.dataset.drawn;
  location.hash = "#op=15B3&in=1";
  await frame();
  await new Promise((done) => setTimeout(done, 50));
  found.linked = details();
  const find = document.getElementById("find");
  find.value = "99f9";
  find.dispatchEvent(new Event("change"));
  found.invalid = find.getAttribute("aria-invalid");
  found.byName = {};
  for (const name of ["4f1", "1F4", "15B7"]) {
    find.value = name;
    find.dispatchEvent(new Event("change"));
    found.byName[name] = details();
  }
  press("n");
  found.gradient = details();
  document.getElementById("found").textContent = JSON.stringify(found);
}
drive();
</script>
"""


def browse(folder, page, *options, address=""):
    """Output and messages of a browser that opens ``page`` in a profile of its own."""
    command = [
        BROWSER,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--hide-scrollbars",
        "--enable-logging=stderr",
        f"--user-data-dir={folder / 'profile'}",
        "--virtual-time-budget=5000",
        *options,
        f"file://{page}{address}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert not console, console
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pages")


@pytest.fixture(scope="module")
def page(folder):
    """Helix and zero-bubble, whose messages take time, and a timeline that knows its operations only."""
    entries = []
    for schedule in ("helix", "zb-h1"):
        plan = build_plan(schedule, ScheduleRequest(num_ranks=4, num_layers=8, num_microbatches=8))
        costs = Costs(dict.fromkeys(plan.cost_names, SegmentCost(1, 1, 1, bytes=2**30)), {"*": 0.5})
        entries.append(LabelledTimeline(simulate(plan, costs).timeline, title=schedule))
    measured = Timeline(entries[0].timeline.spans, "measured, nothing but operations")
    path = folder / "page.html"
    write_page([*entries, measured], path, title="Three timelines", memory_limit_bytes=50 * 2**30)
    return path


@pytest.fixture(scope="module")
def found(folder, page):
    """What the driver saw."""
    driven = folder / "driven.html"
    text = page.read_text(encoding="utf-8")
    text = text.replace("<body>", "<body>" + FRAMES).replace("</body>", DRIVER + "</body>")
    driven.write_text(text, encoding="utf-8")
    dom = browse(folder, driven, "--window-size=1200,2200", "--dump-dom")
    (result,) = re.findall(r'<pre id="found">(.*?)</pre>', dom, re.S)
    assert result, "the driver did not reach its end"
    return json.loads(html.unescape(result))


def span_of(text):
    return tuple(float(number) for number in text.split(".."))


def test_everything_is_drawn_at_first_on_one_axis(found):
    first, *others = map(span_of, found["whole"])
    assert others == [first, first]
    assert first[0] == 0


def test_hovering_tells_what_runs(found):
    assert found["tip"].startswith(
        "0F0\nforward\nsegment\n0 (first)\nmicro batch\n0\nrank\n0\nstart\n0 ms\nend\n1 ms"
    )
    assert found["idleTip"].startswith("idle\nrank\n1\nfrom\n0 ms")
    assert re.search(r"waits\n[\d.]+ ms for 0RECV_F0@0", found["idleTip"])
    assert re.match(r"held at [\d.]+ ms\nrank \d\n[\d.]+ GiB\n", found["memoryTip"])
    assert found["measuredTip"].startswith("0F0\nforward\nsegment\n0\nmicro batch")
    assert found["tipGone"]


def test_the_wheel_scrolls_and_zooms_with_ctrl(found):
    assert found["scrolled"] == found["whole"][0]
    first, *others = map(span_of, found["zoomed"])
    whole = span_of(found["whole"][0])
    assert others == [first, first]
    assert whole[0] < first[0] < first[1] < whole[1]


def test_dragging_moves_and_timelines_can_be_parted(found):
    zoomed, panned = span_of(found["zoomed"][0]), span_of(found["panned"])
    assert panned[0] > zoomed[0]
    assert panned[1] - panned[0] == pytest.approx(zoomed[1] - zoomed[0])
    assert found["apart"] == [found["whole"][0], found["panned"], found["panned"]]


def test_operations_are_chosen_by_mouse_and_keyboard(found):
    assert found["clicked"].startswith("0F0")
    assert found["right"].startswith("0F1")
    assert found["next"].startswith("1F1")
    assert found["previous"].startswith("0F1")
    assert "rank 1" in found["down"]
    assert found["address"].startswith("#op=")
    assert found["escaped"] == ["", ""]
    zoomed, whole = span_of(found["keyZoom"]), span_of(found["whole"][0])
    assert zoomed[1] - zoomed[0] == pytest.approx((whole[1] - whole[0]) / 1.5)


def test_operations_are_found_by_name_and_address(found):
    assert found["linked"].startswith("15B3attention backward")
    assert found["invalid"] == "true"
    assert found["byName"]["4f1"].startswith("4F1forward")
    assert found["gradient"].startswith("14B7backward")  # what 15B7 feeds


def test_operations_say_what_they_waited_for(found):
    assert "waited" not in found["byName"]["4f1"]
    assert found["byName"]["1F4"].endswith("waited 5.5 ms for 0RECV_F4@0")
    assert found["byName"]["15B7"].endswith("waited 5 ms for 15RECV_B7@0")


def test_an_address_chooses_an_operation_when_the_page_opens(folder, page):
    dom = browse(folder, page, "--dump-dom", address="#op=3W2&in=2")
    chosen = re.findall(r'<p class="details" aria-live="polite">(.*?)</p>', dom)
    assert chosen[0] == ""
    assert chosen[1].startswith("<span><b>3W2</b></span><span>weight gradient</span>")
    assert "aria-invalid" not in dom.partition("<body>")[2].partition("<script")[0]
    dom = browse(folder, page, "--dump-dom", address="#op=99F0")
    assert "aria-invalid" in dom.partition("<body>")[2].partition("<script")[0]


@pytest.mark.parametrize(("dark", "width"), [(True, 1200), (False, 500)])
def test_the_picture_has_the_colours_of_its_mode(folder, page, dark, width):
    picture = folder / f"{width}.png"
    browse(
        folder,
        page,
        f"--screenshot={picture}",
        f"--window-size={width},1400",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}",
    )
    pixels = np.round(matplotlib.image.imread(Path(picture))[..., :3] * 255).astype(int)
    assert (pixels[4, 4].sum() < 120) == dark
    for role in Role:
        colour = [int(STYLES[role].fill[at : at + 2], 16) for at in (1, 3, 5)]
        # More than the legend's swatch of 12 x 12 pixels.
        assert (np.abs(pixels - colour).max(axis=-1) <= 1).sum() > 600, role


def test_a_hundred_thousand_operations_are_drawn_within_moments(folder):
    kinds = (Kind.F, Kind.B)
    spans = tuple(
        tuple(Span(Operation(rank, kinds[i % 2], i // 2), rank + i, rank + i + 0.9) for i in range(1600))
        for rank in range(64)
    )
    path, timed = folder / "large.html", folder / "timed.html"
    write_page([Timeline(spans)], path, title="Large")
    timer = """const [panel] = new Page().panels;
    const start = performance.now();
    panel.draw();
    panel.draw();
    const drawn = panel.bars.getContext("2d").getImageData(200, 6, 1, 1).data;
    document.body.dataset.spent = [(performance.now() - start) / 2, drawn[3]];"""
    text = path.read_text(encoding="utf-8")
    assert text.count("new Page();") == 1
    timed.write_text(text.replace("new Page();", timer), encoding="utf-8")
    dom = browse(folder, timed, "--window-size=1600,1000", "--dump-dom")
    spent, opacity = re.findall(r'data-spent="([\d.]+),(\d+)"', dom)[0]
    assert opacity == "255"
    # About 25 ms on an idle core; the bound leaves room for busy machines.
    assert float(spent) < 1000
