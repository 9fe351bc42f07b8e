"""``python -m helixpipe.kernels`` builds them."""

from __future__ import annotations

import sys
from pathlib import Path

from helixpipe.commands.parser import ScriptParser
from helixpipe.kernels.build import CUDA, HOST, BuildError, build


def build_parser() -> ScriptParser:
    """The parser alone."""
    parser = ScriptParser(
        prog="python -m helixpipe.kernels", description="Build the CUDA kernels; needs nvcc, but no GPU."
    )
    parser.add_argument("--host", action="store_true", help="as loops of the processor, for tests")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="default: where it is imported from")
    return parser


def main() -> int:
    """Build and say where it is, or fail with what the compiler said."""
    options = build_parser().parse_args()
    try:
        print(f"kernels: {build(HOST if options.host else CUDA, options.output)}")
    except BuildError as error:
        print(f"kernels were not built: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
