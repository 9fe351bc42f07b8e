"""The training application: arguments, set-up, data, training loop and checkpoints over megatron.core."""
