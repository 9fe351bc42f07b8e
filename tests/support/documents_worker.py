"""Joined documents under a schedule, against each of them alone through Megatron's whole model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from models import (
    VOCABULARY,
    Case,
    build_planned,
    build_reference,
    everywhere,
    gather_gradients,
    initialize,
    planned_schedule,
    relative_error,
)

from helixpipe.layers.documents import Documents, documents_of

EOD = 0


def micro_batches(case: Case) -> Iterator[tuple[torch.Tensor, torch.Tensor, Documents]]:
    """Tokens, labels and documents; in every micro batch they end elsewhere."""
    generator = torch.Generator().manual_seed(5)
    for _ in range(case.num_microbatches):
        text = torch.randint(1, VOCABULARY, (case.micro_batch_size, case.seq_length + 1), generator=generator)
        text[torch.rand(text.shape, generator=generator) < 0.15] = EOD
        yield text[:, :-1], text[:, 1:].contiguous(), documents_of(text[:, :-1], EOD)


def compare(cases: list[Case], megatrons: bool = False) -> list[dict[str, Any]]:
    """Errors of each case; with ``megatrons`` its stages run under Megatron's own schedule function."""
    return [_compare(case, megatrons) for case in cases]


def _compare(case: Case, megatrons: bool) -> dict[str, Any]:
    initialize(case)
    expected_losses, expected = _alone(replace(case, documents=False, sequence_parallel=False))
    chunks = build_planned(case)
    schedule = get_forward_backward_func() if megatrons else planned_schedule(case)
    for chunk in chunks:
        chunk.zero_grad_buffer()
    found = schedule(
        forward_step_func=_forward_step(case),
        data_iterator=[micro_batches(case) for _ in chunks],
        model=chunks,
        num_microbatches=case.num_microbatches,
        seq_length=case.seq_length,
        micro_batch_size=case.micro_batch_size,
        forward_only=False,
    )
    plan = getattr(schedule, "plan", None)
    losses = torch.tensor(everywhere([entry["losses"].tolist() for entry in found], plan))
    gradients = gather_gradients(chunks)
    return {
        "case": str(case),
        "documents": sum(len(row.bounds) for *_, found in micro_batches(case) for row in found.rows),
        "losses": float((losses - expected_losses).abs().max() / expected_losses.abs().max()),
        "missing": sorted(set(expected) ^ set(gradients)),
        "gradients": max(relative_error(gradients[name], expected[name]) for name in expected),
    }


def _forward_step(case: Case) -> Any:
    def forward_step(data_iterator: Any, model: Any) -> Any:
        tokens, labels, documents = next(data_iterator)
        documents = documents.on(tokens.cuda().device)
        output = model(
            tokens.cuda(),
            documents.positions,
            None,
            labels=labels.cuda(),
            **({"packed_seq_params": documents} if case.documents else {}),
        )
        return output, lambda losses: (losses.sum(), {"losses": losses.detach()})

    return forward_step


def _alone(case: Case) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Losses [m, b, s] of documents that stand alone, and the sums of their gradients."""
    chunks = build_reference(case, whole=True)
    chunks[0].zero_grad_buffer()
    losses = []
    for tokens, labels, documents in micro_batches(case):
        losses.append(torch.empty(tokens.shape, dtype=torch.float64))
        for row, spans in enumerate(documents.rows):
            for first, last in spans.bounds:
                ids, wanted = (text[row : row + 1, first:last].cuda() for text in (tokens, labels))
                positions = torch.arange(last - first, device=ids.device)[None]
                found = chunks[0](ids, positions, None, labels=wanted)
                (found.sum() / case.num_microbatches).backward()
                losses[-1][row, first:last] = found.detach()[0]
    return torch.stack(losses), gather_gradients(chunks)
