"""The commands elastic and elastic-costs: tables, files, and one clear line for wrong input."""

import json
from dataclasses import replace

import pytest

from helixpipe.__main__ import main
from helixpipe.commands import batch_planning
from helixpipe.commands.parser import Parser
from helixpipe.elastic import ElasticPlan, costs_from_json, costs_to_json, ideal_costs
from helixpipe.elastic.sample import skewed_lengths
from helixpipe.elastic.search import choice

SIZES = ["--pipeline-model-parallel-size", "4", "--num-layers", "16"]
MODEL = ["--model", "llama-7b", "--hardware", "a800", "--tensor-model-parallel-size", "8"]


def run(*arguments):
    parser = Parser(prog="helixpipe")
    batch_planning.add_parsers(parser.add_subparsers(required=True).add_parser)
    args = parser.parse_args([str(argument) for argument in arguments])
    args.run(args)


@pytest.fixture
def files(tmp_path):
    lengths, costs = tmp_path / "lengths.json", tmp_path / "costs.json"
    lengths.write_text(json.dumps(skewed_lengths(64)))
    costs.write_text(costs_to_json(ideal_costs(token_bytes=17 * 8192.0, input_bytes=8192.0, kv_bytes=8192.0)))
    return ["--lengths", lengths, "--costs", costs, "--output", tmp_path / "plan.json"]


def test_elastic_prints_and_writes_everything(files, tmp_path, capsys):
    run("elastic", *files, *SIZES, "--memory-limit-gib", "20", "--plan-costs", tmp_path / "plan-costs.json")
    output = capsys.readouterr().out
    plan = ElasticPlan.from_json((tmp_path / "plan.json").read_text())
    lines = output.splitlines()
    count = len(plan.recipe.chunks)
    assert lines[0].startswith(f"{count} chunks.")
    assert "kind" in output
    assert sum(" split " in line or " batched " in line or " hybrid " in line for line in lines) == count
    for words in ("Stages; the limit is 20 GiB", "packed to the longest", "fixed-size chunks", "even slices"):
        assert words in output
    assert f"of {' + '.join(map(str, plan.recipe.pipelines))} chunks." in output
    assert "Checkpointing was solved in" in output
    assert max(plan.prediction.peak_bytes) <= 20 * 2**30
    assert any(map(any, plan.recipe.checkpointed))
    # The file is a plan like any other.
    arguments = ["simulate", "--plan", tmp_path / "plan.json", "--costs", tmp_path / "plan-costs.json"]
    assert main([str(argument) for argument in arguments]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["makespan_ms"] == plan.prediction.time_ms
    assert found["peak_bytes"] == list(plan.prediction.peak_bytes)


def test_a_number_of_slices_can_be_asked_for(files, tmp_path):
    run("elastic", *files, *SIZES, "--memory-limit-gib", "900", "--num-slices", "3")
    plan = ElasticPlan.from_json((tmp_path / "plan.json").read_text())
    assert max(len(group) for group in plan.recipe.slices) == 3


@pytest.mark.parametrize("words", ["2,6,6,2", "auto"])
def test_stages_of_different_layers_can_be_asked_for(files, tmp_path, capsys, words):
    costs = ideal_costs(token_bytes=17 * 8192.0, input_bytes=8192.0, kv_bytes=8192.0)
    head = {name: getattr(costs, name) for name in ("forward", "backward")}
    head = {name: replace(of, head_ms=6 * of.token_ms) for name, of in head.items()}
    files[3].write_text(costs_to_json(replace(costs, **head)))
    run("elastic", *files, *SIZES, "--memory-limit-gib", "90", "--num-slices", "3", "--stage-layers", words)
    plan = ElasticPlan.from_json((tmp_path / "plan.json").read_text())
    layers = plan.recipe.stage_layers
    assert layers == (2, 6, 6, 2) if words != "auto" else layers[-1] < min(layers[1:-1])
    rows = capsys.readouterr().out.partition("Stages; the limit")[2].splitlines()[1:6]
    assert rows[0].split()[:2] == ["stage", "layers"]
    assert tuple(int(row.split()[1]) for row in rows[1:]) == layers


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--memory-limit-gib", "9", "--stage-layers", "4,4,4"], "4,4,4 layers by stage are 12 layers"),
        (["--memory-limit-gib", "9", "--stage-layers", "x"], "--stage-layers: .*layers of each stage, like"),
        (
            ["--memory-limit-gib", "9", "--stage-layers", "auto", "--schedule", "elastic-helix"],
            "--stage-layers is for --schedule elastic and auto; leave it out",
        ),
        (["--memory-limit-gib", "0"], "--memory-limit-gib: .*must be above 0"),
        (["--memory-limit-gib", "nan"], "--memory-limit-gib: .*must be above 0"),
        (["--memory-limit-gib", "1"], "no plan fits"),
        (["--memory-limit-gib", "9", "--num-layers", "15"], "must be a multiple"),
        (["--memory-limit-gib", "9", "--num-slices", "0"], "--num-slices: must be at least 1"),
    ],
)
def test_wrong_arguments(files, arguments, words):
    with pytest.raises(ValueError, match=words) as caught:
        run("elastic", *files, *SIZES, *arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["{", "{}", "[]", "[1, -2]", "[" * 100000])
def test_wrong_lengths_files(files, tmp_path, text):
    (tmp_path / "lengths.json").write_text(text)
    with pytest.raises(ValueError, match=r"lengths\.json: "):
        run("elastic", *files, *SIZES, "--memory-limit-gib", "9")


def test_costs_from_the_model(tmp_path, capsys):
    path = tmp_path / "costs.json"
    run("elastic-costs", *MODEL, "--pipeline-model-parallel-size", "4", "--output", path)
    assert costs_from_json(path.read_text()).source == "llama-7b on a800, predicted"
    assert str(path) in capsys.readouterr().out
    for arguments, words in (
        (["--seq-length", "4096"], "leave it out"),
        (["--chunked-mlp"], "planned with whole MLPs; leave it out"),
        (["--measurements", str(path)], "needs --measured-layers"),
    ):
        with pytest.raises(ValueError, match=words):
            run("elastic-costs", *MODEL, "--pipeline-model-parallel-size", "4", "--output", path, *arguments)


def test_costs_from_measurements(tmp_path, capsys):
    records = [
        {
            "context": context,
            "lengths": [n],
            "forward_ms": 1e-3 * n + 1e-8 * n * (2 * context + n) + 0.1,
            "backward_ms": 2e-3 * n + 3e-8 * n * (2 * context + n) + 0.1,
            "bytes": 20000 * n,
        }
        for context in (0, 8192, 65536)
        for n in (512, 2048, 8192, 32768)
    ]
    measured, path = tmp_path / "records.json", tmp_path / "costs.json"
    measured.write_text(json.dumps(records))
    fitting = ["--measurements", measured, "--measured-layers", "1"]
    run("elastic-costs", *MODEL, "--pipeline-model-parallel-size", "4", "--output", path, *fitting)
    output = capsys.readouterr().out
    assert "Error on 3 measurements held out:" in output
    assert "forward: 0.0% on average, 0.0% at most" in output
    assert costs_from_json(path.read_text()).forward.token_ms == pytest.approx(8e-3)


@pytest.mark.parametrize("schedule", ["elastic-helix", "auto"])
def test_elastic_helix_is_planned_shown_and_simulated_like_any_plan(files, tmp_path, capsys, schedule):
    (tmp_path / "lengths.json").write_text("[60000, 9000, 5000, 5000, 700]")
    run(
        "elastic", *files, *SIZES, "--memory-limit-gib", "200", "--schedule", schedule, "--num-slices", "4",
        "--plan-costs", tmp_path / "plan-costs.json",
    )  # fmt: skip
    output = capsys.readouterr().out
    plan = ElasticPlan.from_json((tmp_path / "plan.json").read_text())
    assert plan.plan.schedule == "elastic-helix"
    count, recipe = len(plan.recipe.chunks), plan.recipe
    lines = output.splitlines()
    assert lines[0].startswith(f"{count} chunks.")
    assert sum(" split " in line or " batched " in line or " hybrid " in line for line in lines) == count
    assert f"of {' + '.join(map(str, recipe.sizes))} chunks." in output
    assert "Ranks; the limit is 200 GiB" in output
    assert f"Recomputed in every layer: {recipe.recompute}." in output
    if schedule == "auto":
        assert "Schedule: elastic-helix is predicted to take" in output
        assert ", elastic " in output
    else:
        assert "Schedule: elastic-helix, as asked for." in output
    arguments = ["simulate", "--plan", tmp_path / "plan.json", "--costs", tmp_path / "plan-costs.json"]
    assert main([str(argument) for argument in arguments]) == 0
    assert json.loads(capsys.readouterr().out)["makespan_ms"] == plan.prediction.time_ms
    assert main(["draw", "--plan", str(tmp_path / "plan.json"), "--output", str(tmp_path / "plan.svg")]) == 0
    assert "<svg" in (tmp_path / "plan.svg").read_text()


def test_the_names_of_schedules_are_those_of_the_search():
    assert set(batch_planning.ELASTIC_SCHEDULES) == {choice.AUTO, *choice.SCHEDULES}
