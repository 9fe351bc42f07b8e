"""Chunk costs from the analytic model, to plan without a machine, or from a profile of the pieces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from helixpipe.elastic.costs.chunk_costs import ChunkCosts, PassTime
from helixpipe.elastic.costs.layer_cut import CutLevel, LayerCut
from helixpipe.plan.cost_model import Hardware, PieceCost, Pieces, Recompute, Workload, predict_pieces
from helixpipe.plan.cost_model.levels import LEVELS
from helixpipe.plan.cost_model.recomputation import cut
from helixpipe.plan.cost_model.segments import cut_layer_cost
from helixpipe.plan.cost_model.work import GRADIENT_BYTES, LAYER_PIECES

# A link so fast that what remains of a prediction is computation.
_FREE_GB_PER_S = 1e12


def predict_chunk_costs(workload: Workload, hardware: Hardware, num_stages: int) -> ChunkCosts:
    """What chunks of ``workload``'s model cost on ``hardware``.

    The analytic model's times are exactly linear in the tokens, and quadratic in the core, so that
    one sequence length tells all coefficients; ``workload.seq_length`` does not matter. The embedding's time,
    a thousandth of a stage's, is left out, and so are the
    losses of short kernels, which measured chunks tell.

    Args:
        workload: model, tensor-parallel size and precision.
        hardware: rates.
        num_stages: pipeline-parallel size, over which an operation's fixed time is told per layer.
    """
    workload = replace(workload, micro_batch_size=1, seq_length=8192)
    hardware = hardware.without_short_kernel_losses()
    unlinked = replace(hardware, nvlink_gb_per_s=_FREE_GB_PER_S, nic_gb_per_s=_FREE_GB_PER_S)
    with_links = predict_pieces(workload, hardware)
    without = predict_pieces(workload, unlinked)
    model, t, tokens = workload.model, workload.tensor_parallel, workload.tokens
    layer_ms = with_links.overhead_ms * num_stages / model.num_layers
    passes = [
        _pass_time(with_links.times, without.times, tokens, t, layer_ms, backward=backward)
        for backward in (False, True)
    ]
    source = f"{model.name} on {hardware.name}, predicted"
    return _costs(with_links, num_stages, passes, source)


def profiled_chunk_costs(pieces: Pieces, num_stages: int) -> ChunkCosts:
    """What chunks cost by a profile of one sequence length, whose coefficients measured chunks should refine.

    Args:
        pieces: the profile; of one sequence per micro batch.
        num_stages: pipeline-parallel size.
    """
    workload = pieces.workload
    tokens, t = workload.tokens, workload.tensor_parallel
    assert workload.micro_batch_size == 1
    passes = [
        _pass_time(pieces.times, pieces.times, tokens, t, 0.0, backward=backward)
        for backward in (False, True)
    ]
    return _costs(pieces, num_stages, passes, pieces.source)


def _costs(pieces: Pieces, num_stages: int, passes: Sequence[PassTime], source: str) -> ChunkCosts:
    """Costs with the bytes of the pieces' model."""
    workload = pieces.workload
    if workload.model.beside_dense:
        raise ValueError(
            f"{workload.model.name} has {', '.join(workload.model.beside_dense)}, of which chunks know no "
            "costs; use another schedule"
        )
    model, t, tokens = workload.model, workload.tensor_parallel, workload.tokens
    kept = workload.kept_tensors
    parameters = workload.parameters
    layer = sum(parameters[piece] for piece in ("qkv", "proj", "fc1", "fc2"))
    # Without recomputation the residual is norm2's input.
    layer_bytes = sum(size for name, size in kept.items() if name != "residual")
    return ChunkCosts(
        source=source,
        forward=passes[0],
        backward=passes[1],
        token_bytes=layer_bytes * t / tokens,
        input_bytes=workload.unit_bytes * t / tokens,
        kv_bytes=1.0 * model.key_value_size * workload.element_bytes,
        kv_gradient_bytes=1.0 * model.key_value_size * max(workload.element_bytes, GRADIENT_BYTES),
        logits_bytes=workload.head_bytes * t / tokens,
        head_workspace_bytes=workload.head_workspace_bytes * t / tokens,
        layer_workspace_bytes=workload.layer_workspace_bytes * t / tokens,
        tensor_parallel=t,
        token_multiple=workload.sharded,
        layer_state_bytes=workload.static_bytes(layer),
        embedding_state_bytes=workload.static_bytes(parameters["embedding"]),
        head_state_bytes=workload.static_bytes(parameters["head"]),
        shared_state_bytes=workload.static_bytes(parameters["head"]) if model.tied else 0,
        network=pieces.network,
        cut=_cut(pieces, "core"),
        cuts_with_weights=(_cut(pieces, "qkv"), _cut(pieces, "block")),
    )


def _cut(pieces: Pieces, attention_range: str) -> LayerCut:
    """How a layer's costs fall to what precedes attention, attention, and what follows it."""
    workload = pieces.workload
    t, tokens = workload.tensor_parallel, workload.tokens
    kept = workload.kept_tensors
    held = workload.held_parameters(workload.model.num_layers - 1)
    qkv = held["qkv"] if attention_range != "core" else 0
    projection, after = (held["proj"], 0) if attention_range == "block" else (0, held["proj"])
    # On one GPU: what follows the last attention, and the head.
    last = after + held["mlp"] + workload.parameters["head"]
    crossing = cut(attention_range, Recompute.NONE)
    into, out = (sum(kept[name] for name in names) * t / tokens for names in (crossing.into, crossing.out))
    before = ("norm1", "qkv")
    beside = ("proj",) if attention_range == "block" else ()
    weight_bytes, gradient_bytes = workload.element_bytes * t, GRADIENT_BYTES * t
    return LayerCut(
        forward_before=_share_of(before, pieces, backward=False),
        backward_before=_share_of(before, pieces, backward=True),
        into_bytes=into,
        out_bytes=out,
        levels=tuple(_level(pieces, level, attention_range) for level in LEVELS),
        attention_range=attention_range,
        forward_with=_share_of(beside, pieces, backward=False),
        backward_with=_share_of(beside, pieces, backward=True),
        operation_ms=pieces.overhead_ms,
        lent_weight_bytes=last * weight_bytes,
        lent_gradient_bytes=last * gradient_bytes,
        qkv_weight_bytes=qkv * weight_bytes,
        qkv_gradient_bytes=qkv * gradient_bytes,
        projection_weight_bytes=projection * weight_bytes,
        projection_gradient_bytes=projection * gradient_bytes,
    )


def _share_of(names: Sequence[str], pieces: Pieces, *, backward: bool) -> float:
    """Of a layer's time that is linear in tokens, what some pieces take."""
    times = {name: _direction(pieces.times[name], backward) for name in LAYER_PIECES if name != "core"}
    return sum(times[name] for name in names) / sum(times.values())


def _level(pieces: Pieces, recompute: Recompute, attention_range: str) -> CutLevel:
    found = cut_layer_cost(pieces, recompute, attention_range)
    scale = pieces.workload.tensor_parallel / pieces.workload.tokens
    linear_ms = sum(pieces.times[name].forward for name in LAYER_PIECES if name != "core")
    is_apart = attention_range != "core"
    return CutLevel(
        recompute=recompute.value,
        before_bytes=found.before.bytes * scale,
        attention_bytes=found.attention.bytes * scale,
        after_bytes=found.after.bytes * scale,
        workspace_bytes=found.between.workspace_bytes * scale,
        before_workspace_bytes=found.before.workspace_bytes * scale if is_apart else 0.0,
        attention_workspace_bytes=found.attention.workspace_bytes * scale,
        before_again=found.before.recompute / linear_ms,
        after_again=found.after.recompute / linear_ms,
    )


def _pass_time(
    with_links: Mapping[str, PieceCost],
    without: Mapping[str, PieceCost],
    tokens: int,
    tensor_parallel: int,
    layer_ms: float,
    *,
    backward: bool,
) -> PassTime:
    def linear_ms(times: Mapping[str, PieceCost]) -> float:
        return sum(_direction(times[piece], backward) for piece in LAYER_PIECES if piece != "core")

    core_ms = _direction(without["core"], backward)
    linear = linear_ms(without)
    return PassTime(
        attention_ms=core_ms * tensor_parallel / tokens**2,
        token_ms=linear * tensor_parallel / tokens,
        layer_ms=layer_ms,
        communication_ms=max(0.0, linear_ms(with_links) - linear) / tokens,
        head_ms=_direction(with_links["head"], backward) * tensor_parallel / tokens,
    )


def _direction(cost: PieceCost, backward: bool) -> float:
    return cost.backward + cost.weight if backward else cost.forward
