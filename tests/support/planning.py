"""Jobs and batches for tests of background planning."""

from __future__ import annotations

from dataclasses import replace

from helixpipe.elastic import ElasticJob, ideal_costs

LENGTHS = (9000, 4000, 2500, 2500, 1200, 1200, 800, 800, 400, 400, 200, 100)


def make_job(memory_gib: float = 2.0, **changes: object) -> ElasticJob:
    """A small job; from 4 GiB down layers must be checkpointed for ``LENGTHS``, below 1 GiB nothing fits."""
    job = ElasticJob(
        costs=ideal_costs(token_bytes=17 * 8192.0, input_bytes=8192.0, kv_bytes=8192.0),
        num_stages=2,
        num_layers=8,
        memory_limit_bytes=int(memory_gib * 2**30),
    )
    return replace(job, **changes)  # type: ignore[arg-type]
