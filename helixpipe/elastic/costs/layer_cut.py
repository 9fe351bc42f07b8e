"""What a layer costs where it is cut at its attention: how its times and bytes fall to three parts."""

from __future__ import annotations

from dataclasses import dataclass, replace

from helixpipe.plan.cost_model.recomputation import Recompute
from helixpipe.plan.schedules.request import ATTENTION_RANGES

# Measured shares that are all of a forward may add up to a little more.
_ROUNDING = 1e-9


@dataclass(frozen=True, kw_only=True)
class CutLevel:
    """What a cut layer keeps and computes again at one level of recomputation.

    Bytes per token are of all GPUs of a rank together.

    Attributes:
        recompute: the level.
        before_bytes, attention_bytes, after_bytes: that what precedes attention, attention itself and what
            follows it keep per token until their backward.
        workspace_bytes: that exist per token in the backward of what lies between two attentions.
        before_workspace_bytes: in that of what precedes attention, where it is a segment of its own.
        attention_workspace_bytes: in that of attention.
        before_again, after_again: of the forward time that is linear in tokens, the shares that the backwards
            of what precedes attention and of what follows it repeat.
    """

    recompute: str
    before_bytes: float
    attention_bytes: float
    after_bytes: float
    workspace_bytes: float = 0.0
    before_workspace_bytes: float = 0.0
    attention_workspace_bytes: float = 0.0
    before_again: float = 0.0
    after_again: float = 0.0

    def __post_init__(self) -> None:
        known = [level.value for level in Recompute]
        if self.recompute not in known:
            raise ValueError(f"recompute {self.recompute!r} is unknown; known: {', '.join(known)}")
        if self.before_again + self.after_again > 1 + _ROUNDING:
            raise ValueError("before_again and after_again are shares of one forward: together at most 1")


@dataclass(frozen=True, kw_only=True)
class LayerCut:
    """How a layer's costs fall to what precedes attention, attention, and what follows it.

    Attention takes all time that grows with the square of a sequence. Messages are of all GPUs of a rank.
    With a range that has weights, what precedes attention (QKV) is a segment of its own on its rank.

    Attributes:
        forward_before, backward_before: of the time that is linear in tokens, the share before attention.
        into_bytes, out_bytes: of the messages to the attention rank and from it, per token.
        levels: what is kept, the least computed again first.
        attention_range: pieces that the attention rank runs.
        forward_with, backward_with: of the time that is linear in tokens, the share of attention's segment.
        operation_ms: that an operation takes whatever its size, beside what a layer does.
        lent_weight_bytes, lent_gradient_bytes: of the last segment's weights, which other ranks borrow,
            and of their gradients.
        qkv_weight_bytes, qkv_gradient_bytes: of what is lent of a layer with QKV.
        projection_weight_bytes, projection_gradient_bytes: and with attention.
    """

    forward_before: float
    backward_before: float
    into_bytes: float
    out_bytes: float
    levels: tuple[CutLevel, ...]
    attention_range: str = "core"
    forward_with: float = 0.0
    backward_with: float = 0.0
    operation_ms: float = 0.0
    lent_weight_bytes: int = 0
    lent_gradient_bytes: int = 0
    qkv_weight_bytes: int = 0
    qkv_gradient_bytes: int = 0
    projection_weight_bytes: int = 0
    projection_gradient_bytes: int = 0

    def __post_init__(self) -> None:
        if not (0 < self.forward_before < 1 and 0 < self.backward_before < 1):
            raise ValueError("forward_before and backward_before are shares, above 0 and below 1")
        if self.forward_before + self.forward_with > 1 or self.backward_before + self.backward_with > 1:
            raise ValueError("the shares before and with attention are of one layer: together at most 1")
        if self.attention_range not in ATTENTION_RANGES:
            raise ValueError(
                f"attention_range {self.attention_range!r:.40} is unknown; known: "
                f"{', '.join(ATTENTION_RANGES)}"
            )
        if not self.levels:
            raise ValueError("a cut layer needs at least one level of recomputation")

    @property
    def has_weights(self) -> bool:
        """True if the attention rank borrows weights, and QKV is a segment of its own."""
        return self.attention_range != "core"

    def keeping(self, share: float) -> LayerCut:
        """The same layer where it keeps that share of the bytes."""
        names = ("before_bytes", "attention_bytes", "after_bytes")
        levels = (
            replace(level, **{name: share * getattr(level, name) for name in names}) for level in self.levels
        )
        return replace(self, levels=tuple(levels))

    def level(self, recompute: str) -> CutLevel:
        """What a level keeps.

        Raises:
            ValueError: the costs do not have it.
        """
        for level in self.levels:
            if level.recompute == recompute:
                return level
        known = ", ".join(level.recompute for level in self.levels)
        raise ValueError(f"the costs know no level of recomputation {recompute!r}; known: {known}")
