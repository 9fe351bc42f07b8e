"""Chunk costs from measurements, by regression (InfiniPipe, arXiv 2509.21275, section 4.2)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from helixpipe.elastic.costs.chunk_costs import ChunkCosts, PassTime
from helixpipe.json_input import parse_json

# One of so many records is kept from the regression to tell its error.
HELD_OUT = 4
_COEFFICIENTS = 3

Vector = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One chunk run through some layers on one stage.

    Attributes:
        context: tokens of earlier slices that the first piece attends to.
        lengths: tokens of each piece.
        forward_ms, backward_ms: of one forward and one backward.
        bytes: that the forward keeps on one GPU until the backward.
    """

    context: int
    lengths: tuple[int, ...]
    forward_ms: float
    backward_ms: float
    bytes: float

    @property
    def tokens(self) -> int:
        """Tokens of all pieces."""
        return sum(self.lengths)

    @property
    def area(self) -> int:
        """Attention area, as :attr:`helixpipe.elastic.chunks.Chunk.area`."""
        first, *rest = self.lengths
        return first * (2 * self.context + first) + sum(length * length for length in rest)


@dataclass(frozen=True)
class FitError:
    """Relative errors on held-out measurements: the mean and the largest of their absolute values."""

    mean: float
    largest: float

    def __str__(self) -> str:
        return f"{self.mean:.1%} on average, {self.largest:.1%} at most"


@dataclass(frozen=True)
class Fit:
    """Fitted costs, and what they miss on measurements that the regression did not see."""

    costs: ChunkCosts
    forward: FitError
    backward: FitError
    bytes: FitError
    num_held_out: int


def fit_costs(measurements: Sequence[Measurement], base: ChunkCosts, num_layers: int) -> Fit:
    """Fit times and kept bytes to ``measurements``; everything else is ``base``'s.

    Relative errors are minimised, with coefficients that are not negative: alpha1, alpha2 and beta1 of each
    direction, and the bytes per token. Communication between the GPUs of a stage becomes part of alpha2.
    Every fourth measurement, by area, is held out.

    Args:
        measurements: of chunks of different lengths, with and without context.
        base: sizes, states, network and head of the same model.
        num_layers: that were measured.

    Raises:
        ValueError: too few measurements, or too much alike, to tell the coefficients apart.
    """
    ordered = sorted(measurements, key=lambda m: (m.area, m.tokens, m.context, m.lengths))
    held_out = ordered[HELD_OUT // 2 :: HELD_OUT]
    used = [m for i, m in enumerate(ordered) if i % HELD_OUT != HELD_OUT // 2]
    shapes = {(m.area, m.tokens) for m in used}
    if len(shapes) < _COEFFICIENTS + 1 or not held_out:
        raise ValueError(
            f"{len(measurements)} measurements of {len(shapes)} different chunks are too few to fit "
            f"{_COEFFICIENTS} coefficients and to hold some out; measure at least 8 different chunks"
        )
    forward = _fit_pass(used, [m.forward_ms for m in used], base, base.forward, num_layers)
    backward = _fit_pass(used, [m.backward_ms for m in used], base, base.backward, num_layers)
    scale = num_layers / base.tensor_parallel
    per_token = np.array([scale * m.tokens / m.bytes for m in used])
    token_bytes = float(per_token.sum() / (per_token @ per_token))
    share = token_bytes / base.token_bytes
    costs = replace(
        base,
        source=f"{base.source.removesuffix(', predicted')}, fitted to {len(used)} measurements",
        forward=forward,
        backward=backward,
        token_bytes=token_bytes,
        cut=None if base.cut is None else base.cut.keeping(share),
        cuts_with_weights=tuple(cut.keeping(share) for cut in base.cuts_with_weights),
    )
    t = base.tensor_parallel
    return Fit(
        costs,
        _error([num_layers * forward.layer_time(m.area, m.tokens, t) / m.forward_ms for m in held_out]),
        _error([num_layers * backward.layer_time(m.area, m.tokens, t) / m.backward_ms for m in held_out]),
        _error([scale * token_bytes * m.tokens / m.bytes for m in held_out]),
        len(held_out),
    )


def _fit_pass(
    used: Sequence[Measurement],
    measured_ms: Sequence[float],
    base: ChunkCosts,
    old: PassTime,
    num_layers: int,
) -> PassTime:
    shares = np.array([[m.area, m.tokens, base.tensor_parallel] for m in used], dtype=float)
    matrix = shares * (num_layers / base.tensor_parallel) / np.array(measured_ms)[:, None]
    # Columns of one size: squared tokens and chunks are nine orders of magnitude apart.
    sizes = np.linalg.norm(matrix, axis=0)
    if np.linalg.matrix_rank(matrix / sizes) < _COEFFICIENTS:
        raise ValueError(
            "the measured chunks are too much alike to tell attention, tokens and fixed time apart; measure "
            "long and short ones, with and without context"
        )
    # Not with the module: loading it takes half a second, and training does not fit.
    from scipy.optimize import nnls

    found: Vector = nnls(matrix / sizes, np.ones(len(used)))[0] / sizes
    attention_ms, token_ms, layer_ms = (float(value) for value in found)
    return replace(old, attention_ms=attention_ms, token_ms=token_ms, layer_ms=layer_ms, communication_ms=0.0)


def _error(ratios: Sequence[float]) -> FitError:
    errors = [abs(ratio - 1) for ratio in ratios]
    return FitError(sum(errors) / len(errors), max(errors))


def measurements_from_json(text: str) -> tuple[Measurement, ...]:
    """Read a list of ``{"context": n, "lengths": [n, ...], "forward_ms": x, "backward_ms": x, "bytes": n}``.

    Raises:
        ValueError: it is none; the message names the record.
    """
    data = parse_json(text, "measurements")
    if not isinstance(data, list):
        raise ValueError("measurements: expected a list of records")
    return tuple(_measurement(number, record) for number, record in enumerate(data))


def measurements_to_json(measurements: Sequence[Measurement]) -> str:
    """The records that :func:`measurements_from_json` reads, one on a line."""
    return "[" + ",\n ".join(json.dumps(asdict(m)) for m in measurements) + "]\n"


def _measurement(number: int, record: Any) -> Measurement:
    keys = {"context", "lengths", "forward_ms", "backward_ms", "bytes"}
    if not isinstance(record, dict) or set(record) != keys:
        raise ValueError(f"measurements: record {number} must have exactly {', '.join(sorted(keys))}")
    lengths, context = record["lengths"], record["context"]
    if not isinstance(lengths, list) or not lengths or not all(type(n) is int and n > 0 for n in lengths):
        raise ValueError(f"measurements: record {number}: lengths must be whole numbers above 0")
    if type(context) is not int or context < 0:
        raise ValueError(f"measurements: record {number}: context must be a whole number, not negative")
    for key in ("forward_ms", "backward_ms", "bytes"):
        value = record[key]
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
            raise ValueError(f"measurements: record {number}: {key} must be a number above 0")
    return Measurement(**{**record, "lengths": tuple(lengths)})
