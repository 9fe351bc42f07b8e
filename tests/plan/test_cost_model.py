"""The cost model: work counted against independent sums, rates, files, and segments against pieces."""

import json
from dataclasses import replace
from itertools import pairwise

import pytest

from helixpipe.plan import Kind, ScheduleRequest, build_plan
from helixpipe.plan.cost_model import (
    HARDWARE,
    MODELS,
    Pieces,
    Recompute,
    Workload,
    costs_of_plan,
    predict_pieces,
    read_hardware,
    read_model,
)
from helixpipe.plan.cost_model.analytic import pipeline_network
from helixpipe.plan.cost_model.pieces import PieceCost
from helixpipe.plan.cost_model.segments import rank_parameters
from helixpipe.plan.cost_model.work import LAYER_PIECES, PIECES
from helixpipe.plan.schedules import planned_ahead
from helixpipe.plan.simulation.costs import parse_costs
from helixpipe.plan.simulation.memory import peak_bytes
from helixpipe.plan.slice_ends import with_slice_ends

GPT = MODELS["gpt-7b"]
LLAMA = MODELS["llama-7b"]


def workload(model=GPT, **changes):
    return Workload(**{"model": model, "seq_length": 4096, "tensor_parallel": 8, **changes})


def pieces(model=GPT, machine="h20", **changes):
    return predict_pieces(workload(model, **changes), HARDWARE[machine])


def planned(schedule, layers=32, p=8, m=16, **options):
    request = ScheduleRequest(num_layers=layers, num_ranks=p, num_microbatches=m, **options)
    return build_plan(schedule, request, compute_only=True)


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("llama-7b", 6.74),
        ("llama-13b", 13.02),
        ("llama-70b", 68.98),
        ("llama3-8b", 8.03),
        ("llama3-70b", 70.55),
        ("llama3-405b", 405.85),
        ("gpt-1.3b", 1.31),
        ("gpt-3b", 2.65),
        ("gpt-7b", 6.65),
        ("qwen2.5-7b", 7.61),
        ("qwen3-8b", 8.19),
    ],
)
def test_models_have_their_published_sizes(name, billions):
    """Published parameter counts, norms, biases and learned positions apart."""
    assert MODELS[name].parameters / 1e9 == pytest.approx(billions, rel=0.01)


def test_flops_are_six_per_weight_and_token():
    """Forward and backward: 6 N per token, and causal attention's 6 s h more per layer and token."""
    s = 8192
    per_token = 3 * LLAMA.forward_flops(s) / s
    weights = LLAMA.parameters - LLAMA.embedding_parameters
    assert per_token == pytest.approx(6 * weights + 6 * LLAMA.num_layers * s * LLAMA.hidden_size)


def test_unknown_names_list_the_known():
    with pytest.raises(ValueError, match=r"unknown model 'llama-8b'; give a file or one of llama-7b, "):
        read_model("llama-8b")
    with pytest.raises(ValueError, match=r"unknown hardware 'h21'; did you mean h2"):
        read_hardware("h21")


def test_hardware_files(tmp_path):
    path = tmp_path / "rented.json"
    path.write_text(json.dumps({"base": "h100", "nics_per_node": 4, "memory_gib": 60}))
    found = read_hardware(str(path))
    assert found == replace(HARDWARE["h100"], name="rented", nics_per_node=4, memory_gib=60)
    for text, message in [
        ('{"base": "h99"}', "base 'h99' is unknown; known: h20, "),
        ('{"tflops": 100}', "matmul_efficiency, attention_forward_efficiency"),
        ('{"base": "h20", "tflop": 1}', "'tflop' is unknown"),
        ('{"base": "h20", "tflops": "1"}', "tflops must be a number"),
        ('{"base": "h20", "tflops": 0}', "tflops must be above 0"),
        ('{"base": "h20", "matmul_efficiency": 1.2}', "matmul_efficiency is a share of 1"),
        ("{", "invalid JSON"),
    ]:
        path.write_text(text)
        with pytest.raises(ValueError, match=r"^hardware ") as caught:
            read_hardware(str(path))
        assert message in str(caught.value)


def test_products_take_their_flops_at_their_rate():
    """Without tensor parallelism and with a machine whose memory is free, times are flops over rates."""
    machine = replace(
        HARDWARE["h100"], matmul_efficiency=0.5, attention_forward_efficiency=0.25,
        attention_backward_efficiency=0.2, memory_gb_per_s=1e12,
    ).without_short_kernel_losses()  # fmt: skip
    found = predict_pieces(workload(LLAMA, tensor_parallel=1, micro_batch_size=2), machine)
    tokens, h = 2 * 4096, 4096
    product_ms = 2 * tokens * h * 3 * h / (989e9 * 0.5)
    assert found.times["qkv"].forward == pytest.approx(product_ms)
    assert found.times["qkv"].weight == pytest.approx(product_ms)
    core_ms = 2 * (2 * 4096**2 * h) / 989e9
    assert found.times["core"].forward == pytest.approx(core_ms / 0.25)
    assert found.times["core"].backward == pytest.approx(2.5 * core_ms / 0.2)
    assert found.times["core"].weight == 0


def test_times_scale_with_the_sequence():
    short, long = pieces(seq_length=8192), pieces(seq_length=16384)
    for name in PIECES:
        factor = 4 if name == "core" else 2
        assert long.times[name].total == pytest.approx(factor * short.times[name].total)


def test_pipeline_links_follow_megatrons_numbering():
    machine = HARDWARE["h20"]
    # Tensor parallelism fills the node: every stage is a node, with all its cards.
    alone = pipeline_network(workload(tensor_parallel=8), machine)
    assert (alone.ranks_per_node, alone.node_gb_per_s) == (1, pytest.approx(8 * 25 * 0.8))
    # Four stages of two GPUs in a node, with a quarter of the cards each.
    four = pipeline_network(workload(tensor_parallel=2), machine)
    assert (four.ranks_per_node, four.node_gb_per_s) == (4, pytest.approx(2 * 25 * 0.8))
    assert four.uplink_gb_per_s == pytest.approx(8 * 25 * 0.8)
    # Replicas stand between the GPUs of one stage and those of the next.
    assert pipeline_network(workload(tensor_parallel=2, data_parallel=4), machine).ranks_per_node == 1


SCHEDULE_OPTIONS = {
    "interleaved": {"virtual_stages": 4},
    "helix": {"attention_range": "core"},
    "seq1f1b": {"num_slices": 4},
    "sliced-helix": {"attention_range": "block", "m": 2},
}


@pytest.mark.parametrize("recompute", list(Recompute))
@pytest.mark.parametrize("schedule", planned_ahead())
def test_no_work_is_lost(schedule, recompute):
    """Over all segments of a micro batch, every piece of every layer is there once, whatever the schedule."""
    found = replace(pieces(seq_length=65536), overhead_ms=0.0, multiprocessors=0)
    options = {"m": 16, **SCHEDULE_OPTIONS.get(schedule, {})}
    plan, m = planned(schedule, **options), options["m"]
    costs = costs_of_plan(found, plan, recompute)
    layer = [found.times[name] for name in LAYER_PIECES]
    ends = [found.times[name] for name in ("embedding", "head")]
    total = m * (32 * sum(t.total for t in layer) + sum(t.total for t in ends))
    busy = again = 0.0
    for order in plan.orders:
        for op in order:
            name = plan.cost_name(op.segment, op.micro_batch)
            busy += costs.duration_ms(op.kind, name, splits_backward=plan.splits_backward)
            again += costs.segments[name].recompute * (op.kind is Kind.B)
    assert busy - again == pytest.approx(total)
    assert (again > 0) == (recompute is not Recompute.NONE)
    if recompute is Recompute.FULL:
        assert again == pytest.approx(m * 32 * sum(t.forward for t in layer))


@pytest.mark.parametrize("attention_range", ["core", "qkv", "block"])
@pytest.mark.parametrize("recompute", list(Recompute))
def test_ranges_move_work_but_do_not_change_it(attention_range, recompute):
    found = replace(pieces(seq_length=65536), overhead_ms=0.0)
    plan = planned("helix", attention_range=attention_range)
    costs = costs_of_plan(found, plan, recompute)
    core = costs_of_plan(found, planned("helix"), Recompute.NONE)

    def chain(costs, value):
        counts = {"first": 1, "attention": 32, "middle": 31, "last": 1}
        return sum(count * value(costs.segments[name]) for name, count in counts.items())

    assert chain(costs, lambda c: c.forward) == pytest.approx(chain(core, lambda c: c.forward))
    assert chain(costs, lambda c: c.weight) == pytest.approx(chain(core, lambda c: c.weight))
    assert chain(costs, lambda c: c.backward - c.recompute) == pytest.approx(
        chain(core, lambda c: c.backward)
    )


def units(model, seq_length=4096, **changes):
    """The bytes of one unit, b s h elements on one GPU."""
    return workload(model, seq_length=seq_length, **changes).unit_bytes


def kept(recompute, schedule="helix", model=GPT, **options):
    plan = planned(schedule, **options)
    costs = costs_of_plan(pieces(model), plan, recompute)
    return {name: cost.bytes / units(model) for name, cost in costs.segments.items()}


def test_units_kept_by_a_layer():
    """GELU, no dropout: 16 units and the log-sum-exp without recomputation, 3 with attention kept."""
    lse = 4 * 32 / (2 * 4096)  # fp32 per head, in units
    head = (2 * 4096 * 2 + 50304 * 4) / (2 * 4096)
    layers = 4

    def layer(recompute):
        stages = kept(recompute, "1f1b")
        assert stages["stage7"] == pytest.approx(stages["stage1"] + head, rel=1e-3)
        return stages["stage1"] / layers

    assert layer(Recompute.NONE) == pytest.approx(16 + lse)
    # Norm inputs, q k v, attention's output, fc1's; not norm outputs and the activation function's.
    assert layer(Recompute.PRODUCTS) == pytest.approx(2 + 3 + 1 + 4 + lse)
    assert layer(Recompute.SELECTIVE) == pytest.approx(16)
    assert layer(Recompute.WITHOUT_ATTENTION) == pytest.approx(3 + lse)
    assert layer(Recompute.FULL) == pytest.approx(1)


def test_units_kept_by_helix():
    lse = 4 * 32 / (2 * 4096)
    whole = kept(Recompute.NONE)
    # q, k, v and attention's output; the residual that came with them is not kept.
    assert whole["attention"] == pytest.approx(4 + lse)
    # Attention's output, both norms in and out, the MLP's 4 + 4.
    assert whole["middle"] == pytest.approx(1 + 4 + 8)
    for name in ("core", "qkv", "block"):
        products = kept(Recompute.PRODUCTS, attention_range=name)
        # With core, o crosses a cut, and both sides of it keep it.
        twice = 0 if name == "block" else 1
        assert products["attention"] + products["middle"] == pytest.approx(10 + twice + lse)
    qkv = kept(Recompute.WITHOUT_ATTENTION, attention_range="qkv")
    assert qkv["attention"] + qkv["middle"] == pytest.approx(4 + lse)
    block = kept(Recompute.WITHOUT_ATTENTION, attention_range="block")
    assert block["attention"] + block["middle"] == pytest.approx(3 + lse)
    for recompute in Recompute:
        for attention_range in ("core", "qkv", "block"):
            least = kept(Recompute.FULL, attention_range=attention_range)
            some = kept(recompute, attention_range=attention_range)
            assert all(least[name] <= some[name] for name in least)


def test_chunked_loss_keeps_no_logits():
    def last(**changes):
        found = pieces(seq_length=131072, **changes)
        return costs_of_plan(found, planned("helix"), Recompute.NONE).segments["last"]

    logits = 131072 * 50304 // 8
    assert last().bytes - last(whole_logits=False).bytes == 4 * logits
    assert last().workspace_bytes >= 8 * logits > last(whole_logits=False).workspace_bytes
    # They are computed twice.
    head = pieces(seq_length=131072).times["head"].forward
    assert last(whole_logits=False).backward - last().backward == pytest.approx(head)
    assert last(whole_logits=False).recompute == pytest.approx(head)


def test_an_mlp_in_chunks_is_never_there_for_all_tokens():
    """And keeps its input alone, whatever the rest of the layer keeps; its first half is computed twice."""

    def middle(recompute, **changes):
        found = pieces(seq_length=131072, **changes)
        return costs_of_plan(found, planned("helix", attention_range="block"), recompute).segments["middle"]

    unit = 131072 * GPT.hidden_size * 2 // 8
    norm2, fc1 = (pieces(seq_length=131072).times[name].forward for name in ("norm2", "fc1"))
    whole = middle(Recompute.NONE)
    for level in (Recompute.NONE, Recompute.PRODUCTS, Recompute.WITHOUT_ATTENTION):
        # The widest tensor has four times the hidden state's channels.
        chunked = middle(level, mlp_chunk_size="auto")
        assert chunked == middle(level, mlp_chunk_size=32768)
        assert chunked.bytes == unit
        assert chunked.recompute == pytest.approx(norm2 + fc1)
        assert chunked.workspace_bytes < whole.workspace_bytes + middle(level).bytes
    # norm2's output, fc1's output and gradient, the activation; norm2's output and gradient, gathered. And
    # the residual's gradient.
    parts = unit + 4 * unit + 4 * unit + 4 * unit + 2 * 8 * unit
    assert chunked.workspace_bytes == parts // 4 + unit
    assert middle(Recompute.FULL, mlp_chunk_size="auto").recompute == pytest.approx(
        middle(Recompute.FULL).recompute + norm2 + fc1
    )


def test_an_activation_takes_no_longer_than_the_piece_that_has_it():
    """A norm that was measured on a busy machine may have taken longer than the whole of fc1."""
    found = pieces()
    slow = replace(found, times={**found.times, "norm1": PieceCost(1e3, 1e3)})
    plan = planned("helix", attention_range="block")
    middle = costs_of_plan(slow, plan, Recompute.PRODUCTS).segments["middle"]
    norm2, fc1 = (found.times[name].forward for name in ("norm2", "fc1"))
    assert middle.recompute == pytest.approx(norm2 + fc1)


def test_chunk_sizes_are_tokens_or_automatic():
    for wrong in (0, -1, True, "large", 2.0):
        with pytest.raises(ValueError, match="mlp chunk size must be tokens or auto"):
            pieces(mlp_chunk_size=wrong)


def test_attention_needs_room_for_its_gradients():
    """Of the results, of q, k and v, once more of q in fp32; and rotated q and k where these come again."""

    def attention(recompute, attention_range):
        found = pieces(seq_length=131072)
        plan = planned("helix", attention_range=attention_range)
        return costs_of_plan(found, plan, recompute).segments["attention"].workspace_bytes

    unit = 131072 * GPT.hidden_size * 2 // 8
    sums = 131072 * GPT.num_heads * 4 // 8
    assert attention(Recompute.NONE, "core") == 2 * unit + 3 * unit + 2 * unit + sums
    assert attention(Recompute.NONE, "block") == attention(Recompute.NONE, "core")
    again = unit + 3 * unit + 2 * unit  # norm1's output, q, k and v, and rotated q and k
    assert attention(Recompute.WITHOUT_ATTENTION, "block") == attention(Recompute.NONE, "core") + again
    assert attention(Recompute.WITHOUT_ATTENTION, "core") == attention(Recompute.NONE, "core")


def test_messages_have_the_size_of_their_tensors():
    unit = units(GPT) * 8  # of a rank's eight GPUs
    messages = {
        cut: costs_of_plan(pieces(), planned("helix", attention_range=cut), Recompute.NONE).message_bytes
        for cut in ("core", "qkv", "block")
    }
    square = 4096 * 4096
    loans = {
        cut: costs_of_plan(pieces(), planned("helix", attention_range=cut), Recompute.NONE).loan_bytes
        for cut in ("core", "qkv", "block")
    }
    # Weights in bf16, gradients in fp32.
    assert loans["core"] == {}
    assert loans["qkv"] == {"attention": (3 * square * 2, 3 * square * 4)}
    assert loans["block"] == {"attention": (4 * square * 2, 4 * square * 4)}
    spread = costs_of_plan(pieces(), planned("helix", head_placement="spread"), Recompute.NONE).loan_bytes
    last = 9 * square + 50304 * 4096  # proj, the MLP, the head
    assert spread == {"last": (last * 2, last * 4)}
    assert messages["core"]["middle->attention"] == 4 * unit
    assert messages["core"]["attention->middle"] == 2 * unit
    assert messages["qkv"]["middle->attention"] == unit
    assert messages["qkv"]["attention->middle"] == 2 * unit
    assert messages["block"]["middle->attention"] == unit
    assert messages["block"]["attention->middle"] == unit
    assert costs_of_plan(pieces(), planned("1f1b"), Recompute.NONE).message_bytes == {"*": unit}


@pytest.mark.parametrize("schedule", planned_ahead())
@pytest.mark.parametrize("name", ["gpt-7b", "llama-7b"])
def test_every_weight_is_on_one_rank(schedule, name):
    found = pieces(MODELS[name])
    plan = planned(schedule, **SCHEDULE_OPTIONS.get(schedule, {}))
    counts = rank_parameters(found, plan)
    model = MODELS[name]
    ends_meet = plan.rank_of(0, 0) == plan.rank_of(plan.num_segments - 1, 0)
    # A tied head on another rank than the embedding is a second copy of it.
    copies = model.embedding_parameters if model.tied and not ends_meet else 0
    assert sum(counts) * 8 == model.parameters + copies


def test_optimizer_states():
    """18 bytes per weight in bf16; the distributed optimizer cuts 12 of them; 16 in fp32."""
    assert workload().static_bytes(1000) == 18_000
    sharded = workload(data_parallel=4, distributed_optimizer=True)
    assert sharded.static_bytes(1000) == 6_000 + 3_000
    shared = workload(data_parallel=4, context_parallel=2, distributed_optimizer=True)
    assert shared.static_bytes(1000) == 6_000 + 1_500
    assert workload(element_bytes=4).static_bytes(1000) == 16_000


def test_replicas_reduce_gradients():
    alone, many = pieces(), pieces(data_parallel=8)
    assert alone.reduction_ms(10**9) == 0
    # Beyond the node: network cards, 8 bytes sent per weight but for one part in eight.
    assert many.reduction_ms(10**9) == pytest.approx(7 / 8 * 8e9 / (25 * 0.8 * 1e6))
    sharded = pieces(data_parallel=8, distributed_optimizer=True)
    assert sharded.reduction_ms(10**9) == pytest.approx(7 / 8 * 6e9 / (25 * 0.8 * 1e6))
    assert sharded.optimizer_ms(10**9) == pytest.approx(many.optimizer_ms(10**9) / 8)


def test_slices_take_equal_times():
    plan = planned("seq1f1b", num_slices=4)
    found = replace(pieces(seq_length=131072), overhead_ms=0.0, multiprocessors=0)
    costs = costs_of_plan(found, plan, Recompute.NONE)
    whole = costs_of_plan(found, planned("1f1b"), Recompute.NONE)

    def total(cost):
        return cost.forward + cost.backward + cost.weight

    times = [total(costs.segments[f"stage3/slice{j}"]) for j in range(4)]
    assert times == pytest.approx([total(whole.segments["stage3"]) / 4] * 4)
    lengths = [costs.message_bytes[f"stage3/slice{j}->stage4/slice{j}"] for j in range(4)]
    assert lengths == sorted(lengths, reverse=True)
    assert sum(lengths) == pytest.approx(whole.message_bytes["*"], abs=4)


def test_slices_that_a_plan_says_are_what_costs():
    """Equal tokens in place of equal times; gradients of keys and values wait for all but the last slice."""
    found = replace(pieces(seq_length=131072), overhead_ms=0.0)
    plan = with_slice_ends(planned("seq1f1b", num_slices=4), (32768, 65536, 98304, 131072))
    costs = costs_of_plan(found, plan, Recompute.NONE)
    slices = [costs.segments[f"stage3/slice{j}"] for j in range(4)]
    assert len({cost.bytes for cost in slices}) == 1
    assert [cost.forward for cost in slices] == sorted(cost.forward for cost in slices)
    steps = [b.forward - a.forward for a, b in pairwise(slices)]
    assert steps == pytest.approx([steps[0]] * 3)
    assert steps[0] > 0
    layers = found.workload.model.num_layers // plan.num_segments
    # Sums in fp32, of a model in bf16.
    kept = layers * 2 * found.workload.channel_bytes(found.workload.model.key_value_size) // 4
    assert [cost.gradient_bytes for cost in slices] == [kept, kept, kept, 0]


def test_profiles_round_trip_and_say_what_is_wrong():
    found = pieces(LLAMA, machine="a800")
    assert Pieces.from_object(json.loads(found.to_json())) == found
    data = json.loads(found.to_json())
    for change, message in [
        ({"format": "x"}, '"format" must be "helixpipe-pieces"'),
        ({"times": {}}, "times must be given for embedding, norm1"),
        ({"times": {"core": {"forward": 1}}}, "a piece needs backward, forward, weight"),
        ({"times": {"core": {"forward": -1, "backward": 1, "weight": 1}}}, "forward must be a number"),
        ({"optimizer_ns": 0}, "expected a number above 0"),
        ({"network": {}}, "wrong or missing field"),
        ({"workload": {"model": {}}}, "wrong or missing field"),
    ]:
        with pytest.raises(ValueError, match=r"^profile: ") as caught:
            Pieces.from_object({**data, **change})
        assert message in str(caught.value)


def test_a_plan_of_another_depth_is_refused():
    with pytest.raises(ValueError, match="the plan has 16 layers, gpt-7b has 32; plan with --num-layers 32"):
        costs_of_plan(pieces(), planned("1f1b", layers=16), Recompute.NONE)


def test_sizes_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="num_heads 32 cannot be split over tensor-parallel size 5"):
        workload(tensor_parallel=5)
    with pytest.raises(ValueError, match="seq length must be at least 1, not 0"):
        workload(seq_length=0)


def test_products_compute_norms_and_the_activation_function_again():
    """By bytes over the bandwidth that elementwise kernels reach: 0.5 ms of 34 for 7B at 128k."""
    found = pieces(seq_length=131072)
    unit = 131072 * 4096 * 2 / 8
    rate = HARDWARE["h20"].memory_gb_per_s * HARDWARE["h20"].memory_efficiency * 1e6
    expected = (2 * 2 * unit + (4 + 4) * unit) / rate
    assert expected == pytest.approx(0.47, abs=0.01)
    plan = planned("1f1b")
    costs = costs_of_plan(found, plan, Recompute.PRODUCTS)
    whole = costs_of_plan(found, plan, Recompute.NONE)
    for name in ("stage1", "stage6"):
        assert costs.segments[name].recompute == pytest.approx(4 * expected)
        assert costs.segments[name].forward == whole.segments[name].forward
        assert costs.segments[name].backward == pytest.approx(whole.segments[name].backward + 4 * expected)
    block = costs_of_plan(found, planned("helix", attention_range="block"), Recompute.PRODUCTS).segments
    assert block["attention"].recompute + block["middle"].recompute == pytest.approx(expected)
    without = costs_of_plan(found, plan, Recompute.WITHOUT_ATTENTION).segments["stage1"]
    assert without.recompute / 4 == pytest.approx(34, abs=6)


def test_costs_of_a_spread_head_are_read_back():
    """Its last segment follows attention on the same rank: there is no edge to name."""
    plan = planned("helix", head_placement="spread", attention_range="block")
    costs = costs_of_plan(pieces(), plan, Recompute.NONE)
    assert parse_costs(costs.to_json(), plan) == costs


def test_windows_leave_a_band_of_attention():
    s, window = 1000, 100
    seen = sum(min(token + 1, window) for token in range(s))
    share = replace(GPT, windows=(window,) * 32).core_share(0, s)
    assert share == pytest.approx(seen / (s * s / 2), rel=0.01)
    assert replace(GPT, windows=(0, s) * 16).core_share(1, s) == 1.0
    mixed = replace(GPT, windows=(0, 2048) * 16)
    whole, band = GPT.core_flops(65536), mixed.core_share(1, 65536)
    assert GPT.forward_flops(65536) - mixed.forward_flops(65536) == pytest.approx(16 * whole * (1 - band))
    with pytest.raises(ValueError, match="windows must be 32 numbers of tokens"):
        replace(GPT, windows=(0, 2048))


def test_layers_with_windows_take_less_time_and_the_same_memory():
    mixed = replace(GPT, windows=(0, 2048) * 16)
    found, alike = pieces(mixed, seq_length=65536), pieces(seq_length=65536)
    assert Pieces.from_object(json.loads(found.to_json())) == found
    core, share = alike.times["core"].forward, mixed.core_share(1, 65536)
    plan = planned("helix", attention_range="block", layer_kinds=mixed.layer_kinds)
    costs = costs_of_plan(found, plan, Recompute.NONE).segments
    full, window = costs["attention.full"], costs["attention.window2048"]
    assert (
        full
        == costs_of_plan(alike, planned("helix", attention_range="block"), Recompute.NONE).segments[
            "attention"
        ]
    )
    assert full.forward - window.forward == pytest.approx(core * (1 - share))
    assert full.bytes == window.bytes
    stages = costs_of_plan(found, planned("1f1b"), Recompute.NONE).segments["stage1"]
    whole = costs_of_plan(alike, planned("1f1b"), Recompute.NONE).segments["stage1"]
    assert whole.forward - stages.forward == pytest.approx(2 * core * (1 - share))
    with pytest.raises(ValueError, match="segments named attention differ in what they recompute, in"):
        costs_of_plan(found, planned("helix"), Recompute.NONE)
    with pytest.raises(ValueError, match="not for windows"):
        costs_of_plan(found, planned("seq1f1b"), Recompute.NONE)


def test_layers_may_recompute_differently():
    found = pieces(seq_length=65536)
    levels = [Recompute.NONE, Recompute.PRODUCTS, Recompute.WITHOUT_ATTENTION, Recompute.FULL] * 8
    kinds = tuple(level.value for level in levels)
    plan = planned("helix", attention_range="block", layer_kinds=kinds)
    costs = costs_of_plan(found, plan, levels).segments
    alike = {
        level: costs_of_plan(found, planned("helix", attention_range="block"), level) for level in levels
    }
    for level in levels:
        assert costs[f"attention.{level.value}"] == alike[level].segments["attention"]
    assert costs["middle.none.products"] == alike[Recompute.NONE].segments["middle"]
    assert costs["last.full"] == alike[Recompute.FULL].segments["last"]
    stages = planned("1f1b")
    mixed = costs_of_plan(found, stages, levels).segments["stage1"]
    layers = [costs_of_plan(found, stages, level).segments["stage1"] for level in levels[:4]]
    assert mixed.bytes == sum(layer.bytes for layer in layers) // 4
    assert mixed.recompute == pytest.approx(sum(layer.recompute for layer in layers) / 4)
    with pytest.raises(ValueError, match="segments named middle differ in what they recompute, in"):
        costs_of_plan(found, planned("helix"), levels)
    with pytest.raises(ValueError, match="2 ways of recomputing for 32 layers"):
        costs_of_plan(found, stages, levels[:2])


def test_rounds_that_overlap_borrow_more_at_a_time():
    """FILO holds a round of loans, interlocked some more; the weights of 7 of 8 slots and 32 layers."""
    found = pieces(seq_length=131072)
    options = {"num_fold": 1, "attention_range": "block"}
    counts = found.workload.parameters
    one_round = 32 * 7 / 8 * (counts["qkv"] + counts["proj"]) * 2

    def borrowed(plan):
        return [
            cost.static_bytes - found.workload.static_bytes(parameters)
            for cost, parameters in zip(
                costs_of_plan(found, plan, Recompute.NONE).ranks, rank_parameters(found, plan), strict=True
            )
        ]

    filo = planned("helix", **options)
    assert borrowed(filo) == [one_round] * 8
    interlocked = borrowed(planned("helix", round_order="interlocked", m=32, **options))
    assert all(1.0 < found / one_round < 1.3 for found in interlocked)
    assert max(interlocked) > 1.1 * one_round
    assert borrowed(filo.forward_only())[0] < 0.2 * one_round, "evaluation gives weights back after F"


def test_memory_grows_with_what_is_kept():
    """Less recomputation never holds less, on any schedule."""
    found = pieces(seq_length=32768)
    for schedule in ("1f1b", "interleaved", "helix"):
        plan = planned(schedule, **SCHEDULE_OPTIONS.get(schedule, {}))
        peaks = [
            max(peak_bytes(plan, costs_of_plan(found, plan, recompute)))
            for recompute in (Recompute.FULL, Recompute.WITHOUT_ATTENTION, Recompute.PRODUCTS, Recompute.NONE)
        ]
        assert peaks == sorted(peaks)


# Kernels and precision as properties of a machine.


@pytest.mark.parametrize("machine", HARDWARE.values(), ids=HARDWARE)
def test_a_machine_uses_its_fastest_attention_kernel_unless_told(machine):
    fastest = machine.attention_kernels[0]
    assert machine.with_attention(fastest.name) == machine
    for kernel in machine.attention_kernels[1:]:
        slower = machine.with_attention(kernel.name)
        assert slower.attention_forward_efficiency == kernel.forward < fastest.forward
        assert slower.attention_backward_efficiency == kernel.backward < fastest.backward
        assert slower.attention_half_length == kernel.half_length


def test_backends_that_run_the_same_kernels_have_the_same_rates():
    h100 = HARDWARE["h100"]
    assert h100.with_attention("te-cudnn") == h100.with_attention("cudnn")
    assert h100.with_attention("aten-flash") == h100.with_attention("flash-attn-2")
    with pytest.raises(ValueError, match="flash-attn-3 on a800 is known; choose one of flash-attn-2, aten-f"):
        HARDWARE["a800"].with_attention("flash-attn-3")
    with pytest.raises(ValueError, match="aten-efficient on h100 is known; choose one of flash-attn-3, "):
        h100.with_attention("aten-efficient")
    nothing = replace(h100, attention_kernels=())
    with pytest.raises(ValueError, match="leave --attention-backend out"):
        nothing.with_attention("cudnn")


@pytest.mark.parametrize(
    ("backend", "tokens", "tflops"),
    [
        # FlashAttention-3's figure 5, H100, causal, head 128; its curve was not used beyond these points.
        ("flash-attn-3", 1024, 423),
        ("flash-attn-3", 4096, 579),
        ("flash-attn-3", 16384, 616),
        ("flash-attn-2", 1024, 260),
        ("flash-attn-2", 16384, 335),
        ("cudnn", 1024, 410),
        ("cudnn", 16384, 539),
    ],
)
def test_attention_has_the_published_rates_at_all_lengths(backend, tokens, tflops):
    machine = HARDWARE["h100"].with_attention(backend)
    found = predict_pieces(workload(LLAMA, seq_length=tokens, tensor_parallel=1), machine)
    reached = LLAMA.core_flops(tokens) / (found.times["core"].forward * 1e9)
    assert reached == pytest.approx(tflops, rel=0.06)


def test_a_short_product_leaves_half_a_wave_idle():
    """Whole waves of tiles take their time, and half a wave more on average."""
    machine = replace(HARDWARE["h100"], memory_gb_per_s=1e12)
    tokens, h = 128 * 132, 4096
    found = predict_pieces(workload(LLAMA, seq_length=tokens, tensor_parallel=1), machine)
    # fc2: 4096 channels are 16 tiles of 256; 132 rows of them are 16 waves.
    wave_ms = 132 * 2 * 128 * 256 * LLAMA.ffn_hidden_size / (989e9 * 0.7)
    assert found.times["fc2"].weight == pytest.approx(16.5 * wave_ms)
    exact = predict_pieces(
        workload(LLAMA, seq_length=tokens, tensor_parallel=1), replace(machine, idle_last_wave=0)
    )
    assert exact.times["fc2"].weight == pytest.approx(2 * tokens * h * LLAMA.ffn_hidden_size / (989e9 * 0.7))


def test_fp8_speeds_up_the_products_of_layers_and_pays_for_casts():
    machine = HARDWARE["h100"].without_short_kernel_losses()
    bf16, fp8 = (
        predict_pieces(workload(LLAMA, tensor_parallel=1, fp8_products=is_fp8), machine).times
        for is_fp8 in (False, True)
    )
    for piece in ("qkv", "proj", "fc1", "fc2"):
        assert bf16[piece].weight / fp8[piece].weight == pytest.approx(1979 * 0.62 / (989 * 0.70))
    # A cast reads 2 bytes and writes 1 in each of two layouts.
    ffn_bytes = 4 * 4096 * LLAMA.ffn_hidden_size
    saved = bf16["fc2"].weight - fp8["fc2"].weight
    cast = ffn_bytes / (3350e6 * 0.85)
    assert bf16["fc2"].forward - fp8["fc2"].forward == pytest.approx(saved - cast)
    for piece in ("embedding", "norm1", "core", "norm2", "head"):
        assert fp8[piece] == bf16[piece]


def test_fp8_keeps_the_inputs_of_products_in_half():
    plan = planned("1f1b", p=4)
    bf16, fp8 = (
        costs_of_plan(pieces(LLAMA, "h100", fp8_products=is_fp8), plan, Recompute.NONE)
        for is_fp8 in (False, True)
    )
    unit = 4096 * 4096 // 8
    halved = unit * (2 + LLAMA.ffn_hidden_size / 4096)
    saved = bf16.segments["stage1"].bytes - fp8.segments["stage1"].bytes
    assert saved == pytest.approx(8 * halved)
    # A weight has a copy in fp8, in both layouts.
    weights = 8 * LLAMA.layer_parameters // 8
    assert fp8.ranks[1].static_bytes - bf16.ranks[1].static_bytes == 2 * weights


def test_fp8_is_refused_where_there_is_none():
    with pytest.raises(ValueError, match="a100 has no fp8 matrix products; leave --fp8 out"):
        predict_pieces(workload(fp8_products=True), HARDWARE["a100"])
    with pytest.raises(ValueError, match="fp8 products need bf16"):
        workload(fp8_products=True, element_bytes=4)


def test_kernels_in_hardware_files(tmp_path):
    path = tmp_path / "rented.json"
    kernels = {"cudnn": {"forward": 0.5, "backward": 0.4}}
    path.write_text(json.dumps({"base": "h100", "attention_kernels": kernels}))
    found = read_hardware(str(path)).with_attention("cudnn")
    assert (found.attention_forward_efficiency, found.attention_half_length) == (0.5, 0)
    for text, message in [
        ('{"base": "h100", "attention_kernels": 1}', "attention_kernels needs the numbers forward"),
        ('{"base": "h100", "attention_kernels": {"cudnn": {"forward": 1}}}', "cudnn needs the numbers"),
        (
            '{"base": "h100", "attention_kernels": {"cudnn": {"forward": 2, "backward": 1}}}',
            "kernel cudnn needs shares of 1 above 0",
        ),
        ('{"base": "h100", "fp8_tflops": 0}', "fp8_tflops and fp8_matmul_efficiency go together"),
        ('{"base": "h100", "idle_last_wave": -1}', "idle_last_wave must be above 0"),
    ]:
        path.write_text(text)
        with pytest.raises(ValueError, match=r"^hardware ") as caught:
            read_hardware(str(path))
        assert message in str(caught.value)
