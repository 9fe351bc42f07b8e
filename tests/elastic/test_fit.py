"""Regression: coefficients come back, noise is told, and too little is refused."""

import json
import random
from dataclasses import replace

import pytest

from helixpipe.elastic import Chunk, PassTime, Piece, fit_costs, ideal_costs, measurements_from_json

LAYERS = 4
TRUE = replace(
    ideal_costs(token_bytes=40.0),
    forward=PassTime(attention_ms=3e-8, token_ms=1e-3, layer_ms=0.2),
    backward=PassTime(attention_ms=8e-8, token_ms=2e-3, layer_ms=0.3),
    tensor_parallel=2,
)


def records(noise=0.0):
    chance = random.Random(0)

    def noisy(value):
        return value * (1 + noise * chance.uniform(-1, 1))

    found = []
    for context in (0, 4096, 32768):
        for lengths in ([512], [4096], [16384], [1024, 512, 256], [65536], [8192, 8192]):
            pieces = [Piece(0, context, lengths[0], context + lengths[0])]
            pieces += [Piece(i, 0, n, n) for i, n in enumerate(lengths[1:], 1)]
            chunk = Chunk(tuple(pieces)) if context == 0 or len(lengths) == 1 else Chunk((pieces[0],))
            found.append(
                {
                    "context": context,
                    "lengths": list(chunk.lengths),
                    "forward_ms": noisy(TRUE.forward_ms(chunk, LAYERS, is_last=False)),
                    "backward_ms": noisy(TRUE.backward_ms(chunk, LAYERS, is_last=False)),
                    "bytes": noisy(LAYERS * 40 * chunk.tokens / 2),
                }
            )
    return found


def test_exact_measurements_give_the_coefficients_back():
    fit = fit_costs(measurements_from_json(json.dumps(records())), TRUE, LAYERS)
    for direction in ("forward", "backward"):
        found, true = getattr(fit.costs, direction), getattr(TRUE, direction)
        assert found.attention_ms == pytest.approx(true.attention_ms)
        assert found.token_ms == pytest.approx(true.token_ms)
        assert found.layer_ms == pytest.approx(true.layer_ms)
    assert fit.costs.token_bytes == pytest.approx(40)
    assert fit.forward.largest < 1e-9
    assert fit.bytes.largest < 1e-9
    assert fit.num_held_out == 4


def test_noise_shows_in_the_held_out_error():
    fit = fit_costs(measurements_from_json(json.dumps(records(noise=0.03))), TRUE, LAYERS)
    assert 0 < fit.forward.mean <= fit.forward.largest < 0.05
    assert 0 < fit.backward.largest < 0.05
    assert str(fit.forward).endswith("at most")


def test_what_cannot_be_fitted():
    with pytest.raises(ValueError, match="measure at least 8 different chunks"):
        fit_costs(measurements_from_json(json.dumps(records()[:3])), TRUE, LAYERS)
    alike = [
        {"context": 0, "lengths": [64] * n, "forward_ms": n, "backward_ms": n, "bytes": n}
        for n in range(1, 13)
    ]
    with pytest.raises(ValueError, match="too much alike"):
        fit_costs(measurements_from_json(json.dumps(alike)), TRUE, LAYERS)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lengths": []}, "record 0: lengths"),
        ({"lengths": [0]}, "record 0: lengths"),
        ({"context": -1}, "record 0: context"),
        ({"forward_ms": 0}, "record 0: forward_ms must be a number above 0"),
        ({"extra": 1}, "record 0 must have exactly backward_ms, bytes, context"),
    ],
)
def test_wrong_records(change, words):
    with pytest.raises(ValueError, match=words):
        measurements_from_json(json.dumps([{**records()[0], **change}]))
    with pytest.raises(ValueError, match="expected a list"):
        measurements_from_json("{}")
