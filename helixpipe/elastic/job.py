"""What a batch is planned for: costs, sizes and limits."""

from __future__ import annotations

from dataclasses import dataclass

from helixpipe.elastic.chunk_schedule import SCHEDULE
from helixpipe.elastic.costs.chunk_costs import ChunkCosts
from helixpipe.plan.schedules.request import require_multiple
from helixpipe.plan.stage_layers import check_stage_layers, stage_counts


@dataclass(frozen=True, kw_only=True)
class ElasticJob:
    """A model on a pipeline.

    Attributes:
        costs: what chunks take and keep.
        num_stages: pipeline-parallel size d_p.
        num_layers: L, a multiple of it unless ``stage_layers`` says where they are.
        stage_layers: 1F1B: layers of each stage, where they differ; empty for as many in each.
        memory_limit_bytes: of one GPU, for states, activations and buffers of messages together.
        reserved_bytes: of it, for each stage, what buffers of messages are known to take; empty for nothing.
        token_capacity: tokens that a chunk may hold; None for what memory allows.
        gap: share by which the checkpointing solver may miss the least delay.
        time_limit_s: of that solver for one batch, after which the best that it has found is taken.
        schedule: that batches are trained by, ``elastic`` or ``elastic-helix``, or ``auto`` where they are
            only planned.
        recompute: elastic helix: the level of the model, where it is built; None for the planner's choice.
        attention_range: elastic helix: that of the model, in the same way.
    """

    costs: ChunkCosts
    num_stages: int
    num_layers: int
    memory_limit_bytes: int
    stage_layers: tuple[int, ...] = ()
    reserved_bytes: tuple[int, ...] = ()
    token_capacity: int | None = None
    gap: float = 0.02
    time_limit_s: float = 6.0
    schedule: str = SCHEDULE
    recompute: str | None = None
    attention_range: str | None = None

    def __post_init__(self) -> None:
        for name, value in (
            ("pipeline-parallel size", self.num_stages),
            ("number of layers", self.num_layers),
            ("memory limit in bytes", self.memory_limit_bytes),
            ("token capacity", 1 if self.token_capacity is None else self.token_capacity),
        ):
            if value < 1:
                raise ValueError(f"the {name} must be at least 1, not {value}")
        if self.gap < 0 or self.time_limit_s <= 0:
            raise ValueError("the solver needs a gap that is not negative and a time limit above 0")
        if self.stage_layers:
            check_stage_layers(self.stage_layers, self.num_layers, self.num_stages)
        else:
            self.require_even_stages()

    def require_even_stages(self) -> None:
        """``ValueError`` unless the ranks can have as many layers each."""
        require_multiple(
            self.num_layers, self.num_stages, "the number of layers", "the pipeline-parallel size"
        )

    @property
    def layers_by_stage(self) -> tuple[int, ...]:
        """Layers of each stage."""
        return stage_counts(self.stage_layers, self.num_layers, self.num_stages)

    def chunk_capacity(self) -> int:
        """Tokens that a chunk may hold.

        Unless given, as many as let every stage hold a pipeline of such chunks, of uncut sequences, with
        everything checkpointed, or with nothing where that takes less, as it may on a stage of one layer.

        Raises:
            ValueError: not a single token fits.
        """
        if self.token_capacity is not None:
            return self.token_capacity
        costs = self.costs
        capacity = float("inf")
        for stage, layers in enumerate(self.layers_by_stage):
            states = costs.state_bytes(stage, self.num_stages, layers)
            is_last = stage == self.num_stages - 1
            logits = costs.logits_bytes if is_last else 0.0
            head = costs.head_workspace_bytes if is_last else 0.0
            in_flight = self.num_stages - stage
            unchecked = in_flight * (layers * costs.token_bytes + logits)
            unchecked += max(costs.layer_workspace_bytes, head)
            checkpointed = in_flight * (layers * costs.input_bytes + logits)
            checkpointed += max(costs.layer_workspace_bytes + costs.token_bytes, head)
            per_token = min(checkpointed, unchecked) / costs.tensor_parallel
            if per_token:
                capacity = min(capacity, (self.memory_limit_bytes - states) / per_token)
            if capacity < costs.token_multiple:
                limit_gib = self.memory_limit_bytes / 2**30
                raise ValueError(
                    f"stage {stage} cannot hold one token: weights, gradients and optimizer states take "
                    f"{states / 2**30:.2f} GiB of {limit_gib:.2f} GiB; use more stages, a larger "
                    "tensor-parallel size or a higher limit"
                )
        most = int(min(capacity, 2**62))
        return most - most % costs.token_multiple


def check_lengths(lengths: object) -> tuple[int, ...]:
    """Lengths of a batch's sequences; ``ValueError`` if they are none."""
    if not isinstance(lengths, (list, tuple)) or not lengths:
        raise ValueError("lengths must be a list of whole numbers with at least one sequence")
    for index, length in enumerate(lengths):
        if type(length) is not int or length < 1:
            raise ValueError(
                f"length {index} must be a whole number of tokens above 0, found {length!r:.40}; leave empty "
                "sequences out"
            )
    return tuple(lengths)
