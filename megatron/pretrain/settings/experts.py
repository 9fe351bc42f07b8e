"""Options for mixtures of experts: their sizes, how tokens are routed, and which ranks share them."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from helixpipe.commands.parser import argument, flag_of
from helixpipe.commands.ranges import RANKS, Real, Whole
from helixpipe.plan.execution import Execution
from helixpipe.plan.layer_patterns import experts_of_layers, parse_expert_frequency
from helixpipe.refusals import refuse


def add_expert_arguments(parser: argparse.ArgumentParser) -> None:
    """The group of arguments."""
    add = parser.add_argument_group("mixture of experts").add_argument
    add("--num-experts", type=Whole(most=2**16), metavar="N", help="experts in the place of each MLP")
    add(
        "--moe-layer-freq",
        type=argument(parse_expert_frequency),
        default=1,
        metavar="N",
        help="every Nth layer, from the first, has experts; or 1 for experts or 0 for a dense MLP for each "
        "layer, like [0,1,1] or ([0]*3+[1]*58) (default: all layers have experts)",
    )
    add("--moe-ffn-hidden-size", type=Whole(), help="of one expert (default: --ffn-hidden-size)")
    add(
        "--moe-shared-expert-intermediate-size",
        type=Whole(),
        metavar="N",
        help="width of the experts that every token passes, together (default: none)",
    )
    _add_router_arguments(add)
    add(
        "--moe-expert-capacity-factor",
        type=Real(above=0.0),
        help="tokens that an expert takes, over an even share (default: all that it is sent)",
    )
    add(
        "--moe-token-drop-policy",
        choices=("probs", "position"),
        default="probs",
        help="which tokens it takes: the likeliest (default), or the first",
    )
    add(
        "--moe-grouped-gemm",
        action="store_true",
        help="all experts of a rank in one product, by Transformer Engine",
    )
    add(
        "--moe-token-dispatcher-type",
        choices=("allgather", "alltoall"),
        default="allgather",
        help="how tokens travel between ranks with experts (default allgather)",
    )
    add("--expert-model-parallel-size", type=RANKS, default=1, help="ranks of a stage that share experts out")
    add(
        "--expert-tensor-parallel-size",
        type=RANKS,
        help="ranks that share each expert (default: --tensor-model-parallel-size)",
    )


def _add_router_arguments(add: Callable[..., Any]) -> None:
    add("--moe-router-topk", type=Whole(), default=2, metavar="N", help="experts of a token (default 2)")
    add(
        "--moe-router-load-balancing-type",
        choices=("aux_loss", "seq_aux_loss", "sinkhorn", "none"),
        default="aux_loss",
        help="by a loss over a micro batch (default) or each of its sequences, or by assignment",
    )
    add("--moe-aux-loss-coeff", type=Real(least=0.0), default=0.0, help="weight of that loss (default 0)")
    add(
        "--moe-z-loss-coeff", type=Real(above=0.0), help="weight of a loss that keeps logits of routers small"
    )
    add("--moe-router-score-function", choices=("softmax", "sigmoid"), default="softmax")
    add(
        "--moe-router-pre-softmax",
        action="store_true",
        help="softmax over all experts, not over those that are chosen",
    )
    add("--moe-router-topk-scaling-factor", type=Real(above=0.0), help="of the scores of chosen experts")
    add("--moe-router-num-groups", type=Whole(), metavar="N", help="groups of experts")
    add("--moe-router-group-topk", type=Whole(), metavar="N", help="groups among which a token's experts are")
    add("--moe-router-dtype", choices=("fp32", "fp64"), help="default: that of activations")


def derive_experts(args: argparse.Namespace) -> None:
    """Set what was left out, and check that the options go together.

    Raises:
        ValueError: options that do not; the message says what would.
    """
    if args.expert_tensor_parallel_size is None:
        args.expert_tensor_parallel_size = args.tensor_model_parallel_size
    if args.num_experts is None:
        _refuse_without_experts(args)
        return
    has_experts = experts_of_layers(args.moe_layer_freq, args.num_layers)
    # What means the same has one form, which checkpoints compare.
    args.moe_layer_freq = 1 if all(has_experts) else has_experts
    if args.moe_ffn_hidden_size is None:
        args.moe_ffn_hidden_size = args.ffn_hidden_size
    _check_router(args)
    _check_layer(args)


def check_expert_ranks(args: argparse.Namespace) -> None:
    """``ValueError`` for experts that the ranks cannot share out; the layout must be known."""
    if args.num_experts is None:
        return
    if args.context_parallel_size > 1:
        refuse(
            couplings_of_tokens(args),
            "{} is about all tokens of a micro batch, and --context-parallel-size shares them out; leave one "
            "out",
        )
    experts, ep, etp = args.num_experts, args.expert_model_parallel_size, args.expert_tensor_parallel_size
    tp, width = args.tensor_model_parallel_size, args.moe_ffn_hidden_size
    if experts % ep:
        raise ValueError(
            f"--num-experts {experts} cannot be shared out evenly over --expert-model-parallel-size {ep}; "
            "use a divisor"
        )
    cp = args.context_parallel_size
    ranks = tp * cp * args.data_parallel_size
    if ranks % (ep * etp):
        raise ValueError(
            f"--expert-model-parallel-size {ep} x --expert-tensor-parallel-size {etp} must divide the "
            f"{ranks} ranks of a stage (tensor-parallel {tp} x context-parallel {cp} x data-parallel "
            f"{args.data_parallel_size}); use other sizes, or more ranks"
        )
    if etp > 1 and args.add_bias_linear:
        # Each of the ranks would add the whole bias to its part of an expert's output.
        raise ValueError(
            "experts with biases are whole on a rank; add --expert-tensor-parallel-size 1, or "
            "--disable-bias-linear"
        )
    if width % etp:
        raise ValueError(
            f"--moe-ffn-hidden-size {width} must be a multiple of --expert-tensor-parallel-size {etp}"
        )
    if tp > 1 and not args.sequence_parallel:
        raise ValueError("--num-experts with --tensor-model-parallel-size needs --sequence-parallel; add it")


def _refuse_without_experts(args: argparse.Namespace) -> None:
    parser = argparse.ArgumentParser()
    add_expert_arguments(parser)
    defaults = vars(parser.parse_args([])) | {"expert_tensor_parallel_size": args.tensor_model_parallel_size}
    refuse(
        {flag_of(name): getattr(args, name) != default for name, default in defaults.items()},
        "{} needs --num-experts; add it, or leave the other out",
    )


def couplings_of_tokens(args: argparse.Namespace) -> dict[str, bool]:
    """Options that are about all tokens of a micro batch: whether each is given."""
    return {
        "--moe-aux-loss-coeff": args.moe_aux_loss_coeff > 0,
        "--moe-z-loss-coeff": args.moe_z_loss_coeff is not None,
        "--moe-expert-capacity-factor": args.moe_expert_capacity_factor is not None,
        "--moe-router-load-balancing-type sinkhorn": args.moe_router_load_balancing_type == "sinkhorn",
    }


def check_experts_under(args: argparse.Namespace, execution: Execution | None) -> None:
    """``ValueError`` for experts that do not go with a schedule."""
    if args.num_experts is None or execution is None:
        return
    if execution.cuts_sequences:
        refuse(
            couplings_of_tokens(args),
            f"{{}} is about all tokens of a micro batch, and {args.pipeline_schedule} runs them in parts; "
            "leave it out, or use another schedule",
        )
    if not execution.joins_documents and args.expert_model_parallel_size > 1:
        raise ValueError(
            f"--expert-model-parallel-size does not go with {args.pipeline_schedule}, under which every "
            "data-parallel rank has chunks of its own; use 1"
        )
    if not execution.joins_documents and args.moe_layer_freq != 1:
        raise ValueError(
            f"--moe-layer-freq does not go with {args.pipeline_schedule}, which plans for layers that are "
            "all alike; leave it out, or use another schedule"
        )
    if execution is Execution.ROUNDS:
        raise ValueError(
            f"--num-experts does not go with {args.pipeline_schedule}; leave it out, or use elastic"
        )


def _check_router(args: argparse.Namespace) -> None:
    topk, experts, balancing = args.moe_router_topk, args.num_experts, args.moe_router_load_balancing_type
    if topk > experts:
        raise ValueError(f"--moe-router-topk {topk} of --num-experts {experts}; use at most {experts}")
    is_loss = balancing in ("aux_loss", "seq_aux_loss")
    if args.moe_aux_loss_coeff and not is_loss:
        raise ValueError(
            f"--moe-aux-loss-coeff does not apply to --moe-router-load-balancing-type {balancing}; remove it"
        )
    if args.moe_expert_capacity_factor is not None and balancing == "sinkhorn":
        raise ValueError("--moe-expert-capacity-factor does not go with balancing by sinkhorn; leave one out")
    if args.moe_token_drop_policy != "probs" and args.moe_expert_capacity_factor is None:
        raise ValueError("--moe-token-drop-policy needs --moe-expert-capacity-factor; add it")
    is_softmax = args.moe_router_score_function == "softmax"
    if topk == 1 and is_softmax and not args.moe_router_pre_softmax and balancing != "sinkhorn":
        # Softmax over one expert is 1, whatever the router says.
        raise ValueError("--moe-router-topk 1 needs --moe-router-pre-softmax; add it")
    _check_groups(args)


def _check_groups(args: argparse.Namespace) -> None:
    groups, chosen = args.moe_router_num_groups, args.moe_router_group_topk
    if (groups is None) != (chosen is None):
        raise ValueError("--moe-router-num-groups and --moe-router-group-topk need each other; give both")
    if groups is None:
        return
    if args.num_experts % groups or chosen > groups or args.moe_router_topk % chosen:
        raise ValueError(
            f"--moe-router-num-groups {groups} must divide --num-experts {args.num_experts}, and "
            f"--moe-router-group-topk {chosen} must be at most that and divide --moe-router-topk "
            f"{args.moe_router_topk}"
        )


def _check_layer(args: argparse.Namespace) -> None:
    refuse(
        {
            "--num-experts does not go with --sandwich-norm; leave one out": args.sandwich_norm,
            "--moe-shared-expert-intermediate-size needs --disable-bias-linear; add it": (
                args.moe_shared_expert_intermediate_size is not None and args.add_bias_linear
            ),
            "--moe-grouped-gemm needs --transformer-impl transformer_engine; leave it out or use that": (
                args.moe_grouped_gemm and args.transformer_impl == "local"
            ),
        },
        "{}",
    )
    if args.mlp_chunk_size is not None:
        refuse(
            couplings_of_tokens(args),
            "{} is about all tokens of a micro batch, and --mlp-chunk-size runs them in parts; leave one out",
        )
