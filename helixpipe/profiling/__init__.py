"""Measure a layer's pieces, the optimizer and the links on the present machine, for the planner."""

from helixpipe.profiling.profile import profile

__all__ = ["profile"]
