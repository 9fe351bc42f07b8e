"""The parts of ``tools/benchmark_layer.py``."""
