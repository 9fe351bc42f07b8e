"""Measure a layer's pieces, the optimizer and the links on the present machine, for the planner."""

from helixpipe.profiling.profile import profile, profile_chunks

__all__ = ["profile", "profile_chunks"]
