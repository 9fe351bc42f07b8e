"""--pipeline-schedule auto: the planner's choice in the place of the user's."""

import json
import re
from dataclasses import asdict, replace

import pytest

from helixpipe.data.prefix import DatasetInfo
from helixpipe.plan.advise import read_machine
from helixpipe.plan.cost_model import HARDWARE, Recompute, Workload, predict_pieces
from megatron.pretrain.settings.arguments import parse_arguments
from megatron.pretrain.settings.schedule import executable_schedules
from megatron.pretrain.settings.schedule_choice import pieces_on

LINE = (
    "--pipeline-schedule auto --pipeline-model-parallel-size 4 --num-layers 8 --hidden-size 512 "
    "--num-attention-heads 8 --micro-batch-size 1 --global-batch-size 16 --train-iters 1 --lr 1e-3 "
    "--data-path random --bf16 --untie-embeddings-and-output-weights"
)
DATASET = DatasetInfo("random", 1000, 0, 1, 10**6, 10**6)


@pytest.fixture(autouse=True)
def four_ranks(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "0")


def parsed(extra):
    return parse_arguments(f"{LINE} {extra}".split(), DATASET)


def test_a_schedule_is_chosen_and_announced():
    settings = parsed("--hardware h20 --seq-length 32768")
    assert settings.schedule.name in executable_schedules()
    assert settings.schedule.reason.startswith(f"auto chose {settings.schedule.name}")
    assert settings.schedule.plan.num_microbatches == 16
    assert parsed("--hardware h20 --seq-length 32768").schedule.reason == settings.schedule.reason, (
        "every rank chooses alike"
    )


def test_given_options_narrow_the_choice():
    assert parsed("--hardware h20 --seq-length 4096 --num-fold 1").schedule.plan.parameters["num_fold"] == 1
    chosen = parsed("--hardware h20 --seq-length 4096 --num-layers-per-virtual-pipeline-stage 1")
    assert (chosen.schedule.name, chosen.schedule.virtual_stages) == ("interleaved", 2)
    chosen = parsed("--hardware h20 --seq-length 4096 --attention-range auto --num-fold 2")
    assert chosen.schedule.plan.parameters["attention_range"] in ("core", "qkv", "block")
    chosen = parsed("--hardware h20 --seq-length 4096 --head-placement spread")
    assert (chosen.schedule.name, chosen.options["head_placement"]) == ("helix", "spread")
    chosen = parsed("--hardware h20 --seq-length 65536 --round-order interlocked")
    assert chosen.schedule.plan.parameters["round_order"] == "interlocked"
    chosen = parsed("--hardware h20 --seq-length 65536 --round-order filo")
    assert "round_order" not in chosen.schedule.plan.parameters
    again = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
    chosen = parsed(f"--hardware h20 --seq-length 4096 {again}")
    assert chosen.schedule.name != "helix"


def recomputed(words):
    return parsed(words).memory.memory_saving.recompute


@pytest.mark.slow
def test_recomputation_is_as_given_or_where_memory_needs_it():
    long = "--hardware h20 --seq-length 131072"
    assert recomputed(long) is Recompute.NONE
    # As many layers as memory allows keep more.
    levels = recomputed(f"{long} --memory-limit-gib 16")
    assert set(levels) == {Recompute.WITHOUT_ATTENTION, Recompute.PRODUCTS}
    assert recomputed(f"{long} --recompute-without-attention") is Recompute.WITHOUT_ATTENTION
    never = f"{long} --memory-limit-gib 16 --no-recompute-without-attention"
    assert recomputed(never) is Recompute.NONE
    assert parsed(never).schedule.reason != parsed(f"{long} --memory-limit-gib 16").schedule.reason


@pytest.mark.slow
def test_chunks_of_the_loss_are_known_to_the_planner():
    tight = "--hardware h20 --seq-length 131072 --memory-limit-gib 16"
    assert parsed(f"{tight} --loss-chunk-size auto").schedule.reason != parsed(tight).schedule.reason


@pytest.mark.slow
def test_memory_decides():
    roomy = parsed("--hardware h20 --seq-length 131072")
    tight = parsed("--hardware h20 --seq-length 131072 --memory-limit-gib 20")
    assert roomy.schedule.reason != tight.schedule.reason
    with pytest.raises(ValueError, match=r"nothing can be executed within memory .*GiB over the limit"):
        parsed("--hardware h20 --seq-length 131072 --memory-limit-gib 1")


def machine_with_links(folder, times):
    """A file of an H20 whose links are so many times as fast."""
    h20, path = HARDWARE["h20"], folder / "machine.json"
    machine = replace(h20, nvlink_gb_per_s=times * h20.nvlink_gb_per_s, nic_gb_per_s=times * h20.nic_gb_per_s)
    # The rates in use, without a choice of kernels.
    path.write_text(json.dumps({k: v for k, v in asdict(machine).items() if k != "attention_kernels"}))
    return path


# Few candidates, so that a choice takes little time.
HELIX = "--hardware h20 --seq-length 65536 --num-fold 1 --attention-range block"


def test_layers_with_windows_are_chosen_for():
    found = parsed(f"{HELIX} --window-size 4095,0 --window-attn-skip-freq 2").schedule.plan
    assert {"attention.window4096", "attention.full"} < set(found.segment_names)


def test_weight_gradients_that_the_layers_cannot_leave_are_not_chosen(monkeypatch):
    """Transformer Engine's linear layers compute them at once."""
    monkeypatch.setattr("megatron.pretrain.settings.arguments.check_implementation", lambda _: None)
    assert parsed(HELIX).schedule.splits_backward
    found = parsed(f"{HELIX} --transformer-impl transformer_engine").schedule
    assert found.plan.parameters["round_order"] == "interlocked"
    assert not found.splits_backward


@pytest.mark.parametrize("option", ["--attention-dropout 0.1", "--attention-backend unfused"])
def test_slices_are_not_chosen_where_attention_takes_whole_sequences(option):
    one = "--hardware h20 --seq-length 131072 --global-batch-size 1 --num-slices 4"
    assert parsed(one).schedule.execution.cuts_sequences
    with pytest.raises(ValueError, match=r"no schedule that it plans .* with all of --num-slices; leave"):
        parsed(f"{one} {option}")


def test_learned_sinks_go_with_the_ranges_that_lend_them(tmp_path):
    """Over links so fast that messages cost nothing, and lending does."""
    path = machine_with_links(tmp_path, 100.0)
    job = f"--hardware {path} --seq-length 8192 --num-fold 2 --round-order filo --head-placement first"
    assert parsed(job).schedule.plan.parameters["attention_range"] == "core"
    found = parsed(f"{job} --softmax-type learnable")
    assert found.schedule.plan.parameters["attention_range"] in ("qkv", "block")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--decoder-first-pipeline-num-layers 1", "--decoder-first-pipeline-num-layers does not apply"),
        ("--microbatch-group-size-per-virtual-pipeline-stage 2", "does not apply to --pipeline-schedule"),
        ("--num-fold 2 --num-slices 4", "executed with all of --num-fold, --num-slices; leave some out"),
    ],
)
def test_what_no_choice_can_have_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        parsed(f"--hardware h20 --seq-length 4096 {options}")


def profile_for(seq_length, **changes):
    line = f"{LINE.replace('auto', '1f1b')} --seq-length {seq_length}"
    model = replace(parse_arguments(line.split(), DATASET).workload.model, **changes)
    workload = Workload(model=model, seq_length=seq_length)
    return predict_pieces(workload, HARDWARE["h20"]).to_json()


def test_memory_is_predicted_for_the_chunks_of_this_job(tmp_path):
    """Also beside a profile: it tells times, and was measured with a whole MLP and a whole loss."""
    path = tmp_path / "profile.json"
    path.write_text(profile_for(8192))
    job = f"--hardware {path} --seq-length 8192 --memory-limit-gib 80"
    chunks = "--mlp-chunk-size 2048 --loss-chunk-size 1024"
    whole, chunked = parsed(job), parsed(f"{job} {chunks}")
    assert chunked.workload == replace(whole.workload, mlp_chunk_size=2048, whole_logits=False)
    machine = read_machine(str(path))
    assert pieces_on(machine, str(path), chunked.workload) == replace(machine, workload=chunked.workload)


def test_a_profile_of_the_same_layers_is_accepted(tmp_path):
    path = tmp_path / "profile.json"
    # A model from Hugging Face counts its norms, too.
    path.write_text(profile_for(8192, num_layers=1, other_parameters=1000))
    settings = parsed(f"--hardware {path} --seq-length 8192 --memory-limit-gib 80")
    assert settings.schedule.reason.startswith("auto chose")


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (
            "--hardware {} --seq-length 4096 --memory-limit-gib 80",
            "was measured with seq length 8192, this job",
        ),
        (
            "--hardware {} --seq-length 8192 --hidden-size 256 --memory-limit-gib 80",
            "hidden size 512, this job",
        ),
        ("--hardware {} --seq-length 8192", "a profile does not know how much memory there is"),
        ("--hardware h21 --seq-length 8192", "unknown hardware 'h21'"),
        ("--seq-length 8192", "auto needs --hardware: h20, h100, h200, h800, a100, a800, b200, gb200"),
    ],
)
def test_wrong_hardware(tmp_path, extra, message):
    path = tmp_path / "profile.json"
    path.write_text(profile_for(8192))
    with pytest.raises(ValueError, match=r".") as caught:
        parsed(extra.format(path))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_hardware_is_for_auto_only():
    line = LINE.replace("auto", "1f1b")
    with pytest.raises(ValueError, match="--hardware is for --pipeline-schedule auto"):
        parse_arguments(f"{line} --hardware h20 --seq-length 4096".split(), DATASET)


@pytest.mark.parametrize(("links", "found"), [(1.0, "core"), (0.01, "block")], ids=["fast", "slow"])
def test_the_range_follows_the_links(tmp_path, links, found):
    """Lent weights save messages, and cost time of their own where messages are hidden anyway."""
    path = machine_with_links(tmp_path, links)
    line = f"{LINE.replace('auto', 'helix')} --attention-range auto --seq-length 8192 --hardware {path}"
    settings = parse_arguments(line.split(), DATASET)
    assert settings.schedule.plan.parameters["attention_range"] == found
    told = re.findall(r"(core|qkv|block) ([\d.]+)", settings.schedule.reason.partition(": ")[2])
    assert [name for name, _ in told] == ["core", "qkv", "block"]
    assert min(told, key=lambda pair: float(pair[1]))[0] == found


def test_a_range_for_a_profile_of_other_sizes_is_refused(tmp_path):
    path = tmp_path / "profile.json"
    path.write_text(profile_for(8192))
    line = f"{LINE.replace('auto', 'helix')} --attention-range auto --seq-length 4096 --hardware {path}"
    with pytest.raises(ValueError, match="was measured with seq length 8192, this job has 4096"):
        parse_arguments(line.split(), DATASET)
