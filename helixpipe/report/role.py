"""What an operation is to the eye: the roles that a drawing tells apart."""

from __future__ import annotations

from enum import Enum

from helixpipe.plan.operation import Kind, Operation
from helixpipe.plan.simulation.timeline import Timeline


class Role(str, Enum):
    """Roles in the order of a legend."""

    FORWARD = "forward"
    ATTENTION_FORWARD = "attention forward"
    BACKWARD = "backward"
    ATTENTION_BACKWARD = "attention backward"
    WEIGHT = "weight gradient"


def role_of(operation: Operation, timeline: Timeline) -> Role:
    """The role of a compute operation; attention is known only if the timeline has segment names."""
    if operation.kind is Kind.W:
        return Role.WEIGHT
    attention = timeline.is_attention(operation)
    if operation.kind is Kind.F:
        return Role.ATTENTION_FORWARD if attention else Role.FORWARD
    return Role.ATTENTION_BACKWARD if attention else Role.BACKWARD
