"""The commands costs and advise: from a name to a ranked table, and what they say about wrong input."""

import json

import pytest

from helixpipe.__main__ import main
from helixpipe.plan import Plan
from helixpipe.plan.cost_model import HARDWARE, MODELS, Workload, predict_pieces
from helixpipe.plan.simulation.costs import parse_costs
from helixpipe.plan.slice_ends import slice_ends

MODEL = ["--model", "llama-7b", "--hardware", "h20", "--seq-length", "131072"]
CLUSTER = ["--tensor-model-parallel-size", "8"]
SIZES = ["--pipeline-model-parallel-size", "8", "--num-microbatches", "16"]


def run(capsys, *arguments):
    assert main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out


def fails(capsys, *arguments):
    assert main([str(argument) for argument in arguments]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1
    return output.err


@pytest.fixture
def profile_file(tmp_path):
    """A profile as ``profile`` would write it; its times come from the model."""
    path = tmp_path / "profile.json"
    workload = Workload(model=MODELS["gpt-1.3b"], seq_length=8192, tensor_parallel=2)
    path.write_text(predict_pieces(workload, HARDWARE["h100"]).to_json())
    return path


def test_advise_prints_a_ranked_table_and_the_arguments(capsys):
    output = run(capsys, "advise", *MODEL, *CLUSTER, *SIZES)
    lines = output.splitlines()
    assert lines[0].startswith("llama-7b, 131072 tokens, 64 GPUs = tensor 8 x pipeline 8 x data 1")
    rows = [line for line in lines if line[:1].isdigit() and "candidates" not in line]
    assert [int(row.split()[0]) for row in rows] == list(range(1, len(rows) + 1))
    assert "Rejected:" in lines
    best = "helix fold=1 block spread head interlocked W"
    assert any(line.startswith(f"The best pipeline, {best}, is predicted to be 1.") for line in lines)
    assert lines[-2] == f"Fastest that runs: {best}. Use:"
    assert lines[-1].split()[:2] == ["--pipeline-schedule", "helix"]


@pytest.mark.parametrize("schedule", ["sliced-helix", "seq1f1b"])
def test_costs_says_where_slices_end(capsys, tmp_path, schedule):
    """The costs are those of the plan that is written, whose slices are whole tiles."""
    plan, cut, costs, again = (tmp_path / name for name in ("plan", "cut", "costs", "again"))
    run(
        capsys, "plan", "--schedule", schedule, "--num-layers", 32, "--pipeline-model-parallel-size", 2,
        "--num-microbatches", 1, "--output", plan,
    )  # fmt: skip
    words = ("costs", *MODEL, *CLUSTER)
    output = run(capsys, *words, "--plan", plan, "--output", costs, "--plan-output", cut)
    assert output == f"Wrote {costs} and {cut}\n"
    ends = slice_ends(Plan.from_json(cut.read_text()))
    assert ends[-1] == 131072
    assert not any(end % 128 for end in ends)
    run(capsys, *words, "--plan", cut, "--output", again)
    assert again.read_text() == costs.read_text()


def test_only_slices_have_ends(capsys, tmp_path):
    plan = tmp_path / "plan.json"
    run(
        capsys, "plan", "--schedule", "1f1b", "--num-layers", 32, "--pipeline-model-parallel-size", 2,
        "--num-microbatches", 1, "--output", plan,
    )  # fmt: skip
    words = (
        "costs",
        *MODEL,
        *CLUSTER,
        "--plan",
        plan,
        "--output",
        tmp_path / "c",
        "--plan-output",
        tmp_path / "p",
    )
    assert "--plan-output is for plans of slices, not of 1f1b; leave it out" in fails(capsys, *words)


def test_advise_takes_a_kernel_and_fp8(capsys, tmp_path):
    """Slower attention takes longer, fp8 takes less time and is not said to run."""
    model = ["--model", "llama-7b", "--hardware", "h100", "--seq-length", "131072"]
    sizes = ["--pipeline-model-parallel-size", "2", "--num-microbatches", "4"]

    def fastest(*options):
        output = run(capsys, "costs", *model, *CLUSTER, *options, "--plan", plan, "--output", costs)
        assert output == f"Wrote {costs}\n"
        return parse_costs(costs.read_text(), Plan.from_json(plan.read_text())).segments["stage0"].forward

    plan, costs = tmp_path / "plan.json", tmp_path / "costs.json"
    run(capsys, "plan", "--schedule", "1f1b", "--num-layers", "32", *sizes, "--output", plan)
    assert fastest("--attention-backend", "flash-attn-2") > 1.3 * fastest()
    assert fastest("--fp8") < fastest()
    output = run(capsys, "advise", *model, *CLUSTER, *sizes, "--fp8")
    rows = [line for line in output.splitlines() if line[:1].isdigit() and "candidates" not in line]
    assert rows
    assert not any(row.endswith("yes") for row in rows)
    assert "no: fp8" in output
    assert "None of these can be executed by pretrain_gpt.py." in output


def test_advise_says_when_context_parallelism_wins(capsys):
    """Fewer micro batches than ranks: no pipeline is ever full."""
    sizes = ["--pipeline-model-parallel-size", "8", "--num-microbatches", "4"]
    output = run(capsys, "advise", *MODEL, *CLUSTER, *sizes)
    assert "Context parallelism (context-parallel ring) over the same GPUs is predicted to be " in output


def test_advise_on_a_profile(capsys, profile_file):
    arguments = ["--hardware", profile_file, "--memory-limit-gib", 60]
    arguments += ["--pipeline-model-parallel-size", "4", "--num-microbatches", "8"]
    output = run(capsys, "advise", *arguments)
    assert output.startswith("gpt-1.3b, 8192 tokens, 8 GPUs = tensor 2 x pipeline 4")
    # A profile holds for one micro batch size and knows no peak.
    assert "  ?  " in output
    assert "context" not in output


def test_advise_when_nothing_fits(capsys):
    output = run(capsys, "advise", *MODEL, *CLUSTER, *SIZES, "--memory-limit-gib", 2)
    assert "Nothing fits. Use more ranks" in output


def test_costs_are_for_the_plan(capsys, tmp_path):
    plan, costs = tmp_path / "plan.json", tmp_path / "costs.json"
    options = ["--num-layers", "32", *SIZES, "--output", plan]
    for schedule in ("1f1b", "helix", "seq1f1b", "zb-v"):
        run(capsys, "plan", "--schedule", schedule, *options)
        run(capsys, "costs", *MODEL, *CLUSTER, "--plan", plan, "--recompute", "full", "--output", costs)
        found = parse_costs(costs.read_text(), Plan.from_json(plan.read_text()))
        assert all(cost.recompute > 0 for cost in found.segments.values())
        result = json.loads(run(capsys, "simulate", "--plan", plan, "--costs", costs))
        assert result["iteration_ms"] > result["makespan_ms"] > 0
        assert all(peak > 2**30 for peak in result["peak_bytes"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hardware", "h20", *SIZES], "--model is missing; only a profile in --hardware"),
        (["--model", "llama-7b", "--hardware", "h20", *SIZES], "--seq-length is missing"),
        (["--model", "llama", *MODEL[2:], *SIZES], "unknown model 'llama'"),
        ([*MODEL[:2], "--hardware", "h2", *MODEL[4:], *SIZES], "unknown hardware 'h2'; did you mean h20?"),
        (
            [*MODEL, *SIZES, "--memory-limit-gib", "0"],
            "--memory-limit-gib: must be above 0 and at most",
        ),
        (
            [*MODEL, *SIZES[:2], "--num-microbatches", "0"],
            "--num-microbatches: must be at least 1, not 0",
        ),
        (
            [*MODEL, *SIZES, "--tensor-model-parallel-size", "3"],
            "cannot be split over tensor-parallel size 3",
        ),
        (
            ["--model", "llama-7b", "--hardware", "a100", "--seq-length", "4096", *SIZES, "--fp8"],
            "a100 has no fp8 matrix products; leave --fp8 out",
        ),
        (
            [*MODEL[:2], "--hardware", "b200", *MODEL[4:], *SIZES, "--attention-backend", "flash-attn-3"],
            "no rate of attention backend flash-attn-3 on b200 is known; choose one of cudnn, te-cudnn, ",
        ),
        ([*MODEL, *SIZES, "--attention-backend", "flash"], "--attention-backend"),
        ([*MODEL, *SIZES, "--micro-batch-size", "0"], "--micro-batch-size: must be at least 1, not 0"),
    ],
)
def test_wrong_input_of_advise(capsys, arguments, message):
    assert message in fails(capsys, "advise", *arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seq-length", "4096"], "was measured with --seq-length 8192, not 4096; profile again"),
        (["--tensor-model-parallel-size", "4"], "was measured with --tensor-model-parallel-size 2, not 4"),
        (["--model", "gpt-1.3b"], "--model is part of the profile"),
        (["--use-distributed-optimizer"], "--use-distributed-optimizer is part of the profile"),
        (["--attention-backend", "cudnn"], "--attention-backend is part of the profile"),
        (["--fp8"], "--fp8 is part of the profile"),
        ([], "a profile does not know how much memory there is; add --memory-limit-gib"),
    ],
)
def test_a_profile_answers_only_what_was_measured(capsys, profile_file, arguments, message):
    sizes = ["--pipeline-model-parallel-size", "4", "--num-microbatches", "8"]
    assert message in fails(capsys, "advise", "--hardware", profile_file, *sizes, *arguments)


def test_costs_of_another_model_are_refused(capsys, tmp_path):
    plan = tmp_path / "plan.json"
    run(capsys, "plan", "--schedule", "1f1b", "--num-layers", "16", *SIZES, "--output", plan)
    error = fails(capsys, "costs", *MODEL, "--plan", plan, "--output", tmp_path / "costs.json")
    assert "the plan has 16 layers, llama-7b has 32; plan with --num-layers 32" in error
