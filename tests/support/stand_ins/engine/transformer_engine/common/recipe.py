"""Names that megatron.core derives from."""


class DelayedScaling:
    """Of fp8."""
