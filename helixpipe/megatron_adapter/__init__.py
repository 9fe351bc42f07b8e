"""Where HelixPipe meets megatron.core: arguments, installation, the forward_backward_func."""
