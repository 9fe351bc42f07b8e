"""Where HelixPipe meets megatron.core: arguments, installation, the forward_backward_func."""

# First, for how it imports megatron.core.
import helixpipe.layers  # noqa: F401
