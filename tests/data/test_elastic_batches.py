"""Global batches with their plans: shared out over replicas, resumed exactly, each planned ahead."""

import numpy as np
import pytest
import torch
from planning import make_job

from helixpipe.elastic.background import PlannedBatch
from helixpipe.elastic.quick_plan import plan_quickly
from helixpipe.runtime.shared_planner import SharedPlanner
from megatron.training.data.elastic import ElasticBatches
from megatron.training.data.prefix import DatasetInfo, dataset_paths
from megatron.training.data.variable_length import VariableLengthDataset

LENGTHS = (50, 3, 700, 20, 90, 5, 5, 300, 41, 2, 2, 64, 1000)
BATCH = 6


class Here:
    """A planner in this process that writes down what it is asked for."""

    def __init__(self, job):
        self.job, self.asked, self.is_closed = job, [], False

    def submit(self, lengths):
        self.asked.append(tuple(lengths))

    def result(self):
        return PlannedBatch(plan_quickly(self.asked[-1], self.job, 2), 0.0, 0.0)

    def close(self):
        self.is_closed = True


@pytest.fixture(scope="module", params=[False, True], ids=["text", "prompts"])
def dataset(request, tmp_path_factory):
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefix = tmp_path_factory.mktemp("batches") / "set"
    paths = dataset_paths(prefix)
    builder = IndexedDatasetBuilder(paths.bin, dtype=np.uint16, multimodal=request.param)
    ids = torch.arange(1, sum(LENGTHS) + len(LENGTHS) + 1)
    for part in ids.split([length + 1 for length in LENGTHS]):
        builder.add_document(part, [2, len(part) - 2], [1, 0] if request.param else None)
    builder.finalize(paths.idx)
    info = DatasetInfo(str(prefix), len(ids) + 1, 0, len(LENGTHS), len(ids), max(LENGTHS), request.param)
    return VariableLengthDataset(info, 800)


def batches(dataset, **options):
    planners = []

    def make(job):
        planners.append(Here(job))
        return planners[0]

    options = {"global_batch_size": BATCH, "seed": 3, **options}
    return ElasticBatches(dataset, SharedPlanner(make, make_job(40), None), **options), planners[0]


def test_every_sequence_is_that_of_its_plan_and_the_next_batch_is_planned_already(dataset):
    iterator, planner = batches(dataset)
    assert len(planner.asked) == 1, "the first batch is planned while the model is built"
    for number in range(1, 5):
        step = next(iterator)
        assert len(planner.asked) == number + 1
        recipe = step.planned.plan.recipe
        recipe.check([len(ids) - 1 for ids in step.sequences])
        assert planner.asked[number - 1] == tuple(len(ids) - 1 for ids in step.sequences)
        for sample, ids in zip(step.samples, step.sequences, strict=True):
            assert ids.dtype == torch.int64
            assert torch.equal(ids, dataset[sample].ids)
            assert torch.equal(ids, torch.arange(ids[0], ids[0] + len(ids))), "of one document"
        if dataset.info.has_prompts:
            assert [mask.tolist() for mask in step.loss_masks] == [
                [False] + [True] * (len(ids) - 2) for ids in step.sequences
            ]
        else:
            assert step.loss_masks is None
    iterator.close()
    assert planner.is_closed


@pytest.mark.parametrize("num_replicas", [1, 2, 3, BATCH])
def test_replicas_share_one_global_batch(dataset, num_replicas):
    whole, _ = batches(dataset)
    replicas = [batches(dataset, replica=r, num_replicas=num_replicas)[0] for r in range(num_replicas)]
    for _ in range(4):
        wanted = sorted(next(whole).samples)
        shares = [next(replica).samples for replica in replicas]
        assert sorted(sample for share in shares for sample in share) == wanted
        assert all(shares)


def test_an_epoch_skips_and_repeats_nothing(dataset):
    iterator, _ = batches(dataset, global_batch_size=len(LENGTHS))
    orders = [next(iterator).samples for _ in range(2)]
    assert [sorted(order) for order in orders] == [list(range(len(LENGTHS)))] * 2
    assert orders[0] != orders[1]


@pytest.mark.parametrize("taken", [0, 1, 3])
def test_a_resumed_job_goes_on_with_the_next_batch(dataset, taken):
    iterator, _ = batches(dataset)
    for _ in range(taken):
        next(iterator)
    state = iterator.state_dict()
    assert state["consumed_samples"] == taken * BATCH, "what is planned ahead is not consumed"
    resumed, _ = batches(dataset, state=state)
    other_layout, _ = batches(dataset, state=state, replica=1, num_replicas=2)
    for _ in range(3):
        wanted = next(iterator)
        assert next(resumed).samples == wanted.samples
        assert set(next(other_layout).samples) < set(wanted.samples)


def test_a_state_of_other_data_is_refused(dataset):
    state = batches(dataset)[0].state_dict()
    for name in ("seed", "num_samples", "max_seq_length"):
        with pytest.raises(ValueError, match=f"was made with {name} 99, this job has {state[name]}"):
            batches(dataset, state={**state, name: 99})
    with pytest.raises(ValueError, match="has no consumed_samples"):
        batches(dataset, state={})


def test_every_replica_needs_a_sequence(dataset):
    with pytest.raises(ValueError, match="--global-batch-size 2 is less than the data-parallel size 3"):
        batches(dataset, global_batch_size=2, num_replicas=3)
