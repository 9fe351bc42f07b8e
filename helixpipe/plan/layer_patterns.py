"""Which layers have something that others have not, as Megatron's options say it."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence

_EXPRESSION = re.compile(r"[][()0-9*+, ]{1,2000}", re.ASCII)
_PERIOD = re.compile(r"[1-9][0-9]{0,3}", re.ASCII)
_MOST_LAYERS = 10_000

# Every how many layers, from the first, one has experts; or for each layer, 1 for experts.
ExpertFrequency = int | tuple[int, ...]


def find_pattern(text: str) -> tuple[int, ...] | None:
    """``([1]*3+[0])*2`` or ``[1,1,0]``: 1 or 0 for each layer; None for another text."""
    if not _EXPRESSION.fullmatch(text):
        return None
    try:
        return tuple(_digits_of(ast.parse(text.strip(), mode="eval").body))
    except (SyntaxError, ValueError):
        return None


def _digits_of(node: ast.expr) -> list[int]:
    match node:
        case ast.List(elts=[_, *_] as elements):
            found = [_digit(element) for element in elements]
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            found = _digits_of(left) + _digits_of(right)
        case ast.BinOp(left=left, op=ast.Mult(), right=ast.Constant(value=int(times))):
            part = _digits_of(left)
            found = part * times if len(part) * times <= _MOST_LAYERS else []
        case _:
            raise ValueError("not a pattern")
    if not 1 <= len(found) <= _MOST_LAYERS:
        raise ValueError("of no layer, or of too many")
    return found


def _digit(node: ast.expr) -> int:
    if isinstance(node, ast.Constant) and isinstance(node.value, int) and node.value in (0, 1):
        return node.value
    raise ValueError("neither 0 nor 1")


def parse_expert_frequency(text: str) -> ExpertFrequency:
    """``2``, ``[0,1,1]`` or ``([0]*3+[1]*58)`` of ``--moe-layer-freq``.

    Raises:
        ValueError: anything else.
    """
    if _PERIOD.fullmatch(text):
        return int(text)
    found = find_pattern(text)
    if found is None:
        raise ValueError(
            f"{text[:40]!r} says not which layers have experts; give a period like 2, or 1 or 0 for each "
            "layer, like [0,1,1] or ([0]*3+[1]*58)"
        )
    return found


def experts_of_layers(frequency: ExpertFrequency, num_layers: int) -> tuple[int, ...]:
    """1 for each layer with experts, 0 for each with a dense MLP.

    Raises:
        ValueError: a pattern of another number of layers, or one without experts.
    """
    if isinstance(frequency, int):
        return tuple(int(layer % frequency == 0) for layer in range(num_layers))
    if len(frequency) != num_layers:
        raise ValueError(
            f"--moe-layer-freq has {len(frequency)} layers, and --num-layers is {num_layers}; give one "
            "number for each"
        )
    if not any(frequency):
        raise ValueError("--moe-layer-freq leaves no layer with experts; leave --num-experts out instead")
    return frequency


def kinds_of_mlps(has_experts: Sequence[int]) -> list[str]:
    """A name for each layer by its MLP, ``experts`` or ``dense``; none if all are alike."""
    names = ["experts" if has else "dense" for has in has_experts]
    return names if len(set(names)) > 1 else []
