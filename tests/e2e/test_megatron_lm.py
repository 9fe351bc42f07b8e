"""Megatron-LM's own training program, from the wheels that ship it: stock 1F1B beside schedules of ours.

Both schedules start from one checkpoint, for Megatron draws new weights rank by rank.
"""

from __future__ import annotations

import re
from functools import cache

import pytest
from megatron_lm_jobs import (
    HELIX,
    LOSS,
    OTHERS,
    TWO_CHUNKS,
    assert_equal,
    each_version,
    has_tensorboard,
    launch,
    read_scalars,
    scalars_to,
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


@pytest.fixture(scope="module")
def starts(tmp_path_factory):
    """``starts(version, ranks, model)``: a checkpoint, and what 1F1B has printed that went on from it."""

    @cache
    def start(version, ranks, model):
        folder = tmp_path_factory.mktemp("start")
        train(version, ranks, f"{model} --train-iters 2 --eval-iters 0 --save {folder}")
        return folder, train(version, ranks, f"{model} --train-iters 15 --load {folder}")

    return start


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize(
    "schedule",
    [HELIX, *OTHERS],
    ids=("helix", "block", "interlocked", "zb-h1", "sliced-helix", "seq1f1b"),
)
@pytest.mark.parametrize(("version", "ranks"), each_version(2, 4))
def test_ten_iterations_are_those_of_1f1b_and_runs_change_over(starts, tmp_path, version, ranks, schedule):
    compare_and_change_over(starts, version, ranks, tmp_path, "", schedule)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", TWO_CHUNKS)
@pytest.mark.parametrize(("version", "ranks"), each_version(2, 4))
def test_two_chunks_on_each_rank_train_as_1f1b_does(starts, tmp_path, version, ranks, name):
    model = f"--num-layers {2 * ranks} --untie-embeddings-and-output-weights"
    compare_and_change_over(starts, version, ranks, tmp_path, model, f"--pipeline-schedule {name}")


def compare_and_change_over(starts, version, ranks, folder, model, schedule):
    """Ten iterations and an evaluation from one checkpoint; what is saved goes on under 1F1B."""
    size = f"{model} --pipeline-model-parallel-size {ranks}"
    start, stock = starts(version, ranks, size)
    ours = train(version, ranks, f"{size} --train-iters 12 --load {start} --save {folder} {schedule}")
    assert_equal(ours, stock, range(3, 13))
    assert ours.evaluations[12, ""] == pytest.approx(stock.evaluations[12, ""], abs=LOSS)
    back = train(version, ranks, f"{size} --train-iters 15 --load {folder}")
    # The second step after a load is printed as the mean of both.
    assert_equal(back, stock, (13, 15))


@pytest.mark.slow
@pytest.mark.timeout(3600)
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
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("version", "ranks"), each_version(2))
def test_mup_is_megatrons(tmp_path, version, ranks):
    """Its factors of embedding, scores and logits, and its groups of weights with their rates."""
    model = "--untie-embeddings-and-output-weights --use-mup --mup-base-hidden-size 8 --mup-embedding-mult 2"
    size = f"--pipeline-model-parallel-size 2 {model}"
    train(version, ranks, f"{size} --train-iters 2 --eval-iters 0 --save {tmp_path}")
    more = f"{size} --train-iters 6 --load {tmp_path}"
    stock = train(version, ranks, more)
    for schedule in (f"{HELIX} --loss-chunk-size 8", OTHERS[0], OTHERS[4], "--pipeline-schedule zb-h1"):
        ours = train(version, ranks, f"{more} {schedule}")
        assert_equal(ours, stock, range(3, 7))
        assert ours.evaluations == pytest.approx(stock.evaluations, abs=LOSS)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("version", "ranks"), each_version(4))
def test_ranks_that_share_sequences_train_as_those_that_do_not(tmp_path, version, ranks):
    """Megatron's own attention shares them only with Transformer Engine."""
    size = "--pipeline-model-parallel-size 2"
    train(version, 2, f"{size} --train-iters 2 --eval-iters 0 --save {tmp_path}")
    more = f"{size} --train-iters 6 --load {tmp_path}"
    stock = train(version, 2, more)
    shared = train(version, ranks, f"{more} --context-parallel-size 2 {HELIX}")
    assert_equal(shared, stock, range(3, 7))
    assert shared.evaluations == pytest.approx(stock.evaluations, abs=LOSS)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("schedule", [HELIX, "--pipeline-schedule zb-v"])
@unpacked(VERSIONS[0])
def test_what_their_program_does_around_a_step_stays(tmp_path, schedule):
    """Batches that grow, losses per token, the distributed optimizer with overlaps, throughput, scalars.

    Megatron-LM ignores --rampup-batch-size since 0.18.
    """
    size = "--pipeline-model-parallel-size 2 --untie-embeddings-and-output-weights"
    optimizer = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --no-load-optim"
    batches = "--global-batch-size 16 --rampup-batch-size 8 8 32 --calculate-per-token-loss"
    common = f"{size} {optimizer} {batches} --log-throughput --eval-iters 0"
    train(VERSIONS[0], 4, f"{common} --train-samples 16 --save {tmp_path}/start")
    # That was three iterations of 8 samples; now one of 8, and three of 16.
    more = f"{common} --train-samples 80 --load {tmp_path}/start"
    runs = [
        train(VERSIONS[0], 4, f"{more} {words}{scalars_to(tmp_path / name)}")
        for name, words in (("stock", ""), ("ours", schedule))
    ]
    stock, ours = runs
    assert_equal(ours, stock, range(4, 8))
    for log in runs:
        assert re.findall(r"global batch size: +(\d+)", log.output) == ["8", "16", "16", "16"]
        assert len(re.findall(r"throughput per GPU \(TFLOP/s/GPU\): \d", log.output)) == 4
    if has_tensorboard():
        losses, expected = (read_scalars(tmp_path / name, "lm loss") for name in ("ours", "stock"))
        assert set(losses) == set(range(4, 8))
        assert losses == pytest.approx(expected, abs=LOSS)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@unpacked(VERSIONS[-1])
def test_a_rank_that_is_killed_is_named_by_its_operation_and_all_end(tmp_path):
    """Under a limit that would not have ended them before this test's."""
    words = f"--pipeline-model-parallel-size 2 --train-iters 100000 --distributed-timeout-minutes 60 {HELIX}"
    code, output = launch(VERSIONS[-1], 2, words, kill_rank=(1, "iteration        3/"))
    assert code != 0
    (line,) = [line for line in output.splitlines() if "was lost" in line and "this rank" not in line]
    assert re.search(r"rank 1 .*was lost \(killed, crashed or cut off\): .*step", line)
    assert re.search(r"helixpipe.megatron_lm: rank 0: error: .*rank 1", output)


@pytest.mark.slow
@pytest.mark.timeout(1200)
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
@pytest.mark.parametrize(("version", "ranks"), each_version(2))
def test_an_option_that_segments_do_not_know_stops_every_rank_with_one_line(version, ranks):
    code, output = launch(
        version,
        ranks,
        f"--pipeline-model-parallel-size 2 --train-iters 2 "
        f"--apply-residual-connection-post-layernorm {HELIX}",
    )
    assert code != 0
    lines = [line for line in output.splitlines() if "helixpipe.megatron_lm: rank" in line]
    assert {re.search(r"rank (\d)", line).group(1) for line in lines} <= {"0", "1"}
    assert lines
    assert all("does not know" in line for line in lines)
