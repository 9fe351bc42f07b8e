"""Megatron's options in training runs: each does what it does there."""

from __future__ import annotations

import re

import pytest
from ranks import run_on_ranks
from training_worker import Fault, run_cases, small_model

LINE = re.compile(r"iteration +(\d+)/.*learning rate: (\S+) .*lm loss: (\S+) .*grad norm: (\S+)")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def outcomes(folder):
    """What each command line came to, by its name."""
    cases = {
        "plain": "",
        "interval": f"--exit-interval 2 --save {folder}/a --use-mcore-models --distributed-backend nccl",
        "resumed": f"--exit-interval 2 --save {folder}/a --load {folder}/a",
        "minutes": f"--exit-duration-in-mins 1e-6 --save {folder}/b",
        "samples": "--train-samples 14",
        "decoupled": "--decoupled-lr 9e-3",
    }
    iterations, common = "--train-iters 3", small_model(folder)
    lines = [line if "--train-samples" in line else f"{iterations} {line}" for line in cases.values()]
    common = common.replace(iterations, "")
    found = run_on_ranks(1, run_cases, [(line, Fault()) for line in lines], 1, 1, common)[0]
    return dict(zip(cases, found, strict=True))


def iterations(outcome):
    """Learning rate, loss and norm by iteration."""
    found = [LINE.search(line) for line in outcome["lines"]]
    return {int(match[1]): tuple(map(float, match.groups()[1:])) for match in found if match}


def test_every_run_ends_well(outcomes):
    assert {name: (o["code"], o["error"]) for name, o in outcomes.items()} == dict.fromkeys(outcomes, (0, ""))


def test_an_interval_ends_a_job_with_a_checkpoint(outcomes, folder):
    assert list(iterations(outcomes["interval"])) == [1, 2]
    assert any(line.startswith("stopped by --exit-interval 2 after iteration 2: the same command with --load")
               for line in outcomes["interval"]["lines"])  # fmt: skip
    assert iterations(outcomes["resumed"]) == {3: iterations(outcomes["plain"])[3]}


def test_minutes_end_a_job(outcomes, folder):
    assert list(iterations(outcomes["minutes"])) == [1]
    assert (folder / "b" / "latest_checkpointed_iteration.txt").read_text().strip() == "1"


def test_flags_that_change_nothing_are_listed(outcomes):
    note = "accepted, but change nothing here: --use-mcore-models, --distributed-backend"
    assert note in outcomes["interval"]["lines"]
    assert not any(line.startswith("accepted") for line in outcomes["plain"]["lines"])


def test_samples_are_whole_batches(outcomes):
    """14 samples are 3 batches of 4; the rate decays over all 14."""
    found, plain = iterations(outcomes["samples"]), iterations(outcomes["plain"])
    assert list(found) == [1, 2, 3]
    assert found[3][0] == pytest.approx(3e-3 * (1 - 8 / 14), rel=1e-6)
    assert plain[3][0] == pytest.approx(3e-3 * (1 - 8 / 12), rel=1e-6)


def test_the_embedding_has_a_rate_of_its_own(outcomes):
    found, plain = iterations(outcomes["decoupled"]), iterations(outcomes["plain"])
    assert [row[0] for row in found.values()] == [row[0] for row in plain.values()]
    assert found[1][1:] == plain[1][1:]
    assert found[2][1] != plain[2][1]
