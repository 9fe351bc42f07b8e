"""Each rank reads the samples that its share of the plan needs, and no others."""

import pytest
from plan_worker import train_and_watch
from ranks import run_on_ranks
from training_worker import small_model

from megatron.pretrain.data.gpt import OwnMicroBatches
from megatron.pretrain.health.guards import KeptBatches

# 3 iterations of 4 micro batches of one sample.
SPREAD = (
    "--pipeline-schedule helix --head-placement spread --num-fold 1 --untie-embeddings-and-output-weights"
)
RUNS = {
    "1f1b": "--pipeline-schedule 1f1b --untie-embeddings-and-output-weights",
    "spread": SPREAD,
    "first": SPREAD.replace("spread", "first"),
}


def test_with_a_spread_head_a_rank_reads_what_it_has_losses_of(tmp_path):
    first, second = run_on_ranks(2, train_and_watch, tmp_path, small_model(tmp_path), RUNS)
    assert [rank[name]["error"] for rank in (first, second) for name in RUNS] == [""] * 6
    order = first["1f1b"]["read"]
    assert len(order) == 12
    assert second["1f1b"]["read"] == order, "tokens on the first rank, labels on the last"
    assert first["spread"]["read"] == order, "rank 0 has the embedding"
    # With one micro batch per slot, rank 1 has the losses of every second one.
    assert second["spread"]["read"] == [sample for i, sample in enumerate(order) if i % 2 == 1]
    assert second["first"]["read"] == []
    for name in ("spread", "first"):
        # fp32 sums of the same numbers in another order.
        assert first[name]["losses"] == pytest.approx(first["1f1b"]["losses"], rel=1e-5)


def test_what_is_passed_over_is_passed_over_again():
    """A step that is computed once more takes the same micro batches."""
    kept = KeptBatches(OwnMicroBatches(iter("bdfh"), reads=(1, 3), count=4))
    kept.skip()
    assert next(kept) == "b"
    kept.skip()
    assert next(kept) == "d"
    again = kept.again()
    again.skip()
    assert [next(again), next(again)] == ["b", "d"]
    kept.forget()
    kept.skip()
    assert next(kept) == "f"


def test_reading_and_passing_over_follow_the_plan():
    own = OwnMicroBatches(iter("bd"), reads=(1,), count=2)
    with pytest.raises(AssertionError, match="another rank's"):
        next(own)
    with pytest.raises(AssertionError, match="must be read"):
        own.skip()
