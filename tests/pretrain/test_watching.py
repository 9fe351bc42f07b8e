"""What is told of a run: TensorBoard, Weights & Biases, throughput, time to finish, memory's history."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from helixpipe.data.prefix import DatasetInfo
from megatron.pretrain.health.memory_history import MemoryHistory
from megatron.pretrain.metrics import IterationMetrics
from megatron.pretrain.scalars import Scalars, values_of
from megatron.pretrain.settings.arguments import parse_arguments
from megatron.pretrain.throughput import ModelFlops, TimeToFinish

MINIMAL = (
    "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --micro-batch-size 1 "
    "--global-batch-size 8 --train-iters 10 --lr 1e-3 --data-path unused"
)
DATASET = DatasetInfo(
    prefix="unused", vocab_size=300, eod=0, num_documents=100, num_tokens=10_000, longest_document=500
)
METRICS = IterationMetrics(
    iteration=4, consumed_samples=32, lm_loss=1.5, grad_norm=0.25, elapsed_ms=500.0, tokens_per_second=512.0,
    peak_memory_bytes=[7, 8], bubble_ratio=0.0, schedule="1f1b", attention_backend="aten-cpu",
    learning_rate=1e-3, pipeline_ms=0.0, num_zeros_in_grad=3, params_norm=9.0, loss_scale=512.0,
    tflops_per_gpu=2.0,
)  # fmt: skip


@pytest.fixture
def parse(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    return lambda more="": parse_arguments(f"{MINIMAL} {more}".split(), DATASET, makes_folders=False)


class Recorder:
    """In the place of a library's writer."""

    def __init__(self, *args, **options):
        self.options, self.scalars, self.is_open = options, [], True

    def add_scalar(self, name, value, step):
        self.scalars.append((name, value, step))

    def log(self, values, step):
        self.scalars += [(name, value, step) for name, value in values.items()]

    def close(self):
        self.is_open = False

    finish = close


@pytest.fixture
def libraries(monkeypatch):
    """The writers that are made, by library."""
    made = {}

    def maker(name):
        return lambda *args, **options: made.setdefault(name, Recorder(*args, **options))

    for module, maker_name in (("torch.utils.tensorboard", "SummaryWriter"), ("wandb", "init")):
        stand_in = ModuleType(module)
        setattr(stand_in, maker_name, maker(module))
        monkeypatch.setitem(sys.modules, module, stand_in)
    return made


def test_values_have_megatrons_names(parse):
    plain = values_of(METRICS, parse())
    assert plain == {
        "learning-rate": 1e-3, "batch-size": 8.0, "lm loss": 1.5, "grad-norm": 0.25, "num-zeros": 3.0,
        "params-norm": 9.0, "loss-scale": 512.0,
    }  # fmt: skip
    more = (
        "--tensorboard-dir t --log-timers-to-tensorboard --log-memory-to-tensorboard "
        "--log-world-size-to-tensorboard --no-log-loss-scale-to-tensorboard"
    )
    found = values_of(METRICS, parse(more))
    assert found.keys() - plain.keys() == {
        "iteration-time", "throughput", "world-size", "mem-max-allocated-bytes",
    }  # fmt: skip
    assert plain.keys() - found.keys() == {"loss-scale"}
    assert (found["iteration-time"], found["throughput"], found["world-size"]) == (0.5, 2.0, 2.0)


def test_both_libraries_get_every_value(parse, libraries, tmp_path):
    settings = parse(
        f"--tensorboard-dir {tmp_path} --tensorboard-queue-size 5 --tensorboard-log-interval 2 "
        "--wandb-project p --wandb-exp-name r --wandb-entity e --log-validation-ppl-to-tensorboard"
    )
    scalars = Scalars(settings, 3)
    scalars.iteration(METRICS)
    scalars.iteration(SimpleNamespace(iteration=5))  # not one of those that are written
    scalars.evaluation(2.0, 4, 32)
    scalars.close()
    board, run = libraries["torch.utils.tensorboard"], libraries["wandb"]
    assert board.options == {"max_queue": 5, "purge_step": 4}
    assert {name: run.options[name] for name in ("project", "name", "entity")} == {
        "project": "p", "name": "r", "entity": "e",
    }  # fmt: skip
    assert ("lm loss", 1.5, 4) in board.scalars
    assert ("lm loss vs samples", 1.5, 32) in board.scalars
    assert ("lm loss", 1.5, 4) in run.scalars
    for writer in (board, run):
        assert ("lm loss validation", 2.0, 4) in writer.scalars
        assert ("lm loss validation ppl", pytest.approx(7.389056), 4) in writer.scalars
        assert not writer.is_open
    assert scalars.summary() == ""


def test_other_ranks_write_nothing(parse, libraries, monkeypatch, tmp_path):
    monkeypatch.setenv("RANK", "1")
    Scalars(parse(f"--tensorboard-dir {tmp_path}"), 0).iteration(METRICS)
    assert libraries == {}


def test_event_files_are_read_by_tensorboard(parse, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    scalars = Scalars(parse(f"--tensorboard-dir {tmp_path}"), 0)
    scalars.iteration(METRICS)
    scalars.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("lm loss")] == [(4, 1.5)]
    assert [(event.step, event.value) for event in events.Scalars("lm loss vs samples")] == [(32, 1.5)]


@pytest.mark.parametrize(
    ("flags", "package"),
    [("--tensorboard-dir t", "tensorboard"), ("--wandb-project p --wandb-exp-name r", "wandb")],
)
def test_a_missing_package_is_named(parse, monkeypatch, flags, package):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=f"needs the package {package}, .*pip install {package}, or leave"):
        parse(flags).watching.check_packages()
    parse().watching.check_packages()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--log-memory-to-tensorboard", "--log-memory-to-tensorboard needs --tensorboard-dir"),
        ("--wandb-project p", "--wandb-project and --wandb-exp-name need each other"),
        ("--wandb-entity p", "--wandb-entity and --wandb-save-dir need --wandb-project"),
        ("--memory-snapshot-path p", "--memory-snapshot-path needs --record-memory-history"),
    ],
)
def test_options_that_would_be_ignored_are_refused(parse, flags, message):
    with pytest.raises(ValueError, match=message):
        parse(flags)


def test_operations_are_those_of_the_formula(parse):
    """Products of forward and backward: 6 per weight and token, and attention's two over half its square."""
    flops = ModelFlops.of(parse("--log-throughput --hardware h100 --pipeline-schedule auto"))
    h, s, layers, words, tokens = 64, 32, 4, 384, 8 * 32
    weights = layers * (4 * h * h + 8 * h * h) + words * h
    assert flops.causal == 6 * tokens * weights + 3 * layers * 8 * (2 * s * s * h)
    assert flops.whole_square - flops.causal == 3 * layers * 8 * (2 * s * s * h)
    assert flops.tflops(500.0, 2)[0] == pytest.approx(flops.causal / 1e12)
    assert flops.mfu(1e-3, 1) == pytest.approx(flops.causal * 1e6 / 989e12)
    assert "throughput per GPU (TFLOP/s/GPU): " in flops.text(500.0, 2)
    assert " | with the whole square of attention: " in flops.text(500.0, 2)
    assert flops.text(500.0, 2).endswith("%")


def test_the_share_of_an_unknown_peak_is_not_told(parse):
    flops = ModelFlops.of(parse("--log-throughput"))
    assert flops.mfu(500.0, 2) is None
    assert "MFU" not in flops.text(500.0, 2)


def test_time_to_finish():
    time = TimeToFinish(5000)
    assert time.after(1, 90_000.0) == "124:58:30"
    for iteration in range(2, 30):
        left = time.after(iteration, 1000.0)  # the slow first one is forgotten
    assert left == "1:22:51"
    assert time.after(5000, 1000.0) == ""


def test_history_of_memory_is_written(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda: calls.append("record"))
    monkeypatch.setattr(
        torch.cuda.memory, "_dump_snapshot", lambda filename: calls.append(Path(filename).name)
    )
    history = MemoryHistory(tmp_path / "memory.pickle", 3, 2)
    for iteration in (1, 2, 3, 4):
        history.write(iteration)
    assert calls == ["record", "memory_rank3.pickle", "memory_rank3.pickle"]
    calls.clear()
    MemoryHistory(None, 0, 1).write(1)
    assert calls == []


def test_history_has_a_default_file(parse):
    assert parse("--record-memory-history").watching.memory_history == Path("snapshot.pickle")
    assert parse().watching.memory_history is None
