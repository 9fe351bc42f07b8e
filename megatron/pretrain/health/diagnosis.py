"""Find where a number that is not finite came from: the step is computed again, with eyes on every module."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch

from helixpipe.plan.operation import Kind
from helixpipe.runtime.trace import Trace
from megatron.pretrain.checkpoint.parameter_names import canonical_modules

_ADDED_TO_RESIDUAL = ("self_attention.linear_proj", "mlp.linear_fc2")


class Finding(NamedTuple):
    """Where a rank first met a number that is not finite while it computed a micro batch.

    Attributes:
        order: position along the model, first segments first in forward and last in backward: of the
            findings of one micro batch the lowest is the origin.
    """

    micro_batch: int
    is_backward: bool
    order: int
    inherited: bool
    where: str


def is_finite(value: Any) -> bool:
    """True unless a tensor, or one in a tuple, has a number that is not finite."""
    if isinstance(value, torch.Tensor):
        return not value.is_floating_point() or bool(torch.isfinite(value).all())
    return not isinstance(value, (tuple, list)) or all(map(is_finite, value))


class Probe:
    """Watches the modules of this rank; every check waits for the device.

    Args:
        chunks: model chunks.
        trace: tells which operation is running.

    Attributes:
        findings: at most one per micro batch and direction.
    """

    def __init__(self, chunks: list[torch.nn.Module], trace: Trace) -> None:
        self._chunks = chunks
        self._trace = trace
        self._seen: dict[tuple[int, bool], Finding] = {}

    @property
    def findings(self) -> list[Finding]:
        """What was met."""
        return list(self._seen.values())

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch inside the context."""
        hooks = [
            module.register_forward_hook(
                lambda _, inputs, output, name=name: self._look(name, inputs, output)
            )
            for chunk in self._chunks
            for name, module in canonical_modules(chunk)
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _look(self, name: str, inputs: Any, output: Any) -> None:
        operation = self._trace.current
        if operation is not None and operation.kind is Kind.F and not is_finite(output):
            inherited = not is_finite(inputs)
            self._note(False, inherited, f"the {'input' if inherited else 'output'} of {name}")
        for tensor in output if isinstance(output, tuple) else (output,):
            if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
                tensor.register_hook(lambda gradient: self._look_back(name, gradient))

    def _look_back(self, name: str, gradient: torch.Tensor) -> None:
        if not is_finite(gradient):
            self._note(True, False, f"the gradient of the output of {name}")

    def _note(self, is_backward: bool, inherited: bool, where: str) -> None:
        operation = self._trace.current
        if operation is not None:
            order = -operation.segment if is_backward else operation.segment
            found = Finding(operation.micro_batch, is_backward, order, inherited, where)
            self._seen.setdefault((operation.micro_batch, is_backward), found)


class LayerSums:
    """Sums of what every layer adds to the residual stream: not finite where one of its numbers is not.

    They are what is left of a step's forward when it has failed, for a fault that does not come again. Taken
    on the device and looked at only then, they cost one reading of two tensors per layer and micro batch.

    Args:
        chunks: model chunks, whose modules are watched from here on.
        trace: tells which operation is running.
    """

    def __init__(self, chunks: list[torch.nn.Module], trace: Trace) -> None:
        self._trace = trace
        self._sums: dict[tuple[int, int, str], torch.Tensor] = {}
        for chunk in chunks:
            for name, module in canonical_modules(chunk):
                if name.endswith(_ADDED_TO_RESIDUAL):
                    module.register_forward_hook(partial(self._add, name))

    def forget(self) -> None:
        """A new iteration begins."""
        self._sums.clear()

    @property
    def findings(self) -> list[Finding]:
        """Every sum that is not finite, in the order of execution."""
        return [
            Finding(micro_batch, False, segment, False, f"the output of {name}")
            for (micro_batch, segment, name), total in self._sums.items()
            if not is_finite(total)
        ]

    def _add(self, name: str, module: torch.nn.Module, inputs: Any, output: Any) -> None:
        operation = self._trace.current
        if not module.training or operation is None or operation.kind is not Kind.F:
            return
        first = output[0] if isinstance(output, tuple) else output
        key = (operation.micro_batch, operation.segment, name)
        total = first.detach().sum(dtype=torch.float32)
        # In chunks of the sequence there are several.
        self._sums[key] = self._sums[key] + total if key in self._sums else total


def origin(findings: list[tuple[int, Finding]]) -> tuple[int, Finding] | None:
    """Of the findings of all ranks, with the rank of each, the one that the others follow from."""
    return min(
        findings,
        key=lambda entry: (entry[1].is_backward, entry[1].micro_batch, entry[1].order, entry[1].inherited),
        default=None,
    )
