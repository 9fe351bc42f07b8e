"""Compute what a layer puts out a second time, and compare: for faults that leave every number finite."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from helixpipe.megatron_adapter.schedule import device
from helixpipe.plan.operation import Kind
from helixpipe.reliability.exit_codes import NumericsError
from helixpipe.runtime.trace import Trace
from megatron.pretrain.checkpoint.parameter_names import canonical_modules, layer_of
from megatron.pretrain.checkpoint.sums import as_integers


class SecondComputation:
    """Every ``every`` iterations, one layer of this rank is computed twice in all forward passes.

    The layers take turns; what is outside of layers counts as one. All modules without modules in them must
    put out the same bits, given the same input: they draw no random numbers, except for dropout, which is
    left out. Nothing waits for the device before the end of the iteration.

    Args:
        chunks: model chunks.
        trace: tells which operation is running.
        every: iterations; None for never.
    """

    def __init__(self, chunks: list[torch.nn.Module], trace: Trace, every: int | None) -> None:
        self._trace = trace
        self._every = every
        self._layers: dict[int | None, list[tuple[str, torch.nn.Module]]] = {}
        for chunk in chunks:
            for name, module in canonical_modules(chunk):
                if not isinstance(module, torch.nn.Dropout):
                    self._layers.setdefault(layer_of(name), []).append((name, module))
        self._found: dict[tuple[str, int], torch.Tensor] = {}

    def is_due(self, iteration: int) -> bool:
        """Whether a layer is computed twice in this iteration."""
        return self._every is not None and iteration % self._every == 0

    @contextmanager
    def watching(self, iteration: int) -> Iterator[None]:
        """Compare inside the context, if it is time to."""
        with self._hooks(iteration) if self.is_due(iteration) else nullcontext():
            yield

    def check(self, iteration: int) -> None:
        """Refuse to go on if any rank has found a difference; collective, where it is time to.

        Raises:
            NumericsError: on every rank; names module, micro batch, rank and host.
        """
        if not self.is_due(iteration):
            return
        total = torch.stack([found.to(device()) for found in self._found.values()] or [self._nothing()]).sum()
        dist.all_reduce(total)
        if not total:
            return
        texts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(texts, self._text())
        raise NumericsError(
            f"iteration {iteration}: {next(filter(None, texts))}: a processor or its memory is faulty; the "
            "optimizer has not stepped"
        )

    @contextmanager
    def _hooks(self, iteration: int) -> Iterator[None]:
        assert self._every is not None
        self._found.clear()
        turns = list(self._layers.values())
        chosen = turns[iteration // self._every % len(turns)] if turns else []
        hooks = [
            module.register_forward_hook(
                lambda module, positional, named, output, name=name: self._compare(
                    name, module, positional, named, output
                ),
                with_kwargs=True,
            )
            for name, module in chosen
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _compare(self, name: str, module: torch.nn.Module, positional: Any, named: Any, output: Any) -> None:
        operation = self._trace.current
        if operation is None or operation.kind is not Kind.F:
            return
        with torch.no_grad():
            again = module.forward(*positional, **named)
        key = (name, operation.micro_batch)
        for first, second in zip(_tensors(output), _tensors(again), strict=True):
            count = (as_integers(first) != as_integers(second)).sum()
            # In slices of the sequence there are several.
            self._found[key] = self._found[key] + count if key in self._found else count

    def _text(self) -> str:
        """What this rank has found; empty if all was the same."""
        found = ((name, batch, int(count)) for (name, batch), count in self._found.items())
        name, batch, count = next((entry for entry in found if entry[2]), ("", 0, 0))
        if not count:
            return ""
        stage = parallel_state.get_pipeline_model_parallel_rank()
        return (
            f"{count} numbers of the output of {name} in micro batch {batch} were others when computed again "
            f"on rank {dist.get_rank()} (stage {stage}, host {socket.gethostname()})"
        )

    @staticmethod
    def _nothing() -> torch.Tensor:
        return torch.zeros((), dtype=torch.int64)


def _tensors(output: Any) -> list[torch.Tensor]:
    parts = output if isinstance(output, tuple) else (output,)
    return [part for part in parts if isinstance(part, torch.Tensor)]
