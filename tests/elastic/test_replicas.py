"""Sharing out over replicas, and that planning needs neither torch nor Megatron."""

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helixpipe.elastic import ElasticJob, ideal_costs, plan_batch, share_out
from helixpipe.elastic.sample import skewed_lengths

COSTS = ideal_costs()


def work_ms(lengths, sequences):
    return sum(COSTS.layer_ms(lengths[i] ** 2, lengths[i]) for i in sequences)


@given(st.lists(st.integers(1, 50000), min_size=1, max_size=40), st.integers(1, 8))
@settings(deadline=None)
def test_every_sequence_has_one_replica_and_none_is_idle(lengths, num_replicas):
    num_replicas = min(num_replicas, len(lengths))
    shares = share_out(lengths, COSTS, num_replicas)
    assert sorted(i for share in shares for i in share) == list(range(len(lengths)))
    works = [work_ms(lengths, share) for share in shares]
    least = max(sum(works) / num_replicas, max(work_ms(lengths, [i]) for i in range(len(lengths))))
    assert all(shares)
    assert max(works) <= least * 2


def test_a_skewed_batch_is_balanced():
    lengths = skewed_lengths()
    shares = share_out(lengths, COSTS, 4)
    works = [work_ms(lengths, share) for share in shares]
    assert max(works) <= 1.01 * sum(works) / 4
    job = ElasticJob(costs=COSTS, num_stages=4, num_layers=8, memory_limit_bytes=2**50)
    times = [plan_batch([lengths[i] for i in share], job).prediction.time_ms for share in shares]
    assert max(times) <= 1.1 * min(times)


def test_too_few_sequences():
    with pytest.raises(ValueError, match="3 sequences cannot be shared out over 4"):
        share_out([1, 2, 3], COSTS, 4)


def test_planning_imports_neither_torch_nor_megatron():
    code = "import sys, helixpipe.elastic; sys.exit(bool({'torch', 'megatron', 'rich'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
