"""Megatron-LM's own training program, from the wheels that ship it: stock 1F1B beside schedules of ours.

Both schedules start from one checkpoint, for Megatron draws new weights rank by rank.
"""

from __future__ import annotations

import re

import pytest
from megatron_lm_jobs import (
    HELIX,
    LOSS,
    OTHERS,
    TWO_CHUNKS,
    assert_equal,
    each_version,
    launch,
    train,
    unpacked,
)
from unpack_cores import VERSIONS


@pytest.mark.parametrize(
    "version",
    [
        *(pytest.param(version, marks=[unpacked(version), pytest.mark.slow]) for version in VERSIONS[:-1]),
        pytest.param(VERSIONS[-1], marks=unpacked(VERSIONS[-1])),
    ],
)
def test_helix_trains_and_evaluates_as_1f1b_does(tmp_path, version):
    """From one checkpoint, two iterations and an evaluation."""
    size = "--pipeline-model-parallel-size 2"
    saved = train(version, 2, f"{size} --train-iters 1 --eval-iters 0 --save {tmp_path}")
    stock = train(version, 2, f"{size} --train-iters 3 --load {tmp_path}")
    helix = train(version, 2, f"{size} --train-iters 3 --load {tmp_path} {HELIX}")
    assert set(saved.steps) == {1}
    assert_equal(helix, stock, range(2, 4))
    assert helix.evaluations == pytest.approx(stock.evaluations, abs=LOSS)
    assert set(helix.evaluations) == {(3, "validation"), (3, "test")}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("version", "ranks"), each_version(2, 4))
def test_ten_iterations_are_those_of_1f1b_and_runs_change_over(tmp_path, version, ranks):
    compare_and_change_over(version, ranks, tmp_path, "", (HELIX, *OTHERS))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("version", "ranks"), each_version(2, 4))
def test_two_chunks_on_each_rank_train_as_1f1b_does(tmp_path, version, ranks):
    size = f"--num-layers {2 * ranks} --untie-embeddings-and-output-weights"
    compare_and_change_over(version, ranks, tmp_path, size, TWO_CHUNKS)


def compare_and_change_over(version, ranks, folder, model, schedules):
    """Ten iterations and an evaluation from one checkpoint; what each saves goes on under the other."""
    size = f"{model} --pipeline-model-parallel-size {ranks}"
    train(version, ranks, f"{size} --train-iters 2 --eval-iters 0 --save {folder}/start")
    stock = train(version, ranks, f"{size} --train-iters 15 --load {folder}/start")
    for number, schedule in enumerate(schedules):
        here = f"{folder}/{number}"
        ours = train(
            version, ranks, f"{size} --train-iters 12 --load {folder}/start --save {here} {schedule}"
        )
        assert_equal(ours, stock, range(3, 13))
        assert ours.evaluations[12, ""] == pytest.approx(stock.evaluations[12, ""], abs=LOSS)
        back = train(version, ranks, f"{size} --train-iters 15 --load {here}")
        # The second step after a load is printed as the mean of both.
        assert_equal(back, stock, (13, 15))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "layout",
    [
        "--pipeline-model-parallel-size 2 --tensor-model-parallel-size 2 --calculate-per-token-loss",
        # Megatron itself cannot load the states of torch's Adam into shards: only Apex and Transformer Engine
        # count steps once for all parameters.
        "--pipeline-model-parallel-size 2 --use-distributed-optimizer --overlap-grad-reduce "
        "--overlap-param-gather --no-load-optim",
    ],
    ids=["tensor", "data"],
)
@pytest.mark.parametrize(("version", "ranks"), each_version(4))
def test_other_parallelism_of_theirs_goes_with_it(tmp_path, version, ranks, layout):
    train(version, ranks, f"{layout} --train-iters 2 --eval-iters 0 --save {tmp_path}")
    stock = train(version, ranks, f"{layout} --train-iters 6 --load {tmp_path}")
    for schedule in (HELIX, OTHERS[0]):
        ours = train(version, ranks, f"{layout} --train-iters 6 --load {tmp_path} {schedule}")
        assert_equal(ours, stock, range(3, 7))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("version", "ranks"), each_version(2))
def test_a_job_ends_when_its_time_is_over(tmp_path, version, ranks):
    # Over before it begins; Megatron takes 0 for no limit.
    size = "--pipeline-model-parallel-size 2 --train-iters 5 --exit-duration-in-mins -1"
    log = train(version, ranks, f"{size} --save {tmp_path} {HELIX}")
    assert set(log.steps) == {1}
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text().strip() == "1"


@pytest.mark.slow
@pytest.mark.parametrize(("version", "ranks"), each_version(2))
def test_without_the_option_everything_is_as_without_us(version, ranks):
    size = "--pipeline-model-parallel-size 2 --train-iters 4"
    alone = train(version, ranks, size, with_us=False)
    beside = train(version, ranks, size, with_us=True)
    assert (beside.steps, beside.evaluations) == (alone.steps, alone.evaluations)


@pytest.mark.slow
@pytest.mark.parametrize("option", ["--use-rope-scaling", "--use-mup"])
@pytest.mark.parametrize(("version", "ranks"), each_version(2))
def test_an_option_that_segments_do_not_know_stops_every_rank_with_one_line(version, ranks, option):
    code, output = launch(
        version,
        ranks,
        f"--pipeline-model-parallel-size 2 --train-iters 2 --position-embedding-type rope {option} {HELIX}",
    )
    assert code != 0
    lines = [line for line in output.splitlines() if "helixpipe.megatron_lm: rank" in line]
    assert {re.search(r"rank (\d)", line).group(1) for line in lines} <= {"0", "1"}
    assert lines
    assert all("does not know" in line for line in lines)
