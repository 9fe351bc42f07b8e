"""Megatron's model over chunks: packed sequences, and slices that attend to the slices before them."""
