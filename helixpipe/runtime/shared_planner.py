"""One plan for all ranks of a replica.

Ranks that planned for themselves would differ: the solver stops at a time limit, and whether a plan is late
is a matter of time, too. So the first rank of a replica plans, in the background, and sends the plan, or why
there is none, to the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.distributed as dist

from helixpipe.elastic.job import ElasticJob
from helixpipe.elastic.service.background import BackgroundPlanner, PlannedBatch


class SharedPlanner:
    """A :class:`BackgroundPlanner` whose plans all ranks of a group get.

    Args:
        make_planner: makes the planner, on the first rank of the group alone.
        job: what is planned for; the same on all ranks.
        group: the ranks of a replica, over a backend for CPU tensors; None for a rank by itself. It should
            carry no other messages, for they would get in each other's way.
    """

    def __init__(
        self,
        make_planner: Callable[[ElasticJob], BackgroundPlanner],
        job: ElasticJob,
        group: dist.ProcessGroup | None,
    ) -> None:
        self.job = job
        self._group = group
        self._planner = make_planner(job) if group is None or group.rank() == 0 else None

    def submit(self, lengths: Sequence[int]) -> None:
        """Begin to plan a batch; every rank calls it with the same lengths.

        Raises:
            ValueError: lengths that are none.
        """
        if self._planner is not None:
            self._planner.submit(lengths)

    def result(self) -> PlannedBatch:
        """The plan of the batch that was submitted last; collective.

        Raises:
            ValueError: no plan fits; the same on all ranks.
        """
        found: PlannedBatch | ValueError | None = None
        if self._planner is not None:
            try:
                found = self._planner.result()
            except ValueError as error:
                found = error
        if self._group is not None:
            # The object itself, which has been validated, and not JSON, which each rank would validate again.
            box = [found]
            dist.broadcast_object_list(box, src=dist.get_global_rank(self._group, 0), group=self._group)
            found = box[0]
        if isinstance(found, ValueError):
            raise found
        assert found is not None
        return found

    def close(self) -> None:
        """End the planning process."""
        if self._planner is not None:
            self._planner.close()
