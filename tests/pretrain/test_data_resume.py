"""The data that follows a checkpoint: the same tokens under every layout and schedule, on real files."""

from __future__ import annotations

import hashlib
import pickle
import random
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from megatron.core import parallel_state
from training_worker import small_model

from helixpipe.data.prefix import inspect_prefix
from helixpipe.elastic import ideal_costs
from helixpipe.elastic.service.background import PlannedBatch
from helixpipe.reliability.exit_codes import DataError
from megatron.pretrain.data.elastic_batches import ElasticBatches
from megatron.pretrain.data.gpt import build_iterators
from megatron.pretrain.data.variable_length import VariableLengthDataset
from megatron.pretrain.settings.arguments import parse_arguments

BATCHES, ITERATIONS, BATCH = 50, 80, 8
# schedule, pipeline-parallel size, data-parallel size, micro batch size
LAYOUTS = [
    ("1f1b", 4, 1, 1),
    ("1f1b", 2, 2, 1),
    ("helix", 2, 4, 1),
    ("interleaved", 2, 2, 2),
    ("zb-v", 4, 2, 2),
    ("helix", 1, 8, 1),
]


@pytest.fixture(scope="module")
def common(tmp_path_factory):
    """Arguments that pack documents into samples."""
    return f"{small_model(tmp_path_factory.mktemp('corpus'))} --eod-mask-loss --num-layers 8"


@pytest.fixture
def stand_on(monkeypatch):
    """``stand_on(pipeline rank, of, data-parallel rank, of)``: what Megatron's groups say in this process."""

    def stand(stage, stages, replica, replicas):
        for name, value in {
            "get_pipeline_model_parallel_rank": stage,
            "get_pipeline_model_parallel_world_size": stages,
            "get_data_parallel_rank": replica,
            "get_data_parallel_world_size": replicas,
        }.items():
            monkeypatch.setattr(parallel_state, name, lambda *_, value=value, **__: value)
        monkeypatch.setenv("WORLD_SIZE", str(stages * replicas))

    return stand


def digest(*tensors):
    """Of types, shapes and contents."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode() + tensor.numpy().tobytes())
    return found.hexdigest()


def packed_batches(common, stand_on, layout, consumed):
    """By stage that reads data: for every iteration the digests of all replicas' samples, sorted."""
    schedule, stages, replicas, micro_batch = layout
    options = f"--pipeline-schedule {schedule} --pipeline-model-parallel-size {stages}"
    options += f" --micro-batch-size {micro_batch} --global-batch-size {BATCH} --train-iters {ITERATIONS}"
    if schedule == "interleaved":
        options += " --num-layers-per-virtual-pipeline-stage 2"
    if schedule == "zb-v":
        options += " --untie-embeddings-and-output-weights"
    if schedule == "helix":
        options += " --num-fold 1"
    found = {}
    for stage in range(stages):
        batches = [[] for _ in range(BATCHES)]
        for replica in range(replicas):
            stand_on(stage, stages, replica, replicas)
            settings = parse_arguments(f"{common} {options}".split())
            data, _ = build_iterators(settings, consumed)
            if data is None:
                continue
            for batch in batches:
                for _ in range(settings.training.num_microbatches):
                    samples = next(data)
                    assert set(samples) == {"tokens", "labels", "loss_mask", "position_ids"}
                    assert len(samples["tokens"]) == micro_batch
                    batch += [
                        digest(*values) for values in zip(*map(samples.get, sorted(samples)), strict=True)
                    ]
        if any(batches):
            found[stage] = [sorted(batch) for batch in batches]
    return found


@pytest.fixture(scope="module")
def position():
    """Where the job was interrupted, in samples."""
    return BATCH * random.Random(3).randrange(5, ITERATIONS - BATCHES)


def test_packed_batches_are_the_same_under_any_layout(common, stand_on, position):
    whole = packed_batches(common, stand_on, ("1f1b", 1, 1, 1), 0)[0]
    (wanted,) = packed_batches(common, stand_on, ("1f1b", 1, 1, 1), position).values()
    assert whole[position // BATCH :] == wanted[: BATCHES - position // BATCH]
    assert all(len(set(batch)) == BATCH for batch in wanted)
    for layout in LAYOUTS:
        found = packed_batches(common, stand_on, layout, position)
        # Tokens on the first stage, labels on the one with the loss.
        assert len(found) == (2 if layout[0] in ("1f1b", "interleaved") else 1), layout
        assert all(batches == wanted for batches in found.values()), layout


def test_a_longer_job_sees_the_same_samples_and_each_once_per_epoch(common, stand_on):
    """Whatever --train-iters is, and wherever the job was resumed."""
    stand_on(0, 1, 0, 1)

    def take(iterations, position, count):
        options = f"--train-iters {iterations} --num-layers 4 --split 1,0,0 --seq-length 256"
        data, _ = build_iterators(parse_arguments(f"{common} {options}".split()), position)
        return [digest(*(batch[name] for name in sorted(batch))) for batch in islice(data, count)]

    few = take(3, 0, 1000)
    epoch = len(set(few))
    first = few[:epoch]
    assert 50 < epoch < 400
    assert len(set(first)) == epoch
    # Every epoch has all samples, in another order.
    assert sorted(few[epoch : 2 * epoch]) == sorted(first)
    assert few[epoch : 2 * epoch] != first
    for iterations, position in ((3, 17), (7, epoch - 3), (10_000, 0), (10_000, epoch + 5)):
        assert take(iterations, position, epoch) == few[position : position + epoch]


class Unplanned:
    """In the place of the planner: batches without plans."""

    job = SimpleNamespace(costs=ideal_costs())

    def submit(self, lengths):
        pass

    def result(self):
        return PlannedBatch(None, 0.0, 0.0)


def documents(dataset, replicas, state):
    """For every iteration the digests of all replicas' sequences, sorted; and the state after the last."""
    readers = [
        ElasticBatches(
            dataset, Unplanned(), global_batch_size=BATCH, seed=5, replica=replica, num_replicas=replicas,
            state=state,
        )
        for replica in range(replicas)
    ]  # fmt: skip
    return readers, lambda: sorted(digest(ids) for reader in readers for ids in next(reader).sequences)


@pytest.mark.parametrize("replicas", [1, 2, 4, 8])
def test_batches_of_documents_are_the_same_for_any_number_of_replicas(common, replicas, position):
    prefix = common.split("--data-path ")[1].split()[0]
    dataset = VariableLengthDataset(inspect_prefix(prefix), 200)
    (reader, *_), take = documents(dataset, 2, None)
    for _ in range(position // BATCH):
        take()
    wanted = [take() for _ in range(BATCHES)]
    state = {**reader.state_dict(), "consumed_samples": position}
    _, take = documents(dataset, replicas, state)
    assert [take() for _ in range(BATCHES)] == wanted


class Bomb:
    """A pickle that would make a file when it is read."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return (Path.touch, (self.canary,))


def test_megatrons_index_cache_is_no_way_in_for_code(common, stand_on, tmp_path):
    """It asks numpy to read pickles."""
    stand_on(0, 1, 0, 1)
    settings = parse_arguments(f"{common} --data-cache-path {tmp_path / 'cache'}".split())
    assert build_iterators(settings, 0)[0] is not None
    caches = sorted((tmp_path / "cache").glob("*.npy"))
    assert len(caches) == 3
    canary = tmp_path / "canary"
    for cache in caches:
        whole = cache.read_bytes()
        for content in (pickle.dumps(Bomb(canary)), whole[:-8], b""):
            cache.write_bytes(content)
            with pytest.raises(DataError) as caught:
                build_iterators(settings, 0)
            assert str(caught.value).startswith(f"{cache} is not an index that was cached here (")
            assert "\n" not in str(caught.value)
        cache.write_bytes(whole)
    assert not canary.exists()
    build_iterators(settings, 0)
    # The bomb is a live one.
    cache.write_bytes(pickle.dumps(Bomb(canary)))
    np.load(cache, allow_pickle=True, mmap_mode="r")
    assert canary.exists()
