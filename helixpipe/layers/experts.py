"""Mixtures of experts: Megatron's own layers, and what computes less of them at a time or again."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.tensor_parallel import RowParallelLinear, set_tensor_model_parallel_attributes
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from helixpipe.contact_points import replace
from helixpipe.layers.module_specs import submodules_of
from helixpipe.layers.products import without_products
from helixpipe.layers.recompute import Tensors, recompute
from helixpipe.layers.slices import SlicedFunction, slice_mlp
from helixpipe.plan.cost_model import Recompute

_ROUTER = "megatron.core.transformer.moe.router:TopKRouter"


def prepare_routers() -> None:
    """Let Megatron's routers run without Transformer Engine, and count tokens without a compiler's start."""
    if not hasattr(moe_utils, "te_general_gemm"):
        replace(moe_utils.__name__, "te_general_gemm", None)
    count = TopKRouter._apply_expert_bias
    if inspect.unwrap(count) is not count:
        replace(_ROUTER, count.__name__, inspect.unwrap(count))


class BiasedExpertOutput(RowParallelLinear):
    """The second linear layer of an expert with biases, which no other rank shares; [n, ffn] -> [n, h].

    Megatron adds the bias in place to what this layer returns. After the sum over one rank that is a view of
    what a function of Megatron's has returned, which torch does not let change; so this one leaves sums to
    what sends the tokens back, as Megatron's own does wherever ranks share experts out.

    Tensor-parallel ranks have other tokens or other experts: the bias is no copy of theirs, whose gradients
    would be added up, and of which one would count for the norm.
    """

    def __init__(self, *args: Any, **arguments: Any) -> None:
        super().__init__(*args, **arguments)
        assert self.tp_group.size() == 1
        self.explicit_expert_comm = True
        self.bias.sequence_parallel = False
        set_tensor_model_parallel_attributes(self.bias, True, 0, 1)


def has_experts(config: TransformerConfig, layer: int) -> bool:
    """Whether a layer, from 0, of the whole model has a mixture of experts; the others have a dense MLP."""
    if config.num_moe_experts is None:
        return False
    frequency = config.moe_layer_freq
    return layer % frequency == 0 if isinstance(frequency, int) else bool(frequency[layer])


def add_biases(layer: ModuleSpec) -> None:
    """Let experts of Megatron's own linear layers have biases."""
    experts = submodules_of(layer.submodules.mlp).experts
    submodules_of(experts).linear_fc2 = BiasedExpertOutput


def keep_apart(model: torch.nn.Module) -> None:
    """Give experts gradient buffers and an optimizer of their own also where no ranks share them out.

    Megatron does so where some do. A checkpoint then has the same form either way.
    """
    for module in model.modules():
        if isinstance(module, MoELayer):
            for parameter in module.experts.parameters():
                parameter.allreduce = False


def is_of_expert(parameter: torch.nn.Parameter) -> bool:
    """Whether it is one of those that ranks may share out, whose gradients a group of their own reduces."""
    return not getattr(parameter, "allreduce", True)


def coupling_of_tokens(config: TransformerConfig) -> str | None:
    """What makes the routing, or the loss, of a token depend on the others of its micro batch; None: nothing.

    Where that is nothing, a part of a sequence is routed as it is in the whole.
    """
    if config.num_moe_experts is None:
        return None
    types, coefficients = config.moe_router_load_balancing_type, config.moe_aux_loss_coeff
    coefficients = coefficients if isinstance(coefficients, list) else [coefficients]
    couplings = {
        f"load balancing by {types}": types == "sinkhorn" or any(coefficients),
        "a z-loss": bool(config.moe_z_loss_coeff),
        "a capacity of experts": config.moe_expert_capacity_factor is not None,
    }
    return next((name for name, is_set in couplings.items() if is_set), None)


def unsupported_experts(config: TransformerConfig) -> dict[str, bool]:
    """What no schedule of ours supports of a mixture of experts, by name: whether the model has it."""
    types = config.moe_router_load_balancing_type
    return {
        # Each rank would add the whole bias to its part of the output.
        "biases of experts that ranks share (use --expert-tensor-parallel-size 1)": (
            config.num_moe_experts is not None
            and config.add_bias_linear
            and config.expert_tensor_parallel_size > 1
        ),
        "context parallelism, whose ranks route their own tokens, where these depend on others": (
            config.context_parallel_size > 1 and coupling_of_tokens(config) is not None
        ),
        "load balancing over a whole batch, which depends on the order of micro batches": "global_aux_loss"
        in types,
        "shared experts beside communication": config.moe_shared_expert_overlap,
        "latent experts": config.moe_latent_size is not None,
        "random noise for routers": config.moe_input_jitter_eps is not None
        or config.moe_router_force_load_balancing,
    }


def check_parts(config: TransformerConfig, whose: str) -> None:
    """``ValueError`` if tokens cannot be routed a part of a micro batch at a time, as ``whose`` parts are."""
    coupling = coupling_of_tokens(config)
    if coupling is not None:
        raise ValueError(
            f"{whose} routes the tokens of a part by themselves, which {coupling} does not allow; "
            "leave one out"
        )


def check_saving(
    mlp: MoELayer, config: TransformerConfig, level: Recompute, mlp_chunk_size: int | None
) -> None:
    """``ValueError`` for experts that cannot recompute, or run over slices, as is asked for."""
    if mlp_chunk_size is not None:
        check_parts(config, "--mlp-chunk-size")
    if level is Recompute.NONE and mlp_chunk_size is None:
        return
    if type(mlp.experts) is not SequentialMLP:
        raise ValueError(
            "experts that recompute, or run in slices, must run one by one; leave --moe-grouped-gemm out, or "
            "use --recompute-levels none and no --mlp-chunk-size"
        )
    if mlp_chunk_size is not None:
        slice_mlp(list(_linears(mlp)))


def sliced(norm: torch.nn.Module, mlp: MoELayer, size: int) -> SlicedFunction:
    """norm2 and the experts as a function of slices; tokens do not depend on each other."""

    def run(part: Tensor) -> Tensor:
        output: Tensor = mlp(norm(part))[0]
        return output

    return SlicedFunction(run, run, (*norm.parameters(), *mlp.parameters()), size)


def recomputing(norm: torch.nn.Module, mlp: MoELayer, level: Recompute, hidden: Tensor) -> Tensor:
    """norm2 and the experts, of which the backward pass computes the norm and the first halves again.

    Tokens are routed and sent once: between the passes stay the tokens as the experts have got them, and what
    shared experts compute. So the tokens of an expert are counted, and losses of the router added, once.

    Args:
        norm: norm2.
        mlp: whose experts run one by one.
        level: ``PRODUCTS``, or ``WITHOUT_ATTENTION``, which computes the first products again, too.
        hidden: [s, b, h].

    Returns:
        [s, b, h].
    """

    def route(normed: Tensor) -> Tensors:
        shared = () if mlp.shared_experts is None else (mlp.shared_experts_compute(normed),)
        return (*mlp.preprocess(normed, *mlp.route(normed)), *shared)

    dispatcher = mlp.token_dispatcher
    assert dispatcher is not None
    sent, sent_scales, *shared = recompute(lambda hidden: (norm(hidden),), route, hidden)
    tokens, counts, scales = dispatcher.dispatch_postprocess(*mlp.dispatch(sent, sent_scales))
    sizes = counts.tolist()
    parts = zip(mlp.experts.local_experts, tokens.split(sizes), scales.split(sizes), strict=True)
    outputs = [_run_expert(expert, level, part, scale) for expert, part, scale in parts]
    combined = mlp.combine(dispatcher.combine_preprocess(torch.cat(outputs)))
    output: Tensor = mlp.postprocess(combined, shared[0] if shared else None)
    return output


def _run_expert(expert: MLP, level: Recompute, tokens: Tensor, scales: Tensor) -> Tensor:
    """One expert over its tokens [n, h], which its router has given the weights [n]; [n, h]."""
    first, second = expert.linear_fc1, expert.linear_fc2
    # Transformer Engine's biases are never None.
    biases = (first.bias, second.bias) if expert.config.add_bias_linear else (None, None)
    activation = without_products(expert, linear_fc1=biases[0], linear_fc2=None)

    def activate(wide: Tensor, scales: Tensor) -> tuple[Tensor]:
        return (activation(wide, scales)[0],)

    def first_half(tokens: Tensor, scales: Tensor) -> tuple[Tensor]:
        return activate(first(tokens)[0], scales)

    def second_half(activated: Tensor) -> tuple[Tensor]:
        return (second(activated)[0],)

    if level is Recompute.PRODUCTS:
        (output,) = recompute(activate, second_half, first(tokens)[0], scales)
    else:
        (output,) = recompute(first_half, second_half, tokens, scales)
    return output if biases[1] is None else output + biases[1] * scales[:, None]


def _linears(mlp: MoELayer) -> Iterator[torch.nn.Module]:
    shared = () if mlp.shared_experts is None else (mlp.shared_experts,)
    for expert in (*mlp.experts.local_experts, *shared):
        yield from (expert.linear_fc1, expert.linear_fc2)
