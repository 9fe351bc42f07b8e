"""Names of the operation-based interface."""


class FusibleOperation:
    """One operation."""


class Sequential:
    """Several of them."""
