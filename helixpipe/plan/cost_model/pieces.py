"""Pieces: the times of a layer's pieces, predicted or measured, in one form and one file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from helixpipe.plan.cost_model.shape import Experts, LatentAttention, ModelShape
from helixpipe.plan.cost_model.work import PIECES, Workload
from helixpipe.plan.simulation.network import BYTES_PER_MS, Network

FORMAT = "helixpipe-pieces"
VERSION = 1


@dataclass(frozen=True)
class PieceCost:
    """Milliseconds of one piece of one micro batch: forward, input gradient, weight gradient."""

    forward: float
    backward: float
    weight: float = 0.0

    @property
    def total(self) -> float:
        """Forward and whole backward."""
        return self.forward + self.backward + self.weight


@dataclass(frozen=True)
class Pieces:
    """What the pieces of a model cost on a machine.

    Attributes:
        source: where the times come from, for people.
        workload: the model and sizes they hold for.
        times: by name of ``PIECES``.
        network: links between pipeline ranks.
        reduction_gb_per_s: gradient bytes that GPUs with the same weights reduce per second, one direction.
        optimizer_ns: nanoseconds of the optimizer step per weight on one GPU.
        overhead_ms: of the executor per compute operation.
        multiprocessors: of one GPU, for what attention loses on short slices, see
            :mod:`helixpipe.plan.cost_model.slices`; 0 if unknown, or to leave that loss out.
    """

    source: str
    workload: Workload
    times: Mapping[str, PieceCost]
    network: Network
    reduction_gb_per_s: float
    optimizer_ns: float
    overhead_ms: float = 0.0
    multiprocessors: int = 0

    def __hash__(self) -> int:
        """Of what tells most pieces apart."""
        return hash((self.source, self.workload))

    def reduction_ms(self, parameters: int, *, of_experts: bool = False) -> float:
        """Milliseconds to sum the gradients of a GPU's weights over all GPUs that hold the same.

        A ring sends all parts but one twice: gradients in fp32, then their sum or the new weights.
        """
        ranks = self.workload.holders(of_experts=of_experts)
        sent = 4 + (self.workload.element_bytes if self.workload.distributed_optimizer else 4)
        return (ranks - 1) / ranks * parameters * sent / (self.reduction_gb_per_s * BYTES_PER_MS)

    def optimizer_ms(self, parameters: int, *, of_experts: bool = False) -> float:
        """Milliseconds of the optimizer step for a GPU's weights."""
        workload = self.workload
        shards = workload.holders(of_experts=of_experts) if workload.distributed_optimizer else 1
        return parameters / shards * self.optimizer_ns * 1e-6

    def to_json(self) -> str:
        """The profile file, read back by :meth:`from_object`."""
        data = {"format": FORMAT, "version": VERSION, **asdict(self)}
        return json.dumps(data, indent=1) + "\n"

    @classmethod
    def from_object(cls, data: Any) -> Pieces:
        """Read a profile file's JSON; ``ValueError`` says what is wrong with it."""
        if not isinstance(data, dict) or data.get("format") != FORMAT or data.get("version") != VERSION:
            raise ValueError(f'profile: "format" must be "{FORMAT}" and "version" {VERSION}')
        try:
            workload = dict(data["workload"])
            times = {name: PieceCost(**_times(cost)) for name, cost in data["times"].items()}
            pieces = cls(
                source=str(data["source"]),
                workload=Workload(**{**workload, "model": _shape(workload["model"])}),
                times=times,
                network=Network(**data["network"]),
                reduction_gb_per_s=_positive(data["reduction_gb_per_s"]),
                optimizer_ns=_positive(data["optimizer_ns"]),
                overhead_ms=float(data["overhead_ms"]),
                multiprocessors=_multiprocessors(data.get("multiprocessors", 0)),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"profile: wrong or missing field: {error}") from None
        if set(times) != set(PIECES):
            raise ValueError(f"profile: times must be given for {', '.join(PIECES)}")
        return pieces


def _shape(sizes: Any) -> ModelShape:
    experts, latent = sizes.get("experts"), sizes.get("latent")
    nested = {
        "windows": tuple(sizes.get("windows", ())),
        "experts": None if experts is None else Experts(**{**experts, "dense_layers": _dense(experts)}),
        "latent": None if latent is None else LatentAttention(**latent),
    }
    return ModelShape(**{**sizes, **nested})


def _dense(experts: Any) -> tuple[int, ...]:
    """Numbers of layers; files had how many, of the first, before any layer could be dense."""
    found = experts.get("dense_layers", ())
    return tuple(range(found)) if isinstance(found, int) else tuple(found)


def _times(cost: Any) -> dict[str, float]:
    known = {field.name for field in fields(PieceCost)}
    if not isinstance(cost, dict) or set(cost) != known:
        raise ValueError(f"profile: a piece needs {', '.join(sorted(known))}, found {cost!r:.60}")
    for key, value in cost.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
            raise ValueError(f"profile: {key} must be a number that is not negative, found {value!r:.60}")
    return cost


def _multiprocessors(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"profile: multiprocessors must be a whole number, found {value!r:.60}")
    return value


def _positive(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise ValueError(f"profile: expected a number above 0, found {value!r:.60}")
    return float(value)
