"""Global batches with their plans: shared out over replicas, resumed exactly, each planned ahead."""

import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from planning import make_job

from helixpipe.data.prefix import DatasetInfo, dataset_paths
from helixpipe.data.samples import ShuffledOrder
from helixpipe.elastic.search.quick_plan import plan_quickly
from helixpipe.elastic.service.background import PlannedBatch
from helixpipe.reliability.exit_codes import DataError
from helixpipe.runtime.shared_planner import SharedPlanner
from megatron.pretrain.data.elastic_batches import ElasticBatches, EvaluationBatches
from megatron.pretrain.data.variable_length import VariableLengthDataset

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


def hash_of_tokens(iterator, count):
    found = hashlib.sha256()
    for _ in range(count):
        for ids in next(iterator).sequences:
            found.update(ids.numpy().tobytes())
    return found.hexdigest()


def test_a_resumed_job_sees_the_same_tokens(dataset):
    iterator, _ = batches(dataset)
    for _ in range(2):
        next(iterator)
    state = json.loads(json.dumps(iterator.state_dict()))
    wanted = hash_of_tokens(iterator, 4)
    assert hash_of_tokens(batches(dataset, state=state)[0], 4) == wanted
    later = {**state, "consumed_samples": state["consumed_samples"] + 1}
    assert hash_of_tokens(batches(dataset, state=later)[0], 4) != wanted


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("seed", "--seed 99, this job has --seed 3"),
        ("max_seq_length", "--max-seq-length 99, this job has --max-seq-length 800"),
        ("num_samples", "99 samples in the training data, this job has 13 samples"),
        ("documents", "training documents of hash 99, this job has training documents of hash "),
    ],
)
def test_a_state_of_other_data_is_refused(dataset, name, words):
    state = batches(dataset)[0].state_dict()
    with pytest.raises(DataError, match=f"was made with {words}") as caught:
        batches(dataset, state={**state, name: 99})
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match=f"has no {name}"):
        batches(dataset, state={key: value for key, value in state.items() if key != name})


def test_data_is_told_apart_by_its_documents(dataset):
    assert dataset.fingerprint == VariableLengthDataset(dataset.info, 800).fingerprint
    others = [
        VariableLengthDataset(dataset.info, 700),
        VariableLengthDataset(dataset.info, 800, range(12)),
        VariableLengthDataset(replace(dataset.info, vocab_size=10_000), 800),
    ]
    assert len({dataset.fingerprint, *(other.fingerprint for other in others)}) == 4


def evaluated(dataset, **options):
    return EvaluationBatches(dataset, make_job(40), global_batch_size=BATCH, seed=3, **options)


def test_evaluations_take_every_sample_once(dataset):
    iterator = evaluated(dataset)
    steps = [next(iterator) for _ in range(3)]
    for step in steps:
        step.recipe.check([len(ids) - 1 for ids in step.sequences])
        assert (step.loss_masks is not None) == dataset.info.has_prompts
    lengths = sorted(len(ids) - 1 for step in steps[:2] for ids in step.sequences)
    # Two batches are one epoch but for one sample.
    missing = set(range(len(LENGTHS))) - set(ShuffledOrder(len(LENGTHS), 3).samples(0, 2 * BATCH))
    assert lengths == sorted(min(LENGTHS[i], 800) for i in range(len(LENGTHS)) if i not in missing)


@pytest.mark.parametrize("num_replicas", [2, BATCH])
def test_replicas_share_an_evaluation(dataset, num_replicas):
    whole = evaluated(dataset, consumed_samples=BATCH)
    replicas = [
        evaluated(dataset, consumed_samples=BATCH, replica=r, num_replicas=num_replicas)
        for r in range(num_replicas)
    ]
    for _ in range(3):
        wanted = sorted(ids.tolist() for ids in next(whole).sequences)
        assert sorted(ids.tolist() for replica in replicas for ids in next(replica).sequences) == wanted


def test_every_replica_needs_a_sequence(dataset):
    with pytest.raises(ValueError, match="--global-batch-size 2 is less than the data-parallel size 3"):
        batches(dataset, global_batch_size=2, num_replicas=3)
