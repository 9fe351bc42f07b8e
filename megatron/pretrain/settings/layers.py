"""Options for what a layer computes: norms, activation functions, scales and windows."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from helixpipe.commands.parser import argument, flag_of
from helixpipe.commands.ranges import Real
from helixpipe.plan.windows import parse_skip_frequency, parse_window, windows_of_layers

# Activation functions of gated MLPs.
GATES = ("swiglu", "geglu", "quick_geglu")


def add_layer_arguments(add: Callable[..., Any]) -> None:
    """Add them, by a group's ``add_argument``."""
    add("--normalization", choices=("LayerNorm", "RMSNorm"), default="LayerNorm")
    add("--norm-epsilon", type=Real(above=0.0, below=1.0), default=1e-5)
    add("--swiglu", action="store_true")
    add(
        "--geglu",
        action="store_true",
        help="a gated MLP with GELU by its approximation with tanh, as in Gemma",
    )
    add("--quick-geglu", action="store_true", help="a gated MLP with x * sigmoid(1.702 x), as in gpt-oss")
    add(
        "--glu-linear-offset",
        type=Real(),
        default=0.0,
        help="added to what the gate multiplies (default 0)",
    )
    add(
        "--activation-func-clamp-value",
        type=Real(above=0.0),
        metavar="C",
        help="a gate is at most C, what it multiplies within C of 0 (default: any)",
    )
    add("--apply-layernorm-1p", action="store_true", help="norms multiply by 1 + weight")
    add("--sandwich-norm", action="store_true", help="a norm after attention and MLP, too, as in Gemma 3")
    add("--scale-embedding", action="store_true", help="multiply the embedding by the root of --hidden-size")
    add("--softmax-scale", type=Real(above=0.0), help="factor of the scores (default: 1 / root of head size)")
    add(
        "--softmax-type",
        choices=("vanilla", "off-by-one", "learnable"),
        default="vanilla",
        help="attention sinks: scores of one more key without a value, 0 or learned for each head",
    )
    add(
        "--attn-logit-softcapping",
        type=Real(above=0.0),
        metavar="C",
        help="scores x become C * tanh(x / C), as in Gemma 2",
    )
    add("--final-logit-softcapping", type=Real(above=0.0), metavar="C", help="and so do logits")
    add("--openai-gelu", action="store_true", help="GELU by its approximation with tanh, as in GPT-2")
    add("--qk-layernorm", action="store_true")
    add(
        "--window-size",
        type=argument(parse_window),
        metavar="N,0",
        help="tokens before its own that a token sees (default: all)",
    )
    add(
        "--window-attn-skip-freq",
        type=argument(parse_skip_frequency),
        metavar="N",
        help="with --window-size: every Nth layer sees all tokens; or 1 for a window or 0 for each layer, "
        "like [1,1,0] (default: all layers have windows)",
    )


def check_layers(args: argparse.Namespace) -> None:
    """``ValueError`` for options that do not go together; the message says what would."""
    given = [name for name in (*GATES, "openai_gelu") if getattr(args, name)]
    if len(given) > 1:
        raise ValueError(
            f"{flag_of(given[0])} and {flag_of(given[1])} are two activation functions; leave one out"
        )
    for name, default in (("glu_linear_offset", 0.0), ("activation_func_clamp_value", None)):
        if getattr(args, name) != default and not any(getattr(args, gate) for gate in GATES):
            raise ValueError(
                f"{flag_of(name)} is for a gated MLP; add {' or '.join(map(flag_of, GATES))}, or leave it out"
            )
    if args.rotary_base_local is not None and args.window_size is None:
        raise ValueError("--rotary-base-local needs --window-size; add it, or leave the base out")
    if args.window_attn_skip_freq is not None and args.window_size is None:
        raise ValueError("--window-attn-skip-freq needs --window-size; add it, or leave the frequency out")
    windows_of_layers(args.window_size, args.window_attn_skip_freq, args.num_layers)
