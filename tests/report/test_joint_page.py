"""The page of a joint search: everything that was simulated, the frontier, the best of each family."""

import re
from dataclasses import replace

import pytest

from helixpipe.__main__ import main
from helixpipe.plan.advise.joint import search
from helixpipe.plan.cost_model import HARDWARE, MODELS, Workload
from helixpipe.report.joint_page import frontier, frontier_section, write_joint_page

MACHINE = replace(HARDWARE["h20"], gpus_per_node=2, nics_per_node=2)


def searched(limit_gib=9.0):
    model = replace(MODELS["gpt-1.3b"], num_layers=2)
    return search(
        MACHINE,
        Workload(model=model, seq_length=8192),
        num_gpus=2,
        global_batch=2,
        memory_limit_gib=limit_gib,
    )


@pytest.fixture(scope="module")
def advice():
    return searched()


def test_everything_that_was_simulated_is_there_without_its_plan(advice):
    assert advice.num_simulated == len(advice.simulated) > len(advice.findings)
    assert all(finding.option.plan is None for finding in advice.simulated)
    fastest = {}
    for finding in advice.simulated:
        key = finding.layout, finding.option.candidate.schedule
        fastest[key] = min(finding.iteration_ms, fastest.get(key, float("inf")))
    assert len(fastest) >= len(advice.findings) > 5


def test_nothing_beats_the_frontier_and_it_beats_all_else(advice):
    edge = frontier(advice.simulated)
    for finding in advice.simulated:
        as_good = [
            f for f in edge if f.peak_bytes <= finding.peak_bytes and f.iteration_ms <= finding.iteration_ms
        ]
        better = [
            f for f in as_good if (f.peak_bytes, f.iteration_ms) != (finding.peak_bytes, finding.iteration_ms)
        ]
        assert as_good
        assert (finding in edge) <= (not better)
    assert [f.peak_bytes for f in edge] == sorted(f.peak_bytes for f in edge)


def test_the_figure_has_a_mark_for_each_that_is_not_far_slower(advice):
    svg = frontier_section(advice)
    slowest_ms = 1.6 * advice.findings[0].iteration_ms
    shown = sum(finding.iteration_ms <= slowest_ms for finding in advice.simulated)
    assert f"{shown} that were simulated" in svg
    families = {finding.family for finding in advice.best_of_families}
    counted = dict(re.findall(r"<!-- (.+?) \((\d+)\) -->", svg))
    assert families <= set(counted)
    assert sum(map(int, counted.values())) == shown


def test_the_page_compares_the_best_of_each_family(advice, tmp_path):
    path = tmp_path / "page.html"
    write_joint_page(advice, MACHINE, path, title="a <search>")
    html = path.read_text(encoding="utf-8")
    assert "a &lt;search&gt;" in html
    assert html.count('<canvas class="bars"') == len(advice.best_of_families) >= 3
    for number, finding in enumerate(advice.best_of_families, 1):
        assert f"{number}. {finding.family}" in html
    write_joint_page(advice, MACHINE, tmp_path / "again.html", title="a <search>")
    assert (tmp_path / "again.html").read_text(encoding="utf-8") == html


def test_nothing_to_show_is_said(tmp_path):
    with pytest.raises(ValueError, match="--page has nothing to show: no candidate fits"):
        write_joint_page(searched(limit_gib=0.2), MACHINE, tmp_path / "page.html", title="none")


def test_the_command_writes_the_page(tmp_path, capsys):
    path = tmp_path / "layouts.html"
    words = "advise --model gpt-1.3b --hardware h100 --gpus 2 --global-batch-size 2 --seq-length 2048 --page"
    assert main([*words.split(), str(path)]) == 0
    assert f"Wrote {path}" in capsys.readouterr().out
    assert "gpt-1.3b, 2048 tokens, 2 GPUs" in path.read_text(encoding="utf-8")
