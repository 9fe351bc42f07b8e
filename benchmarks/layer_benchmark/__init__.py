"""The parts of ``benchmarks/layer.py``."""
