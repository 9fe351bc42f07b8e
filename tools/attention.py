"""Show the attention backends, and which of them work on this machine.

python tools/attention.py --dtype bf16 --head-size 128
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# megatron.core warns at import about every optional package that is not installed.
warnings.filterwarnings("ignore", module="megatron.core")

import torch  # noqa: E402

from helixpipe.commands.parser import ScriptParser  # noqa: E402
from helixpipe.commands.ranges import Real, Whole  # noqa: E402
from helixpipe.layers.attention.choice import AUTO, choose, markdown_table, place  # noqa: E402
from helixpipe.layers.attention.interface import AttentionProblem  # noqa: E402

_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def build_parser() -> ScriptParser:
    """The options."""
    parser = ScriptParser(prog="attention", description=__doc__.splitlines()[0] if __doc__ else None)
    add = parser.add_argument
    add("--dtype", choices=_TYPES, default="bf16", help="of query, key and value (default bf16)")
    add("--head-size", type=Whole(), default=128, help="default 128")
    add("--num-attention-heads", type=Whole(), default=8, help="on one rank (default 8)")
    add("--num-query-groups", type=Whole(), default=8, help="on one rank (default 8)")
    add("--softcap", type=Real(above=0.0), help="of the scores (default: none)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table of backends, and what is chosen here for both uses."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    if options.num_attention_heads % options.num_query_groups:
        parser.error("--num-attention-heads must be a multiple of --num-query-groups")
    print(markdown_table())
    for varies, use in ((False, "whole sequences"), (True, "packed sequences and slices")):
        problem = AttentionProblem(
            *place(),
            dtype=_TYPES[options.dtype],
            head_size=options.head_size,
            heads=options.num_attention_heads,
            groups=options.num_query_groups,
            varies=varies,
            softcap=options.softcap or 0.0,
        )
        print(f"\nhere, for {use}: {choose(AUTO, problem)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
