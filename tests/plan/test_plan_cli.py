"""The commands plan, simulate and draw: their files, their output and what they say about wrong input."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from helixpipe.__main__ import main
from helixpipe.plan import Plan, validate
from helixpipe.plan.plan import orders_from_csv

ROOT = Path(__file__).parents[2]
SIZES = ["--num-layers", "4", "--pipeline-model-parallel-size", "2", "--num-microbatches", "4"]
COSTS = {"segments": {name: {"F": 1, "B": 2, "bytes": 10} for name in ("stage0", "stage1")}}


def command(*arguments):
    """Run ``python -m helixpipe`` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "helixpipe", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
    )


@pytest.fixture
def plan_file(tmp_path):
    path = tmp_path / "plan.json"
    assert main(["plan", "--schedule", "1f1b", *SIZES, "--output", str(path)]) == 0
    return path


@pytest.fixture
def costs_file(tmp_path):
    path = tmp_path / "costs.json"
    path.write_text(json.dumps(COSTS))
    return path


def fails(capsys, *arguments):
    """Run a command that must fail; its one line of complaint."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith(f"helixpipe {arguments[0]}: error: ")
    assert output.err.count("\n") == 1
    return output.err


def test_from_plan_to_picture(tmp_path):
    """The three commands as a user runs them."""
    plan, costs, result = tmp_path / "plan.json", tmp_path / "costs.json", tmp_path / "result.json"
    done = command("plan", "--schedule", "helix", *SIZES, "--output", plan)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("helix: 2 ranks, 9 segments, 4 micro batches, ")
    names = ("first", "middle", "last", "attention")
    costs.write_text(
        json.dumps({"segments": {n: {"F": 1, "B": 2, "bytes": 3} for n in names}, "p2p_ms": {"*": 0.5}})
    )
    done = command("simulate", "--plan", plan, "--costs", costs, "--output", result)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    found = json.loads(result.read_text())
    assert set(found) == {"makespan_ms", "busy_ms", "bubble_ratio", "peak_bytes"}
    assert found["makespan_ms"] == 4 * (2 * 4 // 2 + 1) * 3
    assert found["peak_bytes"] == [2 * 3 * (2 * 4 + 2), 2 * 3 * 2 * 4]
    done = command("draw", "--plan", plan, "--costs", costs, "--output", tmp_path / "plan.svg")
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "plan.svg").read_text().startswith("<?xml")


def test_errors_of_a_process(tmp_path):
    done = command("plan", "--schedule", "1f2b", *SIZES, "--output", tmp_path / "plan.json")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        "helixpipe plan: error: unknown schedule '1f2b'; did you mean 1f1b? "
        "known: gpipe, 1f1b, interleaved, zb-h1, zb-v, v-half, v-min, dualpipe-v, seq1f1b, helix, "
        "sliced-helix, elastic, elastic-helix\n"
    )
    assert not (tmp_path / "plan.json").exists()


def test_planning_needs_neither_torch_nor_megatron():
    """Plans are made on login nodes and laptops; drawing libraries are for drawing only."""
    code = (
        "import sys, helixpipe.plan, helixpipe.__main__;"
        "heavy = {'torch', 'megatron', 'scipy', 'matplotlib'};"
        "print(sorted(heavy & {name.partition('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60, check=True
    )
    assert done.stdout == "[]\n"


def test_plan_files(tmp_path, capsys):
    output, table = tmp_path / "plan.json", tmp_path / "plan.csv"
    arguments = ["plan", "--schedule", "helix", *SIZES, "--num-fold", "1", "--attention-range", "block"]
    assert main([*arguments, "--output", str(output), "--csv", str(table)]) == 0
    assert str(output) in capsys.readouterr().out
    plan = Plan.from_json(output.read_text())
    validate(plan)
    assert plan.is_lowered
    assert plan.parameters == {"num_layers": 4, "num_fold": 1, "attention_range": "block"}
    assert orders_from_csv(table.read_text()) == plan.orders
    assert main([*arguments, "--compute-only", "--output", str(output)]) == 0
    assert Plan.from_json(output.read_text()) == plan.compute_only()


def test_simulate_prints_without_an_output(plan_file, costs_file, capsys):
    capsys.readouterr()
    assert main(["simulate", "--plan", str(plan_file), "--costs", str(costs_file)]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "makespan_ms": 15,
        "busy_ms": [12, 12],
        "bubble_ratio": pytest.approx(0.2),
        "peak_bytes": [20, 10],
    }


def test_draw_in_the_terminal(plan_file, costs_file, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    capsys.readouterr()
    assert main(["draw", "--plan", str(plan_file), "--costs", str(costs_file)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("1f1b, predicted · makespan 15 ms · bubble 20.0%")
    assert lines[1].startswith("rank 0 │F0")
    assert lines[2].startswith("rank 1 │···")


def test_pages_and_traces(plan_file, costs_file, tmp_path, capsys):
    """One suffix for each form; several plans, each with its costs, on one page."""
    page, trace, picture = tmp_path / "page.html", tmp_path / "trace.json", tmp_path / "picture.png"
    both = ["draw", "--plan", str(plan_file), str(plan_file), "--costs", str(costs_file), str(costs_file)]
    assert main([*both, "--title", "Twice", "--output", str(page)]) == 0
    assert page.read_text().count('<section class="panel') == 2
    assert "<title>Twice" in page.read_text()
    assert main([*both, "--output", str(trace)]) == 0
    processes = [e for e in json.loads(trace.read_text())["traceEvents"] if e["name"] == "process_name"]
    assert len(processes) == 2
    assert main(["draw", "--plan", str(plan_file), "--memory", "--output", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_draw_a_measured_timeline(tmp_path, capsys):
    timeline = tmp_path / "timeline.json"
    timeline.write_text('{"source": "measured, iteration 20", "ranks": [[["0F0", 0.5, 2], ["0B0", 2, 4.5]]]}')
    assert main(["draw", "--timeline", str(timeline)]) == 0
    assert capsys.readouterr().out.startswith("measured, iteration 20 · makespan 4 ms")
    picture = tmp_path / "timeline.png"
    assert main(["draw", "--timeline", str(timeline), "--output", str(picture), "--until", "10"]) == 0
    assert picture.stat().st_size > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--schedule", "zb"], "unknown schedule 'zb'"),
        (
            ["--schedule", "1f1b", "--num-layers", "5"],
            "(5) must be a multiple of the pipeline-parallel size",
        ),
        (["--schedule", "helix", "--num-layers", "1"], "use at most that many ranks"),
        (["--schedule", "helix", "--num-microbatches", "1"], "(1) must be at least the pipeline-parallel"),
        (["--schedule", "helix", "--split-weight-gradients"], "needs --round-order interlocked"),
        (["--schedule", "1f1b", "--num-fold", "2"], "--num-fold does not apply to 1f1b"),
        (["--schedule", "helix", "--virtual-stages", "2"], "--virtual-stages does not apply to helix"),
        (["--schedule", "gpipe", "--attention-range", "core"], "--attention-range does not apply to gpipe"),
        (["--schedule", "helix", "--attention-range", "mlp"], "unknown attention range 'mlp'"),
        (["--schedule", "helix", "--num-fold", "0"], "--num-fold: must be at least 1"),
        (["--schedule", "1f1b", "--pipeline-model-parallel-size", "0"], "must be at least 1, not 0"),
    ],
)
def test_wrong_plan_arguments(arguments, message, tmp_path, capsys):
    output = tmp_path / "plan.json"
    assert message in fails(capsys, "plan", *SIZES, *arguments, "--output", output)
    assert not output.exists()


def test_unwritable_output(tmp_path, capsys):
    missing = tmp_path / "nowhere" / "plan.json"
    assert str(missing) in fails(capsys, "plan", "--schedule", "1f1b", *SIZES, "--output", missing)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not a plan: invalid JSON"),
        (b"\xff\xfe\x00", "not a text file"),
        (b"[]", "not a plan: expected a JSON object"),
        (b'{"format": "helixpipe-plan", "version": 99}', "plan version 99; this program reads 1"),
        (b'{"format": "helixpipe-plan", "version": 1}', '"num_microbatches" must be of type int, found None'),
    ],
)
def test_files_that_are_no_plan(content, message, tmp_path, costs_file, capsys):
    path = tmp_path / "other.json"
    path.write_bytes(content)
    assert message in fails(capsys, "simulate", "--plan", path, "--costs", costs_file)
    assert message in fails(capsys, "draw", "--plan", path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("num_ranks", True, '"num_ranks" must be of type int, found True'),
        ("schedule", None, '"schedule" must be of type str'),
        ("placement", ["x", "y"], "\"placement\" holds 'x' instead of a rank"),
        ("orders", [[1], []], '"orders" must hold lists of strings'),
        ("orders", [["0X0"], []], "'0X0' is not an operation"),
        ("segments", ["stage0"], "1 segments but 2 placed"),
        ("orders", [[], []], "0F0 is missing from rank 0"),
    ],
)
def test_damaged_plans(key, value, message, plan_file, costs_file, capsys):
    data = json.loads(plan_file.read_text())
    plan_file.write_text(json.dumps({**data, key: value}))
    assert message in fails(capsys, "simulate", "--plan", plan_file, "--costs", costs_file)


def test_a_broken_plan_shows_the_place(plan_file, costs_file, capsys):
    """The one complaint of more than a line: it holds the rank's operations with a mark."""
    data = json.loads(plan_file.read_text())
    data["orders"][0].append(data["orders"][0][-1])
    plan_file.write_text(json.dumps(data))
    assert main(["simulate", "--plan", str(plan_file), "--costs", str(costs_file)]) == 2
    assert capsys.readouterr().err.endswith("0B2 0RECV_B3@1 0B3 0B3 <-- here\n")


def test_missing_files(tmp_path, plan_file, costs_file, capsys):
    absent = tmp_path / "absent.json"
    for arguments in (
        ["simulate", "--plan", absent, "--costs", costs_file],
        ["simulate", "--plan", plan_file, "--costs", absent],
        ["draw", "--plan", absent],
        ["draw", "--timeline", absent],
    ):
        assert str(absent) in fails(capsys, *arguments)


def test_wrong_costs(plan_file, costs_file, capsys):
    costs_file.write_text('{"segments": {"first": {"F": 1, "B": 2}}}')
    complaint = fails(capsys, "simulate", "--plan", plan_file, "--costs", costs_file)
    assert "segment 'first' is unknown; known: stage0, stage1" in complaint
    costs_file.write_text("segments:")
    assert "costs: invalid JSON" in fails(capsys, "draw", "--plan", plan_file, "--costs", costs_file)


def test_wrong_draw_arguments(tmp_path, plan_file, costs_file, capsys):
    timeline = tmp_path / "timeline.json"
    timeline.write_text('{"source": "x", "ranks": [[]]}')
    assert "--costs goes with --plan" in fails(capsys, "draw", "--timeline", timeline, "--costs", costs_file)
    assert "the timeline is empty" in fails(capsys, "draw", "--timeline", timeline)
    assert "must end in .png, .svg, .html, .json" in fails(
        capsys, "draw", "--plan", plan_file, "--output", "plan.pdf"
    )
    assert "add --output" in fails(capsys, "draw", "--plan", plan_file, "--until", "5")
    picture = ["--output", tmp_path / "plan.png"]
    assert "--until: must be above 0" in fails(capsys, "draw", "--plan", plan_file, *picture, "--until", "-1")
    two = ["draw", "--plan", plan_file, plan_file]
    assert "are for a picture of one timeline" in fails(capsys, *two, *picture, "--memory")
    assert "are for a picture of one timeline" in fails(capsys, *two, *picture, "--title", "both")
    assert "2 plans but 1 costs; give one for each plan" in fails(capsys, *two, "--costs", costs_file)
    page = ["--output", tmp_path / "page.html"]
    assert "--until and --memory are for pictures" in fails(capsys, *two, *page, "--memory")


@pytest.mark.parametrize("arguments", [["plan"], ["draw"], ["sing"]])
def test_missing_arguments_end_with_one_line(arguments, capsys):
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("helixpipe")
    assert ": error: " in line
